"""The whole machine on CPU ranks: the real launcher, the real simulator, the real script."""

import itertools
import json
import math
import os
from pathlib import Path

import imageio.v3 as iio
import pytest
from conftest import ROOT
from launching import free_port, metrics, python, train, without_time
from safetensors.torch import load_file

import doctor
from benchmarks.wire_bytes import rows_of_run
from vla.distributed import UserError
from vla.evaluation.episode_log import episode_file, read_episodes
from vla.evaluation.montage import read_clips
from vla.evaluation.video import FPS
from vla.files.trees import load_tree
from vla.start.extensions import ops_folder
from vla.start.flag_files import read_yaml
from vla.training.checkpoint import open_run

TAGS = """train/actor/approx_kl train/actor/clip_fraction train/actor/clipped_ratio train/actor/grad_norm train/actor/lr
train/actor/policy_loss train/critic/value_loss train/critic/value_clip_ratio train/critic/explained_variance
train/entropy_loss train/loss rollout/advantages_max rollout/advantages_mean rollout/advantages_min rollout/rewards
env/episode_len env/return env/reward env/success_once
time/rollout time/update time/eval time/iteration time/env_steps_per_second""".split()

FULL = pytest.mark.full
pytestmark = pytest.mark.slow


def shared_memory_of(port: str) -> list[Path]:
    """What DeepSpeed's CPU ranks left of their buffers, 64 MB each, in memory."""
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


