"""Write the generated pages of docs/, or check that they are up to date.

python scripts/docs.py            write docs/{cli,params,papers,results}.md
python scripts/docs.py --check    exit 1 and say which page is stale
"""

import ast
import difflib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from distillation_page import PICTURE, draw
from results_page import results_page

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "src" / "vpmoe"
STAMP = "<!-- written by scripts/docs.py from {source}; do not edit -->"
RESULTS = REPOSITORY / "benchmarks" / "results"
ROOMS_WITH_PAPERS = ("losses", "optim", "models")


def cli_page() -> str:
    """Every `--help` page, in the order of `vpmoe --help`."""
    from typer.main import get_command

    from vpmoe.cli.main import ORDER, app

    verbs = getattr(get_command(app), "commands", {})
    commands: list[list[str]] = [[]]
    for verb in ORDER:
        commands += [[verb], *([verb, part] for part in getattr(verbs[verb], "commands", ()))]
    parts = [STAMP.format(source="`vpmoe --help`"), "# The command line", CLI_INTRO]
    for words in commands:
        name = " ".join(["vpmoe", *words])
        parts += [f"## {name}", f"```text\n{_help(words)}\n```"]
    return "\n\n".join(parts) + "\n"


CLI_INTRO = """Files come first, `key=value` overrides after them, options anywhere.

Exit codes: 0 success, 1 a user's mistake, 2 wrong usage, 3 a failed check, 130 interrupted. Errors
are one `error:` line and one `hint:` line on stderr; `--debug` adds the traceback. When several
settings are wrong, all are reported at once."""


def _help(words: list[str]) -> str:
    plain = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "vpmoe", *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=plain,
    )
    return done.stdout.rstrip()


def params_page() -> str:
    """Sizes of every model in configs/models, counted."""
    from vpmoe.config import load
    from vpmoe.models.count import count
    from vpmoe.models.student import StudentConfig

    head = (
        "| model | parameters | active | active without embeddings | layers | hidden |\n"
        "|---|--:|--:|--:|--:|--:|"
    )
    rows = []
    for path in sorted((REPOSITORY / "configs" / "models").glob("*.toml")):
        config = load(path, StudentConfig)
        size = count(config)
        rows.append(
            f"| [{path.stem}](../configs/models/{path.name}) | {size.total:,} | {size.active:,} "
            f"| {size.active_without_embeddings:,} | {config.num_layers} | {config.hidden_size} |"
        )
    return (
        "\n\n".join(
            [
                STAMP.format(source="configs/models"),
                "# Model sizes",
                "Counted on the meta device by `vpmoe count`, which also itemizes them; nothing\n"
                "here is typed. Active: what one token uses.",
                "\n".join([head, *rows]),
            ]
        )
        + "\n"
    )


def papers_page() -> str:
    """The References of every public function and class of the rooms with mathematics."""
    parts = [
        STAMP.format(source="the docstrings"),
        "# Papers",
        "What each piece of mathematics is taken from, and what is done otherwise.",
    ]
    for room in ROOMS_WITH_PAPERS:
        entries = [
            f"* `{name}` ([source](../{path.relative_to(REPOSITORY)})): {text}"
            for path in sorted((PACKAGE / room).rglob("*.py"))
            for name, text in references(path)
        ]
        parts += [f"## {room}", "\n".join(entries) or "Nothing yet."]
    return "\n\n".join(parts) + "\n"


def references(path: Path) -> Iterator[tuple[str, str]]:
    """(name, References as one line) of each public definition of a file that has them."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        found = re.search(
            r"^References:\n((?:[ \t]+\S.*\n?|\n)+)",
            inspect.cleandoc(ast.get_docstring(node) or "") + "\n",
            re.MULTILINE,
        )
        if found:
            text = " ".join(found[1].split())
            if not re.match(r"own\b", text):
                yield node.name, text


PAGES = {
    "cli.md": cli_page,
    "params.md": params_page,
    "papers.md": papers_page,
    "results.md": lambda: results_page(RESULTS),
}


def main(words: list[str]) -> int:
    """Write the pages, or with --check compare them; the value is the exit code."""
    check = words == ["--check"]
    stale = 0
    for name, write in PAGES.items():
        path, text = DOCS / name, write()
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        stale += 1
        if check:
            print(f"docs/{name} is stale; run: make docs")
            changes = difflib.unified_diff(old.splitlines(), text.splitlines(), "kept", "now", n=0)
            print("\n".join(list(changes)[:12]))
        else:
            path.write_text(text, encoding="utf-8")
            print(f"docs/{name} written")
    if not check:
        draw(RESULTS, DOCS / PICTURE)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
