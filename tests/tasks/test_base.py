"""Splits, drawing, the shared verdict rule, and what malformed records are told."""

import dataclasses
import hashlib
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from kimi_jax.tasks import TASKS, get_task, get_verifier, verify
from kimi_jax.tasks.base import (
    Task,
    extract_answer,
    make_problems,
    problem_from_record,
    read_problems,
    split_of,
    verify_exact,
)
from kimi_jax.types import IMAGE_MARKER, Outcome, Problem, Verdict


def same(a: Problem, b: Problem) -> bool:
    fields = [name for name in vars(a) if name != "images"]
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and len(a.images) == len(b.images)
        and all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    )


def tiny_task(sizes: dict[int, int]) -> Task:
    """Difficulty d has `sizes[d]` distinct problems."""

    def draw(rng, difficulty):
        number = int(rng.integers(sizes[difficulty]))
        return Problem(id=f"{difficulty}/{number}", task="tiny", prompt="?", answer=str(number), difficulty=difficulty)

    return Task(name="tiny", kind="text", difficulties=tuple(sizes), draw=draw, verify=verify_exact)


def heldout_ids(sizes: dict[int, int]) -> list[str]:
    return [f"{d}/{n}" for d in sizes for n in range(sizes[d]) if split_of(f"{d}/{n}") == "heldout"]


# --- splits and drawing ---------------------------------------------------------------------------------------------


def test_split_is_one_in_five_and_does_not_depend_on_the_process():
    ids = [f"id {n}" for n in range(5003)]
    share = sum(split_of(i) == "heldout" for i in ids) / len(ids)
    assert abs(share - 0.2) < 0.02
    for i in ids[:31]:
        digest = int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest(), "little")
        assert split_of(i) == ("heldout" if digest % 5 == 0 else "train")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_draws_distinct_problems_that_its_own_solutions_solve(name):
    task = TASKS[name]
    count = 97 if "pips" in name else 61 if name == "countdown" else 211  # two tiles have only 81 sums
    train = make_problems(task, split="train", count=count, seed=3)
    heldout = make_problems(task, split="heldout", count=17, seed=3)
    ids = [p.id for p in train + heldout]
    assert len(set(ids)) == count + 17
    assert {split_of(p.id) for p in train} == {"train"} and {split_of(p.id) for p in heldout} == {"heldout"}
    turns = Counter(p.difficulty for p in train)
    assert set(turns) == set(task.difficulties) and max(turns.values()) - min(turns.values()) <= 1
    for problem in train + heldout:
        assert problem.task == name
        assert verify(problem, problem.solution) == Verdict(Outcome.CORRECT, problem.answer)
        assert verify(problem, problem.solution + "9").outcome == Outcome.WRONG
        assert problem.prompt.count(IMAGE_MARKER) == len(problem.images) == (task.kind == "image")
        for image in problem.images:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            assert image.shape[0] % 8 == image.shape[1] % 8 == 0


