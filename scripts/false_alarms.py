"""How often repeat detection stops text that is in order, and how soon it stops text that is not.

    python scripts/false_alarms.py [--window=512] [--settings='{"min_tokens": 256}'] [--vocab=8000] [--texts=200]

Reads files of this machine (Python's standard library, and Debian's documentation where it is), draws worked solutions
of the tasks, makes up tables, lists and reasoning, cuts all to responses of at most 4,096 tokens, once in SentencePiece
tokens and once in bytes, and runs the detector of the engine over them. Prints tables in Markdown, in about a minute.
"""

import argparse
import functools
import gzip
import json
import math
import pathlib
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.sampling import repetition
from kimi_jax.tasks import TASKS
from kimi_jax.tasks.base import make_problems
from kimi_jax.trainers.config import default_config

LENGTH = 4096  # tokens of a response
_ROWS = 20
_CHARACTERS = 20_000  # about what these are in SentencePiece tokens
_WORDS = "red green blue river stone cloud maple copper winter summer north south eagle salmon carbon silver".split()
Rng = np.random.Generator


# --- ordinary text --------------------------------------------------------------------------------------------------


def natural_texts(count: int, rng: Rng) -> dict[str, list[str]]:
    """Pieces of at most `count` files of each kind."""
    python, usr = pathlib.Path(sysconfig.get_path("stdlib")), pathlib.Path("/usr")
    sources = {
        "Python, library": (p for p in python.rglob("*.py") if not {"test", "site-packages"} & set(p.parts)),
        "Python, tests": python.glob("test/**/*.py"),
        "C headers": usr.glob("include/**/*.h"),
        "manual pages": usr.glob("share/man/man[1-8]/*"),
        "licences": usr.glob("share/common-licenses/*"),
        "copyright files": usr.glob("share/doc/*/copyright"),
        "changelogs": usr.glob("share/doc/*/changelog*"),
        "readme and news": (p for p in usr.glob("share/doc/*/*") if p.name.startswith(("README", "NEWS"))),
    }
    return {name: _pieces(paths, count, rng) for name, paths in sources.items()}


def _pieces(paths: Iterable[pathlib.Path], count: int, rng: Rng) -> list[str]:
    files, pieces = sorted({p.resolve() for p in paths if p.is_file()}), []
    for i in rng.permutation(len(files)):
        data = files[i].read_bytes()
        text = (gzip.decompress(data) if files[i].suffix == ".gz" else data).decode("utf-8", errors="replace")
        if len(text) >= 2000 and len(pieces) < count:
            at = int(rng.integers(0, max(1, len(text) - _CHARACTERS)))
            pieces.append(text[at : at + _CHARACTERS])
    return pieces


def _name(rng):
    return " ".join(rng.choice(_WORDS, 2)).title()


def _lines(line: Callable[..., str], count: int, head: str = "") -> Callable[[Rng], str]:
    return lambda rng: head + "".join(line(rng, i) + "\n" for i in range(count))


def _grid(width: int, height: int, value: Callable, head="", left="", middle=" ", right="") -> Callable[[Rng], str]:
    row = lambda rng, i: left + middle.join(str(value(rng, i, j)) for j in range(width)) + right  # noqa: E731
    return _lines(row, height, head)


def _hanoi(rng):
    pegs = [str(peg) for peg in rng.permutation(["A", "B", "C"])]

    def moves(n, a, b, c):
        return moves(n - 1, a, c, b) + f"Move disk {n} from {a} to {c}.\n" + moves(n - 1, b, a, c) if n else ""

    return moves(9, *pegs)


def _json(rng):
    item = lambda i: {"id": i, "name": _name(rng), "tags": list(rng.choice(_WORDS, 3)), "ok": bool(rng.random() < 0.5)}  # noqa: E731
    return json.dumps([item(i) for i in range(200)], indent=2)


def _case(rng, n):
    square = n * (n - 1) // 2
    return (
        f"Let me try n = {n}. The number of pairs is {n}·{n - 1}/2 = {square}, and it should be a square. The root of "
        f"{square} is about {math.sqrt(square):.2f}, which is not an integer, so n = {n} is out and we move on."
    )


def _solutions(rng):
    task = TASKS[rng.choice(list(TASKS))]
    problems = make_problems(task, split="train", count=60, seed=int(rng.integers(1 << 30)))
    return "\n".join(problem.solution for problem in problems)


