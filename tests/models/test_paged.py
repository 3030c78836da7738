"""Paged attention against float64 NumPy: written tokens, shuffled and shared pages, ragged rows, kernels, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import paged
from kimi_jax.training.sharding import make_mesh


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
    """Sequences of random keys and values, in pages of random order; the first page of row 1 is that of row 0."""

    def __init__(self, lengths, *, K, E, p, M, dtype=jnp.float32, shards=1, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, np.int32)
        B, S = len(lengths), M * p
        per_shard = B // shards
        self.table = np.zeros((B, M), np.int32)
        self.N = per_shard * M + 2
        for start in range(0, B, per_shard):
            free = iter(rng.permutation(np.arange(1, self.N)))
            for b in range(start, start + per_shard):
                for i in range(-(-self.lengths[b] // p)):
                    self.table[b, i] = next(free)
        self.k, self.v = (np.array(jnp.asarray(rng.normal(size=(B, S, K, E)), dtype)) for _ in range(2))
        if shards == 1 and B > 1 and min(self.lengths[:2]) > p:
            self.table[1, 0] = self.table[0, 0]
            self.k[1, :p], self.v[1, :p] = self.k[0, :p], self.v[0, :p]
        self.positions = np.arange(S, dtype=np.int32)[None].repeat(B, axis=0)
        empty = jnp.zeros((K, self.N * shards, p, E), dtype)
        self.pools = tuple(empty for _ in range(2))

    def written(self, counts, mesh=None):
        """The pools with the first counts[b] tokens of each row."""
        positions = np.where(self.positions < np.asarray(counts)[:, None], self.positions, -1)
        return tuple(
            paged.write(pool, new, self.table, positions, mesh=mesh)
            for pool, new in zip(self.pools, (self.k, self.v), strict=True)
        )

    def at(self, positions):
        rows = np.arange(len(positions))
        return self.k[rows, positions], self.v[rows, positions]


def decode(rows, q, implementation="xla", mesh=None):
    """One decode step in which the last token of each row is new."""
    last = rows.lengths - 1
    step = jax.jit(functools.partial(paged.decode_step, implementation=implementation, mesh=mesh))
    return step(q, *rows.at(last), *rows.written(last, mesh), rows.table, last)


def test_write_puts_tokens_into_their_slots_and_padding_nowhere():
    rows = Rows([5, 13, 8], K=2, E=3, p=4, M=5)
    pool, _ = rows.written([5, 13, 0])
    wanted = np.zeros(pool.shape, np.float32)
    for b, count in enumerate([5, 13, 0]):
        for t in range(count):
            wanted[:, rows.table[b, t // 4], t % 4] = rows.k[b, t]
    np.testing.assert_array_equal(pool, wanted)

    one = paged.write(pool, rows.k[:, 7], rows.table, np.array([-1, 12, 7], np.int32), mesh=None)
    wanted[:, rows.table[1, 3], 0] = rows.k[1, 7]
    wanted[:, rows.table[2, 1], 3] = rows.k[2, 7]
    np.testing.assert_array_equal(one, wanted)


_SHAPES = [  # lengths, H, K, E, p, M
    ([1, 3, 5, 101, 64, 33], 6, 2, 11, 7, 17),  # several blocks; pages that do not divide a block
    ([37, 41], 5, 1, 13, 64, 1),  # one page is more than a block
    ([2, 31, 32], 3, 3, 7, 1, 37),  # a page per token, a head for each
]


@pytest.mark.parametrize("lengths, H, K, E, p, M", _SHAPES)
def test_decode_matches_oracle(lengths, H, K, E, p, M):
    rows = Rows(lengths, K=K, E=E, p=p, M=M)
    q = np.random.default_rng(1).normal(size=(len(lengths), H, E)).astype(np.float32)
    heads, k_pages, v_pages = decode(rows, q)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(heads[b], oracle(q[b : b + 1], rows.k[b], rows.v[b], [length - 1])[0], atol=2e-6)
    for ours, theirs in zip((k_pages, v_pages), rows.written(lengths), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_finished_row_writes_nothing_and_stays_finite():
    rows = Rows([5, 9], K=1, E=3, p=4, M=3)
    pools = rows.written([5, 8])
    k, v = rows.at([0, 8])
    q = np.ones((2, 2, 3), np.float32)
    last = np.array([-1, 8], np.int32)
    heads, k_pages, _ = paged.decode_step(q, k, v, *pools, rows.table, last, implementation="xla", mesh=None)
    assert np.isfinite(heads).all()
    np.testing.assert_array_equal(k_pages, rows.written([5, 9])[0])


@pytest.mark.parametrize("lengths, H, K, E, p, M", _SHAPES)
def test_pieces_match_oracle(lengths, H, K, E, p, M):
    T = 29
    rows = Rows(lengths, K=K, E=E, p=p, M=M)
    q = np.random.default_rng(2).normal(size=(len(lengths), T, H, E)).astype(np.float32)
    start = np.maximum(np.array(lengths) - 23, 0)[:, None]  # a piece ends where its row ends, and padding follows
    positions = start + np.arange(T)
    positions = np.where(positions < np.array(lengths)[:, None], positions, -1).astype(np.int32)
    attend = jax.jit(functools.partial(paged.attend_piece, implementation="xla", mesh=None))
    heads = np.asarray(attend(q, *rows.written(lengths), rows.table, positions))
    assert np.isfinite(heads).all()
    for b in range(len(lengths)):
        real = positions[b] >= 0
        wanted = oracle(q[b, real], rows.k[b], rows.v[b], positions[b, real])
        np.testing.assert_allclose(heads[b, real], wanted, atol=2e-6)


def test_a_row_is_the_same_to_the_last_bit_whatever_else_there_is():
    lengths, H, K, E, p = [19, 45, 7, 33, 5], 6, 2, 16, 4
    rows = Rows(lengths, K=K, E=E, p=p, M=12)
    q = np.random.default_rng(3).normal(size=(len(lengths), H, E)).astype(np.float32)
    wanted = np.asarray(decode(rows, q)[0])
    last = rows.lengths - 1
    pools, new = rows.written(last), rows.at(last)

    def step(q, new, table, positions):
        return np.asarray(
            paged.decode_step(q, *new, *pools, table, positions, implementation="xla", mesh=None)[0]
        )

    np.testing.assert_array_equal(step(q, new, np.pad(rows.table, ((0, 0), (0, 71))), last), wanted)  # a wider table
    order = [3, 0, 4, 1, 2]
    shuffled = step(q[order], [x[order] for x in new], rows.table[order], last[order])
    np.testing.assert_array_equal(shuffled, wanted[order])
    alone = step(q, new, rows.table, np.where(np.arange(5) == 0, last, -1).astype(np.int32))  # one block, not two
    np.testing.assert_array_equal(alone[0], wanted[0])
    fewer = step(q[:2], [x[:2] for x in new], rows.table[:2], last[:2])
    np.testing.assert_array_equal(fewer, wanted[:2])


def test_blocks_beyond_the_longest_row_are_not_read():
    rows = Rows([19, 40], K=1, E=8, p=8, M=64)
    q = np.random.default_rng(4).normal(size=(2, 2, 8)).astype(np.float32)
    wanted = decode(rows, q)[0]
    rows.table[:, 8:] = rows.N - 1  # tokens 64 and on: two blocks of 32 are enough for 40
    rows.pools = tuple(pool.at[:, rows.N - 1].set(jnp.nan) for pool in rows.pools)
    np.testing.assert_array_equal(decode(rows, q)[0], wanted)


@pytest.mark.parametrize("sizes, H, K", [((2, 1, 2), 6, 2), ((1, 2, 2), 6, 3), ((2, 2, 2), 4, 2)])
def test_sharded_like_one_device(sizes, H, K):
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    if len(devices) < data * fsdp * tensor:
        pytest.skip(f"needs {data * fsdp * tensor} devices")
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    rows = Rows([5, 13, 8, 11], K=K, E=6, p=4, M=5, shards=data * fsdp)
    q = np.random.default_rng(5).normal(size=(4, H, 6)).astype(np.float32)
    heads, k_pages, v_pages = decode(rows, q, mesh=mesh)
    pieces = paged.attend_piece(
        q[:, None], k_pages, v_pages, rows.table, rows.lengths[:, None] - 1, implementation="xla", mesh=mesh
    )
    for b, length in enumerate(rows.lengths):
        wanted = oracle(q[b : b + 1], rows.k[b], rows.v[b], [length - 1])
        np.testing.assert_allclose(heads[b], wanted[0], atol=2e-6)
        np.testing.assert_allclose(pieces[b], wanted, atol=2e-6)


def test_rows_that_do_not_divide_over_the_mesh_teach():
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    rows = Rows([5, 13, 8], K=1, E=6, p=4, M=5)
    with pytest.raises(ValueError, match="17 pages do not divide into the 2 shards"):
        rows.written([5, 13, 8], mesh=mesh)
