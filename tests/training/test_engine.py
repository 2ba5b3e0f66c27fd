"""Engine, stages, shards, checkpoints and the memory plan, on ranks of their own."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from launching import PRESET, python, run_ranks
from micro import micro_preset

from vla import distributed
from vla.distributed import UserError
from vla.files.trees import load_tree
from vla.training.checkpoint import OLD_FORMAT, damage
from vla.training.engine import read_deepspeed_config, use_gathered_layers
from vla.training.memory_plan import GIB, Recipe, advice, fitting, host_advice, host_need, largest, make_plan, remedies


def on_ranks(world: int, scenarios: list[tuple[str, dict]], accelerator: str = "cpu") -> list[dict]:
    """Run scenarios of engine_program.py on so many ranks of one process group; what each printed."""
    words = ["tests/helpers/engine_program.py", json.dumps(scenarios)]
    run = run_ranks(world, *words, env={"DS_ACCELERATOR": accelerator})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in run.stdout.splitlines() if line.startswith("RESULT ")]


# ---------------------------------------------------------------------- ZeRO stages, ranks, offload
BF16_LORA = {"dtype": "bfloat16", "lora_rank": 4}
# written by 2 ranks: name -> settings; the threshold keeps small parameters whole between forwards
WRITTEN = {
    "zero0": {"config": "zero0"},
    "zero2": {"config": "zero2"},
    "zero3": {"config": "zero3"},
    "bf16": {"config": "zero3", "threshold": 100_000, **BF16_LORA},
    "cpu_adam": {"config": "zero3_cpu_adam"},
}
# read on 1 rank, under another stage
READ = {
    "zero0": {"config": "zero3"},
    "zero2": {"config": "zero0"},
    "zero3": {"config": "zero2"},
    "bf16": {"config": "zero2", **BF16_LORA},
    "cpu_adam": {"config": "zero3", "offload": "stage"},
}
OFFLOAD = [  # llm: what the first block reads needs no gradient
    {"lora_rank": 4, "lora_scope": "llm", "offload": "none"},
    {"lora_rank": 4, "lora_scope": "llm", "offload": "stage", "uneven": True},
    {"dtype": "bfloat16", "threshold": 100_000, "offload": "none", "uneven": True},
    {"dtype": "bfloat16", "threshold": 100_000, "offload": "stage"},
    {"lora_scope": "llm", "offload": "none"},
    {"lora_scope": "llm", "offload": "stage"},
]
UNDONE = [{"config": "zero0"}, {"config": "zero2", **BF16_LORA}, {"config": "zero3", **BF16_LORA}]
MEASURED = [
    {"config": "zero0"},
    {"config": "zero2", **BF16_LORA},
    {"config": "zero3"},
    {"config": "zero3", "offload": "stage", **BF16_LORA},
    {"config": "zero3", "offload": "stage", "dtype": "bfloat16"},
]
ARITHMETIC = [{}, {"lora_rank": 4}, {"dtype": "bfloat16"}, BF16_LORA, {"offload": "stage", **BF16_LORA}]
EXACT = [{"config": "zero2", **BF16_LORA}, {"config": "zero3", **BF16_LORA}]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, dict]:
    """All scenarios that need no earlier run, on two ranks in one process group."""
    folder = tmp_path_factory.mktemp("engine")
    scenarios = [("save", {"folder": str(folder / name), "at": 1, "until": 2, **WRITTEN[name]}) for name in WRITTEN]
    scenarios += [("losses", settings) for settings in OFFLOAD] + [("broken_rollout", {"offload": "stage"})]
    scenarios += [("undo", settings) for settings in UNDONE] + [("memory", settings) for settings in MEASURED]
    scenarios += [("coverage", {"config": f"zero{stage}"}) for stage in (0, 2, 3)]
    scenarios += [("one_arithmetic", settings) for settings in ARITHMETIC]
    scenarios += [("exact_critic", settings) for settings in EXACT]
    scenarios += [("full_disk", {"folder": str(folder / "full")}), ("stale_stop", {"folder": str(folder / "stale")})]
    scenarios += [("not_finite", {"folder": str(folder / name), "config": name}) for name in ("zero2", "zero3")]
    results: dict[str, list] = {}
    for (name, _), result in zip(scenarios, on_ranks(2, scenarios)):
        results.setdefault(name, []).append(result)
    return folder, results


def as_format_2(new: Path, old: Path) -> Path:
    """A copy of a checkpoint as it was written before format 3: pickled env states, no checksums."""
    shutil.copytree(new, old)
    torch.save(load_tree(old / "envs.safetensors"), old / "envs.pt")
    (old / "envs.safetensors").unlink()
    state = json.loads((old / "state.json").read_text())
    files = {name: (old / name).stat().st_size for name in state["files"] if name != "envs.safetensors"}
    (old / "state.json").write_text(json.dumps(state | {"format": OLD_FORMAT, "files": files}))
    return old


@pytest.fixture(scope="module")
def one_rank(two_ranks) -> tuple[Path, dict]:
    """One rank goes on with what two wrote, and writes for two."""
    folder, _ = two_ranks
    scenarios = [
        ("resume", {"checkpoint": str(folder / name / "checkpoints/iteration_000001"), "until": 2, **READ[name]})
        for name in READ
    ]
    scenarios.append(("save", {"folder": str(folder / "by_one"), "at": 1, "until": 2, "config": "zero3"}))
    old = as_format_2(folder / "zero2/checkpoints/iteration_000001", folder / "old/checkpoints/iteration_000001")
    scenarios.append(("resume", {"checkpoint": str(old), "until": 2, **READ["zero2"]}))
    results: dict[str, list] = {}
    for (name, _), result in zip(scenarios, on_ranks(1, scenarios)):
        results.setdefault(name, []).append(result)
    return folder, results


@pytest.mark.slow
def test_two_ranks_saved_one_goes_on_under_another_stage(two_ranks, one_rank):
    for name, saved, resumed in zip(WRITTEN, two_ranks[1]["save"], one_rank[1]["resume"]):
        assert resumed["iteration"] == 1 and resumed["global_step"] == 100
        assert [entry["env"] for entry in resumed["envs"]] == [0, 1, 0, 1]  # all of them, in rank order
        exact = {"rel": 3e-3, "abs": 3e-3} if name == "bf16" else {"rel": 1e-5, "abs": 1e-5}
        for ours, theirs in zip(resumed["losses"], saved["losses"][1:]):
            assert ours == pytest.approx(theirs, **exact), name


@pytest.mark.slow
def test_one_rank_saved_two_go_on_and_the_same_ranks_go_on_bit_for_bit(two_ranks, one_rank):
    folder = two_ranks[0]
    again = [name for name in WRITTEN if name != "cpu_adam"]
    runs = [("by_one", {"config": "zero2"}), *((name, WRITTEN[name]) for name in again)]
    by_one, *same = on_ranks(
        2,
        [
            ("resume", {"checkpoint": str(folder / name / "checkpoints/iteration_000001"), "until": 2, **settings})
            for name, settings in runs
        ],
    )
    assert [entry["env"] for entry in by_one["envs"]] == [0, 1]  # rank 0's share
    for ours, theirs in zip(by_one["losses"], one_rank[1]["save"][0]["losses"][1:]):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    saved = dict(zip(WRITTEN, two_ranks[1]["save"]))
    for name, resumed in zip(again, same):
        assert resumed["losses"] == saved[name]["losses"][1:], name


@pytest.mark.slow
def test_adam_on_the_cpu_makes_the_same_steps(two_ranks):
    saved = dict(zip(WRITTEN, two_ranks[1]["save"]))
    for ours, theirs in zip(saved["cpu_adam"]["losses"], saved["zero3"]["losses"]):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_offload_and_uneven_forwards_change_nothing(two_ranks):
    """Rank 1 makes three forwards where rank 0 makes one, and nothing waits."""
    runs = two_ranks[1]["losses"]
    for first in range(0, len(OFFLOAD), 2):
        assert runs[first]["losses"] == runs[first + 1]["losses"]
    plain = dict(zip(WRITTEN, two_ranks[1]["save"]))["zero3"]
    assert two_ranks[1]["broken_rollout"][0]["losses"] == plain["losses"][:2]  # an exception leaves no trace
    for run in runs:
        gib = run["memory"]
        assert all(0.1 < gib[f"memory/{stage}_resident_gib"] < 20 for stage in ("rollout", "update"))
        assert all(
            gib[f"memory/host_{s}_peak_gib"] >= gib[f"memory/host_{s}_resident_gib"] - 0.05
            for s in ("rollout", "update")
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("settings", [{"lora_rank": 4}, {"dtype": "bfloat16"}, BF16_LORA])
def test_on_a_gpu_offload_frees_what_it_moves_and_changes_no_loss(settings):
    # a process each: what cuBLAS takes at its first call, 64 MiB, would hide the difference
    kept, moved = (on_ranks(1, [("losses", {**settings, "offload": how})], "cuda")[0] for how in ("none", "stage"))
    assert kept["losses"] == moved["losses"]
    freed = kept["memory"]["memory/rollout_resident_gib"] - moved["memory"]["memory/rollout_resident_gib"]
    assert freed >= 0.99 * moved["movable_gib"] > 0


@pytest.mark.slow
def test_a_snapshot_undoes_an_update_bit_for_bit(two_ranks):
    for settings, result in zip(UNDONE, two_ranks[1]["undo"]):
        assert result["again"] == result["once"], settings


@pytest.mark.slow
def test_every_trained_element_lies_on_exactly_one_rank(two_ranks):
    assert [result["wrong"] for result in two_ranks[1]["coverage"]] == [[], [], []]


@pytest.mark.slow
def test_a_disk_that_one_rank_finds_full_ends_all_ranks_and_spoils_nothing(two_ranks):
    (result,) = two_ranks[1]["full_disk"]
    assert "rank 1: " in result["said"] and "--resume" in result["said"]
    assert result["left"] == ["iteration_000001"]  # the one before, and no half-written one
    assert damage(two_ranks[0] / "full" / "checkpoints" / "iteration_000001") is None


@pytest.mark.slow
def test_a_checkpoint_of_the_format_before_goes_on_alike(two_ranks, one_rank):
    assert damage(two_ranks[0] / "old/checkpoints/iteration_000001") is None
    *resumed, old = one_rank[1]["resume"]
    assert old == dict(zip(READ, resumed))["zero2"]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(two_ranks):
    """One element on one rank: all ranks end in one sentence, and what was saved before stays."""
    for name, result in zip(("zero2", "zero3"), two_ranks[1]["not_finite"]):
        assert "is not finite after iteration 2" in result["said"] and "--resume" in result["said"], result
        assert result["left"] == ["iteration_000001"] == result["after_a_moment"]
        assert damage(two_ranks[0] / name / "checkpoints" / "iteration_000001") is None


@pytest.mark.slow
def test_a_stop_file_of_a_killed_run_stops_no_rank_of_the_next(two_ranks):
    assert two_ranks[1]["stale_stop"] == [{"asked": 0.0}]


@pytest.mark.slow
def test_under_zero3_weights_act_and_are_judged_bit_for_bit_as_they_do_outside(two_ranks):
    for settings, result in zip(ARITHMETIC, two_ranks[1]["one_arithmetic"]):
        assert result == {"differing": [], "torchs_own": True}, settings


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6)])
@pytest.mark.parametrize("frozen, biased", [(False, True), (True, True), (False, False)])
def test_a_linear_layer_of_the_engine_is_torchs_without_keeping_the_weight(shape, frozen, biased):
    plain, x = torch.nn.Linear(6, 3, bias=biased), torch.randn(*shape)
    plain.weight.requires_grad_(not frozen)
    model = torch.nn.Sequential(copy.deepcopy(plain))
    use_gathered_layers(model)
    (ours,) = model
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, other = plain(left), ours(right)
    assert torch.equal(one, other)
    weight = ours.weight.data.clone()
    ours.weight.data = torch.empty(0)  # ZeRO-3 frees it after the forward
    ours.weight.data = 2 * weight  # and gathers it before the backward: what is there then is what counts
    for result in (one, other):
        (result**2).sum().backward()
    torch.testing.assert_close(right.grad, 2 * left.grad)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.slow
def test_the_critic_is_trained_from_the_fp32_weights_that_were_read(two_ranks):
    for settings, result in zip(EXACT, two_ranks[1]["exact_critic"]):
        assert result == {"all": True, "largest": 0.0}, settings


# ---------------------------------------------------------------------- memory plan
def recipe(config: str, dtype: str = "float32", lora_rank: int = 0, offload: str = "none", **changes) -> Recipe:
    """Of engine_program.py's memory scenario: two envs and a micro batch of two on each of two ranks."""
    settings = {
        "model_path": micro_preset(),
        "model_type": "openvla",
        "chunk_size": 1,
        "lora_scope": "all",
        "critic": True,
        "max_prompt_length": 12,
        "gradient_checkpointing": False,
        "micro_batch_size": 2,
        "num_envs": 4,
        "num_eval_envs": 1,
        "num_steps": 16,
        "num_env_workers": 0,
        "zero_stage": int(config[4]),
        "cpu_adam": config == "zero3_cpu_adam",
    }
    return Recipe(dtype=dtype, lora_rank=lora_rank, offload=offload, **settings | changes)


