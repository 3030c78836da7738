"""Which problems to try next: curriculum and prioritized sampling (k1.5 §2.3.4).

    weight of problem i = curriculum(difficulty_i, iteration) · max(1 − s_i, floor)

s_i is the success rate of problem i so far, from the 0/1 correctness of its gradable responses alone. It starts at a
prior and moves with the evidence, as if `prior_visits` responses of rate `prior_success` had come before the first:

    s_i = (correct_i + prior_success · prior_visits) / (gradable_i + prior_visits)

So no weight is 0/0, and the floor keeps a problem that is always solved from never being tried again.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Curriculum = Literal["uniform", "hard_after"]


class PromptSampler:
    """Draws the problems of an iteration. Its whole state is two counts per problem (`state`, `restore`)."""

    def __init__(
        self,
        difficulties: np.ndarray,
        *,
        seed: int,
        curriculum: Curriculum,
        curriculum_iterations: int,
        hard_difficulty: int,
        prior_success: float,
        prior_visits: float,
        floor: float,
    ):
        """
        Args:
            difficulties: int [n], label of each problem, larger is harder.
            seed: of the draws.
            curriculum: "uniform" treats all difficulties alike; "hard_after" does so in iterations 0 ..
                curriculum_iterations − 1 and then draws only problems with difficulty ≥ hard_difficulty.
            curriculum_iterations, hard_difficulty: see "hard_after"; "uniform" ignores them.
            prior_success: success rate that an unvisited problem is taken to have, in [0, 1].
            prior_visits: how many responses that guess is worth, > 0.
            floor: smallest priority of a solved problem, in (0, 1].

        Raises:
            ValueError: if one of these is out of range, or no problem is hard enough for "hard_after".
        """
        self.difficulties = np.array(difficulties)
        if self.difficulties.ndim != 1 or self.difficulties.size == 0:
            raise ValueError(
                f"PromptSampler needs one difficulty per problem, a non-empty vector; got shape "
                f"{self.difficulties.shape}."
            )
        if not (0 <= prior_success <= 1 and prior_visits > 0 and 0 < floor <= 1):
            raise ValueError(
                "PromptSampler needs prior_success in [0, 1], prior_visits > 0 (or an unvisited problem has success "
                "rate 0/0) and floor in (0, 1] (or a solved problem is never drawn again); "
                f"got prior_success={prior_success}, prior_visits={prior_visits}, floor={floor}."
            )
        if curriculum not in ("uniform", "hard_after"):
            raise ValueError(f"Unknown curriculum {curriculum!r}: use 'uniform' or 'hard_after'.")
        if curriculum == "hard_after" and self.difficulties.max() < hard_difficulty:
            raise ValueError(
                f"Curriculum 'hard_after' would leave no problem: hard_difficulty={hard_difficulty}, but the hardest "
                f"problem has difficulty {self.difficulties.max()}. Lower hard_difficulty or use 'uniform'."
            )
        self.seed = seed
        self.curriculum = curriculum
        self.curriculum_iterations = curriculum_iterations
        self.hard_difficulty = hard_difficulty
        self.prior_success = prior_success
        self.prior_visits = prior_visits
        self.floor = floor
        self._correct = np.zeros(self.difficulties.size, np.int64)
        self._gradable = np.zeros(self.difficulties.size, np.int64)

    @property
    def success_rates(self) -> np.ndarray:
        """s_i, float64 [n], the prior included."""
        return (self._correct + self.prior_success * self.prior_visits) / (self._gradable + self.prior_visits)

    def weights(self, iteration: int) -> np.ndarray:
        """float64 [n], not normalized; 0 only for what the curriculum excludes."""
        priority = np.maximum(1.0 - self.success_rates, self.floor)
        if self.curriculum == "uniform" or iteration < self.curriculum_iterations:
            return priority
        return np.where(self.difficulties >= self.hard_difficulty, priority, 0.0)

    def draw(self, iteration: int, count: int) -> np.ndarray:
        """Indices of `count` distinct problems, int [count], as if drawn one by one in proportion to the weights.

        A pure function of (seed, iteration, count, state): asked again, it answers the same.

        Raises:
            ValueError: if the curriculum leaves fewer than `count` problems, or count < 1.
        """
        weights = self.weights(iteration)
        available = np.count_nonzero(weights)
        if not 1 <= count <= available:
            raise ValueError(
                f"Cannot draw {count} distinct problems in iteration {iteration}: curriculum {self.curriculum!r} has "
                f"{available} of {weights.size}. Draw between 1 and {available}, add problems or widen the curriculum."
            )
        # A race of exponential clocks with these rates: the order of arrival is a weighted draw without replacement.
        rng = np.random.default_rng((self.seed, iteration))
        with np.errstate(divide="ignore"):
            arrival = rng.standard_exponential(weights.size) / weights
        return np.argsort(arrival, kind="stable")[:count]

    def update(self, index: int, correct: int, gradable: int) -> None:
        """Counts the responses to problem `index` that could be graded, and those of them that were correct.

        Raises:
            IndexError: for an index outside 0 .. n − 1.
            ValueError: unless 0 ≤ correct ≤ gradable, both integers.
        """
        if not 0 <= index < self.difficulties.size:
            raise IndexError(f"No problem {index}: this sampler has problems 0 to {self.difficulties.size - 1}.")
        if correct != int(correct) or gradable != int(gradable) or not 0 <= correct <= gradable:
            raise ValueError(
                f"update() counts responses: 0 <= correct <= gradable, whole numbers; got correct={correct}, "
                f"gradable={gradable}. Pass the number of correct verdicts, not a sum of shaped rewards."
            )
        self._correct[index] += int(correct)
        self._gradable[index] += int(gradable)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold: `correct` and `gradable`, each int64 [n]."""
        return {"correct": self._correct.copy(), "gradable": self._gradable.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state()` returned, on a sampler built with the same problems.

        Raises:
            ValueError: if names or shapes do not fit; the sampler is unchanged then.
        """
        expected = {name: value.shape for name, value in self.state().items()}
        given = {name: np.shape(value) for name, value in state.items()}
        if given != expected:
            raise ValueError(
                f"This is not the state of a sampler over {self.difficulties.size} problems: expected {expected}, got "
                f"{given}. Build the sampler from the problem set that the checkpoint was written with."
            )
        self._correct = np.array(state["correct"], np.int64)
        self._gradable = np.array(state["gradable"], np.int64)
