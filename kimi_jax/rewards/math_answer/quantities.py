"""Reading units: "cm", "m/s^2", "kilometers per hour", "平方厘米", and words like "apples"."""

from fractions import Fraction

from kimi_jax.rewards.math_answer.tokens import JOINERS, NAMES, RELATIONS, RESERVED, UNIT_WORDS, Cursor
from kimi_jax.rewards.math_answer.tree import Unreadable
from kimi_jax.rewards.math_answer.units import UNITS, Unit

_NOT_UNITS = {*RESERVED, *NAMES, *RELATIONS}
_ITEM_ENDS = {",", ";", ":", ")", "]", "}", "\\}", "&", "\\\\", "∪", *JOINERS, *RELATIONS}


def read_unit(cursor: Cursor) -> Unit | None:
    """A unit that ends the item, or nothing: "5 m" is five metres, "5 m + 1" has a variable."""
    start, unit, power = cursor.at, Unit(Fraction(1), ()), 1
    found = False
    while True:
        if cursor.take("per", "每"):
            power = -1
        word = cursor.take("square", "sq", "平方", "cubic", "立方")
        known = _one_unit(cursor, glued=not found and word is None)
        if known is None:
            break
        exponent = UNIT_WORDS[word] if word else 1
        if cursor.take("^", "**"):
            exponent = _integer(cursor)
        unit = unit.times(known, power * exponent)
        found = True
        following = cursor.peek()
        if cursor.take("/"):
            power = -1
        elif cursor.take("*") is None and following.kind not in ("word", "unit"):
            if following.kind != "letter" or not following.spaced:
                break
    ends = cursor.peek().kind in ("end", "number") or cursor.peek().text in _ITEM_ENDS
    if found and ends:
        return unit
    cursor.at = start
    return None


def _one_unit(cursor: Cursor, glued: bool) -> Unit | None:
    """A unit of the table, or a word that stands for one ("apples")."""
    token = cursor.peek()
    unit = UNITS.get(token.text) or (UNITS.get(token.text.lower()) if len(token.text) > 1 else None)
    if unit and token.kind in ("word", "unit", "letter", "command"):
        if glued and not token.spaced and token.kind == "letter":
            return None  # 5m: a product, as far as one can tell
    elif token.kind == "word" and token.text not in _NOT_UNITS:
        unit = Unit(Fraction(1), ((token.text.lower().rstrip("s"), 1),))
    else:
        return None
    cursor.at += 1
    return unit


def _integer(cursor: Cursor) -> int:
    braced = cursor.take("{")
    sign = -1 if cursor.take("-") else 1
    token = cursor.next()
    if token.kind != "number" or not token.text.isdigit() or len(token.text) > 2:
        raise Unreadable("an exponent of a unit is a small integer")
    if braced:
        cursor.expect("}")
    return sign * int(token.text)


def at_unit(cursor: Cursor) -> bool:
    """Whether what comes next is a unit that ends the item, and not a factor."""
    start = cursor.at
    try:
        return read_unit(cursor) is not None
    except Unreadable:
        return False
    finally:
        cursor.at = start