def _record(rng, i):
    return f"2024-{i // 28 % 12 + 1:02d}-{i % 28 + 1:02d},{_name(rng)},{rng.normal(10, 5):.1f},{rng.integers(100)}"


def _scores(rng, i):
    return f"| {_name(rng)} | {rng.integers(100)} | {rng.choice(['A', 'B'])} | {rng.random():.2f} |"


SYNTHETIC: Mapping[str, Callable[[Rng], str]] = {
    "CSV, dates and readings": _lines(_record, 500, "date,city,temperature,humidity\n"),
    "CSV, nine cells of ten are 0": _grid(
        20, 300, lambda rng, i, j: rng.integers(1, 9) * (rng.random() < 0.1), middle=","
    ),
    "Markdown table": _lines(_scores, 400, "| name | score | group | share |\n|---|---:|---|---:|\n"),
    "table with ruled rows": _lines(lambda rng, i: f"| {_name(rng):<30} | {rng.integers(9999):>8} |\n" + "-" * 45, 200),
    "HTML table": _grid(
        8, 150, lambda rng, i, j: rng.integers(100), "<table>\n", "<tr><td>", "</td><td>", "</td></tr>"
    ),
    "JSON records": _json,
    "SQL inserts": _lines(lambda rng, i: f"INSERT INTO cities (id, name) VALUES ({i}, '{_name(rng)}');", 300),
    "log of a service": _lines(
        lambda rng, i: f"12:{i // 60:02d}:{i % 60:02d} INFO shop: request {i} in {rng.integers(900)} ms", 300
    ),
    "1 to 2000, one per line": _lines(lambda rng, i: str(i + 1), 2000),
    "1 to 2000, commas": lambda rng: ", ".join(map(str, range(1, 2001))),
    "2000 down to 1, spaces": lambda rng: " ".join(map(str, range(2000, 0, -1))),
    "random numbers": _grid(10, 300, lambda rng, i, j: rng.integers(1000), middle=", "),
    "binary numbers": _lines(lambda rng, i: f"{i:010b}", 600),
    "matrices": _grid(12, 150, lambda rng, i, j: rng.integers(-9, 10), left="[", middle=", ", right="]"),
    "multiplication table, lines": _lines(
        lambda rng, i: f"{i // 20 + 1} × {i % 20 + 1} = {(i // 20 + 1) * (i % 20 + 1)}", 600
    ),
    "multiplication table, Markdown": _grid(
        20, 60, lambda rng, i, j: (i + 1) * (j + 1), left="| ", middle=" | ", right=" |"
    ),
    "squares": _lines(lambda rng, i: f"{i}^2 = {i * i}", 700),
    "case after case": _lines(lambda rng, i: _case(rng, i + 10), 90),
    "truth table of 7": _grid(7, 128, lambda rng, i, j: "FT"[i >> 6 - j & 1], left="| ", middle=" | ", right=" |"),
    "identity matrix, 40 × 40": _grid(40, 40, lambda rng, i, j: int(i == j), left="[", middle=", ", right="]"),
    "towers of Hanoi, 9 disks": _hanoi,
    "rulers of 79 dashes": _lines(lambda rng, i: f"{_name(rng)} {rng.integers(1000)}\n" + "-" * 79, 100),
    "rulers of 160 dashes": _lines(lambda rng, i: f"{_name(rng)} {rng.integers(1000)}\n" + "-" * 160, 60),
    "solutions of the tasks, 60 in a row": _solutions,
}

# --- text that goes round -------------------------------------------------------------------------------------------

_SENTENCE = "Wait, let me check the sum once more: 17 and 25 make 42, so the answer stands. "
_PARAGRAPH = (
    "First I compute the area of the triangle, which is one half of the base times the height, and this gives 24. Then "
    "I take away the area of the square that lies inside, which is 9, so that 15 remains. But the problem asks for the "
    "ratio, so 15 has to be divided by 24, which gives five eighths, and that matches none of the choices. I must have "
    "read the drawing in a wrong way; the height could be measured from the other side, and then the base is 8 and not "
    "6. So the area is 32, the rest is 23, and the ratio is 23 to 32. This is no choice either, so let me begin again "
    "with the coordinates: A is at the origin, B lies on the axis at distance 8, and C stands above the middle. "
)


def _one_word_changed(rng):
    words = _PARAGRAPH.split(" ")
    words[int(rng.integers(len(words) - 1))] = str(rng.choice(_WORDS))
    return " ".join(words)


