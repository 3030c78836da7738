"""The dataset comes back equal, in a process that never imports TensorFlow."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
from kimi_jax.tasks import get_task
from kimi_jax.tasks.base import make_problems
from kimi_jax.tasks.tfds_builder import prepare_visual_problems, problem_from_example

for _ in range(2):  # the second time it is only found
    builder = prepare_visual_problems("text_image", train=13, heldout=7, seed=3, data_dir=sys.argv[1])
for split, count in (("train", 13), ("heldout", 7)):
    source = builder.as_data_source(split)
    expected = make_problems(get_task("text_image"), split=split, count=count, seed=3)
    assert len(source) == count
    for i in reversed(range(count)):
        read, drawn = problem_from_example(source[i]), expected[i]
        for field, value in vars(drawn).items():
            if field != "images":
                assert getattr(read, field) == value and type(getattr(read, field)) is type(value), field
        (a,), (b,) = read.images, drawn.images
        assert a.dtype == b.dtype and np.array_equal(a, b)
assert len({problem_from_example(e).images[0].shape for e in builder.as_data_source("train")}) > 1
assert "tensorflow" not in sys.modules
try:
    prepare_visual_problems("chain", train=13, heldout=7, seed=3, data_dir=sys.argv[1])
except ValueError as error:
    assert "'chain' is a text task" in str(error)
else:
    raise AssertionError("a text task was accepted")
print("equal")
"""


def test_round_trip_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.endswith("equal\n"), result.stderr[-3000:]
    folders = [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.array_record*")]
    assert folders == ["visual_problems/text_image-train13-heldout7-seed3/1.2.0"] * 2
