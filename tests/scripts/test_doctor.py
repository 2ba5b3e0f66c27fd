"""Every row of doctor.py: what it says of a machine that is well, and of one that is not."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from launching import python

import doctor

WARMUP = doctor.ROOT / "checkpoints" / "openvla-oft-tiny-warmup"
DRIVER = {"version": "535.183", "cuda": "12.2", "gpus": ["NVIDIA H100"] * 8}


@pytest.fixture
def torch_says(monkeypatch):
    """A machine whose torch and driver say what the test wants; by default this one's kind: CPUs alone."""

    def say(driver: dict | None = None, **facts) -> None:
        known = {"version": "2.13.0+cpu", "cuda": None, "gpus": [], "ops": "/nowhere", "why": None} | facts
        monkeypatch.setattr(doctor, "torch_facts", lambda: known)
        monkeypatch.setattr(doctor, "driver_facts", lambda: driver)

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return say


def test_python_and_packages(monkeypatch):
    assert doctor.check_python().state == "ok" == doctor.check_packages().state
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert doctor.check_python().state == "FIX"
    versions = {**doctor.pins(), "torch": "2.13.0+cu130", "peft": "0.1"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    row = doctor.check_packages()
    assert row.state == "FIX" and row.found == f"peft is 0.1 instead of {doctor.pins()['peft']}"
    assert "make setup" in row.remedy


def test_torch_without_a_gpu(torch_says):
    torch_says()
    row = doctor.check_torch()
    assert row.state == "ok" and "no GPU" in row.found and "CPU core" in row.found


def test_torch_with_gpus_names_them(torch_says):
    torch_says(DRIVER, version="2.13.0+cu126", cuda="12.2", gpus=[["NVIDIA H100", 80 * 2**30]] * 8)
    row = doctor.check_torch()
    assert row.state == "ok" and "8 x NVIDIA H100 (80 GiB)" in row.found and "driver 535.183" in row.found


def test_torch_for_cpus_beside_gpus(torch_says, monkeypatch):
    torch_says(DRIVER)
    row = doctor.check_torch()
    assert row.state == "FIX" and "built only for CPUs" in row.found
    assert "-m pip install --force-reinstall torch==2.13.0`" in row.remedy
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # somebody wants it so
    assert doctor.check_torch().state == "note"


def test_torch_newer_than_the_driver(torch_says, monkeypatch):
    torch_says(DRIVER, version="2.13.0+cu130", cuda="13.0")
    row = doctor.check_torch()
    assert row.state == "FIX" and "for CUDA 13.0 finds none" in row.found and "up to 12.2" in row.found
    assert "newer driver" in row.remedy and "whl/cu122" in row.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch_says(DRIVER | {"cuda": "13.0"}, version="2.13.0+cu130", cuda="13.0")
    assert "CUDA_VISIBLE_DEVICES is ''" in doctor.check_torch().remedy


def test_what_nvidia_smi_prints(monkeypatch):
    answers = {
        (): "| NVIDIA-SMI 535.183.01    Driver Version: 535.183.01   CUDA Version: 12.2     |",
        ("--query-gpu=name", "--format=csv,noheader"): "NVIDIA H100 80GB HBM3\nNVIDIA H100 80GB HBM3\n",
    }

    def run(command, **options):
        return SimpleNamespace(returncode=0, stdout=answers[tuple(command[1:])])

    monkeypatch.setattr(subprocess, "run", run)
    doctor.driver_facts.cache_clear()
    facts = doctor.driver_facts()
    doctor.driver_facts.cache_clear()
    assert facts == {"version": "535.183.01", "cuda": "12.2", "gpus": ["NVIDIA H100 80GB HBM3"] * 2}


def test_compiler(torch_says, monkeypatch):
    torch_says()
    assert doctor.check_compiler().state == "ok"
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    row = doctor.check_compiler()
    assert row.state == "FIX" and "g++, ninja" in row.found
    torch_says(gpus=[["NVIDIA H100", 80 * 2**30]])
    assert doctor.check_compiler().state == "note"


def test_ops_folder(torch_says, tmp_path, monkeypatch):
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    torch_says(ops=str(folder))
    row = doctor.check_ops()
    assert row.state == "note" and "not compiled" in row.found  # the launch does it
    (folder / "lock").touch()  # of a compiler that was killed
    row = doctor.check_ops()
    assert row.state == "note" and row.found.startswith(
        f"{folder / 'lock'} was removed, since no process held it, and "
    )
    assert not (folder / "lock").exists()
    (folder / "deepspeed_shm_comm.so").touch()
    assert doctor.check_ops().state == "ok"
    (folder / "lock").touch()
    monkeypatch.setattr("vla.start.extensions.file_system_of", lambda folder: "nfs")  # another machine may hold it
    row = doctor.check_ops()
    assert row.state == "FIX" and f"run `rm {folder / 'lock'}`" in row.remedy and (folder / "lock").exists()


def test_ops_folder_where_another_process_compiles(torch_says, tmp_path):
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    torch_says(ops=str(folder))
    with open(folder / "lock", "w"), subprocess_that("open(sys.argv[1])", folder / "lock") as other:
        row = doctor.check_ops()
        assert row.state == "FIX" and row.remedy == "wait for it" and (folder / "lock").exists()
        assert row.found.startswith(f"process {other.pid} (") and row.found.endswith(f"compiles in {folder}")


def test_nothing_is_launched_that_would_wait_for_a_lock(monkeypatch, capsys):
    checks = {"ops": lambda: doctor.fix("a lock", "rm it"), "launch": lambda: 1 / 0, "disk": lambda: doctor.ok("well")}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "note  launch      not tried: fix ops first",
        "ok    disk        well",
    ]


