"""The rules of the code base, held by reading its source: see docs/design.md and CONTRIBUTING.md.

Each rule is a function from a parsed file to complaints. It is run over the package, and, at the end, over
a snippet that breaks it, so that no rule can stop working unseen.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmctl"

# Bottom to top. A module imports from lower lines or from its own package, never from beside it.
LAYERS: list[set[str]] = [
    {"errors"},
    {"files", "versions"},
    {"lock"},
    {"talk", "runs", "report"},
    {"folders"},
    {"locate"},
    {"recipe"},
    {"kernels"},
    {"model"},
    {"train", "data", "tokenizer", "quantize", "plan"},
    {"engine"},
    {"evaluate"},
    {"stages"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# These stay importable in a fraction of a second, function bodies included.
LIGHT = {"errors", "files", "folders", "lock", "talk", "runs", "locate", "report", "recipe", "versions"}
HEAVY = {"torch", "transformers", "tokenizers", "datasets", "peft", "trl", "accelerate", "numpy", "pyarrow"}

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 8
# "path" or "path::function" -> the size it is allowed. An entry that is no longer needed fails a test.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
MANY_PARAMETERS: dict[str, int] = {
    # transformers, PEFT and TRL look for these names in the signature
    "llmctl/model/hf.py::LlmctlForCausalLM.forward": 10,
    "llmctl/model/seq2seq.py::LlmctlForConditionalGeneration.forward": 12,
    # a kernel is handed pointers, strides and sizes one by one, and what it is compiled for
    "llmctl/kernels/flash_triton.py::_forward": 16,
    "llmctl/kernels/flash_triton.py::_backward_keys": 20,
    "llmctl/kernels/flash_triton.py::_backward_queries": 19,
}


@dataclass(frozen=True)
class Source:
    """One parsed file. `name` is its dotted module name below the package: `recipe.load`."""

    path: str
    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)

    @property
    def package(self) -> str:
        """The layer a file belongs to: the first word of its module name."""
        return self.name.split(".")[0]


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def sources(folder: Path) -> list[Source]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found.append(Source(str(path.relative_to(ROOT)), ".".join(parts), path.read_text(encoding="utf-8")))
    return found


OURS = sources(PACKAGE)
ALL = OURS + sources(ROOT / "tests") + sources(ROOT / "docs") + sources(ROOT / "benchmarks")
MODULES = {source.name for source in OURS}


# --- imports ----------------------------------------------------------------------------------------


def imported(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands and however it is written."""
    own = ["llmctl", *source.name.split(".")]
    inside = own if source.path.endswith("__init__.py") else own[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                # `from llmctl import model` names a module, `from llmctl.model import Core` does not
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix("llmctl.") in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def upward_imports(source: Source) -> Iterator[str]:
    for line, module in imported(source):
        if not module.startswith("llmctl.") or not source.name:
            continue
        target = module.split(".")[1]
        if target != source.package and LEVEL[target] >= LEVEL[source.package]:
            yield f"{source.path}:{line}: {source.package} imports {target}, which is not below it"


def heavy_imports(source: Source) -> Iterator[str]:
    if source.package in LIGHT:
        for line, module in imported(source):
            if module.split(".")[0] in HEAVY:
                yield f"{source.path}:{line}: {source.package} stays light, but imports {module}"


def click_imports(source: Source) -> Iterator[str]:
    for line, module in imported(source):
        if module.split(".")[0] == "click" or module.startswith("typer._"):
            yield f"{source.path}:{line}: imports {module}; only Typer's public names are ours to use"


# --- words and habits -------------------------------------------------------------------------------


def file_names(source: Source) -> Iterator[str]:
    last = source.name.split(".")[-1]
    if last in {"utils", "util", "helpers", "helper", "misc", "common"} or "manager" in last:
        yield f"{source.path}: the name says nothing of what is inside"


def unfinished(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", line):
            yield f"{source.path}:{number}: {found[0]}"


def environment(source: Source) -> Iterator[str]:
    """The core and the loop are configured by values, not by variables of the process."""
    if source.package in {"model", "train"}:
        for number, line in enumerate(source.text.splitlines(), 1):
            if re.search(r"\bos\.(environ|getenv|putenv)\b", line):
                yield f"{source.path}:{number}: reads the environment"


def swallowed(source: Source) -> Iterator[str]:
    """An `except` so broad that a bug hides in it, with nothing said."""
    broad = {"Exception", "BaseException"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else broad
            silent = all(isinstance(s, ast.Pass | ast.Continue) or _is_ellipsis(s) for s in node.body)
            if names & broad and silent:
                yield f"{source.path}:{node.lineno}: swallows every error"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            hidden = broad & {ast.unparse(argument) for argument in node.args}
            yield from (f"{source.path}:{node.lineno}: suppresses {name}" for name in hidden)


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def registries(source: Source) -> Iterator[str]:
    """Tables are dicts one can read, not filled by decorators. torch's own registration is its API."""
    for node in ast.walk(source.tree):
        for decorator in getattr(node, "decorator_list", []):
            name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
            if re.search(r"regist(er|ry)", name) and not name.startswith("torch."):
                yield f"{source.path}:{decorator.lineno}: decorator {name} fills a table out of sight"


RULES: list[Callable[[Source], Iterator[str]]] = [
    upward_imports,
    heavy_imports,
    click_imports,
    file_names,
    unfinished,
    environment,
    swallowed,
    registries,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    complaints = [complaint for source in OURS for complaint in rule(source)]
    assert not complaints, "\n".join(complaints)


def test_every_package_has_a_layer() -> None:
    assert {source.package for source in OURS if source.name} <= LEVEL.keys()


def test_no_import_circles() -> None:
    graph = {
        source.name: {module.removeprefix("llmctl.") for _, module in imported(source)} & MODULES
        for source in OURS
        if source.name
    }
    for name, below in graph.items():
        below -= {name, ""}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


# --- budgets ----------------------------------------------------------------------------------------


def functions(source: Source) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """("path::Class.name", node) of every function, those inside others included."""

    def below(node: ast.AST, above: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = above
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{above}.{child.name}".lstrip(".")
                if not isinstance(child, ast.ClassDef):
                    yield f"{source.path}::{name}", child
            yield from below(child, name)

    yield from below(source.tree, "")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many things a caller may pass; `self` is not one."""
    given = function.args
    names = [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


@cache
def commands() -> set[str]:
    """The "path::name" of every function behind a command: it takes one parameter a flag."""
    from llmctl.cli.main import app  # here, so that the other rules run when it does not import

    apps, found = [app], set()
    for one in apps:  # grows while it is read: groups lie in groups
        apps.extend(group.typer_instance for group in one.registered_groups)
        for callback in [c.callback for c in [*one.registered_commands, one.registered_callback] if c]:
            if callback is not None:
                found.add(f"{callback.__module__.replace('.', '/')}.py::{callback.__qualname__}")
    return found


def file_sizes(files: list[Source]) -> dict[str, int]:
    return {source.path: len(source.text.splitlines()) for source in files}


def function_sizes(files: list[Source]) -> dict[str, int]:
    """Lines of each function without its docstring: explaining is free."""
    sizes = {}
    for source in files:
        for name, node in functions(source):
            first = node.body[0]
            told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0  # type: ignore[operator]
            sizes[name] = node.end_lineno - node.lineno + 1 - told  # type: ignore[operator]
    return sizes


def parameter_counts(files: list[Source]) -> dict[str, int]:
    return {
        name: parameters(node)
        for source in files
        for name, node in functions(source)
        if name not in commands()
    }


BUDGETS = {
    "lines in a file": (file_sizes, ALL, MAX_FILE, LONG_FILES),
    "lines in a function": (function_sizes, ALL, MAX_FUNCTION, LONG_FUNCTIONS),
    "parameters": (parameter_counts, OURS, MAX_PARAMETERS, MANY_PARAMETERS),
}


@pytest.mark.parametrize("what", BUDGETS)
def test_budget(what: str) -> None:
    measure, files, limit, exceptions = BUDGETS[what]
    sizes = measure(files)
    over = {name: size for name, size in sizes.items() if size > exceptions.get(name, limit)}
    assert not over, f"more than {limit} {what}: {over}"
    stale = {name for name in exceptions if sizes.get(name, 0) <= limit}
    assert not stale, f"no longer needs an exception: {stale}"


# --- the rules themselves ---------------------------------------------------------------------------

BROKEN = [
    (upward_imports, "model.core", "def f():\n    from llmctl.cli import main"),
    (upward_imports, "train.loop", "import llmctl.data.packing"),
    (upward_imports, "train.loop", "from llmctl import data"),
    (upward_imports, "train.loop", "from ..data import packing"),
    (upward_imports, "recipe.load", "import importlib\nimportlib.import_module('llmctl.stages')"),
    (heavy_imports, "recipe.load", "def f():\n    import torch.nn"),
    (click_imports, "cli.main", "import click"),
    (click_imports, "cli.main", "from typer._click.core import Command"),
    (file_names, "model.utils", ""),
    (file_names, "engine.cache_manager", ""),
    (unfinished, "model.core", "x = 1  # TODO later"),
    (unfinished, "model.core", "def f():\n    raise NotImplementedError"),
    (environment, "train.loop", "import os\nFAST = os.environ.get('FAST')"),
    (swallowed, "files", "try:\n    f()\nexcept Exception:\n    pass"),
    (swallowed, "files", "try:\n    f()\nexcept:\n    ..."),
    (swallowed, "files", "try:\n    f()\nexcept (OSError, BaseException) as error:\n    pass"),
    (swallowed, "files", "with contextlib.suppress(Exception):\n    f()"),
    (registries, "model.norms", "@register_norm('rms')\nclass N: ..."),
    (registries, "model.norms", "@NORMS.register\nclass N: ..."),
]


@pytest.mark.parametrize(("rule", "name", "text"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_rule_is_seen(rule: Callable[[Source], Iterator[str]], name: str, text: str) -> None:
    path = f"llmctl/{name.replace('.', '/')}.py"
    assert len(list(rule(Source(path, name, text)))) == 1


def test_budgets_measure() -> None:
    text = "class A:\n    def f(self, a, *, b, c=1):\n        '''One\n        two.'''\n        return a\n"
    source = Source("llmctl/x.py", "x", text)
    assert file_sizes([source]) == {"llmctl/x.py": 5}
    assert function_sizes([source]) == {"llmctl/x.py::A.f": 2}
    assert parameter_counts([source]) == {"llmctl/x.py::A.f": 3}
