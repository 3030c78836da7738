"""From a config to the things a run is made of: mesh, policy, chat format, problems, engines."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import optax

from kimi_jax.arrays import TrainState
from kimi_jax.data.chat import ChatFormat, NativeChat
from kimi_jax.data.hf_chat import load_chat_format
from kimi_jax.data.loaders import encoded_problems
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.models import attention, hf, lora, paths
from kimi_jax.models.config import ModelConfig, named_size
from kimi_jax.models.policy import Policy
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.repetition import RepetitionSettings
from kimi_jax.tasks import TASKS, get_task
from kimi_jax.tasks.base import make_problems, read_problems
from kimi_jax.trainers import origin, rewards, sources
from kimi_jax.trainers.config import has_rl
from kimi_jax.training import distributed, optim, sharding, trainable
from kimi_jax.training.step import LossFn, Reads, Stepper
from kimi_jax.types import Problem, Verdict

# Independent streams of randomness under one seed.
INIT, ROLLOUT, EVALUATION, REPORT = range(4)
_ADAPTERS = 2**31 - 1  # folds into the key of INIT; no small number, which splitting that key also gives


@dataclasses.dataclass(frozen=True)
class Setup:
    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    policy: Policy
    chat: ChatFormat
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
    def packing(self) -> dict[str, Any]:
        return packing(self.config, self.policy.config, image_id=self.chat.image_id)

    def prompts(self, problems: list[Problem]) -> grain.MapDataset:
        """Encoded prompts, made when asked for."""
        return encoded_problems(problems, self.chat.encode_problem)

    def init_params(self) -> dict:
        """What the run begins with: parameters of an earlier run, of a published model, or random ones.

        What those lack, such as adapters and a scalar head, is random too.
        """
        given, like, path = {}, self.params_like, self.config.model.path
        if self.config.init:
            given = origin.find(self.config.init).load(like)
        elif path:
            given = hf.load_params(hf_directory(path), {name: tree for name, tree in like.items() if name != "lora"})
        given, shardings = dict(paths.flatten(given)), dict(paths.flatten(_shardings(like)))
        rest = {path: where for path, where in shardings.items() if path not in given}

        def fresh(key):
            params = init_params(self.config, self.policy, key)
            return {path: leaf for path, leaf in paths.flatten(params) if path in rest}

        return paths.nest((given | jax.jit(fresh, out_shardings=rest)(self.key(INIT))).items())

    def new_state(self, params: dict, opt_state: Any) -> TrainState:
        """At step 0. The counter lies on the mesh like the rest, and so it comes back from a checkpoint."""
        step = sharding.replicate(self.mesh, np.int32(0))
        return TrainState(params, opt_state, step)

    def state_like(self, stepper: Stepper, *, moments: bool) -> TrainState:
        """Shapes and shardings of the state of a stage: what a checkpoint is restored into."""
        opt_state = jax.eval_shape(stepper.init_optimizer, self.params_like) if moments else None
        return self.new_state(self.params_like, with_shardings(opt_state, stepper.moments_sharding(opt_state)))

    @functools.cached_property
    def params_like(self) -> dict:
        return params_like(self.config, self.policy, self.mesh)

    @property
    def verify(self) -> Callable[[Problem, str], Verdict]:
        """The verifiers of the run, those of the user before those of the tasks."""
        return rewards.verifier(self.config.rewards)

    def judge(self, responses: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Verdicts, for evaluations. The verifiers of the tasks are quick; others are kept at arm's length."""
        options = self.config.rewards
        quick = not options.verifiers and all(problem.task in TASKS for problem, _ in responses)
        workers = 0 if quick else options.workers
        with VerifierPool(self.verify, workers=workers, deadline_s=options.deadline_s) as pool:
            return pool.verdicts([pool.submit(problem, text) for problem, text in responses])

    def put_rows(self, tree: Any) -> Any:
        return sharding.put_rows(self.mesh, tree)

    def stepper(
        self, loss_fn: LossFn, options: ml_collections.ConfigDict, total_steps: int, reads: Reads = "logprobs"
    ) -> Stepper:
        return make_stepper(self.config, self.policy, self.mesh, loss_fn, options, total_steps, reads)


def _shardings(like: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, like)


def packing(config: ml_collections.ConfigDict, shape: ModelConfig, *, image_id: int) -> dict[str, Any]:
    """How sequences are packed into rows, for `data.packing.pack_rows` and what calls it."""
    return {
        "row_tokens": config.rows.tokens,
        "row_patches": config.rows.patches,
        "patch_dim": shape.vision.patch_dim if shape.vision else 0,
        "merge": shape.vision.merge_size if shape.vision else 1,
        "image_id": image_id,
        "extras": shape.extras,
    }


