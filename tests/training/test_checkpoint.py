"""Whatever happens to the process, a restore gives the last complete step, bit for bit, or says why not."""

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax.training.checkpoint import Checkpointer

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


class Moments(NamedTuple):
    mu: object
    nu: object


def checkpointer(directory, *, keep_last=2, keep_best=0, best_metric=None):
    return Checkpointer(directory, keep_last=keep_last, keep_best=keep_best, best_metric=best_metric)


def some_arrays(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "params": {"kernel": jnp.asarray(normal(7, 11)), "scale": jnp.asarray(normal(5), jnp.bfloat16)},
        "moments": [Moments(jnp.asarray(normal(3)), None), Moments(normal(13), normal(2).astype(ml_dtypes.bfloat16))],
        "key": jax.random.key(seed),
        "step": np.asarray(17, np.uint32),
        "mask": rng.random(19) < 0.5,
    }


def structs(arrays):
    leaf = lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING)  # noqa: E731
    return jax.tree.map(leaf, arrays)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray) == isinstance(e, np.ndarray)
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def test_round_trip_in_a_fresh_reader_without_warnings(tmp_path, capfd):
    arrays, meta = some_arrays(), {"step": 3, "config": {"lr": 1e-6, "tasks": ["math", "visual"]}, "serial": 2**40}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with checkpointer(tmp_path / "new" / "run") as writer:
            assert writer.latest_step() is None
            writer.save(3, arrays, meta)
        with checkpointer(tmp_path / "new" / "run") as reader:
            step, restored, restored_meta = reader.restore(structs(arrays))
            assert (step, restored_meta, reader.read_meta(3)) == (3, meta, meta)
    assert_same(restored, arrays)
    assert capfd.readouterr() == ("", "")


def test_empty_arrays_come_back_as_they_were(tmp_path):
    arrays = {"tokens": np.zeros((0, 5), np.int32), "cache": jnp.zeros((3, 0), jnp.bfloat16), "full": np.arange(7)}
    with checkpointer(tmp_path) as ckpt:
        ckpt.save(1, arrays, {})
        assert_same(ckpt.restore(structs(arrays))[1], arrays)
        with pytest.raises(ValueError, match=r"tokens: checkpoint int32\[0,5\], expected int32\[0,3\]"):
            ckpt.restore(arrays | {"tokens": np.zeros((0, 3), np.int32)})
        with pytest.raises(ValueError, match="at least one array that is not empty"):
            ckpt.save(2, {"tokens": arrays["tokens"]}, {})


def test_restores_onto_another_sharding(tmp_path):
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.arange(16 * 3, dtype=np.float32).reshape(16, 3), NamedSharding(mesh, PartitionSpec("fsdp")))
    replicated = NamedSharding(mesh, PartitionSpec())
    with checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"x": x}, {})
        restored = ckpt.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)})[1]["x"]
        assert restored.sharding == replicated
        np.testing.assert_array_equal(restored, x)
        with pytest.raises(ValueError, match="'x' has no sharding"):
            ckpt.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})


def test_a_part_restores_without_the_rest(tmp_path):
    arrays = some_arrays()
    mesh = Mesh(np.asarray(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    kernel = jax.ShapeDtypeStruct((7, 11), jnp.float32, sharding=replicated)
    part = {"params": {"kernel": kernel}, "mask": arrays["mask"]}
    with checkpointer(tmp_path) as ckpt:
        ckpt.save(3, arrays, {"serial": 5})
        with pytest.raises(ValueError, match="moments/0/mu: checkpoint float32.3., expected nothing"):
            ckpt.restore(part)
        step, restored, meta = ckpt.restore(part, partial=True)
        assert (step, meta) == (3, {"serial": 5})
        assert_same(restored, {"params": {"kernel": arrays["params"]["kernel"]}, "mask": arrays["mask"]})
        assert restored["params"]["kernel"].sharding == replicated
        for wrong, complaint in (
            ({"params": {"kernel": np.zeros((11, 7), np.float32)}}, "float32.7,11., expected float32.11,7."),
            ({"params": {"kernel": np.zeros((7, 11), np.float16)}}, "float32.7,11., expected float16.7,11."),
            ({"mask": arrays["mask"], "weights": np.zeros(3)}, "weights: checkpoint nothing, expected float64.3."),
        ):
            with pytest.raises(ValueError, match=complaint):
                ckpt.restore(wrong, partial=True)


def test_a_part_is_all_that_is_read(tmp_path):
    """The files of everything else may be gone: what a part costs does not depend on the whole."""
    big, small = np.random.default_rng(0).normal(size=(1009, 211)), np.arange(13)
    with checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"big": big, "small": small}, {}, wait=True)
        (data,) = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size > big.nbytes // 2]
        data.unlink()
        assert_same(ckpt.restore({"small": small}, partial=True)[1], {"small": small})
        with pytest.raises(Exception, match="big"):
            ckpt.restore({"big": big}, partial=True)


