"""What only a GPU can show of the simulated world: eight questions, each answered in minutes by a process of its own.

    python benchmarks/gpu_check.py --only world         # all of them on a GPU, with limits of 12 minutes in total
    python benchmarks/gpu_world.py world_reset          # one of them
    python benchmarks/gpu_world.py world_reset --settings '{"stand_in": true}'  # one row on the CPU, for tests

    world_draw     processes that draw on one GPU at the same time: images per second, memory of each
    world_start    a start state in the batch against the settled one, and its image against the CPU's
    world_rest     objects that lie still for 2 s: how far they move, after settlers with each kind of hulls
    world_move     PositionChangeTo-v1: is the object on the table one step after it was moved
    world_expert   success and grasps of the scripted expert, in the batch and in the ordinary envs
    world_reset    a reset of one row: what it changes in the other rows
    world_times_N  ms of a batch of N rows: substep, command, judging, image, copy to the host
    world_close    memory of the GPU with one batch, with two, and after both were closed

The GPU simulation (`envs/gpu/simulation.py`) is experimental. Its parts need PhysX's library for GPUs, which `python
doctor.py --download` fetches. world_rest_bridge also needs the published meshes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAME = "PutOnPlateInScene25"
MAIN, MOVES = f"{NAME}Main-v3", f"{NAME}PositionChangeTo-v1"
DRAWING = (1, 4, 8, 16)  # processes
SIZES = (16, 64, 128, 512)  # rows
Line = tuple[str, str, float, str]  # what, setting, value, unit
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large everything is. `stand_in` is one small row on the CPU: the same code, without a GPU."""

    stand_in: bool = False
    image_size: tuple[int, int] = (640, 480)
    sim_freq: int = 500
    seconds: float = 4.0  # of drawing
    repeats: int = 20  # of what is timed
    asset_dir: str | None = None  # of the published meshes. None searches ManiSkill's folder

    @classmethod
    def read(cls, text: str) -> Settings:
        given = json.loads(text)
        small = dict(image_size=(64, 48), sim_freq=100, seconds=0.2, repeats=2) if given.get("stand_in") else {}
        return cls(**small | given)

    def rows(self, wanted: int) -> int:
        return 1 if self.stand_in else wanted

    @property
    def backends(self) -> tuple[str, str] | None:
        return ("physx_cpu", "cpu") if self.stand_in else None

    @property
    def title(self) -> str:
        width, height = self.image_size
        return f"{width} x {height}, {self.sim_freq} Hz{', stand-in on the CPU' * self.stand_in}"


# ---------------------------------------------------------------------- batches and ordinary envs
def open_rows(settings: Settings, count: int, env_id: str = MAIN, asset_pack: str = "builtin"):
    """An EnvGroup over a batch of `count` rows, which rest until they are reset."""
    from envs.gpu.world import open_batch
    from envs.group import EnvGroup
    from envs.spec import EnvSpec

    spec = EnvSpec(
        env_id=env_id,
        num_envs=count,
        obj_set="test" if env_id == MOVES else "train",
        asset_pack=asset_pack,
        asset_dir=settings.asset_dir,
        image_size=settings.image_size,
        sim_freq=settings.sim_freq,
        max_episode_steps=80,
        auto_reset=False,
        ignore_terminations=False,
        protocol="rl4vla",
        seed=0,
        first_env=0,
        sim_backend="physx_cpu" if settings.stand_in else "physx_cuda",
        hulls="gpu" if asset_pack == "bridge" else None,
    )
    world = open_batch(spec, count, min(4, count), settings.backends)
    images = torch.zeros(2, count, *spec.image_shape, dtype=torch.uint8, device=world.device)
    return EnvGroup(spec, 0, world, images)


def ordinary_envs(settings: Settings, count: int):
    """The same envs in worker processes, drawn by the CPU."""
    from envs import make_envs

    workers = min(count, len(os.sched_getaffinity(0)), 16)
    world = dict(image_size=settings.image_size, sim_freq=settings.sim_freq)
    return make_envs(MAIN, count, num_env_workers=workers, render_backend="cpu", **world)


def begin(group, ids: list[int | None]) -> None:
    group.reset(ids, list(range(len(ids))))


def training_ids(count: int) -> list[int]:
    from envs import num_start_states, variants

    total = num_start_states(MAIN, "train")
    return [variants.train_episode_id(total, 0, i, 0) for i in range(count)]


def hold_still(group, steps: int) -> None:
    for _ in range(steps):
        group.step(np.zeros((len(group.images), 1, 7), np.float32))


