"""Runs and evaluations side by side: groups, numbers, curves, pages, and folders that hold neither."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

import compare
from schemas import UserError
from vla.evaluation.pairs import choose_pairs, differing_episodes
from vla.reports.comparison_page import charts_of
from vla.reports.run_groups import (
    at_minute,
    at_step,
    differing_flags,
    gain_cell,
    group_curve,
    group_names,
    group_runs,
    groups_table,
    minutes_of,
    read_runs,
    runs_table,
    success_cell,
    tag,
)

RESULTS = ROOT / "results"


def made_up(folder: Path, evaluations: dict[int, float], seed: int = 0, last: int = 4, **flags) -> str:
    """A run folder with these successes per iteration, and one line of metrics for each iteration up to `last`."""
    folder.mkdir(parents=True)
    args = {"seed": seed, "num_envs": 8, "learning_rate": 1e-4, "critic": "state", "run_dir": str(folder)} | flags
    description = {"command": "train_ppo.py", "args": args, "sizes": {"num_iterations": 4}, "num_ranks": 1}
    description |= {"commit": "c", "uncommitted_changes": False, "device": "cpu", "started": "now"}
    (folder / "run_from_iteration_000000.json").write_text(json.dumps(description))
    lines = [
        {"iteration": i, "global_step": 100 * i + seed, "env/success_once": 0.1 * i, "env/num_episodes": 8}
        | {"time/iteration": 60.0, "time/eval": 30.0, "train/loss": 1.0 / i, "train/token_accuracy": 0.5}
        for i in range(1, last + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated = [
        {"iteration": i, "global_step": 100 * i + seed, "eval/success_once": success, "eval/num_episodes": 100.0}
        | {"eval/return": 2 * success}
        for i, success in evaluations.items()
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluated))
    return str(folder)


# ---------------------------------------------------------------------- groups
def test_seeds_of_one_setting_are_a_group_and_others_are_named_by_what_differs(tmp_path):
    folders = [
        made_up(tmp_path / "a", {0: 0.2, 4: 0.4}, seed=0),
        made_up(tmp_path / "b", {0: 0.2, 4: 0.9}, seed=0, learning_rate=1e-3),
        made_up(tmp_path / "c", {0: 0.2, 4: 0.6}, seed=1, save_freq=7, video_episodes=4),
        made_up(tmp_path / "d", {0: 0.2, 4: 0.3}, seed=0, group_size=4),
    ]
    groups = group_runs(read_runs(folders))
    assert [[run.label for run in group.runs] for group in groups] == [
        [folders[0], folders[2]],
        [folders[1]],
        [folders[3]],
    ]
    assert [group.name for group in groups] == [
        "PPO, learning_rate 0.0001",
        "PPO, learning_rate 0.001",
        "GRPO, learning_rate 0.0001",
    ]
    assert [group.letter for group in groups] == ["A", "B", "C"] and len({group.color for group in groups}) == 3


def test_the_kept_seeds_of_make_train_are_one_group():
    groups = group_runs(read_runs([str(path) for path in sorted((RESULTS / "make_train").glob("seed_*"))]))
    (row,) = groups_table(groups)[1:]
    assert row[1:3] == ["PPO", "0, 1, 2, 3, 4"]
    assert row[3] == "46.1 [40.1, 52.2]"  # of one policy on the same episodes: over episodes, not over seeds
    assert row[4].startswith("71.0 [66.3, 75.7]") and row[6] == "63,449 to 63,690 env steps"
    assert len(runs_table(groups)) == 6


def test_names_are_never_the_same():
    flags = [{"algorithm": "PPO", "model_path": f"{place}/policy"} for place in ("a", "b")]
    assert group_names(flags) == ["model_path policy (1)", "model_path policy (2)"]
    many = [{"algorithm": "PPO"} | {f"flag_{k}": "same" for k in range(4)} for _ in range(3)]
    many[0]["flag_3"], many[1]["flag_2"], many[2]["flag_1"] = "x", "y", "z"
    many[0]["flag_0"] = "w"
    assert len(set(group_names(many))) == 3 and differing_flags(many) == ["flag_0", "flag_1", "flag_2", "flag_3"]


# ---------------------------------------------------------------------- curves and numbers
def test_a_curve_is_the_mean_over_seeds_with_their_range(tmp_path):
    folders = [made_up(tmp_path / str(s), {0: 0.2, 2: 0.3 + 0.2 * s, 4: 0.8}, seed=s) for s in (0, 1)]
    (group,) = group_runs(read_runs(folders))
    curve = group_curve(group, "evaluations", tag("eval/success_once"), at_step)
    assert curve.x == [0.5, 200.5, 400.5] and curve.y == pytest.approx([0.2, 0.4, 0.8])
    assert curve.low == pytest.approx([0.2, 0.3, 0.8]) and curve.high == pytest.approx([0.2, 0.5, 0.8])
    minutes = group_curve(group, "evaluations", tag("eval/success_once"), at_minute)
    assert minutes.x == pytest.approx([0.0, 1.0, 2.0])  # half a minute of training per iteration


def test_a_single_run_has_the_interval_over_its_episodes(tmp_path):
    (group,) = group_runs(read_runs([made_up(tmp_path / "a", {0: 0.5})]))
    curve = group_curve(group, "evaluations", tag("eval/success_once"), at_step)
    assert curve.low == pytest.approx([0.404], abs=1e-3) and curve.high == pytest.approx([0.596], abs=1e-3)


def test_a_mean_does_not_jump_where_a_running_seed_ends(tmp_path):
    folders = [
        made_up(tmp_path / "a", {0: 0.2, 2: 0.4, 4: 0.9}),
        made_up(tmp_path / "b", {0: 0.2, 2: 0.6}, seed=1, last=2),
    ]
    (group,) = group_runs(read_runs(folders))
    assert group_curve(group, "evaluations", tag("eval/success_once"), at_step).y == pytest.approx([0.2, 0.5])
    assert [row[3] for row in runs_table([group])[1:]] == ["finished after iteration 4 of 4", "after iteration 2 of 4"]
    assert gain_cell(group.runs).startswith("+55.0 [")


def test_numbers_of_runs_without_a_result():
    assert success_cell([]) == "-" and minutes_of([]) == {}
    assert success_cell([{"eval/success_once": 0.5, "eval/num_episodes": 100}]) == "50.0 [40.4, 59.6]"


def test_cloning_has_charts_of_its_own(tmp_path):
    cloning = made_up(tmp_path / "a", {0: 0.1, 4: 0.3}, updates_per_iteration=10)
    learning = made_up(tmp_path / "b", {0: 0.3, 4: 0.8})
    charts = charts_of(group_runs(read_runs([cloning, learning])))
    kinds = [chart.ident for chart in charts]
    assert kinds == [
        "held-out-steps",
        "held-out-minutes",
        "training-steps",
        "return-steps",
        "cloned-loss",
        "cloned-accuracy",
        "cloned-held-out",
    ]


# ---------------------------------------------------------------------- the script
def test_the_files_of_a_comparison(tmp_path, capsys):
    one, other = made_up(tmp_path / "a", {0: 0.2, 4: 0.4}), made_up(tmp_path / "b", {0: 0.2, 4: 0.9}, num_envs=4)
    assert compare.main([one, other, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| B | num_envs 4 | 0 | 20.0 [13.3, 28.9] | 90.0 [82.6, 94.5] | +70.0 |" in said
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["comparison.json", "comparison.md", "comparison.png", "report.html"]
    assert all(f"{tmp_path}/out/{name}" in said for name in names if not name.endswith("json"))
    tables = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert tables["flags"][1] == ["num_envs", "8", "4"] and len(tables["runs"]) == 3
    assert compare.main([one, "--output", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_run_that_has_just_begun_is_shown(tmp_path, capsys):
    folder = Path(made_up(tmp_path / "a", {}, last=0))
    assert compare.main([str(folder), "--output", str(tmp_path / "out")]) == 0
    assert "None of these runs has a result yet" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda place: None, "is not a folder"),
        (Path.touch, "is not a folder"),
        (Path.mkdir, "holds no run, since it has no run_from_iteration_"),
        (lambda place: made_up(place, {}) and (place / "evaluation.json").touch(), "is an evaluation, not a run"),
    ],
)
def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys, make, sentence):
    make(tmp_path / "x")
    assert compare.main([str(tmp_path / "x"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/x") and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_is_named_once(tmp_path):
    folder = made_up(tmp_path / "a", {})
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="is the same folder as"):
        read_runs([folder, str(tmp_path / "link")])


def test_damaged_lines_of_a_run_are_left_out(tmp_path):
    folder = Path(made_up(tmp_path / "a", {0: 0.2, 4: 0.4}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "glo')
    (run,) = read_runs([str(folder)])
    assert len(run.record.lines) == 4


EVIL = "<script>document.title='owned'<"


def test_names_of_strangers_are_text_in_the_page(tmp_path):
    folder = Path(made_up(tmp_path / EVIL, {0: 0.2, 4: 0.4}))
    other = made_up(tmp_path / "b", {0: 0.2}, instruction="<img src=x onerror=alert(1)>$x$")
    assert compare.main([str(folder), other, "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>document.title" not in page and "<img" not in page
    assert "&lt;script&gt;document.title" in page and "&lt;img src=x" in page


# ---------------------------------------------------------------------- two evaluations
def half(successes: dict[int, bool]) -> dict:
    """The part of results.json that a comparison reads, for one setting."""
    outcomes = [{"episode_id": name, "success_once": float(ok)} for name, ok in successes.items()]
    return {"temperature": 1.0, "settings": {"Single-v1:train": {"outcomes": outcomes}}, "other_temperatures": {}}


def test_episodes_in_which_two_policies_differ():
    first, second = half({1: True, 2: False, 3: True, 4: True, 9: True}), half({1: True, 2: True, 3: False, 4: False})
    pairs = differing_episodes(first, second)
    assert [(pair.episode_id, pair.first_succeeded) for pair in pairs] == [(2, False), (3, True), (4, True)]
    assert [pair.episode_id for pair in choose_pairs(pairs, 2)] == [2, 3]  # by turns
    assert [pair.episode_id for pair in choose_pairs(pairs, 9)] == [2, 3, 4] and choose_pairs(pairs, 0) == []
    other = [replace(pair, setting="Carrot-v1:test") for pair in pairs]
    chosen = [(pair.setting, pair.episode_id) for pair in choose_pairs([*pairs, *other], 4)]
    assert chosen == [("Single-v1:train", 2), ("Carrot-v1:test", 2), ("Single-v1:train", 3), ("Carrot-v1:test", 3)]
    assert pairs[0].outcomes == ("failed", "success")
    assert differing_episodes(first, half({})) == []


@pytest.fixture
def kept_runs(tmp_path) -> list[str]:
    """Two kept seeds, in folders of their own."""
    for seed in (0, 1):
        shutil.copytree(RESULTS / "make_train" / f"seed_{seed}", tmp_path / f"seed_{seed}")
    return [str(tmp_path / f"seed_{seed}") for seed in (0, 1)]


def test_no_place_of_this_machine_is_in_the_page(kept_runs, tmp_path, monkeypatch):
    assert compare.main([*kept_runs, "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{tmp_path}/seed_0 {tmp_path}" not in page and "python compare.py ..." in page
