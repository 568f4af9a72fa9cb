"""The house stands as it is described: imports go one way, and each room of a file uses only rooms above it.

A room is what stands between two banners: a line of dashes, a name with a sentence, a line of dashes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from tidebase_server import bodies

SERVER = sorted((ROOT / "tidebase_server").glob("*.py"))
FILES = [ROOT / "tidebase.py", *SERVER]
BANNER = re.compile(r"^# -{20,}\n# (?P<name>[^:.\n]+)[:.].*\n(?:# .*\n)*# -{20,}$", re.M)


def imported(path: Path) -> set[str]:
    """The modules of this repository that a file imports, by their names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            within = "tidebase_server" if node.level else ""
            module = ".".join(filter(None, (within, node.module)))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    known = {f"tidebase_server.{file.stem}" for file in SERVER}
    return {name for name in names if name in known or name.split(".")[0] in ("tidebase", "tidebase_sdk")}


def test_imports_go_one_way() -> None:
    arrows = {f"tidebase_server.{file.stem}": imported(file) for file in SERVER}
    assert {name: found for name, found in arrows.items() if not found <= arrows.keys()} == {}, "they use what is above"
    settled: set[str] = set()
    while ready := {name for name, found in arrows.items() if name not in settled and found <= settled}:
        settled |= ready
    assert arrows.keys() - settled == set(), "these import each other"
    assert "tidebase_server.bodies" in imported(ROOT / "tidebase.py")
    assert imported(ROOT / "tidebase_sdk.py") == set(), "the client is one file"


def rooms(text: str) -> list[tuple[int, str]]:
    """The first line and the name of each room, the one before the first banner among them."""
    found = [(text.count("\n", 0, banner.start()) + 1, banner["name"]) for banner in BANNER.finditer(text)]
    return [(0, "the top"), *found]


def defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


class WithoutAnnotations(ast.NodeTransformer):
    """Takes annotations away, which nobody evaluates."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_room_uses_only_rooms_above_it(path: Path) -> None:
    text = path.read_text()
    starts = rooms(text)
    statements = WithoutAnnotations().visit(ast.parse(text)).body

    def room_of(line: int) -> int:
        return max(number for number, (start, _) in enumerate(starts) if start <= line)

    def local(node: ast.AST) -> set[str]:
        return {inner.arg if isinstance(inner, ast.arg) else inner.id for inner in ast.walk(node) if isinstance(
            inner, ast.arg) or (isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store))}

    homes = {name: room_of(node.lineno) for node in statements for name in defined(node)}
    below = {
        f"{starts[room_of(node.lineno)][1]}, line {used.lineno}: {used.id} of {starts[homes[used.id]][1]}"
        for node in statements for used in ast.walk(node)
        if isinstance(used, ast.Name) and homes.get(used.id, -1) > room_of(node.lineno) and used.id not in local(node)}
    assert below == set()


def test_the_rooms_of_tidebase_py_are_those_that_it_names() -> None:
    text = (ROOT / "tidebase.py").read_text()
    named = re.findall(r"^    ([A-Z][a-z ]+?)  +\S", text.split('"""')[1], re.M)
    assert named == [name for _, name in rooms(text)[1:]]


def calls() -> Iterator[tuple[str, set[str]]]:
    """Each function of schema.sql that the server calls by a name in its code, with the arguments that are named there
    or come from a body."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else (
                node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None)
            if name not in ("call", "rows", "read", "count") or not node.args or not isinstance(
                    node.args[0], ast.Constant) or not isinstance(node.args[0].value, str):
                continue
            names = {keyword.arg for keyword in node.keywords if keyword.arg}
            for value in (ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None):
                if body := re.fullmatch(r"parse\(bodies\.(\w+)\)", value):
                    names |= bodies.schema_of(getattr(bodies, body[1])).fields.keys()
            yield node.args[0].value, names


def test_every_call_names_a_function_of_schema_sql_and_parameters_that_it_has(sql: Callable[..., Any]) -> None:
    parameters = {name: set(names or ()) for name, names in sql(
        "select proname, proargnames from pg_proc where pronamespace = 'tidebase'::regnamespace")}
    made = list(calls())
    assert len(made) > 50
    assert {name for name, _ in made} <= parameters.keys()
    for name, names in made:
        assert {f"p_{argument}" for argument in names} <= parameters[name], name
