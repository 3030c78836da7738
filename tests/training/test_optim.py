import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.training import optim


def schedule(step, **changes):
    options = dict(kind="cosine", peak=3e-3, end=7e-4, warmup_steps=5, total_steps=23) | changes
    return float(optim.learning_rate(jnp.int32(step), **options))


def test_cosine_with_warmup_matches_the_formula():
    for step in range(31):
        progress = min(max(step - 5, 0) / (23 - 5), 1.0)
        expected = (7e-4 + (3e-3 - 7e-4) * (1 + math.cos(math.pi * progress)) / 2) * min(1, (step + 1) / 5)
        assert schedule(step) == pytest.approx(expected, rel=1e-5)
    assert schedule(0) == pytest.approx(3e-3 / 5) and schedule(4) == pytest.approx(3e-3)
    assert schedule(23) == schedule(1000) == pytest.approx(7e-4)


def test_constant_after_warmup():
    assert [schedule(step, kind="constant", end=0.0) for step in (0, 2, 4, 5, 97)] == pytest.approx(
        [3e-3 / 5, 9e-3 / 5, 3e-3, 3e-3, 3e-3]
    )
    assert schedule(0, kind="constant", warmup_steps=0) == pytest.approx(3e-3)


def test_a_schedule_shorter_than_its_warmup_stays_finite():
    assert all(math.isfinite(schedule(step, warmup_steps=29)) for step in range(41))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="Unknown schedule 'linear': use 'constant' or 'cosine'"):
        schedule(0, kind="linear")


def tree(rng):
    shapes = {"kernel": (2, 5, 3), "embedding": (7, 3), "bias": (2, 3), "scale": (2, 5)}
    return {f"{name}s": {name: rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}


def test_adam_matches_float64_numpy_and_decays_matrices_only():
    rng = np.random.default_rng(0)
    b1, b2, eps, decay, rate = 0.8, 0.95, 1e-3, 0.11, 0.07
    optimizer = optim.adam(b1=b1, b2=b2, eps=eps, weight_decay=decay)
    params = tree(rng)
    state = optimizer.init(params)
    theta = jax.tree.map(np.float64, params)
    m, v = jax.tree.map(np.zeros_like, theta), jax.tree.map(np.zeros_like, theta)
    for t in range(1, 6):
        grads = tree(rng)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * np.float64(g) ** 2, v, grads)
        direction = jax.tree.map(lambda m, v, t=t: (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), m, v)
        for name in ("kernel", "embedding"):
            direction[f"{name}s"][name] += decay * theta[f"{name}s"][name]
        theta = jax.tree.map(lambda p, d: p - rate * d, theta, direction)
    jax.tree.map(lambda p, expected: np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-6), params, theta)


def test_sgd_has_no_state():
    assert jax.tree.leaves(optim.sgd().init(tree(np.random.default_rng(0)))) == []
