"""The table of 16 settings: its arithmetic, its episodes, its files, and the page in a real browser."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from chromium import Page, find_chromium
from conftest import ROOT
from launching import python, run_ranks, train
from made_up import observation

import evaluate
from envs import VARIANTS, eval_episode_ids, instructions, is_held_out, make_envs
from schemas import lock
from vla.distributed import REQUEUE, UserError
from vla.evaluation.episode_log import EpisodeLog
from vla.evaluation.settings import FAMILY, GROUP_OF, GROUPS, parse_settings
from vla.evaluation.statistics import (
    assemble,
    compare,
    comparison_table,
    group_means,
    headline,
    holm,
    markdown,
    mcnemar,
    means_table,
    published_means,
    wilson_interval,
)
from vla.evaluation.video import BORDER, BORDER_COLORS, FPS
from vla.models.loading import load_policy
from vla.models.saving import save_policy
from vla.reports.evaluation_page import write_report
from vla.start.flag_files import read_yaml
from vla.text import markdown_code, without_machine

PUBLISHED = read_yaml(ROOT / "benchmarks" / "published.yaml")
SMALL_WORLD = ["--image_size", "96", "96", "--sim_freq", "100", "--dtype", "float32"]


# ---------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize(
    "row, groups, average_of_ood, mean_of_15",
    [
        ("rlinf-openvla-base", (53.91, 38.75, 35.94, 42.06), 39.10, 38.10),
        ("rl4vla-ppo-by-rlinf", (93.75, 80.47, 75.00, 81.77), 79.15, 78.18),
        ("rlinf-ppo-openvla", (96.09, 82.03, 78.35, 85.42), 81.93, 80.99),
        ("rlinf-grpo-openvla", (84.38, 74.69, 72.99, 77.86), 75.15, 74.53),
        ("rlinf-oft-base", (28.13, 27.73, 12.95, 11.72), 18.29, 17.63),
        ("rlinf-ppo-oft", (97.66, 92.11, 64.84, 73.57), 77.05, 75.68),
        ("rlinf-grpo-oft", (94.14, 84.69, 45.54, 44.66), 60.64, 58.41),
    ],
)
def test_published_table_follows_from_its_counts(row, groups, average_of_ood, mean_of_15):
    """The published "average of OOD" is the mean of all 16 settings, to its two decimals (the base row is rounded)."""
    means = {name: 100 * mean["success_once"] for name, mean in published_means(PUBLISHED[row]).items()}
    assert [means[group] for group in GROUPS] == pytest.approx(list(groups), abs=0.0051)
    assert means["mean_of_16_published_average"] == pytest.approx(
        average_of_ood, abs=0.0135 if row == "rlinf-openvla-base" else 0.0051
    )
    assert means["mean_of_15_out_of_distribution"] == pytest.approx(mean_of_15, abs=0.0051)
    assert PUBLISHED[row]["published_average_of_ood"] == average_of_ood


def test_published_counts_per_setting_add_up_to_those_per_group():
    for row in PUBLISHED.values():
        for group, names in GROUPS.items() if "settings" in row else ():
            assert sum(row["settings"][name] for name in names) == row["successes"][group]


def test_means_count_every_setting_alike_and_only_whole_groups():
    rates = {name: (0.5, 4) for name in GROUP_OF} | {"Carrot-v1:train": (1.0, 400)}
    means = group_means(rates)
    assert means["mean_of_16_published_average"]["success_once"] == pytest.approx((15 * 0.5 + 1.0) / 16)
    assert means["vision"]["episodes"] == 20 and means["vision"]["wilson_95"] == list(wilson_interval(0.5, 20))
    del rates["EEPose-v1:test"]
    means = group_means(rates)
    assert means["execution"] is means["mean_of_16_published_average"] is None and means["semantic"] is not None


def test_there_are_16_settings_of_5_7_3_and_1():
    assert [len(names) for names in GROUPS.values()] == [1, 5, 7, 3] and len(GROUP_OF) == 16
    for one in parse_settings(["all"], VARIANTS, None):
        ids = eval_episode_ids(one.env_id, one.obj_set, 300)
        assert len(set(ids)) == 300 and all(map(is_held_out, ids))
        assert ids[:256] == eval_episode_ids(one.env_id, one.obj_set, 256)


def test_mcnemar_is_the_share_of_outcomes_at_least_as_uneven():
    for only_first, only_second in itertools.product(range(6), repeat=2):
        n, uneven = only_first + only_second, abs(only_first - only_second)
        outcomes = [abs(n - 2 * sum(coins)) >= uneven for coins in itertools.product((0, 1), repeat=n)]
        assert mcnemar(only_first, only_second) == pytest.approx(sum(outcomes) / len(outcomes))
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


# ---------------------------------------------------------------------- settings, logs, comparisons
def test_instructions_are_known_without_simulating():
    ids = eval_episode_ids(f"{FAMILY}Instruct-v1", "test", 3)
    with make_envs(f"{FAMILY}Instruct-v1", 3, obj_set="test", image_size=(32, 32), sim_freq=100) as envs:
        assert envs.reset(ids)["task_description"] == instructions(f"{FAMILY}Instruct-v1", "test", ids)


def test_prompts_that_are_longer_than_in_training_fit_and_change_nothing():
    """A wording of the test set has 31 tokens of the tiny vocabulary; padding does not change what is done."""
    settings = parse_settings(["Instruct-v1:test"], VARIANTS, None)
    ids = {"Instruct-v1:test": eval_episode_ids(f"{FAMILY}Instruct-v1", "test", 256)}
    policy = load_policy("openvla-tiny", value_head=False)
    obs = {"image": torch.randint(0, 255, (2, 96, 96, 3), dtype=torch.uint8), "task_description": ["put a on b"] * 2}
    with torch.no_grad():
        before = policy.act(obs, 0.0)[0]
        evaluate.fit_prompts(policy, settings, ids, None)
        assert policy.max_prompt_length == 31 and torch.equal(policy.act(obs, 0.0)[0], before)


def test_settings_by_group_name_and_full_id_each_once():
    def names(*words, instruction=None):
        return [one.name for one in parse_settings(words, VARIANTS, instruction)]

    assert names("all") == list(GROUP_OF)
    assert names("vision", "VisionImage-v1:test", "Carrot-v1:test") == [*GROUPS["vision"], "Carrot-v1:test"]
    assert names("in-distribution", f"{FAMILY}Carrot-v1:train") == ["Carrot-v1:train"]
    assert names("Main-v3:test") == ["Main-v3:test"]
    (cube,) = parse_settings(["PickCube-v1"], VARIANTS, "pick up the cube")
    assert (cube.env_id, cube.obj_set) == ("PickCube-v1", "train")


@pytest.mark.parametrize(
    "word, hint",
    [
        ("Carot-v1:test", "did you mean Carrot-v1:test"),
        ("visoin", "did you mean vision"),
        ("position-v1:test", "did you mean Position-v1:test"),
        ("Carrot-v1", "Carrot-v1:train, Carrot-v1:test"),
        ("Carrot-v1:tset", "did you mean Carrot-v1:test"),
        ("qqqqqqqq", "use all, a group such as vision"),
    ],
)
def test_misspelt_settings(word, hint):
    with pytest.raises(UserError, match=hint) as error:
        parse_settings([word], VARIANTS, None)
    assert word in str(error.value)


def fake_episode(episode_id: int, success: float) -> dict:
    actions = np.random.default_rng(episode_id).normal(size=(3, 7)).astype(np.float32)
    statistics = {"success_once": success, "success_at_end": success, "return": success, "episode_len": 3.0}
    return {"episode_id": episode_id, **statistics, "reward": success / 3, "seconds": 0.5, "actions": actions}


def fake_results(name: str, successes: dict[int, float], **world) -> dict:
    episodes = [fake_episode(episode_id, success) for episode_id, success in successes.items()]
    return assemble({0.0: {"Carrot-v1:test": episodes}}, {"name": name, "world": {"sim_freq": 500} | world})


def test_log_gives_back_every_bit_and_drops_a_cut_line(tmp_path, capsys):
    path = tmp_path / "episodes.jsonl"
    log, episodes = EpisodeLog(path), [fake_episode(5, 1.0), fake_episode(7, 0.0)]
    log.add("Carrot-v1:test", 0.6, episodes)
    log.close()
    path.write_bytes(path.read_bytes() + b'{"setting": "Carrot-v1:test", "temper')
    log = EpisodeLog(path)
    assert "last line is cut short" in capsys.readouterr().out
    assert log.missing("Carrot-v1:test", 0.6, [7, 6, 5]) == [6] and log.missing("Carrot-v1:test", 0.0, [7]) == [7]
    for ours, theirs in zip(log.episodes("Carrot-v1:test", 0.6, [5, 7]), episodes):
        assert ours.pop("actions").tobytes() == theirs.pop("actions").tobytes()
        assert ours == theirs
    log.add("Carrot-v1:test", 0.6, [fake_episode(6, 0.0)])
    log.close()
    assert [json.loads(line)["episode_id"] for line in path.read_text().splitlines()] == [5, 7, 6]


def test_a_lost_episode_counts_as_failed_and_is_said(tmp_path):
    """It has no actions. An evaluation that is resumed does not run it again."""
    lost = fake_episode(8, 0.0) | {"episode_len": 0.0, "actions": np.zeros((0, 7), np.float32)}
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    log.add("Carrot-v1:test", 0.0, [fake_episode(5, 1.0), lost])
    log.close()
    episodes = EpisodeLog(tmp_path / "episodes.jsonl").episodes("Carrot-v1:test", 0.0, [5, 8])
    assert episodes[1]["actions"].shape == (0, 7)
    results = assemble({0.0: {"Carrot-v1:test": episodes}}, {"name": "a", "world": {}})
    found = results["settings"]["Carrot-v1:test"]
    assert (found["episodes"], found["success_once"], found["lost"]) == (2, 0.5, 1)
    assert headline(results).splitlines()[1:] == [
        "of these, 1 lost the simulation again and again, which counts as failed"
    ]
    assert len(headline(fake_results("a", {1: 1.0})).splitlines()) == 1


def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "episodes.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="is not a regular file"):
        EpisodeLog(tmp_path / "episodes.jsonl")
    log = EpisodeLog(tmp_path / "more.jsonl")
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), log._file.fileno())
    with pytest.raises(UserError, match=r"more.jsonl could not be written \(No space left on device\): .* --resume"):
        log.add("Carrot-v1:test", 0.0, [fake_episode(1, 1.0)])
    about = dict.fromkeys(("command", "num_ranks", "device", "commit", "started"), "x")
    (tmp_path / "results.md.partial").symlink_to("/dev/full")
    results = fake_results("a", {1: 1.0}) | about | {"uncommitted_changes": False}
    results["settings"]["Carrot-v1:test"]["videos"] = []
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
        write_report(tmp_path, results, {})


def test_comparison_pairs_by_episode():
    first = fake_results("a", {i: float(i % 2) for i in range(40)})
    second = fake_results("b", {i: 1.0 for i in reversed(range(5, 60))})
    (row,) = compare(first, second)
    # of episodes 5 to 39, which both ran, 18 are odd: b alone succeeds in the 17 even ones
    assert (row["episodes"], row["only_first"], row["only_second"]) == (35, 0, 17)
    assert row["success_once"] == [18 / 35, 1.0] and row["p"] == pytest.approx(2 / 2**17) and row["differs"]
    assert comparison_table([row], ("a", "b"))[1][-1] == "b is better"
    (row,) = compare(first, first)
    assert row["p"] == 1.0 and not row["differs"]
    with pytest.raises(ValueError, match="sim_freq 500 and 100"):
        compare(first, fake_results("c", {1: 1.0}, sim_freq=100))
    with pytest.raises(ValueError, match="in common"):
        compare(first, fake_results("d", {99: 1.0}))


def test_means_that_no_row_has_are_left_out():
    one = fake_results("a", {1: 1.0, 2: 0.0})  # one setting of seven: no group is whole
    assert means_table(one, {}) == []
    header, ours, published = means_table(one, {"base": PUBLISHED["rlinf-ppo-oft"]})
    assert len(header) == 7 and ours[1:] == ["not run"] * 6 and "not run" not in published
    about = dict.fromkeys(("command", "num_ranks", "device", "commit", "started"), "x")
    assert "not run" not in markdown(one | about, {}) and "Carrot-v1:test" in markdown(one | about, {})


def compare_two(first: Path, second: Path, output: Path | None = None) -> None:
    """evaluate.py --compare"""
    folders = (str(first), str(second))
    evaluate.compare_evaluations(evaluate.Args(compare=folders, output=None if output is None else str(output)))


def test_compare_writes_table_and_plot(tmp_path, capsys):
    for name, value in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(fake_results(name, dict.fromkeys(range(12), value))))
    folders = (tmp_path / "a", tmp_path / "b")
    compare_two(*folders, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "There are 12." in page and "results.json has no world." in page and "<video" not in page
    assert "b is better" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][0]["only_second"] == 12
    assert iio.imread(tmp_path / "out" / "comparison.png").std() > 5
    with pytest.raises(UserError, match="older results"):
        compare_two(*folders, tmp_path / "out")
    with pytest.raises(UserError, match=r"no results\.json"):
        compare_two(folders[0], tmp_path)


# ---------------------------------------------------------------------- names that others chose
NAMES = ("run_$x_$y_{z", "a|b\nc <script>alert(1)</script> `d` [e](http://f) \\", "\udcff \x1b[31m 把 🥕", "n" * 5000)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:12]))
def test_names_are_data_in_plots_tables_and_pages(tmp_path, name):
    """As a checkpoint, a setting (an env's id) and a published row, in every file that is made."""
    about = {"name": name, "command": f"evaluate.py --instruction {name}", "uncommitted_changes": False}
    about |= dict.fromkeys(("num_ranks", "device", "commit", "started"), "x") | {"world": {}}
    episodes = {"Carrot-v1:test": [fake_episode(1, 1.0)], name: [fake_episode(2, 0.0)]}
    results = assemble({0.0: episodes}, without_machine(about))
    for one in results["settings"].values():
        one["videos"] = []
    published = {"row": PUBLISHED["rl4vla-ppo"] | {"name": name, "note": name, "source": name}}
    write_report(tmp_path, results, published)
    assert iio.imread(tmp_path / "results.png").std() > 5
    html, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "results.md"))
    outside_code = text.replace(markdown_code(about["command"]), "")
    assert outside_code != text and "<script>alert" not in html + outside_code and "](http" not in outside_code
    rows = [line for line in text.splitlines() if line.startswith("| ") and "greedy | 1 |" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [10, 10]
    for folder, success in (("a", 0.0), ("b", 1.0)):
        (tmp_path / folder).mkdir()
        half = fake_results(name.encode("utf-8", "replace").decode() + folder, dict.fromkeys(range(12), success))
        (tmp_path / folder / "results.json").write_text(json.dumps(half))
    compare_two(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    table = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 3 and "<script>" not in table
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_folder_name_with_everything_is_named(tmp_path):
    for name in NAMES[:3]:
        folder = tmp_path / (name.replace("/", "") + "_") / "checkpoints" / "iteration_000004" / "policy"
        folder.mkdir(parents=True)
        named = evaluate.name_of("checkpoint", folder)
        assert named.endswith("/iteration_000004") and named.isprintable() and named.encode("utf-8")


def test_markdown_code_can_not_be_left():
    assert markdown_code("a ` b `` c | d") == r"``` a ` b `` c \| d ```" and markdown_code("a\nb") == "`a b`"


def test_no_place_of_one_machine_is_kept(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    said = {"a": f"{ROOT}/runs/x", "b": ["--checkpoint /home/me/models/y", 3], "c": "--output=/scratch/secret/runs/z"}
    assert without_machine(said) == {"a": "runs/x", "b": ["--checkpoint ~/models/y", 3], "c": "--output=.../runs/z"}
    assert without_machine("put 1/2 cup on plate, 30 km/h") == "put 1/2 cup on plate, 30 km/h"


# ---------------------------------------------------------------------- bad input
def damaged(path: Path, change) -> None:
    """A JSON file after change(content) -> content, or text where a text comes back."""
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def without(key: str):
    return lambda content: {name: value for name, value in content.items() if name != key}


RESULT_DAMAGES = [
    (lambda content: json.dumps(content)[:200], "is not valid JSON"),
    (lambda content: "", "is empty"),
    (lambda content: [1], "an object with keys"),
    (lambda content: "null", "an object with keys"),
    (lambda content: json.dumps(content | {"name": "\ud800"}), "broken characters"),
    (without("name"), "has no name"),
    (without("world"), "has no world"),
    (without("settings"), "has no settings"),
    (without("temperature"), "has no temperature"),
    (without("other_temperatures"), "has no other_temperatures"),
    (lambda content: content | {"temperature": float("nan")}, "temperature NaN"),
    (lambda content: content | {"other_temperatures": {"hot": {"settings": {}}}}, "temperatures as keys"),
    (lambda content: content | {"settings": {"Carrot-v1:test": {"episodes": 3}}}, r"has no settings.Carrot-v1:test.o"),
    (lambda content: content | {"settings": {"x": {"outcomes": [{"episode_id": "5", "success_once": 1}]}}}, "a whole"),
    (lambda content: content | {"settings": {"x": {"outcomes": [{"episode_id": 5, "success_once": 7}]}}}, "at most 1"),
    (lambda content: content | {"settings": {"x": {"outcomes": []}}}, "in common"),
    (lambda content: '{"name": "a", "name": "b"}', "twice"),
    (lambda content: content | {"world": {"sim_freq": 500, "wind": 9}}, "evaluated with wind unknown"),
]


@pytest.mark.parametrize("change, sentence", RESULT_DAMAGES, ids=[sentence[:20] for _, sentence in RESULT_DAMAGES])
def test_a_comparison_of_other_files_is_one_sentence(tmp_path, change, sentence):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(fake_results(name, {1: 1.0, 2: 0.0})))
    damaged(tmp_path / "b" / "results.json", change)
    with pytest.raises(UserError, match=sentence) as error:
        compare_two(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


IDENTITY = {"policy": "idle", "weights": {}, "model": {"dtype": "float32"}, "seed": 0, "world": {"sim_freq": 100}}
IDENTITY_DAMAGES = [
    (lambda content: json.dumps(content)[:20], "is not valid JSON"),
    (lambda content: [], "an object with keys"),
    (without("seed"), "has no seed"),
    (lambda content: content | {"weights": {"model.safetensors": [1, 2]}}, "text"),
    (lambda content: content | {"seed": float("nan")}, "a whole number"),
    (lambda content: content | {"seed": 1}, "was started with seed 1, but now it is 0"),
    (lambda content: content | {"world": {}}, "started with world.sim_freq nothing, but now it is 100"),
    (lambda content: content | {"wind": 3}, "started with wind 3, but now it is nothing"),
]


@pytest.mark.parametrize("change, sentence", IDENTITY_DAMAGES, ids=[sentence[:20] for _, sentence in IDENTITY_DAMAGES])
def test_an_evaluation_of_other_files_does_not_go_on(tmp_path, change, sentence):
    (tmp_path / "evaluation.json").write_text(json.dumps(IDENTITY))
    damaged(tmp_path / "evaluation.json", change)
    before = (tmp_path / "evaluation.json").read_bytes()
    with pytest.raises(UserError, match=sentence):
        evaluate.find_output(str(tmp_path), True, IDENTITY)
    assert (tmp_path / "evaluation.json").read_bytes() == before


LINE_DAMAGES = [
    (b"{", "line 2 is not valid JSON"),
    (b"", "line 2 is empty"),
    (b"[]", "line 2 holds"),
    (b"\xff\xfe", "line 2 is not UTF-8"),
    ({"episode_id": "7"}, "line 2 has episode_id"),
    ({"return": float("nan")}, "line 2 has return NaN"),
    ({"actions": "AAAA"}, "line 2 has actions"),
    ({"actions": "%%"}, "line 2 has actions"),
    ({"actions": None}, "line 2 has actions"),
    ({"success_once": None}, "line 2 has success_once null"),
]


@pytest.mark.parametrize("damage, sentence", LINE_DAMAGES, ids=[repr(damage) for damage, _ in LINE_DAMAGES])
def test_a_damaged_episode_is_named(tmp_path, damage, sentence):
    path = tmp_path / "episodes.jsonl"
    log = EpisodeLog(path)
    log.add("Carrot-v1:test", 0.6, [fake_episode(number, 1.0) for number in (5, 7, 9)])
    log.close()
    lines = path.read_bytes().split(b"\n")
    lines[1] = json.dumps(json.loads(lines[1]) | damage).encode() if isinstance(damage, dict) else damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=f"{re.escape(str(path))} {sentence}"):
        EpisodeLog(path)
    assert path.read_bytes() == b"\n".join(lines)


def run_flags(**flags: object) -> dict:
    """What a run's args.json says of model and world, by default what evaluate.py has too."""
    defaults = dataclasses.asdict(evaluate.Args())
    return {name: defaults[name] for name in (*evaluate.MODEL_FLAGS, *evaluate.WORLD_FLAGS)} | flags


def fake_checkpoint(folder: Path, *files: str, flags: dict | None = None) -> Path:
    """A run folder whose newest checkpoint has these files."""
    policy = folder / "checkpoints" / "iteration_000004" / "policy"
    policy.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(run_flags(**flags or {})))
    for name in files:
        (policy / name).write_text("{}")
    return policy


@pytest.mark.parametrize(
    "files, flags, lacking",
    [
        (["config.json"], {"value_learning_rate": 1e-3}, "lacks value_head.safetensors"),
        (["config.json"], {"lora_rank": 32}, "lacks adapter_config.json"),
        (["config.json"], {"lora_rank": 0, "lora_path": "x"}, "lacks adapter_config.json"),
        (["config.json", "adapter_config.json"], {"lora_rank": 32}, "lacks adapter_model.safetensors"),
        (["config.json", "adapter_model.safetensors"], {}, "lacks adapter_config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], {}, "holds only an adapter.*--lora_path"),
        ([], {}, "has no config.json"),
    ],
)
def test_a_checkpoint_that_lost_a_part_is_refused(tmp_path, files, flags, lacking):
    policy = fake_checkpoint(tmp_path, *files, flags=flags)
    for path in (tmp_path, policy, *([policy.parent] if files else [])):
        with pytest.raises(UserError, match=lacking):
            evaluate.find_checkpoint(str(path))


def test_a_checkpoint_is_found_and_brings_its_flags(tmp_path):
    flags = {"value_learning_rate": 1e-3, "sim_freq": 100, "image_size": [96, 96], "asset_dir": None, "num_envs": 64}
    policy = fake_checkpoint(tmp_path, "config.json", "value_head.safetensors", flags=flags)
    for path in (tmp_path, policy.parent, policy):
        assert evaluate.find_checkpoint(str(path))[0] == policy
        args = evaluate.parse(["--checkpoint", str(path), "--sim_freq", "250"])
        assert (args.image_size, args.sim_freq, args.num_envs) == ((96, 96), 250, 16)
        assert evaluate.parse(["--checkpoint", str(path), "--oft-stop-token"]).oft_stop_token
        assert not evaluate.parse(["--no-oft_stop_token", "--checkpoint", str(path)]).oft_stop_token
    shutil.copytree(policy, tmp_path / "elsewhere" / "policy")  # a published layout: no run is known
    assert evaluate.find_checkpoint(str(tmp_path / "elsewhere" / "policy")) == (tmp_path / "elsewhere" / "policy", {})
    with pytest.raises(UserError, match="is not a folder"):
        evaluate.find_checkpoint(str(tmp_path / "nowhere"))


def test_a_checkpoint_that_lies_on_another_disk_keeps_the_flags_of_its_run(tmp_path):
    """It is linked from its run; with other flags the policy would be read in another way without a word."""
    flags = {"value_learning_rate": 1e-3, "sim_freq": 100}
    policy = fake_checkpoint(tmp_path / "run", "config.json", "value_head.safetensors", flags=flags)
    link = policy.parent
    moved = link.rename(tmp_path / link.name)
    link.symlink_to(moved)
    (tmp_path / "run2").symlink_to(tmp_path / "run")
    for path in (tmp_path / "run", link, policy, tmp_path / "run2"):
        assert evaluate.parse(["--checkpoint", str(path)]).sim_freq == 100, path


def test_a_strangers_run_adds_no_flag_and_imports_nothing(tmp_path, monkeypatch):
    """Its args.json is data: list items, texts and env ids in it are no words of a command line."""
    (tmp_path / "payload.py").write_text("import pathlib\npathlib.Path(__file__).with_name('OWNED').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = {"env_id": "payload:X-v1", "num_envs": 64, "settings": ["payload:X-v1"], "output": "elsewhere"}
    policy = fake_checkpoint(tmp_path / "run", "config.json", flags=flags)
    args = evaluate.parse(["--checkpoint", str(policy)])
    assert args.settings == ("all",) and args.num_envs == 16 and args.output is None and args.instruction is None
    with pytest.raises(UserError, match="trained on 'payload:X-v1', not on these settings"):
        evaluate.check_actor("checkpoint", str(policy), None, parse_settings(["all"], VARIANTS, None))
    for value in ([32, 32, "--settings", "payload:X-v1"], ["--settings", "payload:X-v1"], "--settings", None):
        (tmp_path / "run" / "args.json").write_text(json.dumps({"image_size": value}))
        with pytest.raises(UserError, match=r"args\.json has image_size"):
            evaluate.parse(["--checkpoint", str(policy)])
    (tmp_path / "run" / "args.json").write_text(json.dumps(run_flags(instruction="--settings payload:X-v1")))
    assert evaluate.parse(["--checkpoint", str(policy)]).instruction == "--settings payload:X-v1"
    assert not (tmp_path / "OWNED").exists() and "payload" not in sys.modules


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"seed": 0, "ima', "is not valid JSON"),
        ("", "is empty"),
        ("[1]", "an object with keys"),
        ('{"lora_rank": "32"}', "has lora_rank"),
        ('{"merge_lora": null}', "has merge_lora null"),
        ('{"value_learning_rate": "fast"}', "has value_learning_rate"),
        ('{"sim_freq": NaN}', "has sim_freq"),
        ('{"model_type": "pi0"}', "has model_type"),
        ('{"unnorm_key": "bridge_orig"}', "has no model_type"),
        (json.dumps({"model_type": "openvla", "dtype": "float32"}), "has no unnorm_key"),
    ],
)
def test_a_damaged_args_json_is_one_sentence(tmp_path, content, sentence):
    policy = fake_checkpoint(tmp_path, "config.json")
    (tmp_path / "args.json").write_text(content)
    for path in (tmp_path, policy):
        with pytest.raises(UserError, match=rf"args\.json.* {sentence}"):
            evaluate.parse(["--checkpoint", str(path)])


def test_actors_that_can_not_act_end_before_the_start():
    cube = parse_settings(["PickCube-v1"], VARIANTS, "pick up the cube")
    with pytest.raises(UserError, match="--policy expert knows only the PutOnPlateInScene25 envs: leave PickCube-v1"):
        evaluate.check_actor("expert", None, None, cube)
    with pytest.raises(UserError, match="--policy idle reads no model: leave --lora_path out"):
        evaluate.check_actor("idle", None, "adapter", cube)
    with pytest.raises(UserError, match="--checkpoint is missing"):
        evaluate.check_actor("checkpoint", None, None, cube)
    assert evaluate.check_actor("idle", None, None, cube) is None


def test_a_checkpoint_is_known_by_its_content(tmp_path):
    """Not by its place or its files' times: a copy goes on, other weights or statistics under the same name do not."""
    here, copy, adapter = tmp_path / "here", tmp_path / "copy", tmp_path / "adapter"
    for folder in (here, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "dataset_statistics.json").write_text("{}")
    shutil.copytree(here, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    found = evaluate.fingerprint(here, None)
    assert evaluate.fingerprint(copy, None) == found and "/" not in json.dumps(found)
    (copy / "model.safetensors").write_bytes(b"wEights")
    assert evaluate.fingerprint(copy, None) != found
    (here / "dataset_statistics.json").write_text("[]")
    assert evaluate.fingerprint(here, None) != found != evaluate.fingerprint(here, adapter)
    assert evaluate.fingerprint(Path("openvla-tiny")) != evaluate.fingerprint(Path("openvla-oft-tiny"))


@pytest.mark.parametrize("old, new", [("film_episodes", "video_episodes"), ("film-failures", "video_failures")])
def test_flags_of_older_versions_lead_to_the_new_ones(old, new):
    with pytest.raises(UserError, match=f"--{old.replace('-', '_')}, did you mean --{new}"):
        evaluate.parse(["--policy", "idle", f"--{old}", "1"])


def test_failures_are_chosen_among_those_that_can_be_shown(tmp_path):
    episodes = [{"episode_id": 10 + place, "success_once": float(place == 1)} for place in range(6)]

    def chosen(*arguments) -> list[str]:
        return [path.name for path in evaluate.choose_videos(episodes, tmp_path, "Carrot-v1:test", *arguments)]

    first = "Carrot-v1_test_0000_id10_failed.mp4"
    assert chosen((1, 0), 1, None) == [
        "Carrot-v1_test_0001_id11_success.mp4",
        first,
        "Carrot-v1_test_0002_id12_failed.mp4",
    ]
    assert chosen((0,), 1, {10, 14}) == [first, "Carrot-v1_test_0004_id14_failed.mp4"]
    assert chosen((0, 9), 0, set()) == []
    assert list(evaluate.watch_few([7, 8, 9], (2,), 1).moments) == [9, 7, 8]
    assert list(evaluate.watch_few([7, 8, 9], (2,), 0).moments) == [9]


def test_older_results_are_kept(tmp_path):
    identity = {"policy": "idle", "weights": {}, "model": {}, "seed": 0}
    identity |= {"world": {"sim_freq": 100, "image_size": (96, 96)}}
    assert evaluate.find_output(str(tmp_path), False, identity) == tmp_path  # exists and is empty
    assert not list(tmp_path.iterdir())
    evaluate.open_output(tmp_path, False, identity, {}).close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="older results"):
        evaluate.find_output(str(tmp_path), False, identity)
    with pytest.raises(UserError, match=r"was started with world.sim_freq 100, but now it is 500"):
        evaluate.find_output(str(tmp_path), True, identity | {"world": {"sim_freq": 500, "image_size": (96, 96)}})
    assert before and {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert evaluate.find_output(str(tmp_path), True, identity) == tmp_path
    with pytest.raises(UserError, match="now holds the results of another evaluation"):
        evaluate.open_output(tmp_path, False, identity, {})  # begun and ended since find_output() looked
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match=r"no evaluation\.json to --resume"):
        evaluate.find_output(str(tmp_path / "new"), True, identity)
    for place in (tmp_path / "evaluation.json" / "x", Path("/proc/nothing")):  # a file; a folder that takes none
        with pytest.raises(UserError, match=f"--output {place} cannot be written"):
            evaluate.open_output(evaluate.find_output(str(place), False, identity), False, identity, {})
    with pytest.raises(UserError, match="needs --output"):
        evaluate.find_output(None, True, identity)


def test_two_evaluations_do_not_write_into_one_folder(tmp_path, monkeypatch):
    (tmp_path / "evaluation.json").write_text(json.dumps(IDENTITY))
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.1)
    held = lock.lock_folder(tmp_path, "the first")
    for attempt in (
        lambda: evaluate.find_output(str(tmp_path), True, IDENTITY),
        lambda: evaluate.open_output(tmp_path, True, IDENTITY, {}),
    ):
        with pytest.raises(UserError, match=f"--output {tmp_path} is being written by process {os.getpid()} on"):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "lock"]
    os.close(held)
    evaluate.open_output(evaluate.find_output(str(tmp_path), True, IDENTITY), True, IDENTITY, {}).close()


