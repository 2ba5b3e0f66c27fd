"""Demonstrations by the scripted expert, in ManiSkill's trajectory format: HDF5, JSON, action statistics.

    python collect_demos.py --config yaml/demos_tiny.yaml --output demos/tiny          # 1,000 in a minute
    python collect_demos.py --env_id PutOnPlateInScene25Main-v3 --num_demos 140 --output demos/main
    python -m mani_skill.trajectory.replay_trajectory --traj_path demos/tiny/trajectory.h5

Successful episodes alone are kept. The same command again goes on where it was stopped (SIGTERM and Ctrl-C keep what is
done, exit code 75), and a larger --num_demos adds to a finished set. What stands in the files: envs/demonstrations.py.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from envs import make_envs
from envs.demonstrations import PART_SIZE, DemoFolder, Demonstration, Recipe, attempts, check_expert_knows
from envs.registration import CONTROL_MODE
from schemas import UserError
from schemas.flags import Count, EnvId, EpisodeSteps, Hertz, NonNegative, Pixels, Positive, Processes, Seed, Text
from vla.cli import parse_args
from vla.distributed import REQUEUE, run_main, user_errors
from vla.start.checks import check_scene_memory

ENVS_PER_WORKER = 8
HOPELESS = 64  # tries without one success


@dataclass
class Args:
    config: tuple[Text, ...] = ()  # yaml files of flags, the later wins; flags on the command line win over all
    output: Text = "demos"  # folder of the set
    num_demos: Count = 500  # successful episodes to keep
    seed: Seed = 0  # everything random is a function of it; two runs with one seed on one machine's CPUs are identical
    # metres, standard deviation per axis, added to what is executed and not to the labels
    action_noise: NonNegative = 0.0
    filter_idle: bool = True  # leave steps out of training that hardly move, as RL4VLA's warm-up data does
    max_translation: Positive = 0.025  # metres per step; within bridge_orig's statistics
    max_rotation: Positive = 0.2  # radians per step
    # the expert acts on where the arm is, which a picture shows, not on where it was sent: for policies of one frame
    measured_pose: bool = False
    env_id: EnvId = "PutOnPlateInScene25Main-v3"  # one of the 17 PutOnPlateInScene25 ids
    obj_set: Literal["train", "test", "all"] = "train"  # which objects, tables and receptacles episodes are drawn from
    asset_pack: Literal["builtin", "bridge"] = "builtin"  # bodies made by code, or the published meshes and photographs
    asset_dir: Text | None = None  # where the published assets are (`python doctor.py --download`)
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"  # whose scene, where the two differ
    image_size: tuple[Pixels, Pixels] = (640, 480)  # camera width and height; pose and field of view stay
    sim_freq: Hertz = 500  # physics steps per second, a multiple of 5; results at different rates do not compare
    max_episode_steps: EpisodeSteps = 80  # an episode is cut after this many actions
    num_env_workers: Processes = os.cpu_count() or 1  # processes that simulate; 0 = this one


def main(args: Args) -> None:
    with user_errors():
        check_expert_knows(args.env_id)
        world = dict(
            obj_set=args.obj_set,
            asset_pack=args.asset_pack,
            protocol=args.protocol,
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
            print(f"{folder.folder} holds {folder.count()} demonstrations already")
            return
        num_envs = ENVS_PER_WORKER * max(1, args.num_env_workers)
        check_scene_memory(num_envs, args.num_env_workers, args.image_size, "--num_env_workers and --image_size")
        envs = make_envs(
            args.env_id,
            num_envs,
            seed=args.seed,
            asset_dir=args.asset_dir,
            max_episode_steps=args.max_episode_steps,
            num_env_workers=args.num_env_workers,
            **world,
        )
        count, tried = folder.begin()
    asked = EndRequest()
    pending, found = [], 0
    with envs, tqdm(total=args.num_demos, initial=count, desc="demonstrations", dynamic_ncols=True) as bar:
        for number, demo in enumerate(attempts(envs, recipe, tried, asked), start=1):
            if demo.success:
                pending.append(demo)
                found += 1
                bar.set_postfix(success=f"{found / number:.2f}", refresh=False)
                bar.update()
            elif not found and number >= HOPELESS:
                raise UserError(
                    f"none of {number} tries succeeded in {args.env_id}: the expert needs --max_episode_steps above "
                    f"{args.max_episode_steps}, less --action_noise or smaller steps"
                )
            if pending and (len(pending) == PART_SIZE or count + found == args.num_demos):
                keep(folder, pending)
            if count + found == args.num_demos:
                break
        keep(folder, pending)  # of a collection that was asked to end
    if count + found < args.num_demos:
        print(f"{asked.signal}: {folder.folder} keeps {count + found} of {args.num_demos}; the same command goes on")
        raise SystemExit(REQUEUE)
    with user_errors():
        statistics = folder.finish()
    steps, size = statistics["num_transitions"], (folder.folder / "trajectory.h5").stat().st_size / 2**20
    print(f"{folder.folder}: {args.num_demos} demonstrations, {steps} steps to learn from, {size:.0f} MiB")


def keep(folder: DemoFolder, pending: list[Demonstration]) -> None:
    """Put these episodes on the disk and empty the list. Raises UserError where the disk does not take them."""
    with user_errors():
        if pending:
            folder.write_part(pending)
    pending.clear()


class EndRequest:
    """True from SIGTERM, SIGUSR1 or Ctrl-C on; a second Ctrl-C ends the process at once."""

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
    run_main(main, lambda: parse_args(Args, sys.argv[1:], description="\n\n".join(__doc__.split("\n\n")[:2])))
