r"""Whether two answers say the same.

Both are read into trees (`reading`), brought to a normal form in which "x = 1 or x = 2", "{2, 1}" and "±..." meet, and
compared part by part; expressions by their values at chosen points (equality at random points is equality, but for
a chance that 60 digits make negligible: Schwartz 1980; no simplifier that could run for minutes).

What counts as equal, where graders differ:

* A unit may be left out, on either side; units that are both there must convert: 5 m = 500 cm ≠ 5 cm. The same holds
  for % (0.5 = 50 % = 50, but not 5 000 %) and for degrees (π/4 = 45° = 45).
* A decimal may stand for a number that no decimal can write exactly, 1/3 or √2, from 4 significant digits on and with
  an error below one unit of its last digit. Two decimals, or a decimal and 3/8, must be equal.
* A row of values without brackets has no order, as a set has none; (1, 2) and matrices do. A set of one is its element.
* x = 5 answers 5, and 5 answers x = 5; y = 5 does not answer x = 5. Equations may be scaled, and sides may be swapped.
* What restates the question does not answer it: if the reference has no integral, sum or limit, nor may the answer.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import mpmath

from kimi_jax.rewards.math_answer import fallback
from kimi_jax.rewards.math_answer.expressions import points, proportional, same_expression
from kimi_jax.rewards.math_answer.numbers import DIGITS, Undefined, as_float, evaluate
from kimi_jax.rewards.math_answer.reading import MAX_CHARS, read
from kimi_jax.rewards.math_answer.spelling import spell
from kimi_jax.rewards.math_answer.tree import (
    Named,
    Node,
    Num,
    Op,
    Quantity,
    Rel,
    Seq,
    Sym,
    Text,
    TooLarge,
    Unreadable,
    free_symbols,
)
from kimi_jax.rewards.math_answer.units import DEGREE, UNITS

_MAX_ITEMS = 60  # of a row without order
_GROUPED = re.compile(r"\d,\d{3}(?!\d)")
_CHOICE = re.compile(
    r"(?:(?i:option|choice|选项|选择|选)\s*)?(?:\(\s*([A-Ja-j])\s*\)\s*(?:[.,:) ].*)?|([A-J])\s*(?:[.,:)].*)?)", re.S
)
_LETTER = re.compile(r"(?<![a-zA-Z])[A-J](?![a-zA-Z])|\(\s*[a-j]\s*\)")
_EMPTY = Seq("{}", ())
_REALS = Seq("()", (Op("neg", (Sym("∞"),)), Sym("∞")))
_PHRASES: dict[str, Node] = {
    **dict.fromkeys("no solution,no solutions,no real solution,no real solutions,empty set".split(","), _EMPTY),
    **dict.fromkeys("无解,无实数解,空集".split(","), _EMPTY),
    **dict.fromkeys("all real numbers,all reals,any real number,全体实数,所有实数,任意实数".split(","), _REALS),
    **dict.fromkeys("infinity,positive infinity,正无穷,无穷大,正无穷大".split(","), Sym("∞")),
    **dict.fromkeys("negative infinity,minus infinity,负无穷,负无穷大".split(","), Op("neg", (Sym("∞"),))),
    **dict.fromkeys("dne,does not exist,undefined,不存在".split(","), Text("does not exist")),
}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBERS = {word: Num(Fraction(n)) for n, word in enumerate(_NUMBER_WORDS)}
_NUMBERS |= {word: Num(Fraction(n)) for n, word in enumerate("零一二三四五六七八九十")} | {"两": Num(Fraction(2))}


def equivalent(reference: str, answer: str) -> bool:
    """Whether `answer` says what `reference` says; not quite symmetric (see the module).

    Raises:
        TooLarge: the reference is over a limit, and the answer is not the same text.
    """
    spelled = spell(reference)
    reply = spell(answer) if len(answer) <= MAX_CHARS else ""
    if not spelled or not reply:
        return False
    if _dense(spelled) == _dense(reply) or _same_choice(spelled, reply):
        return True
    references = _readings(spelled)
    try:
        answers = _readings(reply)
    except TooLarge:
        return False
    if any(_same_reading(r, a) for r in references for a in answers):
        return True
    if references:
        return False
    if _dense(_words(spelled)) == _dense(_words(reply)):
        return True
    value = fallback.worked_out(reference)
    return bool(value and answers) and any(_same_reading(r, a) for r in _readings(spell(value)) for a in answers)


def _readings(text: str) -> list[Node]:
    """What a spelled text can mean: nothing, one thing, or two where a comma may group digits or separate values."""
    words = _words(text)
    if words in _PHRASES:
        return [_PHRASES[words]]
    if words in _NUMBERS:
        return [_NUMBERS[words]]
    readings = []
    for group_digits in (True, False) if _GROUPED.search(text) else (True,):
        try:
            readings.append(read(text, group_digits=group_digits))
        except Unreadable:
            pass
    return readings


def _words(text: str) -> str:
    """Text without case, articles, and punctuation, but for brackets and points that belong to numbers in it."""
    text = re.sub(r"[.,;:!?](?!\d)|[\"'{}]", " ", text.casefold()).strip()
    words = re.sub(r"^\((.*)\)$", r"\1", text).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _dense(text: str) -> str:
    """Text without white space, but for that between digits: 2 1/3 is not 21/3."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _same_choice(reference: str, answer: str) -> bool:
    """B = (B) = "(B) Paris" = "B. Paris" = "option B"; a reference that is a letter may be that of an alternative."""
    given = re.fullmatch(r"\(?([A-J])\)?|\(([A-J])\) .*", reference)
    chosen = _CHOICE.fullmatch(answer)
    if not given or not chosen or any(len(_LETTER.findall(text)) > 1 for text in (reference, answer)):
        return False
    return (chosen[1] or chosen[2]).upper() == (given[1] or given[2])


