"""Demonstrations by the scripted expert, in ManiSkill's trajectory format.

    # 1,000 demonstrations in a minute
    python collect_demos.py --config yaml/demos_tiny.yaml --output demos/tiny
    # demonstrations for full-size models
    python collect_demos.py --env_id PutOnPlateInScene25Main-v3 --num_demos 140 --output demos/main
    # every flag
    python collect_demos.py --help

Only successful episodes are kept. SIGTERM and Ctrl-C save what is done and end with exit code 75. The same command then
resumes, and a larger --num_demos adds to a finished folder. envs/demonstrations.py describes the files: HDF5, JSON and
action statistics. ManiSkill can replay them, and LeRobot reads them once they are in its format:
    python -m mani_skill.trajectory.replay_trajectory --traj_path demos/tiny/trajectory.h5
    python -m envs.lerobot demos/tiny demos/tiny_lerobot
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("collect_demos.py starts: loading packages takes about 10 s", file=sys.stderr, flush=True)

from envs import make_envs
from envs.demonstrations import PART_SIZE, DemoFolder, Demonstration, Recipe, attempts, check_expert_knows
from envs.registration import CONTROL_MODE
from schemas import UserError, flags
from vla.cli import parse_args
from vla.distributed import REQUEUE, run_main, user_errors
from vla.start.checks import check_scene_memory
from vla.start.launch import job_cores

ENVS_PER_WORKER = 8
CORES = job_cores()
HOPELESS = 64  # tries without a success before the script gives up


@dataclass
class Args:
    # ---- most used
    config: tuple[flags.Text, ...] = ()
    """Yaml files of flags. A later file wins over an earlier one, and the command line wins over all."""
    output: flags.Text = "demos"
    """Folder of the demonstrations. A folder with fewer of them is continued."""
    num_demos: flags.Count = 500
    """Number of successful episodes to keep."""
    seed: flags.Seed = 0
    """Seed of everything random. Two runs with one seed on one machine's CPUs are identical."""
    env_id: flags.EnvId = "PutOnPlateInScene25Main-v3"
    """Env: one of the 17 PutOnPlateInScene25 ids."""
    obj_set: Literal["train", "test", "all"] = "train"
    """Objects, tables and receptacles of the episodes: those of training, the unseen ones (test), or both (all)."""
    asset_pack: Literal["builtin", "bridge"] = "builtin"
    """Meshes and textures: made by code (builtin), or the published meshes and photographs (bridge)."""
    num_env_workers: flags.Processes = CORES
    """Worker processes that simulate the envs, one for each CPU core of the job. 0 simulates in the script's own
    process."""
    action_noise: flags.NonNegative = 0.0
    """Standard deviation per axis, in metres, of noise that is added to executed actions. The labels stay exact."""
    measured_pose: bool = False
    """Let the expert act on the measured pose of the arm instead of the commanded one. An image shows the measured
    pose, so use this for policies that see one frame."""

    # ---- expert
    filter_idle: bool = True
    """Leave steps that hardly move out of training, as in RL4VLA's warm-up data."""
    max_translation: flags.Positive = 0.025
    """Largest translation per step in metres. 0.025 stays within the statistics of bridge_orig."""
    max_rotation: flags.Positive = 0.2
    """Largest rotation per step in radians."""

    # ---- env
    asset_dir: flags.Text | None = None
    """Folder of the published assets, or the data set RLinf/maniskill_assets, which is fetched from the Hub. Without
    it, they are in ManiSkill's folder (`python doctor.py --download`)."""
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"
    """Rules of the scene: those of RL4VLA, or RLinf's version of them to compare with RLinf's published table."""
    hulls: Literal["gpu", "cpu"] = "gpu"
    """Convex hulls of the published meshes: those of PhysX's GPU simulation, as in published results, or of its CPU
    simulation. They decide how bodies roll and lie. The builtin pack has no meshes."""
    image_size: tuple[flags.Pixels, flags.Pixels] = (640, 480)
    """Width and height of the camera image in pixels. The camera's pose and field of view stay the same."""
    sim_freq: flags.Hertz = 500
    """Physics steps per second, a multiple of 5. Control runs at 5 Hz. Results at different rates do not compare."""
    max_episode_steps: flags.EpisodeSteps = 80
    """Time limit of an episode in actions."""


