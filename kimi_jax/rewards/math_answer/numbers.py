"""The value of an expression, exact where it is rational, else to 60 digits; and never at an unbounded price.

Every operation looks at the size of its operands first: 10^10^10 costs nothing as a floating-point number, but a
billion digits as an exact one, and its sine needs π to a billion digits. What is over a limit raises `TooLarge`.
"""

import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from kimi_jax.rewards.math_answer.tree import Node, Num, Op, Quantity, Seq, Sym, TooLarge

DIGITS = 60
TOLERANCE = mpmath.mpf(10) ** -35  # relative, of numbers of 60 digits
_EXACT_BITS = 1 << 15
_MAX_LOG2 = 2.0**45  # of a floating-point number
_LOST_BITS = 1000  # a term that is so much smaller than the other: 2^20000 + 1
_MAX_ANGLE_BITS = 200  # of the argument of a periodic function
_MAX_FACTORIAL = 10**6
_EXACT_FACTORIAL = 3000
_MAX_DETERMINANT = 8

Number = Any  # Fraction | mpmath.mpf | mpmath.mpc


class Undefined(ArithmeticError):
    """It has no value: 1/0, an equation, a symbol without a value."""


def evaluate(node: Node, values: Mapping[str, Number], *, real: bool = False) -> Number:
    """The value of an expression.

    Args:
        node: what was read.
        values: of the free symbols. π, e, i and ∞ have their own.
        real: whether √x has no value for x < 0, nor has anything that it is part of.

    Returns:
        A Fraction if the value was reached by exact arithmetic, else an mpf or mpc of the current precision.

    Raises:
        Undefined: it has no value.
        TooLarge: it is over a limit.
    """
    match node:
        case Num(value):
            return value
        case Sym(name):
            return _symbol(name, values)
        case Quantity(value, unit):
            return _mul(evaluate(value, values, real=real), unit.factor)
        case Op("determinant", rows):
            cells = [[evaluate(x, values, real=real) for x in row.items] for row in rows if isinstance(row, Seq)]
            return _determinant(cells)
        case Op(name, args):
            numbers = [evaluate(arg, values, real=real) for arg in args]
            try:
                return _real(_OPERATIONS[name](*numbers)) if real else _OPERATIONS[name](*numbers)
            except KeyError:
                raise Undefined(f"{name} has no value") from None
            except TooLarge:
                raise
            except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
                raise Undefined(f"{name}: {error}") from error
    raise Undefined(f"a {type(node).__name__} has no value")


def _real(x: Number) -> Number:
    """Raises Undefined unless x is real, but for the rounding."""
    if not isinstance(x, mpmath.mpc):
        return x
    if abs(x.imag) > TOLERANCE * abs(x.real):
        raise Undefined("not real")
    return x.real


_CONSTANTS = {
    "π": lambda: +mpmath.mp.pi,
    "e": lambda: +mpmath.mp.e,
    "i": lambda: mpmath.mpc(0, 1),
    "∞": lambda: mpmath.inf,
}


def _symbol(name: str, values: Mapping[str, Number]) -> Number:
    if name in values:
        return values[name]
    if name in _CONSTANTS:
        return _CONSTANTS[name]()
    raise Undefined(f"{name} is free")


def as_float(x: Number) -> Number:
    """An mpf or mpc; Fractions and mpf do not mix by themselves."""
    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def _bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _log2(x: Number) -> float:
    """Of the magnitude, to within a bit or so; a large negative number for 0."""
    if isinstance(x, Fraction):
        return x.numerator.bit_length() - x.denominator.bit_length() if x else -1e9
    if not mpmath.isfinite(x):
        raise Undefined("not finite")
    return float(mpmath.mag(x)) if x else -1e9


def _add(*terms: Number) -> Number:
    return functools.reduce(_add2, terms)


def _add2(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction) and _bits(x) + _bits(y) < _EXACT_BITS:
        return x + y
    x, y = as_float(x), as_float(y)
    if x and y and mpmath.isfinite(x) and mpmath.isfinite(y) and abs(_log2(x) - _log2(y)) > _LOST_BITS:
        raise Undefined("a term is lost in the other")
    return x + y


def _mul(*factors: Number) -> Number:
    return functools.reduce(_mul2, factors)


def _mul2(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction) and _bits(x) + _bits(y) < _EXACT_BITS:
        return x * y
    product = as_float(x) * as_float(y)
    if mpmath.isfinite(product) and product and abs(_log2(product)) > _MAX_LOG2:
        raise TooLarge("a product")
    return product


def _inv(x: Number) -> Number:
    if not x:
        raise Undefined("division by zero")
    return 1 / x