@pytest.fixture(scope="module")
def four_iterations(tmp_path_factory) -> Path:
    """One rank, four iterations in one go, with a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("runs") / "four"
    train("--run_dir", str(run_dir), "--num_iterations", "4")
    return run_dir


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, str]:
    """The command of the README: two ranks, ZeRO-3, every process a fresh interpreter."""
    run_dir, port = tmp_path_factory.mktemp("runs") / "two_ranks", free_port()
    flags = ["--run_dir", str(run_dir), "--num_iterations", "2", "--video_episodes", "2"]
    run = train(*flags, ranks=2, launcher=True, port=port)
    assert not shared_memory_of(port)
    return run_dir, run.stdout


def test_a_run_leaves_everything_behind(two_ranks):
    run_dir, output = two_ranks
    lines = metrics(run_dir)
    assert [line["iteration"] for line in lines] == [1, 2] and [line["global_step"] for line in lines] == [64, 128]
    for line in lines:
        for tag in TAGS:
            assert math.isfinite(line[tag]), tag
        assert line["env/episode_len"] <= 8 and line["train/actor/ratio_first_microbatch_error"] < 1e-4
    assert 0 <= lines[-1]["eval/success_once"] <= 1 and lines[-1]["eval/global_step"] == 128
    assert lines[0]["eval/global_step"] == 0  # that of the starting policy
    video = run_dir / "videos" / "before_after.mp4"
    for path in (video, *(run_dir / "videos").glob("eval_*/*.mp4")):
        frames = iio.imread(path)
        assert 2 <= len(frames) <= 8 + 1 + FPS and frames.std() > 5
    for iteration in (0, 2):
        recorded = [clip["episode_id"] for clip in read_clips(run_dir, iteration)]
        kept = read_episodes(episode_file(run_dir, iteration))
        assert recorded == [episode["episode_id"] for episode in kept]
        assert all(episode["object"] and episode["table"] and episode["instruction"] for episode in kept)
    assert iio.imread(run_dir / "progress.png").std() > 5
    checkpoint = run_dir / "checkpoints" / "iteration_000002"
    assert (checkpoint / "state.json").is_file() and (checkpoint / "policy" / "model.safetensors").is_file()
    assert not list(run_dir.glob("checkpoints/*.partial"))
    description = json.loads((run_dir / "run_from_iteration_000000.json").read_text())
    assert description["args"]["num_envs"] == 4 and description["versions"]["deepspeed"] and description["commit"]
    for wanted in (str(run_dir), str(video), str(run_dir / "progress.png"), "before", "after"):
        assert wanted in output


def test_resume_goes_on_as_if_nothing_had_happened(four_iterations, tmp_path):
    """1..4 in one go; 1..2, then killed while writing, then --resume for 3..4: identical in everything but time.

    The resumed run simulates in a worker process, a fresh interpreter as every worker of a user's run.
    """
    run_dir = tmp_path / "resumed"
    train("--run_dir", str(run_dir), "--num_iterations", "2")
    whole = without_time(metrics(four_iterations))
    first = without_time(metrics(run_dir))
    assert first[0] == whole[0]  # the same seed twice; the second line differs in that its run ends there and evaluates
    (run_dir / "checkpoints" / "iteration_000003.partial").mkdir()
    (run_dir / "checkpoints" / "iteration_000003.partial" / "state.json").write_text("{}")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "global_step": 192, "train/loss": 1e9}\n{"iteration": 4, "glo')
    train("--resume", str(run_dir), "--num_iterations", "4", "--num_env_workers", "1")
    resumed = without_time(metrics(run_dir))
    assert [line["iteration"] for line in resumed] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed, whole):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
    assert resumed[2:] == whole[2:]
    assert "1e9" in (run_dir / "metrics.lost.jsonl").read_text()


def test_same_seed_twice_is_identical_on_two_ranks_and_another_seed_is_not(two_ranks, four_iterations, tmp_path):
    """The second time by forks instead of the launcher."""
    train("--run_dir", str(tmp_path / "again"), "--num_iterations", "2", ranks=2)
    assert without_time(metrics(tmp_path / "again")) == without_time(metrics(two_ranks[0]))
    train("--run_dir", str(tmp_path / "other"), "--num_iterations", "1", "--seed", "1")
    assert metrics(tmp_path / "other")[0]["train/loss"] != metrics(four_iterations)[0]["train/loss"]


GRID = [*itertools.product((0, 2, 3), (1, 2), (1, 8))]  # ZeRO stage, ranks, micro batch


@pytest.mark.parametrize("stage, ranks, micro_batch_size", [(0, 2, 2), *(pytest.param(*p, marks=FULL) for p in GRID)])
def test_zero_stage_ranks_and_micro_batch_change_nothing(four_iterations, tmp_path, stage, ranks, micro_batch_size):
    """All three at once; `make test-all` has their grid."""
    flags = ["--deepspeed_config", f"ds_configs/zero{stage}.json", "--micro_batch_size", str(micro_batch_size)]
    train("--run_dir", str(tmp_path / "run"), "--num_iterations", "2", *flags, ranks=ranks)
    assert_equal_losses(tmp_path / "run", four_iterations)


@pytest.mark.parametrize(
    "placement, ranks",
    [
        ("env=0 rollout=1 actor=0-1", 2),  # hybrid
        ("env=0 rollout=1 actor=2-3", 4),  # apart
        pytest.param("env,rollout=0 actor=1-2", 3, marks=FULL),
        pytest.param("env=0-1 rollout,actor=2-3", 4, marks=FULL),
    ],
)
def test_a_placement_changes_no_bit(two_ranks, tmp_path, placement, ranks):
    """Two halves of one rank hold the envs of the two ranks that do everything, so batches are the same."""
    halves = ["--pipeline_stages", "2"] if "rollout,actor" not in placement else []
    flags = ["--run_dir", str(tmp_path / "run"), "--num_iterations", "2", "--video_episodes", "2", *halves]
    train(*flags, "--placement", *placement.split(), ranks=ranks)
    lines = metrics(tmp_path / "run")
    assert without_time(lines) == without_time(metrics(two_ranks[0]))
    travels = {"observations": "env,rollout" not in placement, "experience": "rollout,actor" not in placement}
    for boundary, crosses in travels.items():
        assert (lines[1][f"time/wire_{boundary}_gib"] > 0) == crosses
    for boundary, counted, model, worst, _ in rows_of_run(tmp_path / "run"):
        assert counted == model == 0 or worst < 0.01, (boundary, counted, model)
    assert (tmp_path / "run" / "videos" / "before_after.mp4").is_file()


@FULL
@pytest.mark.parametrize("placement, ranks", [("env=0 rollout=1 actor=0-1", 2), ("env=0 rollout=1 actor=2-3", 4)])
def test_an_update_of_other_ranks_runs_frozen_towers_itself(tmp_path, placement, ranks):
    """With --lora_scope llm, features of the towers stay on the ranks that act. The losses are the same to rounding."""
    lora = ["--num_iterations", "2", "--lora_rank", "4", "--lora_scope", "llm"]
    train("--run_dir", str(tmp_path / "together"), *lora, ranks=2)
    train("--run_dir", str(tmp_path / "run"), *lora, "--placement", *placement.split(), ranks=ranks)
    assert_equal_losses(tmp_path / "run", tmp_path / "together")


def test_ranks_under_zero3_change_nothing(four_iterations, two_ranks):
    assert_equal_losses(two_ranks[0], four_iterations)


def assert_equal_losses(run_dir: Path, other: Path) -> None:
    """The losses of two iterations are those of ZeRO-3 on one rank with micro batch 8, to 1e-4."""
    assert len(metrics(run_dir)) == 2
    for ours, theirs in zip(metrics(run_dir), metrics(other)):
        for tag in ("train/loss", "train/actor/policy_loss", "train/critic/value_loss", "train/entropy_loss"):
            assert ours[tag] == pytest.approx(theirs[tag], abs=1e-4), tag
        assert ours["train/actor/grad_norm"] == pytest.approx(theirs["train/actor/grad_norm"], rel=1e-3)
        assert ours["env/num_episodes"] == theirs["env/num_episodes"]
        assert ours["rollout/rewards"] == pytest.approx(theirs["rollout/rewards"], abs=1e-9)


def test_half_batches_change_nothing(four_iterations, tmp_path):
    train("--run_dir", str(tmp_path / "run"), "--num_iterations", "2", "--pipeline_stages", "2")
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(four_iterations)):
        for tag in ("train/loss", "train/critic/value_loss", "rollout/advantages_max", "env/episode_len"):
            assert ours[tag] == pytest.approx(theirs[tag], abs=1e-4), tag


@FULL
def test_lora_trains_on_two_sharded_ranks_and_its_adapter_loads(tmp_path):
    """With both regularisers: the adapter's own start is the reference, so that KL starts at 0. The rate falls."""
    from vla.models.loading import load_policy

    train(
        "--run_dir",
        str(tmp_path / "run"),
        "--num_iterations",
        "2",
        "--lora_rank",
        "4",
        "--kl_coef",
        "0.1",
        "--fan_coef",
        "0.1",
        "--schedule",
        "linear",
        ranks=2,
    )
    first, second = metrics(tmp_path / "run")
    assert second["train/actor/lr"] == first["train/actor/lr"] / 2 > 0
    assert 0 <= first["train/actor/reference_kl"] < second["train/actor/reference_kl"]
    assert second["train/actor/fan_kl"] > 0 and second["train/actor/ratio_first_microbatch_error"] < 1e-4
    folder = tmp_path / "run" / "checkpoints" / "iteration_000002" / "policy"
    adapter = {n: p for n, p in load_policy(str(folder), lora_rank=4).named_parameters() if "lora_B" in n}
    assert sum(float(p.abs().sum()) for p in adapter.values()) > 0  # lora_B starts at zero


