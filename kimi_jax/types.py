"""The nouns of the project. Verbs live elsewhere.

These are the host nouns, plain dataclasses; those of the device, pytrees of arrays, are in `arrays`.
`rl.batch.build_minibatches` is the one place where the first become the second on the way to an update.

Axis letters, everywhere in the project:

    R  packed rows          T  tokens of a row         P  patches of a row        C  values of a patch
    B  sampled rows         S  slots of a KV cache     N  responses of a batch    k  responses per problem
    L  layers               D  model width             H  query heads             K  key/value heads
    G  = H / K              E  width of a head         F  width of the MLP        V  vocabulary
"""

import dataclasses
import enum
from concurrent.futures import Future

import numpy as np

IMAGE_MARKER = "<image>"  # stands once in a prompt for each of its images, where the image belongs


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One task to solve. `id` is its canonical content: problems that ask the same share it, whatever their wording."""

    id: str
    task: str  # a name in tasks.TASKS, which also holds the verifier
    prompt: str  # contains IMAGE_MARKER once per image
    answer: str  # the ground truth y*
    difficulty: int = 0
    images: tuple[np.ndarray, ...] = ()  # each uint8 [height, width, 3]
    solution: str = ""  # a worked chain of thought that ends with the answer; "" where none is known

    @property
    def kind(self) -> str:
        return "image" if self.images else "text"


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePatches:
    """An image cut for the vision tower, patches of one merge block next to each other (`data.images.patchify`).

    Towers that attend within windows read the patches window by window, while the language model reads in lines. With
    windows of 2 x 2 merge blocks, the 3 x 3 blocks of an image are stored in the order

        0 1 | 4
        2 3 | 5        windows 0 0 0 0 1 1 2 2 3, each merge² times      order 0 1 4 2 3 5 6 7 8
        ----+--
        6 7 | 8
    """

    patches: np.ndarray  # float32 [P, C] in [-1, 1]
    positions: np.ndarray  # int32 [P, 2], the (row, column) of each patch
    num_tokens: int  # how many tokens of the language model it becomes: P / merge²
    grid: tuple[int, int]  # rows and columns of patches
    windows: np.ndarray | None = None  # int32 [P], the window of each patch, 0, 1, ..., in one piece each; None: none
    order: np.ndarray | None = None  # int32 [num_tokens], the merge block that token j stands for; None: the j-th


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A problem as the model reads it: token ids with one image token per merged patch, and the patches."""

    tokens: np.ndarray  # int32 [n]
    images: tuple[ImagePatches, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A token sequence to learn from. `trained[t]` says that token t is a target of the loss."""

    tokens: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n]
    images: tuple[ImagePatches, ...] = ()


class StopReason(enum.StrEnum):
    END = "end"  # the model wrote an end token, which is the last token of the response
    LENGTH = "length"  # the token budget was used up
    REPETITION = "repetition"  # it went round in circles (`sampling.repetition`)
    STRING = "string"  # it contains a stop string, which its last token completes


class Outcome(enum.StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    UNGRADABLE = "ungradable"  # the verifier failed; says nothing about the response


@dataclasses.dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    detail: str = ""  # the extracted answer, or why there is none
    well_formed: bool = True  # false: the response has no answer that could be judged, or several


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One response to be written, or to be continued. Requests that hold the same Prompt object share its cache."""

    prompt: Prompt
    serial: int  # the number from which all randomness of the response is drawn (`sampling.logits`)
    budget: int  # most tokens to add
    prefix: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [m], written before


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """What one call of the sampler added to a response."""

    tokens: np.ndarray  # int32 [n], the end token included
    logprobs: np.ndarray  # float32 [n], under the policy that sampled
    stop: StopReason | None  # None: it was interrupted and can be continued


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """One finished response."""

    serial: int
    tokens: np.ndarray  # int32 [n], the end token included
    logprobs: np.ndarray  # float32 [n], under the policy that sampled
    versions: np.ndarray  # int32 [n], the RL iteration whose weights sampled each token
    stop: StopReason
    text: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(eq=False)
class OpenResponse:
    """A response in the making, over several iterations if need be. Grows by segments."""

    serial: int
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [n]
    logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))  # float32 [n]
    versions: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [n]
    stop: StopReason | None = None  # None while it is open
    verdict: Future[Verdict] | None = None  # on its way since it stopped

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(eq=False)
class OpenGroup:
    """The responses to one problem on their way to a `RolloutGroup`."""

    problem: int  # index among the training problems
    born: int  # the RL iteration that drew it
    responses: list[OpenResponse]

    @property
    def complete(self) -> bool:
        return all(response.stop for response in self.responses)


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutGroup:
    """The k responses to one problem, and what the verifier said of each."""

    problem: Problem
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...] = ()
