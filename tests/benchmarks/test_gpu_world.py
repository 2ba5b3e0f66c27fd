"""Parts of `gpu_check.py --only world`, as one small row on the CPU: they must not rot until the next GPU."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT, SHARED
from launching import python

import train_ppo
from benchmarks import bench, gpu_check, gpu_iteration, gpu_world
from vla.cli import parse_args

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


def test_the_first_list_is_twelve_minutes(monkeypatch):
    """Without flags, the most valuable parts run, and the first of them is what shares are computed from."""
    assert gpu_check.chosen_parts(None) == gpu_check.chosen_parts(["first"]) == list(gpu_check.FIRST)
    assert sum(seconds for _, seconds in gpu_check.FIRST.values()) <= 700  # and what starts them
    assert list(gpu_check.FIRST)[:2] == ["card", "logprobs"]


@pytest.mark.parametrize("recipe", gpu_iteration.STEPS)
def test_an_iteration_on_a_card_is_the_recipes(recipe):
    """Only sizes and the places of models, assets and runs differ, and an optimizer step has as many decisions."""
    words = gpu_iteration.flags_of(recipe, 2, tiny=False, run_dir="/tmp/x")
    own, card = (vars(parse_args(train_ppo.Args, given, "", offline=True)) for given in (words[:2], words))
    changed = {name for name, value in own.items() if card[name] != value}
    places = {"model_path", "lora_path", "lora_rank", "asset_pack", "asset_dir", "run_dir"}
    sizes = {"num_envs", "num_steps", "num_minibatches", "num_iterations", "num_eval_envs", "num_env_workers"}
    assert changed <= places | sizes | {"eval_freq", "save_freq", "video_episodes"}

    def decisions(flags: dict, ranks: int) -> float:
        return flags["num_envs"] * flags["num_steps"] / flags["num_minibatches"] / ranks

    assert decisions(card, 1) == decisions(own, gpu_iteration.GPUS)


@pytest.mark.parametrize(
    "name, peak, source",
    [
        ("NVIDIA H200", 989, "data sheet"),
        ("NVIDIA H100 PCIe", 756, "data sheet"),
        ("NVIDIA A100-SXM4-40GB", 312, "data sheet"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 200, "matrix peak"),
        ("NVIDIA Invented", 200, "matrix peak"),
    ],
)
def test_arithmetic_has_its_share_of_the_cards_peak(name, peak, source):
    limits = {"part": "limits", "ranks": 1, "device": "cuda", "dtype": "bfloat16"}
    limits |= {"matrix_flops_per_s": 2e14, "memory_bytes_per_s": 3e12}
    one = {"recipe": "r", "zero_stage": 2, "num_envs": 16, "num_steps": 40, "num_env_workers": 16, "env_steps": 640}
    one |= {"ratio_first_microbatch_error": 0.1}
    for stage in ("rollout", "update"):
        one |= {f"{stage}_s": 2.0, f"{stage}_flops": 1e14, f"{stage}_peak_gib": 30.0, f"{stage}_planned_gib": 40.0}
    rows = [*bench.limit_rows([limits]), *gpu_check.iteration_rows(one)]
    found = {row.part: row for row in gpu_check.with_shares(rows, name, [limits])}
    assert found["update, arithmetic"].share == pytest.approx(50 / peak)
    assert found["update, arithmetic"].limit == f"{source}, {peak} TFLOP/s"
    assert found["matrix peak"].share == (pytest.approx(200 / peak) if source == "data sheet" else None)
    assert found["update, memory"].share == 0.75 and found["update"].share is None
    assert gpu_check.with_shares(rows, "NVIDIA Invented", []) == rows


@pytest.mark.full
@pytest.mark.slow
def test_the_first_list_runs_dry(tmp_path):
    run = python("benchmarks/gpu_check.py", "--dry", "--output", tmp_path, "--machine", "m", timeout=3600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "not done" not in run.stdout
    for part in (
        "matrix peak",
        "log-probability of an action, deviation",
        "iteration",
        "update, memory",
        "images drawn",
    ):
        assert f"| {part} |" in run.stdout
    (arithmetic,) = {
        line.split(" | ")[4] for line in run.stdout.splitlines() if line.startswith("| update, arithmetic")
    }
    assert re.fullmatch(r"matrix peak, [\d.]+ TFLOP/s", arithmetic)


def test_a_part_of_world_is_a_program_with_its_settings(monkeypatch):
    """The command that is started is one that the program reads, and its result becomes rows."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "world", "--asset_dir", "/data/x"])
    flags, started = gpu_check.parse(), []

    def run(words: list[str], seconds: float, accelerator: str) -> str:
        assert accelerator == "cuda"
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
