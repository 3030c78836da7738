"""Problems of which one knows what curation must do with them, and a scripted model that answers them.

The numbers of each kind are distinct primes. Of the good ones many look like bad ones: the same words about another
picture, the same numbers in another operation, words of proofs and choices that ask for neither.
"""

import dataclasses
import io

import numpy as np
from PIL import Image

from kimi_jax.curation.asking import Answer
from kimi_jax.tasks import get_task
from kimi_jax.tasks.base import make_problems
from kimi_jax.types import Problem, StopReason

SIZES = {
    "good": 311,
    "trivial": 43,
    "hackable": 47,
    "duplicate": 53,
    "contaminated": 41,
    "multiple_choice": 37,
    "true_false": 31,
    "proof": 29,
}

# Wordings of one problem, each list of another, and its answer from three numbers.
_TEMPLATES = (
    (
        (
            "Compute {a}*{b}+{c}.",
            "What is the value of ${a} \\times {b} + {c}$?",
            "计算 {a}×{b}+{c} 的值。",
            "Please evaluate the following expression: {a} * {b} + {c} = ?",
        ),
        lambda a, b, c: a * b + c,
    ),
    (
        (
            "A shop sells {a} boxes with {b} pencils each and {c} single pencils. How many pencils does it sell?",
            "12. (5 points) A shop sells {a} boxes with {b} pencils each, and {c} single pencils. Find the "
            "number of pencils that it sells.",
            "If a shop sells {a} boxes with {b} pencils each, and also {c} single pencils, how many pencils does it "
            "sell in total?",
        ),
        lambda a, b, c: a * b + c,
    ),
    (
        (
            "A rectangle has sides of length {a} and {b}. By how much does its area exceed {c}?",
            "The sides of a rectangle have length {a} and {b}. By how much does the area of the rectangle exceed {c}?",
            "By how much does the area of a rectangle with sides of length {a} and {b} exceed {c}?",
        ),
        lambda a, b, c: a * b - c,
    ),
    (
        (
            "小明有{a}袋糖，每袋{b}颗，又买了{c}颗。小明一共有多少颗糖？",
            "小明有 {a} 袋糖, 每袋 {b} 颗, 后来又买了 {c} 颗, 请问小明一共有多少颗糖?",
        ),
        lambda a, b, c: a * b + c,
    ),
    (
        (
            "Find the remainder when {a}^3+{b} is divided by {c}.",
            "What is the remainder of ${a}^{{3}} + {b}$ when it is divided by {c}?",
            "Determine the remainder when {a}^3 + {b} is divided by {c}, please.",
        ),
        lambda a, b, c: (a**3 + b) % c,
    ),
    (
        (
            "It can be shown that the sequence {a}, {b}, ... with constant difference reaches any bound. What is its "
            "term number {c}?",
            "The sequence {a}, {b}, ... has a constant difference and, as can be shown, reaches any bound. Find its "
            "term number {c}.",
        ),
        lambda a, b, c: a + (c - 1) * (b - a),
    ),
    (
        (
            "Anna has an identity proof and {a} coins; she chooses {b} of them and proves to own {c} more. How many "
            "coins has she not chosen?",
            "Anna, with an identity proof and {a} coins, chooses {b} of them and proves to own {c} more. How many "
            "coins has she not chosen?",
        ),
        lambda a, b, c: a - b + c,
    ),
)
_CHOICES = (
    "What is {a}+{b}? (A) {c} (B) {d} (C) {e} (D) {f}",
    "Which of the following numbers is the sum of {a} and {b}?\nA. {c}\nB. {d}\nC. {e}",
    "Choose the correct answer: {a}+{b} is {c}, {d} or {e}.",
    "下列各数中，等于{a}+{b}的是（  ）\nA、{c} B、{d} C、{e} D、{f}",
    "以下哪个数等于{a}+{b}？",
)
_TRUE_FALSE = (
    "True or false: {a}+{b}={c}.",
    "Is {a}+{b} larger than {c}?",
    "判断对错：{a}+{b}={c}。",
    "{a}加{b}等于{c}，这个说法是否正确？",
    "Is it true that {a} divides {b}+{c}?",
)
_PROOFS = (
    "Prove that {a}n+{b} is odd for every odd n if {c} is odd.",
    "Let n>{a}. Show that n^2>{b}n-{c}.",
    "已知 x>{a}，求证：x^2>{b}x-{c}。",
    "证明：{a}n+{b}不能被{c}整除。",
    "Write a rigorous proof of the inequality {a}x+{b}>{c} for x>0.",
)


@dataclasses.dataclass(frozen=True)
class Planted:
    problems: list[Problem]
    evaluation: list[Problem]
    kind: dict[str, str]  # by id: a key of SIZES
    right: dict[str, float]  # by id: how often the model is right when it may think
    guessed: dict[str, float]  # ... and when it may not