@pytest.mark.parametrize(
    "model, flags",
    [
        ("openvla", {"image_resize": "pil", "max_prompt_length": 40}),
        ("openvla_oft", {"chunk_size": 2, "oft_stop_token": True}),
        ("openvla_oft", {"chunk_size": 4, "image_resize": "pil", "lora_rank": 4, "lora_alpha": 8, "lora_scope": "llm"}),
    ],
    ids=["openvla", "oft", "oft_lora"],
)
def test_a_run_is_evaluated_as_it_was_trained(tmp_path, model, flags):
    """Chunks, resizing, tokens and adapters follow from the run alone."""
    name = "openvla-oft-tiny" if model == "openvla_oft" else "openvla-tiny"
    trained = load_policy(name, model, **flags)
    for parameter_name, parameter in trained.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy = fake_checkpoint(tmp_path, flags={"model_type": model, "dtype": "float32", **flags})
    weights = trained.state_dict()
    policy.rmdir()
    save_policy(trained, weights, policy)
    args = evaluate.parse(["--checkpoint", str(tmp_path)])
    again = evaluate.load_actor(args, evaluate.find_checkpoint(args.checkpoint)[0], "cpu")
    kept = ("chunk_size", "image_resize", "max_prompt_length")
    assert [getattr(again, key) for key in kept] == [getattr(trained, key) for key in kept]
    obs, noise = observation(2), torch.rand(2, trained.chunk_size, 7, dtype=torch.float64)
    for ours, theirs in zip(again.act(obs, 0.6, noise)[:2], trained.eval().act(obs, 0.6, noise)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # tokens, log-probabilities


def test_it_advises_no_flag_that_it_lacks():
    source = (ROOT / "evaluate.py").read_text().replace("doctor.py --download", "").replace("deepspeed --num_gpus", "")
    for name in ("evaluation/settings", "evaluation/statistics", "reports/evaluation_page"):
        source += (ROOT / "vla" / f"{name}.py").read_text()
    known = {field.name for field in dataclasses.fields(evaluate.Args)} | {"help"}
    assert set(re.findall(r"--([a-z]\w+)", source)) <= known


@pytest.mark.parametrize(
    "change, key",
    [
        ({"episodes_per_setting": 0}, "episodes_per_setting"),
        ({"successes": {"vision": 3}}, "successes.in_distribution"),
        ({"name": None}, "name null"),
        ({"settings": {"Carrot-v1:train": -1}}, "settings.Carrot-v1:train"),
    ],
)
def test_a_published_row_of_another_form_is_one_sentence(tmp_path, monkeypatch, change, key):
    row = PUBLISHED["rlinf-ppo-oft"] | change
    (tmp_path / "published.yaml").write_text(yaml.safe_dump({"mine": row}))
    monkeypatch.setattr(evaluate, "PUBLISHED", tmp_path / "published.yaml")
    with pytest.raises(UserError, match=rf"published\.yaml has (no )?mine\.{key}"):
        evaluate.choose_published(("mine",))


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path):
    for name in ("results.json", "evaluation.json", "episodes.jsonl"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: compare_two(tmp_path, tmp_path),
        lambda: evaluate.find_output(str(tmp_path), True, IDENTITY),
        lambda: EpisodeLog(tmp_path / "episodes.jsonl"),
    ):
        with pytest.raises(UserError, match="is not a regular file"):
            read()


