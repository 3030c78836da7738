"""Paged attention against float64 NumPy: written tokens, shuffled and shared pages, ragged rows, kernels, meshes."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import paged, paged_gpu
from kimi_jax.training.sharding import make_mesh
from tests.helpers import lower_for_gpu

write = jax.jit(paged.write, static_argnames="mesh")
decode_step = jax.jit(paged.decode_step, static_argnames=("implementation", "mesh"))
attend_piece = jax.jit(paged.attend_piece, static_argnames=("implementation", "mesh"))


def oracle(q, k, v, last):
    """float64 attention of one row: q [T, H, E] over k, v [S, K, E]; query t sees tokens 0..last[t]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = slice(0, last[t] + 1)
            logits = k[seen, h // group] @ q[t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[t, h] = weights @ v[seen, h // group] / weights.sum()
    return out


class Rows:
    """Random sequences in pages of random order, and a query for each; row 1 begins with the first page of row 0."""

    def __init__(self, lengths, *, H, K, E, p, M, dtype=np.float32, shards=1):
        rng = np.random.default_rng(0)
        B, S = len(lengths), M * p
        self.lengths = np.asarray(lengths, np.int32)
        self.last = self.lengths - 1
        self.N = B // shards * M + 2
        self.table = np.zeros((B, M), np.int32)
        for shard in np.split(np.arange(B), shards):
            free = iter(rng.permutation(np.arange(1, self.N)))
            for b in shard:
                for i in range(-(-lengths[b] // p)):
                    self.table[b, i] = next(free)
        # Values that bfloat16 can hold: one kernel rounds to it.
        normal = lambda *shape: np.array(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), dtype)  # noqa: E731
        self.q, self.k, self.v = normal(B, H, E), normal(B, S, K, E), normal(B, S, K, E)
        if shards == 1 and min(lengths[:2]) > p:
            self.table[1, 0] = self.table[0, 0]
            self.k[1, :p], self.v[1, :p] = self.k[0, :p], self.v[0, :p]
        self.empty = np.zeros((K, self.N * shards, p, E), dtype)

    def pools(self, counts, mesh=None):
        """The first counts[b] tokens of each row, written as pieces."""
        positions = np.tile(np.arange(self.k.shape[1], dtype=np.int32), (len(counts), 1))
        positions = np.where(positions < np.asarray(counts)[:, None], positions, -1)
        return [write(self.empty, new, self.table, positions, mesh=mesh) for new in (self.k, self.v)]

    def new(self, positions):
        rows = np.arange(len(positions))
        return self.k[rows, positions], self.v[rows, positions]

    def decode(self, implementation="xla", mesh=None):
        """The step in which the last token of each row is new."""
        pools = self.pools(self.last, mesh)
        return decode_step(
            self.q, *self.new(self.last), *pools, self.table, self.last, implementation=implementation, mesh=mesh
        )

    def check(self, heads, atol):
        for b, last in enumerate(self.last):
            wanted = oracle(self.q[b : b + 1], self.k[b], self.v[b], [last])[0]
            np.testing.assert_allclose(np.asarray(heads[b], np.float32), wanted, atol=atol)


SHAPES = [
    ([1, 3, 5, 101, 64, 33], dict(H=6, K=2, E=11, p=7, M=17)),  # several blocks; pages that do not divide a block
    ([37, 41], dict(H=5, K=1, E=13, p=64, M=1)),  # a page is more than a block
    ([2, 31, 32], dict(H=3, K=3, E=7, p=1, M=37)),  # a page per token, keys and values for each head
]


def test_write_puts_tokens_into_their_slots_and_padding_nowhere():
    rows = Rows([5, 13, 8], H=2, K=2, E=3, p=4, M=5)
    pool, _ = rows.pools([5, 12, 0])
    wanted = np.zeros(pool.shape, np.float32)
    for b, count in enumerate([5, 12, 0]):
        for t in range(count):
            wanted[:, rows.table[b, t // 4], t % 4] = rows.k[b, t]
    np.testing.assert_array_equal(pool, wanted)

    pool = write(pool, rows.k[:, 7], rows.table, np.array([-1, 12, 7], np.int32), mesh=None)
    wanted[:, rows.table[1, 3], 0] = rows.k[1, 7]
    wanted[:, rows.table[2, 1], 3] = rows.k[2, 7]
    np.testing.assert_array_equal(pool, wanted)


@pytest.mark.parametrize("lengths, shape", SHAPES)
def test_decode_writes_and_matches_oracle(lengths, shape):
    rows = Rows(lengths, **shape)
    heads, *pools = rows.decode()
    rows.check(heads, 2e-6)
    for ours, wanted in zip(pools, rows.pools(lengths), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("implementation", ["xla", "gpu_interpret"])
@pytest.mark.parametrize("lengths, shape", [*SHAPES[:2], ([3, 200], dict(H=6, K=2, E=11, p=7, M=29))])
def test_pieces_match_oracle(lengths, shape, implementation):
    T = 29
    rows = Rows(lengths, **{**shape, "E": 16})
    q = np.random.default_rng(2).normal(size=(len(lengths), T, shape["H"], 16)).astype(np.float32)
    start = np.maximum(rows.lengths - 23, 0)[:, None]  # a piece ends where its row ends, and padding follows
    positions = (start + np.arange(T)).astype(np.int32)
    positions = np.where(positions < rows.lengths[:, None], positions, -1)
    heads = attend_piece(q, *rows.pools(lengths), rows.table, positions, implementation=implementation, mesh=None)
    assert np.isfinite(heads).all()
    for b in range(len(lengths)):
        real = positions[b] >= 0
        wanted = oracle(q[b, real], rows.k[b], rows.v[b], positions[b, real])
        np.testing.assert_allclose(np.asarray(heads)[b, real], wanted, atol=2e-6)


@pytest.mark.parametrize("pages, merges", [(1, False), (11, True)])
def test_triton_takes_the_kernels(pages, merges):
    """Without a GPU their Triton code is made and looked through; what it computes is tested interpreted."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    table, positions = shape(5, pages, dtype=jnp.int32), shape(5, dtype=jnp.int32)
    pools, new = [shape(2, 67, 64, 128)] * 2, [shape(5, 2, 128)] * 2
    step = functools.partial(paged_gpu.decode_step, interpret=False)
    text = lower_for_gpu(step, shape(5, 6, 128), *new, *pools, table, positions)
    assert "paged_split" in text and ("paged_merge" in text) == merges


@pytest.mark.parametrize("implementation", ["xla", "gpu_interpret"])
def test_a_finished_row_writes_nothing_and_stays_finite(implementation):
    rows = Rows([5, 9], H=2, K=1, E=16, p=4, M=3)
    last = np.array([-1, 8], np.int32)
    heads, *pools = decode_step(
        rows.q, *rows.new(last), *rows.pools([5, 8]), rows.table, last, implementation=implementation, mesh=None
    )
    assert np.isfinite(heads).all()
    for ours, wanted in zip(pools, rows.pools([5, 9]), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_a_row_is_the_same_to_the_last_bit_whatever_else_there_is():
    rows = Rows([19, 45, 7, 33, 5], H=6, K=2, E=16, p=4, M=12)
    wanted = np.asarray(rows.decode()[0])
    pools, last = rows.pools(rows.last), rows.last

    def step(order=slice(None), widen=0, last=last):
        table = np.pad(rows.table, ((0, 0), (0, widen)))[order]
        k, v = rows.new(rows.last)
        step = functools.partial(decode_step, implementation="xla", mesh=None)
        return np.asarray(step(rows.q[order], k[order], v[order], *pools, table, last[order])[0])

    np.testing.assert_array_equal(step(widen=71), wanted)
    np.testing.assert_array_equal(step(order=[3, 0, 4, 1, 2]), wanted[[3, 0, 4, 1, 2]])
    np.testing.assert_array_equal(step(order=[0, 1]), wanted[:2])
    alone = step(last=np.where(np.arange(5) == 0, last, -1))  # the others are finished: one block instead of two
    np.testing.assert_array_equal(alone[0], wanted[0])


def test_blocks_beyond_the_longest_row_are_not_read():
    rows = Rows([19, 40], H=2, K=1, E=8, p=8, M=64)
    wanted = rows.decode()[0]
    rows.table[:, 8:] = rows.N - 1  # two blocks of 32 tokens are enough for 40: whatever is read of the rest is NaN
    rows.empty[:, rows.N - 1] = np.nan
    np.testing.assert_array_equal(rows.decode()[0], wanted)


@pytest.mark.parametrize("dtype, atol", [(np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_gpu_kernels(dtype, atol):
    # 130 and 300 tokens take two and three programs; pages of 7 slots lie across their blocks.
    rows = Rows([1, 2, 65, 130, 300], H=6, K=2, E=16, p=7, M=43, dtype=dtype)
    heads, *pools = rows.decode("gpu_interpret")
    rows.check(heads, atol)
    for ours, wanted in zip(pools, rows.pools(rows.lengths), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_gpu_programs_of_long_rows_take_more_tokens():
    rows = Rows([5, 24, 25, 100], H=3, K=1, E=16, p=8, M=13)
    step = functools.partial(paged_gpu.decode_step, interpret=True, split=8, max_splits=3)  # 3 · 8 of 24 tokens at most
    heads, *_ = step(rows.q, *rows.new(rows.last), *rows.pools(rows.last), rows.table, rows.last)
    rows.check(heads, 2e-6)


def test_tpu_kernel():
    rows = Rows([1, 130, 600], H=2, K=1, E=128, p=64, M=11)  # 600: two steps of the kernel, of 8 pages each
    heads, *_ = rows.decode("tpu_interpret")
    rows.check(heads, 1e-5)


@pytest.mark.parametrize("sizes, H, K", [((2, 2, 2), 4, 2), ((1, 2, 2), 6, 3)])
def test_sharded_like_one_device(sizes, H, K):
    data, fsdp, tensor = sizes
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=_devices(data * fsdp * tensor))
    rows = Rows([5, 13, 8, 11], H=H, K=K, E=6, p=4, M=5, shards=data * fsdp)
    heads, *pools = rows.decode(mesh=mesh)
    rows.check(heads, 2e-6)
    pieces = attend_piece(rows.q[:, None], *pools, rows.table, rows.last[:, None], implementation="xla", mesh=mesh)
    rows.check(pieces[:, 0], 2e-6)


def test_what_does_not_fit_teaches():
    rows = Rows([5, 13, 8], H=2, K=1, E=6, p=4, M=5)
    mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=_devices(2))
    with pytest.raises(ValueError, match="17 pages do not divide into the 2 shards"):
        rows.pools([5, 13, 8], mesh=mesh)
    with pytest.raises(ValueError, match="'gpu' does not take heads of width 6.*powers of 2 from 16"):
        rows.decode("gpu")
    with pytest.raises(ValueError, match="called 'cudnn': choose from xla, gpu"):
        rows.decode("cudnn")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'"
)
def test_compiles_for_tpus_in_place():
    from jax.sharding import NamedSharding, PartitionSpec

    from kimi_jax.trainers.topology import topology_devices

    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=topology_devices("v5e:2x4"))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    rows = ("data", "fsdp")
    heads = lambda n: array((8, n, 128), jnp.bfloat16, rows, "tensor")  # noqa: E731
    pool = array((2, 4 * 131, 16, 128), jnp.bfloat16, "tensor", rows)
    table, positions = array((8, 33), jnp.int32, rows), array((8,), jnp.int32, rows)
    step = jax.jit(functools.partial(paged.decode_step, implementation="tpu", mesh=mesh), donate_argnums=(3, 4))
    compiled = step.lower(heads(12), heads(2), heads(2), pool, pool, table, positions).compile()
    per_chip = 2 * 131 * 16 * 128 * 2  # both pools, one head, one row shard, two bytes
    assert compiled.memory_analysis().alias_size_in_bytes == per_chip
    assert compiled.memory_analysis().temp_size_in_bytes < per_chip / 2
    assert "all-gather" not in compiled.as_text()


def _devices(count):
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    return jax.devices()[:count]
