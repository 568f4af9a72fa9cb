"""A durable report on a module of the standard library, written from the interpreter's own documentation.

    generate_report(run, {"topic": "asyncio"})  ->  {"path": "reports/asyncio-1f3a77c0.md", "words": 5183, ...}

Seven steps: plan, overview, names, submodules, rank, compose, write. Each is a plain function from JSON to JSON;
`run.step` makes its outcome a checkpoint, so a worker that takes over repeats none that is done. Only `write` touches
the world: it declares that, carries an idempotency key, and replaces the file in one move, so that a second write
after a crash leaves the same file and never half of one.

No network. The topic itself is imported; its submodules are only read, since importing a module runs it.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import inspect
import os
import pkgutil
import platform
import pydoc
import re
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

NOT_IMPORTED = {  # modules whose import does something, or that are no library at all
    "antigravity": "opens a web browser",
    "this": "prints a poem",
    "turtle": "wants a display",
    "turtledemo": "wants a display",
    "idlelib": "is an application",
    "test": "is Python's own test suite",
}
TABLE_ROWS = 15  # names in the table at the top: what fits on a screen
METHODS_SHOWN = 12  # per class: enough to know what it is for
DOC_LINES = 60  # of one docstring: some are whole manuals
SIGNATURE_WIDTH = 100  # columns, then it is wrapped
DAMPING = 0.85  # PageRank's usual share of weight that follows a mention


class UnknownTopic(ValueError):
    """The topic is no module that can be reported on. It will not be one at the next attempt either."""

    retryable = False


def generate_report(run: Any, input: dict[str, Any]) -> dict[str, Any]:
    """Write the report on input["topic"]; answers its path and figures."""
    topic = input["topic"]
    about = {"topic": topic}
    plan = run.step("plan", lambda: make_plan(topic), input=about)
    overview = run.step("overview", lambda: read_overview(topic), input=about)
    names = run.step("names", lambda: document_names(topic, plan["names"]), input=about)
    submodules = run.step("submodules", lambda: read_submodules(topic, plan["submodules"]), input=about)
    ranking = run.step("rank", lambda: rank(names), input=about)
    report = run.step("compose", lambda: compose(plan, overview, names, submodules, ranking), input=about)
    file_name = f"{topic}-{run.run_id[-8:]}.md"  # of this run, so that no other run writes to it
    written = run.step(
        "write",
        lambda: write_report(file_name, report["markdown"]),
        input={"file": file_name, "sha256": report["sha256"]},
        side_effects=["file"],
        idempotency_key=f"report-{run.run_id}",
        checkpoint_invariant="the file at output.path holds the whole report",
    )
    return {**written, "topic": topic, "names": len(names), "submodules": len(submodules), "words": report["words"]}


# ----------------------------------------------------------------------------------------------------------------------
# Gathering: what the interpreter knows about the topic.
# ----------------------------------------------------------------------------------------------------------------------


def load(topic: str) -> Any:
    """Import the topic, if it is a module of the standard library that may be imported."""
    root = str(topic).partition(".")[0]
    if root not in sys.stdlib_module_names or any(part.startswith("_") for part in str(topic).split(".")):
        near = difflib.get_close_matches(root, sys.stdlib_module_names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near and not near[0].startswith("_") else ""
        raise UnknownTopic(f"{topic!r} is not a module of Python's standard library.{hint}")
    if root in NOT_IMPORTED:
        raise UnknownTopic(f"{root!r} {NOT_IMPORTED[root]}, so no report imports it.")
    try:
        return importlib.import_module(topic)
    except ImportError as exc:
        raise UnknownTopic(f"{topic!r} cannot be imported here: {exc}.") from exc


def make_plan(topic: str) -> dict[str, Any]:
    """Which public names and submodules the report covers."""
    module = load(topic)
    exported = getattr(module, "__all__", None)

    def belongs(name: str, value: Any) -> bool:
        if exported is not None:
            return name in exported
        return not inspect.ismodule(value) and (inspect.getmodule(value) or module) is module

    names = [name for name, value in inspect.getmembers(module) if pydoc.visiblename(name) and belongs(name, value)]
    inside = pkgutil.iter_modules(getattr(module, "__path__", []))
    submodules = [found.name for found in inside if not found.name.startswith("_") and found.name not in NOT_IMPORTED]
    return {"topic": topic, "python": platform.python_version(), "names": names, "submodules": submodules}


def read_overview(topic: str) -> dict[str, Any]:
    """The module's own docstring, and how much source stands behind it."""
    module = load(topic)
    source = source_of(module)
    return {
        "doc": inspect.getdoc(module) or "",
        "file": "/".join(Path(module.__file__).parts[-2:]) if getattr(module, "__file__", None) else None,
        "lines": source.count("\n"),
    }


