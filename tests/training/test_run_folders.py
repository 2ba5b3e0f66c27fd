"""Run folders: one writer, checkpoints that are whole and finite, and nothing of a stranger's that runs code."""

import dataclasses
import errno
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sameness import same

import train_grpo
import train_ppo
import train_sft
from envs.demonstrations import Demos
from schemas import UserError, lock
from schemas.lock import hold_folder
from vla.files.trees import checksum, load_old_tree, load_tree, save_tree
from vla.models.loading import load_policy
from vla.start.resume import FIXED, MAY_CHANGE, MAY_GROW, OF_A_START, changed_flags
from vla.training.checkpoint import (
    FORMAT,
    OLD_FORMAT,
    begin_run,
    check_policy_contents,
    complete_checkpoints,
    content_damage,
    damage,
    latest_checkpoint,
    load_critic,
    open_run,
    prune,
    put_in_place,
)
from vla.training.critics import StateCritic
from vla.training.optimizer_state import open_pieces

SHARD = "optimizer/rank_00000.safetensors"


def fake_checkpoint(run_dir: Path, iteration: int, **changes) -> Path:
    """A checkpoint of one file of five bytes. changes: keys of state.json."""
    folder = run_dir / "checkpoints" / f"iteration_{iteration:06d}"
    (folder / "optimizer").mkdir(parents=True)
    (folder / SHARD).write_bytes(b"12345")
    state = {"format": FORMAT, "iteration": iteration, "global_step": 10, "trained": {}}
    state["files"] = {SHARD: [5, checksum(folder / SHARD)]}
    (folder / "state.json").write_text(json.dumps(state | changes))
    return folder


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ---------------------------------------------------------------------- nothing is unpickled
class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path) -> Path:
    return tmp_path / "it_ran"


def bombs(folder: Path, trace: Path) -> dict[str, Path]:
    """A pickled bomb in each form that a stranger might use."""
    folder.mkdir()
    torch.save([{"counter": Bomb(trace)}], folder / "envs.pt")
    torch.save({"net": Bomb(trace)}, folder / "critic.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pt").write_bytes(pickle.dumps(Bomb(trace)))
    np.save(folder / "array.npy", np.array([Bomb(trace)], dtype=object))
    return {path.name: path for path in folder.iterdir()}


def test_the_bombs_are_live(tmp_path, trace):
    pickle.loads(bombs(tmp_path / "bombs", trace)["plain.pt"].read_bytes())
    assert trace.exists()


@pytest.mark.parametrize("kind", ["envs.pt", "critic.pt", "plain.pt", "array.npy"])
def test_a_malicious_file_of_a_checkpoint_runs_nothing(tmp_path, trace, kind):
    path = bombs(tmp_path / "bombs", trace)[kind]
    for load in (load_old_tree, load_tree):
        with pytest.raises(UserError, match=f"{kind} is damaged"):
            load(path)
    assert not trace.exists()


def test_a_malicious_critic_or_optimizer_runs_nothing(tmp_path, trace):
    made = bombs(tmp_path / "bombs", trace)
    folder = fake_checkpoint(tmp_path, 1, format=OLD_FORMAT, files={SHARD: 5})
    flags = dict(value_learning_rate=1.0, huber_delta=1.0, value_clip=None, critic_epochs=1)
    critic = StateCritic(2, 1, 1, 3, torch.device("cpu"), 0, **flags)
    made["critic.pt"].rename(folder / "critic.pt")
    with pytest.raises(UserError, match=r"critic\.pt is damaged, or holds more than data"):
        load_critic(critic, folder)
    made["envs.pt"].rename(folder / SHARD)
    with ExitStack() as stack, pytest.raises(UserError, match=r"rank_00000\.safetensors is damaged"):
        open_pieces([folder / SHARD], stack)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_malicious_weights_run_nothing(tmp_path, trace, name):
    made, folder = bombs(tmp_path / "bombs", trace), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((ROOT / "checkpoints/openvla-tiny-warmup/config.json").read_text())
    made["critic.pt"].rename(folder / name)
    with pytest.raises((ValueError, OSError)):
        load_policy(str(folder))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_malicious_adapter_runs_nothing(tmp_path, trace, name):
    made, folder = bombs(tmp_path / "bombs", trace), tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made["critic.pt"].rename(folder / name)
    with pytest.raises((ValueError, OSError)):
        load_policy("openvla-tiny", lora_path=str(folder))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["trajectory.h5", "trajectory.json"])