def _same_reading(r: Node, a: Node) -> bool:
    with mpmath.workdps(DIGITS):
        try:
            return r == a or _same(_normal(r), _normal(a))
        except Undefined:
            return False
        except TooLarge:
            for part in _scalars(r):  # is it the reference that is too large?
                try:
                    evaluate(part, next(points(free_symbols(part))))
                except Undefined:
                    pass
            return False


# --- normal form ------------------------------------------------------------------------------------------------------


def _normal(node: Node) -> Node:
    match node:
        case Rel():
            return _normal_relation(node)
        case Seq(brackets, items) if brackets in ("", "{}"):
            flat: list = []
            for item in map(_normal, items):
                flat.extend(item.items if isinstance(item, Seq) and item.brackets == "" else [item])
            names = {item.name for item in flat if isinstance(item, Named) and _is_interval(item.value)}
            if brackets == "" and len(names) == 1 and all(isinstance(item, Named) for item in flat):
                return Named(names.pop(), Op("∪", tuple(item.value for item in flat)))
            return flat[0] if len(flat) == 1 else Seq(brackets, tuple(flat))
        case Seq(brackets, items):
            return Seq(brackets, tuple(map(_normal, items)))
        case Quantity(value, unit):
            inner = _normal(value)
            if isinstance(inner, Seq) and inner.brackets == "":
                return Seq("", tuple(Quantity(item, unit) for item in inner.items))
            return node
        case Op("∪", parts):
            return Op("∪", tuple(map(_normal, parts)))
        case Op() if _has_plus_minus(node):
            return Seq("", (_with_sign(node, 1), _with_sign(node, -1)))
    return node


def _has_plus_minus(node: Node) -> bool:
    return isinstance(node, Op) and (node.name in "±∓" or any(map(_has_plus_minus, node.args)))


def _with_sign(node: Node, sign: int) -> Node:
    if not isinstance(node, Op):
        return node
    args = tuple(_with_sign(arg, sign) for arg in node.args)
    if node.name in ("±", "∓"):
        return args[0] if (node.name == "±") == (sign > 0) else Op("neg", args)
    return Op(node.name, args)


def _is_interval(node: Node) -> bool:
    return isinstance(node, Seq) and len(node.items) == 2 and node.brackets in ("()", "[]", "(]", "[)")


def _normal_relation(node: Rel) -> Node:
    relations, sides = node.relations, node.sides
    if set(relations) <= {"=", "≈"}:
        if not isinstance(sides[0], Sym) and len(sides) == 2 and isinstance(sides[1], Sym):
            sides = sides[::-1]  # 5 = x
        name = _name(sides[0])
        if name is None and len(sides) == 2 and any(map(free_symbols, sides)):
            return node
        values = sides[1:] if name else sides
        _check_consistent(values, relations[-len(values) + 1 :] if len(values) > 1 else ())
        exact = relations.index("≈") if "≈" in relations else len(relations)  # 1/3 ≈ 0.33: the first is the answer
        value = sides[max(exact, 1) if name else exact]
        if name and isinstance(sides[0], Sym) and name in free_symbols(value):
            return node
        return Named(name, _normal(value)) if name else _normal(value)
    if relations == ("∈",) and (name := _name(sides[0])):
        return Named(name, _normal(sides[1]))
    return _interval(relations, sides) or node


def _name(node: Node) -> str | None:
    """The name that a variable, a segment AB, or a tuple of variables is."""
    if isinstance(node, Sym) and node.name not in ("π", "e", "∞"):
        return node.name
    if isinstance(node, Op) and node.name == "*" and all(isinstance(x, Sym) and x.name[0].isupper() for x in node.args):
        return " ".join(x.name for x in node.args if isinstance(x, Sym))
    if isinstance(node, Seq) and node.brackets == "()" and all(isinstance(x, Sym) and _name(x) for x in node.items):
        return ", ".join(x.name for x in node.items if isinstance(x, Sym))
    return None


