"""The objective against float64 NumPy: loops over responses that know nothing of packing, and finite differences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.losses.mirror_descent import baseline, surrogate_loss
from tests.losses.cases import GROUPS, Case, cast, central_differences, log_softmax, rows_of, softmax_model
from tests.losses.cases import make_case as make_plain_case

FORMS = ["sequence", "length_normalized", "token"]
TAU = 0.3


def make_case(kind="mean") -> Case:
    return make_plain_case(lambda rewards: rewards - baseline(rewards, kind=kind, tau=TAU))


def oracle(case: Case, kind: str, form: str):
    """Loss and its gradient with respect to the log-probs, response by response."""
    loss, grad = 0.0, np.zeros_like(case.logprobs)
    reference, lengths = case.batch.reference_logprobs, iter(case.batch.lengths)
    for rewards, responses in zip(case.rewards, case.responses, strict=True):
        b = np.mean(rewards) if kind == "mean" else TAU * np.log(np.mean(np.exp(rewards / TAU)))
        for r, place in zip(rewards, responses, strict=True):
            length = next(lengths)
            w = 1 / (len(rewards) * len(case.rewards))
            logp, logp_i = case.logprobs[place], reference[place]
            if form == "token":
                loss -= w * sum((r - b) * p - TAU / 2 * (p - q) ** 2 for p, q in zip(logp, logp_i, strict=True))
                grad[place] = -w * ((r - b) - TAU * (logp - logp_i))
            else:
                scale = 1 / length if form == "length_normalized" else 1.0
                delta = sum(logp) - sum(logp_i)
                loss -= w * scale * ((r - b) * sum(logp) - TAU / 2 * delta**2)
                grad[place] = -w * scale * ((r - b) - TAU * delta)
    return loss, grad


@partial(jax.jit, static_argnames="form")
def loss_and_grad(logprobs, batch, tau, form):
    return jax.value_and_grad(surrogate_loss, has_aux=True)(logprobs, batch, tau=tau, form=form)


def loss_of(logprobs, batch, form, tau=TAU):
    return surrogate_loss(logprobs, batch, tau=tau, form=form)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mean", "log_z"])
@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-6), (np.float32, 1e-4)])
def test_loss_and_gradient_match_numpy(form, kind, dtype, rtol):
    case = make_case(kind)
    expected_loss, expected_grad = oracle(case, kind, form)
    with jax.enable_x64(True):
        batch, logprobs = cast((case.batch, case.logprobs), dtype)
        (loss, _), grad = loss_and_grad(logprobs, batch, TAU, form)
    assert loss.dtype == grad.dtype == dtype
    np.testing.assert_allclose(loss, expected_loss, rtol=rtol)
    np.testing.assert_allclose(grad, expected_grad, rtol=rtol, atol=rtol * np.abs(expected_grad).max() / 100)
    assert np.all(np.asarray(grad)[~case.batch.rows.loss_mask] == 0.0)  # nan stood there


@pytest.mark.parametrize("form", FORMS)
def test_gradient_with_respect_to_parameters(form):
    params, x, targets, in_numpy, in_jax = softmax_model()
    case = make_case("log_z")._replace(logprobs=in_numpy(params))
    # Chain rule by hand: d logp_t / d logits_t = onehot(target_t) − softmax(logits_t).
    _, grad_logprobs = oracle(case, "log_z", form)
    onehot = np.eye(params.shape[1])[targets[..., 0]]
    expected = np.einsum("rt,rtf,rtv->fv", grad_logprobs, x, onehot - np.exp(log_softmax(x @ params)))
    with jax.enable_x64(True):
        grad = jax.jit(jax.grad(lambda w: loss_of(in_jax(w), case.batch, form)))(params)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_sequence_with_the_mean_reward_descends_along_equation_3():
    params, _, _, in_numpy, in_jax = softmax_model()
    case = make_case("mean")

    def ascent_direction():
        """(1/k) Σ_j [ ∇log π(y_j) (r_j − r̄) − (τ/2) ∇ (log π(y_j)/π_i(y_j))² ], averaged over the problems."""
        total = np.zeros_like(params)
        for rewards, responses in zip(case.rewards, case.responses, strict=True):
            for r, place in zip(rewards, responses, strict=True):
                log_pi = lambda w, place=place: in_numpy(w)[place].sum()  # noqa: E731
                log_pi_i = case.batch.reference_logprobs[place].sum()
                square = lambda w, log_pi=log_pi, log_pi_i=log_pi_i: (log_pi(w) - log_pi_i) ** 2  # noqa: E731
                term = central_differences(log_pi, params) * (r - rewards.mean())
                term -= TAU / 2 * central_differences(square, params)
                total += term / len(rewards)
        return total / len(case.rewards)

    with jax.enable_x64(True):
        grad = jax.jit(jax.grad(lambda w: loss_of(in_jax(w), case.batch, "sequence")))(params)
    np.testing.assert_allclose(-grad, ascent_direction(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["mean", "log_z"])
def test_loss_is_the_squared_surrogate_over_two_tau_up_to_a_constant(kind):
    params, _, _, in_numpy, in_jax = softmax_model()
    case = make_case(kind)

    def squared_surrogate(w):  # L(θ) / (2τ)
        total, logprobs = 0.0, in_numpy(w)
        for rewards, responses in zip(case.rewards, case.responses, strict=True):
            b = baseline(rewards, kind=kind, tau=TAU)
            deltas = [(logprobs[place] - case.batch.reference_logprobs[place]).sum() for place in responses]
            total += np.mean((rewards - b - TAU * np.array(deltas)) ** 2) / len(case.rewards)
        return total / (2 * TAU)

    with jax.enable_x64(True):
        value_and_grad = jax.jit(jax.value_and_grad(lambda w: loss_of(in_jax(w), case.batch, "sequence")))
        loss, grad = jax.device_get(value_and_grad(params))
        other_loss, _ = jax.device_get(value_and_grad(params * 0.5))
    np.testing.assert_allclose(grad, central_differences(squared_surrogate, params), rtol=1e-6, atol=1e-8)
    assert abs(loss - other_loss) > 0.1
    expected = squared_surrogate(params) - squared_surrogate(params * 0.5)
    np.testing.assert_allclose(loss - other_loss, expected, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_at_the_reference_the_regularizer_and_its_gradient_vanish(form):
    case = make_case()
    batch = cast(case.batch, np.float32)
    mask, at_reference = case.batch.rows.loss_mask, batch.reference_logprobs
    (_, parts), grad = loss_and_grad(at_reference, batch, 0.01, form)
    for name in ("regularizer", "squared_log_ratio", "log_ratio", "kl", "max_log_ratio"):
        assert parts[name] == 0.0, name
    np.testing.assert_array_equal(grad, loss_and_grad(at_reference, batch, 1000.0, form)[1])
    assert np.all(np.asarray(grad)[mask] != 0.0)
    # and away from it they do not
    moved = jnp.where(mask, at_reference - 0.1, 0.0)
    (_, parts), grad = loss_and_grad(moved, batch, 0.01, form)
    assert parts["regularizer"] > 0.0
    assert not np.array_equal(grad, loss_and_grad(moved, batch, 1000.0, form)[1])


def test_parts():
    case = make_case()
    mask, reference, behavior = case.batch.rows.loss_mask, case.batch.reference_logprobs, case.batch.behavior_logprobs
    with jax.enable_x64(True):
        (loss, parts), _ = jax.device_get(loss_and_grad(case.logprobs, case.batch, TAU, "sequence"))
    deltas = np.array([(case.logprobs[p] - reference[p]).sum() for group in case.responses for p in group])
    d, gap = (case.logprobs - reference)[mask], np.abs(reference - behavior)[mask]
    expected = {
        "policy": loss - parts["regularizer"],
        "regularizer": TAU / 2 * np.sum(case.batch.weights[:-1] * deltas**2),
        "responses": sum(GROUPS),
        "tokens": mask.sum(),
        "squared_log_ratio": np.sum(deltas**2),
        "log_ratio": d.sum(),
        "kl": np.sum(np.exp(d) - d - 1),
        "logprob_gap": gap.sum(),
        "max_log_ratio": np.abs(deltas).max(),
        "max_logprob_gap": gap.max(),
    }
    assert parts.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(parts[name], expected[name], rtol=1e-9, err_msg=name)


def test_kl_part_estimates_the_divergence_from_the_reference_to_the_policy():
    """Its expectation over tokens drawn from π_i, taken exactly, is KL(π_i ‖ π_θ) and not the other direction."""
    log_pi, log_pi_i = log_softmax(np.random.default_rng(3).normal(size=(2, 11)))
    estimates = []
    case = make_case()
    place = case.responses[0][0]
    one_token = np.zeros_like(case.batch.rows.loss_mask)
    one_token[place[0][0], place[1][0]] = True
    with jax.enable_x64(True):
        for p, q in zip(log_pi, log_pi_i, strict=True):
            batch = dataclasses.replace(
                case.batch,
                rows=dataclasses.replace(case.batch.rows, loss_mask=one_token),
                reference_logprobs=np.full(one_token.shape, q),
            )
            (_, parts), _ = loss_and_grad(np.full(one_token.shape, p), batch, TAU, "sequence")
            assert parts["tokens"] == parts["responses"] == 1
            estimates.append(float(parts["kl"]))
    np.testing.assert_allclose(np.exp(log_pi_i) @ estimates, np.exp(log_pi_i) @ (log_pi_i - log_pi), rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up(form):
    case = make_case("log_z")
    with jax.enable_x64(True):
        (loss, parts), grad = jax.device_get(loss_and_grad(case.logprobs, case.batch, TAU, form))
        rows = [np.array([4, 0, 2]), np.array([6, 1]), np.array([3, 5])]
        micro_batches = [rows_of(case, chosen) for chosen in rows]
        results = jax.device_get([loss_and_grad(m.logprobs, m.batch, TAU, form) for m in micro_batches])
    np.testing.assert_allclose(sum(result[0][0] for result in results), loss, rtol=1e-9)
    for name, value in parts.items():
        combine = max if name.startswith("max_") else sum
        np.testing.assert_allclose(combine(result[0][1][name] for result in results), value, rtol=1e-9, err_msg=name)
    for chosen, (_, micro_grad) in zip(rows, results, strict=True):
        np.testing.assert_allclose(micro_grad, grad[chosen], rtol=1e-9)


def test_another_tau_compiles_nothing():
    case = make_case()
    batch, logprobs = cast((case.batch, case.logprobs), np.float32)
    traces = []

    @jax.jit
    def jitted(tau):
        traces.append(tau)
        return loss_of(logprobs, batch, "sequence", tau)

    assert jitted(0.1) != jitted(0.7)
    assert len(traces) == 1


def test_unknown_form_is_refused():
    case = make_case()
    with pytest.raises(ValueError, match="'per_token'.*'sequence'.*'length_normalized'.*'token'"):
        surrogate_loss(case.logprobs, case.batch, tau=TAU, form="per_token")


def test_baseline_by_hand():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.5])
    assert baseline(rewards, kind="mean", tau=0.01) == pytest.approx(0.5, rel=1e-12)
    by_hand = 0.5 * np.log((2 * np.exp(2.0) + 2 + np.exp(1.0)) / 5)
    assert baseline(rewards, kind="log_z", tau=0.5) == pytest.approx(by_hand, rel=1e-12)


def test_log_z_between_its_limits():
    rewards = np.array([1.0, 0.0, 0.0])
    assert baseline(rewards, kind="log_z", tau=1e9) == pytest.approx(1 / 3, rel=1e-8)
    # exp(1 / 0.01) overflows float32 and exp(1 / 0.001) float64: τ log(e^{1/τ} / 3) = 1 − τ log 3 to machine precision
    for tau in (0.01, 0.001):
        assert baseline(rewards, kind="log_z", tau=tau) == pytest.approx(1 - tau * np.log(3), rel=1e-12)
    values = [baseline(rewards, kind="log_z", tau=tau) for tau in (0.001, 0.01, 0.1, 1.0, 10.0, 1e9)]
    assert values == sorted(values, reverse=True)
    assert baseline(-1000 * rewards, kind="log_z", tau=0.01) == pytest.approx(0.01 * np.log(2 / 3), rel=1e-12)


@pytest.mark.parametrize(
    "rewards, kind, tau, match",
    [
        ([0.0, 1.0], "median", 1.0, "'median'.*'mean'.*'log_z'"),
        ([0.0, 1.0], "log_z", 0.0, "tau=0.0"),
        ([0.0, np.nan], "mean", 1.0, "ungradable"),
        ([], "mean", 1.0, "non-empty"),
        ([[0.0, 1.0]], "mean", 1.0, "vector"),
    ],
)
def test_baseline_refuses(rewards, kind, tau, match):
    with pytest.raises(ValueError, match=match):
        baseline(np.array(rewards), kind=kind, tau=tau)
