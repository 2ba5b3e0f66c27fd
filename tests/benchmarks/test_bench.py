"""The cost model against numbers worked by hand, and what the benchmarks say where they can not measure."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from launching import python

import train_ppo
from benchmarks import bench, cost_model, flops, memory_table, placement_costs, recipe_costs
from benchmarks.cards import CARDS
from vla.cli import parse_args
from vla.distributed import UserError
from vla.models.loading import load_policy

CONFIG = "yaml/quickstart_ppo_openvlaoft.yaml"
SMALL = ["--num_envs", "4", "--num_steps", "8", "--num_minibatches", "2", "--micro_batch_size", "2"]
ASSUMED = cost_model.Assumed(peak=1e12, memory=1e11, bandwidth=1e9, utilisation=0.5)
MODEL = {"model_path": "checkpoints/openvla-oft-tiny-warmup", "model_type": "openvla_oft", "chunk_size": 4, "ranks": 1}
SEEN = {"image_size": [96, 96], "ranks": 1}
MEASURED = [
    {
        **SEEN,
        "part": "env",
        "env_id": "PutOnPlateInScene25Single-v1",
        "sim_freq": 100,
        "asset_pack": "builtin",
        "render": "cpu",
        "max_episode_steps": 12,
        "physics_s": 0.001,
        "task_s": 0.001,
        "picture_s": 0.004,
        "reset_s": 0.016,
        "resets_per_step": 0.5,
    },
    {**SEEN, "part": "transport", "num_env_workers": 0, "num_envs": 4, "seconds": 0.004},
    {**SEEN, "part": "transport", "num_env_workers": 1, "num_envs": 4, "seconds": 0.002},
    {**MODEL, "part": "act", "points": [[2, 0.02], [4, 0.03]]},
    {**MODEL, "part": "rollout", "num_envs": 4, "rest_s": 0.006, "value_s": 0.004, "step_s": 0.06, "act_s": 0.03},
    {
        **MODEL,
        "part": "update",
        "micro_batch_size": 2,
        "seconds": 0.02,
        "step_seconds": 0.001,
        "gradient_checkpointing": False,
    },
    {
        **MODEL,
        "part": "engine",
        "micro_batch_size": 2,
        "seconds": 0.03,
        "step_seconds": 0.005,
        "zero_stage": 3,
        "between_seconds": 0.07,
        "gradient_checkpointing": False,
    },
]


def script_flags(*words: str) -> dict:
    return vars(parse_args(train_ppo.Args, ["--config", CONFIG, *SMALL, *words], ""))


def results(*more: dict) -> dict:
    return {"name": "invented.json", "measured": [*MEASURED, *more], "machine": {"cores": 2}}


def predicted(*words: str, ranks: int = 1, measured: tuple = ()) -> dict:
    return cost_model.predict(cost_model.Inputs([results(*measured)]), script_flags(*words), ranks, 2, ASSUMED)


# ------------------------------------------------------------------ the cost model
def test_an_iteration_by_hand():
    """A decision of one env: 4 (0.001 + 0.001 + 1/40 (0.016 + 0.004)) + 0.004 = 0.014 s; two decisions of four envs."""
    seconds = predicted()
    decision = 0.03 + 0.01 + (4 * 0.014 + 0.004)  # act, rest, simulate and carry
    assert seconds["rollout"] == pytest.approx(2 * decision + 0.03 + 0.07)  # the last value, between the stages
    # 2 epochs of 2 minibatches of 4 decisions: two micro batches of 0.01 + 2 x 0.01, and a step
    assert seconds["update"] == pytest.approx(2 * 2 * (2 * 0.03 + 0.005))
    assert seconds["iteration"] == pytest.approx(0.56)


def test_workers_and_pipeline_by_hand():
    workers = predicted("--num_env_workers", "2")["rollout"]
    assert workers == pytest.approx(2 * (0.03 + 0.01 + 2 * 0.014 + 0.002) + 0.1)
    # two halves: acting 0.02 + 0.005 each, simulating 2 x 0.014 + 0.001; two cores share 0.05 + 4 x 0.014
    halves = predicted("--num_env_workers", "2", "--pipeline_stages", "2")["rollout"]
    assert halves == pytest.approx(2 * (0.025 + 0.029) + 0.1)
    assert (
        cost_model.simulate_seconds(cost_model.EnvCosts(1.0, 0.0, 0.0, 0.0), {"chunk_size": 1}, 4, 4, 2, 0.0) == 2.0
    )  # two cores


def test_what_ranks_say_to_each_other_by_hand():
    """Half of all bytes go over the wire between two ranks: twice whole weights and once gradients per micro batch."""
    policy = load_policy(MODEL["model_path"], "openvla_oft")
    whole, trained = (
        4 * sum(p.numel() for p in policy.parameters() if p.requires_grad or every) / 2 / ASSUMED.bandwidth
        for every in (True, False)
    )
    assert 0 < trained < whole
    two = predicted(ranks=2)
    # each rank has half the envs, so half the decisions: one micro batch of two
    assert two["update"] == pytest.approx(2 * 2 * (0.03 + 2 * whole + trained + 0.005))
    decision = 0.02 + 0.005 + (2 * 0.014 + 0.002)
    assert two["rollout"] == pytest.approx(2 * decision + 0.02 + 0.07 + trained)
    measured = ({**MEASURED[-1], "ranks": 2},)
    assert predicted(ranks=2, measured=measured)["update"] == pytest.approx(2 * 2 * (0.03 + 0.005))


def test_a_model_that_was_not_measured_costs_its_arithmetic():
    words = ("--model_path", "openvla-oft-tiny", "--unnorm_key", "bridge_orig", "--chunk_size", "8")
    flags = script_flags(*words)
    inputs = cost_model.Inputs([results()])
    policy = flops.meta_policy_of(flags)
    seconds = cost_model.micro_batch_seconds(inputs, flags, 3, 1, ASSUMED)
    assert seconds == pytest.approx(3 * flops.update_flops(policy, False) / 1e12 / 0.5)
    assert inputs.used["update"].startswith("assumed: counted arithmetic at 50% of 1 TFLOP/s")
    few, many = (cost_model.act_seconds(inputs, flags, envs, 1, ASSUMED) for envs in (1, 1000))
    assert many == pytest.approx(1000 * flops.act_flops(policy) / 1e12 / 0.5)
    assert few == pytest.approx(max(flops.act_flops(policy) / 1e12, flops.num_bytes(policy) / 1e11) / 0.5)


def test_another_rate_and_size_are_scaled_and_said():
    inputs = cost_model.Inputs([results()])
    costs = cost_model.env_costs(inputs, script_flags("--sim_freq", "500", "--image_size", "192", "192"), 1, "cpu")
    assert costs == cost_model.EnvCosts(pytest.approx(0.006), pytest.approx(0.016), pytest.approx(0.08), 1 / 40)
    assert inputs.used["env"].startswith("assumed")


def test_the_env_of_the_same_policy_and_as_many_processes_is_preferred():
    """Others were measured with contacts of their own; two workers at once as two ranks at once."""
    others = [
        {**MEASURED[0], "physics_s": 0.002, "model_path": MODEL["model_path"], "chunk_size": 4},
        {**MEASURED[0], "physics_s": 0.003, "model_path": MODEL["model_path"], "chunk_size": 4, "ranks": 2},
        {**MEASURED[0], "physics_s": 0.004, "model_path": "openvla-oft-tiny", "chunk_size": 8},
    ]
    before = predicted()["rollout"]
    for words, slower in (((), 0.001), (("--num_env_workers", "1"), 0.001), (("--num_env_workers", "2"), 0.002)):
        more = predicted(*words, measured=tuple(others))["rollout"] - predicted(*words)["rollout"]
        at_once = 2 if words[1:] == ("2",) else 1
        assert more == pytest.approx(2 * 4 / at_once * 4 * slower), words
    assert predicted(measured=(others[2],))["rollout"] == pytest.approx(before)


def test_arithmetic_is_counted():
    """28 more tokens in two layers of width 96 (MLP 384), head of 832: two per weight, and attention's growth."""
    few, many = (
        flops.meta_policy_of({**script_flags(), "model_path": "openvla-oft-tiny", "chunk_size": chunk_size})
        for chunk_size in (4, 8)
    )
    weights = 2 * (4 * 96 * 96 + 3 * 96 * 384) + 832 * 96
    prompt = script_flags()["max_prompt_length"]
    short, long = 64 + prompt + 28, 64 + prompt + 56
    expected = 28 * 2 * weights + 2 * 2 * 2 * 96 * (long**2 - short**2)
    assert flops.act_flops(many) - flops.act_flops(few) == pytest.approx(expected, rel=1e-3)
    forward_backward = flops.update_flops(few, False)
    assert 2.9 < forward_backward / flops.act_flops(few) < 3.0  # pictures need no gradient
    assert forward_backward * 1.2 < flops.update_flops(few, True) < forward_backward * 4 / 3


