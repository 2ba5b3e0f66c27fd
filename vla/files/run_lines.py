"""The lines that a run appends to metrics.jsonl and evaluations.jsonl."""

import json
import sys
from pathlib import Path

from schemas import UserError, check, parse_json, require_file
from schemas.runs import Line


def text_lines(path: Path) -> list[bytes]:
    """The lines of a file that a run appends to, each with its line end. [] without the file."""
    if not path.exists():
        return []
    require_file(path, "remove it")
    return path.read_bytes().splitlines(keepends=True)


def read_line(text: bytes) -> dict[str, float] | None:
    """The content of a line of metrics.jsonl or evaluations.jsonl, or None if it is damaged."""
    try:
        found = check(Line, parse_json(text, "", ""), "")
    except UserError:
        return None
    return json.loads(text) if text.endswith(b"\n") and "iteration" in found else None


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl or evaluations.jsonl. Lines that a killed run or a full disk cut off are left out."""
    found = [read_line(line) for line in text_lines(path)]
    if None in found[:-1]:
        print(f"{path} has {found[:-1].count(None)} damaged lines, which are left out", file=sys.stderr)
    return [line for line in found if line is not None]


def read_evaluations(run_dir: Path) -> list[dict[str, float]]:
    """The lines of evaluations.jsonl that hold the result of an evaluation."""
    wanted = {"global_step", "eval/success_once", "eval/num_episodes", "eval/return"}
    return [line for line in read_lines(run_dir / "evaluations.jsonl") if wanted <= line.keys()]
