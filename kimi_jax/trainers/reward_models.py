"""Reward models: trained by the supervised loop, measured on held-out judgements, used as the reward of RL (§2.3.5).

    classic             one number per judgement prompt, the scalar at its last token; learnt from labels or pairs
    chain_of_thought    a model that was fine-tuned on judgements in text: reasoning, then a verdict

Both learn from problems whose prompt is a judgement prompt and whose answer is "true" or "false" (`tasks.equivalence`),
and the second from their solutions, which are judgements. A judge is a function from responses to verdicts, and works
in batches on the mesh that also samples and trains.
"""

import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.data.chat import encode_response
from kimi_jax.data.loaders import sft_batches, trained_tokens
from kimi_jax.data.packing import pack_rows, plan_rows
from kimi_jax.losses.preference import binary_cross_entropy, bradley_terry
from kimi_jax.rewards.judges import ClassicJudge, CoTJudge
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import setup as setup_lib
from kimi_jax.trainers import supervised
from kimi_jax.trainers.config import default_config
from kimi_jax.trainers.interrupt import StopRequest
from kimi_jax.trainers.setup import EVALUATION, Setup
from kimi_jax.trainers.supervised import SFTBatch, Stage
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.types import Example, Outcome, Problem, Request, StopReason

_LABELS = {"false": 0, "true": 1}
_STAGES = {"classic": "rm", "chain_of_thought": "sft"}


def train(setup: Setup, stop: StopRequest) -> dict:
    """Runs or resumes the training of a reward model; returns `accuracy` on the held-out judgements.

    Raises Interrupted, NonFiniteError, ValueError.
    """
    options = setup.config.reward_model
    for problem in (*setup.train, *setup.heldout):
        if problem.answer not in _LABELS:
            raise ValueError(
                f"A reward model learns from judgements, whose answers are 'true' or 'false'; that of problem "
                f"{problem.id!r} is {problem.answer!r}. Set config.data.text_tasks=('equivalence',)."
            )
    if options.kind == "chain_of_thought":
        params = supervised.train(setup, supervised.sft(setup), stop)
        return accuracy(make_judge(setup, params, votes=setup.config.rewards.votes), setup.heldout)
    params = supervised.train(setup, classic(setup), stop)
    if options.objective == "pairs":
        return pair_accuracy(functools.partial(scorer(setup), params), setup.heldout)
    return accuracy(make_judge(setup, params, votes=1), setup.heldout)


# --- training a classic one -------------------------------------------------------------------------------------------


def classic(setup: Setup) -> Stage:
    """A scalar at the last token of each prompt. The label stands where the next token would: it is the target."""
    config, score = setup.config.sft, scorer(setup)
    problems = setup.train[: config.examples_per_kind]
    heldout = setup.heldout[: config.eval_problems]
    pairs = setup.config.reward_model.objective == "pairs"
    if pairs:
        problems = [problem for pair in paired(problems) for problem in pair]
    prompts = setup.prompts(problems)
    examples = [encode_response(prompts[i], [_LABELS[problem.answer]]) for i, problem in enumerate(problems)]

    def evaluate(params):
        measure = pair_accuracy if pairs else lambda score, problems: accuracy(ClassicJudge(score), problems)
        found = measure(functools.partial(score, params), heldout)
        return {f"heldout_{name}": value for name, value in found.items() if isinstance(value, float)}

    return Stage(
        name=_STAGES["classic"],
        options=config,
        batches=sft_batches(
            examples,
            seed=setup.config.seed,
            rows_per_batch=config.rows,
            together=2 if pairs else 1,
            **setup.packing,
        ).map(SFTBatch),
        loss_fn=pairs_loss if pairs else labels_loss,
        weight=lambda batch: (2 if pairs else 1) / max(trained_tokens(batch.rows), 1),
        summarize=functools.partial(_summary, per="pairs" if pairs else "tokens"),
        evaluate=evaluate,
        reads="scalars",
    )


