"""Arithmetic against other ways to compute it: a left-to-right reader, and all expressions by brute force."""

import itertools
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from kimi_jax.tasks import TASKS
from kimi_jax.tasks.base import make_problems
from kimi_jax.tasks.math import MAX_TRACE, _reachable, parse_expression, verify_countdown
from kimi_jax.types import Problem

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def apply(a, sign, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b) if b else None}[sign]


def left_to_right(expression: str) -> list[int]:
    """Every value on the way."""
    values = [int(re.match(r"\d+", expression)[0])]
    for sign, operand in re.findall(r"([-+*])(\d+)", expression):
        values.append(apply(values[-1], sign, int(operand)))
    return values


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """All values of all expressions that use each number once."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
                for sign in "+-*" + "/" * (b != 0):
                    found |= reachable([Fraction(apply(a, sign, b)), *rest])
    return found


# --- chain ----------------------------------------------------------------------------------------------------------


def test_chain_answers_and_steps():
    for problem in make_problems(TASKS["chain"], split="train", count=401, seed=5):
        expression = re.fullmatch(r"(\d+(?:[-+*]\d)+)=\?", problem.prompt)[1]
        values = left_to_right(expression)
        assert str(values[-1]) == problem.answer
        assert len(values) - 1 == problem.difficulty in (1, 2, 3)
        assert all(0 <= v <= 49 for v in values)
        assert set(re.findall(r"\*(\d)", expression)) <= set("23") and "0" not in re.findall(r"\D(\d)", expression)
        steps = EQUATION.findall(problem.solution)
        assert [int(s[0]) for s in steps] == values[:-1] and [int(s[3]) for s in steps] == values[1:]
        assert "".join([str(values[0])] + [s[1] + s[2] for s in steps]) == expression
        assert problem.solution == "".join(f"{a}{s}{b}={c};" for a, s, b, c in steps) + f"Answer:{problem.answer}"
        operands = sorted(map(int, re.findall(r"\d+", expression)))
        assert problem.id == f"chain:{','.join(map(str, operands))}>{problem.answer}"


def test_chain_mixes_operations_and_sizes():
    problems = make_problems(TASKS["chain"], split="train", count=401, seed=5)
    text = " ".join(p.prompt for p in problems)
    signs = Counter(re.findall(r"[-+*]", text))
    assert min(signs[s] / sum(signs.values()) for s in "+-*") > 0.05
    digits = Counter(len(n) for n in re.findall(r"\d+", text))
    assert set(digits) == {1, 2} and min(digits.values()) / sum(digits.values()) > 0.1
    assert {p.split("*")[1][0] for p in re.findall(r"\*\d", text)} == set("23")
    assert max(Counter(p.answer for p in problems).values()) / len(problems) < 0.07


# --- countdown ------------------------------------------------------------------------------------------------------


def parts(problem: Problem) -> tuple[int, list[int]]:
    target, numbers = re.fullmatch(r"Make (\d+) from ([\d, ]+)\.", problem.prompt).groups()
    return int(target), [int(n) for n in numbers.split(", ")]


def test_countdown_problems():
    problems = make_problems(TASKS["countdown"], split="train", count=97, seed=5)
    for problem in problems:
        target, numbers = parts(problem)
        assert len(numbers) == problem.difficulty
        assert parse_expression(problem.answer) == (sorted(numbers), target)
        assert problem.id == f"countdown:{','.join(map(str, sorted(numbers)))}>{target}"
        assert len(problem.solution) <= MAX_TRACE
        if len(numbers) == 3:
            assert target in reachable([Fraction(n) for n in numbers])
    targets = Counter(parts(p)[0] for p in problems)
    assert max(targets.values()) / len(problems) < 0.07 and len(targets) > 50


def test_countdown_traces_are_true_and_stop_at_the_target():
    problems = make_problems(TASKS["countdown"], split="train", count=97, seed=6)
    for problem in problems:
        search, answer = problem.solution.split(" Answer: ")
        assert answer == problem.answer
        equations = EQUATION.findall(search)
        assert all(apply(int(a), sign, int(b)) == int(value) for a, sign, b, value in equations)
        assert search.endswith("yes.") and search.count("yes") == 1
        assert int(equations[-1][3]) == parts(problem)[0]
    assert sum("no." in p.solution for p in problems) > len(problems) / 4  # there is something to come back from


def test_abridged_solutions_are_the_same_searches_in_less_than_half_the_characters():
    lengths = Counter()
    for problem in make_problems(TASKS["countdown"], split="train", count=97, seed=6):
        short = TASKS["countdown"].abridge(problem.solution)
        target, numbers = parts(problem)
        search, answer = short.split(" Answer: ")
        lines = re.findall(r"(.+?):(.*?)[;.]", search)
        assert search == ";".join(f"{move}:{made}" for move, made in lines) + "." and answer == problem.answer
        assert [move for move, _ in lines] == re.findall(r"(\d+.\d+=\d+):", problem.solution)
        for move, results in lines:
            a, sign, b, value = EQUATION.fullmatch(move).groups()
            assert apply(int(a), sign, int(b)) == int(value)
            [other] = (Counter(numbers) - Counter([int(a), int(b)])).elements()
            high, low = max(int(value), other), min(int(value), other)
            made = [high + low, high - low, high * low] + [high // low] * (high % low == 0)
            made = [n for n in made if 0 < n <= 199 and (n >= high) == (target >= high)]
            hit = target in made
            assert results == ",".join(map(str, made[: made.index(target) + 1] if hit else made))
            assert hit == (move == lines[-1][0])
        assert TASKS["countdown"].verify(problem, short).outcome == "correct"
        read = f"{target} from {', '.join(map(str, numbers))}. "
        assert TASKS["countdown_image"].abridge(read + problem.solution) == read + short
        lengths.update(long=len(problem.solution), short=len(short))
    assert lengths["short"] < lengths["long"] / 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes. Answer: 7",
        "no. yes. Answer: 7",  # with what?
        "2+3=5: 5+4=9 no. Answer: 9",  # never hit
        "2+3=5: 5+4=9 yes.",
        "2+3=5: 5+4=9 yes. Answer",
        "2+3=5: 5++4=9 yes. Answer: (2+3)+4",
        "2+3=5: so 5+4=9 yes. Answer: (2+3)+4",
        "2+3=5 [5 4 1] 5+4=9: 9+1=10 yes. Answer: 10",  # of four numbers
        "nine from 2, 3, 4. 2+3=5: 5+4=9 yes. Answer: (2+3)+4",
        "2+3=5:  5+4=9 yes. Answer: (2+3)+4",
        f"2+3=5: {'5' * 5_003}+4=9 yes. Answer: (2+3)+4",  # longer than what Python reads
        f"{'9' * 5_003} from 2, 3, 4. 2+3=5: 5+4=9 yes. Answer: (2+3)+4",
    ],
)
def test_what_is_not_written_like_a_worked_solution_is_not_abridged(text):
    assert TASKS["countdown"].abridge(text) is None
    assert TASKS["countdown"].abridge("2+3=5: 5+4=9 yes. Answer: (2+3)+4") == "2+3=5:9. Answer: (2+3)+4"


def test_the_larger_operand_may_stand_behind():
    """As it does in what a model writes now and then."""
    assert TASKS["countdown"].abridge("2+3=5: 4+5=9 5-4=1 4*5=20 yes. Answer: 4*(2+3)") == (
        "2+3=5:9,20. Answer: 4*(2+3)"
    )


def test_countdown_verdicts_agree_with_brute_force():
    """Random expressions of the numbers and of nearly the numbers: only those with the right value are correct."""
    rng = np.random.default_rng(0)
    problem = Problem(id="x", task="countdown", prompt="", answer="(8-2)*4")
    seen = Counter()
    for _ in range(3001):
        a, b, c = rng.permutation([8, 2, 4] if rng.random() < 0.9 else [8, 4, 4]).tolist()
        s, t = rng.choice(list("+-*/"), 2)
        if rng.random() < 0.5:
            text, inner, outer = f"({a}{s}{b}){t}{c}", (a, s, b), lambda v, t=t, c=c: apply(v, t, c)
        else:
            text, inner, outer = f"{a}{t}({b}{s}{c})", (b, s, c), lambda v, t=t, a=a: apply(a, t, v)
        value = outer(Fraction(apply(*inner)))
        expected = "correct" if value == 24 and sorted([a, b, c]) == [2, 4, 8] else "wrong"
        assert verify_countdown(problem, f"Answer: {text}").outcome == expected, text
        seen[expected] += 1
    assert seen["correct"] > 30


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("(8-2)*4", "correct"),
        ("4 * ( 8 - 2 ).", "correct"),
        ("8*(4-2/2)", "wrong"),  # 24, but 2 twice
        ("8*4-8", "wrong"),
        ("24", "wrong"),
        ("(8-2)*4=24", "wrong"),
        ("4*8-2*4", "wrong"),
        ("8-2*4", "wrong"),
        ("82/4", "wrong"),
        ("2**4+8", "wrong"),  # 24, by a power
        ("(8-2)*4 Answer: (8-2)*4", "wrong"),
        ("(8-2)//4", "wrong"),
        ("-(2-8)*4", "wrong"),
        ("(8-2)*04", "wrong"),
        ("(8-2)(4)", "wrong"),
        ("(8-2)*4.0", "wrong"),
        ("8/(2-2)*4", "wrong"),
        ("8/(4-2-2)", "wrong"),
        ("((8-2)*4", "wrong"),
        ("__import__('os').getpid()", "wrong"),
        ("(8,2,4)", "wrong"),
        ("8-2*4 or 24", "wrong"),
        ("9**9**9**9", "wrong"),
        ("(" * 5000 + "8" + ")" * 5000, "wrong"),
        ("(" * 39 + "8" + ")" * 39, "wrong"),
        ("", "wrong"),
    ],
)
def test_countdown_verdicts(answer, outcome):
    problem = Problem(id="countdown:2,4,8>24", task="countdown", prompt="", answer="(8-2)*4")
    assert verify_countdown(problem, f"8-2=6: 6*4=24 yes. Answer: {answer}").outcome == outcome


def test_countdown_accepts_fractions_on_the_way():
    problem = Problem(id="x", task="countdown", prompt="", answer="6/(1-3/4)")
    assert verify_countdown(problem, "Answer: 6/(1-3/4)").outcome == "correct"
    assert verify_countdown(problem, "Answer: 6/(1-4/3)").outcome == "wrong"


def test_what_numbers_reach_is_what_all_expressions_of_them_give():
    def values(expressions: list[int]) -> set[int]:
        """Every order, every operation, every split into two parts: slow, and unlike the code."""
        if len(expressions) == 1:
            return set(expressions)
        found = set()
        for mask in range(1, 2 ** len(expressions) - 1):
            left = values([x for i, x in enumerate(expressions) if mask >> i & 1])
            right = values([x for i, x in enumerate(expressions) if not mask >> i & 1])
            for x, y in itertools.product(left, right):
                found |= {x + y, x - y, x * y} | ({x // y} if x % y == 0 else set())
        return {value for value in found if 0 < value <= 199}

    for numbers in [(3, 5, 7), (1, 1, 1), (2, 8, 16), (2, 3, 5, 7), (11, 13)]:
        assert _reachable(numbers) == values(list(numbers))