def _one_by_one(node: Named) -> Seq | None:
    """x = 1, y = 2 for (x, y) = (1, 2)."""
    names = node.name.split(", ")
    match node.value:
        case Seq("()", values) if len(names) == len(values):
            return Seq("", tuple(map(Named, names, values)))
    return None


def _check_consistent(values: Sequence[Node], relations: Sequence[str]) -> None:
    """ "3 = 5" says nothing, nor does "x = 3 = y = 5"."""
    known = [value for value in values if not isinstance(value, Rel | Text) and not free_symbols(value)]
    for x, y in zip(known, known[1:], strict=False):
        if _same(_normal(x), _normal(y)):
            continue
        if "≈" in relations and isinstance(x, Num | Op) and isinstance(y, Num | Op):
            p, q = as_float(evaluate(x, {})), as_float(evaluate(y, {}))
            if abs(p - q) * 20 <= abs(p):
                continue
        raise Undefined("the sides of an equation of numbers differ")


_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


def _interval(relations: Sequence[str], sides: Sequence[Node]) -> Named | None:
    """a < x ≤ b, x > a and 2x + 1 > a as intervals of x."""
    if not set(relations) <= set(_FLIPPED):
        return None
    if relations[0] in ">≥":
        relations, sides = [_FLIPPED[r] for r in reversed(relations)], sides[::-1]
    if not set(relations) <= set("<≤"):
        return None
    symbols = [free_symbols(side) for side in sides]
    infinite = Op("neg", (Sym("∞"),)), Sym("∞")
    if len(sides) == 3 and isinstance(sides[1], Sym) and not symbols[0] and not symbols[2]:
        low, high, name = sides[0], sides[2], sides[1].name
        return Named(name, Seq("[("[relations[0] == "<"] + "])"[relations[1] == "<"], (low, high)))
    if len(sides) != 2 or len(names := symbols[0] | symbols[1]) != 1:
        return None
    (name,) = names
    opened = relations[0] == "<"
    if isinstance(sides[0], Sym) and not symbols[1]:
        return Named(name, Seq("(" + "])"[opened], (infinite[0], sides[1])))
    if isinstance(sides[1], Sym) and not symbols[0]:
        return Named(name, Seq("[("[opened] + ")", (sides[0], infinite[1])))
    difference = Op("+", (sides[0], Op("neg", (sides[1],))))  # < 0
    start, *others = (evaluate(difference, {name: Fraction(x)}) for x in (0, 1, 2, 5))
    if not all(isinstance(y, Fraction) for y in (start, *others)) or not (slope := others[0] - start):
        return None
    if others != [start + slope * x for x in (1, 2, 5)]:
        return None  # not linear
    root = Num(-start / slope)
    if slope > 0:
        return Named(name, Seq("(" + "])"[opened], (infinite[0], root)))
    return Named(name, Seq("[("[opened] + ")", (root, infinite[1])))


# --- comparison -------------------------------------------------------------------------------------------------------


def _same(r: Node, a: Node) -> bool:
    if r == a:
        return True
    match r, a:
        case Named(), Named():
            if r.name == a.name:
                return _same(r.value, a.value)
            if (ours := _one_by_one(r)) and (theirs := _one_by_one(a)):
                return _same(ours, theirs)
            return _is_expression(r.value) and _is_expression(a.value) and _same_relation(_equation(r), _equation(a))
        case Named(), Rel():
            return _same_relation(_equation(r), a)
        case Rel(), Named():
            return _same_relation(r, _equation(a))
        case Named(), Seq() if _names(a):
            return _same(_one_by_one(r) or r.value, a)
        case Seq(), Named() if _names(r):
            return _same(r, _one_by_one(a) or a.value)
        case Named(), _:
            return _same(r.value, a)
        case _, Named():
            return _same(r, a.value)
        case Text(), Text():
            return _words(r.text) == _words(a.text)
        case Rel(), Rel():
            return _same_relation(r, a)
        case (Quantity(), _) | (_, Quantity()):
            return _same_quantity(r, a)
        case Seq(), Seq():
            return _same_sequence(r, a)
        case Op("∪", parts), Op("∪", others):
            return _same_unordered(parts, others)
        case Op(":", terms), Op(":", others):
            return len(terms) == len(others) and all(
                _same(Op("*", (x, others[0])), Op("*", (y, terms[0]))) for x, y in zip(terms, others, strict=True)
            )
        case (Op(":", (x, y)), other) | (other, Op(":", (x, y))):
            return _same(Op("/", (x, y)), other)
    return _is_expression(r) and _is_expression(a) and same_expression(r, a)


