r"""Reading an answer, LaTeX or plain, into a small tree.

Written for answers and not for papers: units, percentages, mixed numbers, "x = 1 or x = 2" and words are part of the
grammar, while integrals and sums are not (`fallback` hands references that contain them to math-verify). Reading is
linear in the text, and text, tokens and nesting are bounded, so that no answer can be expensive to read.

    read(spell(r"x=\dfrac{1}{2}\text{ or }3"))  ->  Seq("", (Rel(("=",), (Sym("x"), Op("/", ...))), Num(3)))
"""

import re
from fractions import Fraction

from kimi_jax.rewards.math_answer.quantities import at_unit, read_unit
from kimi_jax.rewards.math_answer.tokens import (
    FUNCTIONS,
    GREEK,
    JOINERS,
    NAMES,
    RELATIONS,
    SPELLINGS,
    Cursor,
    Token,
    number,
    repeating,
    tokenize,
)
from kimi_jax.rewards.math_answer.tree import (
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
from kimi_jax.rewards.math_answer.units import SCALES, UNITS, Unit

MAX_CHARS = 2000
_MAX_DEPTH = 24  # each level of brackets takes about ten Python frames


_WORDS = re.compile(r"(?=.*[a-zA-Z]{2})[a-zA-Z ,.'-]+")
_FUNCTION_NAME = re.compile(r"[a-zA-Z](?:'+|\^\{?-1\}?|\^\{?\\prime\}?)?\([^()]+\)|\\frac\{d\w\}\{d\w\}|d\w/d\w")
_PLAIN_FRACTION = re.compile(r"(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")  # what follows \frac
_FUNCTIONS_AND_NAMES = {*FUNCTIONS, *NAMES}


def read(text: str, *, group_digits: bool = True) -> Node:
    """Reads a spelled answer.

    Args:
        text: from `spell`.
        group_digits: whether "1,234" outside brackets is one number, or two.

    Raises:
        Unreadable: it is not in the grammar (words, for one).
        TooLarge: it is over a limit.
    """
    if len(text) > MAX_CHARS:
        raise TooLarge(f"more than {MAX_CHARS} characters")
    if _WORDS.fullmatch(text) and not set(re.findall("[a-zA-Z]{2,}", text)) <= _FUNCTIONS_AND_NAMES:
        return Text(text)  # "no" is not n times o
    parser = _Parser(tokenize(text, group_digits))
    node = parser.answer()
    if parser.peek().kind != "end":
        raise Unreadable(f"{parser.peek().text!r} was not expected")
    return node


class _Parser(Cursor):
    """Recursive descent; one method per level of precedence, loosest first."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self.depth = 0
        self.bars = 0  # open |

    def answer(self) -> Node:
        items = self.items()
        return items[0] if len(items) == 1 else Seq("", tuple(items))

    def items(self) -> list[Node]:
        items = [self.clause()]
        while self.separator():
            items.append(self.clause())
        return items

    def separator(self) -> bool:
        found = False
        while self.take(",", ";", *JOINERS) is not None:  # ", and" is one
            found = True
        return found

    def clause(self) -> Node:
        self.name()
        sides, relations = [self.union()], []
        while self.peek().text in RELATIONS:
            relations.append(RELATIONS[self.next().text])
            sides.append(self.union())
        return Rel(tuple(relations), tuple(sides)) if relations else sides[0]

    def name(self) -> None:
        """Skips what only names the value: "Area = 5", "area: 5", "f^{-1}(x) = x", "dy/dx = x"."""
        heads = [self.peek(i).text for i in range(10)]
        if "=" in heads and _FUNCTION_NAME.fullmatch("".join(heads[: heads.index("=")])):
            self.at += heads.index("=") + 1
            return
        ahead = 0
        while self.peek(ahead).kind in ("word", "letter") and self.peek(ahead).text not in JOINERS:
            ahead += 1
        words = [self.peek(i) for i in range(ahead)]
        if any(token.kind == "word" and token.text not in FUNCTIONS and token.text not in NAMES for token in words):
            if self.peek(ahead).text in ("=", ":", "≈"):
                self.at += ahead + 1

    def union(self) -> Node:
        parts = [self.ratio()]
        while self.take("∪"):
            parts.append(self.ratio())
        return parts[0] if len(parts) == 1 else Op("∪", tuple(parts))

    def ratio(self) -> Node:
        terms = [self.quantity()]
        while self.take(":"):
            terms.append(self.quantity())
        return terms[0] if len(terms) == 1 else Op(":", tuple(terms))

    def quantity(self) -> Node:
        """A sum with the unit that follows it: "5 m/s", "$5", "1 h 30 min"."""
        negative = self.peek().text == "-" and self.peek(1).kind == "unit"
        self.at += negative
        prefix = UNITS[self.next().text] if self.peek().kind == "unit" and self.peek().text in UNITS else None
        value = self.sum()
        if negative:
            value = Op("neg", (value,))
        unit = read_unit(self)
        if prefix:
            return Quantity(value, prefix if unit is None or unit == prefix else unit)
        if unit is None:
            for name in ("pct", "deg"):
                if isinstance(value, Op) and value.name == name:
                    return Quantity(value.args[0], UNITS[name])
            return value
        while self.peek().kind == "number":
            more = self.sum()
            smaller = read_unit(self)
            if smaller is None or smaller.dimensions != unit.dimensions:
                raise Unreadable("quantities of different kinds in a row")
            value = Op("+", (value, Op("*", (more, Num(smaller.factor / unit.factor)))))
        return Quantity(value, unit)

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise TooLarge(f"nested more than {_MAX_DEPTH} deep")
        terms: list[Node] = []
        if sign := self.take("±", "∓"):
            terms.append(Op(sign, (self.product(),)))
        else:
            terms.append(self.product())
        while sign := self.take("+", "-", "±", "∓"):
            term = self.product()
            terms.append(term if sign == "+" else Op("neg" if sign == "-" else sign, (term,)))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Op("+", tuple(terms))

    def product(self) -> Node:
        signs = 0
        while sign := self.take("-", "+"):
            signs += sign == "-"
        value = self.factors()
        return Op("neg", (value,)) if signs % 2 else value

    def factors(self) -> Node:
        factors: list[Node] = [self.power()]
        numeric = not free_symbols(factors[0])
        while True:
            factor: Node
            if self.take("*"):
                factor = self.factor()
            elif self.take("/"):
                factor = Op("inv", (self.factor(),))
            elif self.peek().text in ("x", "X") and self.peek(1).text == "10" and self.peek(2).text in ("^", "**"):
                self.at += 1  # 3 x 10^8
                factor = self.power()
            elif self.starts_factor() and not (numeric and at_unit(self)):
                factor = self.power()
            else:
                return factors[0] if len(factors) == 1 else Op("*", tuple(factors))
            numeric = numeric and not free_symbols(factor)
            factors.append(factor)

    def factor(self) -> Node:
        return Op("neg", (self.power(),)) if self.take("-") else self.power()

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "number":  # "2 3" is neither
            before = self.peek(-1)
            return before.kind == "letter" or before.text in (")", "!")
        if token.kind == "letter":
            return True
        if token.kind == "word":
            return token.text in FUNCTIONS or token.text in NAMES or _is_letters(token)
        if token.kind == "command":
            return token.text[1:] in GREEK or token.text[1:] in FUNCTIONS or token.text in _COMMAND_ATOMS
        return token.text in ("(", "[", "{", "√", "∛", "∞") or (token.text == "|" and not self.bars)

    def power(self) -> Node:
        value = self.atom()
        for _ in range(_MAX_DEPTH):
            if self.take("^", "**"):
                value = Op("^", (value, self.exponent()))
            elif self.peek().text == "!" and self.peek(1).text != "=":
                self.at += 1
                value = Op("!", (value,))
            elif self.take("%"):
                value = Op("pct", (value,))
            elif self.take("°", "度"):
                value = Op("deg", (value,))
            elif self.peek().text in SCALES:
                value = Op("*", (value, Num(Fraction(SCALES[self.next().text]))))
            else:
                return value
        raise TooLarge("too many operators behind a value")

    def exponent(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise TooLarge(f"nested more than {_MAX_DEPTH} deep")
        value: Node = Op("neg", (self.atom(),)) if self.take("-") else self.atom(single=True)
        if self.take("^", "**"):
            value = Op("^", (value, self.exponent()))
        self.depth -= 1
        return value

    def group(self) -> Node:
        """One argument of a command: a group in braces, or one token."""
        if not self.take("{"):
            token = self.peek()
            if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():  # \frac12
                self.tokens[self.at] = Token("number", token.text[1:], False)
                return Num(Fraction(int(token.text[0])))
            return self.atom()
        items = self.items()
        self.expect("}")
        return items[0] if len(items) == 1 else Seq("{}", tuple(items))

    def atom(self, single: bool = False) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise TooLarge(f"nested more than {_MAX_DEPTH} deep")
        value = self.bare_atom(single)
        self.depth -= 1
        return value

    def bare_atom(self, single: bool) -> Node:
        token = self.next()
        text = token.text
        if _is_letters(token):  # "cm" where no unit can be
            self.tokens[self.at - 1 : self.at] = [Token("letter", c, False) for c in text]
            return self.subscripted(text[0])
        if token.kind == "repeating":
            return repeating(text)
        if token.kind == "number":
            value = number(text)
            return value if single else self.after_number(value)
        if token.kind == "letter":
            return self.subscripted(text)
        if text in NAMES:
            return Sym(NAMES[text])
        name = text.removeprefix("\\")
        if name in FUNCTIONS and token.kind in ("word", "command"):
            return self.function(SPELLINGS.get(name, name))
        if token.kind == "command":
            return self.command(name)
        match text:
            case "(" | "[" | "{":
                return self.brackets(text)
            case "|":
                return self.bar()
            case "√" | "∛":
                return Op("root", (self.atom(), Num(Fraction(2 if text == "√" else 3))))
            case "∞":
                return Sym("∞")
        raise Unreadable(f"{text or 'the end'!r} is no value")

    def after_number(self, value: Num) -> Node:
        """Mixed numbers, 2\\frac13 and 2 1/3, and numerals to a base, 1011_2."""
        if value.ulp or value.value.denominator != 1:
            return value
        if self.peek().text == "\\frac":
            following = "".join(self.peek(i).text for i in range(1, 7))
            plain = _PLAIN_FRACTION.match(following)
            if plain and int(plain[1] or plain[2]) < int(plain[3] or plain[4]):
                self.at += 1
                return Op("+", (value, Op("/", (self.group(), self.group()))))
        a, slash, b = self.peek(), self.peek(1), self.peek(2)
        if a.kind == b.kind == "number" and a.spaced and slash.text == "/" and a.text.isdigit() and b.text.isdigit():
            self.at += 3
            return Op("+", (value, Op("/", (number(a.text), number(b.text)))))
        if self.take("_"):
            base = self.group()
            if not isinstance(base, Num):
                raise Unreadable("the base of a numeral is a number")
            return Quantity(value, Unit(Fraction(1), ((f"base {base.value}", 1),)))
        return value

    def subscripted(self, name: str) -> Node:
        if self.take("_"):
            if self.take("{"):
                while (token := self.next()).text != "}":
                    if token.kind == "end":
                        raise Unreadable("a subscript does not end")
                    name += "_" + token.text
            else:
                name += "_" + self.next().text
        primes = 0
        while self.take("'"):
            primes += 1
        return Sym(name + "'" * primes)

    def function(self, name: str) -> Node:
        if name == "sqrt":
            index: Node = Num(Fraction(2))
            if self.take("["):
                index = self.sum()
                self.expect("]")
            return Op("root", (self.group(), index))
        base: Node | None = None
        power: Node | None = None
        if name == "log" and self.take("_"):
            base = self.group()
        if self.take("^"):
            power = self.exponent()
        if power == Op("neg", (Num(Fraction(1)),)):
            name, power = "arc" + name, None
        if self.peek().text in ("(", "{", "["):
            argument = self.atom()
        else:
            factors: list[Node] = [self.power()]
            while self.starts_factor() and self.peek().text.removeprefix("\\") not in FUNCTIONS:
                factors.append(self.power())
            argument = factors[0] if len(factors) == 1 else Op("*", tuple(factors))
        if base is not None:
            value: Node = Op("/", (Op("ln", (argument,)), Op("ln", (base,))))
        elif name == "lg":
            value = Op("/", (Op("ln", (argument,)), Op("ln", (Num(Fraction(10)),))))
        else:
            value = Op("ln" if name == "log" else name, (argument,))
        return Op("^", (value, power)) if power else value

    def command(self, name: str) -> Node:
        match name:
            case "frac":
                return Op("/", (self.group(), self.group()))
            case "binom":
                return Op("binom", (self.group(), self.group()))
            case "rows" | "determinant":
                return self.rows(name)
            case "{":
                return self.brackets("\\{")
            case "lfloor" | "lceil":
                value = self.sum()
                self.expect("\\r" + name[1:])
                return Op(name[1:], (value,))
            case "overline" | "bar" | "hat" | "tilde":
                value = self.group()
                return Sym(f"{name} {value}") if not isinstance(value, Num) else value
            case "pi":
                return Sym("π")
            case "dots" | "ldots" | "cdots" | "dotsc":
                return Sym("...")
            case "emptyset":
                return Seq("{}", ())
            case "reals":
                return Seq("()", (Op("neg", (Sym("∞"),)), Sym("∞")))
        if name in GREEK:
            return self.subscripted(name)
        raise Unreadable(f"\\{name} is not known")

    def brackets(self, opening: str) -> Node:
        closers = ("}", "\\}") if opening in ("{", "\\{") else (")", "]")
        bars, self.bars = self.bars, int(opening == "\\{")  # {x | x > 1} multiplies nothing by a bar
        if opening in ("{", "\\{") and self.take(*closers):
            self.bars = bars
            return Seq("{}", ())
        if opening != "\\{" and self.peek().text == "\\rows":  # the brackets of a matrix
            matrix = self.atom()
            if self.take(*closers):
                self.bars = bars
                return matrix
            raise Unreadable("more than a matrix in brackets")
        items = self.items()
        if opening == "\\{" and self.peek().text in ("|", ":") and len(items) == 1:  # {x | x > 1}
            self.at += 1
            items = self.items()
        closer = self.expect(*closers)
        self.bars = bars
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return Seq("{}", tuple(items))
        if len(items) > 1:
            return Seq(opening + closer, tuple(items))
        return items[0] if not isinstance(items[0], Seq) or opening != "[" else Seq("[]", tuple(items))

    def bar(self) -> Node:
        self.bars += 1
        value = self.sum()
        self.expect("|")
        self.bars -= 1
        return Op("abs", (value,))

    def rows(self, name: str) -> Node:
        r"""Rows of a matrix, as [[1, 2], [3, 4]] would be read; one row or one column is a vector, (1, 2)."""
        opening = self.expect("{") if self.peek().text == "{" else ""
        rows: list[list[Node]] = [[self.clause()]]
        while mark := self.take("&", "\\\\", "\\&"):
            if mark == "\\\\":
                if self.peek().text == "}":
                    break
                rows.append([self.clause()])
            else:
                rows[-1].append(self.clause())
        if opening:
            self.expect("}")
        if len({len(row) for row in rows}) > 1:
            raise Unreadable("rows of different lengths")
        if name == "determinant":
            return Op("determinant", tuple(Seq("[]", tuple(row)) for row in rows))
        if len(rows) == 1 or len(rows[0]) == 1:
            return Seq("()", tuple(cell for row in rows for cell in row))
        return Seq("[]", tuple(Seq("[]", tuple(row)) for row in rows))


_COMMAND_ATOMS = ("\\frac", "\\binom", "\\pi", "\\lfloor", "\\lceil", "\\overline", "\\bar", "\\{")


def _is_letters(token: Token) -> bool:
    return token.kind == "word" and token.text in UNITS and len(token.text) <= 3 and token.text.isascii()
