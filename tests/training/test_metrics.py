import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.training.metrics import MetricsWriter, Stopwatch, progress


def test_what_is_written_is_what_is_read(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "metrics.jsonl")
    assert writer.read() == []
    third = np.float32(1) / np.float32(3)
    writer.write(
        1, {"accuracy": 0.1 + 0.2, "third": third, "on_device": jnp.asarray(third), "n": np.int64(2**60), "ok": True}
    )
    writer.write(2, {"kl": math.nan, "gap": np.float32(math.inf), "stage": "rl", "empty": None, "quote": 'a"\n'})
    assert (
        writer.read()
        == MetricsWriter(writer.path).read()
        == [
            {
                "step": 1,
                "accuracy": 0.1 + 0.2,
                "third": float(third),
                "on_device": float(third),
                "n": 2**60,
                "ok": True,
            },
            {"step": 2, "kl": None, "gap": None, "stage": "rl", "empty": None, "quote": 'a"\n'},
        ]
    )
    lines = writer.path.read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("metrics, name", [({"a": 1.0, "many": np.zeros(2)}, "many"), ({"d": {"x": 1}}, "'d'"), ({"step": 3}, "step")])  # fmt: skip # noqa: E501
def test_refuses_what_is_no_metric_and_writes_nothing(tmp_path, metrics, name):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=name):
        writer.write(1, metrics)
    assert writer.read() == []


def test_cut_back_drops_later_and_torn_lines(tmp_path):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    for step in (2, 3, 5, 7):
        writer.write(step, {"x": step / 3})
    whole = writer.path.read_bytes().splitlines(keepends=True)
    writer.path.write_bytes(b"".join(whole) + b'{"step": 11, "x": 3.6')
    assert [row["step"] for row in writer.read()] == [2, 3, 5, 7]
    writer.cut_back(5)
    assert writer.path.read_bytes() == b"".join(whole[:3])
    writer.write(6, {"x": 2.0})
    assert [row["step"] for row in writer.read()] == [2, 3, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
    writer.cut_back(-1)
    assert writer.read() == []


def test_a_new_writer_does_not_continue_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x"')
    MetricsWriter(path).write(2, {"y": 5})
    assert MetricsWriter(path).read() == [{"step": 1}, {"step": 2, "y": 5}]


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    for broken in (b"hello\n", b"[1]\n", b'{"x": 1}\n', b'{"step": "one"}\n'):
        path.write_bytes(b'{"step": 1}\n' + broken)
        with pytest.raises(ValueError, match="m.jsonl, line 2"):
            MetricsWriter(path).read()


def test_stopwatch_adds_up_per_phase_and_counts_failures(monkeypatch):
    clock = iter([0, 2, 10, 13, 20, 27, 30, 31])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch("rollout"):
        pass
    with watch("update"):
        pass
    with pytest.raises(KeyError), watch("rollout"):
        raise KeyError
    assert watch.pop() == {"rollout": 9, "update": 3}
    with watch("update"):
        pass
    assert watch.pop() == {"update": 1}
    assert watch.pop() == {}


def test_progress_is_quiet_in_a_log(capsys):
    assert list(progress(range(1009), desc="work")) == list(range(1009))
    with progress(desc="resumed", total=11, initial=7) as bar:
        bar.update(4)
    text = capsys.readouterr().err
    assert "work: 100%" in text and "resumed: 100%" in text and "11/11" in text
    assert text.count("\r") <= 8
