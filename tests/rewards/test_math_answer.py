"""The oracle is a table of pairs labelled by hand; the yardstick, math-verify alone on the same table."""

import logging
import pathlib
import sys
from collections import Counter
from fractions import Fraction

import pytest

from kimi_jax.rewards.math_answer import equivalent, extract_answers, verify_math
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.types import Outcome, Problem

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE))
from math_answer_attacks import attacks, judge  # noqa: E402

DEADLINE_S = 30.0  # a judgement takes milliseconds; the first one that needs math-verify imports it


def read_table() -> list[tuple[str, str, bool]]:
    rows = []
    for line in (HERE / "math_answer_table.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            sign = "≡" if " ≡ " in line else "≢"
            reference, answer = line.split(f" {sign} ")
            rows.append((reference, answer, sign == "≡"))
    return rows


TABLE = read_table()


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(judge, workers=2, deadline_s=DEADLINE_S) as pool:
        yield pool


def problem(answer: str) -> Problem:
    return Problem(id=answer, task="math", prompt="?", answer=answer)


def confusion(judged: list[bool]) -> tuple[float, float, str]:
    """(false positives per unequal pair, false negatives per equal pair, all four counts)."""
    counts = Counter((equal, passed) for (*_, equal), passed in zip(TABLE, judged, strict=True))
    text = f"equal: {counts[True, True]} pass, {counts[True, False]} fail; " + (
        f"unequal: {counts[False, True]} pass, {counts[False, False]} fail"
    )
    return (
        counts[False, True] / (counts[False, True] + counts[False, False]),
        counts[True, False] / (counts[True, True] + counts[True, False]),
        text,
    )


def test_the_table_beside_math_verify_alone(pool):
    math_verify = pytest.importorskip("math_verify")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    assert len(TABLE) >= 300 and len(set(TABLE)) == len(TABLE)

    tickets = [pool.submit(problem(reference), f"So it is \\boxed{{{answer}}}.") for reference, answer, _ in TABLE]
    verdicts = pool.verdicts(tickets)
    assert pool.missed_deadlines == 0 and pool.crashes == 0
    assert Outcome.UNGRADABLE not in {verdict.outcome for verdict in verdicts}
    ours = [verdict.outcome is Outcome.CORRECT for verdict in verdicts]

    def alone(reference: str, answer: str) -> bool:
        gold, target = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
        return math_verify.verify(gold, target, timeout_seconds=None)

    false_positives, false_negatives, text = confusion(ours)
    their_positives, their_negatives, their_text = confusion([alone(r, a) for r, a, _ in TABLE])
    print(f"\n{len(TABLE)} pairs\n  ours         {text}\n  math-verify  {their_text}")
    for (reference, answer, equal), passed in zip(TABLE, ours, strict=True):
        if passed != equal:
            print(f"  {'should pass' if equal else 'should fail'}: {reference}   {answer}")
    assert false_positives <= min(0.005, their_positives)
    assert false_negatives <= min(0.05, their_negatives)


def test_attacks_do_not_crash_hang_or_stall_the_others(pool):
    honest = [("1/2", r"\boxed{0.5}", "correct"), ("1/2", r"\boxed{0.6}", "wrong"), ("5 cm", "Answer: 5 m", "wrong")]
    pairs = attacks(seed=3)
    tickets, expected = [], []
    for i, (reference, text) in enumerate(pairs):
        tickets.append(pool.submit(problem(reference), text))
        reference, text, outcome = honest[i % len(honest)]
        expected.append(outcome)
        tickets.append(pool.submit(problem(reference), text))
    verdicts = pool.verdicts(tickets)
    assert len(pairs) == 1000 and [v.outcome for v in verdicts[1::2]] == expected
    assert pool.missed_deadlines == 0 and pool.crashes == 0
    failed = [
        v.detail for v in verdicts if v.outcome is Outcome.UNGRADABLE and not v.detail.startswith("the reference")
    ]
    assert failed == []  # no exception came out of the judge
    fixed = {"42", r"x^2+\frac{1}{x}", r"\int_0^1 x\,dx", r"\{1, 2\}", "5 cm", "3<x"}
    lucky = [p for p, v in zip(pairs, verdicts[::2], strict=True) if v.outcome is Outcome.CORRECT and p[0] in fixed]
    assert lucky == []
    assert not any(v.outcome is Outcome.UNGRADABLE for p, v in zip(pairs, verdicts[::2], strict=True) if p[0] in fixed)


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("4", r"Thus \boxed{4}."),
        ("4", r"\boxed {4}"),
        ("4", r"\fbox{4}"),
        (r"\frac{1}{2}", r"$$\boxed{\frac{1}{\sqrt{4}}}$$"),
        ("4", r"<think>perhaps \boxed{3}, Answer: 5</think> It is \boxed{4}."),
        ("1/2", r"$\boxed{1/2}$, that is $\boxed{0.5}$"),
        ("(1,2)", r"$x=\boxed{1}$ and $y=\boxed{2}$"),
        ("1,2", r"\boxed{2}, \boxed{1}"),
        ("4", "Answer: 4"),
        ("4", "**Answer:** 4"),
        ("4", "**Final Answer**: **4**"),
        ("4", "Answer:\n\\[ 4 \\]"),
        ("4", "so we have\n#### 4"),
        ("4", "Answer: 4\nAs I said, Answer: 4.0"),
        ("4", '{"answer": 4}'),
        ("1/2", '```json\n{"why": "...", "answer": "\\\\frac{1}{2}"}\n```'),
        ("1/2", r'{"answer": "\frac{1}{2}"}'),
        ("1,2", '{"answer": [1, 2]}'),
        ("0.5", "So the answer is 0.5."),
        ("4", "Therefore, the answer is 4 because 2 + 2 = 4."),
        ("4", "The correct final answer to the question is $4$."),
        ("Paris", "The answer is Paris."),
        ("5", "所以答案是5。"),
        ("5", "答案：５"),
        ("5", "最终答案为 $5$，因为 2+3=5"),
        ("5", "5"),
        (r"\boxed{5}", "Answer: 5"),
        ("text\n#### 5", "Answer: 5"),
        ("10^{10^{10^{10}}}", r"\boxed{10^{10^{10^{10}}}}"),
        ("4", "**Final Answer:**\n\nThe number of ways is 4.\n\n$$\\boxed{4}$$"),
        ("4", "Checking the answer: both sides are even.\n\\boxed{4}"),
        ("4", r"I put it into \boxed{}. \boxed{4}"),
        ("12345678901234567890.5", '{"answer": 12345678901234567890.5}'),
        ("4", r"\boxed{4\\}"),
    ],
)
def test_finds_the_answer(reference, response):
    verdict = verify_math(reference, response)
    assert verdict.outcome is Outcome.CORRECT and verdict.well_formed, (verdict, extract_answers(response))


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{3} or \boxed{4}",
        r"\boxed{3}" + " and after more thought, which was long and careful and complete, " + r"\boxed{4}",
        r"\boxed{4}" + "\n\nbut it may also be that\n\n" + r"\boxed{3}",
        r"\boxed{3, 4}",
        r"\boxed{x=3 \text{ or } 4}",
        r"\boxed{\{3, 4\}}",
        r"\boxed{3=4}",
        r"\boxed{4, maybe 5}",
        r"\boxed{3 \boxed{4}}",
        r"Answer: 3 \boxed{4}",
        "Answer: 3\nAnswer: 4",
        "Answer: 3 | 4",
        "The answer is 3. Wait, the answer is 4.",
        "The answer is 3 or 4.",
        '{"answer": 3} {"answer": 4}',
        '{"answer": 3} Answer: 4',
        '{"answer": 4.00000000000000000000001}',
        "The answer is not 4",
        " ".join(rf"\boxed{{{i}}}. Or perhaps one more, namely the following one:" for i in range(99)),
    ],
)
def test_several_different_answers_do_not_pass(response):
    assert verify_math("4", response).outcome is Outcome.WRONG