def _pow(x: Number, y: Number) -> Number:
    if not x:
        if isinstance(y, Fraction) and y > 0:
            return Fraction(0)
        raise Undefined("a power of zero")
    if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
        if _bits(x) * abs(y) < _EXACT_BITS:
            return x ** int(y)
    if abs(_log2(x)) + 1 > _MAX_LOG2 or (_log2(y) > 50) or (abs(_log2(x)) + 1) * 2.0 ** _log2(y) > _MAX_LOG2:
        raise TooLarge("a power")
    if isinstance(x, Fraction) and isinstance(y, Fraction) and (root := _exact_root(x, y)) is not None:
        return root
    return mpmath.power(as_float(x), as_float(y))


def _exact_root(x: Fraction, y: Fraction) -> Fraction | None:
    """x^y where that is rational, for x > 0 and a small denominator of y."""
    n = y.denominator
    if x < 0 or n == 1 or n > 64 or _bits(x) > 4096 or _bits(x) * abs(y) > _EXACT_BITS:
        return None
    roots = []
    for part in (x.numerator, x.denominator):
        root = math.isqrt(part) if n == 2 else int(mpmath.nint(mpmath.root(part, n)))
        if root**n != part:
            return None
        roots.append(root)
    return Fraction(*roots) ** y.numerator


def _root(x: Number, n: Number) -> Number:
    if isinstance(x, Fraction) and x < 0 and isinstance(n, Fraction) and n.denominator == 1 and n % 2:
        return -_pow(-x, _inv(n))  # the real root of an odd index
    return _pow(x, _inv(n))


def _periodic(function):
    def bounded(x: Number) -> Number:
        if _log2(x) > _MAX_ANGLE_BITS:
            raise TooLarge("the argument of a function")
        return function(as_float(x))

    return bounded


def _exp(x: Number) -> Number:
    if _log2(x) > 44:
        raise TooLarge("an exponential")
    return mpmath.exp(as_float(x))


def _log(x: Number) -> Number:
    if not x:
        raise Undefined("the logarithm of zero")
    return Fraction(0) if x == 1 else mpmath.log(as_float(x))


def _factorial(x: Number) -> Number:
    if abs(as_float(x)) > _MAX_FACTORIAL:
        raise TooLarge("a factorial")
    if isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= _EXACT_FACTORIAL:
        return Fraction(math.factorial(int(x)))
    return mpmath.gamma(as_float(x) + 1)


def _binom(n: Number, k: Number) -> Number:
    if abs(as_float(n)) > _MAX_FACTORIAL or abs(as_float(k)) > _MAX_FACTORIAL:
        raise TooLarge("a binomial coefficient")
    whole = all(isinstance(x, Fraction) and x.denominator == 1 for x in (n, k))
    if whole and 0 <= k and 0 <= n <= _EXACT_FACTORIAL:
        return Fraction(math.comb(int(n), int(k)))
    return mpmath.binomial(as_float(n), as_float(k))


def _floor(x: Number) -> Number:
    if isinstance(x, Fraction):
        return Fraction(math.floor(x))
    if isinstance(x, mpmath.mpc) or _log2(x) > 150:
        raise Undefined("the floor of it")
    return Fraction(int(mpmath.floor(x)))


def _determinant(rows: list[list[Number]]) -> Number:
    if len(rows) > _MAX_DETERMINANT:
        raise TooLarge("a determinant")
    if len(rows) != len(rows[0]):
        raise Undefined("the matrix is not square")
    if len(rows) == 1:
        return rows[0][0]
    total: Number = Fraction(0)
    pivot = next((i for i, row in enumerate(rows) if row[0]), None)
    if pivot is None:
        return total
    first = rows[pivot]
    rest = [
        [_add(x, _mul(Fraction(-1), row[0], _inv(first[0]), y)) for x, y in zip(row[1:], first[1:], strict=True)]
        for i, row in enumerate(rows)
        if i != pivot
    ]
    return _mul(Fraction((-1) ** pivot), first[0], _determinant(rest))


_OPERATIONS = {
    "+": _add,
    "*": _mul,
    "/": lambda x, y: _mul(x, _inv(y)),
    "inv": _inv,
    "neg": lambda x: -x,
    "^": _pow,
    "root": _root,
    "!": _factorial,
    "binom": _binom,
    "pct": lambda x: _mul(x, Fraction(1, 100)),
    "deg": lambda x: _mul(x, as_float(Fraction(1, 180)), +mpmath.mp.pi),
    "abs": abs,
    "floor": _floor,
    "ceil": lambda x: -_floor(-x),
    "exp": _exp,
    "ln": _log,
    **{name: _periodic(getattr(mpmath, name)) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    "sinh": lambda x: (_exp(x) - _exp(-x)) / 2,
    "cosh": lambda x: (_exp(x) + _exp(-x)) / 2,
    "tanh": lambda x: (_exp(x) - _exp(-x)) / (_exp(x) + _exp(-x)),
    "arcsin": _periodic(mpmath.asin),
    "arccos": _periodic(mpmath.acos),
    "arctan": _periodic(mpmath.atan),
}