def make_stepper(
    config,
    policy,
    mesh,
    loss_fn: LossFn,
    options: ml_collections.ConfigDict,
    total_steps: int,
    reads: Reads = "logprobs",
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
        trained=trained_patterns(config),
        reads=reads,
    )


def make_optimizer(options: ml_collections.ConfigDict) -> optax.GradientTransformation:
    if options.name == "sgd":
        return optim.sgd()
    if options.name == "adam":
        return optim.adam(b1=options.b1, b2=options.b2, eps=options.eps, weight_decay=options.weight_decay)
    raise ValueError(f"Unknown optimizer {options.name!r}: use 'adam' or 'sgd'.")


def model_config(config: ml_collections.ConfigDict, vocab_size: int | None) -> ModelConfig:
    """That of config.model.path, or the named size, with the config's changes.

    vocab_size: of the tokenizer, for a named size; None keeps that of the size.
    """
    changes = {"dtype": config.model.dtype} if config.model.dtype else {}
    if config.model.scalar_head:
        changes["scalar_head"] = True
    if config.model.rope_base:
        changes["rope_base"] = config.model.rope_base
    if config.model.path:
        name, shape = f"path={config.model.path!r}", hf.read_config(hf_directory(config.model.path))[1]
        shape = dataclasses.replace(shape, **changes)
    else:
        changes |= {"vocab_size": vocab_size} if vocab_size else {}
        name, shape = f"size={config.model.size!r}", named_size(config.model.size, **changes)
    if config.data.image_tasks and not shape.vision:
        raise ValueError(
            f"config.model.{name} reads text alone, but config.data.image_tasks={tuple(config.data.image_tasks)}. Set "
            "config.data.image_tasks=() or choose a model with a vision tower."
        )
    return shape


def hf_directory(path: str | pathlib.Path) -> pathlib.Path:
    """A directory in the Hugging Face layout: `path` itself, or that in what scripts/import_weights.py wrote there."""
    path = pathlib.Path(path)
    return path / "hf" if (path / "hf" / "config.json").is_file() else path


def make_policy(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, shape: ModelConfig) -> Policy:
    implementation = config.model.attention
    if implementation == "auto":
        implementation = attention.choose_implementation(
            mesh.devices.flat[0].platform, shape.dtype, row_tokens=max(config.rows.tokens, config.rows.patches)
        )
    if implementation not in attention.IMPLEMENTATIONS:
        raise ValueError(
            f"config.model.attention={implementation!r} must be 'auto' or one of "
            f"{', '.join(attention.IMPLEMENTATIONS)}."
        )
    model = config.model
    return Policy(shape, implementation, mesh, remat=model.remat, kept=tuple(model.kept), unroll=model.unroll)


def init_params(config: ml_collections.ConfigDict, policy: Policy, key: jax.Array) -> dict:
    """Fresh parameters in the training layout, with adapters if the config asks for them.

    Raises ValueError for patterns that match nothing, and for adapters that would not be trained.
    """
    base, adapters = policy.init(key), {}
    patterns, options = trained_patterns(config), config.model.lora
    if options.rank:
        adapters = {"lora": lora.init(base, jax.random.fold_in(key, _ADAPTERS), **options)}
        if "lora" not in trainable.split(base | adapters, patterns)[0]:
            raise ValueError(
                f"config.model.lora.rank={options.rank} makes adapters, but config.model.trainable={patterns} does "
                "not train them. Add 'lora/.*/[ab]' to it, or leave it out to train the adapters alone."
            )
    return trainable.cast_frozen(base | adapters, patterns, config.model.base_dtype) | adapters