@pytest.mark.parametrize("seconds, code", [(0.56, 0), (0.56 / 1.24, 0), (0.56 / 1.26, 1), (0.56 / 0.74, 1)])
def test_exit_code_says_whether_predictions_hold(tmp_path, capsys, seconds, code):
    iteration = {"part": "iteration", "ranks": 1, "flags": script_flags(), "iteration_s": seconds}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(iteration)))
    assert cost_model.main(cost_model.parse(["--results", str(path)])) == code
    assert f"{0.56 / seconds - 1:+.0%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--num_gpus 8 0", "--num_gpus 8 0 must be at least 1"),
        ("--utilisation 0", "--utilisation 0.0 must be above 0"),
        ("--utilisation 40", "--utilisation 40.0 must be at most 1"),
        ("--cores 0", "--cores 0.0 must be above 0"),
        ("--env_steps -5", "--env_steps -5 must be at least 1"),
        ("--bandwidth nan", "--bandwidth nan must be a finite number"),
    ],
)
def test_numbers_that_no_plan_can_be_made_of(capsys, words, sentence):
    assert cost_model.main(cost_model.parse(["--config", CONFIG, *words.split()])) == 2
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


def test_a_plan_names_its_inputs_and_the_published_rate(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results()))
    words = [
        "--results",
        str(path),
        "--config",
        CONFIG,
        "--num_gpus",
        "2",
        "8",
        "--env_steps",
        "1000",
        "--num_envs",
        "16",
    ]
    more = [*SMALL[2:], "--env_id", "PutOnPlateInScene25Main-v3", "--sim_freq", "500"]
    options = cost_model.parse([*words, *more])
    assert options.more == more  # the script's flags, values and all
    assert cost_model.main(options) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| 8 |"))
    assert line.split("|")[2].strip() == "16" and line.endswith("| 89 |")
    assert "- act: measured: results.json, 1 ranks" in printed and "- communication: assumed" in printed
    assert cost_model.main(cost_model.parse([*words, *SMALL[2:]])) == 0
    assert "| 89 |" not in capsys.readouterr().out  # another task
    path.write_text("{}")
    assert cost_model.main(cost_model.parse(["--results", str(path)])) == 2
    assert "is not a results file" in capsys.readouterr().err
    with pytest.raises(UserError, match="not divisible by 3 ranks"):
        predicted(ranks=3)


