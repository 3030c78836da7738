"""From problems without tests to problems with tests: what comes out, what is kept, and what is refused before work.

All of tests/curation/problems: python -m tests.curation.own_problems > own.jsonl, then
python scripts/generate_tests.py --problems=own.jsonl --out=admitted.jsonl --report=report.json
"""

import contextlib
import json
import pathlib

import pytest

from kimi_jax.curation import code_problems, generators
from kimi_jax.curation.test_cases import Rules
from kimi_jax.rewards.sandbox.isolation import NoIsolation
from kimi_jax.rewards.sandbox.pool import LocalSandbox
from kimi_jax.tasks.base import read_problems
from scripts import generate_tests
from tests.curation import own_problems
from tests.curation.table_sandbox import TableSandbox
from tests.trainers import published

TABLE = {f"{i}\n": f"{i * i}\n" for i in range(50)}


def record(name, wrong=0, **changes):
    """A problem with ten submissions of which some fail on one input."""
    tables = [TABLE | ({f"{i}\n": "?"} if i < wrong else {}) | {str(i): ""} for i in range(10)]
    submissions = [{"language": "python", "code": json.dumps(table)} for table in tables]
    generator = json.dumps(list(TABLE))
    return {"id": name, "statement": f"About {name}", "submissions": submissions, "generator": generator} | changes


@pytest.fixture
def tables(monkeypatch):
    """The sandbox that every run of the script gets, and no CYaRon."""
    sandbox = TableSandbox()
    monkeypatch.setattr(generate_tests, "open_sandbox", lambda where, jobs: contextlib.nullcontext(sandbox))
    monkeypatch.setattr(generate_tests, "library", dict)
    monkeypatch.setattr(generators, "library", dict)
    return sandbox


