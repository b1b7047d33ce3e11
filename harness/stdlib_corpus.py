"""An instruction set that needs no network: what the parts of Python's standard library do, answered by their docstrings."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import platform
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from estimator.errors import MissingError
from harness.cache import cache_directory
from profiler.files import write_whole

NAME = "python-stdlib"
_FORMAT = 1
_SKIPPED = {
    "__pycache__", "dist-packages", "ensurepip", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
_COMPILED = (
    "builtins", "array", "binascii", "cmath", "collections", "errno", "functools", "gc", "hashlib", "io", "itertools", "json", "marshal",
    "math", "operator", "os", "re", "select", "signal", "socket", "struct", "sys", "threading", "time", "unicodedata", "weakref", "zlib",
)  # fmt: skip
"""Modules (partly) in C whose import does nothing but define things; their docstrings are in no source that ast can read."""
_WORDINGS = (
    "What does {name} do?",
    "Explain the {kind} {name} of Python's standard library.",
    "What is {name} for?",
    "Describe the {kind} {name}.",
    "How is the {kind} {name} documented?",
    "I found {name} in some Python code. What is it?",
)
_SHORTEST = 20
"""Characters; shorter docstrings ("See above.") say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One documented thing: its dotted name, what kind of thing it is, its parameters where known, its docstring."""

    name: str
    kind: str
    parameters: str | None
    docstring: str


def stdlib_samples(cache: Path | None = None) -> list[dict[str, str]]:
    """``{"instruction", "output"}`` for each documented part of this Python's standard library, in a fixed order.

    Made once for each Python version and cached as JSONL. Raises MissingError where the library's sources are absent.
    """
    path = corpus_path(cache)
    if (cached := _read(path)) is not None:
        return cached
    samples = [_sample(entry) for entry in _distinct(_entries())]
    if not samples:
        raise MissingError("data: this Python has no sources of its standard library; give --data FILE.jsonl")
    write_whole(path, ("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)).encode())
    return samples


def corpus_path(cache: Path | None = None) -> Path:
    """The cached file; its name changes with whatever changes its content."""
    return cache_directory(cache) / f"{NAME}-{_FORMAT}-{platform.python_version()}.jsonl"


def _read(path: Path) -> list[dict[str, str]] | None:
    try:
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    return samples or None


def _sample(entry: Entry) -> dict[str, str]:
    digest = hashlib.sha256(entry.name.encode()).digest()
    wording = _WORDINGS[digest[0] % len(_WORDINGS)]
    name = f"{entry.name}({entry.parameters})" if entry.parameters is not None and digest[1] % 2 else entry.name
    return {"instruction": wording.format(name=name, kind=entry.kind), "output": entry.docstring}


def _distinct(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Each docstring once: methods that inherit theirs, and modules that re-export, would repeat it many times."""
    seen: set[str] = set()
    for entry in entries:
        if len(entry.docstring) >= _SHORTEST and entry.docstring not in seen:
            seen.add(entry.docstring)
            yield entry


def _entries() -> Iterator[Entry]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts):
            yield from _from_source(path, ".".join(parts).removesuffix(".__init__"))
    for name in _COMPILED:
        yield from _from_module(importlib.import_module(name))


def _from_source(path: Path, module: str) -> Iterator[Entry]:
    """Parsed, never imported: importing all of the library would run it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # the library ships templates and broken examples beside its modules
    yield from _from_node(tree, module, inside_class=False)


def _from_node(node: ast.AST, name: str, *, inside_class: bool) -> Iterator[Entry]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            parameters = None
            kind = "module" if isinstance(node, ast.Module) else "class"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = ast.unparse(node.args)
                kind = "method" if inside_class else "function"
            yield Entry(name=name, kind=kind, parameters=parameters, docstring=docstring)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _from_node(child, f"{name}.{child.name}", inside_class=isinstance(node, ast.ClassDef))


def _from_module(module: types.ModuleType) -> Iterator[Entry]:
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or name.endswith("hook"):
            continue  # hooks are there to be replaced by whoever runs this, and with them their docstrings
        if inspect.isclass(member):
            yield from _from_object(f"{module.__name__}.{name}", "class", member)
            for method_name, method in sorted(vars(member).items()):
                if inspect.isroutine(method):
                    yield from _from_object(f"{module.__name__}.{name}.{method_name}", "method", method)
        elif inspect.isbuiltin(member):
            yield from _from_object(f"{module.__name__}.{name}", "function", member)


def _from_object(name: str, kind: str, member: object) -> Iterator[Entry]:
    docstring = inspect.getdoc(member)
    if docstring:
        yield Entry(name=name, kind=kind, parameters=None, docstring=docstring)
