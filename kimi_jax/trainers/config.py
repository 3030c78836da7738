"""Every setting of a run, with its default. A config file starts from `default_config()` and changes some of it.

The tree is locked: a misspelt key is refused with the nearest valid one. Only `trainers/` and `scripts/` read a config.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from kimi_jax.models.config import KEEPABLE


def default_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    # An earlier run to go on from, with its tokenizer: its workdir, or WORKDIR/checkpoints/STAGE[/STEP].
    config.init = config_dict.placeholder(str)

    config.model = ml_collections.ConfigDict()
    config.model.size = "tiny"  # a name in models.config.NAMED_SIZES
    # Instead of a size: a published model to begin with, in the Hugging Face layout, and a system message for it.
    config.model.path = config_dict.placeholder(str)
    config.model.system = ""
    config.model.dtype = config_dict.placeholder(str)  # compute dtype; None keeps that of the size
    config.model.sampling_dtype = config_dict.placeholder(str)  # of the rollout copy of the weights; None: the same
    config.model.rope_base = config_dict.placeholder(float)  # None keeps that of the model
    config.model.attention = "auto"  # a name in models.attention.IMPLEMENTATIONS, or auto
    config.model.scalar_head = False  # one more output, a number per token: what a classic reward model needs
    config.model.remat = True  # recompute each layer in the backward pass, which saves memory,
    config.model.kept = ()  # but for these, which saves time: names in models.config.KEEPABLE
    config.model.unroll = 1  # layers per step of the scan: more compile longer and may run faster
    # Patterns over the paths of the parameters to train, such as "vision/.*". None: all, with LoRA the adapters alone.
    config.model.trainable = config_dict.placeholder(tuple)
    config.model.base_dtype = "float32"  # or bfloat16: of the parameters that are not trained; those that are: float32
    config.model.lora = ml_collections.ConfigDict()  # low-rank adapters: models.lora
    config.model.lora.rank = 0  # r; 0: none
    config.model.lora.alpha = 32.0  # α: they count α / r
    config.model.lora.targets = (r"decoder/runs/.*/(q|k|v|o|gate|up|down)_proj/kernel",)  # what they adapt

    config.mesh = ml_collections.ConfigDict()  # sizes of the axes; one of them may be -1: all devices that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.tokenizer = ml_collections.ConfigDict()
    config.tokenizer.vocab_size = 384  # at most; a small corpus gives fewer

    config.data = ml_collections.ConfigDict()
    config.data.text_tasks = ("chain",)  # names in tasks.TASKS
    config.data.image_tasks = ("text_image", "scene_count", "scene_compare", "scene_locate", "bar_chart")
    # Instead of tasks: your own problems, one JSON record per line (tasks.base.problem_from_record).
    config.data.train_file = config_dict.placeholder(str)
    config.data.heldout_file = config_dict.placeholder(str)
    config.data.train_per_kind = 8_000  # problems of each kind (text, image), shared out evenly among its tasks
    config.data.heldout_per_kind = 1_000
    # What the supervised loop learns instead of the problems' worked solutions: {name: source(...)}. rl.iterations=0
    # ends the run with it, and then there need not be problems.
    config.data.mixture = ml_collections.ConfigDict()

    config.sft = ml_collections.ConfigDict()
    config.sft.examples_per_kind = 8_000  # how many of the train problems come with their worked solution
    config.sft.steps = 400
    config.sft.rows = 64  # packed rows per update
    config.sft.micro_rows = 16  # rows per micro-batch: what is in memory at once
    config.sft.eval_every = 100  # steps between evaluations
    config.sft.eval_problems = 128  # of each kind, greedy
    config.sft.checkpoint_every = 100

    # The supervised loop learns from preferences, with the settings of sft: trainers.dpo.
    config.dpo = ml_collections.ConfigDict()
    config.dpo.pairs = config_dict.placeholder(str)  # a file of them, as scripts/long2short.py dpo-pairs writes
    config.dpo.beta = 0.1  # β: the greater, the closer the policy stays to the one that it begins with
    config.dpo.alpha = 0.0  # α: the greater, the likelier the chosen responses stay; the report has no such term

    config.rl = ml_collections.ConfigDict()
    config.rl.iterations = 60  # 0: no RL
    config.rl.problems = 32  # per iteration
    config.rl.responses = 8  # k, per problem
    config.rl.updates = 4  # mini-batches, hence optimizer steps, per iteration
    config.rl.micro_rows = 16
    config.rl.temperature = 1.0
    config.rl.objective = "mirror_descent"  # of the report; or grpo, reinforce, rest, rloo: losses.policy_gradient
    config.rl.tau = 0.05  # τ, strength of the pull towards π_i; this, form and baseline are of mirror_descent
    # Partial rollouts (k1.5 §2.6.2): rl.rollout says what these do.
    config.rl.segment_tokens = config_dict.placeholder(int)  # a response may grow by per iteration; None: to its end
    config.rl.max_segment_lag = config_dict.placeholder(int)  # older tokens carry no loss; None: all do
    config.rl.max_age = config_dict.placeholder(int)  # iterations after which an open response is cut; None: never
    config.rl.oversubscribe = 0.0  # problems ahead, per problem of an iteration, which then ends with enough groups
    config.rl.form = "sequence"  # or length_normalized, token: losses.mirror_descent
    config.rl.baseline = "mean"  # or log_z
    config.rl.grpo = ml_collections.ConfigDict()
    config.rl.grpo.clip = 0.2  # ε: ratios to the sampler count between 1 - ε and 1 + ε
    config.rl.grpo.beta = 0.04  # β, of the KL divergence from π_i; 0: none
    config.rl.reset_optimizer = True  # fresh moments each iteration (k1.5 §2.3.2)
    config.rl.permute_advantages = False  # control: shuffles the advantages within each group, so learning must vanish
    config.rl.curriculum = "uniform"  # or hard_after: rl.prompts
    config.rl.curriculum_iterations = 20
    config.rl.hard_difficulty = 3
    config.rl.prior_success = 0.5  # of a problem that was never tried
    config.rl.prior_visits = 2.0
    config.rl.priority_floor = 0.1
    config.rl.eval_every = 0  # iterations between evaluations; 0: only at the end
    config.rl.eval_problems = 128
    config.rl.checkpoint_every = 10  # iterations
    config.rl.keep_last = 2
    config.rl.keep_best = 1

    config.rewards = ml_collections.ConfigDict()
    config.rewards.workers = 2  # processes that judge responses; 0: in this one
    config.rewards.deadline_s = 10.0  # for one response; then it is ungradable
    config.rewards.verifiers = ()  # of your own, "task=module:function": kimi_jax.tasks.verify
    config.rewards.components = ()  # of your own, "name=weight*module:function": kimi_jax.rewards.components
    config.rewards.sandbox = config_dict.placeholder(str)  # for code: URL of a service; None: one in every worker
    config.rewards.weights = ml_collections.ConfigDict()  # of rewards.components, added to 1 for being right
    config.rewards.weights.length = 0.0
    config.rewards.weights.repetition = 0.0
    config.rewards.weights.format = 0.0
    config.rewards.length_warmup = 20  # iterations before the length reward starts
    config.rewards.alarm = 0.05  # share of ungradable responses from which a jump is reported
    config.rewards.audit = True  # write every verdict to verdicts.jsonl
    # The workdir of a reward model that judges instead of the verifiers, which are then only logged, as accuracy_rule.
    # Or "policy", with its weights of the moment (sampling.prompt_tokens must hold question, reference, response).
    config.rewards.judge = config_dict.placeholder(str)
    config.rewards.votes = 1  # of a chain-of-thought reward model on each response; 1: the most likely, else sampled

    # What is trained is a reward model: no RL. Its data are judgements, such as the task equivalence, its settings sft.
    config.reward_model = ml_collections.ConfigDict()
    config.reward_model.kind = config_dict.placeholder(str)  # classic or chain_of_thought; None: a policy is trained
    config.reward_model.objective = "labels"  # of a classic one; or pairs, which ranks and cannot give verdicts

    for stage, peak, end, kind in ((config.sft, 2e-3, 2e-4, "cosine"), (config.rl, 3e-4, 3e-4, "constant")):
        stage.optimizer = ml_collections.ConfigDict()
        stage.optimizer.name = "adam"  # or sgd
        stage.optimizer.schedule = kind
        stage.optimizer.peak = peak
        stage.optimizer.end = end
        stage.optimizer.warmup_steps = 20
        stage.optimizer.b1 = 0.9
        stage.optimizer.b2 = 0.95
        stage.optimizer.eps = 1e-8
        stage.optimizer.weight_decay = 0.0
        stage.optimizer.clip_norm = 1.0

    config.rows = ml_collections.ConfigDict()  # shape of packed rows, in training of both kinds
    config.rows.tokens = 128
    config.rows.patches = 112
    config.rows.logits_chunk = 128  # tokens per row whose logits exist at once

    config.sampling = ml_collections.ConfigDict()
    config.sampling.rows = 256  # slots: responses in flight
    config.sampling.prompt_tokens = 48  # of the longest prompt
    config.sampling.prompt_patches = 112
    config.sampling.max_tokens = 64  # of a response
    config.sampling.chunk = 32  # decode steps between two looks at the host
    config.sampling.page = 16  # tokens per page of the KV cache
    config.sampling.pages = config_dict.placeholder(int)  # how many there are; None: enough for all rows at full length
    config.sampling.prefill_tokens = 1_024  # of one prefill call
    config.sampling.repetition = ml_collections.ConfigDict()  # when a response repeats itself: sampling.repetition
    config.sampling.repetition.window = 0  # tokens that it is watched over; 0: not at all
    # At these a response of ordinary text is hardly ever stopped (docs/log.md).
    config.sampling.repetition.min_tokens = 256
    config.sampling.repetition.repeats = 3
    config.sampling.repetition.span = 32
    config.sampling.repetition.share = 0.98

    config.eval = ml_collections.ConfigDict()
    config.eval.report_groups = 12  # problems of each kind shown in the report, with rl.responses responses each
    return config.lock()


def source(**changes: Any) -> ml_collections.ConfigDict:
    """One source of config.data.mixture. Raises KeyError or AttributeError for a setting that there is not."""
    config = ml_collections.ConfigDict()
    config.tasks = ()  # names in tasks.TASKS, whose worked solutions are the records;
    config.records = 8_000  # how many,
    config.problems = 1  # and of how many problems each: data.documents.from_tasks
    config.files = ()  # or files of records (data.documents),
    config.heldout_files = ()  # and those that its loss is measured on
    config.form = "documents"  # all of which is learnt, and which are cut where they are too long, or chat
    # What shares a row with others: "partial" attends to itself alone, "full" to all that is before it in the row.
    config.attention = "partial"
    config.weight = ((0, 1.0),)  # of its rows, from step to step: data.mixture.Schedule
    config.lock().update(changes)
    return config


_AT_LEAST = {
    "seed": 0,
    "model.unroll": 1,
    "model.lora.rank": 0,
    "data.train_per_kind": 0,
    "data.heldout_per_kind": 0,
    "sft.examples_per_kind": 1,
    "sft.steps": 0,
    "sft.rows": 1,
    "sft.eval_every": 1,
    "sft.eval_problems": 0,
    "sft.checkpoint_every": 1,
    "rl.iterations": 0,
    "rl.problems": 1,
    "rl.grpo.clip": 0,
    "rl.grpo.beta": 0,
    "rl.micro_rows": 1,
    "rl.segment_tokens": 1,
    "rl.max_segment_lag": 0,
    "rl.max_age": 0,
    "rl.oversubscribe": 0,
    "rl.eval_every": 0,
    "rl.eval_problems": 0,
    "rl.checkpoint_every": 1,
    "rl.keep_last": 1,
    "rl.keep_best": 0,
    "rewards.workers": 0,
    "rewards.alarm": 0,
    "rewards.votes": 1,
    "rewards.weights.length": 0,
    "rewards.weights.repetition": 0,
    "rewards.weights.format": 0,
    "rows.tokens": 1,
    "rows.patches": 0,
    "sampling.rows": 1,
    "sampling.prompt_tokens": 1,
    "sampling.max_tokens": 1,
    "sampling.chunk": 1,
    "sampling.page": 1,
    "sampling.prefill_tokens": 1,
    "sampling.repetition.window": 0,
    "eval.report_groups": 0,
}
_POSITIVE = (
    "sft.optimizer.clip_norm",
    "rl.optimizer.clip_norm",
    "rl.tau",
    "rl.temperature",
    "rewards.deadline_s",
)


OBJECTIVES = ("mirror_descent", "grpo", "reinforce", "rest", "rloo")  # trainers.objectives
_CHOICES = {
    "rl.objective": OBJECTIVES,
    "rl.form": ("sequence", "length_normalized", "token"),
    "rl.baseline": ("mean", "log_z"),
    "rl.curriculum": ("uniform", "hard_after"),
    **{f"{stage}.optimizer.name": ("adam", "sgd") for stage in ("sft", "rl")},
    **{f"{stage}.optimizer.schedule": ("constant", "cosine") for stage in ("sft", "rl")},
}
_DTYPES = ("float32", "bfloat16", "float16")


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuses what could only fail later. Raises ValueError that names the fields and the remedy."""
    for path, _ in fields(config):
        if near := nearest_field(path):
            raise ValueError(f"Unknown config key {path!r}. Did you mean {near!r}?")

    def divides(small: str, large: str):
        a, b = _get(config, small), _get(config, large)
        if a < 1 or b % a:
            raise ValueError(f"config.{large}={b} must be a multiple of config.{small}={a}. Change one of the two.")

    for path, least in _AT_LEAST.items():
        value = _get(config, path)
        if value is not None and not value >= least:  # nan neither
            raise ValueError(f"config.{path}={value} must be at least {least}.")
    for path in _POSITIVE:
        if not (value := _get(config, path)) > 0:
            raise ValueError(f"config.{path}={value} must be positive.")
    for path, allowed in _CHOICES.items():
        if (name := _get(config, path)) not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.0)[0]
            raise ValueError(f"config.{path}={name!r} is none of {', '.join(allowed)}. Did you mean {near!r}?")
    for name in ("dtype", "sampling_dtype"):
        if config.model[name] not in (None, *_DTYPES):
            raise ValueError(f"config.model.{name}={config.model[name]!r} must be one of {', '.join(_DTYPES)} or None.")
    if unknown := set(config.model.kept) - set(KEEPABLE):
        raise ValueError(
            f"config.model.kept={tuple(config.model.kept)}: {min(unknown)!r} is none of {', '.join(KEEPABLE)}."
        )
    _check_trained(config.model)
    if config.model.rope_base is not None and (config.model.rope_base <= 0 or config.model.path):
        raise ValueError(
            f"config.model.rope_base={config.model.rope_base} must be positive, and a published model keeps its own, "
            "which is what an export would say. Edit rope_theta in a copy of its config.json to change it."
        )
    divides("sft.micro_rows", "sft.rows")
    divides("rl.updates", "rl.problems")
    divides("rows.logits_chunk", "rows.tokens")
    if config.rl.responses < 2:
        raise ValueError(
            f"config.rl.responses={config.rl.responses}: a group needs at least 2 responses to be compared."
        )
    _check_sources(config)
    _check_reward_model(config.reward_model, config.model)
    if config.dpo.pairs is not None:
        _check_dpo(config)
    for kind, tasks in (("text", config.data.text_tasks), ("image", config.data.image_tasks)):
        if tasks and (config.data.train_per_kind % len(tasks) or config.data.heldout_per_kind % len(tasks)):
            raise ValueError(
                f"config.data.train_per_kind={config.data.train_per_kind} and heldout_per_kind="
                f"{config.data.heldout_per_kind} must be multiples of the number of {kind} tasks, {len(tasks)}."
            )
        if len(set(tasks)) < len(tasks):
            raise ValueError(
                f"config.data.{kind}_tasks={tuple(tasks)} names a task twice, which would give its problems twice."
            )
    solutions = config.sft.steps and not (config.data.mixture or config.data.train_file or config.dpo.pairs)
    if solutions and config.sft.examples_per_kind > config.data.train_per_kind:
        raise ValueError(
            f"config.sft.examples_per_kind={config.sft.examples_per_kind} exceeds config.data.train_per_kind="
            f"{config.data.train_per_kind}: the examples are the worked solutions of the first train problems."
        )
    drawn = config.rl.problems + round(config.rl.oversubscribe * config.rl.problems)
    problems = config.data.train_per_kind * (bool(config.data.text_tasks) + bool(config.data.image_tasks))
    if has_rl(config) and drawn > problems and not config.data.train_file:  # a file is looked at when it is read
        raise ValueError(
            f"config.rl.problems={config.rl.problems} with rl.oversubscribe={config.rl.oversubscribe} begins with "
            f"{drawn} problems, but there are {problems}. Raise config.data.train_per_kind or lower one of the two."
        )
    longest = config.sampling.prompt_tokens + config.sampling.max_tokens
    too_long = longest > config.rows.tokens or config.sampling.prompt_patches > config.rows.patches
    if too_long and _has_problems(config.data):
        raise ValueError(
            f"A row of config.rows.tokens={config.rows.tokens} tokens and config.rows.patches={config.rows.patches} "
            f"patches cannot hold the longest response: sampling.prompt_tokens + max_tokens = {longest}, "
            f"sampling.prompt_patches = {config.sampling.prompt_patches}."
        )