def test_published_rows_by_name():
    assert list(evaluate.choose_published(("rl4vla-ppo",))) == ["rl4vla-ppo"]
    assert evaluate.choose_published(("all",)) == PUBLISHED and evaluate.choose_published(()) == {}
    with pytest.raises(UserError, match="did you mean rlinf-ppo-oft"):
        evaluate.choose_published(("rlinf-ppo-ofd",))


# ---------------------------------------------------------------------- the whole script
def run(*flags: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """`python evaluate.py ...` on so many ranks."""
    done = run_ranks(ranks, "evaluate.py", *flags) if ranks > 1 else python("evaluate.py", *flags)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def episodes_of(folder: Path) -> dict[tuple, dict]:
    """Everything but seconds, by setting, temperature and id; outcomes and packed actions."""
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return {(line.pop("setting"), line.pop("temperature"), line["episode_id"]): line | {"seconds": 0} for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_episodes", "0"], "--num_episodes 0 must be at least 1"),
        (["--settings", "Single-v1:test", "--num_episodes", "1000"], "holds out"),
        (["--policy", "expert", "--settings", "PickCube-v1", "--instruction", "x"], "--policy expert knows only"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, flags, message):
    done = run("--policy", "idle", "--output", str(tmp_path / "out"), *flags, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """One iteration of PPO, with an evaluation of 2 episodes at temperature 0.6 at its end."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train("--run_dir", str(folder), "--num_iterations", "1", "--max_episode_steps", "12")
    return folder


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory) -> Path:
    """One rank x 4 envs, 6 episodes of two settings at both temperatures."""
    folder = tmp_path_factory.mktemp("evaluation") / "one_rank"
    run(*common(run_folder, folder), "--num_envs", "4", "--base", "rlinf-ppo-openvla", "rl4vla-ppo")
    return folder


def common(run_folder: Path, output: Path) -> list[str]:
    flags = ["--checkpoint", str(run_folder), "--settings", "Carrot-v1:test", "EEPose-v1:test", "--num_episodes", "6"]
    return [*flags, "--output", str(output)]


@pytest.mark.slow
def test_results_are_whole(evaluated, run_folder):
    results = json.loads((evaluated / "results.json").read_text())
    assert results["temperature"] == 0 and list(results["other_temperatures"]) == ["0.6"]
    assert results["world"]["image_size"] == [96, 96] and results["world"]["max_episode_steps"] == 12  # of the run
    assert results["name"] == "run/iteration_000001" and results["versions"]["torch"] and results["command"]
    for name, ids in json.loads((evaluated / "episode_ids.json").read_text()).items():
        for part in (results, results["other_temperatures"]["0.6"]):
            one = part["settings"][name]
            assert one["episode_ids"] == ids == [outcome["episode_id"] for outcome in one["outcomes"]]
            assert ids == eval_episode_ids(FAMILY + name.split(":")[0], name.split(":")[1], 6)
            assert one["episodes"] == 6 and one["episode_len"] == 12 and one["seconds"] > 0
            assert one["success_once"] == sum(outcome["success_once"] for outcome in one["outcomes"]) / 6
            assert one["wilson_95"] == list(wilson_interval(one["success_once"], 6))
        for video in results["settings"][name]["videos"]:
            frames = iio.imread(evaluated / video["file"])
            assert len(frames) == 13 + FPS and frames.std() > 5 and frames[0].std() != frames[-1].std()
            assert frames.shape[1:] == (360 + 2 * BORDER, 480 + 2 * BORDER, 3)
            edge = frames[-1][1:3, 8:-8].reshape(-1, 3).mean(0)
            assert np.abs(edge - BORDER_COLORS[video["outcome"]]).max() < 20
            poster = iio.imread(evaluated / video["poster"])
            assert np.abs(poster.astype(int) - frames[-1]).mean() < 8
        assert len(results["settings"][name]["videos"]) == 2
    assert results["means"]["semantic"] is None
    text = (evaluated / "results.md").read_text()
    assert "mean of the 15 out-of-distribution settings" in text and "81.0 [" in text and "Carrot-v1:test" in text
    assert iio.imread(evaluated / "results.png").std() > 5


@pytest.mark.slow
def test_ranks_and_envs_change_no_episode(evaluated, run_folder, tmp_path):
    """1 rank x 4 envs and 2 ranks x 8 envs: the same actions and outcomes by episode id."""
    run(*common(run_folder, tmp_path / "out"), "--num_envs", "16", "--video_failures", "0", ranks=2)
    assert episodes_of(tmp_path / "out") == episodes_of(evaluated)


SIGNAL_AFTER = """
import signal, sys
import evaluate
from vla.distributed import run_main
from vla.evaluation.episode_log import EpisodeLog

number, after = int(sys.argv[1]), int(sys.argv[2])

def add(self, *words, add=EpisodeLog.add):
    add(self, *words)
    if sum(map(len, self.done.values())) >= after:
        signal.raise_signal(number)

EpisodeLog.add = add
run_main(evaluate.main, lambda: evaluate.parse(sys.argv[3:]))
"""


def interrupted(number: int, after: int, *flags: str) -> tuple[int, str]:
    """Run an evaluation that sends itself a signal once it has written so many episodes. Returns code and output."""
    run = run_ranks(1, "-c", SIGNAL_AFTER, number, after, *flags)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.slow
def test_killed_stopped_and_resumed(evaluated, run_folder, tmp_path):
    """SIGKILL in the middle, SIGTERM after that, then --resume with one episode more: the same episodes, none twice."""
    output = tmp_path / "out"
    flags = [*common(run_folder, output), "--num_envs", "4"]
    assert interrupted(signal.SIGKILL, 4, *flags)[0] == -signal.SIGKILL
    code, said = interrupted(signal.SIGTERM, 12, *flags, "--resume")
    assert code == REQUEUE and "Traceback" not in said
    kept = (output / "episodes.jsonl").read_bytes().count(b"\n")
    assert f"SIGTERM: {kept} of 24 episodes are in {output}/episodes.jsonl" in said
    assert f"--output {output} --resume" in said and kept >= 12 and not (output / "results.json").exists()
    assert not (output / "stop").exists() and not list(output.glob("videos/partial_*"))
    page = (output / "report.html").read_text()
    assert 'class="pill stopped"' in page and "SIGTERM asked it to stop." in page and f"{kept} of 24 episodes" in page
    assert f"--output {output} --resume" in page
    run(*common(run_folder, output), "--num_envs", "4", "--resume", "--num_episodes", "7")
    assert (output / "episodes.jsonl").read_bytes().count(b"\n") == 28
    resumed, whole = episodes_of(output), episodes_of(evaluated)
    assert len(whole) == 24 and {key: resumed[key] for key in whole} == whole
    assert json.loads((output / "results.json").read_text())["settings"]["EEPose-v1:test"]["episodes"] == 7


@pytest.mark.full
@pytest.mark.slow
def test_another_seed_samples_other_actions(evaluated, run_folder, tmp_path):
    run(*common(run_folder, tmp_path / "out"), "--num_envs", "4", "--seed", "1", "--video_failures", "0")
    ours, theirs = episodes_of(tmp_path / "out"), episodes_of(evaluated)
    assert ours.keys() == theirs.keys()
    for key in ours:  # greedy actions are what they are
        assert (ours[key]["actions"] == theirs[key]["actions"]) == (key[1] == 0)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for place in (str(run_folder), str(tmp_path), str(ROOT)):
        assert place not in json.dumps(results) and place not in (tmp_path / "out" / "evaluation.json").read_text()


@pytest.mark.slow
def test_training_evaluates_by_the_same_code(run_folder, tmp_path):
    """The run's last evaluation again, from its checkpoint: the same numbers."""
    flags = ["--settings", "Main-v3:train", "--num_episodes", "2", "--temperature", "0.6", "--no-ignore_terminations"]
    run("--checkpoint", str(run_folder), "--output", str(tmp_path / "out"), "--num_envs", "2", *flags)
    ours = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["Main-v3:train"]
    theirs = json.loads((run_folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert theirs["iteration"] == 1 and theirs["eval/num_episodes"] == ours["episodes"]
    for name in ("success_once", "success_at_end", "return", "episode_len"):
        assert ours[name] == pytest.approx(theirs[f"eval/{name}"], abs=1e-6)


@pytest.mark.slow
def test_expert_succeeds_and_nobody_does_not(tmp_path):
    """Through the same path: the expert's known 31 of 32 (README) lies in its interval; doing nothing gives 0."""
    flags = [*SMALL_WORLD, "--settings", "Carrot-v1:test", "--num_episodes", "8", "--num_envs", "8"]
    flags += ["--video_size", "160", "120"]
    found = {}
    for policy in ("expert", "idle"):
        run("--policy", policy, "--output", str(tmp_path / policy), *flags)
        found[policy] = json.loads((tmp_path / policy / "results.json").read_text())["settings"]["Carrot-v1:test"]
    low, high = found["expert"]["wilson_95"]
    assert low <= 31 / 32 <= high and found["expert"]["success_once"] >= 0.75
    assert found["expert"]["videos"][0]["outcome"] == "success" and found["expert"]["return"] > 0.7
    assert found["idle"]["success_once"] == 0 and found["idle"]["episode_len"] == 80
    (row,) = compare(*(json.loads((tmp_path / name / "results.json").read_text()) for name in ("expert", "idle")))
    assert row["only_first"] >= 6 and row["only_second"] == 0 and row["differs"]
    both = ["--output", str(tmp_path / "both"), "--video_pairs", "2", "--video_size", "160", "120"]
    run("--compare", str(tmp_path / "expert"), str(tmp_path / "idle"), *both)
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("<video") == 4 and "Not all videos" not in page and "2 are shown" in page
    names = [path.name for path in sorted((tmp_path / "both" / "videos").glob("*.mp4"))]
    assert len(names) == 4 and sum("_first_success" in name for name in names) == 2
    assert all(path.with_suffix(".jpg").stat().st_size > 1000 for path in (tmp_path / "both" / "videos").glob("*.mp4"))


# ---------------------------------------------------------------------- the page in a browser
@pytest.fixture(scope="module")
def browser_page(evaluated, tmp_path_factory):
    """report.html alone, without the files beside it."""
    if find_chromium() is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    alone = tmp_path_factory.mktemp("page")
    shutil.copy(evaluated / "report.html", alone / "page.html")
    with Page((alone / "page.html").as_uri(), alone / "profile") as page:
        yield page


@pytest.mark.slow
def test_page_shows_the_table(browser_page, evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    rows = browser_page.script(
        "[...document.querySelectorAll('#settings tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert [row[0] for row in rows] == ["Carrot-v1:test"] * 2 + ["EEPose-v1:test"] * 2
    for row, part in zip(rows, [results, results["other_temperatures"]["0.6"]] * 2):
        one = part["settings"][row[0]]
        low, high = one["wilson_95"]
        assert row[3] == "6" and row[4] == f"{100 * one['success_once']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        assert row[6] == f"{one['return']:.3f}"
    means = browser_page.script(
        "[...document.querySelectorAll('#means tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    (published,) = [row for row in means if row[0] == "PPO-OpenVLA (RLinf)"]
    assert [cell.split(" [")[0] for cell in published[1:]] == ["96.1", "82.0", "78.3", "85.4", "81.0", "81.9"]
    browser_page.wait_for("document.body.dataset.drawn === 'yes'")
    series = browser_page.script("document.querySelectorAll('#settings-chart .trace').length")
    assert series == 4  # two temperatures and two published rows


@pytest.mark.slow
def test_page_plays_a_video_on_a_click(browser_page):
    count = browser_page.script("document.querySelectorAll('video').length")
    assert count == browser_page.script("document.querySelectorAll('a[data-video]').length") == 4
    assert browser_page.script("[...document.querySelectorAll('video')].every(v => v.poster)")
    browser_page.click("#settings tbody tr:nth-child(3) a[data-video]")
    playing = "[...document.querySelectorAll('video')].findIndex(v => !v.paused && v.currentTime > 0.5)"
    browser_page.wait_for(f"{playing} >= 0")
    name = browser_page.script(f"document.querySelectorAll('figure')[{playing}].innerText")
    assert name.startswith("EEPose-v1:test, episode")
    assert browser_page.script(f"document.querySelectorAll('video')[{playing}].videoWidth") > 200
    assert browser_page.script("[...document.querySelectorAll('video')].filter(v => !v.paused).length") == 1
