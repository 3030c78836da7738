"""Which parameters are trained. Gradients and moments exist for those alone; the frozen ones only pass through."""

from collections.abc import Sequence

from kimi_jax.models import paths


def split(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """(trained, frozen): those whose path one of the patterns matches from end to end, and the rest.

    Raises ValueError when a pattern matches nothing.
    """
    flat = dict(paths.flatten(params))
    chosen = paths.matching(flat, patterns, purpose="the parameters to train")
    trained = paths.nest((path, leaf) for path, leaf in flat.items() if path in chosen)
    return trained, paths.nest((path, leaf) for path, leaf in flat.items() if path not in chosen)


def join(trained: dict, frozen: dict) -> dict:
    """The inverse of `split`."""
    return paths.nest([*paths.flatten(trained), *paths.flatten(frozen)])


def cast_frozen(params: dict, patterns: Sequence[str], dtype: str) -> dict:
    """The frozen ones in `dtype`. The trained ones stay float32 masters: small updates would be lost in 16 bits."""
    trained, frozen = split(params, patterns)
    return join(trained, paths.nest((path, leaf.astype(dtype)) for path, leaf in paths.flatten(frozen)))
