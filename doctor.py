"""Check that this machine can render, compile, launch and train. Each row says what was found and how to fix it.

    ok      works
    note    works, but something optional is missing or slow
    FIX     does not work, and the exit code is then 1

    # every row. The first time, DeepSpeed compiles an operation for CPUs (a minute or two)
    python doctor.py
    # published meshes and photographs for --asset_pack bridge, and what SAPIEN lacks for a GPU. Nothing comes twice
    python doctor.py --download
    # memory that a run needs on 8 GPUs of 80 GiB in a node of 512 GiB, and the first flag to change if it does not fit
    python doctor.py --config yaml/maniskill_ppo_openvla.yaml --num_gpus 8 --gpu_memory 80 --host_memory 512

Flags of a script may follow the last one, such as --offload stage.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SHARED_MEMORY = Path("/dev/shm")
GIB, MIB = 2**30, 2**20
RENDER_SECONDS, LAUNCH_SECONDS, PROBE_SECONDS = 120, 600, 120  # the first launch compiles for a minute or two
END_SECONDS = 5
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CPU_RANK_BYTES = 66 * MIB  # DeepSpeed's all-reduce buffer of one CPU rank (0.19.8, ops/csrc/cpu/comm/shm.cpp)
LITTLE_DISK, ENOUGH_DISK = 1 * GIB, 20 * GIB
RENDER_ONE_FRAME = """
import sys
import sapien
device = sapien.Device(sys.argv[1])  # cpu or cuda:0
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(device)])
scene.set_ambient_light([0.5, 0.5, 0.5])
box = scene.create_actor_builder()
box.add_box_visual(half_size=[0.1, 0.1, 0.1])
box.build_kinematic()
camera = scene.add_camera("camera", 32, 32, 1.0, 0.01, 10)
camera.set_local_pose(sapien.Pose([-1, 0, 0]))
scene.update_render()
camera.take_picture()
center = camera.get_picture("Color")[16, 16, :3]
assert center.min() > 0.1, f"the frame is black: {center}"
"""
# _get_build_directory: folder of torch 2.13 for what DeepSpeed compiles. It makes the folder, or raises OSError
ASK_TORCH = """
import json, torch
from torch.utils.cpp_extension import _get_build_directory
from vla.start.extensions import keep_ops
keep_ops()
places = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
gpus = [torch.cuda.get_device_properties(place) for place in places]
try:
    ops, why = _get_build_directory("deepspeed_shm_comm", False), None
except OSError as error:
    ops, why = error.filename, error.strerror
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "gpus": [[g.name, g.total_memory] for g in gpus],
    "ops": ops, "why": why,
}))
"""
LOAD_PHYSX = "import sapien; sapien.physx.enable_gpu()"  # it downloads the library where that is missing
ONE_RANK = """
import torch
from vla.distributed import all_reduce_sum, rank, setup_distributed
setup_distributed(0)
print("sum", int(all_reduce_sum(torch.tensor(rank() + 1.0))), torch.distributed.get_backend(), flush=True)
torch.distributed.destroy_process_group()
"""
SETUP = "run `make setup`"
VULKAN = "install NVIDIA's Vulkan driver (libnvidia-gl; in a container NVIDIA_DRIVER_CAPABILITIES=all)"
MESA = "run `make setup` as root (Debian 12: apt-get install -t bookworm-backports mesa-vulkan-drivers libvulkan1)"


class Finding(NamedTuple):
    """One row: the state (ok, note or FIX), what was found, and what you can do."""

    state: str
    found: str
    remedy: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def note(found: str, remedy: str) -> Finding:
    return Finding("note", found, remedy)


def fix(found: str, remedy: str) -> Finding:
    return Finding("FIX", found, remedy)


# ---------------------------------------------------------------------- what is installed
def check_version() -> Finding:
    """SoloVLA's version. The file is read as text, since an import of vla needs torch."""
    found = re.search(r'^VERSION = "(.+?)"', (ROOT / "vla" / "__init__.py").read_text(), re.M)
    return ok(f"SoloVLA {found[1]}")


def check_python() -> Finding:
    version = sys.version.split()[0]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return fix(f"Python {version}, but the pinned packages need 3.11 or 3.12", "install one, then run `make setup`")
    return ok(f"Python {version}")


