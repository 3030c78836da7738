"""From a config to the things a run is made of: mesh, policy, tokenizer, problems, engines."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import optax

from kimi_jax.arrays import TrainState
from kimi_jax.data import chat
from kimi_jax.data.loaders import encoded_problems
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.models import attention
from kimi_jax.models.config import ModelConfig, named_size
from kimi_jax.models.policy import Policy
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.repetition import RepetitionSettings
from kimi_jax.tasks import get_task
from kimi_jax.tasks.base import make_problems
from kimi_jax.training import distributed, optim, sharding
from kimi_jax.training.step import LossFn, Stepper
from kimi_jax.types import Problem

# Independent streams of randomness under one seed.
INIT, ROLLOUT, EVALUATION, REPORT = range(4)


@dataclasses.dataclass(frozen=True)
class Setup:
    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    policy: Policy
    tokenizer: Tokenizer
    train: list[Problem]  # kinds and tasks interleaved
    heldout: list[Problem]
    engine: Engine
    to_rollout: Callable[[dict, dict | None], dict]

    def key(self, stream: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.config.seed), stream)
        return (
            key
            if jax.process_count() == 1
            else jax.random.wrap_key_data(sharding.replicate(self.mesh, jax.random.key_data(key)))
        )

    @property
    def patching(self) -> dict[str, int]:
        vision = self.policy.config.vision  # None: a model of text alone, whose tasks have no images to cut
        return {"patch_size": vision.patch_size if vision else 1, "merge": vision.merge_size if vision else 1}

    @property
    def packing(self) -> dict[str, int]:
        return packing(self.config, self.policy.config, image_id=self.tokenizer.image_id)

    def prompts(self, problems: list[Problem]) -> grain.MapDataset:
        """Encoded prompts, made when asked for."""
        return encoded_problems(
            problems, functools.partial(chat.encode_problem, tokenizer=self.tokenizer, **self.patching)
        )

    def init_params(self) -> dict:
        return jax.jit(self.policy.init, out_shardings=self.params_sharding)(self.key(INIT))

    def new_state(self, params: dict, opt_state: Any) -> TrainState:
        """At step 0. The counter lies on the mesh like the rest, and so it comes back from a checkpoint."""
        step = sharding.replicate(self.mesh, np.int32(0))
        return TrainState(params, opt_state, step)

    @property
    def params_sharding(self) -> Any:
        return sharding.shardings(self.mesh, jax.eval_shape(self.policy.init, self.key(INIT)), sharding.TRAIN_RULES)

    def put_rows(self, tree: Any) -> Any:
        return sharding.put_rows(self.mesh, tree)

    def stepper(self, loss_fn: LossFn, options: ml_collections.ConfigDict, total_steps: int) -> Stepper:
        return make_stepper(self.config, self.policy, self.mesh, loss_fn, options, total_steps)


def packing(config: ml_collections.ConfigDict, shape: ModelConfig, *, image_id: int) -> dict[str, int]:
    """How sequences are packed into rows, for `data.packing.pack_rows` and what calls it."""
    return {
        "row_tokens": config.rows.tokens,
        "row_patches": config.rows.patches,
        "patch_dim": shape.vision.patch_dim if shape.vision else 0,
        "merge": shape.vision.merge_size if shape.vision else 1,
        "image_id": image_id,
    }


def make_stepper(
    config, policy, mesh, loss_fn: LossFn, options: ml_collections.ConfigDict, total_steps: int
) -> Stepper:
    """options: config.sft.optimizer or config.rl.optimizer."""
    return Stepper(
        policy=policy,
        loss_fn=loss_fn,
        optimizer=make_optimizer(options),
        schedule=functools.partial(
            optim.learning_rate,
            kind=options.schedule,
            peak=options.peak,
            end=options.end,
            warmup_steps=options.warmup_steps,
            total_steps=total_steps,
        ),
        clip_norm=options.clip_norm,
        logits_chunk=config.rows.logits_chunk,
        moments_sharding=lambda shapes: sharding.shardings(mesh, shapes, sharding.TRAIN_RULES),
    )


def make_optimizer(options: ml_collections.ConfigDict) -> optax.GradientTransformation:
    if options.name == "sgd":
        return optim.sgd()
    if options.name == "adam":
        return optim.adam(b1=options.b1, b2=options.b2, eps=options.eps, weight_decay=options.weight_decay)
    raise ValueError(f"Unknown optimizer {options.name!r}: use 'adam' or 'sgd'.")


def model_config(config: ml_collections.ConfigDict, vocab_size: int | None) -> ModelConfig:
    """The named size with the config's changes. vocab_size: of the tokenizer; None keeps that of the size."""
    changes = {"dtype": config.model.dtype, "vocab_size": vocab_size}
    shape = named_size(config.model.size, **{name: value for name, value in changes.items() if value})
    if config.data.image_tasks and not shape.vision:
        raise ValueError(
            f"config.model.size={config.model.size!r} reads text alone, but config.data.image_tasks="
            f"{tuple(config.data.image_tasks)}. Set config.data.image_tasks=() or choose a size with a vision tower."
        )
    return shape


