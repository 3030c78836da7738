import pytest
import sentencepiece

from kimi_jax.data.tokenizer import Tokenizer

CORPUS = [
    "Compute 7+15-8 from left to right.\n7+15=22. 22-8=14.\n\nAnswer: 14",
    "  two  spaces\tand a tab",
    "你好，世界 🙂",
]
TEXTS = [
    "",
    " ",
    "Compute 3+4.\n\n  Answer: 7\n",
    "\t\r\n \n",
    "你好，世界！龘",
    "🙂👩‍👩‍👧 é e\u0301",
    "\u2581 a\u2581\u2581b \u2581",  # how SentencePiece itself writes a space
    "<|end|><|user|><|assistant|><|image|><|pad|><unk><0x0A>",
    "\ufeff\u00a0\u2028\x00\x7f \u2047\u2585",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(CORPUS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=331)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    special = {tokenizer.pad_id, tokenizer.end_id, tokenizer.user_id, tokenizer.assistant_id, tokenizer.image_id}
    assert tokenizer.decode(ids) == text
    assert len(special) == 5 and tokenizer.pad_id == 0
    assert not special & set(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_frequent_text_is_shorter_than_its_bytes_and_digits_stay_single(tokenizer):
    assert len(tokenizer.encode("Compute")) < len("Compute")
    assert [tokenizer.decode([token]) for token in tokenizer.encode("15=22")] == ["1", "5", "=", "2", "2"]


def test_encoding_is_additive_and_special_tokens_decode_to_nothing(tokenizer):
    first, second = tokenizer.encode(TEXTS[2]), tokenizer.encode(TEXTS[4])
    turns = [tokenizer.user_id, *first, tokenizer.image_id, tokenizer.assistant_id, *second, tokenizer.end_id, 0]
    assert tokenizer.decode(turns) == TEXTS[2] + TEXTS[4]


def test_every_prefix_of_a_response_decodes(tokenizer):
    text = "x🙂龘"
    ids = tokenizer.encode(text)
    for stop in range(len(ids) + 1):
        assert text.startswith(tokenizer.decode(ids[:stop]).rstrip("\ufffd"))
    assert tokenizer.decode(ids[:-1]) == "x🙂\ufffd"


def test_long_texts_are_learnt_from(tmp_path):
    tokenizer = Tokenizer.train(["ab" * 7919], tmp_path / "m", vocab_size=269)
    assert len(tokenizer.encode("abab")) < 4


def test_training_is_reproducible_and_the_file_is_the_bytes(tokenizer, tmp_path, capfd):
    path = tmp_path / "tokenizer.model"
    again = Tokenizer.train(iter(CORPUS), path, vocab_size=331)
    assert capfd.readouterr() == ("", "")
    assert again.to_bytes() == tokenizer.to_bytes() == path.read_bytes()
    for copy in (Tokenizer.load(path), Tokenizer.from_bytes(tokenizer.to_bytes())):
        assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert (copy.vocab_size, copy.end_id) == (tokenizer.vocab_size, tokenizer.end_id)


def test_errors_name_the_cause(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*nowhere.model"):
        Tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "broken.model").write_bytes(b"broken")
    with pytest.raises(ValueError, match="broken.model.*not a SentencePiece model"):
        Tokenizer.load(tmp_path / "broken.model")
    with pytest.raises(ValueError, match="0 bytes"):
        Tokenizer.from_bytes(b"")
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train(["", ""], tmp_path / "m", vocab_size=331)
    with pytest.raises(ValueError, match="vocab_size=262 is too small"):
        Tokenizer.train(CORPUS, tmp_path / "m", vocab_size=262)
    with pytest.raises(ValueError, match="vocab_size=263"):
        Tokenizer.train(CORPUS, tmp_path / "m", vocab_size=263)
    assert not (tmp_path / "m").exists()
    for unknown in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"\[{unknown}\] are not in the vocabulary"):
            tokenizer.decode([7, unknown])


def test_a_foreign_model_is_refused(tmp_path):
    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=prefix, vocab_size=61, model_type="bpe", minloglevel=2
    )
    with pytest.raises(ValueError, match="lacks the control tokens.*end"):
        Tokenizer.load(prefix + ".model")


def test_a_corpus_of_short_texts_is_enough(tmp_path):
    tokenizer = Tokenizer.train(["1?", "2?", "it is 3"], tmp_path / "short.model", vocab_size=280)
    assert tokenizer.decode(tokenizer.encode("it is 1?")) == "it is 1?"