def test_malicious_demonstrations_run_nothing(tmp_path, trace, name):
    made, folder = bombs(tmp_path / "bombs", trace), tmp_path / "demos"
    folder.mkdir()
    for other in ("trajectory.h5", "trajectory.json"):
        (folder / other).write_text("{}")
    made["plain.pt"].rename(folder / name)
    with pytest.raises(Exception):  # noqa: B017  what it says is tested where demonstrations are
        Demos(folder)
    assert not trace.exists()


def test_env_states_come_back_bit_for_bit(tmp_path):
    """New files, and those that were pickled before: what an env has of either."""
    random = np.random.default_rng(0)
    states = [
        {
            "counter": 3,
            "episode_id": 2**40,
            "explicit": False,
            "world": {"image_size": (96, 96), "asset_dir": None},
            "actions": random.standard_normal((5, 7)).astype(np.float32),
        },
        {"counter": 0, "episode_id": None, "explicit": True, "world": {}, "actions": np.asarray([], np.float32)},
    ]
    save_tree(states, tmp_path / "new.safetensors")
    torch.save(states, tmp_path / "old.pt")
    for found in (load_tree(tmp_path / "new.safetensors"), load_old_tree(tmp_path / "old.pt")):
        for ours, theirs in zip(found, states):
            actions = ours.pop("actions"), theirs["actions"]
            assert actions[0].dtype == np.float32 and actions[0].tobytes() == actions[1].tobytes()
            assert ours == {name: value for name, value in theirs.items() if name != "actions"}


def test_a_tree_keeps_types_and_values(tmp_path):
    tree = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, dtype=torch.float64)}, "rates": (0.1, [None])}
    save_tree(tree, tmp_path / "tree.safetensors")
    found = load_tree(tmp_path / "tree.safetensors")
    assert same(found, tree) and isinstance(found["rates"], tuple) and found[0]["exp_avg"].dtype == torch.float64
    with pytest.raises(TypeError, match="a PosixPath cannot be saved"):
        save_tree({"path": Path()}, tmp_path / "other.safetensors")


# ---------------------------------------------------------------------- which checkpoints count
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    older, newer = fake_checkpoint(tmp_path, 2), fake_checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / "iteration_000006.partial").mkdir()
    assert latest_checkpoint(tmp_path) == newer
    (newer / SHARD).write_bytes(b"123")
    assert latest_checkpoint(tmp_path) == older
    assert "has 3 bytes of 5" in capsys.readouterr().out
    (older / "state.json").write_text('{"format": 3, "fil')
    assert "state.json is not valid JSON" in damage(older)
    with pytest.raises(UserError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path)


def test_a_flipped_bit_is_found(tmp_path, capsys):
    older, newer = fake_checkpoint(tmp_path, 2), fake_checkpoint(tmp_path, 4)
    content = bytearray((newer / SHARD).read_bytes())
    content[3] ^= 1
    (newer / SHARD).write_bytes(content)
    assert damage(newer) is None and "checksum differs" in content_damage(newer)
    assert latest_checkpoint(tmp_path) == older
    assert f"{newer} is damaged ({SHARD} is not what was saved" in capsys.readouterr().out


def test_a_policy_with_a_flipped_bit_is_not_evaluated(tmp_path):
    folder = fake_checkpoint(tmp_path, 1)
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"12345")
    files = {SHARD: [5, 0], "policy/model.safetensors": [5, checksum(folder / SHARD)]}  # the other file is not read
    (folder / "state.json").write_text(json.dumps(json.loads((folder / "state.json").read_text()) | {"files": files}))
    check_policy_contents(folder / "policy")
    check_policy_contents(tmp_path)  # no checkpoint
    (folder / "policy" / "model.safetensors").write_bytes(b"12344")
    with pytest.raises(UserError, match=r"iteration_000001 is damaged \(policy/model.safetensors is not what was"):
        check_policy_contents(folder / "policy")