@pytest.mark.parametrize(
    ("preset", "ranks", "flags"),
    [
        ("ppo_openvla", 1, []),
        ("ppo_openvla", 2, ["--critic", "hidden", "--value_learning_rate", "3e-3"]),
        ("ppo_openvlaoft", 2, []),
        ("grpo_openvla", 2, ["--group_size", "2"]),
        ("grpo_openvlaoft", 1, ["--group_size", "2"]),
    ],
)
def test_every_quickstart_runs_two_iterations(tmp_path, preset, ranks, flags):
    """And PPO's with the critic of the published recipes, which no quickstart has."""
    run_dir, script = tmp_path / "run", "train_grpo.py" if "grpo" in preset else "train_ppo.py"
    run = train(
        "--run_dir",
        str(run_dir),
        "--num_iterations",
        "2",
        *flags,
        ranks=ranks,
        script=script,
        preset=f"yaml/quickstart_{preset}.yaml",
    )
    lines = metrics(run_dir)
    assert len(lines) == 2
    # a critic beside the engine has no clipped update
    lacking = () if "hidden" in flags else ("train/critic/value_clip_ratio",)
    for line in lines:
        for tag in TAGS:
            if "grpo" not in preset or not tag.startswith("train/critic"):
                assert tag in lacking or math.isfinite(line[tag]), tag
    if "grpo" not in preset:  # in these two the critic alone learns
        begun, *ended = (
            load_file(folder / "model.safetensors")
            for folder in (
                ROOT / read_yaml(ROOT / f"yaml/quickstart_{preset}.yaml")["model_path"],
                *(run_dir / "checkpoints" / f"iteration_{i:06d}" / "policy" for i in (1, 2)),
            )
        )
        assert all((begun[name] == policy[name]).all() for policy in ended for name in begun)
        folders = [run_dir / f"checkpoints/iteration_{i:06d}" for i in (1, 2)]
        assert (folders[0] / "critic.safetensors").is_file() == ("hidden" not in flags)
        if "hidden" not in flags:  # it reads the simulator's state
            critics = [load_tree(folder / "critic.safetensors")["net"] for folder in folders]
            assert not (folders[0] / "policy" / "value_head.safetensors").is_file()
        else:
            critics = [load_file(folder / "policy" / "value_head.safetensors") for folder in folders]
        assert any((critics[0][name] != critics[1][name]).any() for name in critics[0])
    if "grpo" in preset and lines[-1]["rollout/effective_samples"] == 0:
        assert "so no weight was changed" in run.stdout + run.stderr
        start, end = (
            load_file(run_dir / "checkpoints" / f"iteration_{i:06d}" / "policy" / "model.safetensors") for i in (1, 2)
        )
        assert all((start[name] == end[name]).all() for name in start)


