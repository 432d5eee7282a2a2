"""No fault is swallowed: a handler for everything raises again or tells the user, and the table of faults has no loss."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROAD = {"Exception", "BaseException"}


def names_in(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if node is not None else set()


def find_swallows(tree):
    """Lines of handlers for everything that neither raise nor use the exception, and of ``suppress(Exception)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or names_in(node.type) & BROAD):
            raises = any(isinstance(part, ast.Raise) for part in ast.walk(node))
            uses = node.name is not None and any(node.name in names_in(statement) for statement in node.body)
            if not raises and not uses:
                yield node.lineno
        is_suppress = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "suppress"
        if is_suppress and any(names_in(argument) & BROAD for argument in node.args):
            yield node.lineno


@pytest.mark.parametrize("path", sorted((ROOT / "scanlib").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_exception_is_swallowed(path):
    assert not list(find_swallows(ast.parse(path.read_text("utf-8"))))


def test_the_search_finds_swallows():
    for code in (
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, BaseException): x = 1",
        "with contextlib.suppress(Exception): f()",
        "try: f()\nexcept Exception as error: print('something')",
    ):
        assert list(find_swallows(ast.parse(code)))
    for code in (
        "try: f()\nexcept ValueError: pass",
        "try: f()\nexcept Exception as error: show(error)",
        "try: f()\nexcept Exception: raise",
    ):
        assert not list(find_swallows(ast.parse(code)))


def test_the_table_of_faults_has_no_loss():
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "benchmarks" / "FAULTS.md").read_text("utf-8"), re.M)
    assert len(rows) >= 13
    for fault, tried, survived, lost in rows:
        assert int(lost) == 0 and int(tried) == int(survived) > 0, fault