@pytest.mark.slow
def test_the_memory_plan_meets_measured_bytes(two_ranks):
    for settings, measured in zip(MEASURED, two_ranks[1]["memory"]):
        plan = make_plan(recipe(**settings), 2)
        for stage in ("rollout", "update"):
            assumed = sum(size for name, size in getattr(plan, stage).items() if "assumed" in name)
            for moment in ("resident", "peak"):
                planned = getattr(plan, moment)(stage) - assumed
                assert planned == pytest.approx(measured[f"{stage}_{moment}"], rel=0.15), (settings, stage, moment)


def test_the_memory_plan_knows_what_each_knob_does():
    small, plain = recipe("zero3"), recipe("zero3", micro_batch_size=8, num_envs=8)
    kept, again = (
        make_plan(recipe("zero3", model_path="openvla-tiny", gradient_checkpointing=on), 2) for on in (False, True)
    )
    assert again.update["activations"] < 0.7 * kept.update["activations"]
    assert make_plan(plain, 4).update["Adam's moments"] <= 0.51 * make_plan(plain, 2).update["Adam's moments"]
    moved = make_plan(recipe("zero3", offload="stage"), 2)
    assert moved.peak("rollout") < make_plan(small, 2).peak("rollout")
    assert moved.host["moved out between the stages"] > 0
    on_cpu = make_plan(recipe("zero3_cpu_adam"), 2)
    assert "Adam's moments" not in on_cpu.update and on_cpu.host["Adam on the CPU"] > 0
    with pytest.raises(UserError, match="not divisible by 3"):
        make_plan(small, 3)


