"""The world: ManiSkill tasks, their vectorised form, a scripted expert, videos. Knows no model and no DeepSpeed.

    from envs import make_envs
    with make_envs("PutOnPlateInScene25Main-v3", num_envs=8, image_size=(96, 96), sim_freq=100) as envs:
        obs = envs.reset()
        obs, rewards, terminations, truncations, infos = envs.step(actions)  # actions [N, C, 7]

Importing this package imports no simulator; `make_envs` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from envs import registration  # noqa: F401  gymnasium.make knows all ids from now on
from envs.episodes import eval_episode_ids, every_instruction, instructions, num_start_states
from envs.variants import VARIANTS, is_held_out, train_episode_id

if TYPE_CHECKING:
    from envs.vector import VectorEnv

__all__ = [
    "VARIANTS",
    "check_envs",
    "eval_episode_ids",
    "every_instruction",
    "instructions",
    "is_held_out",
    "make_envs",
    "num_start_states",
    "train_episode_id",
]


def make_envs(
    env_id: str,
    num_envs: int,
    *,
    obj_set: str = "train",
    asset_pack: str = "builtin",
    asset_dir: str | None = None,
    image_size: tuple[int, int] = (640, 480),
    sim_freq: int = 500,
    max_episode_steps: int = 80,
    num_env_workers: int = 0,
    pipeline_stages: int = 1,
    worker_timeout: float = 300.0,
    sim_backend: str = "physx_cpu",
    render_backend: str = "auto",
    auto_reset: bool = False,
    ignore_terminations: bool = False,
    protocol: str = "rl4vla",
    seed: int = 0,
    first_env: int = 0,
    instruction: str | None = None,
    privileged: bool = False,
) -> VectorEnv:
    """Make `num_envs` envs of one id: one of the PutOnPlateInScene25 family, or any other ManiSkill env.

    Any other: `make_envs("PickCube-v1", 8, instruction="pick up the cube")`, or "my_module:MyTask-v1" where importing
    `my_module` registers it; what it needs and how actions and rewards read there stands in `envs/maniskill_task.py`.
    obj_set, asset_pack, sim_freq and protocol are the family's: the other env keeps its own rates and assets.

    Args:
        obj_set: "train" | "test" | "all": which objects, receptacles and tables episodes are drawn from.
        asset_pack: "builtin" (made by code, nothing to download) or "bridge" (the published meshes and photographs,
            looked for in asset_dir and in ManiSkill's own asset folder).
        image_size: (width, height) of the camera picture; the published size is (640, 480).
        sim_freq: physics steps per second, a multiple of 5; 500 as published, 100 for quick starts
            (another system: do not mix).
        max_episode_steps: control steps (5 per second) after which an episode is truncated.
        num_env_workers: 0 = in this process; W = W worker processes sharing the envs. With sim_backend "physx_cuda"
            the number of processes that settle start states (0 is 1), about one per 32 envs.
        pipeline_stages: 2 = two half-batches with workers of their own, for step_async and step_wait (VectorEnv).
        worker_timeout: seconds after which a worker that gives no answer is replaced, like one that died. Envs in this
            process: all stacks go to stderr and the process ends with exit code 1.
        sim_backend: "physx_cpu": one scene per env, bit for bit repeatable; "physx_cuda": all envs in one batch on the
            GPU, physics and images, for the family only. Only its start states are repeatable
            (`envs/gpu/simulation.py`). "auto": the second where there is a CUDA device and nothing speaks against it.
        render_backend: who draws what physx_cpu simulates: "cpu" (Mesa's lavapipe; where there is none, SAPIEN takes
            the first GPU), "cuda" (this process's GPU), or "auto": the GPU where SAPIEN can draw on it.
        auto_reset: an ended env starts its next episode at once; otherwise it rests until reset().
        ignore_terminations: success does not end an episode.
        protocol: "rl4vla": spawn, settle, reward and success as in arXiv 2505.19789; "rlinf": as RLinf where it
            differs, for comparison with its table (the list is in `envs/put_on_plate.py`).
        seed, first_env: env i follows training stream (seed, first_env + i); first_env is this rank's offset.
        instruction: what the policy is told in an env that is not of the family.
        privileged: observations also hold `state`, float32 [N, S], what the simulator knows (`privileged_state` of
            `envs/put_on_plate.py` and `envs/maniskill_task.py`) and how much of the episode is over; for critics.
    """
    from envs import group, vector

    simulator = group.resolve_backend(sim_backend, env_id, pipeline_stages)
    drawn_by = group.resolve_render_backend(render_backend, simulator)
    spec = group.EnvSpec(
        env_id,
        num_envs,
        obj_set,
        asset_pack,
        asset_dir,
        tuple(image_size),
        sim_freq,
        max_episode_steps,
        auto_reset,
        ignore_terminations,
        protocol,
        seed,
        first_env,
        instruction,
        simulator,
        drawn_by,
        privileged,
    )
    return vector.VectorEnv(spec, num_env_workers, pipeline_stages, worker_timeout)


def check_envs(env_id: str, num_envs: int, **settings) -> None:
    """What make_envs() would say of the same arguments, without a simulator or a GPU being touched.

    Raises:
        ValueError, RuntimeError: one sentence for settings that cannot work or files that are missing.
    """
    from envs import group

    stages, workers = settings["pipeline_stages"], settings["num_env_workers"]
    simulator = group.resolve_backend(settings["sim_backend"], env_id, stages)
    group.check_render_backend(settings["render_backend"], simulator)
    of_spec = group.EnvSpec.__dataclass_fields__.keys() - {"sim_backend", "render_backend"}
    chosen = {name: value for name, value in settings.items() if name in of_spec}
    spec = group.EnvSpec(env_id, num_envs, **chosen, sim_backend=simulator)
    spec.check(workers, stages, settings["worker_timeout"])
    group.check_module(env_id)
    if settings["asset_pack"] == "bridge":
        from envs.assets.bridge import BridgeAssets  # imports sapien

        BridgeAssets(settings["asset_dir"])
