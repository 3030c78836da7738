"""Pieces of programs that stand around a submission: how Python starts, and how a function is called.

A driver reads a JSON list of arguments from standard input, calls the function of that name, or the method of a class
`Solution`, and prints the value as JSON on a line of its own, the last one. The expected value never gets near it.
"""

import json
import re
from collections.abc import Callable

from kimi_jax.rewards.sandbox import drivers_managed as managed
from kimi_jax.rewards.sandbox import drivers_native as native

# What `site` does that programs rely on: exit() and installed packages. The namespace of the program stays empty.
# `compile` would know the name of the file, but first makes all classes of `ast`, a tenth of the time of a start; so
# the name in tracebacks is "<string>", as with `python -c`, and the hook shows them the lines.
PYTHON_START = """\
import builtins, sys
builtins.exit = builtins.quit = sys.exit
__file__ = sys.argv[0] = "/box/main.py"
sys.path[0] = "/box"
sys.path += ["%s/lib/python3/dist-packages" % sys.prefix,
             "%s/lib/python%d.%d/site-packages" % (sys.prefix, *sys.version_info[:2]),
             "%s/local/lib/python%d.%d/dist-packages" % (sys.prefix, *sys.version_info[:2])]
sys.excepthook = lambda kind, error, trace: exec('''
import linecache, traceback
with open("/box/main.py", errors="replace") as file:
    linecache.cache["<string>"] = 0, None, file.readlines(), "<string>"
traceback.print_exception(kind, error, trace and trace.tb_next)
''', locals())
with open(__file__, "rb") as source:
    source = source.read()
del builtins, sys
exec(globals().pop("source"))
"""

TRANSPILE = """\
const ts = require("typescript"), fs = require("fs"), [source, target] = process.argv.slice(2);
const text = fs.readFileSync(source, "utf8");
const options = {target: ts.ScriptTarget.ES2020, module: ts.ModuleKind.CommonJS};
const result = ts.transpileModule(text, {compilerOptions: options, reportDiagnostics: true});
for (const d of result.diagnostics) console.error(ts.flattenDiagnosticMessageText(d.messageText, "\\n"));
fs.writeFileSync(target, result.outputText);
process.exit(result.diagnostics.length ? 1 : 0);
"""

# The submission is in a file of its own, so that the lines in its tracebacks are right.
_PYTHON = """\
from typing import *
import bisect, collections, functools, heapq, itertools, json, math, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, cycle, groupby, permutations, product, zip_longest
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, sqrt

def _call(names):
    with open("/box/solution.py") as file:
        code = compile(file.read(), "/box/solution.py", "exec")
    exec(code, names)
    target = names["FUNCTION"] if "FUNCTION" in names else getattr(names["Solution"](), "FUNCTION")
    value = target(*json.load(sys.stdin))
    sys.stdout.write("\\n" + json.dumps(value, default=list) + "\\n")
_call({**globals(), "__name__": "solution"})
"""

_JAVASCRIPT = """
;(() => {
  const f = typeof FUNCTION !== "undefined" ? FUNCTION : (...a) => new Solution().FUNCTION(...a);
  const value = f(...JSON.parse(require("fs").readFileSync(0, "utf8")));
  console.log("\\n" + JSON.stringify(value === undefined ? null : value));
})();
"""

_PHP = """
$_arguments = json_decode(stream_get_contents(STDIN), true);
$_function = function_exists("FUNCTION") ? "FUNCTION" : [new Solution(), "FUNCTION"];
echo "\\n", json_encode($_function(...$_arguments)), "\\n";
"""

# Arguments one by one as words; the value is what the function prints.
_BASH = """
mapfile -d '' -t _arguments
FUNCTION "${_arguments[@]}"
"""


def _cpp(code: str, function: str) -> str:
    in_class = re.search(r"\b(class|struct)\s+Solution\b", code)
    name = f"Solution::{function}" if in_class else function
    return native.CPP_HEAD + "#line 1\n" + code + native.CPP.replace("FUNCTION", name)


def _java(code: str, function: str) -> str:
    """Only one class of a file may be public, and that is the driver's."""
    code = re.sub(r"\bpublic\s+(?=(?:final\s+)?class\s+Solution\b)", "", code)
    return "import java.util.*; import java.util.stream.*; " + code + managed.JAVA.replace("FUNCTION", function)


def _rust(code: str, function: str) -> str:
    in_impl = re.search(r"\bimpl\s+Solution\b", code)
    if in_impl and not re.search(r"\bstruct\s+Solution\b", code):
        code += "\nstruct Solution;"
    return code + native.RUST.replace("FUNCTION", f"Solution::{function}" if in_impl else function)


_USING = "using System; using System.Collections.Generic; using System.Linq; using System.Text; "
_WRAPPERS: dict[str, Callable[[str, str], str]] = {
    "python": lambda code, function: _PYTHON.replace("FUNCTION", function),
    "javascript": lambda code, function: code + _JAVASCRIPT.replace("FUNCTION", function),
    "typescript": lambda code, function: "declare var require: any;" + code + _JAVASCRIPT.replace("FUNCTION", function),
    "php": lambda code, function: code.rstrip().removesuffix("?>") + _PHP.replace("FUNCTION", function),
    "bash": lambda code, function: code + _BASH.replace("FUNCTION", function),
    "cpp": _cpp,
    "java": _java,
    "csharp": lambda code, function: _USING + code + managed.CSHARP.replace("FUNCTION", function),
    "go": lambda code, function: code,
    "rust": _rust,
}


def wrap(language: str, code: str, function: str) -> tuple[str, dict[str, str]]:
    """A program that calls the function, and further sources. Raises ValueError if the name is none."""
    if not function.isidentifier():
        raise ValueError(f"function is {function!r:.60}, which is not a name")
    further = {"python": {"solution.py": code}, "go": {"driver.go": native.GO.replace("FUNCTION", function)}}
    return _WRAPPERS[language](code, function), further.get(language, {})


def stdin(language: str, arguments: list) -> bytes:
    """The arguments as the driver of this language reads them."""
    if language == "bash":
        words = [value if isinstance(value, str) else json.dumps(value) for value in arguments]
        return b"".join(word.encode() + b"\0" for word in words)
    return json.dumps(arguments).encode()


def value(language: str, stdout: str) -> object:
    """The value that the driver printed. Raises ValueError if there is none."""
    if language == "bash":
        return stdout.rstrip("\n")
    lines = stdout.rstrip().rsplit("\n", 1)
    return json.loads(lines[-1])