def test_gradients_of_weights_are_planned_once_for_all_decisions_of_a_micro_batch():
    """A decision adds what it adds. What one decision alone needs is more, if all weights are trained."""

    def activations(micro_batch_size: int, **changes) -> int:
        need = recipe("zero3", micro_batch_size=micro_batch_size, gradient_checkpointing=True, **changes)
        return make_plan(need, 2).update["activations"]

    for rank in (0, 4):
        one, eight, sixteen, many = (activations(size, lora_rank=rank) for size in (1, 8, 16, 32))
        assert many - sixteen == 2 * (sixteen - eight)
        assert (many < 32 * one) if rank == 0 else (many <= 32 * one)


def test_the_memory_plan_trains_the_adapter_that_lora_path_names(tmp_path):
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    trained = {
        path: make_plan(recipe("zero2", lora_path=path), 2).update["weights, trained"]
        for path in (None, "nobody/published", str(tmp_path))
    }
    assert trained[str(tmp_path)] < trained["nobody/published"] < trained[None]
    assert make_plan(recipe("zero2", lora_rank=32), 2).update["weights, trained"] == trained["nobody/published"]
    merged = recipe("zero2", lora_path=str(tmp_path), merge_lora=True, lora_rank=32)
    assert make_plan(merged, 2).update["weights, trained"] == trained["nobody/published"]
    assert "--lora_rank" not in advice(recipe("zero2", lora_path=str(tmp_path)), 2, 0.1)[1]


