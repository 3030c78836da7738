"""A sandbox that looks results up. The code of a submission is a JSON object from input to output, or to a status in
angle brackets; that of a generator a list of inputs."""

import json

from kimi_jax.rewards.sandbox.api import Judgement, JudgeRequest, RunRequest, RunResult, Status, TestVerdict


class TableSandbox:
    def __init__(self, languages=("cpp", "python")):
        self.languages = languages
        self.runs: list[str] = []  # inputs, of `run` and of `judge`
        self.requests = 0

    def run(self, request: RunRequest) -> RunResult:
        self.requests += 1
        if "generator.py" in request.files:
            inputs = json.loads(request.files["generator.py"])
            order = json.loads(request.stdin)
            status, text = Status.OK, "".join(json.dumps({"input": inputs[i - 1]}) + "\n" for i in order["indices"])
        else:
            status, text = self._look_up(request.code, request.stdin)
        return RunResult(status=status, exit_code=0, stdout=text, stderr="", seconds=0, peak_memory_mb=0)

    def judge(self, request: JudgeRequest) -> Judgement:
        self.requests += 1
        verdicts = []
        for test in request.tests:
            status, text = self._look_up(request.code, test.stdin)
            if status is Status.SANDBOX_ERROR:
                return Judgement(outcome="ungradable", verdicts=[], feedback="broken")
            if status is Status.OK and text.split() != test.expected.split():
                status = Status.WRONG_ANSWER
            verdicts.append(TestVerdict(status=status, seconds=0, peak_memory_mb=0))
            if status is not Status.OK and request.stop_at_failure or status is Status.COMPILE_ERROR:
                break
        wrong = any(verdict.status is not Status.OK for verdict in verdicts)
        return Judgement(outcome="wrong" if wrong else "correct", verdicts=verdicts)

    def _look_up(self, code: str, stdin: str) -> tuple[Status, str]:
        self.runs.append(stdin)
        output = json.loads(code)[stdin]
        return (Status(output[1:-1]), "") if output.startswith("<") else (Status.OK, output)

    def health(self) -> dict:
        return {"profiles": {"default": {"languages": list(self.languages)}}}

    def close(self) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *exception): ...