@FULL
def test_a_critic_beside_the_engine_goes_on_on_another_number_of_ranks(tmp_path):
    """Two ranks make two iterations; one rank makes the third after them, and all three by itself."""
    preset, run_dir = "yaml/quickstart_ppo_openvlaoft.yaml", tmp_path / "run"
    flags = ["--critic_warmup_iterations", "0", "--learning_rate", "1e-5"]
    train("--run_dir", str(run_dir), "--num_iterations", "2", *flags, ranks=2, preset=preset)
    two = metrics(run_dir)
    train("--resume", str(run_dir), "--num_iterations", "3", *flags, preset=preset)
    train("--run_dir", str(tmp_path / "one"), "--num_iterations", "3", *flags, preset=preset)
    one = metrics(tmp_path / "one")
    assert len(two) == 2 and one[-1]["train/critic/explained_variance"] != 0
    for ours, theirs in zip([*two, metrics(run_dir)[-1]], one):
        for tag in ("train/critic/value_loss", "train/critic/explained_variance", "train/loss", "env/return"):
            assert ours[tag] == pytest.approx(theirs[tag], abs=1e-4), tag


def test_the_critic_and_the_actor_both_move(four_iterations):
    """Weights of the saved policy differ from the preset's in every part that a forward reads, and nowhere else."""
    from vla.models.loading import load_policy

    start = load_policy("openvla-tiny")
    trained = load_policy(str(four_iterations / "checkpoints" / "iteration_000004" / "policy"))
    for (name, before), after in zip(start.named_parameters(), trained.parameters()):
        if not before.requires_grad:
            assert (before == after).all(), name
    for part in ("featurizer.patch_embed", "fused_featurizer.blocks.0", "projector.fc1", "lm_head", "value_head.mlp.4"):
        pairs = [(b, a) for (n, b), a in zip(start.named_parameters(), trained.parameters()) if part in n]
        assert any((b != a).any() for b, a in pairs), part