def test_the_ranks_share_the_reading_of_a_checkpoint(tmp_path):
    folder = fake_checkpoint(tmp_path, 1)
    files = {}
    for number in range(5):
        (folder / f"file_{number}").write_bytes(bytes(10 + number))
        files[f"file_{number}"] = [10 + number, checksum(folder / f"file_{number}")]
    (folder / "state.json").write_text(json.dumps(json.loads((folder / "state.json").read_text()) | {"files": files}))
    (folder / "file_3").write_bytes(b"1" * 13)
    assert [content_damage(folder, share, 2) is None for share in range(2)] == [True, False]


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "state.json is empty"),
        ("[]", "state.json holds [], but it must be an object"),
        ('{"files": {}}', "state.json has format 1"),
        ('{"format": "3"}', 'state.json has format "3", but it must be a whole number'),
        ('{"format": 3, "global_step": 0, "trained": {}, "files": {}}', "state.json has no iteration"),
        ('{"format": 3, "iteration": NaN}', "iteration NaN"),
        ('{"format": 3, "iteration": 1, "global_step": 0, "trained": [], "files": {}}', "trained []"),
        (
            '{"format": 3, "iteration": 1, "global_step": 0, "trained": {}, "files": {"gone": [1, 2]}}',
            "gone is missing",
        ),
        ('{"format": 3, "iteration": 1, "global_step": 0, "trained": {}, "files": {"a": [1]}}', "files.a [1]"),
        (
            '{"format": 3, "iteration": 1, "global_step": 0, "trained": {}, "files": {"../../a": [1, 2]}}',
            "the name of a file below the checkpoint",
        ),
        (
            '{"format": 3, "iteration": 1, "global_step": 0, "trained": {}, "files": {"/etc/passwd": [1, 2]}}',
            "the name of a file below the checkpoint",
        ),
    ],
)
def test_a_state_that_can_not_be(tmp_path, content, said):
    folder = fake_checkpoint(tmp_path, 1)
    (folder / "state.json").write_text(content)
    assert said in damage(folder)


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path):
    folder = fake_checkpoint(tmp_path, 1)
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    assert damage(folder) == f"{SHARD} is missing"
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    assert damage(folder) == "state.json is not a regular file"
    with pytest.raises(UserError, match="not a regular file"):
        load_tree(folder / SHARD)


def test_copies_that_a_user_keeps_are_left_alone(tmp_path):
    """Neither pruned nor taken as newest; sorted by number, not by name."""
    for iteration in (1, 2, 999_999, 1_000_000):
        fake_checkpoint(tmp_path, iteration)
    for name in ("iteration_000001_best", "iteration_best", "iteration_7", "iteration_000009.bak"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "iteration_000050").write_text("a file")
    found = complete_checkpoints(tmp_path)
    assert [path.name for path in found] == [f"iteration_{n}" for n in ("000001", "000002", "999999", "1000000")]
    prune(tmp_path, found[-1], keep=2)
    assert set(names(tmp_path)) == {
        "iteration_000001_best",
        "iteration_best",
        "iteration_7",
        "iteration_000009.bak",
        "iteration_000050",
        "iteration_999999",
        "iteration_1000000",
    }


def test_a_linked_checkpoint_counts_and_stays(tmp_path):
    moved = fake_checkpoint(tmp_path / "elsewhere", 1)
    newest = [fake_checkpoint(tmp_path, iteration) for iteration in (2, 3)][-1]
    link = tmp_path / "checkpoints" / "iteration_000001"
    link.symlink_to(moved)
    prune(tmp_path, newest, keep=1)
    assert names(tmp_path) == ["iteration_000001", "iteration_000003"] and moved.is_dir()
    newest.rename(tmp_path / "gone")
    assert latest_checkpoint(tmp_path) == link