def _check_sources(config: ml_collections.ConfigDict) -> None:
    data = config.data
    for name, options in data.mixture.items():
        if bool(options.tasks) == bool(options.files):
            raise ValueError(
                f"config.data.mixture.{name} needs either tasks or files; it has tasks={tuple(options.tasks)} and "
                f"files={tuple(options.files)}."
            )
        for key, allowed in (("form", ("documents", "chat")), ("attention", ("partial", "full"))):
            if options[key] not in allowed:
                raise ValueError(f"config.data.mixture.{name}.{key}={options[key]!r} must be one of {allowed}.")
        if options.form == "chat" and options.attention == "full":
            raise ValueError(
                f"config.data.mixture.{name}: conversations do not attend to others. Set attention='partial'."
            )
        for key in ("records", "problems"):
            if options[key] < 1:
                raise ValueError(f"config.data.mixture.{name}.{key}={options[key]} must be at least 1.")
    if not config.sft.steps and not has_rl(config):
        raise ValueError("config.sft.steps=0, and config.rl.iterations=0 or a reward model: there is nothing to do.")
    if (data.train_file is None) != (data.heldout_file is None):
        raise ValueError(
            f"config.data.train_file={data.train_file!r} and config.data.heldout_file={data.heldout_file!r} belong "
            "together: give both or neither. An empty file has no problems."
        )
    if data.train_file and (data.text_tasks or data.image_tasks):
        raise ValueError(
            f"config.data.train_file={data.train_file!r} takes the place of tasks: set config.data.text_tasks=() and "
            "config.data.image_tasks=()."
        )
    alone = data.mixture and not has_rl(config)
    if not alone and not _has_problems(data):
        raise ValueError("There are no problems: name config.data.text_tasks, image_tasks, or train_file.")