# ------------------------------------------------------------------ placements
def costs_of(*words: str, **more) -> placement_costs.Costs:
    sizes = ["--num_envs", "64", "--num_minibatches", "1", "--num_env_workers", "16", *words]
    resize = {"part": "resize", "image_size": [96, 96], "seconds": 0.001, "ranks": 1}
    inputs = cost_model.Inputs([results(resize)])
    return placement_costs.Costs(inputs, script_flags(*sizes), 16, ASSUMED, **more)


def form_of(name: str) -> placement_costs.Form:
    (found,) = [form for form in placement_costs.FORMS if form.name == name]
    return found


@pytest.mark.parametrize("stages, name", [(1, "together (default)"), (2, "together, two pipeline stages")])
def test_the_default_placement_costs_what_the_cost_model_says(stages, name):
    costs = costs_of()
    flags = costs.flags | {"pipeline_stages": stages}
    expected = cost_model.predict(costs.inputs, flags, 8, 16, ASSUMED)
    found = placement_costs.iteration(costs, form_of(name))
    assert found.update == pytest.approx(expected["update"])
    # the cost model also counts what was measured between the stages, which placements change
    assert found.rollout == pytest.approx(expected["rollout"] - 0.07 - (found.whole - found.rollout - found.update))
    assert (found.observations, found.experience, found.weights) == (0, 0, 0)


