"""The shape of the code base: imports point one way, nothing heavy is imported by accident, files stay short."""

import ast
import os
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import kimi_jax

ROOT = pathlib.Path(__file__).parents[1]

HF_FILES = ("data.hf_vocab", "data.hf_tokenizer", "data.hf_images")

# A room may import the rooms of earlier rows, and within its own row only those of the same package.
LAYERS = (
    ("types", "arrays"),
    ("losses", "models", "rewards", "data.tokenizer", "data.images", "data.packing", *HF_FILES),
    ("training",),
    ("sampling", "data.chat", "data.chat_template", "data.hf_chat", "tasks"),
    ("rl", "data.loaders", "data.documents", "data.mixture", "evals", "report", "curation"),
    ("long2short",),
    ("trainers",),
)
BARE = ("", "data")  # their modules are in several rows, so the packages themselves import nothing of the project
CONFIG_READERS = ("trainers",)  # everything else takes keyword arguments


def layer(module: str) -> int | None:
    """The row of a module, named without the leading `kimi_jax.`; -1 for the bare packages, None for a stranger."""
    if module in BARE:
        return -1
    for row, rooms in enumerate(LAYERS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return row
    return None


def imported_names(source: str, package: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands. `from a import b` yields "a.b", a module or not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join(parents + ([node.module] if node.module else []))
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return found


def broken_rules(sources: dict[str, str], packages: set[str]) -> list[str]:
    """A line for each import that breaks the table. `sources` by module name as in `layer`, `packages` among them."""
    complaints = []
    for module, source in sources.items():
        own_row = layer(module)
        if own_row is None:
            complaints.append(f"{module}: not in the table of layers (tests/test_imports.py)")
            continue
        package = module if module in packages else module.rpartition(".")[0]
        for line, name in imported_names(source, ".".join(["kimi_jax", package]).rstrip(".")):
            room = module.split(".")[0]
            if name.split(".")[0] in ("ml_collections", "configs", "scripts") and room not in CONFIG_READERS:
                complaints.append(f"{module}:{line} reads a config ({name}); only {', '.join(CONFIG_READERS)} may")
            if name.split(".")[0] != "kimi_jax":
                continue
            target = name.removeprefix("kimi_jax").removeprefix(".")
            while target not in sources:  # from the name of a function to its module
                target = target.rpartition(".")[0]
            if target == module:
                continue
            row = layer(target)
            siblings = row == own_row and target.split(".")[0] == room
            if row is None or not (row < own_row or siblings):
                complaints.append(f"{module}:{line} imports {target}, which is not below it")
    return complaints


def project() -> tuple[dict[str, str], set[str]]:
    sources, packages = {}, set()
    for path in (ROOT / "kimi_jax").rglob("*.py"):
        parts = path.relative_to(ROOT / "kimi_jax").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text()
        if parts[-1] == "__init__":
            packages.add(name)
    return sources, packages


def test_imports_point_one_way():
    sources, packages = project()
    assert len(sources) > 10
    assert not broken_rules(sources, packages)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("losses.token", "import kimi_jax.trainers.rl", "imports trainers.rl"),
        ("losses.token", "from kimi_jax import trainers", "imports trainers"),
        ("losses.token", "from kimi_jax.models.policy import score", "imports models.policy"),
        ("losses.token", "def f():\n    from kimi_jax.models import policy", ":2 imports models.policy"),
        ("losses.token", "from ..trainers import rl", "imports trainers.rl"),
        ("data.packing", "from kimi_jax.data import loaders", "imports data.loaders"),
        ("data", "from kimi_jax.data import packing", "imports data.packing"),
        ("losses.token", "import ml_collections", "reads a config"),
        ("surprise", "", "not in the table"),
    ],
)
def test_a_wrong_import_is_found(module, source, complaint):
    others = ["", "types", "losses", "losses.sums", "models", "models.policy", "data", "data.packing", "data.loaders"]
    sources = dict.fromkeys([*others, "trainers", "trainers.rl"], "") | {module: source}
    (found,) = broken_rules(sources, {"", "losses", "models", "data", "trainers"})
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.token", "from kimi_jax import types"),
        ("losses.token", "from kimi_jax.types import RLBatch\nfrom . import sums\nfrom .sums import total\nimport jax"),
        ("losses", "from .token import cross_entropy"),
        ("trainers.rl", "import ml_collections\nfrom kimi_jax.losses import token\nfrom ..losses.token import x"),
        ("data.loaders", "from kimi_jax.data import packing"),
    ],
)
def test_a_right_import_is_not(module, source):
    others = ["", "types", "losses", "losses.sums", "losses.token", "data", "data.packing", "trainers"]
    assert not broken_rules(dict.fromkeys(others, "") | {module: source}, {"", "losses", "data", "trainers"})


@pytest.mark.smoke
def test_the_package_imports_without_other_frameworks(tmp_path):
    """Stand-ins that import without error, so that an attempt shows even where the frameworks are not installed."""
    frameworks = ("tensorflow", "torch")
    for name in frameworks:
        (tmp_path / f"{name}.py").touch()
    modules = [m.name for m in pkgutil.walk_packages(kimi_jax.__path__, "kimi_jax.")]
    assert len(modules) > 10
    program = f"import sys, {', '.join(modules)}\nprint(*set({frameworks}) & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "", f"importing kimi_jax also imports {run.stdout.strip()}"


def test_judging_needs_no_jax():
    """Workers that judge start quickly, and take no memory and no device from the run."""
    program = "import sys, kimi_jax.rewards.pool, kimi_jax.tasks; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_files_are_short():
    """A file that needs more has two subjects."""
    files = [p for d in ("kimi_jax", "configs", "scripts") for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".sh")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert len(lengths) > 10
    assert not {name: n for name, n in lengths.items() if n >= 500}