def test_a_reader_changes_nothing(tmp_path):
    def contents():
        return {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}

    with pytest.raises(FileNotFoundError, match="there is no directory .*/absent"):
        Checkpointer.reader(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
    with Checkpointer.reader(tmp_path) as reader:
        assert reader.latest_step() is None
    with checkpointer(tmp_path, keep_last=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, {"x": np.asarray(step)}, {"step": step}, wait=True)
        before = contents()
        with Checkpointer.reader(tmp_path) as reader:  # beside a run that goes on
            assert (reader.latest_step(), reader.read_meta(2)) == (3, {"step": 2})
            assert reader.restore({"x": np.asarray(0)}, 1)[1]["x"] == 1
            with pytest.raises(ValueError, match="Cannot save step 4: .* was opened with Checkpointer.reader"):
                reader.save(4, {"x": np.asarray(4)}, {})
        assert contents() == before


def test_arrays_may_be_donated_and_overwritten_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    on_device, on_host = jnp.arange(1_000_003, dtype=jnp.float32), np.arange(1_000_003)
    meta = {"open": [1, 2]}
    expected = {"device": np.array(on_device), "host": on_host.copy()}
    with checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"device": on_device, "host": on_host}, meta)
        for _ in range(5):
            on_device = advance(on_device)
        on_host[:] = -1
        meta["open"].append(3)
        jax.block_until_ready(on_device)
        _, restored, restored_meta = ckpt.restore({"device": on_host.astype(np.float32), "host": on_host})
    assert_same(restored, expected)
    assert restored_meta == {"open": [1, 2]}


def test_keeps_the_newest_and_the_best(tmp_path):
    accuracy = {1: 0.1, 2: 0.9, 3: float("nan"), 4: 0.5, 5: 0.9, 6: None, 7: 0.2, 8: 0.3}
    with checkpointer(tmp_path, keep_last=2, keep_best=2, best_metric="accuracy") as ckpt:
        for step, value in accuracy.items():
            metrics = None if value is None else {"accuracy": np.float32(value), "length": 100.0 * step}
            ckpt.save(step, {"x": np.asarray(step)}, {}, metrics)
        assert (ckpt.latest_step(), ckpt.best_step()) == (8, 5)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 5, 7, 8]
    with checkpointer(tmp_path, keep_last=1, keep_best=1, best_metric="accuracy") as ckpt:  # scores outlive the process
        assert ckpt.best_step() == 5
        assert ckpt.restore({"x": np.asarray(0)}, ckpt.best_step())[1]["x"] == 5
        ckpt.save(9, {"x": np.asarray(9)}, {}, wait=True)
        assert sorted(int(p.name) for p in tmp_path.iterdir()) == [5, 9]
        assert ckpt.best_step() == 5


def test_a_target_that_does_not_fit_is_refused_with_all_differences(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"a": {"b": np.zeros((3, 5), np.float32)}, "c": np.zeros(7), "same": np.zeros(2)}, {})
        with pytest.raises(ValueError) as error:
            ckpt.restore({"a": {"b": np.zeros((5, 3), np.float32)}, "d": [np.zeros(7)], "same": np.zeros(2)})
        text = str(error.value)
        assert "a/b: checkpoint float32[3,5], expected float32[5,3]" in text
        assert "c: checkpoint float64[7], expected nothing" in text
        assert "d/0: checkpoint nothing, expected float64[7]" in text
        assert "3 of 4 arrays differ" in text and "same" not in text and "configuration" in text
        many = {f"e{i}": np.zeros(1) for i in range(13)}
        with pytest.raises(ValueError, match=r"e10: checkpoint nothing, expected float64\[1\]\n  \.\.\. and 11 more"):
            ckpt.restore(many | {"a": {"b": np.zeros((3, 5), np.float64)}, "c": np.zeros(3), "same": np.zeros(1)})


@pytest.mark.parametrize("arrays", [{"x": np.zeros(2), "n": 3}, {"x": np.zeros(2), "s": "text"}, {"a/b": np.ones(1), "a": {"b": np.ones(1)}}])  # fmt: skip # noqa: E501
def test_refuses_what_it_could_not_give_back(tmp_path, arrays):
    with checkpointer(tmp_path) as ckpt:
        with pytest.raises(ValueError, match="not an array|have the path 'a/b'"):
            ckpt.save(1, arrays, {})
        assert ckpt.latest_step() is None


