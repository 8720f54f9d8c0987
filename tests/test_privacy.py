"""Tests go through public names: what is private may be renamed, and no test may break but on a fault."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OURS = {"fastav", "fastav_kernels", "benchmarks"}
OTHERS = {"os", "sys", "torch"}
"""Packages of others that have no public way to what tests do: `os._exit`, `torch._dynamo`, `torch._inductor`."""
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMED_TUPLES


def root_of(node: ast.expr) -> str:
    """The first name of a.b.c; empty where there is none."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def reaches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and name of what a file takes of the insides of others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if is_private(node.attr) and root_of(node) not in {"self", "cls", *OTHERS}:
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in OURS:
                words = [*module.split("."), *(name.name for name in node.names)]
                yield from ((node.lineno, word) for word in words if is_private(word))
        elif isinstance(node, ast.Import):
            for name in node.names:
                words = name.name.split(".")
                yield from ((node.lineno, word) for word in words if words[0] in OURS and is_private(word))
        elif isinstance(node, ast.Call):
            yield from named(node)


def named(call: ast.Call) -> Iterator[tuple[int, str]]:
    """Yields private names that a call is given as text: `setattr(module, "_name", ...)`, `patch("fastav.x._name")`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in {"setattr", "getattr", "delattr", "hasattr", "setitem", "patch", "object", "attrgetter"}:
        return
    for word in call.args[:2]:
        if isinstance(word, ast.Constant) and isinstance(word.value, str):
            last = word.value.rpartition(".")[2]
            if last.isidentifier() and is_private(last):
                yield word.lineno, last


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_no_test_reaches_into_a_private_name(file: Path) -> None:
    assert list(reaches(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from fastav.train import _hidden", "_hidden"),
        ("from fastav._hidden import shown", "_hidden"),
        ("import benchmarks._hidden", "_hidden"),
        ("trainer._hidden()", "_hidden"),
        ("trainer.shown._hidden = 1", "_hidden"),
        ("make().shown._hidden", "_hidden"),
        ("monkeypatch.setattr(module, '_hidden', 1)", "_hidden"),
        ("monkeypatch.setattr('fastav.module._hidden', 1)", "_hidden"),
        ("patch.object(module, '_hidden')", "_hidden"),
    ],
)
def test_a_reach_is_seen(code: str, name: str) -> None:
    assert list(reaches(ast.parse(code))) == [(1, name)]


@pytest.mark.parametrize(
    "code",
    [
        "self._own", "cls._own()", "os._exit(0)", "torch._dynamo.reset()", "row._replace(a=1)", "thing.__dict__",
        "from fastav import __main__", "name = '_text'", "print('_text', 'a._b')", "from torch._inductor import config",
    ],
)  # fmt: skip
def test_what_is_ones_own_or_cannot_be_helped_is_not(code: str) -> None:
    assert list(reaches(ast.parse(code))) == []
