"""Lines of Python by folder, and the size of functions. Only a function's length has a limit: 50 lines."""

import ast
from pathlib import Path
from typing import NamedTuple

from tests.conventions.rules import ROOT, files, projects

BRANCHES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler)
BRANCHES += (ast.match_case,)


class Function(NamedTuple):
    path: Path
    name: str
    lines: int
    complexity: int  # nearly as ruff's C901 counts it


def functions(root: Path) -> list[Function]:
    found = []
    for path in files(root):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = [*ast.walk(node)]
                complexity = sum(
                    isinstance(part, BRANCHES) or isinstance(part, ast.Try) and bool(part.orelse) for part in inner
                )
                found.append(Function(path, node.name, node.end_lineno - node.lineno + 1, complexity))
    return found


def lines_in(root: Path, *folders: str) -> int:
    """All lines of *.py below these folders, or below the root."""
    paths = [path for path in files(root) if path.suffix == ".py"]
    inside = [path for path in paths if not folders or any(path.is_relative_to(folder) for folder in folders)]
    return sum(len((root / path).read_text(encoding="utf-8").splitlines()) for path in inside)


def summary() -> list[str]:
    parts = ["tests", "tests/tools", *projects(ROOT), "shared"]
    counts = ", ".join(f"{part} {lines_in(ROOT, part):,}" for part in parts)
    found = functions(ROOT)
    longest, branchiest = max(found, key=lambda f: f.lines), max(found, key=lambda f: f.complexity)
    return [
        f"lines of Python: {lines_in(ROOT):,}; {counts}",
        f"longest function: {longest.lines} lines, {longest.name} in {longest.path}",
        f"highest complexity: {branchiest.complexity}, {branchiest.name} in {branchiest.path}",
    ]
