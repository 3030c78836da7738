"""The whole climb in miniature, stopped and gone on with; the table by hand; programs that stop."""

import ast
import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import pathlib
import runpy
import sys
import time
import types

import pytest

from kimi_jax.curation.asking import Answer
from kimi_jax.tasks import TASKS
from kimi_jax.trainers import pipeline
from kimi_jax.types import StopReason
from tests.trainers import miniature

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))  # where parts of it lie beside it

import _climb_table  # noqa: E402
import climb  # noqa: E402
import controls  # noqa: E402
import long2short  # noqa: E402

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
BASE = {
    **{"rl.iterations": 2, "rl.eval_every": 1, "rl.eval_problems": 3, "rl.permute_advantages": False},
    **{"sft.steps": 2, "sft.eval_problems": 0, "rewards.workers": 0},
}
SETTINGS = {
    "sampling": {"n": 5, "limit": 19, "max_tokens": 23, "rows": 16, "batch": 7, "workers": 0},
    "shortest": {"rl.iterations": 0, "data.text_tasks": (), "data.image_tasks": (), "sft.steps": 2},
    "brief": {"rl.iterations": 0, "data.text_tasks": (), "data.image_tasks": (), "sft.steps": 1},
    "dpo": {"rl.iterations": 0, "sft.steps": 2, "rows.tokens": 128},
    "short_rl": {"sft.steps": 0, "rl.iterations": 1, "sampling.max_tokens": 17},
    "objectives": {"sft.steps": 0, "rl.iterations": 1},
}


def train(arguments):
    """What scripts/train.py does, with the miniature in place of --config."""
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    config, workdir = miniature.get_config(), pathlib.Path(flags.pop("workdir"))
    assert flags.pop("config") == "configs/climb.py"
    literal = lambda text: ast.literal_eval(text) if text[0] in "(0123456789" else text  # noqa: E731
    changes = {name.removeprefix("config."): literal(value) for name, value in flags.items()}
    config.update_from_flattened_dict(BASE | changes)
    pipeline.run(config, workdir)
    return 0


def answers(problems, serials, *, temperature, prefix, budget):
    """Right two times in three, at many lengths: nothing that the miniature would write is right."""

    def answer(problem, serial):
        padding = "1" * (serial % 7)
        text = f"{padding};{problem.solution}" if serial % 3 else f"{padding}Answer:no"
        return Answer(text, 3 + serial % 7, StopReason.END)

    return [[answer(problem, serial) for serial in own] for problem, own in zip(problems, serials, strict=True)]


@pytest.fixture
def called(monkeypatch):
    """(programs that were called, within this process; texts: one whose arguments have the text is stopped, once)"""
    miniature.prepare(monkeypatch)
    monkeypatch.setattr(climb, "SETTINGS", SETTINGS)
    monkeypatch.setattr(climb, "OBJECTIVES", ("rest",))
    for name in ("chain", "pips"):
        abridging = dataclasses.replace(TASKS[name], abridge=lambda text: text.partition(";")[2])
        monkeypatch.setitem(TASKS, name, abridging)
    answerer = types.SimpleNamespace(identity="a model", generate=answers)
    monkeypatch.setattr(long2short._curation, "load_answerer", lambda args: answerer)
    mains = {"train": train, "long2short": long2short.main, "controls": controls.main}
    made, stop_at = [], []

    def call(command, deadline, *, capture, **_):
        program, arguments = pathlib.Path(command[1]).stem, command[2:]
        if stop_at and stop_at[0] in " ".join(arguments):
            stop_at.pop()
            return 0, ""
        made.append((program, *arguments))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            return mains[program](arguments), printed.getvalue()

    monkeypatch.setattr(climb, "call", call)
    return made, stop_at