def test_placements_by_hand():
    """16 envs of a rank in halves of 8: acting takes 0.05 + 0.02 s, and one env 0.014 s on a core."""
    costs = costs_of()
    policy = flops.meta_policy_of(costs.flags)
    image = 3 * policy.image_size[0] * policy.image_size[1]
    last, one = 0.01 + 16 * 0.005, 0.014
    half = (0.01 + 8 * 0.005) + 8 * 0.0025
    hybrid = placement_costs.iteration(costs, form_of("hybrid"))
    sent = one + 8 / 4 * 0.002 + 8 * (0.001 + image / placement_costs.WIRE)  # simulated, carried, made small, sent
    assert hybrid.rollout == pytest.approx(2 * max(2 * half, half + sent, 16 * one / 32) + last)
    assert hybrid.observations == 64 * 2 * image and hybrid.weights == 0
    apart, ahead = (placement_costs.iteration(costs, form_of(f"apart{more}")) for more in ("", ", one rollout ahead"))
    assert (apart.rollout, apart.update) == (ahead.rollout, ahead.update)
    assert apart.whole - ahead.whole == pytest.approx(min(apart.rollout, apart.update))
    assert apart.weights == flops.num_bytes(policy, trained=True) and 2 * hybrid.experience > apart.experience > 0


def test_a_slow_simulator_changes_which_placement_wins():
    """Simulators of their own gain nothing where acting takes all the time, and a rollout ahead hides a slow one."""
    names = [form.name for form in placement_costs.FORMS]
    slow = placement_costs.Simulator("slow", times=100.0)
    fast, slower = (placement_costs.relative(costs_of(simulator=one)) for one in (placement_costs.SIMULATORS[0], slow))
    ahead = names.index("the same, one rollout ahead")
    assert slower[ahead] > fast[ahead]
    on_gpus = placement_costs.relative(costs_of(simulator=placement_costs.SIMULATORS[-1]))
    assert on_gpus[names.index("simulators on 8 more machines without GPUs")] is None
    text = placement_costs.tables({"ppo_openvla": costs_of()}, "card")
    assert sum(line.startswith("| together (default) | ") for line in text) == 3 and "RLinf publishes 1.88" in text[-1]


# ------------------------------------------------------------------ the table
def test_unavoidable_parts_by_hand():
    """Twice the decisions that were measured: 4 envs x 4 decisions; 2 epochs of 16 decisions and 2 steps."""
    iteration = {"part": "iteration", "ranks": 1, "flags": script_flags("--num_steps", "16")}
    parts = bench.unavoidable(MEASURED, iteration)
    assert parts == {
        "env": pytest.approx(4 * 0.06),
        "act": pytest.approx(4 * 0.03),
        "update": pytest.approx(2 * (16 / 2 * 0.02 + 2 * 0.001)),
    }
    assert bench.unavoidable(MEASURED, {**iteration, "ranks": 2}) is None
    iteration |= {"job": "quickstart", "ranks": 1, "iteration_s": 2 * sum(parts.values())}
    assert "50% of it (target 70%: missed)" in bench.quickstart_sentence([*MEASURED, iteration])


