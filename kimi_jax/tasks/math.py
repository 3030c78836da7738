"""Arithmetic with worked solutions: sums to be computed step by step, and targets to be searched for.

`chain` rewards care: an early slip spoils the rest. `countdown` rewards search: try, check, go back (k1.5 §2.2). Both
are short, because a small model on a CPU pays for every token.
"""

import ast
import functools
import operator
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from kimi_jax.tasks.base import ANSWER_MARKER, Task, final_answer, verify_exact
from kimi_jax.types import Outcome, Problem, Verdict

# --- chain ----------------------------------------------------------------------------------------------------------


def draw_chain(rng: np.random.Generator, difficulty: int) -> tuple[str, Problem]:
    """A chain of `difficulty` operations to be done from left to right, every value in 0..49: (expression, problem)."""
    value = int(rng.integers(1, 30))
    operands, expression = [value], str(value)
    steps: list[str] = []
    while len(steps) < difficulty:
        kind = rng.random()
        if kind < 0.1:
            sign, operand = "*", int(rng.integers(2, 4))
            result = value * operand
        else:
            sign, operand = "+" if kind < 0.55 else "-", int(rng.integers(1, 10))
            result = value + operand if sign == "+" else value - operand
        if not 0 <= result <= 49 or (sign == "*" and value == 0):
            continue
        steps.append(f"{value}{sign}{operand}={result};")
        expression += f"{sign}{operand}"
        operands.append(operand)
        value = result
    return expression, Problem(
        id=f"chain:{','.join(map(str, sorted(operands)))}>{value}",
        task="chain",
        prompt=f"{expression}=?",
        answer=str(value),
        difficulty=difficulty,
        solution=f"{''.join(steps)}{ANSWER_MARKER}{value}",
    )


CHAIN = Task(
    name="chain",
    kind="text",
    difficulties=(1, 2, 3),
    draw=lambda rng, difficulty: draw_chain(rng, difficulty)[1],
    verify=verify_exact,
)


# --- countdown ------------------------------------------------------------------------------------------------------

MAX_TRACE = 300  # characters of a worked search; problems whose search is longer are not drawn
_LARGEST = 16  # of the numbers given
_MAX_VALUE = 199  # on the way
_WIDTH = 3  # how many moves a search tries below the first level before it goes back

Item = tuple[int, str]  # a value and the expression that has it