def chosen_states(group) -> torch.Tensor:
    """States of each row's object and receptacle, float32 [N, 2, 13] on the CPU."""
    return group.world.simulation._chosen_states().cpu().clone()


def degrees_between(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Angles between orientations [N, 4] (wxyz), in degrees [N]."""
    cosine = (one * other).sum(-1).abs().clamp(max=1.0)
    return torch.rad2deg(2 * torch.acos(cosine))


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def used_mib() -> float:
    """Memory of the GPU that any process uses, or 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


# ---------------------------------------------------------------------- the parts
def world_draw(settings: Settings) -> list[Line]:
    """What the published recipes use: ordinary envs in processes of their own, all drawing on one GPU."""
    lines = []
    for count in (1, 2) if settings.stand_in else DRAWING:
        before, rate = used_mib(), 0.0
        command = [sys.executable, str(Path(__file__)), "draw_one", "--settings", json.dumps(vars(settings))]
        drawing = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        try:
            for process in drawing:
                wait_for_line(process, "READY")
            memory = (used_mib() - before) / count
            for process in drawing:  # all begin together
                process.stdin.write("go\n")
                process.stdin.flush()
            rate = sum(float(wait_for_line(process, "RATE").split()[1]) for process in drawing)
        finally:
            for process in drawing:
                process.kill()
                process.wait()
        setting = f"{count} processes, {settings.title}"
        lines += [("images drawn", setting, rate, "images/s"), ("memory per process", setting, memory, "MiB")]
    return lines


def wait_for_line(process: subprocess.Popen, word: str) -> str:
    """The next line of a process that begins with the word. Raises RuntimeError where it ends before."""
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise RuntimeError(f"a process that draws ended with exit code {process.wait()}")


def draw_one(settings: Settings) -> list[Line]:
    """One process of `world_draw`: says READY, waits for a line, draws, and says how many images per second."""
    from envs import variants
    from envs.gym_env import build

    world = dict(image_size=settings.image_size, sim_freq=settings.sim_freq)
    env = build(MAIN, render_backend="cpu" if settings.stand_in else "sapien_cuda", **world)
    device = str(env.backend.render_device)
    if not settings.stand_in and "cuda" not in device.lower():
        raise RuntimeError(f"SAPIEN fell back to the render device {device}: no Vulkan driver for the GPU")
    env.start_episode(variants.decode(MAIN, "train", training_ids(1)[0]))
    env.render_image()
    print("READY", flush=True)
    sys.stdin.readline()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < settings.seconds:
        env.render_image()
        count += 1
    print(f"RATE {count / (time.perf_counter() - began)}", flush=True)
    env.close()
    return []


def world_start(settings: Settings) -> list[Line]:
    count = settings.rows(4)
    ids = training_ids(count)
    with ordinary_envs(settings, count) as envs:
        theirs = envs.reset(ids)["image"].numpy().astype(float)
    group = open_rows(settings, count)
    begin(group, ids)
    starts = group.world.simulation.starts
    settled = np.stack([group.world.settlers.get(start).bodies[:2] for start in starts])  # [N, 2, 13]
    apart = np.abs(chosen_states(group).numpy() - settled)
    setting = f"{count} rows, {settings.title}"
    lines = [
        ("start state against the settled one, positions", setting, 1e6 * float(apart[..., :3].max()), "um"),
        ("start state against the settled one, quaternions", setting, 1e6 * float(apart[..., 3:7].max()), "1e-6"),
        ("image against the CPU's", setting, float(np.abs(group.images.cpu().numpy() - theirs).mean()), "of 255, mean"),
    ]
    group.close()
    return lines


def world_rest(settings: Settings, asset_pack: str = "builtin") -> list[Line]:
    """Every object of the training set in a row of its own. It should stay where the settler left it."""
    starts = one_start_of_each_object(settings.rows(16))
    group, lines = open_rows(settings, len(starts), asset_pack=asset_pack), []
    begin(group, [start.episode_id for start in starts])
    for hulls in ("gpu", "cpu") if asset_pack == "bridge" else ("gpu",):
        if hulls == "cpu":  # what the batch would get from settlers without the switch
            settled_again(group, settings, starts)
        before, parked = chosen_states(group), group.world.simulation._bodies.read().cpu().clone()
        hold_still(group, 10)  # 2 s
        after, all_after = chosen_states(group), group.world.simulation._bodies.read().cpu()
        moved = 1e3 * (after - before)[:, 0, :3].norm(dim=-1)
        turned = degrees_between(before[:, 0, 3:7], after[:, 0, 3:7])
        setting = f"{asset_pack}, hulls of settlers {hulls}, {settings.title}"
        lines += [
            ("objects at rest for 2 s, the farthest", setting, float(moved.max()), "mm"),
            ("objects at rest for 2 s, more than 1 mm", setting, int((moved > 1).sum()), f"of {len(starts)}"),
            ("objects at rest for 2 s, the most turned", setting, float(turned.max()), "degrees"),
        ]
        used = torch.zeros(parked.shape[:2], dtype=torch.bool)
        used[torch.arange(len(starts))[:, None], group.world.simulation._chosen.cpu()] = True
        slid = 1e3 * (all_after - parked)[..., :2].norm(dim=-1)[~used]
        lines.append(("parked bodies, the farthest", setting, float(slid.max()), "mm"))
    group.close()
    return lines


def one_start_of_each_object(count: int) -> list:
    """Start states with different objects, `count` of them."""
    from envs import variants

    found: dict[int, variants.StartState] = {}
    for episode_id in training_ids(4000):
        start = variants.decode(MAIN, "train", episode_id)
        found.setdefault(start.object_index, start)
        if len(found) == count:
            break
    return list(found.values())


def settled_again(group, settings: Settings, starts: list) -> None:
    """Begin the same episodes with states from settlers that have the CPU's hulls."""
    from envs.gpu.start_states import Settlers

    world = dict(obj_set="train", asset_pack="bridge", asset_dir=settings.asset_dir, sim_freq=settings.sim_freq)
    others = Settlers(MAIN, 4, **world, protocol="rl4vla", hulls="cpu")
    try:
        for start in starts:
            others.ask(start)
        group.world.simulation.start_episodes(list(range(len(starts))), starts, [others.get(start) for start in starts])
    finally:
        others.close()


def world_rest_bridge(settings: Settings) -> list[Line]:
    return world_rest(settings, "bridge")


def world_move(settings: Settings) -> list[Line]:
    """An object that sleeps on the GPU may hang in the air where it was put."""
    from envs import num_start_states
    from envs.put_on_plate import MOVE_STEP

    count = settings.rows(16)
    total = num_start_states(MOVES, "test")
    group = open_rows(settings, count, MOVES)
    begin(group, [(7919 * (i + 1)) % total for i in range(count)])
    hold_still(group, MOVE_STEP)
    moved = chosen_states(group)[:, 0, 2]
    hold_still(group, 1)
    heights, setting = chosen_states(group)[:, 0, 2], f"{count} rows, {settings.title}"
    group.close()
    return [
        ("moved object, highest after its step", setting, float(moved.max()), "m"),
        ("moved object, highest one step later", setting, float(heights.max()), "m"),
        ("moved object, below 0.9 m", setting, int((heights < 0.9).sum()), f"of {count}"),
    ]


def world_expert(settings: Settings) -> list[Line]:
    """The sign and the scale of contact forces show in grasps and success."""
    count = settings.rows(64)
    ids, lines = training_ids(count), []
    with ordinary_envs(settings, count) as envs:
        envs.reset(ids)
        lines += played("ordinary envs", settings, envs.describe, envs.step, count)
    group = open_rows(settings, count)
    begin(group, ids)
    lines += played("batch", settings, group.describe, group.step, count)
    group.close()
    return lines


def played(where: str, settings: Settings, describe: Callable, step: Callable, count: int) -> list[Line]:
    """Let an expert play `count` episodes."""
    from envs.expert import Expert

    experts = [Expert() for _ in range(count)]
    success, grasps = np.zeros(count, bool), np.zeros(count)
    states = describe()
    for _ in range(60):
        step(np.stack([expert(state) for expert, state in zip(experts, states)])[:, None].astype(np.float32))
        states = describe()
        grasps += [state["grasped"] and not done for state, done in zip(states, success)]
        success |= [state["success"] for state in states]
        if success.all():
            break
    setting = f"{where}, {count} episodes, {settings.title}"
    return [
        ("expert's success", setting, int(success.sum()), f"of {count}"),
        ("expert's steps with a grasp", setting, float(grasps.mean()), "per episode"),
    ]


def world_reset(settings: Settings) -> list[Line]:
    count = settings.rows(8)
    ids = training_ids(count + 1)
    group = open_rows(settings, count)
    begin(group, ids[:count])
    hold_still(group, 3)

    def known() -> dict[str, torch.Tensor]:
        world = group.world.simulation
        values = {
            "bodies": world._bodies.read()[..., :7],
            "joint angles": world.agent.robot.get_qpos(),
            "commanded pose": world.agent.controller.controllers["arm"]._target_pose.raw_pose,
        }
        return {name: value.cpu().clone()[1:] for name, value in values.items()}

    before = known()
    group.reset([ids[count]], [0])
    after, setting = known(), f"{count} rows, {settings.title}"
    hold_still(group, 1)
    later = known()
    group.close()

    def largest(one: dict, other: dict, name: str) -> float:
        apart = (one[name] - other[name]).abs()
        return float(apart.max()) if apart.numel() else 0.0

    return [
        line
        for name in before
        for line in (
            (f"reset of one row, {name} of others", setting, 1e6 * largest(after, before, name), "1e-6"),
            (f"a step after it, {name} of others", setting, 1e6 * largest(later, after, name), "1e-6"),
        )
    ]


def world_times(settings: Settings, rows: int) -> list[Line]:
    """Whether the batch can be faster than workers."""
    count = settings.rows(rows)
    began = time.perf_counter()
    group = open_rows(settings, count)
    built = time.perf_counter() - began
    world, setting = group.world.simulation, f"{count} rows, {settings.title}"
    begin(group, training_ids(count))
    hold_still(group, 1)
    actions = torch.zeros(count, 7, device=world.device)
    actions[:, 6] = 1.0
    pictures = world.render_images(world._row)

    def judged() -> None:
        world._num_steps += 1
        world.evaluate()

    work = {
        "substep": lambda: world.scene.step(),
        "command": lambda: world.agent.set_action(actions),
        "judging": judged,
        "image": lambda: world.render_images(world._row),
        "copy of the images to the host": lambda: pictures.cpu(),
        "control step, image, copy": lambda: hold_still(group, 1),
    }
    lines = [("batch, built in", setting, built, "s")]
    for name, call in work.items():
        call()
        wait_for_gpu()
        began = time.perf_counter()
        for _ in range(settings.repeats):
            call()
            wait_for_gpu()
        lines.append((name, setting, 1e3 * (time.perf_counter() - began) / settings.repeats, "ms"))
    lines.append(("batch", setting, 1e3 * count / lines[-1][2], "env steps/s"))
    group.close()
    return lines


def world_close(settings: Settings) -> list[Line]:
    """Training and evaluation each have a batch in the same process."""
    count = settings.rows(16)
    lines, setting, first = [], f"{count} rows each, {settings.title}", used_mib()

    def note(what: str) -> None:
        wait_for_gpu()
        lines.append((what, setting, used_mib() - first, "MiB"))

    groups = []
    for what in ("one batch", "two batches"):
        groups.append(open_rows(settings, count))
        begin(groups[-1], training_ids(count))
        note(f"memory of the GPU, {what}")
    for group in groups:  # both work beside each other
        hold_still(group, 1)
        group.close()
    del group, groups
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    note("memory of the GPU, after both were closed")
    return lines


def times_of(rows: int) -> Callable[[Settings], list[Line]]:
    return lambda settings: world_times(settings, rows)


PARTS: dict[str, tuple[Callable[[Settings], list[Line]], int]] = {  # and its time limit, seconds
    "world_draw": (world_draw, 90),
    "world_start": (world_start, 60),
    "world_rest": (world_rest, 50),
    "world_rest_bridge": (world_rest_bridge, 80),
    "world_move": (world_move, 40),
    "world_expert": (world_expert, 80),
    "world_reset": (world_reset, 40),
    "world_times_16": (times_of(16), 40),
    "world_times_64": (times_of(64), 40),
    "world_times_128": (times_of(128), 50),
    "world_times_512": (times_of(512), 80),
    "world_close": (world_close, 50),
}


def main(flags: argparse.Namespace) -> None:
    """Print the lines of one part as RESULT, which benchmarks/gpu_check.py reads."""
    lines = flags.function(Settings.read(flags.settings))
    print("RESULT " + json.dumps({"lines": lines}), flush=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "draw_one"], help="The part to run.")
    parser.add_argument("--settings", default="{}", help="Fields of Settings, as JSON. (default: %(default)s)")
    flags = parser.parse_args(words)
    flags.function = draw_one if flags.part == "draw_one" else PARTS[flags.part][0]
    return flags


if __name__ == "__main__":
    main(parse())
