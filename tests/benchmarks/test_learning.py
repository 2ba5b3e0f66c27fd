"""RESULTS.md is drawn from what is kept of runs, and says what stands there."""

import importlib
import json
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import learning
from vla.cli import parse_args
from vla.evaluation.settings import GROUP_OF
from vla.evaluation.statistics import group_means


def keep_run(folder: Path, before: float, after: float) -> None:
    """A run of two iterations of half a minute each, evaluated at the start and the end."""
    folder.mkdir(parents=True)
    lines = [{"iteration": i, "time/rollout": 20.0, "time/update": 10.0} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ends = [(0, 0, before), (2, 5000, after)]
    lines = [{"iteration": i, "global_step": step, "eval/success_once": rate} for i, step, rate in ends]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    description = {"commit": "abcdef0123", "uncommitted_changes": False, "device": "Acme(R) X1 CPU", "num_ranks": 2}
    (folder / "run_from_iteration_000000.json").write_text(json.dumps(description))
    for moment, rate in (("before", before), ("after", after)):
        success = {"success_once": rate, "wilson_95": [rate - 0.06, rate + 0.06], "episodes": 256}
        (folder / f"{moment}.json").write_text(json.dumps({"1.0": success, "0.0": success}))


def keep_settings(folder: Path, before: float, after: float) -> None:
    """That share of 32 episodes in each of the 16 settings."""
    for moment, share in (("before", before), ("after", after)):
        means = group_means(dict.fromkeys(GROUP_OF, (share, 32)))
        (folder / f"{moment}_settings.json").write_text(json.dumps({"settings": {}, "means": means}))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    chosen = "chosen: {by: training success, seen: nothing, repeated: none}"
    curve = (
        f"{{title: PPO, {chosen}, script: train_ppo.py, config: c.yaml, flags: {{num_iterations: 2}}, seeds: [0, 1]}}"
    )
    (tmp_path / "results" / "curves.yaml").write_text(f"ppo: {curve}\nnever_run: {curve}\n")
    (tmp_path / "RESULTS.md").write_text(f"written above\n{learning.BEGIN}\nold\n{learning.END}\nwritten below\n")
    return tmp_path


def drawn_with(place: Path, entry: str) -> str:
    """The page, after the curves got one more entry."""
    curves = place / "results" / "curves.yaml"
    curves.write_text(curves.read_text().replace("seeds: [0, 1]", f"seeds: [0, 1], {entry}"))
    learning.draw()
    return (place / "RESULTS.md").read_text()


def test_the_page_is_drawn_from_what_is_kept(place):
    keep_run(place / "results" / "ppo" / "seed_0", 0.25, 0.75)
    keep_run(place / "results" / "ppo" / "seed_1", 0.25, 0.85)
    learning.draw()
    page = (place / "RESULTS.md").read_text()
    assert page.startswith("written above\n") and page.endswith("written below\n") and "old" not in page
    assert "| PPO | 1 | abcdef0 | Acme X1, 2 ranks | 5,000 | 1.0 | 0.250 [0.19, 0.31] | 0.850 [0.79, 0.91] |" in page
    summary = "| PPO | 2 | Acme X1, 2 ranks | 1 | 0.250 | **0.800** (0.750 to 0.850) | +0.500 to +0.600 |\n"
    choices = "| PPO | training success | nothing | none |\n"
    order = [page.index(part) for part in ("](docs/learning.png)", summary, choices, "<details", "| abcdef0 |")]
    assert order == sorted(order) and page.count("<details") == page.count("</details>") == 2
    assert "--config c.yaml --num_iterations 2 --seed 0    # seeds [0, 1]" in page
    assert (place / "docs" / "learning.png").stat().st_size > 5000
    learning.draw()
    assert (place / "RESULTS.md").read_text() == page


def test_the_16_settings_are_drawn_where_they_were_run(place):
    folder = place / "results" / "ppo" / "seed_0"
    keep_run(folder, 0.25, 0.75)
    learning.draw()
    assert "16 settings" not in (place / "RESULTS.md").read_text()
    keep_settings(folder, 0.25, 0.5)
    page = drawn_with(place, "episodes_per_setting: 32")
    assert "PPO: the settings of evaluate.py</summary>\n\nEach of the 16 settings has 32 held-out episodes" in page
    assert "| mean of the 15 out-of-distribution settings | 0.250 [0.21, 0.29] | 0.500 [0.46, 0.54] |" in page
    other = place / "results" / "ppo" / "seed_1"
    keep_run(other, 0.25, 0.75)
    for start, heads in ((0.25, "before"), (0.75, "seed 0, before | seed 1, before")):
        keep_settings(other, start, 0.5)
        learning.draw()
        assert f"|  | {heads} | seed 0, after | seed 1, after |\n" in (place / "RESULTS.md").read_text()


def test_a_curve_may_go_on_with_other_flags(place):
    keep_run(place / "results" / "ppo" / "seed_0", 0.25, 0.75)
    page = drawn_with(place, "then: [{num_iterations: 3}]")
    assert "--num_iterations 2 --seed 0 --run_dir runs/my_run    # seeds [0]\n" in page
    assert "\ndeepspeed --num_gpus 2 train_ppo.py --resume runs/my_run --num_iterations 3\n```" in page
    first, second = learning.commands_of(learning.curves()["ppo"], 1, "/there")
    assert first[-2:] == ["--run_dir", "/there"] and second[4:6] == ["--resume", "/there"]


def test_a_run_with_uncommitted_changes_says_so(place):
    folder = place / "results" / "ppo" / "seed_0"
    keep_run(folder, 0.25, 0.75)
    path = folder / "run_from_iteration_000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"uncommitted_changes": True}))
    learning.draw()
    assert "| PPO | 0 | abcdef0 + changes |" in (place / "RESULTS.md").read_text()


def test_the_page_is_what_its_runs_and_curves_give(monkeypatch, tmp_path):
    """RESULTS.md was drawn after the last change of results/ and of the code that draws it."""
    root = learning.ROOT
    (tmp_path / "docs").mkdir()
    (tmp_path / "RESULTS.md").write_text((root / "RESULTS.md").read_text())
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    learning.draw()
    assert (tmp_path / "RESULTS.md").read_text() == (root / "RESULTS.md").read_text()


def test_what_a_curve_starts_from_is_made_once(place, monkeypatch):
    """A policy that the repository does not ship. Its commands stand before that of the run."""
    executed = []
    monkeypatch.setattr(learning, "execute", executed.append)
    keep_run(place / "results" / "ppo" / "seed_0", 0.25, 0.75)
    page = drawn_with(place, "start: {makes: policy, commands: [python record.py, python clone.py]}")
    assert "```bash\npython record.py\npython clone.py\ndeepspeed" in page
    curve = learning.curves()["ppo"]
    learning.make_start(curve)
    assert executed == [["python", "record.py"], ["python", "clone.py"]]
    (place / "policy").mkdir()
    learning.make_start(curve)
    assert len(executed) == 2


def test_nothing_to_draw_is_one_sentence(place):
    with pytest.raises(SystemExit, match="holds no run yet"):
        learning.draw()


def test_curves_name_what_exists():
    for curve in learning.curves().values():
        assert (ROOT / curve["script"]).is_file() and (ROOT / curve["config"]).is_file()
        assert ("grpo" in curve["script"]) == ("grpo" in curve["config"])


def test_every_curves_flags_are_taken():
    """`make reproduce` gives them to the scripts: a range that one of them leaves would end it after hours."""
    for curve in learning.curves().values():
        args_class = importlib.import_module(curve["script"].removesuffix(".py")).Args
        given: list[str] = []
        for command in learning.commands_of(curve, 0):
            flags = command[command.index(curve["script"]) + 1 :]
            given += flags[2:] if flags[0] == "--resume" else flags  # a resumed run keeps its flags
            args = parse_args(args_class, given, "")
        assert args.num_iterations == (curve.get("then") or [curve["flags"]])[-1].get("num_iterations", 16)


@pytest.mark.parametrize("cut", ['{"iteration": 2, "time/ro', '{"iteration": 2}\n', "\x00\n"])
def test_lines_that_are_cut_do_not_end_the_drawing(place, cut):
    """The last evaluation is drawn where the last minutes are known."""
    folder = place / "results" / "ppo" / "seed_0"
    keep_run(folder, 0.25, 0.75)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = folder / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 if name[0] == "m" else 2]) + cut)
    learning.draw()
    assert "| PPO | 0 | abcdef0 | Acme X1, 2 ranks | 5,000 | 0.5 |" in (place / "RESULTS.md").read_text()