def test_the_memory_plan_names_the_flag_to_turn():
    need = recipe("zero2", micro_batch_size=64)
    fits, sentence = advice(need, 2, 1000.0)
    assert fits and sentence.startswith("GPU memory fits")
    plan = make_plan(need, 2)
    just_too_small = (max(plan.peak("rollout"), plan.peak("update")) - 1) / 2**30
    fits, sentence = advice(need, 2, just_too_small)
    assert not fits and "): --micro_batch_size 32 needs " in sentence, "ZeRO-3 saves nothing in a model this small"
    assert fitting(need, 2, just_too_small)[1] <= just_too_small and fitting(need, 2, 1000.0)[0] == ""
    assert "more or larger GPUs" in advice(need, 2, 0.1)[1]
    # smaller micro batches come first, but fewer workers are enough
    need = recipe("zero2", micro_batch_size=64, num_envs=8, num_env_workers=4)
    enough = largest(make_plan(replace(need, num_env_workers=1), 2))
    assert fitting(need, 2, enough) == ("--num_env_workers 1", enough)


def test_sharding_comes_first_for_whole_weights_and_late_for_an_adapter():
    whole = [flags for flags, _ in remedies(recipe("zero2", num_env_workers=4))]
    adapter = [flags for flags, _ in remedies(recipe("zero2", lora_rank=4, num_env_workers=4))]
    sharding = ["--deepspeed_config ds_configs/zero3.json", "--deepspeed_config ds_configs/zero3.json --offload stage"]
    assert whole[:2] == sharding and whole[-1].startswith("--lora_rank 32")
    assert adapter.index(sharding[0]) > adapter.index("--num_env_workers 1") > adapter.index("--micro_batch_size 1")
    assert not any("--lora_rank" in flags for flags in adapter)