def document_names(topic: str, names: list[str]) -> list[dict[str, Any]]:
    """Each public name: its kind, signature, documentation, home, and the other names that it mentions."""
    module, known = load(topic), set(names)
    entries = []
    for name in names:
        value = getattr(module, name)
        kind = kind_of(value)
        # A class without a docstring would show its parent's, a constant that of its type: neither is its own.
        doc = (value.__doc__ if inspect.isclass(value) else inspect.getdoc(value)) if kind != "constant" else None
        doc = without_signature(name, inspect.cleandoc(doc)) if isinstance(doc, str) else ""
        spoken_of = names_in(source_of(value) + " " + doc) if kind != "constant" else set()
        entry = {
            "name": name,
            "kind": kind,
            "home": getattr(value, "__module__", None) or topic,
            "signature": signature_of(name, value, kind),
            "summary": first_sentence(doc) or fallback_summary(value, kind),
            "doc": doc,
            "mentions": sorted((spoken_of & known) - {name}),
        }
        if kind == "class":
            entry["methods"] = methods_of(value)
        entries.append(entry)
    return entries


def read_submodules(topic: str, submodules: list[str]) -> list[dict[str, Any]]:
    """What each submodule says of itself, read from its source without running it."""
    found = []
    package = load(topic)
    for finder, name, is_package in pkgutil.iter_modules(getattr(package, "__path__", [])):
        path = Path(finder.path) / (f"{name}/__init__.py" if is_package else f"{name}.py")  # type: ignore[union-attr]
        if name not in submodules or not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        names = [getattr(node, "name", "_") for node in tree.body]  # of its functions and classes
        public = [name for name in names if not name.startswith("_")]
        doc = ast.get_docstring(tree) or ""
        found.append(
            {"name": f"{topic}.{name}", "summary": first_sentence(doc), "public": public, "lines": source.count("\n")}
        )
    return found


def kind_of(value: Any) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    if inspect.iscoroutinefunction(value):
        return "coroutine"
    return "function" if inspect.isroutine(value) else "constant"


def names_in(text: str) -> set[str]:
    """Words that stand for something with that name: capitalised ones, and others where they are called.

    "timeout" alone is mostly a parameter, and `self.wait()` a method of the same name.
    """
    return set(re.findall(r"\b[A-Z]\w*|(?<!self\.)(?<!def )\b[a-z_]\w*(?=\()", text))


def source_of(value: Any) -> str:
    """The source, or nothing for what is written in C."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""


def signature_of(name: str, value: Any, kind: str) -> str:
    """`name(arguments)`; for a plain constant its value; without memory addresses, which differ in each process."""
    if kind == "constant":
        plain = isinstance(value, (bool, int, float, str)) and len(repr(value)) <= 60
        return f"{name} = {str(value) if isinstance(value, int) else repr(value)}" if plain else name
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        return f"{name}(...)" if kind != "exception" else name
    signature = re.sub(r" at 0x[0-9a-f]+", "", signature).replace("<lambda>", "lambda")
    signature = re.sub(r"<(?:function |class |object |built-in function )?'?([\w.]+)'?[^<>]*>", r"\1", signature)
    return name + (signature if kind != "exception" else "")


def methods_of(cls: type) -> list[dict[str, str]]:
    """The public methods that the class itself brings, documented ones first."""
    own = [name for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name, None))]
    methods = [(name, inspect.getdoc(getattr(cls, name)) or "") for name in own]
    documented = sorted(methods, key=lambda method: not method[1])
    return [{"name": name, "summary": first_sentence(without_signature(name, doc))} for name, doc in documented]


def without_signature(name: str, doc: str) -> str:
    """Docstrings of C functions, named tuples and dataclasses begin with a signature; the report has its own."""
    lines = doc.split("\n")
    while lines and lines[0].startswith(f"{name}("):
        lines.pop(0)
    return "\n".join(lines).strip()


def first_sentence(doc: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = re.sub(r"\s+", " ", doc.split("\n\n")[0]).strip()
    return re.split(r"(?<=[^.].[.!?])\s+(?=[A-Z`'\"])", paragraph, maxsplit=1)[0]


def fallback_summary(value: Any, kind: str) -> str:
    if kind in ("class", "exception"):
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        return f"A kind of `{bases[0]}`; it has no docstring." if bases else "It has no docstring."
    return f"A value of type `{type(value).__name__}`." if kind == "constant" else "It has no docstring."


# ----------------------------------------------------------------------------------------------------------------------
# Thinking: from what was gathered to a text. Pure functions.
# ----------------------------------------------------------------------------------------------------------------------


def rank(names: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names by importance, best first: PageRank over mentions, so a name counts as much as those that speak of it.

    A mention is a word in a source or docstring (see names_in): a proxy, and a module written in C shows only its
    docstrings. Between equals, the longer documentation wins.
    """
    mentions = {entry["name"]: entry["mentions"] for entry in names}
    weight = dict.fromkeys(mentions, 1 / max(1, len(mentions)))
    for _ in range(40):  # settles to three digits long before
        silent = sum(weight[name] for name, others in mentions.items() if not others)  # shared out among all
        base = (1 - DAMPING + DAMPING * silent) / max(1, len(mentions))
        following = dict.fromkeys(mentions, base)
        for name, others in mentions.items():
            for other in others:
                following[other] += DAMPING * weight[name] / len(others)
        weight = following
    best = max(weight.values(), default=1)
    mentioned_by = Counter(other for others in mentions.values() for other in others)
    length = {entry["name"]: len(entry["doc"]) for entry in names}
    order = sorted(weight, key=lambda name: (-round(weight[name], 9), -length[name], name))
    return [
        {"name": name, "score": round(100 * weight[name] / best), "mentioned_by": mentioned_by[name]} for name in order
    ]