@contextlib.contextmanager
def subprocess_that(does: str, *words: object) -> Iterator[subprocess.Popen]:
    """A process that does something, `sys.argv` being the words, says so, and waits until the block is over."""
    program = f"import sys, time; kept = {does}; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


RANKS_OF_A_DOCTOR = """
import doctor, sys
doctor.ONE_RANK = "import os, sys, time; open(os.environ['PIDS'] + '/' + str(os.getpid()), 'w'); time.sleep(600)"
doctor.torch_facts = lambda: {"gpus": []}
doctor.check_launch()
"""


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_doctor_however_that_ends(tmp_path, ends):
    environment = os.environ | {"PIDS": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", RANKS_OF_A_DOCTOR]
    asked = warm.Popen(command, cwd=doctor.ROOT, env=environment, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.iterdir())) < 2:
        assert asked.poll() is None
        time.sleep(0.05)
    asked.send_signal(ends)
    assert asked.wait(timeout=600) != 0
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{rank.name}").exists() for rank in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--num_gpus 0", "--num_gpus 0 must be at least 1"),
        ("--gpu_memory nan", "--gpu_memory nan must be a finite number"),
        ("--gpu_memory -80", "--gpu_memory -80.0 must be above 0"),
        ("--host_memory 0", "--host_memory 0.0 must be above 0"),
    ],
)
def test_sizes_of_a_memory_plan_that_are_none(capsys, words, sentence):
    assert doctor.main(["--config", "yaml/maniskill_ppo_openvla.yaml", *words.split()]) == 2
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


def test_a_memory_plan_without_packages_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main(["--config", "yaml/maniskill_ppo_openvla.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [["--config", ""], ["--num_gpus", "4"], ["--host_memory", "64"]])
def test_words_that_ask_for_no_memory_plan(words):
    """An unset variable of a shell, and sizes without a config, are not taken for "examine the machine"."""
    run = python("doctor.py", *words)
    assert run.returncode == 2 and "--config" in run.stderr and not run.stdout


def test_ops_folder_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "ops"))
    doctor.torch_facts.cache_clear()
    row = doctor.check_ops()
    doctor.torch_facts.cache_clear()
    assert row.state == "FIX" and "Not a directory" in row.found and "export TORCH_EXTENSIONS_DIR=" in row.remedy


def test_renderer_that_aborts(monkeypatch):
    monkeypatch.setattr(doctor, "RENDER_ONE_FRAME", "import os; os.abort()")
    row = doctor.check_renderer()
    assert row.state == "FIX" and "SIGABRT" in row.found and "mesa-vulkan-drivers" in row.remedy
    monkeypatch.setattr(doctor, "RENDER_ONE_FRAME", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "RENDER_SECONDS", 1)
    assert "no frame within 1 s" in doctor.check_renderer().found


def test_renderer_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "torch_facts", lambda: {"gpus": [["H100", 0]]})
    monkeypatch.setattr(doctor, "RENDER_ONE_FRAME", "import sys")
    assert doctor.check_renderer() == doctor.ok("SAPIEN rendered a frame on the GPU")
    monkeypatch.setattr(doctor, "RENDER_ONE_FRAME", "import sys; assert sys.argv[1] == 'cpu'")
    row = doctor.check_renderer()
    assert row.state == "note" and "Vulkan" in row.remedy
    assert "renders only on the CPU, which is slow. On the GPU: SAPIEN finds no Vulkan device" in row.found