def test_what_can_not_be_done_is_said(tmp_path):
    said = []
    measured, not_done = bench.measure(["limits"], 0.0, said.append)
    assert not measured and "minutes were over" in not_done["limits"]
    assert "| limits | not done: the 0 minutes were over |" in bench.table([], not_done)[-1]
    fails = [sys.executable, "-c", "print('fine'); raise SystemExit('no disk')"]
    sleeps = [sys.executable, "-c", "import time; time.sleep(6000)"]
    with pytest.raises(RuntimeError, match="no disk"):
        bench.run_group([sleeps, fails], [bench.environment_of()] * 2, 600)
    with pytest.raises(RuntimeError, match="longer than the 1 s"):
        bench.run_group([sleeps], [bench.environment_of()], 1)
    with pytest.raises(RuntimeError, match="one core"), bench.workers_on_a_core_of_their_own(True):
        pass  # nothing starts a worker
    first = bench.new_files(tmp_path, "here")
    bench.write_results(first, {"a": 1}, ["b"])
    assert set(first).isdisjoint(bench.new_files(tmp_path, "here")) and json.loads(first[0].read_text()) == {"a": 1}


@pytest.mark.slow
@pytest.mark.full
def test_bench_writes_a_table_and_its_numbers(tmp_path):
    command = ["benchmarks/bench.py", "--only", "limits", "--output", str(tmp_path), "--machine", "m"]
    run = python(*command)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*_m.json")
    content = json.loads(path.read_text())
    rows = {(row["part"], row["setting"]): row for row in content["rows"]}
    assert len(rows) == 4 and all(row["value"] > 0 for row in rows.values())
    assert all(row["share"] > 0 for (part, _), row in rows.items() if part == "transport")
    assert content["description"]["commit"] and content["machine"]["cores"] and not content["not_done"]
    table = path.with_suffix(".md").read_text()
    assert table in run.stdout and "| matrix peak |" in table and "versions: torch" in table


@pytest.mark.slow
@pytest.mark.full
def test_all_parts_of_a_small_iteration():
    flags = {"num_envs": 2, "num_steps": 24, "max_episode_steps": 8, "num_minibatches": 1, "micro_batch_size": 4}
    found = {one["part"]: one for one in bench.measure_parts(1, bench.STEPS, flags, 300)}
    assert found.keys() == {"rollout", "env", "act", "update", "engine"}
    assert found["rollout"]["decisions"] == 5 and 0 < found["rollout"]["steps_per_decision"] <= 4
    stages = [found["env"][name] for name in ("physics_s", "task_s", "picture_s", "reset_s", "resets_per_step")]
    assert min(stages) > 0
    simulated = found["env"]["steps"] * sum(stages[:2]) / 5  # per decision, without pictures and resets
    assert simulated < found["rollout"]["step_s"]
    assert [batch for batch, _ in found["act"]["points"]] == [1, 2]
    assert found["update"]["micro_batch_size"] == found["engine"]["micro_batch_size"] == 4
    assert found["engine"]["zero_stage"] == 3 and found["engine"]["seconds"] > 0


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_needs_a_card():
    run = python("benchmarks/gpu_check.py")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: torch sees no NVIDIA card here") and run.stderr.count("\n") == 1