def test_the_memory_plan_compares_host_memory_too():
    """Two ranks with 8 workers, in which 4 envs evaluate too, cannot do without their own 3 GiB each."""
    need = recipe("zero3_cpu_adam", num_envs=16, num_env_workers=16, num_eval_envs=8)
    plan = make_plan(need, 2)
    assert plan.host["processes (assumed)"] == 2 * (3 * GIB + 8 * int(1.2 * GIB))
    fits, sentence = host_advice(need, 2, 1000.0, host_need(plan))
    assert fits and sentence.startswith("host memory fits: ")
    fits, sentence = host_advice(need, 2, 1000.0, 12.0)
    assert not fits and ": --num_env_workers 2 needs " in sentence, sentence
    without_workers = make_plan(replace(need, num_env_workers=0), 2)
    fits, sentence = host_advice(need, 2, 1000.0, host_need(without_workers) - 1e-6)
    assert not fits and "--num_env_workers 0 and --deepspeed_config ds_configs/zero3.json needs" in sentence
    on_gpu = largest(make_plan(replace(need, num_env_workers=0, cpu_adam=False), 2))
    assert "use fewer --num_envs" in host_advice(need, 2, on_gpu - 1e-6, host_need(without_workers) - 1e-6)[1]


def test_evaluation_envs_are_counted_as_the_scripts_make_them():
    """3 held-out envs on 2 ranks are one each, and the rank that simulates itself is one process that renders."""
    one, three = (make_plan(recipe("zero3", num_envs=2, num_eval_envs=number), 2) for number in (2, 3))
    assert one == three and one.update["renderers (assumed)"] == int(0.3 * GIB)
    workers = make_plan(recipe("zero3", num_envs=4, num_eval_envs=2, num_env_workers=2), 2)
    assert workers.update["renderers (assumed)"] == 2 * int(0.3 * GIB)