def trained_patterns(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    if config.model.trainable is not None:
        return tuple(config.model.trainable)
    return ("lora/.*/[ab]",) if config.model.lora.rank else (".*",)


def params_like(config: ml_collections.ConfigDict, policy: Policy, mesh: jax.sharding.Mesh) -> dict:
    """Shapes and shardings of the parameters: what a checkpoint is restored into. Raises as `init_params` does."""
    shapes = jax.eval_shape(functools.partial(init_params, config, policy), jax.random.key(0))
    return with_shardings(shapes, sharding.shardings(mesh, shapes, sharding.TRAIN_RULES))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes and types of `tree`, placed: what a program can be compiled for, or a checkpoint restored into."""
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, tree, shardings)


def make_problem_sets(config: ml_collections.ConfigDict) -> tuple[list[Problem], list[Problem]]:
    """(train, heldout), tasks taking turns so that any prefix is balanced; or the problems of files, in their order;
    or none, for a run that is about a mixture of other sources."""
    if config.data.train_file:
        train, heldout = read_problems(config.data.train_file), read_problems(config.data.heldout_file)
        few = has_rl(config) and len(train) < config.rl.problems
        if few or config.sft.steps and not config.dpo.pairs and not any(problem.solution for problem in train):
            raise ValueError(
                f"{config.data.train_file} has {len(train)} problems; there must be config.rl.problems="
                f"{config.rl.problems} at least, and some with a solution unless config.sft.steps=0."
            )
        return train, heldout
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
    """Everything but parameters. Whatever else of a published model the run needs is copied to workdir/hf."""
    mesh = sharding.make_mesh(**config.mesh)
    check_model(config, mesh)
    sources.check(config)
    if config.init and not origin.has_checkpoint(workdir):
        check_origin(config, mesh)
    rewards.own_verifiers(config.rewards.verifiers)
    rewards.own_components(config.rewards.components)
    train, heldout = make_problem_sets(config)
    rewards.check_problems([*train, *heldout], config.rewards, from_files=bool(config.data.train_file))
    chat = make_chat(config, workdir, train)
    policy = make_policy(config, mesh, model_config(config, chat.tokenizer.vocab_size))
    engine = make_engine(config, mesh, policy, chat)
    dtype = config.model.sampling_dtype or policy.config.dtype
    return Setup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        policy=policy,
        chat=chat,
        train=train,
        heldout=heldout,
        engine=engine,
        to_rollout=make_handover(policy, mesh, dtype=dtype),
    )


def check_model(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses, before problems are made, a model or parameters to train that could only fail later.

    Of a published model it reads everything but the weights. Raises ValueError or FileNotFoundError.
    """
    shape = model_config(config, None)
    like = params_like(config, make_policy(config, mesh, shape), mesh)
    if config.model.path:
        directory = hf_directory(config.model.path)
        load_chat_format(directory)
        if not config.init:
            hf.check_weights(directory, {name: tree for name, tree in like.items() if name != "lora"})


def check_origin(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses, before problems are made, a checkpoint of another model in config.init.

    Raises ValueError or FileNotFoundError.
    """
    found = origin.find(config.init)
    found.check_family(config.model.path)
    found.check_rope_base(config.model.rope_base)
    vocab_size = None if config.model.path else Tokenizer.load(found.workdir / "tokenizer.model").vocab_size
    found.check(params_like(config, make_policy(config, mesh, model_config(config, vocab_size)), mesh))


def make_chat(config: ml_collections.ConfigDict, workdir: pathlib.Path, train: list[Problem]) -> ChatFormat:
    """That of the published model, or our own, whose tokenizer is that of config.init, or trained on the task text
    unless it was before. Raises ValueError when the workdir has another tokenizer than config.init."""
    if config.model.path:
        if distributed.is_first() and not (workdir / "hf" / hf.TENSORS).exists():
            hf.copy_side_files(hf_directory(config.model.path), workdir / "hf")
        distributed.meet("side files")
        _check_vocabulary(config, workdir)
        return load_chat_format(workdir / "hf", system=config.model.system)
    path = workdir / "tokenizer.model"
    if distributed.is_first() and config.init and not path.exists():
        shutil.copyfile(origin.find(config.init).workdir / "tokenizer.model", path)
    if distributed.is_first() and not path.exists():
        texts = [text for problem in train for text in (problem.prompt, problem.solution)]
        Tokenizer.train([*texts, *sources.texts(config)], path, vocab_size=config.tokenizer.vocab_size)
    distributed.meet("tokenizer")
    _check_vocabulary(config, workdir)
    tokenizer = Tokenizer.load(path)
    return native_chat(tokenizer, model_config(config, tokenizer.vocab_size))


def _check_vocabulary(config, workdir):
    if config.init and not origin.has_checkpoint(workdir):
        origin.find(config.init).check_vocabulary(workdir)


def native_chat(tokenizer: Tokenizer, shape: ModelConfig) -> NativeChat:
    vision = shape.vision  # None: a model of text alone, whose tasks have no images to cut
    return NativeChat(tokenizer, vision.patch_size if vision else 1, vision.merge_size if vision else 1)


def engine_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of an `Engine` that the config gives."""
    options = dict(config.sampling)
    repetition = dict(options.pop("repetition"))
    window = repetition.pop("window")
    return options | {"repetition_window": window, "repetition": RepetitionSettings.of(**repetition)}


def make_engine(config, mesh, policy: Policy, chat: ChatFormat, **changes) -> Engine:
    return Engine(
        policy=policy,
        image_id=chat.image_id,
        decode_text=chat.tokenizer.decode,
        put_rows=functools.partial(sharding.put_rows, mesh),
        **engine_options(config) | changes,
    )
