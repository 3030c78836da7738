"""Which answers are learnt from, on hand-made lengths and verdicts; and the files of pairs."""

import dataclasses
import json

import pytest

from kimi_jax.curation.asking import Judged
from kimi_jax.long2short.choosing import abridged, examples, pairs, read_pairs, rejected, shortest
from kimi_jax.tasks.base import problem_from_record
from kimi_jax.types import Problem

PROBLEM = Problem("3+4", "chain", "3+4=?", "7", difficulty=2, solution="old")
RIGHT, WRONG, UNKNOWN = "correct", "wrong", "ungradable"


def answer(serial, outcome, tokens, *, stop="end", text=None) -> Judged:
    return Judged(serial, outcome, "", tokens, stop, text or f"{outcome} {serial}")


ANSWERS = [
    answer(1, RIGHT, 31),  # more than 1.5 times 20
    answer(2, WRONG, 7),  # wrong, but not longer
    answer(3, RIGHT, 20),
    answer(4, WRONG, 21),
    answer(5, RIGHT, 30),  # no more than 1.5 times 20
    answer(6, UNKNOWN, 99),
    answer(7, RIGHT, 13, stop="length"),  # did not come to its end
    answer(8, WRONG, 64, stop="length"),
    answer(9, RIGHT, 20, text="as long as the third"),
    answer(10, WRONG, 20),
    answer(11, WRONG, 22, text="wrong 4"),  # said before
]


def test_the_shortest_correct_answer():
    assert shortest(ANSWERS).serial == 3
    assert shortest(ANSWERS[::-1]).serial == 9
    assert shortest([a for a in ANSWERS if a.outcome != RIGHT or a.stop != "end"]) is None
    assert shortest([]) is None


def test_what_it_is_preferred_to():
    found = rejected(ANSWERS, shortest(ANSWERS))
    assert [(reason, a.serial) for reason, a in found] == [("long", 1), ("wrong", 4), ("wrong", 8)]
    same_text = [*ANSWERS, answer(12, WRONG, 50, text="correct 3")]
    assert [a.serial for _, a in rejected(same_text, shortest(ANSWERS))] == [1, 4, 8]


def test_records_and_where_they_come_from():
    ((record, provenance),) = examples(PROBLEM, ANSWERS, origin={"model": "m/5", "seed": 3})
    assert dataclasses.replace(problem_from_record(record), solution="old").id == PROBLEM.id
    assert record["solution"] == "correct 3" and record["difficulty"] == 2
    lengths = [a.tokens for a in ANSWERS]
    expected = {"id": "3+4", "model": "m/5", "seed": 3, "n": 11, "serial": 3, "tokens": 20, "verdict": RIGHT}
    assert provenance == expected | {"lengths": lengths, "verdicts": [a.outcome for a in ANSWERS]}
    assert examples(PROBLEM, ANSWERS[3:4], origin={}) == [] == pairs(PROBLEM, ANSWERS[3:4], origin={})
    assert pairs(PROBLEM, ANSWERS[2:3], origin={}) == []  # nothing to compare it with


def test_every_correct_answer_is_abridged_once():
    known = {"correct 1": "A", "correct 3": "B", "as long as the third": "C", "correct 13": "B"}
    found = abridged(PROBLEM, [*ANSWERS, answer(13, RIGHT, 50)], origin={"model": "m/5"}, abridge=known.get)
    solutions = {"3+4#0": "A", "3+4#1": "B", "3+4#2": "C"}
    assert {record["id"]: problem_from_record(record).solution for record, _ in found} == solutions
    assert [facts["id"] for _, facts in found] == list(solutions)
    assert [(facts["serial"], facts["text"], facts["model"]) for _, facts in found] == [
        (1, "correct 1", "m/5"),
        (3, "correct 3", "m/5"),
        (9, "as long as the third", "m/5"),
    ]
    assert abridged(PROBLEM, ANSWERS[3:4], origin={}, abridge=known.get) == []


def test_pairs_survive_the_file(tmp_path):
    found = pairs(PROBLEM, ANSWERS, origin={"model": "m/5"})
    assert [p["because"] for _, p in found] == ["long", "wrong", "wrong"]
    assert [p["rejected_tokens"] for _, p in found] == [31, 21, 64] and found[0][1]["model"] == "m/5"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record, _ in found))
    read = read_pairs(path)
    assert [(p.problem.id, p.chosen, p.rejected, p.rejected_ends) for p in read] == [
        ("3+4", "correct 3", "correct 1", True),
        ("3+4", "correct 3", "wrong 4", True),
        ("3+4", "correct 3", "wrong 8", False),
    ]


GOOD = {"id": "a", "task": "chain", "prompt": "1+1=?", "answer": "2", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"rejected": "2"}, "'chosen' and 'rejected' are the same text"),
        ({"chosen": " "}, "'chosen' must be a text that is not empty"),
        ({"rejected": None}, "'rejected' must be a text"),
        ({"rejected_ends": "no"}, "'rejected_ends' must be true or false"),
        ({"prompts": "x"}, "unknown field 'prompts'"),
        ({"answer": ""}, "'answer' is empty"),
    ],
)
def test_bad_pairs_are_named_with_their_line(tmp_path, change, told):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 3: .*{told}"):
        read_pairs(path)


def test_files_without_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="dpo-pairs writes one"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no pairs"):
        read_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "torn.jsonl").write_text(json.dumps(GOOD) + "\n" + '{"id": "b", "tas')
    with pytest.raises(ValueError, match="line 2"):
        read_pairs(tmp_path / "torn.jsonl")