def test_doctor_prints_the_plan_of_a_preset():
    command = ["doctor.py", "--config", PRESET, "--num_gpus", "2", "--gpu_memory", "8", "--host_memory", "16"]
    run = python(*command)
    assert run.returncode == 0 and "activations" in run.stdout and "of 16" in run.stdout, run.stderr
    assert run.stdout.splitlines()[-2].startswith("GPU memory fits: ")
    assert run.stdout.splitlines()[-1].startswith("host memory fits: ")
    run = python(*command, "--host_memory", "2")
    assert run.returncode == 1 and run.stdout.splitlines()[-1].startswith("host memory does not fit (")
    run = python(*command, "--offload", "stage", "--deepspeed_config", "ds_configs/zero2.json")
    assert run.returncode == 2 and run.stderr.startswith("error: --offload stage needs ZeRO-3")


# ---------------------------------------------------------------------- launchers that end first
@pytest.mark.parametrize(
    "parents, first_command, ended",
    [
        ({"me": 1}, b"/sbin/init", True),  # the launcher's helper was killed while this rank was importing
        ({"me": 50, 50: 1}, b"/sbin/init", True),  # `deepspeed` was
        ({"me": 50, 50: 1}, b"tini\0--\0deepspeed\0train_ppo.py", False),  # a container's first process
        ({"me": 50, 50: 40}, b"/sbin/init", False),
    ],
)
def test_a_rank_that_finds_its_launcher_gone_ends(monkeypatch, parents, first_command, ended):
    commands = {1: first_command, 50: b"python\0-m\0deepspeed.launcher.launch", 40: b"deepspeed"}
    watches = []
    monkeypatch.setenv("CROSS_SIZE", "1")
    monkeypatch.setattr(distributed.os, "getppid", lambda: parents["me"])
    monkeypatch.setattr(distributed, "parent_of", parents.get)
    monkeypatch.setattr(distributed, "command_of", commands.get)
    monkeypatch.setattr(distributed.threading, "Thread", lambda **kwargs: watches.append(1) or Mock())
    distributed.end_with_launcher.cache_clear()
    if ended:
        with pytest.raises(UserError, match="has already ended"):
            distributed.end_with_launcher()
    else:
        for _ in range(2):  # run_main() and setup_distributed() call it, and one thread is enough
            distributed.end_with_launcher()
        assert watches == [1]
    distributed.end_with_launcher.cache_clear()


# ---------------------------------------------------------------------- settings that do not go together
@pytest.mark.parametrize(
    "zero, offload, sentence",
    [
        ({"stage": 2}, "stage", "--offload stage needs ZeRO-3"),
        ({"stage": 3, "memory_efficient_linear": True}, "none", "memory_efficient_linear is decided by the engine"),
        ({"stage": 1}, "none", "must be 0, 2 or 3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "none", "offload_param is not supported"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "stage", "use ds_configs/zero3.json"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "none", "offload_optimizer needs ZeRO-3"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "none", "device \"nvme\", but it must be 'cpu'"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "none", "0.5, but it must be left out"),
    ],
)
def test_unsupported_combinations_are_refused_with_a_sentence(tmp_path, zero, offload, sentence):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
    with pytest.raises(UserError, match=sentence):
        read_deepspeed_config(str(tmp_path / "ds.json"), "float32", offload)


def test_shipped_configs_are_accepted():
    for name, offload in (("zero0", "none"), ("zero2", "none"), ("zero3", "stage"), ("zero3_cpu_adam", "none")):
        read_deepspeed_config(str(ROOT / f"ds_configs/{name}.json"), "float32", offload)