def planted(seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    fresh = _fresh(rng)
    found = {kind: [] for kind in SIZES}
    originals = [next(fresh) for _ in range(SIZES["good"] - 101)]
    found["good"] = [_worded(original, f"good {i}", 0) for i, original in enumerate(originals)]
    # The same three numbers under another template, and the same words about other pictures.
    twins = [((original[0] + 2) % len(_TEMPLATES), *original[1:]) for original in originals[:40]]
    found["good"] += [_worded(twin, f"twin {i}", 0) for i, twin in enumerate(twins)]
    pictures = make_problems(get_task("scene_count_large"), split="train", count=61, seed=seed)
    found["good"] += [dataclasses.replace(p, id=f"picture {i}", task="exact") for i, p in enumerate(pictures)]
    for kind in ("trivial", "hackable"):
        found[kind] = [_worded(next(fresh), f"{kind} {i}", 0) for i in range(SIZES[kind])]
    copied = [int(i) for i in rng.permutation(len(originals))[: SIZES["duplicate"] - 12]]
    found["duplicate"] = [_worded(originals[i], f"duplicate of {i}", 1 + i) for i in copied]
    found["duplicate"] += [_photographed(pictures[i], f"photograph of {i}") for i in range(12)]
    held_out = [next(fresh) for _ in range(SIZES["contaminated"])]
    evaluation = [_worded(original, f"evaluation {i}", 0) for i, original in enumerate(held_out)]
    found["contaminated"] = [_worded(original, f"leaked {i}", 1 + i) for i, original in enumerate(held_out)]
    for kind, forms in (("multiple_choice", _CHOICES), ("true_false", _TRUE_FALSE), ("proof", _PROOFS)):
        for i in range(SIZES[kind]):
            numbers = dict(zip("abcdef", rng.integers(10, 999, 6).tolist(), strict=True))
            answer = {"multiple_choice": "B", "true_false": ("yes", "false", "错", "对", "No")[i % 5], "proof": "done"}[
                kind
            ]
            prompt = forms[i % len(forms)].format(**numbers)
            found[kind].append(Problem(f"{kind} {i}", "exact", prompt, answer))
    assert {kind: len(members) for kind, members in found.items()} == SIZES
    kind = {problem.id: kind for kind, members in found.items() for problem in members}
    problems = [problem for members in found.values() for problem in members]
    # Copies come after what they are copies of; all else is mixed.
    order = sorted(range(len(problems)), key=lambda i: (kind[problems[i].id] == "duplicate", rng.random()))
    right = {id_: 1.0 if k == "trivial" else float(rng.uniform(0.1, 0.6)) for id_, k in kind.items()}
    guessed = {id_: 0.6 if k == "hackable" else 0.0 for id_, k in kind.items()}
    return Planted([problems[i] for i in order], evaluation, kind, right, guessed)


def _fresh(rng):
    """Templates with numbers that were not yet drawn."""
    seen = set()
    while True:
        numbers = tuple(int(n) for n in rng.integers(11, 98, 3))
        if numbers not in seen:
            seen.add(numbers)
            yield (len(seen) % len(_TEMPLATES), *numbers)


def _worded(original: tuple[int, int, int, int], id_: str, wording: int) -> Problem:
    """wording: 0 for the first, any other number for one of the others."""
    template, a, b, c = original
    wordings, answer = _TEMPLATES[template]
    text = wordings[0] if wording == 0 else wordings[1 + wording % (len(wordings) - 1)]
    return Problem(id_, "exact", text.format(a=a, b=b, c=c), str(answer(a, b, c)))


def _photographed(problem: Problem, id_: str) -> Problem:
    """The same picture, larger and compressed, with the question put in other words."""
    image = Image.fromarray(problem.images[0])
    file = io.BytesIO()
    image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    prompt = "<image> Please tell me: " + problem.prompt.removesuffix(" <image>").replace("How", "how")
    pixels = np.asarray(Image.open(file).convert("RGB"))
    return Problem(id_, "exact", prompt, problem.answer, images=(pixels,))


def scripted(known: Planted, log: list | None = None):
    """A model that is right as often as `known` says, by the serial number of the answer."""

    def generate(problems, serials, *, temperature, prefix, budget):
        if log is not None:
            log.append([problem.id for problem in problems])
        return [
            [_answer(problem, serial, (known.guessed if prefix else known.right)[problem.id], prefix) for serial in own]
            for problem, own in zip(problems, serials, strict=True)
        ]

    return generate


def _answer(problem: Problem, serial: int, share: float, prefix: str) -> Answer:
    right = np.random.default_rng(serial).random() < share
    answer = problem.answer if right else f"{problem.answer}7"
    text = f" {answer}\nThat was a guess. Answer: 1" if prefix else f"Thinking ...\nAnswer: {answer}"
    return Answer(text, len(text), StopReason.END)