@pytest.mark.parametrize(
    "response", ["", " \n", r"\boxed{4", r"\boxed{}", "Answer:", "I do not know.\nIt may be 4.", "\x00\xff"]
)
def test_without_an_answer_it_is_wrong_and_says_so(response):
    verdict = verify_math("4", response)
    assert verdict.outcome is Outcome.WRONG and verdict.detail


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "  ",
        "x" * 3000,
        "(" * 900 + ")" * 900,
        "10^{10^{10^{10}}}",
        r"\boxed{1",
        "+".join("x" * 900),
        r"\int_0^1 " * 9,
    ],
)
def test_a_bad_reference_is_ungradable(reference):
    verdict = verify_math(reference, r"\boxed{4}")
    assert verdict.outcome is Outcome.UNGRADABLE and verdict.detail


def test_what_is_too_large_in_the_response_is_wrong():
    for answer in ("10^{10^{10^{10}}}", "9" * 3000, "(" * 900 + ")" * 900, "9" * 900 + "!"):
        assert verify_math("4", rf"\boxed{{{answer}}}").outcome is Outcome.WRONG


def row(begin: int) -> str:
    """A set of sixty expressions, whose order depends on `begin`."""
    items = ", ".join(rf"\tan({(begin + 7 * i) % 60}x!)^y" for i in range(60))
    return rf"\boxed{{\{{{items}\}}}}"


@pytest.mark.parametrize(
    "response",
    [
        *(begin + "\n" * 100_003 for begin in ("", "the answer is", "the result is", "答案是", "Answer:")),
        " \n" * 50_021,
        ", which is the same in another order as ".join(map(row, range(8))),
    ],
)
def test_no_response_takes_longer_than_the_deadline(pool, response):
    assert pool.submit(problem("4"), response).result().outcome is Outcome.WRONG


def test_a_reference_equals_itself():
    for reference, *_ in TABLE:
        assert equivalent(reference, reference)
        assert equivalent(reference, f" {reference} ")


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("2^{20000}", "2^{20000}+1", False),
        ("2^{20000}", "4^{10000}", True),
        ("10000!", "10000!+1", False),
        ("2023!", "2023!+1", False),
        (r"\binom{2023}{1011}", r"\frac{2023!}{1011! 1012!}", True),
        (r"\binom{2023}{1011}", r"\binom{2023}{1011}+1", False),
        (r"\sinh 1000", r"\frac{e^{1000}-e^{-1000}}{2}", False),  # not known: a term is lost
    ],
)
def test_giants_are_compared_to_the_last_digit(reference, answer, equal):
    """Which would take math-verify minutes."""
    assert equivalent(reference, answer) == equal


def test_numbers_agree_with_python():
    """Fractions, decimals and sums of them, beside exact arithmetic."""
    values = [Fraction(p, q) for p in (-7, 0, 1, 13) for q in (1, 2, 3, 8)]
    for x in values:
        for y in values:
            spellings = [f"{y.numerator}/{y.denominator}", rf"\frac{{{y.numerator}}}{{{y.denominator}}}"]
            spellings.append(rf"{y.numerator + 5 * y.denominator}/{y.denominator} - 5")
            if y.denominator != 3:
                spellings.append(str(float(y)))
            for spelling in spellings:
                assert equivalent(f"{x.numerator}/{x.denominator}", spelling) == (x == y), (x, spelling)