@pytest.mark.parametrize("name", ["chain", "countdown", "scene_count", "scene_count_rich"])
def test_drawing_is_a_function_of_task_split_and_seed(name):
    task = TASKS[name]
    first, again = (make_problems(task, split="train", count=13, seed=7) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = make_problems(task, split="train", count=13, seed=8)
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


def test_tasks_with_the_same_draw_have_independent_streams():
    scenes = [
        {p.id for p in make_problems(TASKS[name], split="train", count=97, seed=1)}
        for name in ("scene_locate", "scene_locate_rich")
    ]
    assert not scenes[0] & scenes[1]


def test_a_used_up_difficulty_leaves_its_turns_to_the_others():
    sizes = {1: 7, 2: 211}
    available = heldout_ids(sizes)
    problems = make_problems(tiny_task(sizes), split="heldout", count=len(available), seed=0)
    assert sorted(p.id for p in problems) == sorted(available)
    assert [p.difficulty for p in problems[:2]] == [1, 2]


def test_drawing_more_than_there_is_says_how_many_there_are():
    sizes = {1: 7, 2: 11}
    there_are = len(heldout_ids(sizes))
    with pytest.raises(ValueError, match=f"only {there_are} distinct heldout problems of the 19 asked for; ask"):
        make_problems(tiny_task(sizes), split="heldout", count=19, seed=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": "test"}, "must be one of train, heldout"),
        ({"difficulties": [2, 9]}, r"has difficulties \(1, 2, 3\), not \[2, 9\]"),
        ({"difficulties": []}, "choose some"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_of_make_problems(change, message):
    with pytest.raises(ValueError, match=message):
        make_problems(TASKS["chain"], **{"split": "train", "count": 3, "seed": 0, **change})


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("7+1=8. Answer: 8", "8"),
        ("Answer: 8.", "8"),
        ("Answer:8", "8"),
        ("Answer:   row 2 column 3  .", "row 2 column 3"),
        ("Answer: 8\nthat is it", "8"),
        ("Answer: 8. I mean 9", "8. I mean 9"),
        ("Answer: 1 Answer: 2", "2"),
        ("Answer: 3.5", "3.5"),
        ("Answer:", None),
        ("Answer: \n8", None),
        ("Answer: .", None),
        ("answer: 8", None),
        ("8", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "reference, text, outcome",
    [
        ("7", "Answer: 7", "correct"),
        ("7", "Answer: 07", "correct"),
        ("7", "Answer: +7", "correct"),
        ("-7", "Answer: -7.", "correct"),
        ("7", "Answer: 17", "wrong"),
        ("7", "Answer: 7 or 8", "wrong"),
        ("7", "Answer: 7, 8", "wrong"),
        ("7", "Answer: 7.0", "wrong"),
        ("7", "Answer: --7", "wrong"),
        ("7", "Answer: \u0667", "wrong"),  # a seven, in other digits
        ("7", "Answer: 3 Answer: 7", "wrong"),  # one commitment only
        ("7", "Answer: 7 Answer: 7", "wrong"),
        ("7", "Answer: 7 Answer:", "wrong"),
        ("7", "the answer is 7", "wrong"),
        ("7", "", "wrong"),
        ("7", "Answer: " + "7" * 10_000, "wrong"),  # longer than int() takes
        ("row 2 column 3", "Answer: row 2  column 3.", "correct"),
        ("row 2 column 3", "Answer: row 3 column 2", "wrong"),
        ("row 2 column 3", "Answer: row 2", "wrong"),
    ],
)
def test_verify_exact(reference, text, outcome):
    problem = Problem(id="x", task="chain", prompt="?", answer=reference)
    assert verify_exact(problem, text).outcome == outcome


def test_a_failing_verifier_is_ungradable_and_says_why():
    verdict = verify(Problem(id="x", task="chian", prompt="?", answer="7"), "Answer: 7")
    assert verdict.outcome == Outcome.UNGRADABLE and "did you mean 'chain'" in verdict.detail
    verdict = verify(Problem(id="x", task="countdown", prompt="?", answer="no expression"), "Answer: 7")
    assert verdict.outcome == Outcome.UNGRADABLE and "ValueError: 'no expression'" in verdict.detail


def test_get_task_names_the_nearest():
    assert get_task("chain").name == "chain"
    with pytest.raises(ValueError, match="did you mean 'scene_count_rich'.*bar_chart"):
        get_task("scene_counts_rich")


# --- records --------------------------------------------------------------------------------------------------------

RECORD = {"id": "a 1", "task": "chain", "prompt": "1+2=?", "answer": "3"}


def png(height=8, width=16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 77, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_record_becomes_a_problem(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    record = {**RECORD, "prompt": "<image> and <image>", "images": ["x.png", png(24)], "difficulty": 5, "solution": "s"}
    problem = problem_from_record(record, folder=tmp_path)
    assert [i.shape for i in problem.images] == [(8, 16, 3), (24, 16, 3)]
    assert (problem.images[0] == 77).all()
    expected = Problem(**{**record, "images": problem.images})
    assert same(problem, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": None}, r"'a 1': field 'answer' must be text, got NoneType"),
        ({"answer": 3}, r"'a 1': field 'answer' must be text, got int 3"),
        ({"answer": "  "}, r"'a 1': field 'answer' is empty; give it a value"),
        ({"difficulty": "5"}, r"'a 1': field 'difficulty' must be an integer, got str '5'"),
        ({"difficulty": True}, r"'a 1': field 'difficulty' must be an integer, got bool"),
        ({"prompt": "\ud800?"}, r"'a 1': field 'prompt' has half of a surrogate pair"),
        ({"soluton": "s"}, r"'a 1': unknown field 'soluton'; allowed are id, .*rename"),
        ({"images": "x.png"}, r"'a 1': field 'images' must be a list"),
        ({"images": ["x.png"]}, r"'a 1': field 'prompt' has <image> 0 times and 'images' has 1 images"),
        ({"prompt": "<image> ?"}, r"'a 1': field 'prompt' has <image> 1 times and 'images' has 0 images"),
        ({"prompt": "<image>", "images": ["gone.png"]}, r"'a 1': images\[0\] \(.*gone.png\): no such file"),
        ({"prompt": "<image>", "images": [b"no image"]}, r"'a 1': images\[0\]: not a readable image"),
        ({"prompt": "<image>", "images": [png()[:45]]}, r"'a 1': images\[0\]: not a readable image"),
        ({"prompt": "<image>", "images": [7]}, r"'a 1': images\[0\]: must be a file name or the bytes"),
    ],
)
def test_malformed_records_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        problem_from_record({**RECORD, **change}, folder=tmp_path)


@pytest.mark.parametrize("field", RECORD)
def test_missing_fields_are_named(field):
    record = {name: value for name, value in RECORD.items() if name != field}
    with pytest.raises(ValueError, match=f"field '{field}' is missing"):
        problem_from_record(record)


def test_a_record_must_be_a_dict():
    with pytest.raises(ValueError, match="must be a dict of id, task.*got list"):
        problem_from_record([1])


def test_reading_lines(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.png").write_bytes(png())
    records = [RECORD, {**RECORD, "id": "b\u2028 2", "prompt": "<image>", "images": ["images/x.png"]}]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n", encoding="utf-8")
    assert [p.id for p in read_problems(path)] == ["a 1", "b\u2028 2"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "z"', r"problems.jsonl, line 3: Expecting"),
        ('{"id": "z"}', r"problems.jsonl, line 3: problem record 'z': field 'task' is missing"),
        (json.dumps(RECORD), r"problems.jsonl, line 3: problem record 'a 1': an earlier line has this id"),
        (b'{"id": "\xe9"}', r"problems.jsonl, line 3: 'utf-8' codec can't decode byte 0xe9"),
        ("[" * 100_000, r"problems.jsonl, line 3: maximum recursion depth"),
    ],
)
def test_errors_of_a_file_have_line_numbers(line, message, tmp_path):
    path = tmp_path / "problems.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_problems(path)


@pytest.mark.parametrize("name", ["gone.jsonl", "."])
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .* of problems, one JSON record per line"):
        read_problems(tmp_path / name)


@pytest.mark.parametrize("name, near", [("exakt", "exact"), ("chian", "chain"), ("?", ".+")])
def test_get_verifier_names_the_nearest_of_all_that_judge(name, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'.*chain, code, .*exact, math"):
        get_verifier(name)


def test_problems_of_files_have_verifiers_of_their_own():
    problem = Problem(id="1", task="math", prompt="?", answer="\\frac{1}{2}")
    assert verify(problem, "so it is \\boxed{0.5}").outcome == Outcome.CORRECT
    assert verify(problem, "so it is \\boxed{0.6}").outcome == Outcome.WRONG
    assert verify(dataclasses.replace(problem, task="exact", answer="7"), "Answer: 7").outcome == Outcome.CORRECT
