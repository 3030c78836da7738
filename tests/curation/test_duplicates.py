"""What counts as a copy: other words, other spellings, other compression; but not other numbers or other pictures."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from kimi_jax import tasks
from kimi_jax.curation.duplicates import find_copies, group_pictures, read
from kimi_jax.types import Outcome, Problem, Verdict


def problem(id_, prompt, answer="7", images=(), task="exact"):
    return Problem(id_, task, prompt, answer, images=tuple(images))


def copies(problems, evaluation=(), *, similarity=0.35, verify=tasks.verify):
    return find_copies(problems, evaluation, similarity=similarity, verify=verify)


SAME = [
    ("Compute 3+4.", "What is the value of $3 + 4$?"),
    ("Compute 3*4-5.", "请计算 3×4−5 的值。"),
    ("Compute 3 plus 4.", "3+4=?"),
    ("Evaluate \\frac{3}{4} + 5.", "What is 3/4 + 5?"),
    ("What is 1,234 + 5?", "Compute 1234 + 5.0."),
    ("7. (5 points) Find the largest prime below 100.", "What is the largest prime below 100?"),
    ("Ben has three red and two green marbles. How many?", "Ben has 3 red and 2 green marbles. How many has he?"),
    (
        "A train covers 180 km in 3 hours. Find its average speed.",
        "Find the average speed of a train that covers 180 km in three hours.",
    ),
    ("Find a two-digit number divisible by 35.", "Find a two digit number, divisible by 35."),
]
DIFFERENT = [
    ("Compute 3+4.", "Compute 3+5."),
    ("Compute 2+2.", "Compute 2*2."),
    ("Compute 3-4+5.", "Compute 3+4+5."),
    ("What is 10 minus 4?", "What is 100 minus 4?"),
    ("Find the area of a circle of radius 5.", "Count the apples of a farmer with 5 baskets."),
    ("x^2=49, x>0. Find x.", "x^3=49, x>0. Find x."),
    ("小明有3个苹果，又买了4个。", "小红有3条鱼，送走了4条。"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_other_words(first, second):
    assert copies([problem("a", first), problem("b", second)])[1].of == "a"


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_other_problems(first, second):
    assert not copies([problem("a", first), problem("b", second)])


def test_similar_words_with_another_answer_are_another_problem():
    first = "Anna and Ben share a large cake with 7 candles, and Ben eats a quarter of his part. How much is left?"
    second = first.replace("quarter", "third")
    assert copies([problem("a", first, "5"), problem("b", second, "5")])
    assert not copies([problem("a", first, "5"), problem("b", second, "6")])
    assert copies([problem("a", first, "5"), problem("b", first.upper(), "6")])  # the same words


def test_answers_in_other_forms_are_equal_if_the_verifier_says_so():
    pair = [problem("a", "What share is 3 of 4?", "0.75"), problem("b", "What share is 3 out of 4?", "3/4")]
    assert not copies(pair)
    assert copies(pair, verify=lambda problem, text: Verdict(Outcome.CORRECT if "0.75" in text else Outcome.WRONG))


def test_ids_are_canonical():
    first = problem("a", "Compute 3+4.")
    again = problem("a", "Wie viel ist sieben?")
    assert copies([again], [first])[0].origin == "contaminated"


def test_evaluation_goes_before_duplicates_and_the_first_copy_is_kept():
    evaluation = [problem("e", "Compute 3+4.")]
    problems = [
        problem("a", "Compute 5+6."),
        problem("b", "What is 3+4?"),
        problem("c", "What is 5+6?"),
        problem("d", "Calculate 3+4!"),
    ]
    found = {problems[i].id: (copy.origin, copy.of) for i, copy in copies(problems, evaluation).items()}
    assert found == {"b": ("contaminated", "e"), "c": ("duplicate", "a"), "d": ("contaminated", "e")}


def pictures(count, size=(112, 112), seed=0):
    """Of coloured boxes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.NEAREST)) for p in coarse]


def compressed(image, factor):
    file = io.BytesIO()
    size = (int(image.shape[1] * factor), int(image.shape[0] * factor))
    Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
    return np.asarray(Image.open(file).convert("RGB"))


def test_the_same_words_about_other_pictures():
    a, b = pictures(2)
    nearly = a.copy()
    nearly[48:64, 48:64] ^= 255
    ask = lambda id_, *images: problem(id_, "How many boxes? " + "<image>" * len(images), images=images)  # noqa: E731
    problems = [ask("a", a), ask("b", b), ask("c", a.copy()), ask("d", compressed(a, 1.5)), ask("e", nearly)]
    problems += [ask("f", a, b), ask("g", b, a), ask("h", compressed(a, 0.9), compressed(b, 1.1)), ask("i")]
    found = copies(problems)
    assert {problems[i].id: copy.of for i, copy in found.items()} == {"c": "a", "d": "a", "h": "f"}


def test_pictures_are_grouped_as_by_comparing_each_with_each():
    shown = [[image] for image in pictures(23)]
    shown += [[compressed(image, 1.3)] for (image,) in shown[5:12]]
    expected = [*range(23), *range(5, 12)]
    groups = group_pictures(shown)
    for i, j in itertools.combinations(range(len(shown)), 2):
        assert (groups[i] == groups[j]) == (expected[i] == expected[j])


def test_among_many_problems_minhash_finds_what_comparing_all_finds(monkeypatch):
    rng = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]
    texts = [" ".join(rng.choice(words, 17)) for _ in range(101)]
    for text in texts[:53]:
        parts = text.split()
        parts[int(rng.integers(17))] = "unlike"
        texts.append(" ".join(parts))
    problems = [problem(str(i), text) for i, text in enumerate(texts)]
    by_minhash = copies(problems, similarity=0.6)
    monkeypatch.setattr("kimi_jax.curation.duplicates._FEW", len(problems))
    by_all = copies(problems, similarity=0.6)
    assert len(by_all) == 53 and by_minhash == by_all
    assert all(copy.of == str(i - 101) for i, copy in by_all.items())


def test_what_is_read():
    reading = read("3. (4 分) A 2-digit number, say 1,000.50, is <image> at most x^{2} \\cdot 7 km/h = ?")
    assert reading.words == ("a", "2", "digit", "number", "say", "1000.5", "is", "at", "most", *"x^2*7", "km", "h")
    assert reading.numbers == ("*", "1000.5", "2", "2", "7", "^")
