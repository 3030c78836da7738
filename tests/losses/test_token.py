import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.losses.token import cross_entropy

ROWS, ROW_LENGTH = 5, 7


def make_case():
    rng = np.random.default_rng(0)
    mask = rng.random((ROWS, ROW_LENGTH)) < 0.4
    return np.where(mask, -rng.exponential(size=mask.shape), np.nan).astype(np.float32), mask


def test_loss_parts_and_gradient():
    logprobs, mask = make_case()
    total = sum(-float(p) for p, trained in zip(logprobs.ravel(), mask.ravel(), strict=True) if trained)
    (loss, parts), grad = jax.value_and_grad(cross_entropy, has_aux=True)(jnp.asarray(logprobs), mask, weight=0.25)
    assert loss == pytest.approx(0.25 * total, rel=1e-6)
    assert parts == {"nll": pytest.approx(total, rel=1e-6), "tokens": mask.sum()}
    np.testing.assert_array_equal(grad, np.where(mask, -0.25, 0.0))


def test_micro_batches_add_up_to_the_mean_over_all_tokens():
    logprobs, mask = make_case()
    weight = 1 / mask.sum()
    losses = [cross_entropy(logprobs[rows], mask[rows], weight=weight)[0] for rows in ([3, 0], [1], [4, 2])]
    assert sum(losses) == pytest.approx(-logprobs[mask].mean(), rel=1e-6)


def test_a_batch_without_trained_tokens_is_zero():
    loss, parts = cross_entropy(jnp.full((3, 5), jnp.nan), jnp.zeros((3, 5), bool), weight=1.0)
    assert loss == parts["tokens"] == parts["nll"] == 0.0
