"""Imports point one way, functions are short, and what the documents name exists."""

import ast
import importlib
import re

import pytest

from conftest import ROOT

FOLDERS = ".", "fast", "support", "report", "experiments"
FILES = [
    path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
]
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
# each may import what comes before it, and in a folder also what is beside it
ORDER = ["files", "support", "fast report", "locality model", "prepare_data", "eval", "sample"]
ORDER += ["view", "train", "sweep hub", "experiments"]
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}


def module(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def rank(name):
    """The position in ORDER of a module, or of a name in it; None if it is not of this project."""
    if f"{name}.".startswith("support.files."):
        return RANKS["files"]
    return RANKS.get(name.split(".")[0])


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    mine = rank(module(path))
    assert mine is not None, "the position of this file in ORDER is not known"
    for name in imported(TREES[path]):
        beside = path.parent.name and name.startswith(f"{path.parent.name}.")
        assert rank(name) is None or rank(name) < mine or beside and mine > 0, name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_are_short_and_share_no_variables(path):
    for node in ast.walk(TREES[path]):
        assert not isinstance(node, ast.Nonlocal), node.lineno
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_top_level_holds_the_lesson_and_no_supporting_code():
    """conftest.py prints the size of every file at the end of the tests."""
    supporting = re.compile(r"flock|fsync|mallopt|zipfile|signal\.signal|re\.compile|hashlib\.file")
    for path in ROOT.glob("*.py"):
        assert not supporting.findall(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name], ids=str)
def test_no_pattern_relies_on_what_older_pythons_match_wrongly(path):
    """Before Python 3.11.5, the possessive and atomic groups of `re` are wrong; `regex` is not."""
    for value in vars(importlib.import_module(module(path))).values():
        if isinstance(value, re.Pattern):
            pattern = re.sub(r"\\.|\[[^]]*\]", "x", str(value.pattern))  # a character or a class
            assert not re.search(r"[*+?}]\+|\(\?>", pattern), pattern


def test_every_promise_names_tests_that_there_are():
    known = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        known |= {path.name, *(name for name in names if name.startswith("test_"))}
    text = " ".join((ROOT / "docs" / "PROMISES.md").read_text(encoding="utf-8").split())
    promises = re.split(r" (?=\d+\. \*\*)", text)[1:]
    assert len(promises) >= 10
    for promise in promises:
        named = re.findall(r"Tests: ((?:`[\w.]+`(?:, )?)+)", promise)
        names = [name for group in named for name in re.findall(r"[\w.]+", group)]
        assert names, promise
        for name in names:
            assert any(name in test for test in known), name


def headings(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name
)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not place or place in headings(target), link
