"""One spelling for the many of Unicode, LaTeX and markdown, so that the grammar need not know them.

Every pattern here takes time linear in the text; `compare` bounds the text.
"""

import re
import unicodedata

_SUPERSCRIPTS = {ord(c): d for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True)}
_GREEK = (
    "αβγδεζηκλνξρστυφχψω",
    "alpha beta gamma delta epsilon zeta eta kappa lambda nu xi rho sigma tau upsilon phi chi psi omega",
)
_SUBSCRIPTS = {ord(c): d for c, d in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)}
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒﹣", "-"),
        **dict.fromkeys("×·⋅∙•∗✕", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("、，", ","),
        **{"；": ";", "。": ".", "：": ":", "∶": ":", "≦": "≤", "≧": "≥", "⩽": "≤", "⩾": "≥", "≃": "≈", "≅": "≈"},
        **{"∅": "\\emptyset ", "ℝ": "\\reals ", "π": "\\pi ", "θ": "\\theta ", "⟨": "(", "⟩": ")", "º": "°", "’": "'"},
        **{letter: f"\\{name} " for letter, name in zip(_GREEK[0], _GREEK[1].split(), strict=True)},
        **{"【": "[", "】": "]", "〔": "[", "〕": "]", "￥": "¥", "\u200b": "", "\ufeff": ""},
    }
)
_COMMANDS = {  # command without arguments -> what the parser reads
    **dict.fromkeys(["times", "cdot", "ast", "bullet"], "*"),
    **{"div": "/", "pm": "±", "mp": "∓", "infty": "∞", "infinity": "∞", "cup": "∪", "in": "∈", "ne": "≠", "neq": "≠"},
    **{"le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">"},
    **{"approx": "≈", "simeq": "≈", "equiv": "=", "colon": ":", "lbrace": "\\{", "rbrace": "\\}", "degree": "°"},
    **dict.fromkeys(["lvert", "rvert", "vert", "mid"], "|"),
    **{"langle": "(", "rangle": ")", "lbrack": "[", "rbrack": "]", "vee": " or ", "lor": " or ", "land": " and "},
    **{"wedge": " and ", "varnothing": "\\emptyset ", "backslash": " ", "dollar": "\\$", "percent": "%"},
}
_NOTHING = r"left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|rm|bf|it|angle|triangle|hfill|nolimits|boldsymbol"
_WRAPPERS = r"text(?:rm|bf|it|sf|normal|tt)?|math(?:rm|bf|it|sf|cal|bb|tt|frak)|mbox|hbox|operatorname\*?|vec|bm|pmb"
_WRAPPER = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]{{0,300}})\}}")
_BARE_WRAPPER = re.compile(rf"\\(?:{_WRAPPERS})(?=\s*\{{)")  # with braces inside
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z])|enspace(?![a-zA-Z])|thinspace(?![a-zA-Z]))|~|\s")
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?")
_BEGIN_ROWS = re.compile(r"\\begin\s*\{([pbBv]?matrix|array|smallmatrix)\}(?:\s*\{[lcr|\s]*\})?")
_END_ROWS = re.compile(r"\\end\s*\{(?:[pbBv]?matrix|array|smallmatrix)\}")


def spell(text: str) -> str:
    """One spelling for the many of Unicode, LaTeX and markdown: full-width forms, spaces, wrappers, delimiters."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: "\\frac " + unicodedata.normalize("NFKC", m[0]).replace("⁄", " "), text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = re.sub(r"(?<=[\w)}\]])(?:\*\*|\s\*\*\s)(?=[\w(\\+-])", "^", text)
    text = re.sub(r"(\.\d{4,}) ?(?:\.{3}|\\[lc]?dots(?![a-zA-Z]))", r"\1", text)  # a decimal that goes on
    text = (
        text.replace("**", " ")
        .replace("...", "\\dots ")
        .replace("\\!", "")
        .replace("\\text{,}", ",")
        .replace("{,}", ",")
        .replace("`", " ")
    )
    text = text.strip().strip("_").replace("\\%", "%")
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # an escaped backslash, out of JSON
    text = re.sub(r"\\[()]|\\\[(?!\d+(?:pt|em|ex)\])|\\\]|(?<!\\)\$\$", " ", text) if "\\begin" not in text else text
    if text.count("$") - text.count("\\$") != 1 or not re.match(r"-?\s*\$\s*\.?\d", text):
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"(?<!\\)\$", r"\\$", text)  # what is left is a dollar and no delimiter
    text = _REALS.sub(r"\\reals ", text)
    text = _BEGIN_ROWS.sub(lambda m: "\\determinant{" if m[1] == "vmatrix" else "\\rows{", text)
    text = _END_ROWS.sub("}", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", text)
    text = re.sub(r"\\left\s*\.|\\right\s*\.", " ", text)
    text = re.sub(rf"\\(?:{_NOTHING})(?![a-zA-Z])", " ", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))", "°", text)
    for _ in range(3):  # a wrapper in a wrapper
        text = _WRAPPER.sub(r" \1 ", text)
    text = _BARE_WRAPPER.sub(" ", text)
    text = _SPACES.sub(" ", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = re.sub(r"<\s*=", "≤", text)
    text = re.sub(r">\s*=", "≥", text)
    text = text.replace("!=", "≠") if re.search(r"[a-zA-Z]\s*!=", text) else text
    return " ".join(text.split()).rstrip(".,;:\\ ").strip()