def _moves(a: Item, b: Item) -> list[tuple[str, Item]]:
    """The operations on two items that lead to a positive integer: ("8-2=6", (6, "8-2"))."""
    (x, left), (y, right) = sorted((a, b), reverse=True)
    results = [("+", x + y), ("-", x - y), ("*", x * y)] + ([("/", x // y)] if x % y == 0 else [])
    left, right = (e if e.isdigit() else f"({e})" for e in (left, right))
    return [(f"{x}{sign}{y}={v}", (v, f"{left}{sign}{right}")) for sign, v in results if 0 < v <= _MAX_VALUE]


def _search(
    items: list[Item], target: int, rng: np.random.Generator, trace: list[str], width: int | None
) -> str | None:
    """Depth-first search for an expression of all items with value `target`; appends all it tries to `trace`."""
    if len(items) == 2:
        for text, (value, expression) in _moves(*items):
            trace.append(text)
            if value == target:
                trace.append("yes.")
                return expression
        trace.append("no.")
        return None
    pairs = [(i, j) for j in range(len(items)) for i in range(j)]
    moves = [(move, pair) for pair in pairs for move in _moves(items[pair[0]], items[pair[1]])]
    for k in rng.permutation(len(moves))[:width].tolist():
        (text, item), pair = moves[k]
        rest = [item] + [other for i, other in enumerate(items) if i not in pair]
        trace.append(f"{text}:" if len(rest) == 2 else f"{text} [{' '.join(str(value) for value, _ in rest)}]")
        expression = _search(rest, target, rng, trace, _WIDTH)
        if expression or sum(map(len, trace)) > MAX_TRACE:
            return expression
    trace.append("back.")
    return None


@functools.lru_cache(maxsize=100_000)
def _reachable(values: tuple[int, ...]) -> frozenset[int]:
    """All that can be made of the values, in order of size, each used once."""
    if len(values) == 1:
        return frozenset(values)
    made: set[int] = set()
    for j in range(len(values)):
        for i in range(j):
            rest = values[:i] + values[i + 1 : j] + values[j + 1 :]
            for _, (value, _) in _moves((values[i], "0"), (values[j], "0")):
                made |= _reachable(tuple(sorted((value, *rest))))
    return frozenset(made)


def _tuples(rng: np.random.Generator, size: int) -> Iterator[list[int]]:
    """Without end. Many are drawn at once, since most are for nothing and a call costs more than what it draws."""
    while True:
        yield from rng.integers(1, _LARGEST + 1, (32, size)).tolist()


def draw_countdown(rng: np.random.Generator, difficulty: int) -> tuple[int, list[int], Problem]:
    """A target in 10..99 to be made of `difficulty` numbers in 1..16, each used once: (target, numbers, problem).

    The target is drawn first, so targets are spread evenly; numbers are drawn until a short search finds it.
    """
    target = int(rng.integers(10, 100))
    for numbers in _tuples(rng, difficulty):
        if target not in _reachable(tuple(sorted(numbers))):
            continue
        trace: list[str] = []
        expression = _search([(number, str(number)) for number in numbers], target, rng, trace, None)
        solution = f"{' '.join(trace)} {ANSWER_MARKER} {expression}"
        if expression and len(solution) <= MAX_TRACE:
            break
    problem = Problem(
        id=f"countdown:{','.join(map(str, sorted(numbers)))}>{target}",
        task="countdown" if difficulty == 3 else "countdown_hard",
        prompt=f"Make {target} from {', '.join(map(str, numbers))}.",
        answer=expression,
        difficulty=difficulty,
        solution=solution,
    )
    return target, numbers, problem


_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,80}")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def parse_expression(text: str) -> tuple[list[int], Fraction]:
    """(the numbers, sorted; the exact value) of an expression of non-negative integers with + - * / and parentheses.

    Nothing is executed: the syntax tree is walked, and the length of the text, up to 80 characters, bounds its size.

    Raises:
        ValueError: the text is anything else, or divides by zero.
    """
    if not _EXPRESSION.fullmatch(text):
        raise ValueError(f"{text!r:.90} is not an expression of integers, + - * / and parentheses, up to 80 characters")
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise ValueError(f"{text!r} has more than integers, + - * / and parentheses")

    try:
        result = value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not a well-formed expression") from error
    except ZeroDivisionError as error:
        raise ValueError(f"{text!r} divides by zero") from error
    return sorted(numbers), result


def verify_countdown(problem: Problem, text: str) -> Verdict:
    """Correct if the answer uses the same numbers as the reference expression, each once, and has the same value.

    Raises:
        ValueError: the reference is not an expression.
    """
    numbers, target = parse_expression(problem.answer)
    answer, why = final_answer(text)
    if answer is None:
        return Verdict(Outcome.WRONG, why, well_formed=False)
    try:
        used, value = parse_expression(answer)
    except ValueError as error:
        return Verdict(Outcome.WRONG, str(error))
    if used != numbers:
        return Verdict(Outcome.WRONG, f"{answer} uses {used}, not {numbers}")
    return Verdict(Outcome.CORRECT if value == target else Outcome.WRONG, answer)


def _draw_countdown(rng: np.random.Generator, difficulty: int) -> Problem:
    return draw_countdown(rng, difficulty)[-1]


_READ = re.compile(r"(?P<target>[0-9]{1,9}) from [0-9, ]+\. ")  # how the solution of a picture begins
_FIRST_MOVE = re.compile(r"[0-9]{1,9}[-+*/][0-9]{1,9}=[0-9]{1,9}:")
_LAST_MOVE = re.compile(r"([0-9]{1,9})[-+*/]([0-9]{1,9})=([0-9]{1,9})")
_ENDS = {"no.": ";", "yes.": "."}


def abridge_countdown(text: str) -> str | None:
    """The same search of three numbers in half the tokens; None of a text that is not written like worked solutions.

    Where two numbers are left, operands go, and so does what leads away from the target: of a >= b are a + b and a * b
    not less than a, a - b and a / b not more, so that one look at the target rules two out. The target is that of the
    picture that was read, or else what the search ends with.
    """
    search, _, answer = text.rpartition(f" {ANSWER_MARKER} ")
    read = _READ.match(search)
    steps = search[read.end() if read else 0 :].split(" ")
    moves = [_LAST_MOVE.fullmatch(step) for step in steps]
    if steps[-1] != "yes." or len(steps) < 2 or not moves[-2]:
        return None
    target = int(read["target"]) if read else int(moves[-2][3])
    brief = ""
    for step, move in zip(steps, moves, strict=True):
        if move:
            *operands, value = map(int, move.groups())
            brief += f"{value}," if (value >= max(operands)) == (target >= max(operands)) else ""
        elif step in _ENDS:
            brief = brief.removesuffix(",") + _ENDS[step]
        elif _FIRST_MOVE.fullmatch(step):
            brief += step
        else:
            return None
    return f"{read[0] if read else ''}{brief} {ANSWER_MARKER} {answer}"


# Three numbers are what a small model can learn to search; with four and five it mostly runs out of tokens.
COUNTDOWN_TASKS = (
    Task("countdown", "text", (3,), _draw_countdown, verify_countdown, abridge_countdown),
    Task("countdown_hard", "text", (4, 5), _draw_countdown, verify_countdown),
)