# ------------------------------------------------- wrong input: one sentence, exit code not 0, nothing written
def refused(*flags: str, sentence: str, ranks: int = 1, **options) -> None:
    run = train(*flags, check=False, ranks=ranks, **options)
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and sentence in errors[0], run.stderr[-2000:]
    assert "Traceback" not in run.stderr


@FULL
def test_num_envs_must_divide_by_ranks(tmp_path):
    refused("--num_envs", "5", "--run_dir", str(tmp_path / "x"), sentence="use 4 or 6", ranks=2, launcher=True)
    assert not (tmp_path / "x").exists()


def test_an_existing_run_folder_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused("--run_dir", str(tmp_path), sentence="it holds no run, so give another --run_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(UserError, match="its run saved nothing, so remove it or give another"):
        open_run(str(tmp_path), None, "", {})
    (tmp_path / "checkpoints" / "iteration_000001").mkdir(parents=True)
    with pytest.raises(UserError, match=f"pass --resume {tmp_path}"):
        open_run(str(tmp_path), None, "", {})


def test_a_run_folder_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    refused("--run_dir", str(tmp_path / "file" / "x"), sentence=f"{tmp_path / 'file'} is not a folder")
    # permissions mean nothing to root: what the system would say to others
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{tmp_path} is not a folder or you may not write there"):
        open_run(str(tmp_path / "x"), None, "", {})


def test_unknown_env_id(tmp_path):
    refused(
        "--env_id",
        "PutOnPlateInScene25Mian-v3",
        "--run_dir",
        str(tmp_path / "x"),
        sentence="PutOnPlateInScene25Main-v3",
    )


def test_missing_model_folder(tmp_path):
    refused(
        "--model_path",
        "/nowhere/openvla-7b",
        "--run_dir",
        str(tmp_path / "x"),
        sentence="/nowhere/openvla-7b is not a folder",
    )


def test_no_vulkan_device(tmp_path):
    nothing = {"VK_DRIVER_FILES": "/nonexistent", "VK_ICD_FILENAMES": "/nonexistent"}
    refused("--run_dir", str(tmp_path / "x"), sentence="python doctor.py", env=nothing)
    assert not (tmp_path / "x").exists()
    examined = python("doctor.py", "--renderer", env=nothing)
    assert examined.returncode == 1 and "FIX" in examined.stdout and "mesa-vulkan-drivers" in examined.stdout


def test_resume_refusals(tmp_path):
    refused("--resume", str(tmp_path), sentence="is not a run folder")


def test_resume_with_other_weights_trained(four_iterations):
    refused("--resume", str(four_iterations), "--num_iterations", "5", "--lora_rank", "4", sentence="--lora_rank")
    refused("--resume", str(four_iterations), "--critic", "state", sentence="--critic hidden -> state cannot resume")


def test_unknown_yaml_key_and_missing_config(tmp_path):
    (tmp_path / "a.yaml").write_text("num_env: 4\n")
    refused("--config", str(tmp_path / "a.yaml"), sentence="did you mean 'num_envs'")
    refused("--config", str(tmp_path / "b.yaml"), sentence="does not exist")


def test_doctor_finds_this_machine_well():
    run = python("doctor.py")
    assert run.returncode == 0, run.stdout
    rows = {line.split()[1]: line.split()[0] for line in run.stdout.splitlines()}
    assert list(rows) == list(doctor.CHECKS) and set(rows.values()) <= {"ok", "note"}
    optional = {"assets", "ops", "disk"}  # the published pack; compiled at the first start; room for large models
    assert all(state == "ok" for name, state in rows.items() if name not in optional), run.stdout
    assert "2 ranks on gloo summed a number" in run.stdout
    assert (
        ops_folder() / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    ).exists()  # no start compiles after `make setup`
