r"""Finding the final answers of a response.

A response commits to an answer by \boxed{...}, a line "Answer: ...", `#### ...`, JSON {"answer": ...}, or a phrase like
"the final answer is ..." (also in Chinese: 答案是). What stands before the end of a chain of thought is not looked at.
"""

import json
import re

MAX_RESPONSE_CHARS = 1_000_000  # of the end, where answers stand
_MAX_LINE = 400  # a response that is one short line is the answer
_THOUGHT_ENDS = ("</think>", "◁/think▷", "</thinking>")
_MAX_GAP = 40  # between boxes that are one answer
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_JOINT = re.compile(r"(?:\\[()\[\]]|\\text|[{}$,;.，、\s]|and|or|和|或|与|[a-zA-Z]\w?\s*=)*")
_LINE = re.compile(r"(?:(?:\b(?i:answer)|答案)[*_]*\s*[:：]|^[ \t]*\#{4})[ \t*_]*(.*)", re.M)
_NUMERAL = re.compile(r"-?\d[\d.,/ ]*")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_PROSE = 3  # words: a line that has so many explains, rather than gives, an answer
_JSON_DECODER = json.JSONDecoder(parse_float=str)  # with all of its digits
_PHRASE = re.compile(
    r"\b(?i:answer)\s+(?:(?!is\b|are\b)[\w-]+\s+){0,6}(?:is|are|equals)\s*+(?::\s*+)?(?!not\b)(.+)"
    r"|(?i:\bthe (?:result|value) is)\s*+(?::\s*+)?(?!not\b)(.+)"
    r"|答案(?:应该|应|就)?(?:是|为|等于|选)\s*+(?:[:：]\s*+)?(.+)"
)
_PHRASE_END = re.compile(
    r"(?<!\d)\.(?=\s|$)|(?<=\d)\.(?=\s|$)|。|；|;\s|!(?=\s)|\b(?i:because|since|which|where|as|so|hence|by)\b|[，,](?=因为|所以|其中)"
)
_JSON = re.compile(r'"(?:final_)?(?:answer|答案)"\s*:\s*(?="|[-\d\[tf])', re.I)
_JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.S)


def extract_answers(text: str) -> list[str]:
    """The final answers of a response, in the order of their appearance; each distinct text once.

    Boxes, JSON and "Answer:" lines are taken together, for one response should say one thing; but beside a box or JSON,
    a line of prose ("Checking the answer: both sides are even.") says nothing. Phrases count only where none of them is
    found, and the whole text only if it is one short line without any.
    Boxes that stand side by side ("\\boxed{1} and \\boxed{2}") are one answer of several values.
    """
    text = text[-MAX_RESPONSE_CHARS:]
    for end in _THOUGHT_ENDS:
        text = text.rpartition(end)[2]
    found = [*_boxes(text), *_json_values(text)]
    found += [line for line in _lines(text) if not found or len(_WORD.findall(line[1])) < _PROSE]
    if not found:
        found = _phrases(text)
    if not found and "\\boxed" not in text and "\n" not in text.strip() and len(text.strip()) <= _MAX_LINE:
        found = [(0, text)]
    answers = [answer.strip() for _, answer in sorted(found)]
    return list(dict.fromkeys(answer for answer in answers if answer))


def _boxes(text: str) -> list[tuple[int, str]]:
    """Closed boxes, those side by side joined."""
    groups: list[tuple[int, list[str]]] = []
    before = -_MAX_GAP  # where the last box ended
    for match in _BOX.finditer(text):
        if match.start() < before:
            continue  # a box in a box
        end = _closing_brace(text, match.end())
        if end is None:
            break
        content = text[match.end() : end]
        if groups and match.start() - before < _MAX_GAP and _JOINT.fullmatch(text, before, match.start()):
            groups[-1][1].append(content)
        else:
            groups.append((match.start(), [content]))
        before = end + 1
    return [(start, ", ".join(filter(str.strip, contents))) for start, contents in groups]


def _closing_brace(text: str, start: int) -> int | None:
    """The position of the brace that closes the one before `start`; escaped braces do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if not depth:
                return match.start()
    return None


def _json_values(text: str) -> list[tuple[int, str]]:
    values = []
    for match in _JSON.finditer(text):
        if string := _JSON_STRING.match(text, match.end()):  # not json.loads, which makes a form feed of "\frac"
            value = re.sub(r'\\([\\"])', r"\1", string[1])
        else:
            try:
                decoded, _ = _JSON_DECODER.raw_decode(text[match.end() : match.end() + _MAX_LINE])
            except (ValueError, RecursionError):
                continue
            value = ", ".join(map(str, decoded)) if isinstance(decoded, list) else str(decoded)
        values.append((match.start(), value))
    return values


def _lines(text: str) -> list[tuple[int, str]]:
    """What follows "Answer:" on its line, or on the next if it ends there.

    A box speaks for its line, unless a number stands before it.
    """
    lines = []
    for match in _LINE.finditer(text):
        content = match[1]
        if not content.strip(" *$\\[("):
            content = text[match.end() : match.end() + 2 * _MAX_LINE].strip()
            content = content.removeprefix("\\[").removeprefix("$$").strip().partition("\n")[0]
        content = content.strip().strip("*_").strip()
        if box := _BOX.search(content):
            content = content[: box.start()].strip(" $")
            if not _NUMERAL.fullmatch(content):
                continue
        if content and len(content) <= _MAX_LINE:
            lines.append((match.start(), content))
    return lines


def _phrases(text: str) -> list[tuple[int, str]]:
    phrases = []
    for match in _PHRASE.finditer(text):
        content = match[1] or match[2] or match[3]
        content = _PHRASE_END.split(content, maxsplit=1)[0].strip().strip("*_").strip()
        if content and len(content) <= _MAX_LINE:
            phrases.append((match.start(), content))
    return phrases