@pytest.mark.slow
def test_the_whole_climb(tmp_path, called, capsys):
    made, stop_at = called
    flags = [f"--workdir={tmp_path}", "--seeds=2,3", "--rates=1e-3"]
    stop_at.append("evaluate")
    assert climb.main(flags) == 0
    assert capsys.readouterr().out.endswith("Stopped. The same command goes on from here.\n")
    long = tmp_path / "start-2"
    what = [(program, next((a for a in rest if not a.startswith("--")), "")) for program, *rest in made]
    learning = ("train", "")
    own = [("long2short", "abridge"), learning, ("long2short", "select"), learning]
    imitating, preferring = [("long2short", "shortest"), learning], [("long2short", "dpo-pairs"), learning]
    assert what == [learning, learning, *own, *own, *imitating, *preferring, ("long2short", "merge")]
    assert f"--config.data.train_file={tmp_path}/samples-3/abridged.jsonl" in made[7]
    models = [f"{tmp_path}/{name}-3" for name in ("start", "brief")]
    assert f"--config.init={models[0]}" in made[7] and list(made[8][-2:]) == models
    selected = json.loads((tmp_path / "brief-3" / "selected.json").read_text())["init"]
    assert selected.startswith(tuple(f"{model}/checkpoints/" for model in models))
    assert f"--config.init={selected}" in made[9]
    assert f"--config.data.train_file={tmp_path}/samples-2/examples.jsonl" in made[11]
    assert f"--config.dpo.pairs={tmp_path}/samples-2/pairs.jsonl" in made[13] and f"--config.init={long}" in made[13]
    assert not (tmp_path / "climb.json").exists()

    before = len(made)
    assert climb.main(flags) == 0
    first = [next((a for a in rest if not a.startswith("--")), "") for _, *rest in made[before:]]
    assert first == ["evaluate", "shortest", "", "", "half"]
    assert made[before + 1][2] == f"--checkpoint={tmp_path}/merge"
    assert f"--config.data.train_file={tmp_path}/merge_samples/examples.jsonl" in made[before + 2]
    assert f"--config.init={long}/checkpoints/sft" in made[before + 3]

    printed, before = capsys.readouterr().out, len(made)
    result = json.loads((tmp_path / "climb.json").read_text())
    summary = lambda name: json.loads((tmp_path / name / "summary.json").read_text())  # noqa: E731
    means = lambda runs: sum(sum(run[kind]["mean_tokens"] for kind in run) / 2 for run in runs) / len(runs)  # noqa: E731
    assert result["rl"]["all"]["tokens"] == pytest.approx(means([summary(f"start-{s}")["rl"] for s in (2, 3)]))
    methods = result["methods"]
    assert {name: own["seeds"] for name, own in methods.items()} == {
        name: [2, 3] if name in ("short_rl", "brief") else [2] for name in _climb_table.METHODS
    }
    assert methods["dpo"]["scores"]["all"]["tokens"] == pytest.approx(means([summary("dpo")["sft"]]))
    assert methods["dpo"]["share"] == pytest.approx(means([summary("dpo")["sft"]]) / means([summary("start-2")["rl"]]))
    assert list(result["objectives"]) == ["rest"] and len(result["bars"]) == 3
    assert set(result["half"]["text"]) == {"n", "own", "whole", "half", "none"}
    assert (tmp_path / "climb.md").read_text() in printed and (tmp_path / "climb.png").stat().st_size > 10_000

    assert climb.main(flags) == 0 and len(made) == before  # all is done
    assert printed.endswith(capsys.readouterr().out.rpartition("done\n")[2])


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_only(tmp_path, capsys):
    names = list(climb.steps(climb.Runner(tmp_path, "", None), [0, 1], ["1e-4", "2e-4"]))
    assert climb.chosen([], names) == names
    assert climb.chosen(["short_rl-1", "start"], names) == ["short_rl-1", "start-0", "start-1"]
    assert climb.chosen(["merge"], names) == ["merge"]
    assert climb.chosen(["grpo"], names) == ["grpo-1e-4", "grpo-2e-4"]
    assert len(climb.chosen(["objectives", "rloo"], names)) == 10
    for flag, told in (
        ("--only=shortrl", "--only=shortrl is no step. Did you mean short_rl-"),
        ("--only=merge", f"Error: merge needs {tmp_path}/shortest/summary.json: take the steps before it first"),
        ("--only=table", "has no finished start-0"),
    ):
        assert climb.main([f"--workdir={tmp_path}", flag]) == 2
        assert told in capsys.readouterr().err


