"""Can this machine render, compile and train? One row per part: what is there, and what mends it. Exit code 0 if all is
well.

python doctor.py               every row
python doctor.py --renderer    only the renderer (what `make setup` asks)
python doctor.py --download    fetch the published meshes and photographs (asset_pack bridge) into ManiSkill's asset
                               folder or --asset_dir DIR; what was interrupted goes on where it stopped.
                               --mirror URL: from there, not from huggingface.co and github.com
python doctor.py --config FILE --num_gpus 8 --gpu_memory 80
                               what a run needs of a GPU's memory (GiB) and of its node's, stage by stage; whether it
                               fits, and which flag to turn first. Flags of the script may follow: --offload stage
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

RENDER_SECONDS = 120
RENDER_ONE_FRAME = """
import sapien
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sapien.Device("cpu"))])
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
MESA = "run `make setup` as root (Debian 12: apt-get install -t bookworm-backports mesa-vulkan-drivers libvulkan1)"


def check_python() -> tuple[bool, str]:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return False, f"Python {sys.version.split()[0]}: the pinned packages need 3.11 or 3.12; install one"
    return True, f"Python {sys.version.split()[0]}"


def check_packages() -> tuple[bool, str]:
    """Installed versions against the pins of requirements.txt; torch's local part (+cpu, +cu130) does not matter."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    wrong = []
    for name, pinned in (line.split("==") for line in lines if "==" in line):
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != pinned:
            wrong.append(f"{name} is {found}, pinned {pinned}")
    if wrong:
        return False, f"{'; '.join(wrong)}: run `make setup`"
    return True, "as pinned in requirements.txt"


def check_compiler() -> tuple[bool, str]:
    """Without CUDA, DeepSpeed compiles a communication op when it first starts: it needs g++, ninja and Python's
    headers."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [name for name in ("g++", "ninja") if shutil.which(name, path=path) is None]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h (python3-dev)")
    if missing:
        return False, f"DeepSpeed needs {', '.join(missing)} on a CPU: run `make setup` as root, or install them"
    return True, "g++, ninja and Python headers"


def check_renderer() -> tuple[bool, str]:
    """Render one frame in a subprocess with a time limit: a broken driver may raise, abort or hang."""
    command = [sys.executable, "-c", RENDER_ONE_FRAME]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=RENDER_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False, f"SAPIEN's renderer gave no frame within {RENDER_SECONDS} s: {MESA}"
    if run.returncode == 0:
        return True, "SAPIEN rendered a frame"
    last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    return False, f"SAPIEN finds no Vulkan device that it accepts ({last}): {MESA}"


CHECKS = {"python": check_python, "packages": check_packages, "compiler": check_compiler, "renderer": check_renderer}


def download(asset_dir: str | None, mirror: str | None) -> int:
    from envs.download import default_asset_dir, fetch_assets

    try:
        fetch_assets(asset_dir or default_asset_dir(), lambda line: print(line, flush=True), mirror=mirror)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def memory_plan(config: str, num_gpus: int, gpu_memory: float, more_flags: list[str]) -> int:
    from vla.cli import parse_args
    from vla.distributed import UserError
    from vla.engine import read_deepspeed_config, zero_stage
    from vla.memory_plan import Recipe, advice, make_plan, table

    script = "train_grpo" if "grpo" in Path(config).name else "train_ppo"  # whose defaults hold
    try:
        flags = vars(parse_args(importlib.import_module(script).Args, ["--config", config, *more_flags], ""))
        settings = read_deepspeed_config(flags["deepspeed_config"], flags["dtype"], flags["offload"])
        shared = {field.name: flags[field.name] for field in dataclasses.fields(Recipe) if field.name in flags}
        recipe = Recipe(
            **shared, critic=script == "train_ppo", zero_stage=zero_stage(settings),
            cpu_adam="offload_optimizer" in settings.get("zero_optimization", {}),
        )  # fmt: skip
        print("\n".join(table(make_plan(recipe, num_gpus), gpu_memory)))
        fits, sentence = advice(recipe, num_gpus, gpu_memory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{sentence}")
    return 0 if fits else 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__.strip(), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--renderer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--download", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--asset_dir", help=argparse.SUPPRESS)
    parser.add_argument("--mirror", help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    parser.add_argument("--num_gpus", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--gpu_memory", type=float, default=80.0, help=argparse.SUPPRESS)
    flags, more_flags = parser.parse_known_args(argv)
    if flags.config:
        return memory_plan(flags.config, flags.num_gpus, flags.gpu_memory, more_flags)
    if more_flags:
        parser.error(f"unknown: {' '.join(more_flags)}")
    if flags.download:
        return download(flags.asset_dir, flags.mirror)
    if flags.asset_dir or flags.mirror:
        parser.error("--asset_dir and --mirror belong to --download")
    failed = 0
    for name in ["renderer"] if flags.renderer else CHECKS:
        ok, sentence = CHECKS[name]()
        failed += not ok
        print(f"{'ok' if ok else 'MEND':4}  {name:9} {sentence}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
