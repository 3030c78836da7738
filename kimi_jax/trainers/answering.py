"""A policy on disk as a plain function that answers problems: what curation asks (`curation.asking.Generate`)."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from kimi_jax.curation.asking import Answer, Generate
from kimi_jax.data.chat import ChatFormat
from kimi_jax.data.hf_chat import load_chat_format
from kimi_jax.models import hf
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import origin
from kimi_jax.trainers import setup as setup_lib
from kimi_jax.trainers.config import default_config, fields
from kimi_jax.training import sharding
from kimi_jax.types import Problem, Request, Segment, StopReason

_SMALLEST_PROMPT = 64  # tokens or patches that there is room for at least


@dataclasses.dataclass(frozen=True)
class Answerer:
    """identity: of the weights, as far as names and sizes tell. instructed: was published, and does as it is told."""

    identity: str
    instructed: bool
    mesh: jax.sharding.Mesh
    generate: Generate


def load(
    *,
    model: pathlib.Path | None,
    checkpoint: pathlib.Path | None,
    system: str = "",
    dtype: str | None,
    rows: int,
    max_tokens: int,
    pages: int | None,
    tensor: int,
    seed: int,
) -> Answerer:
    """A published model, or a run of ours or one of its checkpoints (`origin.find`); one of the two.

    Args:
        system: the system message of a published model.
        dtype: that it computes in; None: that of the model.
        rows: answers in flight, rounded up to a multiple of what they are split over.
        max_tokens: the longest answer.
        pages: of the cache; None: enough for all rows at full length.
        tensor: devices that share a row; the others share the rows.

    Raises:
        ValueError, FileNotFoundError: it is not there, or damaged.
    """
    config = default_config()
    found = None
    if model is not None:
        config.model.path, config.model.system = str(model), system
    else:
        found = origin.find(checkpoint, option="--checkpoint")
        config = _config(found.workdir)
    config.data.image_tasks = ()
    if dtype:
        config.model.dtype = dtype
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=tensor)
    if model is not None:
        setup_lib.check_model(config, mesh)
        chat: ChatFormat = load_chat_format(setup_lib.hf_directory(model), system=system)
    else:
        chat = setup_lib.make_chat(config, found.workdir, [])
    policy = setup_lib.make_policy(config, mesh, setup_lib.model_config(config, chat.tokenizer.vocab_size))
    dtype = config.model.sampling_dtype or policy.config.dtype
    like = setup_lib.params_like(config, policy, mesh)
    if found:
        masters, identity = found.load(like), f"{found.stage.resolve()}/{found.step}"
    else:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), like)
        directory = setup_lib.hf_directory(model)
        masters, identity = hf.load_params(directory, like), _fingerprint(directory)
    params = make_handover(policy, mesh, dtype=dtype)(masters, None)
    del masters
    make_engine = functools.partial(
        setup_lib.make_engine,
        config,
        mesh,
        policy,
        chat,
        rows=-(-rows // mesh.shape["data"]) * mesh.shape["data"],
        pages=pages,
        max_tokens=max_tokens,
    )
    return Answerer(
        identity=f"{identity} {max_tokens} {system} {dtype}",
        instructed=bool(config.model.path),
        mesh=mesh,
        generate=functools.partial(
            generate, params=params, chat=chat, make_engine=make_engine, max_tokens=max_tokens, key=jax.random.key(seed)
        ),
    )


def generate(
    problems: Sequence[Problem],
    serials: Sequence[Sequence[int]],
    *,
    temperature: float,
    prefix: str,
    budget: int | None,
    params: dict,
    chat: ChatFormat,
    make_engine,
    max_tokens: int,
    key: jax.Array,
) -> list[list[Answer]]:
    """See `curation.asking.Generate`. params: sampling layout. make_engine: from the room for prompts to an engine.

    Raises ValueError that names a problem which the model cannot read.
    """
    prompts = [chat.encode_problem(problem) for problem in problems]
    patches = [sum(len(image.patches) for image in prompt.images) for prompt in prompts]
    engine: Engine = make_engine(
        prompt_tokens=_room(max(len(prompt.tokens) for prompt in prompts)),
        prompt_patches=_room(max(patches)) if any(patches) else 0,
    )
    for problem, prompt in zip(problems, prompts, strict=True):
        engine.check(prompt, f"problem {problem.id!r}")
    begun = np.asarray(chat.tokenizer.encode(prefix) if prefix else [], np.int32)
    budget = min(budget or max_tokens, max_tokens - len(begun))
    requests = [
        (i, Request(prompt, serial, budget, begun))
        for i, (prompt, own) in enumerate(zip(prompts, serials, strict=True))
        for serial in own
    ]
    settings = SamplingSettings.of(temperature=temperature, end_ids=chat.end_ids)
    flight = engine.start(params, [request for _, request in requests], run_key=key, settings=settings)
    segments: dict[int, Segment] = {}
    while not flight.done:
        segments.update(flight.advance())
    answers: list[list[Answer]] = [[] for _ in problems]
    for j, (i, _) in enumerate(requests):
        tokens = segments[j].tokens
        stop = segments[j].stop or StopReason.LENGTH
        answers[i].append(Answer(engine.decode_text(tokens), len(tokens), stop))
    return answers


def _room(size: int) -> int:
    """A power of two, so that few shapes are compiled."""
    return max(_SMALLEST_PROMPT, 1 << (size - 1).bit_length())


def _config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """That of the run, for whatever device is here; what it does not say, because it is older, is as by default."""
    path = workdir / "config.json"
    try:
        saved = ml_collections.ConfigDict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}), so it is unknown what the run trained.") from error
    config, known = default_config().unlock(), dict(fields(default_config()))
    config.update_from_flattened_dict({name: value for name, value in fields(saved) if name in known})
    config.model.attention = "auto"
    if config.model.path:
        config.model.path = str(workdir / "hf")
    return config


def _fingerprint(directory: pathlib.Path) -> str:
    """Of the names, sizes and times of the files of a model."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir())
    return f"{directory.resolve()} {hashlib.blake2b(repr(files).encode(), digest_size=8).hexdigest()}"
