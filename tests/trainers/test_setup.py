"""What a run starts from lies on the mesh, and still does after a resume."""

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.models.config import ModelConfig
from kimi_jax.models.policy import Policy
from kimi_jax.trainers.config import default_config
from kimi_jax.trainers.setup import Setup, params_like
from kimi_jax.training import sharding
from kimi_jax.training.checkpoint import Checkpointer

SHAPE = dict(vocab_size=62, width=26, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10, mlp_width=38)


def test_a_state_comes_back_from_a_checkpoint_onto_the_whole_mesh(tmp_path):
    """An array that comes back on one device alone could not enter a computation with the others."""
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=2 if jax.device_count() % 2 == 0 else 1)
    policy = Policy(ModelConfig(rope_base=100.0, tie_embeddings=True, **SHAPE))
    targets = params_like(default_config(), policy, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), targets)
    nothing = dict(config=None, workdir=tmp_path, chat=None, train=[], heldout=[], engine=None, to_rollout=None)
    state = Setup(mesh=mesh, policy=policy, **nothing).new_state(params, opt_state=None)
    assert (state.step, state.step.dtype) == (0, jnp.int32)
    with Checkpointer(tmp_path, keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(3, state, {})
        _, restored, _ = checkpoints.restore(state)
        _, part, _ = checkpoints.restore({"params": targets}, partial=True)
    for leaf, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.device_set == set(mesh.devices.flat)
        np.testing.assert_array_equal(leaf, saved)
    for leaf, target, saved in zip(*map(jax.tree.leaves, (part, targets, params)), strict=True):
        assert leaf.sharding == target.sharding
        np.testing.assert_array_equal(leaf, saved)