def test_gpu_check_goes_on_where_a_part_fails(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu_check

    def broken(flags, seconds):
        raise RuntimeError("out of | memory")

    def fine(flags, seconds):
        assert seconds == 7
        return [{"part": "act", "ranks": 1}], [bench.Row("act", "7B", 12.5, "actions/s", "act", 0.5)]

    monkeypatch.setattr(gpu_check, "PARTS", {"card": (broken, 5), "openvla": (fine, 7)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Invented 80GB")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "card", "openvla", "--output", str(tmp_path)])
    assert gpu_check.main(gpu_check.parse()) == 1
    printed = capsys.readouterr().out
    assert "| card | not done: RuntimeError: out of / memory |" in printed and "| act | 7B | 12.5 |" in printed
    (path,) = tmp_path.glob("*nvidia-invented-80gb*.json")
    assert json.loads(path.read_text())["measured"] == [{"job": "openvla", "part": "act", "ranks": 1}]


def test_the_docs_have_a_row_of_the_memory_table_for_every_recipe_and_size():
    lines = (ROOT / "docs" / "full_size.md").read_text().splitlines()
    for preset in memory_table.PRESETS:
        for ranks in (8, 16, 32):
            row = f"| {preset.stem.removeprefix('maniskill_')} | {ranks} | "
            assert sum(line.startswith(row) for line in lines) == 1, row


@pytest.mark.full
def test_the_memory_table_of_the_docs_is_what_the_program_prints():
    """One recipe: all take minutes."""
    lines = (ROOT / "docs" / "full_size.md").read_text().splitlines()
    (preset,) = [path for path in memory_table.PRESETS if path.stem == "maniskill_ppo_openvla"]
    for ranks in (8, 16, 32):
        cells = " | ".join(memory_table.cells(preset, ranks, [24.0, 40.0, 48.0, 80.0]))
        assert f"| ppo_openvla | {ranks} | {cells} |" in lines


def test_the_docs_have_a_row_of_the_costs_for_every_recipe_and_card():
    lines = (ROOT / "docs" / "full_size.md").read_text().splitlines()
    for preset in memory_table.PRESETS:
        for card in CARDS:
            row = f"| {preset.stem.removeprefix('maniskill_')} | {card} | "
            assert sum(line.startswith(row) for line in lines) == ("fan" not in preset.stem), row


@pytest.mark.full
def test_the_costs_of_the_docs_are_what_the_program_prints():
    """One recipe on two cards: all take minutes."""
    costs, placements = ((ROOT / "docs" / name).read_text().splitlines() for name in ("full_size.md", "placements.md"))
    (preset,) = [path for path in memory_table.PRESETS if path.stem == "maniskill_ppo_openvlaoft"]
    files = cost_model.read_results(recipe_costs.FILES)
    for line in recipe_costs.by_part([preset], files)[0]:
        assert line in costs
    for line in recipe_costs.by_card([preset], ["H100 80 GB", "H200 141 GB"], files):
        assert line in costs
    speeds = placement_costs.shown(placement_costs.relative(recipe_costs.placed(preset, files)))
    for form, cell in zip(placement_costs.FORMS, speeds):
        rows = [line for line in placements if line.startswith(f"| {form.name} | ")]
        assert rows[0].endswith(f"| {cell} |"), form.name  # the last column


def test_a_plan_of_a_published_recipe_needs_no_network(monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("schemas.hub.fetch", fetch)
    monkeypatch.setattr(cost_model, "predict", lambda *_: {"rollout": 1.0, "update": 3.0, "iteration": 4.0})
    options = cost_model.parse(["--config", "yaml/maniskill_ppo_openvla.yaml", "--num_gpus", "8"])
    assert "| 8 | 128 | 16 | 1.0 s | 3.0 s | 5120.0 |" in "\n".join(cost_model.plan([], options, ASSUMED))


def test_gpu_checks_models_are_read_by_the_plan():
    from benchmarks.gpu_check import model_entries

    printed = {"batch": 16, "act_actions_per_s": 64.0, "update_samples_per_s": 8.0}
    file = {"name": "card.json", "measured": model_entries(printed, "openvla-7b", "openvla_oft")}
    words = (
        "--model_path",
        "openvla-7b",
        "--model_type",
        "openvla_oft",
        "--chunk_size",
        "8",
        "--gradient_checkpointing",
    )
    inputs, flags = cost_model.Inputs([file]), script_flags(*words)
    assert cost_model.act_seconds(inputs, flags, 32, 1, ASSUMED) == pytest.approx(
        4.0
    )  # 128 actions in 2 s, twice the envs
    assert cost_model.micro_batch_seconds(inputs, flags, 8, 1, ASSUMED) == pytest.approx(1.0)
    assert all(how.startswith("measured: card.json") for how in inputs.used.values())
    limits = {"part": "limits", "device": "cuda", "ranks": 1, "matrix_flops_per_s": 5e14, "memory_bytes_per_s": 2e12}
    options = cost_model.parse(["--bandwidth", "7"])
    assert cost_model.assumed_of([file], options) == cost_model.Assumed(989e12, 4.8e12, 7e9, 0.4)
    assert cost_model.assumed_of([{**file, "measured": [limits]}], options) == cost_model.Assumed(5e14, 2e12, 7e9, 0.4)
