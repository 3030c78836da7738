"""The replay buffer: groups that are not complete yet, kept from one iteration to the next (k1.5 §2.6.2).

In a checkpoint it is flat arrays: the tokens of all responses one after the other, how many each has, and what is known
of each response and group. Prompts and pictures are not in it: they come from the problems. Nor are verdicts: who
resumes asks for them again.
"""

from collections.abc import Mapping

import numpy as np

from kimi_jax.types import OpenGroup, OpenResponse, StopReason

_STOPS = (None, *StopReason)
_PER_TOKEN = {"tokens": np.int32, "logprobs": np.float32, "versions": np.int32}
_PER_RESPONSE = {"serial": np.int64, "length": np.int64, "stop": np.int8}
_PER_GROUP = {"problem": np.int64, "born": np.int64, "members": np.int64}


class ReplayBuffer:
    """Open groups, oldest first."""

    def __init__(self) -> None:
        self.groups: list[OpenGroup] = []

    @property
    def open_responses(self) -> list[OpenResponse]:
        return [response for group in self.groups for response in group.responses if not response.stop]

    def sizes(self) -> dict[str, int]:
        """What a checkpoint must note besides the arrays, to restore them: {"tokens", "responses", "groups"}."""
        responses = [response for group in self.groups for response in group.responses]
        return {"tokens": sum(map(len, responses)), "responses": len(responses), "groups": len(self.groups)}

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        responses = [response for group in self.groups for response in group.responses]
        columns: dict[str, list] = {
            "serial": [response.serial for response in responses],
            "length": [len(response) for response in responses],
            "stop": [_STOPS.index(response.stop) for response in responses],
            "problem": [group.problem for group in self.groups],
            "born": [group.born for group in self.groups],
            "members": [len(group.responses) for group in self.groups],
        }
        arrays = {name: np.array(columns[name], dtype) for name, dtype in (_PER_RESPONSE | _PER_GROUP).items()}
        for name, dtype in _PER_TOKEN.items():
            arrays[name] = np.concatenate([np.zeros(0, dtype), *(getattr(response, name) for response in responses)])
        return arrays

    @staticmethod
    def like(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Arrays of the shapes that `state` had when `sizes` was noted. Raises ValueError if it is no such note."""
        if sorted(sizes) != ["groups", "responses", "tokens"]:
            raise ValueError(
                f"The replay buffer of a checkpoint notes tokens, responses and groups, not {sorted(sizes)}: it was "
                "written by another version. Continue it there, or start in an empty --workdir."
            )
        kinds = (("tokens", _PER_TOKEN), ("responses", _PER_RESPONSE), ("groups", _PER_GROUP))
        return {name: np.zeros(sizes[kind], dtype) for kind, names in kinds for name, dtype in names.items()}

    def restore(self, state: Mapping[str, np.ndarray], *, problems: int) -> None:
        """Takes over what `state` returned.

        Raises ValueError when the arrays contradict each other, or name problems beyond the `problems` there are; the
        buffer is unchanged then.
        """
        if missing := sorted((_PER_TOKEN | _PER_RESPONSE | _PER_GROUP).keys() - state.keys()):
            raise ValueError(
                f"The saved replay buffer lacks {', '.join(missing)}. Resume with the version that wrote it."
            )
        members, lengths = state["members"], state["length"]
        ends = np.cumsum(lengths)
        outside = lambda name, count: ((state[name] < 0) | (state[name] >= count)).any()  # noqa: E731
        contradictions = {
            "groups have other numbers of responses than there are": members.sum() != len(lengths)
            or (members < 1).any(),
            "responses have other numbers of tokens than there are": (lengths < 0).any()
            or any(lengths.sum() != len(state[name]) for name in _PER_TOKEN),
            "it has problems that this run does not have": outside("problem", problems),
            "it has unknown stop reasons": outside("stop", len(_STOPS)),
        }
        if wrong := [what for what, is_so in contradictions.items() if is_so]:
            raise ValueError(
                f"The saved replay buffer does not match: {'; '.join(wrong)}. Resume with the same config."
            )
        responses = []
        for r, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            tokens, logprobs, versions = (state[name][end - length : end].copy() for name in _PER_TOKEN)
            stop = _STOPS[state["stop"][r]]
            responses.append(OpenResponse(int(state["serial"][r]), tokens, logprobs, versions, stop))
        groups, begin = [], 0
        for problem, born, count in zip(state["problem"], state["born"], members, strict=True):
            groups.append(OpenGroup(int(problem), int(born), responses[begin : begin + count]))
            begin += count
        self.groups = groups
