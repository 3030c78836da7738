"""transformers is the oracle, and for vocabularies of other makers their own libraries."""

import base64
import json
import pickle
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers

transformers = pytest.importorskip("transformers")
tiktoken = pytest.importorskip("tiktoken")

from kimi_jax.data import hf_vocab  # noqa: E402
from kimi_jax.data.hf_tokenizer import NO_IMAGES, HFTokenizer  # noqa: E402

CORPUS = [
    "The quick brown fox computes 12345 + 678 = 13023, doesn't it?\n\n",
    "def f(x):\n    return x ** 2  # 平方\n",
    "你好，世界！数学很有趣。",
    "  two  spaces\tand a tab 🙂🙂",
] * 3
TEXTS = [
    "",
    " ",
    "\n",
    "The quick brown fox doesn't compute 12345678 + 90.",
    "I'LL  say   it:\t\t x\r\n\r\n   y \n",
    "你好，世界！龘 mixed中文text",
    "🙂👩\u200d👩\u200d👧 e\u0301 é ﬁ Å",
    "def f(x):\n\n        return {'a': x[0] != 1}  # !!\n",
    "\u2581 a\u2581b",
    "<|im_start|>user <|im_end|><|image_pad|> <think>x</think>  <|im_end |> <s></s>",
    "\x00\x7f\u00a0\u2028\ufeff",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]


def trained(pattern):
    """A byte-level BPE as in a tokenizer.json, with special tokens and two that are not."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=347, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return backend


@pytest.fixture(scope="module")
def backend():
    return trained(hf_vocab._ONE_DIGIT)


def write(directory, tokenizer_config, /, **files):
    files = {"tokenizer_config": tokenizer_config} | files
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    return directory


def qwen(directory, backend, **files):
    backend.save(str(directory / "tokenizer.json"))
    return write(directory, {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}, **files)


def assert_same(ours, oracle, texts=TEXTS):
    """Ids with and without special tokens, and the text of all ids and of each beginning of them."""
    for text in texts:
        ids = ours.encode(text, allow_special=True)
        assert ids == oracle.encode(text, add_special_tokens=False), text
        plain = ours.encode(text)
        assert plain == oracle.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert not set(plain) & set(ours.special_ids.values())
        assert ours.encode_document(text) == oracle(text).input_ids
        for stop in range(len(ids) + 1):
            for keep in (True, False):
                expected = oracle.decode(ids[:stop], skip_special_tokens=not keep)
                assert ours.decode(ids[:stop], keep_special=keep) == expected
    assert ours.vocab_size == len(oracle)
    assert {name: oracle.special_tokens_map.get(name) for name in ours.special_tokens} == ours.special_tokens


def test_tokenizer_json(backend, tmp_path):
    qwen(tmp_path, backend, generation_config={"eos_token_id": [349, 347], "pad_token_id": 347})
    ours = HFTokenizer.load(tmp_path)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    assert_same(ours, oracle)
    assert (ours.end_id, ours.end_ids, ours.pad_id) == (349, (349, 347), 347)
    assert ours.image_id == oracle.convert_tokens_to_ids("<|image_pad|>") == 350
    assert ours.text_of(350) == "<|image_pad|>" and ours.text_of(9973) is None


def test_which_images_it_reads(backend, tmp_path):
    qwen(tmp_path, backend, config={"model_type": "qwen2", "text_config": {"eos_token_id": 347}})
    ours = HFTokenizer.load(tmp_path)
    assert (ours.image_id, ours.end_ids) == (NO_IMAGES, (349, 347))  # the vocabulary has the token, the model no eyes
    assert HFTokenizer.load(qwen(tmp_path, backend, config={"vision_config": {}})).image_id == 350
    assert HFTokenizer.load(qwen(tmp_path, backend, config={"image_token_id": 348})).image_id == 348


def test_unfinished_characters_and_unknown_ids(backend, tmp_path):
    ours = HFTokenizer.load(qwen(tmp_path, backend))
    ids = ours.encode("x龘")
    assert len(ids) == 4
    assert [ours.decode(ids[:stop]).rstrip("\ufffd") for stop in range(5)] == ["", "x", "x", "x", "x龘"]
    assert ours.decode(ids[:-1]).endswith("\ufffd")
    assert ours.decode(np.array([*ids, 9973], np.int32)) == "x龘"  # embeddings are longer than vocabularies
    with pytest.raises(ValueError, match=r"\[-7\] are negative"):
        ours.decode([3, -7])


def test_a_begin_token_and_late_additions(backend, tmp_path):
    """What tokenizer_config.json adds to a tokenizer.json, and a tokenizer.json that begins texts itself."""
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 347)]
    )
    copy.save(str(tmp_path / "tokenizer.json"))
    added = {"353": {"content": "<late>", "special": True}, "354": {"content": "</late>", "special": False}}
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<extra>"]}
    write(tmp_path, config | {"added_tokens_decoder": added, "tokenizer_class": "PreTrainedTokenizerFast"})
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = HFTokenizer.load(tmp_path)
    assert ours.encode_document("x")[0] == 347 and len(ours.encode("x")) == 1
    assert_same(ours, oracle, [*TEXTS, "a<late>b</late> <extra>"])
    config["added_tokens_decoder"] = {"11": {"content": "<late>"}}
    with pytest.raises(ValueError, match="'<late>' has id 11, but in the vocabulary it has 353"):
        HFTokenizer.load(write(tmp_path, config))


def test_an_old_list_of_added_tokens_takes_nothing_from_a_tokenizer_json(backend, tmp_path):
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()} | {"<new>": 353}
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ours = HFTokenizer.load(write(tmp_path, config, added_tokens=added, special_tokens_map={"eos_token": "<|im_end|>"}))
    assert ours.special_ids.keys() == set(SPECIAL)
    assert_same(ours, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), [*TEXTS, "a <new>b"])


def test_vocab_and_merges(backend, tmp_path):
    backend.model.save(str(tmp_path))
    added = {
        str(index): {"content": token.content, "special": token.special, "normalized": False}
        for index, token in backend.get_added_tokens_decoder().items()
    }
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config |= {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    write(tmp_path, config)
    assert_same(HFTokenizer.load(tmp_path), transformers.Qwen2Tokenizer.from_pretrained(tmp_path))


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    """Llama 2's settings."""
    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=401,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece(piece_model, tmp_path, legacy):
    pytest.importorskip("google.protobuf")
    shutil.copy(piece_model, tmp_path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    write(tmp_path, config | {"legacy": legacy, "add_bos_token": True}, added_tokens={"<new>": 401})
    ours = HFTokenizer.load(tmp_path)
    assert ours.encode_document("x")[0] == 1 == ours.special_ids["<s>"]
    assert_same(ours, transformers.LlamaTokenizer.from_pretrained(tmp_path), [*TEXTS, "a <new>b", "a <s> b<s>c"])
    library = sentencepiece.SentencePieceProcessor(model_file=str(piece_model))
    for text in TEXTS:
        if not text.startswith(
            (" ", "\u2581")
        ):  # then the library puts one more space before it, and transformers none
            assert ours.encode(text) == library.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "kimi.tiktoken"])
