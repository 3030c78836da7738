"""The length reward: among the responses to one problem, short ones that are right beat long ones (k1.5 §2.3.3)."""

import numpy as np


def length_reward(correct: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The length reward of each response to one problem (k1.5 §2.3.3).

        λ_i = 0.5 − (len_i − min_len) / (max_len − min_len)      in [−0.5, 0.5]

        λ_i            if response i is correct
        min(0, λ_i)    if it is wrong: being short is no merit then, being long is still a fault
        0              for all, if max_len = min_len

    Args:
        correct: bool [k], of the gradable responses only; they alone set min_len and max_len.
        lengths: int [k], in tokens, the end token included.

    Returns:
        float64 [k].

    Raises:
        ValueError: if the two are not vectors of one length.
    """
    correct, lengths = np.asarray(correct, bool), np.asarray(lengths, np.float64)
    if correct.ndim != 1 or correct.shape != lengths.shape:
        raise ValueError(
            f"length_reward() takes one verdict and one length per response of a problem, two vectors of shape [k]; "
            f"got {correct.shape} and {lengths.shape}."
        )
    if lengths.size == 0 or lengths.max() == lengths.min():
        return np.zeros(lengths.shape)
    lam = 0.5 - (lengths - lengths.min()) / (lengths.max() - lengths.min())
    return np.where(correct, lam, np.minimum(0.0, lam))


def length_weight(iteration: int, *, weight: float, warmup_iterations: int) -> float:
    """0 in iterations 0 .. warmup_iterations − 1, then `weight`: on from the start it slows training (k1.5 §2.3.3)."""
    return 0.0 if iteration < warmup_iterations else weight
