"""Whether two expressions are equal, by their values at chosen points."""

import functools
from collections.abc import Iterator
from fractions import Fraction

import mpmath

from kimi_jax.rewards.math_answer.numbers import DIGITS, TOLERANCE, Number, Undefined, as_float, evaluate
from kimi_jax.rewards.math_answer.tree import Node, Num, Op, TooLarge, free_symbols, uses_i

_SUSPECT = mpmath.mpf(10) ** -20  # below this a value may be a zero that rounding hides; looked at with more digits
_ZERO = mpmath.mpf(10) ** -150
_MIN_SIGNIFICANT = 1000  # a decimal that stands for another number has 4 digits
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_MAX_SYMBOLS = len(_PRIMES)
_NUM_POINTS = 9
_MIN_POINTS = 3  # at which both have a value


def same_expression(r: Node, a: Node) -> bool:
    """Whether two expressions have equal values wherever both have a real one (or, failing that, a complex one)."""
    symbols = free_symbols(r)
    if symbols != free_symbols(a):
        return False
    if not symbols or symbols == {"i"}:
        return _same_number(r, a)
    pairs: list[tuple[Number, Number]] = []
    if not (uses_i(r) or uses_i(a)):
        pairs = _pairs(r, a, real=True)
    if len(pairs) < _MIN_POINTS:
        pairs = _pairs(r, a, real=False)
    return len(pairs) >= _MIN_POINTS and all(_close(x, y) for x, y in pairs)


def proportional(f: Node, g: Node, *, signed: bool) -> bool:
    """Whether f = c g for a constant c ≠ 0, which is positive if `signed`."""
    pairs = [(x, y) for x, y in _pairs(f, g, real=True) if x or y]
    if len(pairs) < _MIN_POINTS or not all(pairs[0]):
        return False
    x0, y0 = pairs[0]
    return all(_close(_times(x, y0), _times(y, x0)) for x, y in pairs) and not (signed and (x0 > 0) != (y0 > 0))


def _times(x: Number, y: Number) -> Number:
    return x * y if isinstance(x, Fraction) and isinstance(y, Fraction) else as_float(x) * as_float(y)


def _same_number(r: Node, a: Node) -> bool:
    x, y = _value(r), _value(a)
    if _close(x, y) or _stands_for(r, x, y) or _stands_for(a, y, x):
        return True
    if isinstance(x, Fraction) and isinstance(y, Fraction) or max(abs(as_float(x)), abs(as_float(y))) > _SUSPECT:
        return False
    with mpmath.workdps(4 * DIGITS):
        return bool(abs(as_float(evaluate(r, {})) - as_float(evaluate(a, {}))) < _ZERO)


def _stands_for(node: Node, x: Number, y: Number) -> bool:
    """Whether x, written as the decimal `node`, is close enough to y, which no decimal can write."""
    ulp = _ulp(node)
    if not ulp or abs(x) < _MIN_SIGNIFICANT * ulp or isinstance(y, mpmath.mpc):
        return False
    if isinstance(y, Fraction):
        rest = y.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        return rest != 1 and abs(x - y) < ulp
    return bool(abs(as_float(x) - y) < as_float(ulp))


def _ulp(node: Node) -> Fraction:
    match node:
        case Num(_, ulp):
            return ulp
        case Op("neg", (value,)):
            return _ulp(value)
        case Op("*", (Num(_, ulp), Op("^") as power)) if not free_symbols(power):
            scale = evaluate(power, {})
            return abs(ulp * scale) if isinstance(scale, Fraction) else Fraction(0)
    return Fraction(0)


def points(symbols: set[str]) -> Iterator[dict[str, Fraction]]:
    """Values for the free symbols: between 1 and 4, within 0 and 1, and negative, in turn; unrelated to each other."""
    names = sorted(symbols - {"i"})
    if len(names) > _MAX_SYMBOLS:
        raise TooLarge(f"more than {_MAX_SYMBOLS} variables")
    for k in range(_NUM_POINTS):
        parts = [Fraction((k + 2) ** 2 * prime * 7919 % 9973, 9973) for prime in _PRIMES]  # in (0, 1)
        yield {name: (1 + 3 * part, part, -1 - 2 * part)[k % 3] for name, part in zip(names, parts, strict=False)}


def _pairs(f: Node, g: Node, *, real: bool) -> list[tuple[Number, Number]]:
    """The values of two expressions where both have one: if `real`, ln x² = 2 ln x and √x √y = √(xy), but √x² ≠ x."""
    symbols = frozenset(free_symbols(f) | free_symbols(g))
    pairs = zip(_values(f, symbols, real), _values(g, symbols, real), strict=True)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


# A row without order is compared item by item with another: each of them is worth computing once.
_value = functools.lru_cache(maxsize=256)(lambda node: evaluate(node, {}))


@functools.lru_cache(maxsize=256)
def _values(node: Node, symbols: frozenset[str], real: bool) -> tuple[Number | None, ...]:
    """At the chosen points; None where there is none."""
    values: list[Number | None] = []
    for at in points(set(symbols)):
        try:
            value = evaluate(node, at, real=real)
        except Undefined:
            value = None
        values.append(value if value is not None and mpmath.isfinite(as_float(value)) else None)
    return tuple(values)


def _close(x: Number, y: Number) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = as_float(x), as_float(y)
    if not (mpmath.isfinite(x) and mpmath.isfinite(y)):
        return bool(x == y)
    return bool(abs(x - y) <= TOLERANCE * max(abs(x), abs(y)))