def labels_loss(scalars, batch: SFTBatch, hyper):
    return binary_cross_entropy(scalars, batch.rows.targets, batch.rows.loss_mask, weight=hyper["weight"])


def pairs_loss(scalars, batch: SFTBatch, hyper):
    R, T = scalars.shape
    # The members of a pair are neighbours in a row: segments 1 and 2, then 3 and 4, ...
    pair = np.arange(R)[:, None] * T + (batch.rows.segments - 1) // 2
    return bradley_terry(scalars, batch.rows.targets, batch.rows.loss_mask, pair, pairs=R * T, weight=hyper["weight"])


def paired(problems: Sequence[Problem]) -> list[tuple[Problem, Problem]]:
    """(correct, wrong): the n-th of each."""
    sides = [[problem for problem in problems if problem.answer == answer] for answer in ("true", "false")]
    return list(zip(*sides, strict=False))


def _summary(metrics: list[dict], *, per: str) -> dict:
    total = lambda name: sum(m[name] for m in metrics)  # noqa: E731
    return {"loss": total("nll") / total(per), "accuracy": total("right") / total(per)}


# --- judging ----------------------------------------------------------------------------------------------------------


def make_judge(setup: Setup, params: dict, *, votes: int) -> ClassicJudge | CoTJudge:
    """The reward model with these parameters, in the training layout. votes: of one that writes."""
    if setup.config.reward_model.kind == "classic":
        return ClassicJudge(functools.partial(scorer(setup), params))
    return policy_judge(setup, setup.to_rollout(params, None), votes=votes)


def policy_judge(setup: Setup, params: dict, *, votes: int) -> CoTJudge:
    """A model that judges in text with these parameters, in the sampling layout: in RL, those of the policy itself."""
    return CoTJudge(functools.partial(judgements, setup, params), votes)


def scorer(setup: Setup) -> Callable[[dict, Sequence[str]], np.ndarray]:
    """score(params, texts): the scalar at the last token of each text as a prompt, float32; nan if it is too long."""
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    scalars = jax.jit(setup.policy.scalars, out_shardings=everywhere)
    rows = setup.config.sft.micro_rows
    layout = {name: setup.packing[name] for name in ("row_tokens", "row_patches")}

    def score(params: dict, texts: Sequence[str]) -> np.ndarray:
        scores = np.full(len(texts), np.nan, np.float32)
        prompts = _prompts(setup, texts)
        readable = [i for i, prompt in enumerate(prompts) if prompt is not None]
        examples = [Example(prompts[i].tokens, np.zeros(len(prompts[i].tokens), bool)) for i in readable]
        plan = plan_rows(examples, **layout)
        for begin in range(0, len(plan), rows):
            packed, places = pack_rows(examples, plan[begin : begin + rows], num_rows=rows, **setup.packing)
            found = np.asarray(scalars(params, setup.put_rows(packed)))
            for index, (row, start) in places.items():
                scores[readable[index]] = found[row, start + len(examples[index].tokens) - 1]
        return scores

    return score


def judgements(setup: Setup, params: dict, texts: Sequence[str], votes: int) -> list[list[str]]:
    """So many judgements of each text, the likeliest if it is one; none of a text that is too long, "" for a cut one.

    The noise is drawn from the text, so that a response is judged alike whenever and beside whatever it is judged.
    params: sampling layout.
    """
    distinct = list(dict.fromkeys(texts))
    prompts = dict(zip(distinct, _prompts(setup, distinct), strict=True))
    asked = [(text, vote) for text in distinct if prompts[text] is not None for vote in range(votes)]
    flight = setup.engine.start(
        params,
        [Request(prompts[t], zlib.crc32(f"{vote} {t}".encode()), setup.engine.max_tokens) for t, vote in asked],
        run_key=setup.key(EVALUATION),
        settings=SamplingSettings.of(temperature=0.0 if votes == 1 else 1.0, end_ids=setup.chat.end_ids),
    )
    written = {}
    while not flight.done:
        for i, segment in flight.advance():
            whole = segment.stop == StopReason.END
            written[asked[i]] = setup.engine.decode_text(segment.tokens) if whole else ""
    return [[written[text, vote] for vote in range(votes) if (text, vote) in written] for text in texts]


