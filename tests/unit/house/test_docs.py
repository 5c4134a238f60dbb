"""What the pages name is there: files and folders, and what docs/from-kata.md says of where a thing
is done."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pyblock

ROOT = Path(__file__).resolve().parents[3]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")),
]
FOLDERS = "pyblock|csrc|tests|docs|benchmarks|scripts"


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_that_a_page_links(page: str) -> None:
    linked = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    local = {name for name in linked if "://" not in name}
    assert {name for name in local if not (ROOT / page).parent.joinpath(name).exists()} == set()


def defined() -> set[str]:
    """All that the package defines: functions, classes, and `Class.member`."""
    found: set[str] = set()
    for path in Path(pyblock.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for name in members(node)}
    return found


def members(node: ast.ClassDef) -> set[str]:
    names = {
        one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for one in ast.walk(node):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            names.add(one.target.id)
        elif isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store):
            names.add(one.attr)
    return names


def test_where_the_originals_jobs_are_done() -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "docs/from-kata.md").read_text().splitlines()
        if line.startswith("|")
    ]
    named = {name for row in rows for name in re.findall(r"`([A-Z]\w+\.\w+)\b", row[2])}
    assert len(named) > 15, "the table has another form than this test reads"
    assert named - defined() == set()
