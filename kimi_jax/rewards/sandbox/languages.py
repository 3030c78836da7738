"""The languages, one entry each. A machine has those whose commands it has; the others say what is missing.

Placeholders in commands: {name} of the source file without its ending, {memory} in MB that the request allows. Paths
begin with /box, which holds the sources and what the compiler made of them. Another language is one more entry here.
"""

import dataclasses
import re

from kimi_jax.rewards.sandbox import drivers


@dataclasses.dataclass(frozen=True)
class Language:
    name: str
    source: str  # file name; {name} where the program may choose it
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # commands, besides the first of `compile` and of `run`
    memory_factor: float = 1.0  # of the whole to what the program itself asks for
    runtime_mb: int = 16  # what a program that does nothing has resident
    threads: int = 0  # that the runtime starts
    out_of_memory: str = ""  # what the runtime then writes to standard error
    naming: str = ""  # pattern of the name that the program chooses
    environment: tuple[tuple[str, str], ...] = ()
    extra: tuple[tuple[str, str], ...] = ()  # further sources

    def commands(self) -> tuple[str, ...]:
        first = [command[0] for command in (self.compile, self.run) if command and not command[0].startswith("/")]
        return tuple(dict.fromkeys([*first, *self.needs]))

    def name_of(self, code: str) -> str:
        found = re.search(self.naming, code) if self.naming else None
        return found[1] if found else "Main" if self.naming else "main"

    def argv(self, command: tuple[str, ...], *, name: str, memory_mb: int, paths: dict[str, str]) -> list[str]:
        words = [word.replace("{name}", name).replace("{memory}", str(memory_mb)) for word in command]
        return [paths.get(words[0], words[0]), *words[1:]]


_JVM = ("-XX:+UseSerialGC", "-XX:ActiveProcessorCount=2", "-Xshare:auto", "-XX:TieredStopAtLevel=1")

_ENTRIES = (
    Language(
        "python",
        "main.py",
        run=("python3", "-S", "-c", drivers.PYTHON_START),  # without `site`, which takes half of the time of a start
        out_of_memory="MemoryError",
    ),
    Language(
        "java",
        "{name}.java",
        compile=("javac", *(f"-J{option}" for option in _JVM), "-encoding", "UTF-8", "-d", "/box", "/box/{name}.java"),
        run=("java", *_JVM, "-Xmx{memory}m", "-Xss64m", "-cp", "/box", "{name}"),
        memory_factor=1.25,
        runtime_mb=128,
        threads=32,
        out_of_memory="java.lang.OutOfMemoryError",
        naming=r"(?m)^[ \t]*public\s+(?:(?:final|abstract)\s+)*class\s+(\w+)",
    ),
    Language(
        "cpp",
        "main.cpp",
        compile=("g++", "-O2", "-std=gnu++17", "-o", "/box/main", "/box/main.cpp"),
        run=("/box/main",),
        out_of_memory="std::bad_alloc",
    ),
    Language(
        "csharp",
        "main.cs",
        compile=("mcs", "-optimize+", "-out:/box/main.exe", "/box/main.cs"),
        run=("mono", "/box/main.exe"),
        memory_factor=1.5,
        runtime_mb=64,
        threads=16,
        out_of_memory="System.OutOfMemoryException",
    ),
    Language(
        "javascript",
        "main.js",
        run=("node", "--max-old-space-size={memory}", "--stack-size=60000", "/box/main.js"),
        memory_factor=1.25,
        runtime_mb=96,
        threads=32,
        out_of_memory="heap out of memory",
    ),
    Language(
        "typescript",
        "main.ts",
        compile=("node", "/box/transpile.js", "/box/main.ts", "/box/main.js"),  # types are removed, not checked
        run=("node", "--max-old-space-size={memory}", "--stack-size=60000", "/box/main.js"),
        needs=("tsc",),
        memory_factor=1.25,
        runtime_mb=96,
        threads=32,
        out_of_memory="heap out of memory",
        environment=(("NODE_PATH", "/usr/share/nodejs:/usr/lib/node_modules:/usr/local/lib/node_modules"),),
        extra=(("transpile.js", drivers.TRANSPILE),),
    ),
    Language(
        "php",
        "main.php",
        run=("php", "-d", "memory_limit={memory}M", "-d", "display_errors=stderr", "/box/main.php"),
        runtime_mb=32,
        out_of_memory="Allowed memory size",
    ),
    Language("bash", "main.sh", run=("bash", "/box/main.sh"), out_of_memory="cannot allocate"),
    Language(
        "go",
        "main.go",
        compile=("go", "build", "-o", "/box/main", "."),
        run=("/box/main",),
        runtime_mb=32,
        threads=32,
        out_of_memory="out of memory",
        environment=(("GOCACHE", "/tmp/cache"), ("GOPATH", "/tmp/go"), ("CGO_ENABLED", "0"), ("GOFLAGS", "-p=2")),
        extra=(("go.mod", "module main\n"),),
    ),
    Language(
        "rust",
        "main.rs",
        compile=("rustc", "-O", "--edition=2021", "-o", "/box/main", "/box/main.rs"),
        run=("/box/main",),
        out_of_memory="memory allocation of",
    ),
)
LANGUAGES = {language.name: language for language in _ENTRIES}


def available(found: dict[str, str]) -> dict[str, Language]:
    """Those whose commands are all among `found`."""
    return {name: language for name, language in LANGUAGES.items() if all(c in found for c in language.commands())}


def missing(found: dict[str, str]) -> dict[str, list[str]]:
    """Of the others, the commands that are missing."""
    lacking = {name: [c for c in language.commands() if c not in found] for name, language in LANGUAGES.items()}
    return {name: commands for name, commands in lacking.items() if commands}
