import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest

from kimi_jax.data.loaders import encoded_problems, prefetched, sft_batches, trained_tokens
from kimi_jax.types import Example, ImagePatches

LAYOUT = dict(row_tokens=17, row_patches=2, patch_dim=3, merge=1, image_id=5)


def make_examples(count):
    """The tokens of an example tell which one it is."""
    rng = np.random.default_rng(0)
    examples = []
    for index in range(count):
        tokens = np.full(rng.integers(3, 14), 100 + index, np.int32)
        images = ()
        if index % 3 == 0:
            images = (ImagePatches(np.full((1, 3), index, np.float32), np.zeros((1, 2), np.int32), 1, (1, 1)),)
            tokens[0] = LAYOUT["image_id"]
        examples.append(Example(tokens, np.arange(len(tokens)) > 1, images))
    return examples


def batches(examples, *, seed=7, rows_per_batch=3):
    return sft_batches(examples, seed=seed, rows_per_batch=rows_per_batch, **LAYOUT)


def contents(rows):
    """Of each row, the examples in it."""
    return [tuple(dict.fromkeys(t - 100 for t in row.tolist() if t >= 100)) for row in rows.tokens]


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_each_epoch_sees_every_row_exactly_once_and_in_a_new_order():
    dataset = batches(make_examples(31), rows_per_batch=5)
    stream = [row for step in range(24) for row in contents(dataset[step])]
    plan = set(stream)
    epochs = [stream[start : start + len(plan)] for start in range(0, 3 * len(plan), len(plan))]
    assert sorted(index for row in plan for index in row) == list(range(31))
    for epoch in epochs:
        assert sorted(epoch) == sorted(plan)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(plan) % 5, "an epoch should end within a batch here"


def test_an_epoch_trains_every_token():
    examples = make_examples(31)
    dataset = batches(examples, rows_per_batch=1)
    first = dataset[0]
    assert trained_tokens(first) == sum(examples[index].trained.sum() for index in contents(first)[0])
    num_rows = len({contents(dataset[step])[0] for step in range(40)})
    total = sum(trained_tokens(dataset[step]) for step in range(num_rows))
    assert total == sum(example.trained.sum() for example in examples)


def test_the_seed_decides_everything():
    examples = make_examples(31)
    for step in range(3):
        assert_equal(batches(examples)[step], batches(examples)[step])
    assert contents(batches(examples, seed=7)[0]) != contents(batches(examples, seed=11)[0])


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resuming_at_any_step_gives_the_rest(num_threads):
    dataset = batches(make_examples(23))
    expected = [dataset[step] for step in range(13)]
    for start in range(11):
        iterator = prefetched(dataset, start, num_threads=num_threads)
        for step in range(start, min(start + 5, 13)):
            assert_equal(next(iterator), expected[step])


def test_fewer_rows_than_a_batch_still_fill_it():
    rows = batches(make_examples(2), rows_per_batch=5)[0]
    assert rows.tokens.shape == (5, 17) and rows.patches.shape == (5, 2, 3)
    assert all(contents(rows))


def test_pairs_are_neighbours_in_one_row_in_their_order():
    examples = make_examples(23)  # the last one has no partner
    data = sft_batches(examples, seed=7, rows_per_batch=1, together=2, **LAYOUT | {"row_tokens": 29, "row_patches": 3})
    seen = []
    for step in itertools.count():
        if len(seen) >= 22:
            break
        (row,) = contents(data[step])
        assert len(row) % 2 == 0 and all(a % 2 == 0 and b == a + 1 for a, b in zip(row[::2], row[1::2], strict=True))
        seen += row
    assert sorted(seen) == list(range(22))


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        batches([])


def test_problems_are_encoded_when_asked_for():
    asked = []

    def encode(problem):
        asked.append(problem)
        return problem * 2

    prompts = encoded_problems([11, 13, 17], encode)
    assert len(prompts) == 3 and not asked
    assert (prompts[2], prompts[0]) == (34, 22) and asked == [17, 11]


def test_no_other_framework_is_imported():
    program = "import sys, kimi_jax.data.loaders, kimi_jax.data.chat; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_rows_that_come_one_at_a_time_can_be_iterated():
    dataset = batches(make_examples(13), rows_per_batch=1)
    for step, rows in zip((3, 4), prefetched(dataset, 3, num_threads=1), strict=False):
        assert_equal(rows, dataset[step])
