#!/usr/bin/env python3
"""Count what a reader has to read, of two source trees side by side:  size.py BEFORE AFTER [FOLDER OR FILE ...]

Prints a Markdown table: per file the lines of code, without blank lines, comments and docstrings, and the public names:
those of modules, of their public classes and of SQL functions that have no leading underscore. Default: the product.
"""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

PRODUCT = ["*.py", "schema.sql", "tidebase_server", "studio", "adapters"]
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
COMMENTS = {".js": r"/\*.*?\*/|^\s*//[^\n]*", ".css": r"/\*.*?\*/", ".html": r"<!--.*?-->", ".sql": r"^\s*--[^\n]*"}


def python(text):
    """Lines of code, and public names."""
    tree = ast.parse(text)
    docstrings = {line for node in ast.walk(tree)
                  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                  and ast.get_docstring(node, clean=False) is not None
                  for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in NOT_CODE
             for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings), sum(1 for _ in public_names(tree.body))


def public_names(body):
    for node in body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [t.id for t in targets if isinstance(t, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_names(node.body)


def count(path):
    """The same of any file; nothing of a kind that is not known here."""
    if path.suffix == ".py":
        return python(path.read_text())
    if path.suffix not in COMMENTS:
        return 0, 0
    text = re.sub(COMMENTS[path.suffix], "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    functions = set(re.findall(r"^create (?:or replace )?function tidebase\.([a-z]\w*)", text, re.MULTILINE))
    return sum(1 for line in text.splitlines() if line.strip()), len(functions)


if len(sys.argv) < 3:
    sys.exit(__doc__)
trees = [{found.relative_to(tree): count(found) for path in sys.argv[3:] or PRODUCT
          for found in (file for top in tree.glob(path) for file in (top, *top.rglob("*")))
          if found.is_file() and "__pycache__" not in found.parts} for tree in map(Path, sys.argv[1:3])]
print("| file | lines before | after | public names before | after |\n|---|---:|---:|---:|---:|")
for file in [*sorted({file for tree in trees for file, (lines, _) in tree.items() if lines}), "all"]:
    values = [sum(c[n] for name, c in tree.items() if file in (name, "all")) for n in (0, 1) for tree in trees]
    print(f"| {file} | " + " | ".join(f"{value:,}" for value in values) + " |")