def _prompts(setup: Setup, texts: Sequence[str]):
    """Texts as prompts; None where one is longer than the model was made for."""
    prompts = [setup.chat.encode_prompt(text, ()) for text in texts]
    return [prompt if len(prompt.tokens) <= setup.engine.prompt_tokens else None for prompt in prompts]


def load_judge(
    workdir: pathlib.Path, mesh: jax.sharding.Mesh, *, votes: int, option: str = "config.rewards.judge"
) -> ClassicJudge | CoTJudge:
    """The reward model that scripts/train.py wrote there. option: what the workdir was given as, for messages.

    Raises ValueError or FileNotFoundError if there is none.
    """
    remedy = f"{option}={str(workdir)!r} must be the workdir of a reward model (configs/rm_*.py)"
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{remedy}: it has no config.json.")
    config = default_config().unlock()
    config.update(ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text())))
    config.model.attention = "auto"
    if config.reward_model.kind not in _STAGES:
        raise ValueError(f"{remedy}: what was trained there is a policy.")
    if config.reward_model.kind == "classic" and config.reward_model.objective == "pairs":
        raise ValueError(
            f"{remedy} that learnt from labels: this one learnt from pairs, so its scores rank responses, but no score "
            "is the border between right and wrong."
        )
    checkpoint = workdir / "checkpoints" / _STAGES[config.reward_model.kind]
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{remedy}: it has no checkpoint yet.")
    chat = setup_lib.make_chat(config, workdir, [])
    policy = setup_lib.make_policy(config, mesh, setup_lib.model_config(config, chat.tokenizer.vocab_size))
    setup = Setup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        policy=policy,
        chat=chat,
        train=[],
        heldout=[],
        engine=setup_lib.make_engine(config, mesh, policy, chat),
        to_rollout=make_handover(policy, mesh, dtype=config.model.sampling_dtype or policy.config.dtype),
    )
    with Checkpointer.reader(checkpoint) as checkpoints:
        params = checkpoints.restore({"params": setup.params_like}, partial=True)[1]["params"]
    return make_judge(setup, params, votes=votes)


# --- measuring --------------------------------------------------------------------------------------------------------


def accuracy(judge: ClassicJudge | CoTJudge, problems: Sequence[Problem]) -> dict:
    """Shares: right verdicts (`accuracy`; ungradable is not right), `false_positives` among the wrong responses,
    `false_negatives` among the correct, `ungradable`; and the accuracy `by_difficulty`."""
    outcomes = np.array([verdict.outcome.value for verdict in judge.read([problem.prompt for problem in problems])])
    truth = np.array([problem.answer == "true" for problem in problems])
    difficulty = np.array([problem.difficulty for problem in problems])
    right = outcomes == np.where(truth, Outcome.CORRECT.value, Outcome.WRONG.value)
    return {
        "accuracy": _mean(right),
        "false_positives": _mean(outcomes[~truth] == Outcome.CORRECT.value),
        "false_negatives": _mean(outcomes[truth] == Outcome.WRONG.value),
        "ungradable": _mean(outcomes == Outcome.UNGRADABLE.value),
        "by_difficulty": {str(d): _mean(right[difficulty == d]) for d in sorted(set(difficulty.tolist()))},
        "n": len(problems),
    }


def pair_accuracy(score: Callable[[Sequence[str]], np.ndarray], problems: Sequence[Problem]) -> dict:
    """Share of pairs whose correct response has the higher score; nan if there are no pairs."""
    pairs = paired(problems)
    better, worse = (score([pair[side].prompt for pair in pairs]) for side in (0, 1))
    margins = better - worse
    return {"accuracy": _mean(margins > 0), "n": len(margins)}


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