def test_pruning_never_takes_the_last_whole_checkpoint(tmp_path):
    """A run that went on from checkpoint 2, since 8 and 9 are damaged, keeps what it writes."""
    folders = [fake_checkpoint(tmp_path, iteration) for iteration in (1, 2, 3, 8, 9)]
    for damaged in folders[2:]:
        (damaged / SHARD).write_bytes(b"")
    newest = fake_checkpoint(tmp_path, 4)
    prune(tmp_path, newest, keep=1)
    assert latest_checkpoint(tmp_path) == newest
    prune(tmp_path, fake_checkpoint(tmp_path, 5), keep=3)  # fewer whole ones than that
    assert "iteration_000004" in names(tmp_path)


def test_a_checkpoint_replaces_a_damaged_one_of_its_name_and_no_linked_folder(tmp_path):
    elsewhere = fake_checkpoint(tmp_path / "elsewhere", 4)
    final = tmp_path / "checkpoints" / "iteration_000004"
    final.parent.mkdir()
    final.symlink_to(elsewhere)
    for _ in range(2):  # first a link is there, then a folder
        partial = final.with_name(final.name + ".partial")
        partial.mkdir()
        (partial / "weights").write_bytes(b"new")
        put_in_place(partial, final, {"iteration": 4, "global_step": 1, "trained": {}}, {})
        assert damage(final) is None and content_damage(final) is None and names(tmp_path) == [final.name]
    assert damage(elsewhere) is None


# ---------------------------------------------------------------------- what may change when a run goes on
@pytest.mark.parametrize("script", [train_ppo, train_grpo, train_sft], ids=lambda module: module.__name__)
def test_every_flag_has_its_place(script):
    places = [set(OF_A_START), set(FIXED), set(MAY_CHANGE), set(MAY_GROW)]
    for field in dataclasses.fields(script.Args):
        assert [field.name in place for place in places].count(True) == 1, field.name


def test_no_place_names_what_is_no_flag():
    known = {field.name for script in (train_ppo, train_grpo, train_sft) for field in dataclasses.fields(script.Args)}
    assert {*OF_A_START, *FIXED, *MAY_CHANGE, *MAY_GROW} <= known


SAVED = {"learning_rate": 1e-4, "image_size": [96, 96], "lora_rank": 4, "max_prompt_length": 20, "run_dir": "a"}
SAVED |= {"lora_path": "runs/a", "value_clip": None, "model_path": "here/openvla", "unnorm_key": "bridge_orig"}
SAVED |= {"merge_lora": False}


@pytest.mark.parametrize("name", ["lora_rank", "unnorm_key", "image_size"])
def test_a_flag_that_makes_the_policy_is_not_replaced_by_a_default(tmp_path, name):
    fake_checkpoint(tmp_path, 1)
    (tmp_path / "args.json").write_text(json.dumps({key: value for key, value in SAVED.items() if key != name}))
    with pytest.raises(UserError, match=f"args.json has no {name}: copy the run folder again"):
        open_run(None, str(tmp_path), "", SAVED)


def test_changes_are_told():
    now = SAVED | {"learning_rate": 5e-5, "value_clip": 0.2, "max_prompt_length": 30, "run_dir": "b"}
    now |= {"model_path": "there/openvla", "image_size": (96, 96), "lora_path": "runs/../runs/a", "new_flag": 1}
    assert changed_flags(SAVED, now) == [
        "--learning_rate 0.0001 -> 5e-05",
        "--max_prompt_length 20 -> 30",
        "--value_clip none -> 0.2",
        "--model_path here/openvla -> there/openvla",
    ]


