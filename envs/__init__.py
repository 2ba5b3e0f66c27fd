"""The simulated envs: ManiSkill tasks, many at once, and a scripted expert. No model and no DeepSpeed is here.

    from envs import make_envs
    with make_envs("PutOnPlateInScene25Main-v3", num_envs=8, image_size=(96, 96), sim_freq=100) as envs:
        obs = envs.reset()
        obs, rewards, terminations, truncations, infos = envs.step(actions)  # actions [N, C, 7]

Importing this package does not import the simulator. `make_envs` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from envs import registration  # registers all ids with gymnasium
from envs.episodes import episode_facts, eval_episode_ids, every_instruction, instructions, num_start_states
from envs.variants import VARIANTS, is_held_out, train_episode_id

if TYPE_CHECKING:
    from envs.vector import VectorEnv
    from schemas.pixels import Pixels

__all__ = [
    "VARIANTS",
    "check_envs",
    "control_mode",
    "episode_facts",
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
    beside: VectorEnv | None = None,
    pixels: Pixels | None = None,
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
    hulls: str | None = "gpu",
    seed: int = 0,
    first_env: int = 0,
    instruction: str | None = None,
    privileged: bool = False,
    reward_mode: str | None = None,
) -> VectorEnv:
    """Make `num_envs` envs of one id: one of the PutOnPlateInScene25 family, or any other ManiSkill env.

    Another env is made by `make_envs("PickCube-v1", 8, instruction="pick up the cube")`. Your own task has the id
    "my_module:MyTask-v1", where importing `my_module` registers it. `envs/maniskill_task.py` says what such an env
    needs, and what actions and rewards mean there. It keeps its own rates and assets, so obj_set, asset_pack, sim_freq
    and protocol are for the family only.

    Args:
        beside: other envs, whose workers also simulate these. The two take turns, as training and evaluation do, and
            may differ in everything but `hulls`. Further workers are started only if more are asked for than there are.
        pixels: how worker processes make the images in observations of the camera's, before they share them. Without
            workers, or with None, images are the camera's.
        obj_set: "train" | "test" | "all", the set of objects, receptacles and tables that episodes use.
        asset_pack: "builtin" (made by code, no download) or "bridge" (the published meshes and photographs).
        asset_dir: the first folder to search for the files of "bridge", or a data set on the Hub, which is fetched.
            ManiSkill's own folder is searched after it.
        image_size: (width, height) of the camera's image. The published size is (640, 480).
        sim_freq: physics steps per second, a multiple of 5. The published value is 500. 100 is faster, but it is
            another physical system, so do not mix the two.
        max_episode_steps: control steps (5 per second) after which an episode is truncated.
        num_env_workers: 0 for envs in this process, or W worker processes that share the envs. With sim_backend
            "physx_cuda" it is the number of processes that settle start states (0 means 1), about one per 32 envs.
        pipeline_stages: 2 for two half-batches, each with its own workers, for `VectorEnv.pipeline`.
        worker_timeout: seconds after which a worker without an answer is replaced, like one that died. For envs in this
            process all stacks go to stderr and the process ends with exit code 1.
        sim_backend: "physx_cpu" has one scene per env and repeats exactly, to the last bit. "physx_cuda" simulates and
            renders all envs of the family in one batch on the GPU. It is experimental: it was never run on a GPU, and
            episodes do not repeat exactly (`envs/gpu/simulation.py`). "auto" is the GPU where there is a CUDA device.
        render_backend: what renders the images of physx_cpu: "cpu" (Mesa's lavapipe, or the first GPU where lavapipe
            is missing), "cuda" (this process's GPU), or "auto" (the GPU where SAPIEN can render on it).
        auto_reset: an env whose episode has ended starts the next one at once. Otherwise it rests until reset().
        ignore_terminations: success does not end an episode.
        protocol: "rl4vla" has spawning, settling, reward and success of arXiv 2505.19789. "rlinf" follows RLinf where
            it differs, for comparison with its table (`envs/put_on_plate.py` has the list).
        hulls: convex hulls of the published meshes: "gpu" for those of PhysX's GPU simulation, with which the published
            results were made, or "cpu" for the finer ones of its CPU simulation. A process has one kind, and so have
            all its envs. "builtin" has no such meshes and ignores it.
        seed, first_env: env i follows training stream (seed, first_env + i). first_env is this rank's offset.
        instruction: the instruction for the policy in an env that is not of the family.
        privileged: observations also hold `state`, float32 [N, S], for critics. It is `privileged_state` of
            `envs/put_on_plate.py` or `envs/maniskill_task.py`, and the share of the episode that is over.
        reward_mode: "sparse", "dense" or "normalized_dense", ManiSkill's reward in an env that is not of the family.
            None pays 1 when the task becomes solved and -1 when it is undone.

    Raises:
        ValueError, RuntimeError: settings that cannot work, missing files, or an env that cannot be built.
    """
    from envs.spec import EnvSpec, resolve_backend, resolve_render_backend
    from envs.vector import VectorEnv

    if asset_pack == "bridge" and asset_dir is not None:  # once, since worker processes would ask the Hub again
        from envs.assets.download import assets_at

        asset_dir = assets_at(asset_dir)
    simulator = resolve_backend(sim_backend, env_id, pipeline_stages)
    renderer = resolve_render_backend(render_backend, simulator)
    spec = EnvSpec(
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
        renderer,
        privileged,
        reward_mode,
        hulls if asset_pack == "bridge" else None,
        pixels if simulator == "physx_cpu" and num_env_workers else None,
    )
    return VectorEnv(spec, num_env_workers, pipeline_stages, worker_timeout, beside)


def control_mode(env_id: str) -> str:
    """What an action of this env means: the name of ManiSkill's controller."""
    return registration.CONTROL_MODE if env_id in VARIANTS else "pd_ee_delta_pose"


def check_envs(env_id: str, num_envs: int, **settings) -> None:
    """Raise the errors of make_envs() for the same arguments, without using the simulator or a GPU.

    settings: all keyword arguments of make_envs that a script passes to it.

    Raises:
        ValueError, RuntimeError: settings that cannot work or files that are missing.
    """
    from envs import spec as of_envs

    stages, workers = settings["pipeline_stages"], settings["num_env_workers"]
    simulator = of_envs.resolve_backend(settings["sim_backend"], env_id, stages)
    of_envs.check_render_backend(settings["render_backend"], simulator)
    spec_fields = of_envs.EnvSpec.__dataclass_fields__.keys() - {"sim_backend", "render_backend"}
    chosen = {name: value for name, value in settings.items() if name in spec_fields}
    if settings["asset_pack"] != "bridge":
        chosen["hulls"] = None
    spec = of_envs.EnvSpec(env_id, num_envs, **chosen, sim_backend=simulator)
    spec.check(workers, stages, settings["worker_timeout"])
    of_envs.check_module(env_id)
    if simulator == "physx_cuda":
        from envs.gpu.library import check_library  # imports sapien

        check_library()
    if settings["asset_pack"] == "bridge":
        from envs.assets.bridge import BridgeAssets  # imports sapien

        BridgeAssets(settings["asset_dir"])