def test_the_config_of_long2short_rl_is_that_of_the_climb():
    load = lambda name: runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()  # noqa: E731
    expected, config = load("climb"), load("long2short_rl")
    expected.update_from_flattened_dict(climb.SETTINGS["short_rl"])
    expected.init, expected.sft = config.init, config.sft  # which has no steps
    assert config.sft.steps == 0 and config.to_dict() == expected.to_dict()


# --- which step when ------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """make({name: what it needs}, failing): steps of that name, each of which writes a file; what is made, in order."""
    monkeypatch.setattr(climb._climb_table, "write", lambda *_: "the table")
    monkeypatch.setattr(climb.time, "sleep", lambda seconds: None)
    made = []

    def make(needs, failing=()):
        def run(name):
            if name in failing:
                raise climb.Failed(7)
            made.append(name)
            (tmp_path / name).touch()

        needs = {name: needed and (needed, tmp_path / needed) for name, needed in needs.items()}
        found = {name: climb.Step(tmp_path / name, own, functools.partial(run, name)) for name, own in needs.items()}
        monkeypatch.setattr(climb, "steps", lambda *_: found)
        return made

    return make


def do(tmp_path, *flags):
    return climb.main([f"--workdir={tmp_path}", "--minutes=0.02", *flags])


@pytest.mark.parametrize("wait", [[], ["--wait"]])
def test_a_step_never_waits_for_one_that_comes_after_it(plan, tmp_path, wait):
    made = plan({"a": None, "b": "a", "c": "b"})
    assert do(tmp_path, "--only=c,b,a", *wait) == 0
    assert made == ["a", "b", "c"]


def test_what_can_be_done_is_done_while_others_are_waited_for(plan, tmp_path, capsys):
    made = plan({"elsewhere": None, "b": "elsewhere", "c": None})
    assert do(tmp_path, "--only=b,c", "--wait") == 0 and made == ["c"]
    printed = capsys.readouterr().out
    assert printed.count(f"waiting: b needs {tmp_path}/elsewhere\n") == 1 and "Left are b.\n" in printed
    assert do(tmp_path, "--only=b,c") == 2
    (tmp_path / "elsewhere").touch()
    assert do(tmp_path, "--only=b,c", "--wait") == 0 and made == ["c", "b"]


def test_a_step_that_fails_costs_only_those_that_need_it(plan, tmp_path, capsys):
    made = plan({"a": None, "b": None, "c": "b", "d": "c", "e": "a"}, failing=["b"])
    assert do(tmp_path, "--wait") == 7 and made == ["a", "e"]
    out, err = capsys.readouterr()
    assert err == "--- b failed: exit status 7; see above\n" and out.endswith("the table\n")
    assert f"--- d is left out: c failed, and there is no {tmp_path}/c\n" in out
    plan({"a": None, "b": None, "c": "b", "d": "c", "e": "a"})
    assert do(tmp_path) == 0 and made == ["a", "e", "b", "c", "d"]