def has_rl(config: ml_collections.ConfigDict) -> bool:
    """Whether the run goes on with RL after what the supervised loop does."""
    return bool(config.rl.iterations) and not config.reward_model.kind


def _has_problems(data: ml_collections.ConfigDict) -> bool:
    return bool(data.train_file or data.text_tasks or data.image_tasks)


def _check_reward_model(options: ml_collections.ConfigDict, model: ml_collections.ConfigDict) -> None:
    for name, allowed in (("kind", (None, "classic", "chain_of_thought")), ("objective", ("labels", "pairs"))):
        if options[name] not in allowed:
            raise ValueError(f"config.reward_model.{name}={options[name]!r} must be one of {allowed}.")
    if options.kind == "classic" and not model.scalar_head:
        raise ValueError("config.reward_model.kind='classic' gives numbers: set config.model.scalar_head=True.")


def _check_dpo(config: ml_collections.ConfigDict) -> None:
    name = f"config.dpo.pairs={config.dpo.pairs!r}"
    if not (config.init or config.model.path):
        raise ValueError(f"{name} needs a policy to begin with: set config.init, or config.model.path.")
    if config.data.mixture or config.reward_model.kind:
        raise ValueError(f"{name} is what the supervised loop learns: drop config.data.mixture and reward_model.kind.")
    if not config.sft.steps or config.dpo.beta <= 0:
        raise ValueError(
            f"{name}: config.sft.steps={config.sft.steps} and config.dpo.beta={config.dpo.beta} must be positive."
        )
    if config.dpo.alpha < 0:
        raise ValueError(f"{name}: config.dpo.alpha={config.dpo.alpha} must not be negative; 0 leaves its term out.")


