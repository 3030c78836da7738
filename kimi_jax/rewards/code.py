"""Verdicts on programs: the last fenced block of a response, run in the sandbox on the tests of the problem.

The ground truth of a problem is JSON text with the fields of `sandbox.api.JudgeRequest` that are not the response's:

    {"tests": [{"stdin": "3 4\\n", "expected": "7\\n"}, ...], "time_limit_s": 2.0, "memory_limit_mb": 256}
    {"tests": [{"arguments": [3, 4], "expected": 7}, ...], "function": "add", "language": "python"}

`language` is "python" where there is none; `checker`, `tolerance`, `files` and `profile` may be there too.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping

from kimi_jax.rewards.sandbox import api
from kimi_jax.rewards.sandbox.client import SandboxClient
from kimi_jax.rewards.sandbox.isolation import Limits
from kimi_jax.rewards.sandbox.pool import LocalSandbox
from kimi_jax.types import Outcome, Verdict

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)", re.DOTALL)
_TAGS = {  # what a block of a language may be marked as, besides its name
    "python": ("py", "python3"),
    "cpp": ("c++", "cc", "cxx"),
    "csharp": ("cs", "c#"),
    "javascript": ("js", "node"),
    "typescript": ("ts",),
    "bash": ("sh", "shell"),
    "go": ("golang",),
    "rust": ("rs",),
}
_NOT_OF_THE_PROBLEM = ("code", "id", "stop_at_failure")
_START_PATIENCE_S = 10.0  # a service that does not answer for so long is not there


def ground_truth(answer: str) -> api.JudgeRequest:
    """What a program is judged by, still without one. Raises ValueError that says what is wrong with it."""
    try:
        fields = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); give an object with tests: see kimi_jax.rewards.code") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}; give an object with tests: see kimi_jax.rewards.code")
    if foreign := [name for name in _NOT_OF_THE_PROBLEM if name in fields]:
        raise ValueError(f"{foreign[0]!r} is nothing that a problem can say; remove it")
    request = api.judge_request({"language": "python", "code": ""} | fields)
    api.check(request)
    if request.function and not request.function.isidentifier():
        raise ValueError(f"function is {request.function!r:.60}; give its name alone")
    return request


def extract_code(text: str, language: str) -> tuple[str | None, str]:
    """(the last fenced block of that language, "") of a response; (None, why there is none) otherwise.

    A block that says no language counts if no block says this one. What ends within a block is not finished.
    """
    blocks: list[tuple[str, str]] = []  # (mark, code)
    fence, mark, lines = "", "", list[str]()
    for line in text.split("\n"):
        found = _FENCE.fullmatch(line)
        if fence and found and found[1].startswith(fence) and not found[2].strip():
            blocks.append((mark, "\n".join([*lines, ""])))
            fence = ""
        elif fence:
            lines.append(line)
        elif found and "`" not in found[2]:
            fence, mark, lines = found[1], (found[2].lower().split() or [""])[0], []
    if fence:
        return None, "it ends within a block of code"
    for accepted in ((language, *_TAGS.get(language, ())), ("",)):
        if codes := [code for mark, code in blocks if mark in accepted]:
            return codes[-1], ""
    return None, f"no block of {language} in {len(blocks)} fenced blocks"


def verify_code(answer: str, text: str, *, sandbox: str | None = None) -> Verdict:
    """Judges a response by the tests in `answer`. UNGRADABLE if the sandbox cannot say; the detail has its feedback.

    sandbox: the URL of a service; None: one in this process, made for the first program and kept.

    Raises:
        ValueError: the ground truth makes no sense.
        NoIsolation, SandboxUnreachable: there is no sandbox.
    """
    request = ground_truth(answer)
    code, why = extract_code(text, request.language)
    if code is None:
        return Verdict(Outcome.WRONG, why, well_formed=False)
    judgement = _kept_sandbox(sandbox).judge(dataclasses.replace(request, code=code))
    outcome = Outcome(judgement.outcome)
    if outcome == Outcome.CORRECT:
        return Verdict(outcome, f"{len(request.tests)} tests passed")
    status = f"{judgement.verdicts[-1].status}: " if judgement.verdicts else ""
    return Verdict(outcome, f"{status}{judgement.feedback}")


def longest_test_s(request: api.JudgeRequest) -> float:
    """Seconds after which a test ends even if its program sleeps."""
    return Limits(cpu_s=request.time_limit_s, memory_mb=request.memory_limit_mb, output_bytes=0).wall_s


def open_sandbox(url: str | None) -> SandboxClient | LocalSandbox:
    """Raises ValueError for what is no URL, NoIsolation if programs cannot be isolated here."""
    return SandboxClient(url) if url else LocalSandbox(workers=1)


_kept_sandbox = functools.cache(open_sandbox)


def check_sandbox(url: str | None, needs: Mapping[tuple[str, str], str]) -> None:
    """Raises ValueError if there is no such sandbox, or if it lacks one of these (profile, language) of problems."""
    try:
        with SandboxClient(url, patience_s=_START_PATIENCE_S) if url else LocalSandbox(workers=1) as sandbox:
            profiles = sandbox.health()["profiles"]
    except RuntimeError as error:
        raise ValueError(f"Problems of task 'code' need a sandbox, and {error}") from error
    for (profile, language), problem in needs.items():
        if profile not in profiles:
            raise ValueError(f"Problem {problem!r}: the sandbox has no profile {profile!r}, only {', '.join(profiles)}")
        if language not in (there := profiles[profile])["languages"]:
            lacking = ", ".join(there["missing"].get(language, ()))
            raise ValueError(
                f"Problem {problem!r}: the sandbox cannot run {language!r}{lacking and f' for want of {lacking}'}; "
                f"profile {profile!r} has {', '.join(there['languages'])}"
            )