def test_a_step_is_done_by_one_process(plan, tmp_path, capsys):
    made = plan({"a": None, "b": "a"})
    with open(tmp_path / ".a.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert do(tmp_path, "--wait") == 0 and not made
        assert f"waiting: another process does a, b needs {tmp_path}/a\n" in capsys.readouterr().out
        assert do(tmp_path) == 2
    assert do(tmp_path) == 0 and made == ["a", "b"]


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """make(program, minutes): a runner in whose directory of programs is p.py."""
    monkeypatch.setattr(climb, "SCRIPTS", tmp_path)

    def make(program, seconds=None):
        (tmp_path / "p.py").write_text("import os, pathlib, signal, sys, time\n" + program)
        return climb.Runner(tmp_path, "", None if seconds is None else time.monotonic() + seconds)

    return make


def test_a_program_that_is_late_is_interrupted_and_goes_on(runner, tmp_path):
    program = f"""
saved = pathlib.Path("{tmp_path}/saved")
if saved.exists():
    pathlib.Path("{tmp_path}/product").touch()
else:
    signal.signal(signal.SIGINT, lambda *_: (saved.touch(), sys.exit(0)))
    signal.pause()
"""
    with pytest.raises(climb.Stopped):  # after many times what it takes to start
        runner(program, seconds=3).run("p.py", product=tmp_path / "product")
    assert (tmp_path / "saved").exists()
    with pytest.raises(climb.Stopped):
        runner(program, seconds=-1).run("p.py", product=tmp_path / "product")  # is not begun
    runner(program).run("p.py", product=tmp_path / "product")
    runner("sys.exit(5)").run("p.py", product=tmp_path / "product")  # is done


def test_what_a_program_prints_is_its_product_if_it_ends_well(runner, tmp_path):
    with pytest.raises(climb.Failed) as failed:
        runner("print('half'); sys.exit(3)").run("p.py", product=tmp_path / "out", keep_stdout=True)
    assert failed.value.args == (3,) and not (tmp_path / "out").exists()
    runner("print(sys.argv[1:])").run("p.py", 7, product=tmp_path / "out", keep_stdout=True)
    assert (tmp_path / "out").read_text() == "['7']\n"


@pytest.mark.parametrize("ending", ["sys.exit(4)", "pathlib.Path(sys.argv[1]).touch()"])
def test_ctrl_c_is_for_the_program_and_nothing_follows(runner, tmp_path, ending):
    product = tmp_path / "product"
    with pytest.raises(climb.Stopped):
        runner(f"os.kill(os.getppid(), signal.SIGINT); {ending}").run("p.py", product, product=product)


def test_programs_share_what_they_compile(runner, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    program = "print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    runner(program).run("p.py", product=tmp_path / "a", keep_stdout=True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    runner(program).run("p.py", product=tmp_path / "b", keep_stdout=True)
    assert [(tmp_path / name).read_text() for name in "ab"] == [f"{tmp_path}/compiled\n", "elsewhere\n"]


def test_a_program_holds_the_claim_of_its_step(runner, tmp_path):
    """So nobody else begins the step as long as it lives, even if what called it was killed."""
    begun, product = runner("os.fstat(int(sys.argv[1])); pathlib.Path(sys.argv[2]).touch()"), tmp_path / "product"
    step = climb.Step(product, None, lambda: begun.run("p.py", *begun.claim, product, product=product))
    assert begun.take("a", step, {}) == 0


# --- the table, by hand -----------------------------------------------------------------------------------------------


def scores(text, image, tokens, n=50):
    common = {"greedy_accuracy": 0.0, "ungradable": 0.0, "n": n}
    return {
        kind: {"accuracy": accuracy, "mean_tokens": tokens + extra, **common}
        for kind, accuracy, extra in (("text", text, 0), ("image", image, 20))
    }


@pytest.fixture
def measured(tmp_path):
    def put(name, **summary):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))

    put("start-0", sft=scores(0.5, 0.5, 90), rl=scores(0.75, 0.85, 90))
    put("start-1", sft=scores(0.6, 0.4, 90), rl=scores(0.85, 0.75, 110))
    put("short_rl-0", rl=scores(0.8, 0.76, 38))
    put("short_rl-1", rl=scores(0.74, 0.78, 42))
    put("brief-1", sft=scores(0.6, 0.6, 62))
    put("dpo", sft=scores(0.8, 0.72, 44))
    put("shortest", sft=scores(0.4, 0.4, 20))
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "evaluations.jsonl").write_text(json.dumps({"results": scores(0.9, 0.7, 70)}) + "\n")
    half = {
        kind: {"n": n, "own": 0.8, "whole": 0.8, "half": h, "none": 0.0}
        for kind, n, h in (("a", 10, 0.6), ("b", 30, 0.72))
    }
    (tmp_path / "start-0" / "half.json").write_text(json.dumps(half))
    for name, accuracy in (("mirror_descent-1e-4", 0.6), ("mirror_descent-2e-4", 0.7), ("rest-1e-4", 0.6)):
        put(name, rl=scores(accuracy, accuracy, 90))
        (tmp_path / name / "eval_sft.json").write_text(json.dumps(scores(0.5, 0.5, 90)))
        rows = [{"step": step, "eval_text_accuracy": 0.1 * step, "eval_image_accuracy": 0.5} for step in (2, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 1}, *rows]))
    return tmp_path