def _check_trained(model: ml_collections.ConfigDict) -> None:
    if model.trainable is not None and not model.trainable:
        raise ValueError("config.model.trainable=() trains nothing. Name patterns ('decoder/.*'), or leave it out.")
    if model.lora.rank and model.lora.alpha <= 0:
        raise ValueError(f"config.model.lora.alpha={model.lora.alpha} must be positive: adapters count alpha / rank.")
    if model.base_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"config.model.base_dtype={model.base_dtype!r} must be 'float32' or 'bfloat16'.")
    if model.base_dtype != "float32" and model.trainable is None and not model.lora.rank:
        raise ValueError(
            f"config.model.base_dtype={model.base_dtype!r} is for parameters that are not trained, but all are, and "
            "masters stay float32. Set config.model.lora.rank or config.model.trainable, or leave it 'float32'."
        )


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (path, value), spelled as on the command line: ("rl.tau", 0.05)."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nearest_field(path: str) -> str | None:
    """None for a setting that there is, else the one that `path` looks most like."""
    known = dict(fields(default_config()))
    if match := re.fullmatch(r"data\.mixture\.([^.]+)\..+", path):
        known |= dict(fields(source(), f"data.mixture.{match[1]}."))
    return None if path in known else difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]


def _get(config, path):
    for name in path.split("."):
        config = config[name]
    return config