def _is_expression(node: Node) -> bool:
    return isinstance(node, Num | Sym | Op) and not (isinstance(node, Op) and node.name in (":", "∪"))


def _radians(quantity: Quantity) -> Node:
    if quantity.unit.dimensions == DEGREE:
        return Op("deg", (quantity.value,))
    return Op("*", (quantity.value, Num(quantity.unit.factor)))


def _same_quantity(r: Node, a: Node) -> bool:
    if isinstance(r, Quantity) and isinstance(a, Quantity):
        if r.unit == a.unit:
            return _same(r.value, a.value)
        if r.unit.dimensions == a.unit.dimensions:
            return _same(Op("*", (r.value, Num(r.unit.factor))), Op("*", (a.value, Num(a.unit.factor))))
        return {r.unit.dimensions, a.unit.dimensions} == {(), DEGREE} and _same(_radians(r), _radians(a))
    if isinstance(r, Quantity):
        return any(_same(value, a) for value in _without_unit(r, a))
    return isinstance(a, Quantity) and any(_same(r, value) for value in _without_unit(a, r))


def _without_unit(quantity: Quantity, other: Node) -> list[Node]:
    """What may stand for a quantity where `other` has no unit."""
    unit, values = quantity.unit, [quantity.value]
    if not unit.dimensions or unit.dimensions == DEGREE:
        values.append(_radians(quantity))  # 50 % = 0.5
    if unit.dimensions and isinstance(other, Op) and other.name == "*" and isinstance(other.args[-1], Sym):
        name = other.args[-1].name  # 5m, which was read as a product
        if name in UNITS and UNITS[name].dimensions == unit.dimensions:
            values.append(Op("*", (quantity.value, Num(unit.factor / UNITS[name].factor), Sym(name))))
    return values


def _same_sequence(r: Seq, a: Seq) -> bool:
    if len(r.items) != len(a.items):
        return False
    r_named, a_named = _names(r), _names(a)
    if {r.brackets, a.brackets} <= {"", "{}"}:
        if r_named == a_named or max(len(r_named), len(a_named)) < 2:
            return _same_unordered(r.items, a.items)
    elif "" in (r.brackets, a.brackets):  # "x = 1, y = 2", or "1, 2", as (1, 2)
        if {r.brackets, a.brackets} != {"", "()"}:
            return False
        r, a = (_in_order_of_names(x) for x in (r, a))
    elif r.brackets != a.brackets:
        return False
    return all(_same(x, y) for x, y in zip(r.items, a.items, strict=True))


def _names(row: Seq) -> set[str]:
    return {item.name for item in row.items if isinstance(item, Named)}


def _in_order_of_names(row: Seq) -> Seq:
    named = [item for item in row.items if isinstance(item, Named)]
    if len({item.name for item in named}) < len(row.items):
        return row
    named.sort(key=lambda item: item.name)
    return Seq(row.brackets, tuple(named))


def _same_unordered(r: Sequence[Node], a: Sequence[Node]) -> bool:
    if len(r) != len(a):
        return False
    if len(r) > _MAX_ITEMS:
        return all(_same(x, y) for x, y in zip(r, a, strict=True))
    left = list(a)
    for x in r:
        found = next((i for i, y in enumerate(left) if _same(x, y)), None)
        if found is None:
            return False
        del left[found]
    return True


def _equation(node: Named) -> Rel:
    return Rel(("=",), (Sym(node.name), node.value))


def _same_relation(r: Rel, a: Rel) -> bool:
    """Up to a factor that is constant (and positive, for inequalities) and the order of the sides."""
    if len(r.relations) != 1 or len(a.relations) != 1:
        return r.relations == a.relations and all(_same(x, y) for x, y in zip(r.sides, a.sides, strict=True))
    (kind, f), (other_kind, g) = map(_difference, (r, a))
    symbols = free_symbols(f)
    if kind != other_kind or symbols != free_symbols(g) or not symbols:
        return False
    return proportional(f, g, signed=kind in ("<", "≤"))


def _difference(relation: Rel) -> tuple[str, Node]:
    kind, (x, y) = relation.relations[0], relation.sides
    if kind in (">", "≥"):
        kind, x, y = _FLIPPED[kind], y, x
    return ("=" if kind == "≈" else kind), Op("+", (x, Op("neg", (y,))))


def _scalars(node: Node) -> Iterator[Node]:
    match node:
        case Rel(_, parts) | Seq(_, parts) | Op(":" | "∪", parts):
            for part in parts:
                yield from _scalars(part)
        case Quantity(value, _):
            yield from _scalars(value)
        case Num() | Sym() | Op():
            yield node