def _said_differently(rng):
    starts = ("Wait, let me check. ", "Hmm, let me check again. ", "Actually, I should check this. ")
    ends = ("The sum of the numbers is 42 and the product is 2520, so the answer is 14. ", _SENTENCE)
    return str(rng.choice(starts)) + str(rng.choice(ends))


def _other_numbers(rng):
    a, b = rng.integers(10, 99, 2)
    return f"Wait, let me check the sum once more: {a} and {b} make {a + b}, so the answer stands. "


LOOPS: Mapping[str, Callable[[Rng], str]] = {
    "one character": lambda rng: "!",
    "a word": lambda rng: " so",
    "a sentence": lambda rng: _SENTENCE,
    "a paragraph": lambda rng: _PARAGRAPH,
    "a paragraph, one word of it changed each time": _one_word_changed,
    "a check in six wordings, at random": _said_differently,
    "a check with other numbers each time (not seen)": _other_numbers,
}


# --- the measurement ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="window")
def _alarms(tokens, lengths, settings, *, window):
    """bool [T, B] of tokens [T, B]."""

    def step(state, at):
        return repetition.update(state, tokens[at], at < lengths, settings)

    return jax.lax.scan(step, repetition.start(_ROWS, window=window), jnp.arange(LENGTH))[1]


def first_alarm(
    texts: Sequence[Sequence[int]], settings: repetition.RepetitionSettings, window: int
) -> list[int | None]:
    """After how many tokens each text of at most LENGTH is reported; None where it is not."""
    first: list[int | None] = []
    for at in range(0, len(texts), _ROWS):
        batch = texts[at : at + _ROWS]
        tokens = np.zeros((LENGTH, _ROWS), np.int32)
        for b, text in enumerate(batch):
            tokens[: len(text), b] = text
        lengths = np.array([len(text) for text in batch] + [0] * (_ROWS - len(batch)))
        found = np.asarray(_alarms(tokens, lengths, settings, window=window)).T[: len(batch)]
        first += [int(row.argmax()) + 1 if row.any() else None for row in found]
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of RepetitionSettings, as JSON")
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--texts", type=int, default=200, help="most files of a kind; made-up texts: a tenth of it")
    args = parser.parse_args()
    defaults = dict(default_config().sampling.repetition)
    defaults.pop("window")
    settings = repetition.RepetitionSettings.of(**defaults | args.settings)

    rng = np.random.default_rng(0)
    corpora = natural_texts(2 * args.texts, rng)
    learnt = [
        text for texts in corpora.values() for text in texts[::2]
    ]  # the tokenizer knows one half, we judge the other
    learnt += [make(rng)[:_CHARACTERS] for make in SYNTHETIC.values()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.train(learnt, pathlib.Path(folder, "tokenizer.model"), vocab_size=args.vocab)
    corpora = {name: texts[1::2] for name, texts in corpora.items()}
    corpora |= {name: [make(rng) for _ in range(max(1, args.texts // 10))] for name, make in SYNTHETIC.items()}
    encoders = (tokenizer.encode, lambda text: list(text.encode()))

    print(f"window {args.window}, {settings}, {tokenizer.vocab_size} SentencePiece tokens\n")
    print("| text | responses | tokens | stopped | bytes | stopped |\n|---|---:|---:|---:|---:|---:|")
    for name, texts in corpora.items():
        if texts:
            cells = []
            for encode in encoders:
                encoded = [encode(text)[:LENGTH] for text in texts]
                alarms = first_alarm(encoded, settings, args.window)
                cells += [f"{sum(map(len, encoded)):,}", sum(alarm is not None for alarm in alarms)]
            print("|", " | ".join(map(str, (name, len(texts), *cells))), "|", flush=True)

    print("\n| what goes round | tokens of a round | stopped after | bytes of a round | stopped after |")
    print("|---|---:|---:|---:|---:|")
    for name, make in LOOPS.items():
        cells = []
        for encode in encoders:
            rounds = [encode(make(rng)) for _ in range(LENGTH)]
            text = [token for tokens in rounds for token in tokens][:LENGTH]
            cells += [
                round(float(np.mean([len(tokens) for tokens in rounds]))),
                first_alarm([text], settings, args.window)[0],
            ]
        print("|", " | ".join(map(str, (name, *cells))), "|", flush=True)


if __name__ == "__main__":
    main()
