"""Programs that write test inputs: asked of a model, and run in a sandbox with CYaRon (k1.5 §2.3.5).

A generator is Python source that defines `generate(io, index)`, which writes test input number `index` to `io`, an
object of `cyaron.IO`. CYaRon is never imported here: the files of the installed package travel into the sandbox.
"""

import collections
import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Mapping

from kimi_jax.rewards.sandbox.api import RunRequest, Sandbox, Status

_PROMPT = """\
Write a generator of test inputs for this programming problem.

<problem>
{statement}
</problem>

The generator is Python code that defines a function `generate(io, index)`. It is called with index = 1, 2, ..., \
{cases} and writes one test input each time, exactly in the format of the problem and within its limits.

- `io.input_writeln(a, b, ...)` writes a line; lists are written with spaces between their elements. `io.input_write` \
does the same without the end of the line. Print nothing, read nothing, and do not compute the expected output.
- All inputs must differ. Let the first ones be the edge cases: the smallest sizes, extreme values, equal elements, \
sorted and reversed order, every special case that a wrong solution may forget. Let the last ones be as large as the \
limits allow, so that slow solutions and overflows are found, but write at most {kilobytes} kB per input.
- Answers should differ too: where an input with random contents would nearly always have the same answer, build one \
that has another.
- Only the standard library and CYaRon may be imported. From CYaRon you have, after `from cyaron import *`:
  randint(a, b), uniform(a, b), choice(list)
  Vector.random(num, [(low, high), ...], mode): num vectors; mode 0: all different, 1: may repeat, 2: real numbers
  String.random(length, charset="abc"), String.random_sentence(words), String.random_regular("[a-c]{{3,9}}")
  Graph.tree(n), Graph.chain(n), Graph.flower(n), Graph.binary_tree(n): trees with n nodes, numbered from 1
  Graph.graph(n, m, directed=False, self_loop=False, repeated_edges=False, weight_limit=(1, 9)): n nodes, m edges
  Graph.UDAG(n, m, self_loop=False, repeated_edges=False): connected and undirected, m is at least n - 1
  Graph.DAG(n, m, repeated_edges=False): connected, directed and without cycles, m is at least n - 1
  graph.to_str(shuffle=True): lines "u v weight"; graph.to_str(output=Edge.unweighted_edge): lines "u v"
  Polygon.convex_hull(n, fx=lambda x: int(1000 * x), fy=lambda y: int(1000 * y)).points: n points in order
  Sequence(lambda i, f: 2 * f(i - 1), {{0: 1}}).get(first, last): terms of a sequence

For a problem that reads n and then n numbers, a generator might be

```python
{example}
```

Think first, then give the whole generator in one block of Python code.
"""

EXAMPLE = """\
from cyaron import *

def generate(io, index):
    special = {1: [0], 2: [10**9], 3: [-(10**9)] * 7, 4: list(range(20))}
    n = randint(1, 10) if index < 30 else 10000
    bound = choice([1, 10, 10**9])
    numbers = special.get(index) or [v[0] for v in Vector.random(n, [(-bound, bound)], 1)]
    io.input_writeln(len(numbers))
    io.input_writeln(numbers)
"""

# The randomness of a generator depends on the index alone; that of regular expressions would be drawn anew each time.
_RUNNER = """\
import io, json, random, sys, traceback
import xeger.xeger
from cyaron import IO
sys.modules["xeger.xeger"].Random = lambda: random
out, sys.stdout = sys.stdout, sys.stderr
order = json.load(sys.stdin)
names = {"__name__": "generator"}
random.seed(0)
with open("generator.py") as file:
    exec(compile(file.read(), "generator.py", "exec"), names)
for index in order["indices"]:
    random.seed(index)
    text = io.StringIO()
    try:
        cases = IO(text, disable_output=True)
        names["generate"](cases, index)
        line = {"input": text.getvalue()} if len(text.getvalue()) <= order["max"] else {"error": "too_long"}
    except (Exception, SystemExit):
        line = {"error": "exception", "trace": traceback.format_exc(limit=-3)[-500:]}
    out.write(json.dumps(line) + "\\n")
    out.flush()
"""


