"""Parameters named by their paths, such as "decoder/runs/0/attn/q_proj/kernel", and chosen by patterns over them."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_SHOWN = 5


def flatten(params: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts with its path."""
    for name, child in params.items():
        if isinstance(child, dict):
            yield from flatten(child, f"{prefix}{name}/")
        else:
            yield prefix + name, child


def nest(flat: Iterable[tuple[str, Any]]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat:
        *parents, name = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return tree


def matching(paths: Iterable[str], patterns: Sequence[str], *, purpose: str) -> set[str]:
    """Those of `paths` that one of the regular expressions matches from end to end.

    Raises ValueError when a pattern is none, or matches nothing; `purpose` says in the message what they are for.
    """
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        try:
            matched = [path for path in paths if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(f"The pattern {pattern!r} of {purpose} is no regular expression: {error}.") from error
        if not matched:
            near = ", ".join(map(repr, _near(pattern, paths)))
            raise ValueError(
                f"The pattern {pattern!r} of {purpose} matches no path from end to end. Near it are {near}."
            )
        found.update(matched)
    return found


def _near(pattern: str, paths: Sequence[str]) -> list[str]:
    """Paths, and patterns of what lies below one, that look most like it."""
    rooms = {"/".join(path.split("/")[:depth]) + "/.*" for path in paths for depth in range(1, path.count("/") + 1)}
    return difflib.get_close_matches(pattern, [*paths, *sorted(rooms)], n=_SHOWN, cutoff=0.0)
