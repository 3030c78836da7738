"""The benches at a size that takes moments: what they count, against sums done here; and what they refuse."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import attention
from kimi_jax.models import config as config_module
from kimi_jax.models.config import ModelConfig

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))  # where its parts lie beside it

import _bench_probes  # noqa: E402
import bench  # noqa: E402

NANO = ModelConfig(
    vocab_size=53,
    width=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    mlp_width=17,
    rope_base=10_000.0,
    tie_embeddings=True,
    qkv_bias=True,
)
PARAMETERS = 53 * 12 + 12 * 12 + 12 + 2 * (12 * 6 + 6) + 12 * 12 + 3 * 12 * 17 + 3 * 12
SMALL_CACHE = ["--config.sampling.page=4", "--config.sampling.prefill_tokens=16", "--config.sampling.chunk=5"]
LENGTHS = ["--median=6", "--sigma=0.7", "--cut=13", "--seed=3"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(config_module.NAMED_SIZES, "nano", NANO)
    monkeypatch.setattr(_bench_probes, "probes", lambda: {"copy_tb_s": 2.0, "matmul_tflop_s": 3.0})
    if "_bench_ours" in sys.modules:
        monkeypatch.setattr(sys.modules["_bench_ours"], "probes", _bench_probes.probes)


def run(capsys, *arguments):
    repeats = ["--repeats=1"] * (arguments[0] != "gap")
    assert bench.main([*arguments, "--shape=nano", *repeats]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["parameters"] == PARAMETERS and result["dtype"] == "float32"
    assert len(lines) > 10 and lines[0].split() == ["command", arguments[0]]
    return result


def drawn(count):
    normal = np.random.default_rng(3).normal(size=count)
    return [int(min(max(round(6 * np.exp(0.7 * x)), 1), 13)) for x in normal]


def test_decode(capsys):
    result = run(capsys, "decode", "--live=11,3*2", "--new=7", *SMALL_CACHE)
    assert (result["rows"], result["prompt"], result["new"]) == (3, 11, 7)
    assert result["tokens_per_second"] == pytest.approx(3 * 7 / result["seconds"])
    cached = 11 + 3 + 3 + 3 * 3.5  # of the middle step
    floor_ms = 1e3 * (4 * PARAMETERS + cached * 2 * 6 * 4) / 2.0e12
    assert result["floor_ms"] == pytest.approx(floor_ms)
    step_ms = 1e3 * (result["seconds"] - result["seconds_prefill_and_first_token"]) / 6
    assert result["ms_per_step"] == pytest.approx(step_ms)
    assert result["share_of_floor"] == pytest.approx(floor_ms / step_ms)
    assert result["even_rows"]["floor_ms"] == pytest.approx(floor_ms - 1e3 * 8 * 48 / 2.0e12)
    assert result["cost_over_even_rows"] == pytest.approx(step_ms / result["even_rows"]["ms_per_step"])
    assert abs(result["even_rows"]["entropy"] - 1) < 0.5  # the uniform distribution has 3.97
    assert result["compilations"] > 0 and result["compile_seconds"] > 0


def test_rollout(capsys, monkeypatch):
    requests = []

    def run_peer(name, request, seconds):
        requests.append(request)
        return {"seconds": 5.0} if name == "tunix" else {"error": "not today"}

    monkeypatch.setattr(bench, "run_peer", run_peer)
    sizes = ["--rows=4", "--problems=3", "--responses=3", "--prompt=5", "--peers=tunix,hf-static"]
    result = run(capsys, "rollout", *sizes, *LENGTHS, *SMALL_CACHE)
    lengths = drawn(9)
    assert result["response_tokens"] == sum(lengths) and result["longest"] == max(lengths)
    assert result["tokens_per_second"] == pytest.approx(sum(lengths) / result["seconds"])
    # Three batches of four rows, each to the longest.
    assert requests[0].items() >= {"rows": 4, "prompt": 5, "new": max(lengths)}.items()
    tunix = result["peers"]["tunix"]
    assert (tunix["batches"], tunix["seconds"]) == (3, 15.0)
    assert tunix["ours_is_times_as_fast"] == pytest.approx(15.0 / result["seconds"])
    assert result["peers"]["hf-static"] == {"error": "not today"}


def test_partial_rollouts(capsys):
    sizes = ["--rows=4", "--problems=2", "--responses=2", "--prompt=5", "--iterations=3", "--budget=4"]
    result = run(capsys, "rollout", *sizes, *LENGTHS, *SMALL_CACHE)
    lengths = drawn(3 * 4)
    waiting = result["waiting"]
    assert waiting["response_tokens"] == sum(lengths) and waiting["responses_finished"] == 12
    assert waiting["tokens_read_again"] == 0 and len(waiting["seconds_per_iteration"]) == 3
    # Responses of iteration i have had 3 - i turns of 4 tokens.
    written = [min(length, 4 * (3 - j // 4)) for j, length in enumerate(lengths)]
    assert result["response_tokens"] == sum(written)
    assert result["responses_finished"] == sum(w == length for w, length in zip(written, lengths, strict=True))
    again = [5 + 4 * turn for j, length in enumerate(lengths) for turn in range(1, 3 - j // 4) if length > 4 * turn]
    assert again and result["tokens_read_again"] == sum(again)


def test_handoff(capsys):
    result = run(capsys, "handoff", "--config.model.sampling_dtype=bfloat16")
    assert (result["bytes"], result["bytes_of_masters"]) == (2 * PARAMETERS, 4 * PARAMETERS)
    assert result["floor_ms"] == pytest.approx(1e3 * 6 * PARAMETERS / 2.0e12)


def test_train(capsys):
    result = run(capsys, "train", "--rows=4", "--tokens=10", "--micro_rows=2")
    flops = 6 * PARAMETERS * 40 + 12 * 1 * 2 * 6 * 10**2 * 4 / 2
    seconds = result["ms_per_step"] / 1e3
    assert result["tokens_per_second"] == pytest.approx(40 / seconds)
    assert result["share_of_matmul_rate"] == pytest.approx(flops / seconds / 3.0e12)
    assert np.isfinite(result["loss"])


@pytest.mark.parametrize(
    "command", [("train", "--rows=1", "--tokens=13"), ("gap", "--rows=1", "--prompt=6", "--new=7")]
)
def test_attention_is_chosen_for_the_rows_that_are_trained_on(command, capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(attention, "choose_implementation", lambda *_, row_tokens: chosen.append(row_tokens) or "xla")
    run(capsys, *command)
    assert chosen == [13]


def test_runs_that_compile_do_not_count():
    clock, sizes = _bench_probes.Clock(), iter([3, 5, 3, 5])
    program = jax.jit(lambda x: x * 7)
    result, seconds = clock.steady(lambda: program(jnp.ones(next(sizes))), repeats=1)
    assert result.shape == (3,) and clock.compilations >= 2 and 0 < seconds < clock.seconds
    with pytest.raises(RuntimeError, match="still do"):
        clock.steady(lambda: jax.jit(lambda x: x * 7)(1.0), repeats=1)


def test_weights():
    shapes = {name: jax.ShapeDtypeStruct((301, 97), dtype) for name, dtype in (("a", jnp.bfloat16), ("b", jnp.float32))}
    weights = _bench_probes.random_matrices(shapes | {"scale": jnp.ones(5)}, 0)
    assert weights["a"].dtype == jnp.bfloat16 and np.all(weights["scale"] == 1)
    a, b = (np.asarray(weights[name], np.float64).ravel() for name in "ab")
    assert np.std(a) == pytest.approx(0.02, rel=0.03) and abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_lengths_of_rows():
    assert bench.parse(["decode", "--live=4096,128*3,7"]).live == [4096, 128, 128, 128, 7]
    assert bench.parse(["decode", "--rows=2", "--prompt=5"]).live == [5, 5]
    assert bench.parse(["decode", "--peers=all"]).peers == ["tunix", "hf-dynamic", "hf-static"]
    assert bench.parse(["train", "--peers=all"]).peers == ["hf"]


def test_a_peer_that_is_missing_or_fails(monkeypatch):
    monkeypatch.setitem(bench.PEERS, "tunix", "a_package_that_nobody_has")
    assert bench.run_peer("tunix", {}, 60) == {"error": "a_package_that_nobody_has is not installed"}
    monkeypatch.setitem(bench.PEERS, "tunix", "json")
    assert "Error" in bench.run_peer("tunix", {}, 60)["error"]
    assert "--peer_seconds" in bench.run_peer("tunix", {}, 0.01)["error"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["decode", "--rows=0"], "at least 1"),
        (["decode", "--new=1"], "at least 2"),
        (["decode", "--peers=vllm"], "tunix,hf-dynamic,hf-static"),
        (["decode", "--live=4096*x"], "--live"),
        (["train", "--peers=tunix"], "some of hf"),
        (["handoff", "--peers=all"], "handoff --help"),
        (["rollout", "--budget=5"], "--iterations"),
        (["train", "--rows=3", "--micro_rows=2", "--shape=nano"], "multiple of --micro_rows=2"),
        (["train", "--shape=mega"], "Choose one of"),
        (["train", "--shape=nano", "--config.sampling.chnk=3"], "chunk"),
    ],
)
def test_what_cannot_work_is_told(capsys, arguments, told):
    try:
        status = bench.main(arguments)
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_gap(capsys):
    asked = ("gap", "--rows=3", "--prompt=7", "--new=11")
    exact, rounded = run(capsys, *asked), run(capsys, *asked, "--config.model.sampling_dtype=bfloat16")
    for weights in ("at_random", "sharpened"):
        assert 0 < exact[weights]["mean"] < 1e-5 < rounded[weights]["mean"] <= rounded[weights]["max"]
    assert exact["sharpened"]["entropy"] == pytest.approx(1, abs=0.3) and exact["at_random"]["entropy"] > 1.5