def check_packages() -> Finding:
    """Compare installed versions with requirements.txt. The local part of torch's version (+cpu, +cu130) is ignored."""
    wrong = []
    for name, pinned in pins().items():
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != pinned:
            wrong.append(f"{name} is {found} instead of {pinned}")
    return fix(", ".join(wrong), SETUP) if wrong else ok("as pinned in requirements.txt")


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def end_with_doctor() -> Callable[[], None]:
    """A function for a child process, after which Linux sends the child SIGTERM when this process ends in any way."""
    prctl, doctor = ctypes.CDLL(None).prctl, os.getpid()

    def call() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != doctor:  # this process has already ended
            os._exit(1)

    return call


def ask(command: list[str], seconds: float) -> subprocess.CompletedProcess:
    """Run a command that may abort or hang on a broken machine. It ends with this process. Raises TimeoutExpired."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        preexec_fn=end_with_doctor(),
    )


@functools.cache
def torch_facts() -> dict:
    """Facts about torch and its GPUs, from a separate process, since a broken driver may abort or hang."""
    run = ask([sys.executable, "-c", ASK_TORCH], PROBE_SECONDS)
    if run.returncode:
        raise RuntimeError(f"torch does not start: {last_line(run.stderr, run.returncode)}")
    return json.loads(run.stdout.splitlines()[-1])


@functools.cache
def driver_facts() -> dict | None:
    """Version of NVIDIA's driver, the newest CUDA that it runs, and names of the GPUs. None without a GPU."""
    try:
        run, listed = (
            ask(["nvidia-smi", *flags], PROBE_SECONDS) for flags in ([], ["--query-gpu=name", "--format=csv,noheader"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run.returncode or listed.returncode or not listed.stdout.strip():
        return None
    version, cuda = (re.search(rf"{what} Version:\s*([\d.]+)", run.stdout) for what in ("Driver", "CUDA"))
    return {
        "version": version[1] if version else "?",
        "cuda": cuda[1] if cuda else "?",
        "gpus": listed.stdout.strip().splitlines(),
    }


def check_torch() -> Finding:
    facts, driver = torch_facts(), driver_facts()
    version, cores = f"torch {facts['version']}", len(os.sched_getaffinity(0))
    if facts["gpus"]:
        kinds = Counter(f"{name} ({memory / GIB:.0f} GiB)" for name, memory in facts["gpus"])
        gpus = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        runs = f"driver {driver['version']} runs CUDA up to {driver['cuda']}" if driver else "nvidia-smi is missing"
        return ok(f"{version} for CUDA {facts['cuda']}, {runs}: {gpus}")
    if driver is None:
        return ok(f"{version}, no GPU, {cores} CPU cores")
    there = f"nvidia-smi shows {len(driver['gpus'])} x {driver['gpus'][0]}"
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return note(
            f"{version}, {cores} CPU cores; {there}", "not used because DS_ACCELERATOR is cpu: unset it to use them"
        )
    pinned = version.split("+")[0].replace(" ", "==")
    if facts["cuda"] is None:
        command = f"{sys.executable} -m pip install --force-reinstall {pinned}"
        return fix(f"{there}, but {version} is built only for CPUs", f"run `{command}` (PyPI's build has CUDA)")
    found = (
        f"{there}, but {version} for CUDA {facts['cuda']} finds none, and driver {driver['version']} runs CUDA up to "
    )
    older = driver["cuda"] != "?" and float(driver["cuda"]) < float(facts["cuda"])
    index = f"https://download.pytorch.org/whl/cu{driver['cuda'].replace('.', '')}"
    remedy = f"install a newer driver, or run `pip install {pinned} --index-url {index}` if there is such a build"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return fix(found + driver["cuda"], remedy if older else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or restart")


def check_compiler() -> Finding:
    """Check for g++, ninja and Python's headers: without CUDA, DeepSpeed compiles an operation at its first start."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [name for name in ("g++", "ninja") if shutil.which(name, path=path) is None]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h (python3-dev)")
    if missing and torch_facts()["gpus"]:
        return note(f"{', '.join(missing)} missing", "only CPU ranks need it: run `make setup` as root to install it")
    if missing:
        return fix(f"DeepSpeed needs {', '.join(missing)} on a CPU", "run `make setup` as root, or install them")
    return ok("g++, ninja and Python headers")


def check_ops() -> Finding:
    """Check the folder of DeepSpeed's compiled operations: writable, not locked, already compiled or not.

    A lock that no process holds is removed, as the scripts do.
    """
    facts = torch_facts()
    if facts["why"] or not os.access(facts["ops"], os.W_OK | os.X_OK):
        why = facts["why"] or "not writable for you"
        remedy = "run `export TORCH_EXTENSIONS_DIR=$HOME/torch_extensions`, or name another folder of yours"
        return fix(f"DeepSpeed cannot keep compiled ops in {facts['ops']} ({why})", remedy)
    from vla.start.extensions import Lock  # imports torch, which has just started without an error

    folder = Path(facts["ops"])
    lock = Lock(folder / "lock")
    found = lock.look()
    lock.leave()
    if found not in (True, False):
        remedy = "wait for it" if found.certain else f"run `rm {lock.path}` if nobody compiles there"
        return fix(f"{found.words} compiles in {folder}", remedy)
    removed = f"{lock.path} was removed, since no process held it, and " if found else ""
    if facts["gpus"]:
        return ok(f"{removed}{folder.parent} can be written, and GPUs need no compiled op")
    if not (folder / f"{folder.name}.so").exists():
        remedy = "the launch below compiles it, in a minute or two"
        return note(f"{removed}the op for CPU ranks is not compiled in {folder}", remedy)
    return ok(f"{removed}the op for CPU ranks is compiled in {folder}")


# ---------------------------------------------------------------------- what works
def check_renderer() -> Finding:
    """Render one frame on the GPU, or on the CPU if there is none, like `--render_backend auto`."""
    has_gpu, wrong_on_gpu = bool(torch_facts()["gpus"]), None
    if has_gpu:
        wrong_on_gpu = render_one_frame("cuda:0")
        if wrong_on_gpu is None:
            return ok("SAPIEN rendered a frame on the GPU")
    if wrong := render_one_frame("cpu"):
        return fix(wrong, MESA)
    if has_gpu:
        return note(f"SAPIEN renders only on the CPU, which is slow. On the GPU: {wrong_on_gpu}", VULKAN)
    return ok("SAPIEN rendered a frame")


def check_physics() -> Finding:
    """Load PhysX's library for GPUs, which only `--sim_backend physx_cuda` needs."""
    from envs.gpu.library import library_path, library_url

    if not torch_facts()["gpus"]:
        return ok("PhysX simulates on the CPU")
    use, path = "only --sim_backend physx_cuda needs it, which is experimental", library_path()
    if not path.exists():
        remedy = f"run `python doctor.py --download`, or unzip {library_url()} there: {use}"
        return note(f"PhysX simulates on the CPU, its library for GPUs is not in {path.parent}", remedy)
    run = ask([sys.executable, "-c", LOAD_PHYSX], PROBE_SECONDS)
    if run.returncode:
        why = last_line(run.stderr, run.returncode)
        return note(f"PhysX simulates on the CPU, {path} cannot be loaded ({why})", f"delete and fetch it again: {use}")
    return ok(f"PhysX simulates on the CPU, and its library for GPUs is in {path.parent}")


def render_one_frame(device: str) -> str | None:
    """Render in a subprocess with a time limit, since a broken driver may abort or hang. None, or the error."""
    command = [sys.executable, "-c", RENDER_ONE_FRAME, device]
    try:
        run = ask(command, RENDER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"SAPIEN's renderer gave no frame within {RENDER_SECONDS} s"
    if run.returncode == 0:
        return None
    return f"SAPIEN finds no Vulkan device that it accepts ({last_line(run.stderr, run.returncode)})"


def last_line(output: str, returncode: int) -> str:
    """The last line of a process, or how it ended."""
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    return (output.strip().splitlines() or [f"exit code {returncode}"])[-1]


def check_launch() -> Finding:
    """Start two ranks (at most one per GPU) that join a group and sum a number."""
    gpus = len(torch_facts()["gpus"])
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if gpus else "cpu")
    num_ranks = 2 if accelerator == "cpu" else min(2, gpus)
    began = time.monotonic()
    ranks = run_ranks(ONE_RANK, num_ranks, accelerator, LAUNCH_SECONDS)
    answers = [re.search(r"^sum (\d+) (\w+)$", output, re.M) for _, output in ranks]
    for number, (returncode, output) in enumerate(ranks):
        if returncode:
            found = f"rank {number} of {num_ranks} failed: {last_line(output, returncode)}"
            remedy = "fix the rows above first, then unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if they are set"
            return fix(found, remedy)
    if not all(answer and int(answer[1]) == sum(range(num_ranks + 1)) for answer in answers):
        found = f"{num_ranks} ranks did not sum a number within {LAUNCH_SECONDS} s"
        return fix(found, "unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if they are set, and try again")
    seconds = time.monotonic() - began
    return ok(f"{num_ranks} rank{'s' * (num_ranks > 1)} on {answers[0][2]} summed a number in {seconds:.0f} s")


def run_ranks(program: str, num_ranks: int, accelerator: str, seconds: float) -> list[tuple[int | None, str]]:
    """Exit code and output of every rank. The first failure ends the others, whose code is then None."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    # LOCAL_SIZE as DeepSpeed's launcher sets it: without it, DeepSpeed uses no shared memory
    group = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": port, "DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(num_ranks)]
        processes = []
        for number, output in enumerate(outputs):
            environment = {**os.environ, **group, "RANK": str(number), "LOCAL_RANK": str(number)}
            command = [sys.executable, "-c", program]
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=end_with_doctor(),
                )
            )
        try:
            returncodes = wait_for_all(processes, seconds)
        finally:
            end_all(processes)
            for left in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                left.unlink(missing_ok=True)
        for output in outputs:
            output.seek(0)
        return [(returncode, output.read()) for returncode, output in zip(returncodes, outputs)]


def end_all(processes: list[subprocess.Popen]) -> None:
    """Send SIGTERM, so that a rank also ends its compiler, and SIGKILL after END_SECONDS."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_all(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """Exit codes, when all have ended, time is up, or one has failed and the others had a second to report."""
    deadline = time.monotonic() + seconds
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + 1.0)
        time.sleep(0.1)
    return codes


# ---------------------------------------------------------------------- room and files
def check_shm() -> Finding:
    """Check shared memory, which holds the all-reduce buffer of every CPU rank, and NCCL's if GPUs have no direct link.

    Ranks may start without enough room, and the launch row is then ok. But DeepSpeed 0.19.8's own all-reduce ends in
    SIGSEGV with 64 MB, as does a rank for which nothing is left.
    """
    try:
        place = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return fix(
            f"{SHARED_MEMORY}: {error.strerror}", "run the container with `--shm-size=2g`, or mount a tmpfs there"
        )
    total, free = place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize
    size = f"{free / MIB:.0f} of {total / MIB:.0f} MiB free in {SHARED_MEMORY}"
    if free < 2 * CPU_RANK_BYTES <= total:
        return fix(
            f"{size}, a CPU rank takes {CPU_RANK_BYTES // MIB}", f"delete files of dead runs: `ls -l {SHARED_MEMORY}`"
        )
    if free < 2 * CPU_RANK_BYTES:
        remedy = "run the container with `--shm-size=2g`, or as root `mount -o remount,size=2g /dev/shm`"
        return fix(f"{size}, two CPU ranks take {2 * CPU_RANK_BYTES // MIB} (Docker's default is 64)", remedy)
    return ok(f"{size}, room for {free // CPU_RANK_BYTES} CPU ranks" if free < GIB else size)


def check_disk() -> Finding:
    """Check the default place of run folders, and mention the size of a checkpoint if it may not fit."""
    runs = ROOT / "runs"
    place = runs if runs.exists() else ROOT
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return fix(f"{runs} cannot be written", f"run `chmod u+rwx {place}`, or give scripts --run_dir elsewhere")
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free for {runs}"
    if free < LITTLE_DISK:
        return fix(found, "make room, or give scripts --run_dir on another disk")
    if free < ENOUGH_DISK:
        return note(found, "enough for the tiny models. A checkpoint takes 14 bytes per trained parameter")
    return ok(found)


def check_assets() -> Finding:
    """Look for the published assets, which are optional: the builtin pack is made by code."""
    from envs.assets.bridge import Layout

    layout = Layout(None)
    missing = layout.missing()
    if not missing:
        return ok(f"builtin is made by code, bridge is in {layout.carrot.parent}")
    found = f"builtin is made by code, bridge lacks {len(missing)} files ({missing[0]}, ...)"
    others = " and ".join(f"`{command}`" for command in layout.commands(missing))
    remedy = f"for --asset_pack bridge run `python doctor.py --download`, or {others}"
    return note(found, f"{remedy}, or give --asset_dir RLinf/maniskill_assets")


def check_hub() -> Finding:
    """Say which Hub models come from, and check that their cache can be written. Nothing is sent."""
    from huggingface_hub import constants, get_token, is_offline_mode

    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    login = "logged in" if get_token() else "not logged in"
    found = f"{constants.ENDPOINT}, {login}, cache {cache} with {shutil.disk_usage(place).free / GIB:.0f} GiB free"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return note(f"{found}, which cannot be written", "set HF_HOME to a folder of yours before you name a model")
    if is_offline_mode():
        return note(f"{found}, HF_HUB_OFFLINE is set", "only models in the cache can be used: unset it for others")
    return ok(found)


def check_checkpoints() -> Finding:
    """Check that every folder in checkpoints/ has a config and opens. Cut-off files have the wrong size."""
    from vla.files.tensors import open_shard
    from vla.models.published import shard_paths

    place = ROOT / "checkpoints"
    folders = sorted(path for path in place.glob("*") if path.is_dir()) if place.is_dir() else []
    if not folders:
        return fix(f"{place} is empty, but `make train` needs a policy in it", "run `git checkout -- checkpoints`")
    for folder in folders:
        adapter = (folder / "adapter_config.json").exists()
        try:
            paths = [folder / "adapter_model.safetensors"] if adapter else shard_paths(folder)
            for path in (folder / ("adapter_config.json" if adapter else "config.json"), *paths):
                if path.suffix == ".json":
                    json.loads(path.read_text())
                else:
                    with open_shard(path) as shard:
                        shard.keys()
        except (OSError, ValueError) as error:  # invalid JSON is a ValueError
            again = "run `git checkout -- checkpoints` for the tiny ones, and delete others or download them again"
            return fix(f"{folder}: {error}", again)
    return ok(f"{len(folders)} in {place}: {', '.join(folder.name for folder in folders)}")


CHECKS = {
    "version": check_version,
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "compiler": check_compiler,
    "ops": check_ops,
    "renderer": check_renderer,
    "physics": check_physics,
    "shm": check_shm,
    "launch": check_launch,
    "disk": check_disk,
    "assets": check_assets,
    "hub": check_hub,
    "checkpoints": check_checkpoints,
}


NEEDS = {"launch": ("ops",)}  # rows that are skipped while one of these fails, since they would wait for it


def examine(name: str) -> Finding:
    """The row of a check. A check that raises, such as for a missing package, gives a row too."""
    try:
        return CHECKS[name]()
    except Exception as error:
        return fix(f"the check failed ({type(error).__name__}: {error})", SETUP)


def download(asset_dir: str | None, mirror: str | None) -> int:
    """Fetch the published assets and, where there is a GPU, PhysX's library for it. Returns the exit code."""
    from envs.assets.download import default_asset_dir, fetch_assets
    from envs.gpu.library import fetch_library
    from schemas import UserError

    def say(line: str) -> None:
        print(line, flush=True)

    parts = [lambda: fetch_assets(asset_dir or default_asset_dir(), say, mirror=mirror)]
    if driver_facts() is not None:
        parts.append(lambda: say(f"PhysX's library for GPUs: {fetch_library(mirror)}"))
    failures = []
    for part in parts:
        try:
            part()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (RuntimeError, OSError) as error:
            failures.append(error)
    for error in failures:
        print(f"error: {error}", file=sys.stderr)
    return 1 if failures else 0


def memory_plan(
    configs: list[str], num_gpus: int, gpu_memory: float, host_memory: float | None, more_flags: list[str]
) -> int:
    """Print the memory that a run needs, and whether it fits. The exit code is 0 if both memories are large enough.

    Args:
        gpu_memory: of one GPU, in GiB. host_memory: of one node, in GiB. None means that of this machine.
    """
    from schemas import UserError, check_flags
    from schemas.flags import Count, Positive
    from vla.cli import parse_args
    from vla.placement.memory import placed_table
    from vla.placement.rules import parse_placement
    from vla.start import checks
    from vla.training.memory_plan import (
        ASSUMED_RANK_OF_LORA,
        adapter_is_elsewhere,
        advice,
        host_advice,
        make_plan,
        recipe_of,
        table,
    )

    script = "train_grpo" if "grpo" in Path(configs[0]).name else "train_ppo"  # the script whose defaults apply
    own = round(checks.host_memory() / GIB, 1)
    fields = [("num_gpus", Count), ("gpu_memory", Positive), ("host_memory", Positive)]
    try:
        of_node = own if host_memory is None else host_memory
        check_flags(dataclasses.make_dataclass("Ranges", fields)(num_gpus, gpu_memory, of_node))
        words = ["--config", *configs, *more_flags]
        flags = vars(parse_args(importlib.import_module(script).Args, words, "", offline=True))
        recipe = recipe_of(flags)
        placement = parse_placement(flags["placement"], num_gpus)
        if not placement.together:
            fits, lines = placed_table(recipe, placement, gpu_memory, of_node)
            print("\n".join(lines))
            return 0 if fits else 1
        print("\n".join(table(make_plan(recipe, num_gpus), gpu_memory, of_node)))
        verdicts = (advice(recipe, num_gpus, gpu_memory), host_advice(recipe, num_gpus, gpu_memory, of_node))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("", *(sentence for _, sentence in verdicts), sep="\n")
    if adapter_is_elsewhere(recipe):
        print(f"{recipe.lora_path} is not on this machine: its rank is taken for {ASSUMED_RANK_OF_LORA}")
    if host_memory is None:
        print(f"this machine has {own:g} GiB of host memory: give --host_memory for another one")
    return 0 if all(fits for fits, _ in verdicts) else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--help] [--flag value ...]",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("-h", "--help", action="help", help="Show this text and exit.")
    rows.add_argument("--renderer", action="store_true", help="Check only the renderer, as `make setup` does.")
    assets = parser.add_argument_group("assets")
    assets.add_argument("--download", action="store_true", help="Download what --asset_pack bridge and a GPU need.")
    assets.add_argument("--asset_dir", metavar="DIR", help="Folder for them. Without it, ManiSkill's folder is used.")
    assets.add_argument("--mirror", metavar="URL", help="Server that replaces huggingface.co and github.com.")
    memory = parser.add_argument_group("memory of a run")
    memory.add_argument("--config", action="append", metavar="FILE", help="Yaml file of flags. It may be repeated.")
    memory.add_argument("--num_gpus", type=int, metavar="INT", help="Number of GPUs, one rank each. (default: 8)")
    memory.add_argument("--gpu_memory", type=float, metavar="FLOAT", help="Memory per GPU in GiB. (default: 80)")
    memory.add_argument(
        "--host_memory", type=float, metavar="FLOAT", help="Memory per node in GiB, by default that of this machine."
    )
    return parser


def print_rows(names: Iterable[str]) -> bool:
    """Run these checks and print their rows. True if nothing has to be fixed."""
    states: dict[str, str] = {}
    for name in names:
        first = next((needed for needed in NEEDS.get(name, ()) if states.get(needed) == "FIX"), None)
        state, found, remedy = note("not tried", f"fix {first} first") if first else examine(name)
        states[name] = state
        print(f"{state:4}  {name:11} {found}{': ' * bool(remedy)}{remedy}", flush=True)
    return "FIX" not in states.values()


def main(argv: list[str]) -> int:
    parser = make_parser()
    flags, more_flags = parser.parse_known_args(argv)
    if flags.config is not None:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            print(f"error: a memory plan needs this clone's packages ({error}): {SETUP}", file=sys.stderr)
            return 2
        num_gpus = 8 if flags.num_gpus is None else flags.num_gpus
        gpu_memory = 80.0 if flags.gpu_memory is None else flags.gpu_memory
        return memory_plan(flags.config, num_gpus, gpu_memory, flags.host_memory, more_flags)
    if (flags.num_gpus, flags.gpu_memory, flags.host_memory) != (None, None, None):
        parser.error("--num_gpus, --gpu_memory and --host_memory need --config: give a yaml file of flags")
    if more_flags:
        parser.error(f"unknown: {' '.join(more_flags)}")
    if flags.download:
        return download(flags.asset_dir, flags.mirror)
    if flags.asset_dir or flags.mirror:
        parser.error("--asset_dir and --mirror need --download")
    return 0 if print_rows(["renderer"] if flags.renderer else CHECKS) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