class SandboxFailed(RuntimeError):
    """The sandbox could not run a program, which says nothing about the program; ask again later."""


def generator_prompt(statement: str, *, cases: int, max_bytes: int) -> str:
    """What a model is asked: a generator of `cases` inputs of at most `max_bytes` for the problem of this statement."""
    return _PROMPT.format(
        statement=statement.strip(), cases=cases, kilobytes=max_bytes // 1000, example=EXAMPLE.strip()
    )


def extract_code(text: str) -> str:
    """The last block of code in a response that defines `generate`; "" if there is none."""
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", text, flags=re.DOTALL | re.MULTILINE)
    return next((block for block in reversed(blocks) if re.search(r"^def generate\(", block, re.MULTILINE)), "")


@functools.cache
def library() -> Mapping[str, str]:
    """The files of CYaRon and of what it needs, by relative path. Raises ValueError if it is not installed."""
    files = {}
    for package in ("cyaron", "xeger"):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ValueError(
                f"Test-case generation needs CYaRon, and {package} is not installed: pip install -e '.[curation]'"
            )
        root = pathlib.Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if "tests" not in path.relative_to(root).parts:
                files[f"{package}/{path.relative_to(root)}"] = path.read_text(encoding="utf-8")
    return files


def generate_inputs(
    code: str, *, sandbox: Sandbox, cases: int, needed: int, max_bytes: int, time_limit_s: float, memory_limit_mb: int
) -> tuple[list[str], dict[str, int], str]:
    """Runs a generator for the indices 1 to `cases`, and stops early when `needed` inputs can no longer be reached.

    One process writes as many inputs as it can. Where it crashes or exceeds a limit, a fresh one goes on from there;
    an index that fails as the first of its process is given up, so each has the whole of the limits to itself.

    Args:
        code: the generator.
        max_bytes: of one input.
        time_limit_s, memory_limit_mb: of one process.

    Returns:
        the distinct inputs in order; how many indices ended as `ok`, `duplicate`, `empty`, `too_long`, `exception`, or
        in a status of the sandbox such as `time_limit`; and what the first failure looked like.

    Raises:
        SandboxFailed.
    """
    inputs: dict[str, None] = {}
    counts: collections.Counter[str] = collections.Counter()
    first_failure = ""
    todo = list(range(1, cases + 1))
    while todo and len(inputs) + len(todo) >= needed:
        result = sandbox.run(
            RunRequest(
                language="python",
                code=_RUNNER,
                stdin=json.dumps({"indices": todo, "max": max_bytes}),
                files={**library(), "generator.py": code},
                time_limit_s=time_limit_s,
                memory_limit_mb=memory_limit_mb,
            )
        )
        if result.status is Status.SANDBOX_ERROR:
            raise SandboxFailed(f"no generator could be run: {result.feedback}")
        lines = _lines(result.stdout)[: len(todo)]
        failure = result.feedback or "it ended before it wrote all inputs"
        if not lines:
            status = Status.RUNTIME_ERROR if result.status is Status.OK else result.status  # it left by os._exit(0)
            lines = [{"error": status.value, "trace": failure}]
        for index, line in zip(todo, lines, strict=False):
            kind = _kind(line, inputs, max_bytes)
            counts[kind] += 1
            if kind == "ok":
                inputs[line["input"]] = None
            elif kind != "duplicate" and not first_failure:
                first_failure = f"input {index}: {kind}\n{line.get('trace', '')}".strip()
        todo = todo[len(lines) :]
    return list(inputs), dict(counts), first_failure


def _kind(line: dict[str, str], earlier: Mapping[str, None], max_bytes: int) -> str:
    if "input" not in line:
        return line["error"]
    text = line["input"]
    if not text.strip():
        return "empty"
    if len(text.encode("utf-8", "surrogatepass")) > max_bytes:
        return "too_long"
    return "duplicate" if text in earlier else "ok"


def _lines(stdout: str) -> list[dict[str, str]]:
    """What the runner wrote, up to the first line that it cannot have written: the generator shares its process."""
    found = []
    for line in stdout.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict) or not all(isinstance(part, str) for part in value.values()):
            break
        if "input" not in value and value.get("error") not in ("too_long", "exception"):
            break
        found.append(value)
    return found