def main(args: Args) -> None:
    with user_errors():
        check_expert_knows(args.env_id)
        world = dict(
            obj_set=args.obj_set,
            asset_pack=args.asset_pack,
            protocol=args.protocol,
            hulls=args.hulls if args.asset_pack == "bridge" else None,
            sim_freq=args.sim_freq,
            image_size=args.image_size,
        )
        recipe = Recipe(
            args.env_id,
            max_episode_steps=args.max_episode_steps,
            seed=args.seed,
            action_noise=args.action_noise,
            filter_idle=args.filter_idle,
            max_translation=args.max_translation,
            max_rotation=args.max_rotation,
            measured_pose=args.measured_pose,
            **world | {"image_size": list(args.image_size)},
        )
        replay = dict(
            obs_mode="rgb+segmentation",
            control_mode=CONTROL_MODE,
            sim_backend="physx_cpu",
            render_backend="cpu",
            asset_dir=args.asset_dir,
        )
        folder = DemoFolder(Path(args.output), recipe, world | replay)
        if folder.count() >= args.num_demos:
            if not folder.is_finished():
                folder.finish()
            print(f"{folder.folder} already holds {folder.count()} demonstrations")
            return
        num_envs = min(ENVS_PER_WORKER * max(1, args.num_env_workers), args.num_demos - folder.count())
        num_workers = min(args.num_env_workers, num_envs)
        check_scene_memory(num_envs, num_workers, args.image_size, "--num_env_workers and --image_size")
        envs = make_envs(
            args.env_id,
            num_envs,
            seed=args.seed,
            asset_dir=args.asset_dir,
            max_episode_steps=args.max_episode_steps,
            num_env_workers=num_workers,
            **world,
        )
        count, tried = folder.begin()
    asked = EndRequest()
    pending, found = [], 0
    total = dict(total=args.num_demos, initial=count)
    with envs, tqdm(**total, desc="demonstrations", dynamic_ncols=True, disable=None) as bar:  # none without a terminal
        for number, demo in enumerate(attempts(envs, recipe, tried, asked), start=1):
            if demo.success:
                pending.append(demo)
                found += 1
                bar.set_postfix(success=f"{found / number:.2f}", refresh=False)
                bar.update()
            elif not found and number >= HOPELESS:
                raise UserError(
                    f"the expert failed in all of {number} tries in {args.env_id}: raise --max_episode_steps above "
                    f"{args.max_episode_steps}, or lower --action_noise, --max_translation or --max_rotation"
                )
            if pending and (len(pending) == PART_SIZE or count + found == args.num_demos):
                keep(folder, pending)
                if bar.disable:
                    rate = f"success {found / number:.2f}"
                    print(f"{count + found} of {args.num_demos} demonstrations, {rate}", flush=True)
            if count + found == args.num_demos:
                break
        keep(folder, pending)  # the rest, if the script was asked to end
    if count + found < args.num_demos:
        saved = f"{folder.folder} has {count + found} of {args.num_demos} demonstrations"
        print(f"{asked.signal}: {saved}. Run the same command to continue")
        raise SystemExit(REQUEUE)
    with user_errors():
        statistics = folder.finish()
    steps, size = statistics["num_transitions"], (folder.folder / "trajectory.h5").stat().st_size / 2**20
    print(f"{folder.folder}: {args.num_demos} demonstrations, {steps} steps for training, {size:.0f} MiB")


def keep(folder: DemoFolder, pending: list[Demonstration]) -> None:
    """Write these episodes to the disk and empty the list. Raises UserError if they cannot be written."""
    with user_errors():
        if pending:
            folder.write_part(pending)
    pending.clear()


class EndRequest:
    """True after SIGTERM, SIGUSR1 or Ctrl-C. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        return bool(self.signal)


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], __doc__))