def test_the_table(measured):
    text = _climb_table.write(measured, [0, 1, 2], ["1e-4", "2e-4"], ["mirror_descent", "rest", "grpo"], ["start-2"])
    result = json.loads((measured / "climb.json").read_text())
    assert result["seeds"] == [0, 1] and result["gains"] == pytest.approx({"0": 30.0, "1": 30.0})
    # RL: 80%, and 100 tokens (seed 0) or 110 (both)
    kept = {name: (own["kept"], own["share"]) for name, own in result["methods"].items()}
    assert kept["brief"] == pytest.approx((0.6 / 0.8, 72 / 120)) and result["methods"]["brief"]["seeds"] == [1]
    assert kept["short_rl"] == pytest.approx((0.77 / 0.8, 50 / 110))
    assert kept["dpo"] == pytest.approx((0.76 / 0.8, 0.54)) and kept["merge"] == pytest.approx((1.0, 0.8))
    gain, best, drop = result["bars"]
    assert gain["found"] == pytest.approx(30) and drop["found"] == pytest.approx(11) and drop["holds"]
    assert best["by"] == "short_rl" and best["found"] == pytest.approx(0.9625) and best["holds"]
    # short_rl beats dpo in both; against merge neither does
    pairs = {(o["report"], o["before"]): o["here"] for o in result["order"]}
    assert pairs == {("short_rl", "dpo"): "agrees", ("short_rl", "merge"): "neither", ("dpo", "merge"): "neither"}
    [rest] = result["comparison"]  # at the best rate of each, 100 problems
    assert rest["points"] == pytest.approx(10) and rest["two_standard_errors"] == pytest.approx(13.42, abs=0.01)
    assert "| RL | 2 | 80.0% | 80.0% | 100.0 | 120.0 | 100.0% | 100.0% |" in text
    assert "| long2short RL | 2 | 77.0% | 77.0% | 40.0 | 60.0 | 96.2% | 45.5% |" in text
    assert "| mirror_descent | 60.0% | 70.0% |" in text and "| rest | 60.0% |  |" in text
    assert "mirror descent − rest, each at its best rate: +10.0 points, within two standard errors (13.4)" in text
    assert text.endswith("\n\nNot done yet: start-2.") and result["missing"] == ["start-2"]
    assert _climb_table._curve(measured / "rest-1e-4") == ([0, 2, 4], pytest.approx([0.5, 0.35, 0.45]))


def test_bars_that_do_not_hold(measured):
    (measured / "short_rl-1" / "summary.json").write_text(json.dumps({"rl": scores(0.4, 0.4, 42)}))
    text = _climb_table.write(measured, [0, 1], [], [], [])
    best = json.loads((measured / "climb.json").read_text())["bars"][1]
    assert best["by"] == "short_rl" and not best["holds"]
    assert text.count(": does not hold") == 1 and text.count(": holds") == 2 and "Not done" not in text


def test_a_table_of_the_little_that_there_is(measured, capsys):
    """The first seed, of which the methods are, has not come to its end."""
    (measured / "start-0" / "summary.json").unlink()
    (measured / "start-2").mkdir()
    assert climb.main([f"--workdir={measured}", "--only=table", "--rates=1e-4"]) == 0
    result = json.loads((measured / "climb.json").read_text())
    assert (
        result["seeds"] == [1] and list(result["methods"]) == ["short_rl", "brief"] and len(result["comparison"]) == 1
    )
    missing = "start-0, start-2, samples-0, brief-0, samples-1, samples-2, brief-2, short_rl-2, merge_shortest, grpo"
    assert f"Not done yet: {missing}" in capsys.readouterr().out


def test_a_reversed_order():
    worse, better = {"kept": 0.8, "share": 0.5}, {"kept": 0.9, "share": 0.4}
    [one] = _climb_table.order({"dpo": worse, "merge": better, "shortest": better})
    assert one == {"report": "dpo", "before": "merge", "here": "the reverse"}