def compose(
    plan: dict[str, Any],
    overview: dict[str, Any],
    names: list[dict[str, Any]],
    submodules: list[dict[str, Any]],
    ranking: list[dict[str, Any]],
) -> dict[str, Any]:
    """The report as Markdown, with its hash and length."""
    topic, entries = plan["topic"], {entry["name"]: entry for entry in names}
    place = {row["name"]: number for number, row in enumerate(ranking)}
    kinds = Counter(entry["kind"] for entry in names)
    counted = [f"{count} {kind if count == 1 else plural(kind)}" for kind, count in sorted(kinds.items())]
    facts = [f"**{len(names)} public names**" + (f": {', '.join(counted)}" if counted else "")]
    if overview["lines"]:
        total = overview["lines"] + sum(module["lines"] for module in submodules)
        also = f" and {len(submodules)} submodules" if submodules else ""
        facts.append(f"**{total:,} lines** of Python in `{overview['file']}`{also}")
    else:
        facts.append("written in C: no Python source to read")
    lines = [f"# The module `{topic}`", "", f"What Python {plan['python']} says of it.", ""]
    lines += [*(f"- {fact}" for fact in facts), "", "## Overview", ""]
    lines += [*prose(overview["doc"] or "The module has no docstring."), ""]

    top = [row for row in ranking if entries[row["name"]]["kind"] != "constant"][:TABLE_ROWS]
    if top:
        lines += ["## The most important names", "", "| | name | | what it is | mentioned by |", "|-:|-|-|-|-:|"]
        for number, row in enumerate(top, 1):
            entry = entries[row["name"]]
            what = cell(entry["summary"])
            lines.append(f"| {number} | `{row['name']}` | {entry['kind']} | {what} | {row['mentioned_by']} |")
        lines += [
            "",
            "Ordered by PageRank over the names that mention each other in their source and documentation; the last",
            "column counts how many mention this one.",
            "",
        ]

    lines += ["## Details", ""]
    about = {module["name"]: module["summary"] for module in submodules}
    for title, section in sections(topic, names, place).items():
        lines += [f"### {title}", ""]
        if about.get(title.strip("`")):
            lines += [inline(about[title.strip("`")]), ""]
        if all(entry["kind"] == "constant" for entry in section):
            lines += [*(f"- `{entry['signature']}`" for entry in section), ""]
            continue
        for entry in section:
            lines += [f"#### `{entry['name']}`", ""]
            if entry["signature"] != entry["name"]:
                wrapped = textwrap.wrap(entry["signature"], SIGNATURE_WIDTH, subsequent_indent="    ")
                lines += ["```python", *wrapped, "```", ""]
            lines += [*prose(opening(entry["doc"]) or entry["summary"]), ""]
            methods = entry.get("methods", [])
            shown = [f"- `{m['name']}`" + (f": {inline(m['summary'])}" if m["summary"] else "") for m in methods]
            rest = len(shown) - METHODS_SHOWN
            lines += [*shown[:METHODS_SHOWN], *([f"- and {rest} more"] if rest > 0 else []), *([""] if shown else [])]

    if submodules:
        lines += ["## Submodules", "", "| submodule | what it says of itself | public names | lines |", "|-|-|-:|-:|"]
        for module in submodules:
            what = cell(module["summary"]) or "-"
            lines.append(f"| `{module['name']}` | {what} | {len(module['public'])} | {module['lines']:,} |")
        lines.append("")
    markdown = "\n".join(lines).rstrip() + "\n"
    digest = hashlib.sha256(markdown.encode()).hexdigest()
    return {"markdown": markdown, "sha256": digest, "words": len(markdown.split())}