def test_physics_library(torch_says, monkeypatch, tmp_path):
    """It is loaded where there is a GPU. Nothing is downloaded, and nothing has to be fixed."""
    from envs.gpu.library import library_path

    monkeypatch.setenv("HOME", str(tmp_path))
    torch_says()
    assert doctor.check_physics() == doctor.ok("PhysX simulates on the CPU")
    torch_says(DRIVER, gpus=[["NVIDIA H100", 80 * 2**30]])
    row = doctor.check_physics()
    assert row.state == "note" and str(library_path().parent) in row.found and "doctor.py --download" in row.remedy
    assert not (tmp_path / ".sapien").exists()
    library_path().parent.mkdir(parents=True)
    library_path().write_bytes(b"\x7fELF")
    monkeypatch.setattr(doctor, "LOAD_PHYSX", "raise OSError('libcuda.so: cannot open shared object file')")
    row = doctor.check_physics()
    assert row.state == "note" and "cannot be loaded (OSError: libcuda.so: cannot open" in row.found
    monkeypatch.setattr(doctor, "LOAD_PHYSX", "pass")
    assert doctor.check_physics().state == "ok"


@pytest.mark.parametrize(
    "free, total, state, remedy",
    [(64, 64, "FIX", "--shm-size"), (100, 8000, "FIX", "delete"), (200, 200, "ok", ""), (8000, 8000, "ok", "")],
)
def test_shared_memory(monkeypatch, free, total, state, remedy):
    mib = SimpleNamespace(f_frsize=2**20, f_blocks=total, f_bavail=free)
    monkeypatch.setattr(os, "statvfs", lambda path: mib)
    row = doctor.check_shm()
    assert row.state == state and remedy in row.remedy


def test_no_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert doctor.check_shm().state == "FIX"


@pytest.mark.parametrize(
    "program, found",
    [
        ("raise OSError('no address')", r"rank \d of 2 failed: OSError: no address"),
        # the other one waits, as for a group that never becomes whole: it is the first failure that counts
        ("import os, time; os._exit(3) if os.environ['RANK'] == '1' else time.sleep(600)", "rank 1 of 2 failed: exit"),
        ("import time; time.sleep(600)", "2 ranks did not sum a number within 1 s"),
        ("print('sum 2 gloo')", "2 ranks did not sum"),  # each for itself
    ],
)
def test_launch_that_fails(torch_says, monkeypatch, program, found):
    torch_says()
    monkeypatch.setattr(doctor, "ONE_RANK", program)
    monkeypatch.setattr(doctor, "LAUNCH_SECONDS", 1 if "1 s" in found else 600)
    row = doctor.check_launch()
    assert row.state == "FIX" and re.match(found, row.found), row
    assert "GLOO_SOCKET_IFNAME" in row.remedy


def test_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    for free, state in ((0.5, "FIX"), (5, "note"), (50, "ok")):
        space = SimpleNamespace(free=free * 2**30)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, space=space: space)
        row = doctor.check_disk()
        assert row.state == state and str(tmp_path / "runs") in row.found
    (tmp_path / "runs").touch()  # a file, not a folder
    row = doctor.check_disk()
    assert row.state == "FIX" and "cannot be written" in row.found


def test_assets_are_optional(monkeypatch, tmp_path):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    row = doctor.check_assets()
    assert row.state == "note" and "builtin is made by code" in row.found and "doctor.py --download" in row.remedy


@pytest.fixture
def checkpoint(monkeypatch, tmp_path) -> Path:
    """A whole checkpoint in a root of its own."""
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    return Path(shutil.copytree(WARMUP, tmp_path / "checkpoints" / "policy"))


def test_checkpoints_that_are_whole(checkpoint):
    row = doctor.check_checkpoints()
    assert row.state == "ok" and "policy" in row.found


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [None, 1000])
def test_checkpoints_that_are_not(checkpoint, name, kept):
    file = checkpoint / name
    content = file.read_bytes()[:kept]
    file.unlink()
    if kept:
        file.write_bytes(content)
    row = doctor.check_checkpoints()
    assert row.state == "FIX" and str(checkpoint) in row.found and "git checkout -- checkpoints" in row.remedy


def test_no_checkpoint(checkpoint):
    shutil.rmtree(checkpoint)
    assert doctor.check_checkpoints().state == "FIX"


def test_a_check_that_breaks_is_a_row(monkeypatch, capsys):
    def broken():
        raise ImportError("no module named torch")

    monkeypatch.setattr(doctor, "CHECKS", {"assets": broken, "python": doctor.check_python})
    assert doctor.main([]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("FIX   assets") and "no module named torch" in first and "make setup" in first
    assert second.startswith("ok    python")


def test_notes_do_not_fail(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"assets": lambda: doctor.note("bridge is not here", "run x")})
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "note  assets      bridge is not here: run x\n"


def test_the_hub_row_says_where_models_come_from(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none/hub"))
    found = doctor.check_hub()
    assert found.state == "ok" and f"{constants.ENDPOINT}, logged in, cache {tmp_path}/none/hub with " in found.found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor.check_hub().state == "note" and "HF_HUB_OFFLINE is set" in doctor.check_hub().found
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert doctor.check_hub()[:1] == ("note",) and "which cannot be written" in doctor.check_hub().found