def test_errors_about_steps_meta_and_arguments(tmp_path):
    with pytest.raises(ValueError, match="contradict"):
        checkpointer(tmp_path, keep_best=1)
    with pytest.raises(ValueError, match="keep_last=0"):
        checkpointer(tmp_path, keep_last=0)
    with checkpointer(tmp_path) as ckpt:
        with pytest.raises(FileNotFoundError, match="No complete checkpoint in"):
            ckpt.restore({"x": np.zeros(2)})
        with pytest.raises(ValueError, match="must be JSON.*Convert"):
            ckpt.save(1, {"x": np.zeros(2)}, {"n": np.int64(3)})
        ckpt.save(5, {"x": np.zeros(2)}, {})
        for step in (4, 5):
            with pytest.raises(ValueError, match=f"Cannot save step {step}: .* already holds step 5"):
                ckpt.save(step, {"x": np.zeros(2)}, {})
        with pytest.raises(FileNotFoundError, match=r"step 4 in .* holds \[5\]"):
            ckpt.read_meta(4)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written to .*file/run.*Choose a directory"):
        checkpointer(tmp_path / "file" / "run")


def test_a_save_that_fails_in_the_background_is_reported_once_and_forgotten(tmp_path):
    with checkpointer(tmp_path, keep_last=1) as ckpt:
        ckpt.save(1, {"x": np.asarray(1)}, {}, wait=True)
        ckpt.save(2, {"x": np.arange(3_000_017)}, {})
        (tmp_path / "2").touch()  # the place that the finished directory is to be moved to
        with pytest.raises(RuntimeError, match=r"last save to .* failed; the complete steps there are \[1\]"):
            ckpt.wait()
        (tmp_path / "2").unlink()
        assert ckpt.latest_step() == 1
        assert ckpt.restore({"x": np.asarray(0)})[1]["x"] == 1
        ckpt.save(2, {"x": np.asarray(2)}, {}, wait=True)
        assert ckpt.latest_step() == 2
    assert {path.name for path in tmp_path.iterdir()} == {"2"}


def run_until_killed(script, *arguments):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    child = subprocess.run(command, env=environment, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL


def test_a_kill_inside_a_save_leaves_the_last_complete_step(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from kimi_jax.training.checkpoint import Checkpointer

        ckpt = Checkpointer(sys.argv[1], keep_last=1, keep_best=0, best_metric=None)
        arrays = lambda seed: {"x": np.random.default_rng(seed).normal(size=2_000_003)}  # 16 MB
        ckpt.save(1, arrays(1), {"seed": 1}, wait=True)
        ckpt.save(2, arrays(2), {"seed": 2})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    run_until_killed(script, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "1" in names and "2" not in names and len(names) == 2, names  # else the kill came too late to test anything

    expected = np.random.default_rng(1).normal(size=2_000_003)
    with checkpointer(tmp_path, keep_last=1) as ckpt:
        step, restored, meta = ckpt.restore({"x": expected})
        assert (step, meta) == (1, {"seed": 1})
        assert_same(restored, {"x": expected})
        ckpt.save(2, {"x": -expected}, {"seed": 3}, wait=True)
        assert ckpt.read_meta() == {"seed": 3}
        assert_same(ckpt.restore({"x": expected})[1], {"x": -expected})
    assert {path.name for path in tmp_path.iterdir()} == {"2"}


@pytest.mark.parametrize("nth", [1, 3, 7])
def test_a_kill_while_an_old_step_is_deleted_leaves_whole_steps(tmp_path, nth):
    script = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from kimi_jax.training.checkpoint import Checkpointer

        ckpt = Checkpointer(sys.argv[1], keep_last=1, keep_best=1, best_metric="accuracy")
        save = lambda step: ckpt.save(step, {"x": np.full(2_003, step)}, {"seed": step}, {"accuracy": step}, wait=True)
        save(1)
        unlink, left = os.unlink, [int(sys.argv[2])]

        def dying(path, *args, **kwargs):
            unlink(path, *args, **kwargs)
            if not str(path).endswith(".writable"):
                left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = os.remove = dying
        save(2)
    """)
    run_until_killed(script, tmp_path, nth)
    with Checkpointer.reader(tmp_path) as reader:
        assert reader.latest_step() == 2
    with checkpointer(tmp_path, keep_last=1, keep_best=1, best_metric="accuracy") as ckpt:
        assert ckpt.best_step() == 2
        step, restored, meta = ckpt.restore({"x": np.zeros(2_003, int)})
        assert (step, meta) == (2, {"seed": 2})
        assert (restored["x"] == 2).all()
    assert {path.name for path in tmp_path.iterdir()} == {"2"}
