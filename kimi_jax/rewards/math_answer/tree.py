"""What an answer is read into, and the two ways in which reading or evaluating it can fail."""

from dataclasses import dataclass
from fractions import Fraction

from kimi_jax.rewards.math_answer.units import Unit


class Unreadable(ValueError):
    """The text is not in the grammar."""


class TooLarge(ValueError):
    """The text, or the number that it stands for, is over a limit."""


@dataclass(frozen=True)
class Num:
    value: Fraction
    ulp: Fraction = Fraction(0)  # one unit of the last digit, of a number that is written with a decimal point


@dataclass(frozen=True)
class Sym:
    name: str


@dataclass(frozen=True)
class Op:
    name: str  # + * / inv ^ neg ± ∓ : ∪ deg pct, or a function
    args: tuple["Node", ...]


@dataclass(frozen=True)
class Seq:
    brackets: str  # "()", "[]", "[)", "(]", "{}", or "" for values in a row
    items: tuple["Node", ...]


@dataclass(frozen=True)
class Rel:
    relations: tuple[str, ...]  # = ≈ ≠ < ≤ > ≥ ∈
    sides: tuple["Node", ...]  # one more


@dataclass(frozen=True)
class Quantity:
    value: "Node"
    unit: Unit


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Named:
    """x = value, or x ∈ value, of the normal form. Inequalities of one variable are intervals of it."""

    name: str
    value: "Node"


Node = Num | Sym | Op | Seq | Rel | Quantity | Text | Named

CONSTANTS = ("π", "e", "i", "∞")


def free_symbols(node: Node) -> set[str]:
    """The names of the variables in a tree."""
    match node:
        case Sym(name):
            return set() if name in CONSTANTS else {name}
        case Op(_, args) | Seq(_, args):
            return set().union(*map(free_symbols, args))
        case Quantity(value, _):
            return free_symbols(value)
    return set()


def uses_i(node: Node) -> bool:
    """Whether the imaginary unit occurs."""
    return node == Sym("i") or (isinstance(node, Op) and any(map(uses_i, node.args)))
