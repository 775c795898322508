"""What no linter holds: lengths, references, one test file per member, configs that pass."""

import ast
import re
from pathlib import Path

import pytest

from vpmoe.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "vpmoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.*ml"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def _name(path):
    return str(path.relative_to(REPOSITORY))


def _definitions(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in _definitions(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and _code_lines(node) > MAX_FUNCTION_LINES
    ]
    assert long == []


def _code_lines(node):
    """Lines of a function, its docstring left out: explaining at length is no offence."""
    first = node.body[0]
    has_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    text = first.end_lineno - first.lineno + 1 if has_text else 0
    return node.end_lineno - node.lineno + 1 - text


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_shapes_in_signatures_are_real_annotations(path):
    text = path.read_text(encoding="utf-8")
    assert "jaxtyping" not in text or "from __future__ import annotations" not in text


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in {"losses", "optim", "models"}],
    ids=_name,
)
def test_public_mathematics_names_its_source(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and not re.search(r"^\s*References:", ast.get_docstring(node) or "", re.MULTILINE)
    ]
    assert silent == []


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_megatron_and_print_stay_where_they_belong(path):
    room = path.relative_to(PACKAGE).parts[0]
    for node in _definitions(path):
        modules = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for module in modules:
            if module.split(".")[0] == "megatron":
                assert room in {"train", "storage"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or room == "cli"


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_every_config_passes_check(path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    code = main.run(["check", _name(path)])
    assert (code, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_every_config_starts_with_its_own_command(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(rf"# .*vpmoe .*{re.escape(_name(path))}", first), first


def test_the_repository_speaks_of_itself_alone():
    said = re.compile(r"/(work|tmp|opt)/|\bfallback\b", re.IGNORECASE)
    offenders = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in [*SOURCES, *CONFIGS]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if said.search(line)
    ]
    assert offenders == []
