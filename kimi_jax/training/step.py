"""One update, for supervised learning and RL alike: gradients of micro-batches add up, then the optimizer moves once.

    acc = None
    for micro_batch in mini_batch:
        acc = stepper.accumulate(acc, params, micro_batch, hyper)
    state, metrics = stepper.apply(state, acc)

A loss is a pure function `loss_fn(logprobs, batch, hyper) -> (loss, parts)` of the log-probs of the targets, or of the
scalars that a reward model puts out. Its parts add up over micro-batches, except those named `max_...`, which combine
by the maximum.

What is not trained (`training.trainable`) passes through untouched: no gradient of it is taken, no moments exist.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from kimi_jax.arrays import TrainState
from kimi_jax.models.policy import Policy
from kimi_jax.training import trainable

Reads = Literal["logprobs", "scalars"]
LossFn = Callable[[jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


class NonFiniteError(FloatingPointError):
    """A gradient or a part of a loss was inf or nan. The update was not applied."""


class Stepper:
    """The pieces of an update, each jitted once. `batch.rows` are PackedRows; what varies at run time is in `hyper`."""

    def __init__(
        self,
        *,
        policy: Policy,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        schedule: Callable[[jax.Array], jax.Array],
        clip_norm: float,
        logits_chunk: int,
        moments_sharding: Callable[[Any], Any] = lambda tree: None,
        trained: Sequence[str] = (".*",),
        reads: Reads = "logprobs",
    ):
        """moments_sharding: from a tree that is laid out like the parameters (gradients, moments) to its shardings.
        trained: patterns over the paths of the parameters to train; a ValueError when first used if one matches none.
        reads: the output of the policy that the loss is given.
        """
        self.policy, self.loss_fn, self.optimizer, self.schedule = policy, loss_fn, optimizer, schedule
        self.clip_norm, self.logits_chunk, self.moments_sharding = clip_norm, logits_chunk, moments_sharding
        self.trained, self.reads = trained, reads
        self.init_optimizer = jax.jit(self._init_optimizer)
        self.score = jax.jit(self._score)
        self.accumulate = jax.jit(self._accumulate, donate_argnums=0)
        self.apply = jax.jit(self._apply, donate_argnums=0)

    def _init_optimizer(self, params) -> Any:
        """Fresh moments, laid out like the parameters."""
        return self._placed(self.optimizer.init(self._split(params)[0]))

    def _logprobs(self, params, rows, temperature):
        return self.policy.logprobs(params, rows, temperature=temperature, logits_chunk=self.logits_chunk)

    def _score(self, params, rows, temperature):
        """Log-probs of the targets in training numerics, [R, T]."""
        return self._logprobs(params, rows, temperature)[0]

    def _loss(self, params, batch, hyper):
        if self.reads == "scalars":
            loss, parts = self.loss_fn(self.policy.scalars(params, batch.rows), batch, hyper)
            return loss, parts | {"loss": loss}
        logprobs, entropy = self._logprobs(params, batch.rows, hyper["temperature"])
        loss, parts = self.loss_fn(logprobs, batch, hyper)
        entropy = jnp.sum(jnp.where(batch.rows.loss_mask, entropy, 0.0))
        return loss, parts | {"loss": loss, "entropy": entropy}

    def _accumulate(self, acc, params, batch, hyper):
        """acc: what came out for the micro-batch before. None for the first: gradients are as large as the parameters,
        and adding them to zeros would take twice their memory."""
        trained, frozen = self._split(params)
        loss = lambda trained: self._loss(trainable.join(trained, frozen), batch, hyper)  # noqa: E731
        grads, parts = jax.grad(loss, has_aux=True)(trained)
        if acc is not None:
            combine = lambda name: jnp.maximum if name.startswith("max_") else jnp.add  # noqa: E731
            grads = jax.tree.map(jnp.add, acc["grads"], grads)
            parts = {name: combine(name)(acc["parts"][name], part) for name, part in parts.items()}
        return self._placed({"grads": grads, "parts": parts})

    def _apply(self, state: TrainState, acc) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step of the optimizer; leaves the state untouched when a gradient or a part of the loss is not finite."""
        trained, frozen = self._split(state.params)
        norm = optax.tree.norm(acc["grads"])
        finite = jnp.all(jnp.isfinite(jnp.stack([norm, *acc["parts"].values()])))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, self.clip_norm / (norm + 1e-12)), acc["grads"])
        updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
        rate = self.schedule(state.step)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        current = dataclasses.replace(state, params=trained)
        proposed = TrainState(optax.apply_updates(trained, updates), opt_state, state.step + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, current)
        state = self._placed(dataclasses.replace(state, params=trainable.join(state.params, frozen)))
        metrics = {
            **acc["parts"],
            "grad_norm": norm,
            "update_norm": optax.tree.norm(updates),
            "learning_rate": rate,
            "finite": finite.astype(jnp.float32),
        }
        return state, metrics

    def _split(self, params):
        return trainable.split(params, self.trained)

    def _placed(self, tree):
        """Within jit: the layout of the result is ours, not the compiler's choice, so what reads it compiles once."""
        shardings = self.moments_sharding(tree)
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)


def check_finite(metrics: dict[str, float], where: str) -> None:
    """Raises NonFiniteError that says where, what and what to try, if an update was skipped."""
    if metrics["finite"] < 1:
        found = ", ".join(f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value))
        raise NonFiniteError(
            f"{where}: not finite: {found}. The update was not applied and the last checkpoint is intact. Lower the "
            "learning rate or clip_norm, or look at the newest metrics."
        )
