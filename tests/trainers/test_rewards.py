"""Rewards as the config names them: what is refused at the start, and runs in which rewards fail, against the records
that they leave.
"""

import collections
import json

import pytest

from kimi_jax.tasks import TASKS, VERIFIERS, faulty, verify
from kimi_jax.tasks.base import make_problems
from kimi_jax.trainers import pipeline, supervised
from kimi_jax.types import Outcome, Problem
from tests.trainers import miniature

TEXT = {
    "data.image_tasks": (),
    "rows.patches": 0,
    "sampling.prompt_patches": 0,
    "rl.permute_advantages": False,
    "sft.steps": 0,
}
OWN = "tests.rewards.own_components"


def config_of(monkeypatch, **changes):
    miniature.prepare(monkeypatch)
    config = miniature.get_config()
    config.update_from_flattened_dict(TEXT | changes)
    return config


def written(path, problems) -> str:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return str(path)


def with_problems(monkeypatch, tmp_path, task, answer, **changes):
    problems = [{"id": f"no {i}", "task": task, "prompt": f"{i}?", "answer": answer} for i in range(7)]
    files = {"data.train_file": written(tmp_path / "t", problems), "data.heldout_file": written(tmp_path / "h", [])}
    return config_of(monkeypatch, **files, **{"data.text_tasks": (), "rewards.workers": 1}, **changes)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- refused at the start ---------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_expensive(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something expensive began")

    monkeypatch.setattr(pipeline, "check_prompts", refuse)
    monkeypatch.setattr(supervised, "train", refuse)


@pytest.mark.parametrize(
    "entry, told",
    [
        ("brevity", "write 'name=weight"),
        (f"brevity={OWN}:share_of_tokens", "write 'name=weight"),
        (f"brevity=nan*{OWN}:share_of_tokens", "write 'name=weight"),
        (f"brevity=0.1*{OWN}:share_of_token", f"did you mean {OWN}:share_of_tokens"),
        ("brevity=0.1*no.such:reward", "config.rewards.components: .*No module named 'no'"),
        (f"length=0.1*{OWN}:share_of_tokens", "there is a length already. Call it none of correct, length"),
    ],
)
def test_a_component_that_cannot_be(entry, told, tmp_path, monkeypatch, nothing_expensive):
    config = config_of(monkeypatch, **{"rewards.components": (entry,)})
    with pytest.raises(ValueError, match=told):
        pipeline.run(config, tmp_path / "run")


TESTS = [{"stdin": "3", "expected": "4"}]


@pytest.mark.parametrize(
    "task, answer, changes, told",
    [
        ("math", r"\boxed{3", {}, "'no 0' of task 'math' cannot be judged .*: the reference gives 0 answers"),
        ("code", "4", {}, "Problem 'no 0' of task 'code' cannot be judged by its answer '4': a JSON int"),
        ("code", json.dumps({"tests": [{"stdin": "3"}]}), {}, "Problem 'no 0' .*has no expected output"),
        (
            "code",
            json.dumps({"tests": TESTS, "language": "cobol"}),
            {},
            "'no 0': the sandbox cannot run 'cobol'",
        ),
        (
            "code",
            json.dumps({"tests": TESTS, "time_limit_s": 5}),
            {},
            "one test may take 11 s, .*deadline_s=10",
        ),
        ("code", json.dumps({"tests": TESTS}), {"rewards.sandbox": "sandbox:8123"}, "give http://host:port"),
        ("mathematics", "4", {}, "no task is called 'mathematics'; did you mean"),
    ],
)
def test_ground_truth_by_which_nothing_can_be_judged(
    task, answer, changes, told, tmp_path, monkeypatch, nothing_expensive
):
    config = with_problems(monkeypatch, tmp_path, task, answer, **changes)
    with pytest.raises(ValueError, match=told):
        pipeline.run(config, tmp_path / "run")


def test_a_service_that_is_not_there_is_named(tmp_path, monkeypatch, nothing_expensive):
    from kimi_jax.rewards import code

    monkeypatch.setattr(code, "_START_PATIENCE_S", 0.1)
    changes = {"rewards.sandbox": "http://127.0.0.1:9"}
    config = with_problems(monkeypatch, tmp_path, "code", json.dumps({"tests": TESTS}), **changes)
    with pytest.raises(ValueError, match="need a sandbox, and http://127.0.0.1:9 gave no answer .*start the service"):
        pipeline.run(config, tmp_path / "run")


def test_an_answer_that_is_missing_is_named(tmp_path, monkeypatch, nothing_expensive):
    with pytest.raises(ValueError, match="line 1: problem record 'no 0': field 'answer' is empty"):
        pipeline.run(with_problems(monkeypatch, tmp_path, "math", " "), tmp_path / "run")


def test_a_judge_that_is_not_there_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(supervised, "train", refuse)
    config = config_of(monkeypatch, **{"rewards.judge": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="rewards.judge=.*nowhere' must be the workdir of a reward model"):
        pipeline.run(config, tmp_path / "run")


# --- odd responses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n", "\0\x01\x7f\udcff\ufffd" * 101, "Answer:", "\\boxed{" * 1009, "```"])
@pytest.mark.parametrize("task", [*TASKS, *VERIFIERS])
def test_a_response_without_sense_is_wrong_and_nothing_else(task, text):
    if task in TASKS:
        [problem] = make_problems(TASKS[task], split="train", count=1, seed=0)
    else:
        problem = Problem("p", task, "?", json.dumps({"tests": TESTS}) if task == "code" else "4")
    verdict = verify(problem, text)
    assert verdict.outcome == Outcome.WRONG and verdict.detail
    assert not (verdict.well_formed and text.strip() == "")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_with_a_verifier_that_hangs_and_crashes(tmp_path, monkeypatch):
    changes = {
        "rewards.verifiers": (f"chain={faulty.__name__}:verify",),
        "rewards.workers": 2,
        "rewards.deadline_s": 1.0,
        "rl.iterations": 9,
        "rl.problems": 24,
        "rl.responses": 5,
    }
    pipeline.run(config_of(monkeypatch, **changes), tmp_path)
    metrics, records = rows(tmp_path / "metrics.jsonl"), rows(tmp_path / "verdicts.jsonl")
    assert len(metrics) == 9 and len(records) == 9 * 24 * 5
    fates = collections.Counter()
    for record in records:
        problem = Problem(record["problem"], record["task"], record["prompt"], record["answer"])
        fate = faulty.fate(problem, record["response"])
        fates[fate] += 1
        if fate:
            assert (record["outcome"], record["reward"]) == ("ungradable", None)
        else:
            assert record["outcome"] == verify(problem, record["response"]).outcome.value
        told = {"hang": "deadline of 1 s", "exit": "exited with status 3", "crash": "died of SIGSEGV"}
        assert told.get(fate, "") in record["detail"]
    assert fates["hang"] > 3 and fates["exit"] + fates["crash"] > 1
    assert sum(row["missed_deadlines"] for row in metrics) == fates["hang"]
    assert sum(row["verifier_crashes"] for row in metrics) == fates["exit"] + fates["crash"]
    assert all(row["updates"] == 2 for row in metrics)


@pytest.mark.slow
def test_a_component_that_fails_leaves_its_groups_out_and_says_so(tmp_path, monkeypatch, capfd):
    changes = {
        "rewards.components": (f"size=0.25*{OWN}:fails_on_even_problems", f"zero=0*{OWN}:fails"),
        "rewards.workers": 1,
        "rl.iterations": 2,
    }
    pipeline.run(config_of(monkeypatch, **changes), tmp_path)
    lost = 0
    for row in rows(tmp_path / "metrics.jsonl"):
        records = [record for record in rows(tmp_path / "verdicts.jsonl") if record["step"] == row["step"]]
        groups = collections.defaultdict(list)
        for record in records:
            groups[record["group"]].append(record)
        even = {number: sum(group[0]["problem"].encode()) % 2 == 0 for number, group in groups.items()}
        lost += sum(even.values())
        assert row["component_failures"] == sum(even.values()) + len(groups)
        assert row["groups_dropped"] == pytest.approx(sum(even.values()) / len(groups))
        assert row["ungradable"] == 0 and row["reward_zero"] is None
        for record in records:
            failed = "zero: ZeroDivisionError: division by zero"
            if even[record["group"]]:
                assert (record["reward"], record["reward_size"]) == (None, None)
                assert record["failed"] == f"size: RuntimeError: even; {failed}" and record["outcome"] == "wrong"
            else:
                assert record["reward_size"] == record["tokens"] and record["failed"] == failed
                parts = record["reward_correct"] + record["reward_length"]
                assert record["reward"] == pytest.approx(parts + 0.25 * record["tokens"])
    assert 0 < lost < 12
    assert "because of: size: RuntimeError: even" in capfd.readouterr().err


@pytest.mark.slow
def test_problems_in_code_go_through_the_whole_job(tmp_path, monkeypatch):
    answer = json.dumps({"tests": TESTS, "time_limit_s": 1.0})
    config = with_problems(monkeypatch, tmp_path, "code", answer, **{"rl.iterations": 1})
    heldout = [{"id": "other", "task": "code", "prompt": "9?", "answer": answer}]
    config.data.heldout_file = written(tmp_path / "h", heldout)
    summary = pipeline.run(config, tmp_path / "run")
    records = rows(tmp_path / "run" / "verdicts.jsonl")
    assert {record["outcome"] for record in records} == {"wrong"} and summary["rl"]["text"]["n"] == 1
    assert all("block" in record["detail"] and not record["well_formed"] for record in records)
