"""How hard the functions here are to read: cognitive complexity and depth of nesting.

    pip install cognitive_complexity                          # for development only, not in requirements.txt
    python benchmarks/complexity.py --top 20                  # the hardest functions of the repository
    python benchmarks/complexity.py train_ppo.py vla/models   # the functions of these files and folders

Cognitive complexity adds one for every branch and loop, and one more for every level around it
(G. Ann Campbell, "Cognitive Complexity", SonarSource 2018). Depth is the largest number of `if`, `for`, `while`,
`try`, `with` and `match` blocks around one statement. An `elif` is not deeper than its `if`.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parents[1]
READ = ("vla", "envs", "schemas", "benchmarks")  # the folders that are read by default, and the scripts at the root
BLOCKS = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Args:
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files and folders to read. The default is all code but the tests."""
    top: int = 20
    """How many functions to print, the hardest first. 0 prints all."""


class Measured(NamedTuple):
    """One function."""

    complexity: int
    depth: int
    name: str  # path:line name


def python_files(paths: tuple[Path, ...]) -> list[Path]:
    """The files that `paths` names. Without paths, all code but the tests."""
    chosen = paths or (*sorted(ROOT.glob("*.py")), *(ROOT / name for name in READ))
    return [file for path in chosen for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods with their names. A function inside a function belongs to the outer one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def depth(node: ast.AST) -> int:
    """The largest number of blocks around one statement inside a function.

    >>> depth(ast.parse("for row in rows:\\n    if row:\\n        print(row)"))
    2
    """
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        is_deeper = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, depth(child) + (1 if is_deeper else 0))
    return deepest


def measure(file: Path) -> list[Measured]:
    """The functions of one file."""
    from cognitive_complexity.api import get_cognitive_complexity

    shown = file.resolve().relative_to(ROOT) if file.resolve().is_relative_to(ROOT) else file
    return [
        Measured(get_cognitive_complexity(function), depth(function), f"{shown}:{function.lineno} {name}")
        for name, function in functions(ast.parse(file.read_text(encoding="utf-8")))
    ]


def main(args: Args) -> None:
    try:
        found = [measured for file in python_files(args.paths) for measured in measure(file)]
    except ModuleNotFoundError:
        sys.exit("error: the package cognitive_complexity is not installed: pip install cognitive_complexity")
    found.sort(key=lambda measured: (-measured.complexity, -measured.depth, measured.name))
    print(f"{'complexity':>10} {'depth':>5}  function")
    for measured in found[: args.top or None]:
        print(f"{measured.complexity:10} {measured.depth:5}  {measured.name}")
    print(f"{len(found)} functions, {sum(measured.complexity > 15 for measured in found)} of them above 15")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
