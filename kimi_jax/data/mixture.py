"""Several sources in one stream, with shares that change over the steps of a run (k1.5 §2.5: language, then vision).

`grain.MapDataset.mix` keeps its weights for good. Here the source of row i is the one whose interval of [0, 1) holds

    u_i = frac(u_0 + i φ),   φ = 0.618... (golden ratio),   intervals as long as the shares at the step of row i.

The multiples of φ are spread so evenly that any n rows in sequence keep to the schedule within O(log n) rows. All is a
function of the index and the seed, so there is no state: what a resumed run gets, and what a run of more steps gets up
to its length, is the same to the row.
"""

from collections.abc import Mapping, Sequence

import grain
import numpy as np

Schedule = Sequence[tuple[int, float]]  # (step, weight), steps ascending; linear in between, constant outside

_PHI = np.uint64(0x9E3779B97F4A7C15)  # φ in units of 2^-64


def shares(weights: Mapping[str, Schedule], steps: int) -> np.ndarray:
    """The share of each source at each step, from 0: float64 [sources, steps], in the order of `weights`.

    Raises ValueError, with the name of the source, for weights that are negative or no schedule, and, with the step,
    when they sum to zero.
    """
    if not weights:
        raise ValueError("a mixture needs at least one source")
    for name, schedule in weights.items():
        changes = [step for step, _ in schedule]
        if not changes or sorted(set(changes)) != changes or changes[0] < 0:
            raise ValueError(
                f"the weight of {name!r} changes at the steps {changes}; write ((step, weight), ...) with steps that "
                "ascend from 0 or later"
            )
        if wrong := [weight for _, weight in schedule if not (weight >= 0 and np.isfinite(weight))]:
            raise ValueError(
                f"the weight of {name!r} is {wrong[0]}; weights are at least 0, and only their ratios count"
            )
    at = np.arange(steps)
    found = np.stack([np.interp(at, [s for s, _ in each], [w for _, w in each]) for each in weights.values()])
    total = found.sum(0)
    if not total.all():
        raise ValueError(
            f"the weights of {', '.join(weights)} sum to zero at step {int(np.argmin(total))}: give one of them more"
        )
    return found / total


def choose(
    weights: Mapping[str, Schedule], *, steps: int, rows_per_step: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(sources, places): row i is row places[i] of source sources[i], an index into `weights`. Both int [rows].

    Of each source the rows 0, 1, 2, ... are taken in this order, so none is left out and none comes twice.
    Raises what `shares` raises.
    """
    upto = np.cumsum(shares(weights, steps), axis=0)
    upto /= upto[-1]
    first = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    u = (first + np.arange(steps * rows_per_step, dtype=np.uint64) * _PHI >> np.uint64(11)) * 2.0**-53
    above = np.zeros((steps, rows_per_step), np.int32)
    for bound in upto[:-1]:
        above += u.reshape(steps, rows_per_step) >= bound[:, None]
    sources = above.ravel()
    places = np.zeros(len(sources), np.int64)
    for source in range(len(weights)):
        places[sources == source] = np.arange(np.count_nonzero(sources == source))
    return sources, places


def mixed(
    sources: Mapping[str, grain.MapDataset],
    weights: Mapping[str, Schedule],
    *,
    steps: int,
    rows_per_step: int,
    seed: int,
) -> grain.MapDataset:
    """The rows of `steps` steps, taken from endless datasets of rows as `choose` says.

    Raises ValueError when the names of sources and weights differ, and what `shares` raises.
    """
    if sources.keys() != weights.keys():
        raise ValueError(
            f"the mixture names {', '.join(weights) or 'nothing'}, but there are the sources "
            f"{', '.join(sources) or '(none)'}; give each source one weight"
        )
    chosen, places = choose(weights, steps=steps, rows_per_step=rows_per_step, seed=seed)
    datasets = [sources[name] for name in weights]
    return grain.MapDataset.range(len(chosen)).map(lambda i: datasets[chosen[i]][int(places[i])])