def test_tiktoken(backend, tmp_path, name):
    letters = {letter: byte for byte, letter in enumerate(hf_vocab.byte_letters())}
    vocabulary = backend.get_vocab(with_added_tokens=False)
    # A rank is a place in the order of merges, and single bytes come first.
    order = sorted(vocabulary, key=lambda token: (len(token) > 1, vocabulary[token]))
    ranks = {bytes(letters[letter] for letter in token): rank for rank, token in enumerate(order)}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    special = {"<|begin|>": len(ranks), "<|im_end|>": len(ranks) + 5}
    added = {str(rank): {"content": token, "special": True, "normalized": False} for token, rank in special.items()}
    config = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    pattern = hf_vocab._THREE_DIGITS
    if name.endswith("tiktoken"):
        config["tokenizer_class"], pattern = "TikTokenTokenizer", hf_vocab._HAN_APART
    ours = HFTokenizer.load(write(tmp_path, config))
    library = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text, disallowed_special=())
        assert ours.encode(text, allow_special=True) == library.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(ranks) + 6 and ours.text_of(len(ranks) + 3) == f"<|reserved_token_{len(ranks) + 3}|>"
    if name == "tokenizer.model":
        assert_same(ours, transformers.TokenizersBackend.from_pretrained(tmp_path))


def test_a_copy_in_another_process_behaves_alike(backend, tmp_path):
    ours = HFTokenizer.load(qwen(tmp_path, backend))
    copy = pickle.loads(pickle.dumps(ours))
    for text in TEXTS:
        assert copy.encode(text) == ours.encode(text)
        assert copy.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def test_errors_name_the_cause(backend, piece_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no vocabulary in .*vocab.json with merges.txt"):
        HFTokenizer.load(tmp_path)
    ours = HFTokenizer.load(qwen(tmp_path, backend))
    ours.check_vocab(ours.vocab_size)
    with pytest.raises(ValueError, match="ids up to 352, but the embedding of the model only 352 rows"):
        ours.check_vocab(352)
    with pytest.raises(ValueError, match="which token ends a text"):
        HFTokenizer.load(write(tmp_path, {}))
    (tmp_path / "tokenizer_config.json").write_text("[7]")
    with pytest.raises(ValueError, match="tokenizer_config.json' must hold a JSON object"):
        HFTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json' is not JSON"):
        HFTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.json", b""),
        ("tokenizer.model", b"\x0a\x05abc"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"IQ== 0\nIg== 1\nbroken\n"),
        ("vocab.json", b'{"a": 0}'),
        ("vocab.json", b"["),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    write(tmp_path, {"eos_token": "x"})
    with pytest.raises(ValueError, match=f"{name}' is not a vocabulary that can be read"):
        HFTokenizer.load(tmp_path)


@pytest.mark.parametrize(("option", "message"), [("unigram", "its type is 'unigram'"), ("nfkc", "rules of its own")])
def test_other_sentencepiece_models_are_refused(tmp_path, option, message):
    kind = {"model_type": "unigram"} if option == "unigram" else {"model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=97,
        hard_vocab_limit=False,
        normalization_rule_name="identity" if option == "unigram" else "nmt_nfkc",
        minloglevel=2,
        **kind,
    )
    with pytest.raises(ValueError, match=message):
        HFTokenizer.load(write(tmp_path, {"eos_token": "</s>"}))
