"""References beyond our own grammar: integrals, sums, limits, derivatives, worked out by math-verify and SymPy.

The parser of math-verify and SymPy's algorithms have no bound on time, and math-verify's own time limit is a signal,
which raises outside the main thread. So its limit is switched off, only the reference goes there, never what a model
wrote, and only if it is small; the deadline of the process that judges (`rewards.pool`) is the backstop.
"""

import functools
import logging
import re

from kimi_jax.rewards.math_answer.tree import TooLarge

_OPERATORS = re.compile(r"\\(?:i*o?int|sum|prod|lim|frac\s*\{(?:d|\\partial)\b)(?![a-z])")
_MAX_CHARS = 200
_MAX_NESTING = 6
_MAX_OPERATORS = 3
_MAX_NUMERAL = re.compile(r"\d{7}|\d{4,}\s*!|!\s*!|\^\s*\{?\s*-?\d{3}")
_TOWER = re.compile(r"([_^])\s*(?:\{[^{}]*|\S\s*)\1")


@functools.lru_cache(maxsize=1024)  # all responses to a problem have the same reference
def worked_out(reference: str) -> str:
    """The value of a reference as LaTeX that our grammar can read; "" where SymPy finds none, or it has no operator.

    Raises:
        TooLarge: the reference is over a limit.
    """
    operators = len(_OPERATORS.findall(reference))
    if not operators:
        return ""
    if operators > _MAX_OPERATORS or not _is_small(reference):
        raise TooLarge("only SymPy could work it out, and it is too large for that")
    import math_verify  # half a second, which most judges never need
    import sympy

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    braced = re.sub(
        r"([_^])\s*(\w)(?!\w)", r"\1{\2}", reference.strip().strip("$")
    )  # its parser stumbles over \int_1^e
    parsed = math_verify.parse(f"${braced}$", fallback_mode="no_fallback", parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], sympy.Expr):
        return ""
    value = parsed[0].doit()
    return "" if value.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit) else sympy.latex(value)


def _is_small(text: str) -> bool:
    nesting = depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        nesting = max(nesting, depth)
    return (
        len(text) <= _MAX_CHARS
        and nesting <= _MAX_NESTING
        and depth == 0
        and not _MAX_NUMERAL.search(text)
        and not _TOWER.search(text)
    )