def sections(topic: str, names: list[dict[str, Any]], place: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """A package by the module where a name lives, a single module by kind; best names first, constants last."""
    homes = {entry["home"] for entry in names if entry["kind"] != "constant"}
    by_home = sum(home.startswith(f"{topic}.") for home in homes) > 1
    grouped: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(names, key=lambda entry: (entry["kind"] == "constant", place[entry["name"]])):
        home = entry["home"] if entry["home"].startswith(topic) else topic  # an accelerator's name says nothing
        by_kind = plural(entry["kind"]).capitalize()
        title = f"`{home}`" if by_home and entry["kind"] != "constant" else by_kind
        grouped.setdefault(title, []).append(entry)
    return grouped


def opening(doc: str) -> str:
    """The first paragraph, and what it announces when it ends in a colon."""
    paragraphs = re.split(r"\n\s*\n", doc)
    return "\n\n".join(paragraphs[: 2 if paragraphs[0].rstrip().endswith(":") else 1])


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def inline(text: str) -> str:
    """A docstring's words as Markdown: old quotes and roles become code, and nothing turns into a tag or emphasis."""
    text = re.sub(r"(?::[\w:]+:)?(?<!`)`{1,2}~?([^`']+)(?:`{1,2}|')", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    pieces = re.split(r"(`[^`]*`)", text)  # code stays as it is, the rest is escaped
    special = r"([*`\\]|<(?=[A-Za-z/!?])(?!https?:)|(?<!\w)_|_(?!\w))"
    return "".join(p if p.startswith("`") and len(p) > 1 else re.sub(special, r"\\\1", p) for p in pieces)


def cell(text: str) -> str:
    return inline(text).replace("|", "\\|")


def prose(doc: str) -> list[str]:
    """A docstring as Markdown lines: paragraphs as they are; indented blocks, examples and what is set out as code."""
    lines: list[str] = []
    announced = False  # the paragraph before ended in a colon
    for block in re.split(r"\n\s*\n", doc.strip("\n")):
        rows = block.split("\n")
        if len(lines) + len(rows) > DOC_LINES:
            lines += ["(The docstring goes on.)", ""]
            break
        if len(rows) > 1 and re.fullmatch(r"([=~\-*])\1+", rows[1].strip()):  # an underlined heading
            lines += [f"**{inline(rows[0].strip())}**", ""]
            rows = rows[2:]
        listing = announced and len(rows) > 1 and not rows[0].startswith(("-", "*"))
        announced = block.rstrip().endswith(":")
        if rows and (listing or rows[0].startswith((" ", ">>>"))):
            if lines[-2:] == ["```", ""]:  # one example, not two
                lines[-2:] = [""]
            else:
                lines.append("```text")
            lines += [*textwrap.dedent("\n".join(rows)).split("\n"), "```", ""]
        elif rows:
            lines += [*inline("\n".join(rows)).split("\n"), ""]
    return lines[:-1]


# ----------------------------------------------------------------------------------------------------------------------
# Writing: the one step that others see.
# ----------------------------------------------------------------------------------------------------------------------


def write_report(file_name: str, markdown: str) -> dict[str, Any]:
    """Put the report into its folder: all of it or nothing, and the same however often it is done."""
    folder = Path(os.environ.get("TIDEBASE_REPORTS_DIR") or "reports")
    folder.mkdir(parents=True, exist_ok=True)
    data = markdown.encode()
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{file_name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / file_name)
    except BaseException:
        os.unlink(temporary)
        raise
    return {"path": str(folder / file_name), "bytes": len(data)}
