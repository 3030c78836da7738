"""What is saved comes back, through a real checkpoint; what does not fit is refused, and nothing is lost."""

import dataclasses

import numpy as np
import pytest

from kimi_jax.rl.replay_buffer import ReplayBuffer
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.types import OpenGroup, OpenResponse, StopReason

PROBLEMS = 97


def random_buffer(seed=0, sizes=(3, 5, 2, 3)) -> ReplayBuffer:
    """Every stop reason, responses without tokens, groups that are complete and that are not."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer()
    stops = [None, *StopReason]
    serial = 2**40  # a long run
    for i, size in enumerate(sizes):
        responses = []
        for j in range(size):
            n = 0 if (i, j) == (1, 2) else int(rng.integers(1, 13))
            stop = stops[(i + 2 * j) % len(stops)] if i != 2 else StopReason.END
            tokens = rng.integers(0, 152_000, n).astype(np.int32)
            logprobs = -rng.exponential(size=n).astype(np.float32)
            versions = np.sort(rng.integers(0, 1_000, n)).astype(np.int32)
            responses.append(OpenResponse(serial, tokens, logprobs, versions, stop))
            serial += 1
        buffer.groups.append(OpenGroup(int(rng.integers(PROBLEMS)), int(rng.integers(1_000)), responses))
    return buffer


def facts(buffer: ReplayBuffer) -> list:
    """All that must survive."""
    return [
        (
            group.problem,
            group.born,
            [
                (
                    *(r.serial, r.stop, r.verdict),
                    *((x.dtype, x.tolist()) for x in (r.tokens, r.logprobs, r.versions)),
                )
                for r in group.responses
            ],
        )
        for group in buffer.groups
    ]


def through_a_checkpoint(buffer: ReplayBuffer, directory) -> ReplayBuffer:
    """As the trainer does it: sizes in the meta, arrays beside others."""
    arrays = {"buffer": buffer.state(), "something": np.arange(3)}
    with Checkpointer(directory, keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(1, arrays, {"buffer": buffer.sizes()}, wait=True)
    restored = ReplayBuffer()
    with Checkpointer.reader(directory) as checkpoints:
        like = {"buffer": restored.like(checkpoints.read_meta()["buffer"]), "something": np.zeros(3, int)}
        _, saved, _ = checkpoints.restore(like)
    restored.restore(saved["buffer"], problems=PROBLEMS)
    return restored


@pytest.mark.parametrize("sizes", [(3, 5, 2, 3), (2,), ()])
def test_it_comes_back_from_a_checkpoint(tmp_path, sizes):
    buffer = random_buffer(sizes=sizes)
    restored = through_a_checkpoint(buffer, tmp_path)
    assert facts(restored) == facts(buffer)
    open_ones = [r.serial for group in buffer.groups for r in group.responses if r.stop is None]
    assert [r.serial for r in restored.open_responses] == open_ones
    assert [group.complete for group in restored.groups] == [group.complete for group in buffer.groups]
    assert len(sizes) < 4 or (len(open_ones) > 1 and restored.groups[2].complete)
    again = random_buffer(seed=1)  # what was there before gives way
    again.restore(buffer.state(), problems=PROBLEMS)
    assert facts(again) == facts(buffer)


def test_groups_without_any_token_come_back(tmp_path):
    buffer = ReplayBuffer()
    buffer.groups = [OpenGroup(5, 3, [OpenResponse(7), OpenResponse(8)]), OpenGroup(2, 3, [OpenResponse(9)])]
    assert facts(through_a_checkpoint(buffer, tmp_path)) == facts(buffer)


def test_what_was_restored_shares_no_memory_with_the_checkpoint():
    state = random_buffer().state()
    restored = ReplayBuffer()
    restored.restore(state, problems=PROBLEMS)
    before = facts(restored)
    for array in state.values():
        array[...] = 0
    assert facts(restored) == before
    taken = restored.state()  # nor with what is being saved in the background
    for group in restored.groups:
        for response in group.responses:
            response.tokens[...] = 0
    assert taken["tokens"].any()


def test_the_state_is_flat_and_small():
    """No objects, no padding: a few numbers per response and group, twelve bytes per token."""
    buffer = random_buffer()
    state, sizes = buffer.state(), buffer.sizes()
    assert sizes == {"tokens": sum(len(r) for g in buffer.groups for r in g.responses), "responses": 13, "groups": 4}
    assert {name: (x.shape, x.dtype) for name, x in state.items()} == {
        name: (x.shape, x.dtype) for name, x in buffer.like(sizes).items()
    }
    assert sum(x.nbytes for x in state.values()) == 12 * sizes["tokens"] + 17 * 13 + 24 * 4


def changed(state, **changes):
    return {name: changes[name](x) if name in changes else x for name, x in state.items()}


def with_first(value):
    return lambda x: np.concatenate([np.array([value], x.dtype), x[1:]])


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(members=with_first(4)), "groups have other numbers of responses than there are"),
        (dict(length=with_first(40)), "responses have other numbers of tokens than there are"),
        (dict(tokens=lambda x: x[:-1]), "responses have other numbers of tokens than there are"),
        (dict(versions=lambda x: x[:-1]), "responses have other numbers of tokens than there are"),
        (dict(length=lambda x: x[::-1] * 0 + [-1, *x[1:-1], x[0] + x[-1] + 1]), "other numbers of tokens"),
        (dict(problem=with_first(PROBLEMS)), "it has problems that this run does not have"),
        (dict(problem=with_first(-1)), "it has problems that this run does not have"),
        (dict(stop=with_first(5)), "unknown stop reasons"),
        (dict(stop=with_first(-1)), "unknown stop reasons"),
    ],
)
def test_a_buffer_that_contradicts_itself_or_the_run_is_refused(changes, told):
    buffer = random_buffer(seed=1)
    before = facts(buffer)
    with pytest.raises(ValueError, match=f"saved replay buffer does not match: .*{told}.*same config"):
        buffer.restore(changed(random_buffer().state(), **changes), problems=PROBLEMS)
    assert facts(buffer) == before


def test_a_buffer_of_another_layout_is_refused(tmp_path):
    buffer = random_buffer(seed=1)
    before = facts(buffer)
    state = random_buffer().state()
    del state["born"]
    with pytest.raises(ValueError, match="lacks born"):
        buffer.restore(state, problems=PROBLEMS)
    assert facts(buffer) == before
    for note in ({}, {"tokens": 3}, buffer.sizes() | {"pixels": 3}):
        with pytest.raises(ValueError, match=r"notes tokens, responses and groups, not .*empty --workdir"):
            buffer.like(note)
    with Checkpointer(tmp_path, keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(1, {"buffer": buffer.state()}, {"buffer": buffer.sizes() | {"tokens": 3}}, wait=True)
        with pytest.raises(ValueError, match=r"buffer/tokens: checkpoint int32\[\d+\], expected int32\[3\]"):
            checkpoints.restore({"buffer": buffer.like(checkpoints.read_meta()["buffer"])})


def test_the_fields_of_a_response_are_all_saved():
    """A new field would be lost at a resume; this test is where to think of it. Verdicts are asked for again."""
    assert {f.name for f in dataclasses.fields(OpenResponse)} == {
        *("serial", "tokens", "logprobs", "versions", "stop", "verdict")
    }
    assert {f.name for f in dataclasses.fields(OpenGroup)} == {"problem", "born", "responses"}
