"""The problems of `problems/*.txt`, as records for scripts/generate_tests.py.

    python -m tests.curation.own_problems > own.jsonl

A file has sections, each after a line that begins with @@: of each problem its name, with the statement below; a
generator; right solutions; and wrong ones, each with what is wrong. In Python, T is the list of the words of the input.
The first two right solutions, each in several ways of reading, and the first wrong one are the ten submissions that
vote; all others and the wrong ones are controls. So one vote in ten is wrong, as in a set whose tests were weak.
"""

import json
import pathlib

FOLDER = pathlib.Path(__file__).parent / "problems"
READERS = (
    "import sys\nT = sys.stdin.read().split()\n",
    "T = open(0).read().split()\n",
    "import sys\nT = [word for line in sys.stdin for word in line.split()]\n",
    "import os\nT = b''.join(iter(lambda: os.read(0, 65536), b'')).decode().split()\n",
    "T = []\ntry:\n    while True:\n        T += input().split()\nexcept EOFError:\n    pass\n",
)
CPP = "#include <bits/stdc++.h>\nusing namespace std;\n"
VOTES = 10


def load(names: tuple[str, ...] = ()) -> list[dict]:
    """Records of all problems, or of those with these names."""
    problems: dict[str, dict] = {}
    for path in sorted(FOLDER.glob("*.txt")):
        for section in path.read_text().split("@@ ")[1:]:
            head, _, body = section.partition("\n")
            kind, *rest = head.split()
            if kind == "problem":
                current = problems[rest[0]] = {"statement": body.strip(), "right": [], "wrong": []}
            elif kind == "generator":
                current["generator"] = body
            else:
                language = "cpp" if rest[:1] == ["cpp"] else "python"
                current[kind].append((language, body.strip() + "\n", " ".join(rest[language == "cpp" :])))
    return [_record(name, problems[name]) for name in names or problems]


def _record(name: str, problem: dict) -> dict:
    right, wrong = problem["right"], problem["wrong"]
    votes = [_submission(*right[i % 2][:2], reader=i // 2) for i in range(VOTES - 1)] + [_submission(*wrong[0][:2])]
    controls = [(solution, True) for solution in right[2:]] + [(solution, False) for solution in wrong]
    return {
        "id": name,
        "statement": problem["statement"],
        "submissions": votes,
        "generator": problem["generator"],
        "time_limit_s": 1.0,
        "controls": [{**_submission(*s[:2]), "right": side, "note": s[2]} for s, side in controls],
    }


def _submission(language: str, body: str, reader: int = 0) -> dict:
    return {"language": language, "code": (CPP if language == "cpp" else READERS[reader]) + body}


if __name__ == "__main__":
    for record in load():
        print(json.dumps(record))
