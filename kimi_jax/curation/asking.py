"""Many answers of a model to many problems, judged and kept on disk, so that asking can be stopped and gone on with.

What samples and what judges are plain functions. The noise of an answer is drawn from its serial number, and that from
the question, so that answers depend neither on the order of the problems nor on interruptions.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from kimi_jax.curation.duplicates import picture_digest
from kimi_jax.types import Outcome, Problem, StopReason, Verdict

Judge = Callable[[Sequence[tuple[Problem, str]]], list[Verdict]]  # of answers, each with its problem


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str  # what stood before it as a prefix is no part of it
    tokens: int
    stop: StopReason


class Generate(Protocol):
    def __call__(
        self,
        problems: Sequence[Problem],
        serials: Sequence[Sequence[int]],
        *,
        temperature: float,
        prefix: str,
        budget: int | None,
    ) -> list[list[Answer]]:
        """One answer per serial number to each problem, of which it reads prompt and images alone.

        prefix: what each answer begins with. budget: most tokens of an answer; None: as many as there is room for.
        """


@dataclasses.dataclass(frozen=True)
class Question:
    """problem: by which answers are judged. prompt: what the model is asked. serials: of the answers."""

    problem: Problem
    prompt: str
    serials: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer and its verdict. text: what was judged, or "" if texts are not kept."""

    serial: int
    outcome: str
    detail: str
    tokens: int
    stop: str
    text: str


def question(problem: Problem, prompt: str, *, purpose: str, seed: int, n: int) -> Question:
    """With serial numbers of its own for each purpose and seed."""
    serials = (zlib.crc32(f"{purpose} {seed} {prompt} {problem.id} {j}".encode()) for j in range(n))
    return Question(problem, prompt, tuple(serials))


class Ledger:
    """A file with one JSON object per line, each under a key; a line that was torn by a crash counts as not there."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
            del lines[-1]
        self._found: dict[str, list[dict[str, Any]]] = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self._found[record["key"]] = record["answers"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is none of ours: {line[:80]!r}. Delete it.") from error

    def get(self, key: str) -> list[Judged] | None:
        return [Judged(**fields) for fields in self._found[key]] if key in self._found else None

    def add(self, entries: Iterable[tuple[str, Problem, list[Judged]]]) -> None:
        text = ""
        for key, problem, answers in entries:
            self._found[key] = [dataclasses.asdict(answer) for answer in answers]
            text += json.dumps({"key": key, "problem": problem.id, "answers": self._found[key]}) + "\n"
        with open(self._path, "ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())


def ask(
    questions: Sequence[Question],
    *,
    generate: Generate,
    judge: Judge,
    ledger: Ledger,
    source: str,
    temperature: float,
    batch: int,
    prefix: str = "",
    budget: int | None = None,
    read: Callable[[str], str] = lambda text: text,
    keep_texts: bool,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[list[Judged]]:
    """The judged answers to each question, from the ledger where it has them.

    Args:
        source: names model and judge; what another source wrote to the ledger is not used.
        batch: questions that are put, judged and stored together.
        prefix, budget: see `Generate`.
        read: what of an answer is judged, with the prefix before it.
        progress: told how many questions were done.

    Raises:
        ValueError: nothing could be graded in a whole batch, or, at the end, of some questions. Those are not stored:
            a judge that fails says nothing about a problem.
    """
    settings = [source, temperature, prefix, budget, keep_texts]
    keys = [_key(question, settings) for question in questions]
    found = [ledger.get(key) for key in keys]
    todo = [i for i, answers in enumerate(found) if answers is None]
    progress(len(questions) - len(todo))
    failed: list[tuple[Problem, str]] = []
    for begin in range(0, len(todo), batch):
        members = todo[begin : begin + batch]
        shown = [dataclasses.replace(questions[i].problem, prompt=questions[i].prompt) for i in members]
        serials = [questions[i].serials for i in members]
        answers = generate(shown, serials, temperature=temperature, prefix=prefix, budget=budget)
        texts = [prefix + read(answer.text) for own in answers for answer in own]
        problems = [questions[i].problem for i, own in zip(members, answers, strict=True) for _ in own]
        verdicts = iter(zip(texts, judge(list(zip(problems, texts, strict=True))), strict=True))
        whole = []
        for i, own in zip(members, answers, strict=True):
            judged = []
            for serial, answer in zip(questions[i].serials, own, strict=True):
                text, verdict = next(verdicts)
                kept = text if keep_texts else ""
                outcome = verdict.outcome.value
                judged.append(Judged(serial, outcome, verdict.detail, answer.tokens, answer.stop.value, kept))
            if all(answer.outcome == Outcome.UNGRADABLE for answer in judged):
                failed.append((questions[i].problem, judged[0].detail if judged else "no answer"))
            else:
                found[i] = judged
                whole.append((keys[i], questions[i].problem, judged))
        ledger.add(whole)
        progress(len(members))
        if not whole:
            break
    if failed:
        raise ValueError(_complaint(failed))
    return [answers for answers in found if answers is not None]


def check_judge(problems: Sequence[Problem], judge: Judge) -> None:
    """Has the judge read the reference of a few problems of each task. Raises ValueError if it can grade none of them.

    It may find them wrong: in some tasks a reference is not itself an answer.
    """
    by_task = collections.defaultdict(list)
    for problem in problems:
        by_task[problem.task].append(problem)
    for task, members in by_task.items():
        probes = members[:: -(-len(members) // 8)]
        verdicts = judge([(problem, problem.solution or f"Answer: {problem.answer}") for problem in probes])
        if all(verdict.outcome == Outcome.UNGRADABLE for verdict in verdicts):
            raise ValueError(
                f"The judge of task {task!r} cannot grade even the reference answers of its problems, that of "
                f"{probes[0].id!r} for one: {verdicts[0].detail:.200}. Mend the verifier, or name your own."
            )


def correct(answers: Sequence[Judged]) -> float:
    """The share of correct answers among those that could be graded. nan if none could."""
    graded = [answer.outcome == Outcome.CORRECT for answer in answers if answer.outcome != Outcome.UNGRADABLE]
    return sum(graded) / len(graded) if graded else float("nan")


def _key(question: Question, settings: Sequence[Any]) -> str:
    problem = question.problem
    content = [problem.id, problem.task, problem.prompt, problem.answer, picture_digest(problem), question.prompt]
    text = json.dumps([content, question.serials, settings])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _complaint(failed: Sequence[tuple[Problem, str]]) -> str:
    problem, detail = failed[0]
    return (
        f"The judge could grade no answer to {len(failed)} problems, {problem.id!r} of task {problem.task!r} for one: "
        f"{detail:.200}. That is no reason to drop a problem: mend the verifier, or take these problems out of the "
        "file, and run the same command again. What was graded is kept."
    )
