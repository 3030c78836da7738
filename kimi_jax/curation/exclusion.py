"""Prompts whose answers prove little: multiple choice, true or false, and proofs (k1.5 §2.1).

The first two are right by chance too often, and no rule can check the third. All three are told by their text, in
English and Chinese, and the first two also by their answer.
"""

import re
import unicodedata

from kimi_jax.types import Problem

# The label of an option, such as "(B)", "B.", "B、" or "B:", where a word could begin. Lower case labels are mostly the
# parts of a question.
_LABEL = r"(?:^|(?<=[\s,;，；。?？]))\(?{}(?:\)|[.、:](?!\w\.))"
_LABELS = {letter: re.compile(_LABEL.format(letter), re.MULTILINE) for letter in "ABC"}

_MULTIPLE_CHOICE = re.compile(
    r"\bwhich (?:one )?of the (?:following|options|choices)\b"
    r"|\b(?:choose|select|pick|mark) (?:the |one |all )?(?:correct|best|right|appropriate|of the)\b"
    r"|\b(?:answer|multiple)[- ]choices?\b"
    r"|下列[^。?]{0,24}(?:的是|哪|有几个是)|以下[^。?]{0,24}(?:的是|哪)|选择题|[单多]选|选项"
    r"|(?:的是|的有|等于|为)\s*\(\s*\)",
    re.IGNORECASE,
)
_TRUE_FALSE = re.compile(
    r"\btrue or false\b|\btrue ?/ ?false\b|\bt ?/ ?f\b|\byes or no\b|\byes ?/ ?no\b|\bis it true that\b"
    r"|\b(?:right or wrong|correct or incorrect|true or not)\b"
    r"|判断题|判断对错|判断正误|判断[^。?]{0,24}(?:是否|对错|正误|真假)|对还是错|是否正确|(?:正确|对)的?[^。]{0,6}打[\"“]?[√✓]",
    re.IGNORECASE,
)
# As an order, not as in "it can be proved that" or "身份证明".
_PROOF = re.compile(
    r"(?:^|[.!?;:,]\s+|\b(?:please|then|and|or|now|should|must|asked to|required to|to)\s+)"
    r"(?:(?:formally|rigorously)\s+)?(?:prove|disprove)\b(?! to be)"
    r"|(?:^|[.!?;:,]\s+|\b(?:please|then|and|to)\s+)show\s+(?:that|why)\b"
    r"|\b(?:give|write|provide|find|complete|present)\s+an?\s+(?:\w+\s+)?proof\b"
    r"|(?<!身份)(?<!可以)(?<!可)(?<!能)(?<!已)(?<!已经)证明(?!了|书|文件|材料)|求证|试证|证明题",
    re.IGNORECASE | re.MULTILINE,
)
_TWO_VALUED = frozenset("true false yes no t f 对 错 正确 错误 是 否 不是 √ × ✓ ✗".split())
_LETTER = re.compile(r"\(?([A-H])\)?\.?")


def exclusion(problem: Problem) -> tuple[str, str] | None:
    """(reason, what shows it), the reason one of "multiple_choice", "true_false", "proof"; None for a good prompt."""
    text, answer = (unicodedata.normalize("NFKC", part).strip() for part in (problem.prompt, problem.answer))
    if options := _options(text, "ABC"):
        return "multiple_choice", _clip(options)
    if found := _MULTIPLE_CHOICE.search(text):
        return "multiple_choice", _clip(found[0])
    if _LETTER.fullmatch(answer) and (options := _options(text, "AB")):
        return "multiple_choice", f"the answer is {answer!r}, after {_clip(options)}"
    if found := _TRUE_FALSE.search(text):
        return "true_false", _clip(found[0])
    if answer.casefold().rstrip(".。") in _TWO_VALUED:
        return "true_false", f"the answer is {answer!r}"
    if found := _PROOF.search(text):
        return "proof", _clip(found[0])
    return None


def _options(text: str, letters: str) -> str | None:
    """What stands from the label of the first option to that of the last, if all are there in this order."""
    found: list[re.Match[str]] = []
    for letter in letters:  # one expression for all would try each A with each B
        label = _LABELS[letter].search(text, found[-1].end() if found else 0)
        if not label:
            return None
        found.append(label)
    return text[found[0].start() : found[-1].end()]


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")