def make_policy(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, shape: ModelConfig) -> Policy:
    implementation = config.model.attention
    if implementation == "auto":
        implementation = attention.choose_implementation(
            mesh.devices.flat[0].platform, shape.dtype, row_tokens=config.rows.tokens
        )
    if implementation not in attention.IMPLEMENTATIONS:
        raise ValueError(
            f"config.model.attention={implementation!r} must be 'auto' or one of "
            f"{', '.join(attention.IMPLEMENTATIONS)}."
        )
    return Policy(shape, implementation, mesh, remat=config.model.remat, unroll=config.model.unroll)


def params_like(policy: Policy, mesh: jax.sharding.Mesh) -> dict:
    """Shapes and shardings of the parameters: what a checkpoint is restored into."""
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, sharding.shardings(mesh, shapes, sharding.TRAIN_RULES))


def make_problem_sets(config: ml_collections.ConfigDict) -> tuple[list[Problem], list[Problem]]:
    """(train, heldout), tasks taking turns so that any prefix is balanced."""
    sets = []
    for split, per_kind in (("train", config.data.train_per_kind), ("heldout", config.data.heldout_per_kind)):
        kinds = []
        for tasks in (config.data.text_tasks, config.data.image_tasks):
            drawn = [
                make_problems(get_task(t), split=split, count=per_kind // len(tasks), seed=config.seed) for t in tasks
            ]
            if drawn:
                kinds.append([problem for turn in zip(*drawn, strict=True) for problem in turn])
        sets.append([problem for turn in zip(*kinds, strict=True) for problem in turn])
    return sets[0], sets[1]


def build(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Setup:
    """Everything but parameters. Trains the tokenizer on the task text, or loads it when the run is resumed."""
    mesh = sharding.make_mesh(**config.mesh)
    train, heldout = make_problem_sets(config)
    path = workdir / "tokenizer.model"
    if distributed.is_first() and not path.exists():
        texts = [text for problem in train for text in (problem.prompt, problem.solution)]
        Tokenizer.train(texts, path, vocab_size=config.tokenizer.vocab_size)
    distributed.meet("tokenizer")
    tokenizer = Tokenizer.load(path)
    policy = make_policy(config, mesh, model_config(config, tokenizer.vocab_size))
    engine = make_engine(config, mesh, policy, tokenizer)
    dtype = config.model.sampling_dtype or policy.config.dtype
    return Setup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        policy=policy,
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        engine=engine,
        to_rollout=make_handover(policy, mesh, dtype=dtype),
    )


def engine_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of an `Engine` that the config gives."""
    options = dict(config.sampling)
    repetition = dict(options.pop("repetition"))
    window = repetition.pop("window")
    return options | {"repetition_window": window, "repetition": RepetitionSettings.of(**repetition)}


def make_engine(config, mesh, policy: Policy, tokenizer: Tokenizer, **changes) -> Engine:
    return Engine(
        policy=policy,
        image_id=tokenizer.image_id,
        decode_text=tokenizer.decode,
        put_rows=functools.partial(sharding.put_rows, mesh),
        **engine_options(config) | changes,
    )