def test_an_adapter_may_lie_elsewhere_on_another_machine():
    now = SAVED | {"model_path": "/data/openvla", "lora_path": "/data/adapter"}
    assert [change.split()[0] for change in changed_flags(SAVED, now)] == ["--lora_path", "--model_path"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"lora_rank": 8}, "--lora_rank 4 -> 8 cannot resume, since other weights would be trained"),
        ({"unnorm_key": "fractal"}, "--unnorm_key bridge_orig -> fractal cannot resume, since its actions"),
        ({"image_size": (64, 96)}, "--image_size 96 96 -> 64 96 cannot resume, since its images"),
        ({"lora_path": None}, "--lora_path runs/a -> none cannot resume"),
        ({"merge_lora": True}, "--merge_lora False -> True cannot resume"),
        ({"max_prompt_length": 10}, "--max_prompt_length 20 -> 10 cannot resume, since its prompts may not fit"),
    ],
)
def test_what_would_be_another_run_is_refused(tmp_path, change, said):
    fake_checkpoint(tmp_path, 1)
    (tmp_path / "args.json").write_text(json.dumps(SAVED))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        open_run(None, str(tmp_path), "", SAVED | change)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "args.json is empty"),
        ('{"seed": 1', "args.json is not valid JSON"),
        ("[]", "it must be an object with keys"),
        ('{"image_size": [32, 32, "--settings", "evil:X-v1"]}', "a value, not a flag"),
        ('{"instruction": "--help"}', "a value, not a flag"),
        ('{"learning_rate": NaN}', "learning_rate NaN, but it must be a finite number"),
        ('{"seed": {"a": 1}}', "it must be a number, text"),
    ],
)
def test_args_that_can_not_be(tmp_path, content, said):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(said)) as failure:
        open_run(None, str(tmp_path), "", SAVED)
    assert str(tmp_path / "args.json") in str(failure.value) and "copy the run folder again" in str(failure.value)


# ---------------------------------------------------------------------- one writer
HOLD = """
import sys, time
from pathlib import Path
from schemas.lock import hold_folder
hold_folder(Path(sys.argv[1]), "it")
print("held", flush=True)
time.sleep(600)
"""


def holder_of(folder: Path) -> subprocess.Popen:
    """Another process that writes into a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.3)
    run_dir = tmp_path / "run"
    fake_checkpoint(run_dir, 1)
    (run_dir / "args.json").write_text("{}")
    first = holder_of(run_dir)
    try:
        who = f"process {first.pid} on {socket.gethostname()}, started at 20.*: wait for it, or name another folder"
        with pytest.raises(UserError, match=f"--resume .*{who}"):
            open_run(None, str(run_dir), "", {})
        with pytest.raises(UserError, match=f"--run_dir .*{who}"):
            open_run(str(run_dir), None, "", {})
        with pytest.raises(UserError, match=f"--run_dir .*{who}"):  # both began in the same second
            begin_run(run_dir, None)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert open_run(None, str(run_dir), "", {})[1] == run_dir / "checkpoints" / "iteration_000001"


def test_a_holder_that_is_ending_is_waited_for(tmp_path):
    first = holder_of(tmp_path)
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {first.pid}"])
    hold_folder(tmp_path, "--output x")
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    first.wait()


def test_children_do_not_keep_a_lock_alive(tmp_path):
    """A rank ends; a worker that it forked, and one that it started, go on."""
    program = HOLD.replace("time.sleep(600)", "").replace("import sys,", "import os, subprocess, sys,") + (
        "child = os.fork()\n"
        "if not child:\n"
        "    time.sleep(60); os._exit(0)\n"
        "print(child, subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "os._exit(0)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    children = [int(word) for word in first.stdout.readline().split()]
    first.wait()
    try:
        assert all(Path(f"/proc/{child}").exists() for child in children)
        hold_folder(tmp_path, "--run_dir x")  # raises where a child still holds it
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_was_only_locked_is_empty(tmp_path):
    (tmp_path / "lock").write_text("{}")
    assert open_run(str(tmp_path), None, "", {}) == (tmp_path, None)
    begin_run(tmp_path, None)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="exists already"):
        begin_run(tmp_path, None)


def test_where_locks_are_unknown_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def unknown(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    hold_folder(tmp_path, "--run_dir x")
    hold_folder(tmp_path, "--run_dir x")
    assert capsys.readouterr().out.count("without locks") == 1
