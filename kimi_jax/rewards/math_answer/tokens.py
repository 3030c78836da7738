"""From spelled text to tokens: where a word ends, and which digits and separators make one number."""

import re
from dataclasses import dataclass
from fractions import Fraction

from kimi_jax.rewards.math_answer.tree import Num, TooLarge, Unreadable
from kimi_jax.rewards.math_answer.units import SCALES, UNITS

MAX_TOKENS = 800
_MAX_DIGITS = 1000
_MAX_EXPONENT_DIGITS = 4  # of 1e-5; beyond, exact arithmetic would be large
_DIGITS = re.compile(r"\d+")
_TOKEN = re.compile(
    r"(?P<repeating>\d*\.\d*\\overline\s*\{\s*\d+\s*\})"
    r"|(?P<grouped>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?)"
    r"|(?P<spaced>\d{1,3}(?: \d{3})+(?! ?\d)(?:\.\d+)?)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<unit>°\s?[CF](?![a-zA-Z])|\\\$|[€£¥₩₹Ω])"
    r"|(?P<command>\\[a-zA-Z]+|\\[{}|\\&])"
    r"|(?P<word>[a-zA-Zμ]+|[\u4e00-\u9fff]+)"
    r"|(?P<symbol>\*\*|[^\s])"
)
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
).split()
FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan asin acos atan ln log lg exp sqrt abs floor ceil"
).split()
SPELLINGS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
NAMES = {"pi": "π", "Pi": "π", "inf": "∞", "infinity": "∞", "Infinity": "∞", "oo": "∞"}
JOINERS = {"or": "or", "and": "and", "或": "or", "或者": "or", "和": "and", "与": "and", "及": "and", "以及": "and"}
RELATIONS = {"=": "=", "≈": "≈", "≠": "≠", "<": "<", "≤": "≤", ">": ">", "≥": "≥", "∈": "∈", "属于": "∈"}


UNIT_WORDS = {"per": -1, "每": -1, "square": 2, "sq": 2, "平方": 2, "cubic": 3, "立方": 3}  # -> power
RESERVED = {*JOINERS, *FUNCTIONS, *UNIT_WORDS, *SCALES}


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    spaced: bool  # white space stands before it


def tokenize(text: str, group_digits: bool) -> list[Token]:
    tokens: list[Token] = []
    position = depth = 0
    while position < len(text):
        spaced = text[position] == " "
        position += spaced
        if position == len(text):
            break
        match = _TOKEN.match(text, position)
        assert match is not None, "white space is uniform, and _TOKEN takes any other character"
        kind, word = str(match.lastgroup), match[0]
        if kind == "grouped" and (depth or not group_digits):  # "(1,234)" is a pair
            kind, word = "number", _DIGITS.match(text, position)[0]  # type: ignore[index]
        if kind in ("grouped", "spaced"):
            kind, word = "number", re.sub("[ ,]", "", word)
            position = match.end()
        elif kind == "number":
            position += len(word)
        else:
            position = match.end()
        depth += (word in ("(", "[", "{", "\\{")) - (word in (")", "]", "}", "\\}"))
        if kind == "unit":
            word = word.replace(" ", "")
        if kind == "word" and word not in NAMES and (word not in UNITS or len(word) == 1):
            tokens.extend(_split_word(word, spaced))
        else:
            tokens.append(Token(kind, word, spaced))
        if len(tokens) > MAX_TOKENS:
            raise TooLarge(f"more than {MAX_TOKENS} tokens")
    return tokens


def _split_word(word: str, spaced: bool) -> list[Token]:
    """ "xy" is two symbols, "sinx" a function of one, "2pir" ends in π and r; "east" stays a word."""
    if (word in UNITS and len(word) > 1) or word in RESERVED:
        return [Token("word", word, spaced)]
    if not word.isascii():
        if len(word) > 1 and word[0] in SCALES:  # 万人
            return [Token("word", word[0], spaced), Token("word", word[1:], True)]
        return [Token("word", word, spaced)]
    for head in sorted(FUNCTIONS, key=len, reverse=True):
        if word.startswith(head) and len(word) <= len(head) + 2:
            return [Token("word", head, spaced), *(Token("letter", c, False) for c in word[len(head) :])]
    if word.startswith("pi") and len(word) <= 4:
        return [Token("word", "pi", spaced), *(Token("letter", c, False) for c in word[2:])]
    if len(word) > 3:
        return [Token("word", word, spaced)]
    return [Token("letter", c, spaced and not i) for i, c in enumerate(word)]


def number(text: str) -> Num:
    if len(text) > _MAX_DIGITS:
        raise TooLarge(f"a numeral of {len(text)} characters")
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-")) > _MAX_EXPONENT_DIGITS:
        raise TooLarge(f"the exponent of {text:.20}")
    scale = Fraction(10) ** int(exponent or 0)
    _, point, decimals = mantissa.partition(".")
    value = Fraction(mantissa.rstrip(".") if not mantissa.startswith(".") else "0" + mantissa) * scale
    return Num(value, Fraction(1, 10 ** len(decimals)) * scale if point and decimals else Fraction(0))


def repeating(text: str) -> Num:
    """0.1\\overline{6} = 1/6."""
    if len(text) > _MAX_DIGITS:
        raise TooLarge(f"a numeral of {len(text)} characters")
    head, period = text.replace(" ", "").rstrip("}").split("\\overline{")
    whole, _, decimals = head.partition(".")
    ninths = Fraction(int(period), 10 ** len(period) - 1)
    return Num(int(whole or 0) + (int(decimals or 0) + ninths) / 10 ** len(decimals))


_END = Token("end", "", False)


class Cursor:
    """A place among tokens."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.at = 0

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else _END

    def next(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def take(self, *texts: str) -> str | None:
        """The next token, if it is one of these."""
        token = self.peek()
        if token.kind != "end" and token.text in texts:
            self.at += 1
            return token.text
        return None

    def expect(self, *texts: str) -> str:
        found = self.take(*texts)
        if found is None:
            raise Unreadable(f"expected {' or '.join(texts)}, found {self.peek().text!r}")
        return found
