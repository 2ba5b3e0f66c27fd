"""Parts of `gpu_check.py --only world`, as one small row on the CPU: they must not rot until the next GPU."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT, SHARED
from launching import python

from benchmarks import bench, gpu_check, gpu_world

ASSETS = SHARED / "assets" / "maniskill"
STAND_IN = gpu_world.Settings.read('{"stand_in": true}')


def check_lines(lines: list[gpu_world.Line]) -> dict[str, float]:
    """Every line becomes a row of the table. Returns the values by name."""
    rows = [bench.Row(*json.loads(json.dumps(line))) for line in lines]
    assert rows and all("stand-in on the CPU" in row.setting for row in rows)
    assert "not done" not in "".join(bench.table(rows, {}))
    return {row.part: row.value for row in rows}


def test_world_is_twelve_minutes(monkeypatch):
    """--only world means its parts alone, in the order in which they stand, with limits of 12 minutes in total."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "world", "card"])
    parts = gpu_check.chosen_parts(gpu_check.parse().only)
    assert parts == ["card", *gpu_world.PARTS]
    assert sum(gpu_check.PARTS[part][1] for part in gpu_world.PARTS) <= 700  # and what starts them
    assert gpu_check.chosen_parts(None) == list(gpu_check.PARTS)


def test_a_part_of_world_is_a_program_with_its_settings(monkeypatch):
    """The command that is started is one that the program reads, and its result becomes rows."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "world", "--asset_dir", "/data/x"])
    flags, started = gpu_check.parse(), []

    def run(words: list[str], seconds: float) -> str:
        parsed = gpu_world.parse(words[1:])
        started.append((words[0], parsed.part, seconds))
        settings = gpu_world.Settings.read(parsed.settings)
        assert settings == gpu_world.Settings(asset_dir="/data/x") and parsed.function is not None
        return 'noise\nRESULT {"lines": [["what", "where", 1.5, "mm"]]}\n'

    monkeypatch.setattr(gpu_check, "run", run)
    for part, (_, limit) in gpu_world.PARTS.items():
        check, seconds = gpu_check.PARTS[part]
        _, rows = check(flags, seconds)
        assert rows == [bench.Row("what", "where", 1.5, "mm")] and seconds == limit
    assert started == [("benchmarks/gpu_world.py", part, limit) for part, (_, limit) in gpu_world.PARTS.items()]


def test_the_moved_object_lands():
    values = check_lines(gpu_world.world_move(STAND_IN))
    assert values["moved object, below 0.9 m"] == 1 and 0.8 < values["moved object, highest one step later"] < 0.95


@pytest.mark.full
@pytest.mark.parametrize("part", [part for part in gpu_world.PARTS if part not in ("world_move", "world_rest_bridge")])
def test_parts_of_world_on_the_stand_in(part):
    values = check_lines(gpu_world.PARTS[part][0](STAND_IN))
    if part == "world_start":
        assert values["start state against the settled one, positions"] < 1
        assert values["image against the CPU's"] < 0.2
    if part == "world_rest":
        assert values["objects at rest for 2 s, the farthest"] < 1 and values["parked bodies, the farthest"] < 1
    if part == "world_expert":
        assert values["expert's success"] == 1 and values["expert's steps with a grasp"] > 0
    if part == "world_draw":
        assert values["images drawn"] > 0


@pytest.mark.full
@pytest.mark.skipif(not ASSETS.exists(), reason=f"no published meshes at {ASSETS}")
def test_published_meshes_on_the_stand_in():
    """In a process of its own, which then has the hulls of PhysX's GPU simulation."""
    settings = json.dumps({"stand_in": True, "asset_dir": str(ASSETS)})
    run = python(ROOT / "benchmarks/gpu_world.py", "world_rest_bridge", "--settings", settings)
    assert run.returncode == 0, run.stderr[-2000:]
    values = check_lines(gpu_check.result_of(run.stdout)["lines"])
    assert values["objects at rest for 2 s, the farthest"] < 50