def run(folder, records, *flags):
    """(exit status, admitted problems, report)"""
    (folder / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    paths = [
        f"--problems={folder / 'raw.jsonl'}",
        f"--out={folder / 'out.jsonl'}",
        f"--report={folder / 'report.json'}",
    ]
    status = generate_tests.main([*paths, "--jobs=2", *flags])
    if status not in (0, 1):
        return status, None, None
    return status, read_problems(folder / "out.jsonl"), json.loads((folder / "report.json").read_text())


def test_what_comes_out(tables, tmp_path):
    records = [
        record("good"),
        record("mostly good", wrong=1),
        record("too bad", wrong=2),
        record("judged", special_judge=True),
        record("lonely", submissions=record("x")["submissions"][:9]),
        record("bare", generator=""),
    ]
    records[0]["controls"] = [records[0]["submissions"][0] | {"right": True}]
    wrong = [json.dumps(TABLE), json.dumps(TABLE | {"7\n": "8"})]
    records[1]["controls"] = [{"language": "python", "code": code, "right": False, "note": "sly"} for code in wrong]
    records[2]["controls"] = records[1]["controls"]  # of a problem that is dropped
    status, admitted, report = run(tmp_path, records)
    assert status == 0 and [(p.id, p.task, p.prompt) for p in admitted] == [
        ("good", "code", "About good"),
        ("mostly good", "code", "About mostly good"),
    ]
    assert len(json.loads(admitted[1].answer)["tests"]) == 50
    reasons = {decision["id"]: decision["reason"] for decision in report["decisions"]}
    expected = ["", "", "few_passes", "special_judge", "few_submissions", "no_generator"]
    assert list(reasons) == [line["id"] for line in records] and list(reasons.values()) == expected
    summary = report["summary"]
    assert (summary["problems"], summary["admitted"]) == (6, 2) and sum(summary["dropped"].values()) == 4
    assert summary["right_controls"] == {"all": 1, "passed": 1}
    assert summary["wrong_controls"] == {"all": 2, "caught": 1}
    assert report["decisions"][1]["controls"][0] == {"right": False, "note": "sly", "passes": True}


def test_what_is_finished_is_kept(tables, tmp_path, monkeypatch):
    records = [record("a"), record("b", wrong=2), record("c")]
    real = generate_tests.decide

    def stops(problem, *others):
        if problem.id == "c":
            raise KeyboardInterrupt
        return real(problem, *others)

    monkeypatch.setattr(generate_tests, "decide", stops)
    run(tmp_path, records[:2])
    before = (tmp_path / "out.jsonl").read_text()
    assert run(tmp_path, records)[0] == 130 and (tmp_path / "out.jsonl").read_text() == before
    monkeypatch.setattr(generate_tests, "decide", real)
    with (tmp_path / "out.jsonl.progress").open("a") as file:
        file.write('{"torn": {"id')  # the machine went down
    tables.runs.clear()
    status, admitted, report = run(tmp_path, records)
    assert status == 0 and [p.id for p in admitted] == ["a", "c"] and len(report["decisions"]) == 3
    assert len(tables.runs) == 500  # of c alone
    tables.runs.clear()
    assert [p.id for p in run(tmp_path, records)[1]] == ["a", "c"] and not tables.runs
    assert [p.id for p in run(tmp_path, records, "--passes=8")[1]] == ["a", "b", "c"] and len(tables.runs) == 1500


def test_a_failing_sandbox_drops_nothing(tables, tmp_path):
    broken = json.dumps(dict.fromkeys(TABLE, "<sandbox_error>"))
    records = [record("a"), record("b")]
    submissions = records[1]["submissions"]
    records[1]["submissions"] = [*submissions[:9], {"language": "python", "code": broken}]
    status, admitted, report = run(tmp_path, records)
    assert status == 1 and [p.id for p in admitted] == ["a"] and list(report["failed"]) == ["b"]
    assert report["summary"]["sandbox_failed"] == 1 and len(report["decisions"]) == 1
    records[1]["submissions"] = submissions
    assert [p.id for p in run(tmp_path, records)[1]] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "flags", "complaint"),
    [
        ([record("a"), record("b", answer="7")], (), "line 2: record 'b': unknown field 'answer'"),
        ([record("a")], ("--min_cases=51",), "min_cases=51"),
        ([record("a")], ("--agree=5",), "agree=5 must be more than half"),
        ([record("a")], ("--time_limit_s=0",), "time_limit_s is 0"),
        ([], (), "has no records"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(tables, tmp_path, capsys, lines, flags, complaint):
    assert run(tmp_path, lines, *flags)[0] == 2
    assert complaint in capsys.readouterr().err and not tables.requests and len(list(tmp_path.iterdir())) == 1


def test_files_are_three(tables, tmp_path, capsys):
    (tmp_path / "raw.jsonl").write_text(json.dumps(record("a")))
    path = tmp_path / "raw.jsonl"
    assert generate_tests.main([f"--problems={path}", f"--out={path}", f"--report={tmp_path / 'r'}"]) == 2
    assert "three files" in capsys.readouterr().err and json.loads(path.read_text())["id"] == "a"


def test_missing_cyaron_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generators.importlib.util, "find_spec", lambda name: None)
    generators.library.cache_clear()
    assert run(tmp_path, [record("a")])[0] == 2
    assert "pip install -e '.[curation]'" in capsys.readouterr().err
    generators.library.cache_clear()


def test_generators_that_a_model_writes_are_asked_for_once(tmp_path):
    asked = []

    def write(prompts):
        asked.extend(prompts)
        code = "def generate(io, index):\n    pass\n"
        return [f"```python\n{code}```" if "About a" in prompt else "I cannot." for prompt in prompts]

    records = [record("a", generator=""), record("b", generator=""), record("c"), record("d", special_judge=True)]
    problems = [code_problems.from_record(r, time_limit_s=1.0, memory_limit_mb=64) for r in records]

    def once():
        progress = generate_tests.Progress(tmp_path / "progress")
        return generate_tests.with_generators(
            problems, lambda: write, batch=1, rules=Rules(), progress=progress, settings=["model"]
        )

    written = once()
    assert [bool(problem.generator) for problem in written] == [True, False, True, True] and len(asked) == 2
    assert written[2:] == problems[2:] and written[0].generator.startswith("def generate")
    assert once() == written and len(asked) == 2


def test_a_published_model_is_asked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(generate_tests.__file__).parent))
    model = published.write("qwen2", tmp_path / "model")
    flags = [f"--model={model}", "--max_tokens=5", "--rows=2", "--temperature=1"]
    write = generate_tests.model_writer(generate_tests.parse(["--problems=p", "--out=o", "--report=r", *flags]))
    prompts = [generators.generator_prompt(text, cases=50, max_bytes=1000) for text in ("Add.", "Sort.", "How many?")]
    responses = write(prompts)  # more than rows, and longer than configs of training allow
    assert len(responses) == 3 and all(responses)


def test_a_missing_model_is_said(tables, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(generate_tests.__file__).parent))
    assert run(tmp_path, [record("a", generator="")], f"--model={tmp_path / 'nowhere'}")[0] == 2
    assert "nowhere" in capsys.readouterr().err and not tables.requests


@pytest.mark.slow
def test_own_problems_are_told_apart_by_their_tests(tmp_path):
    """With three votes in place of ten; the whole set with ten is the command above."""
    pytest.importorskip("cyaron")
    try:
        LocalSandbox(workers=1).close()
    except NoIsolation as error:
        pytest.skip(str(error))
    records = own_problems.load(("factorial_zeros", "caesar", "components", "coins", "second"))
    status, admitted, report = run(tmp_path, records, "--submissions=3", "--agree=2", "--passes=2")
    assert status == 0 and len(admitted) == 5
    right, wrong = report["summary"]["right_controls"], report["summary"]["wrong_controls"]
    assert right["all"] == right["passed"] == 5
    assert wrong["all"] == 18 and wrong["caught"] >= 17


def test_own_problems_are_many_and_each_has_what_it_needs():
    records = own_problems.load()
    assert len(records) >= 30
    for line in records:
        sides = [control["right"] for control in line["controls"]]
        assert len({s["code"] for s in line["submissions"]}) == 10 and any(sides) and sides.count(False) >= 3
        assert line["generator"].startswith("from cyaron import *\ndef generate(io, index):")
