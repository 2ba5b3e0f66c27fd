"""Success of a policy on the 16 settings of the published protocol: table, intervals, plot, videos, from one command.

    deepspeed evaluate.py --checkpoint runs/my_run --settings all --num_episodes 256          # one rank per GPU
    python evaluate.py --checkpoint openvla-7b --settings vision Carrot-v1:test --temperature 0.6
    python evaluate.py --checkpoint runs/my_run --output runs/evaluation --resume             # goes on where it stopped
    python evaluate.py --compare runs/evaluation_a runs/evaluation_b                          # do the two differ?
    python evaluate.py --policy expert --settings all                                         # what can be reached

A checkpoint is a run folder (its newest checkpoint), one checkpoint of it, or a folder in the published layout. How the
world and the model were set up in a run is read from its args.json; flags win. Episodes are a function of (setting,
index) alone and are never trained on: any number of ranks, workers and envs runs the same ones.

--output gets results.json, results.md, results.png, results.html (all in one file), episode_ids.json, videos/ and
episodes.jsonl, every episode with its actions, which --resume reads.
"""

import contextlib
import difflib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from envs import VARIANTS, eval_episode_ids, instructions, make_envs
from envs.expert import Expert
from envs.video import VideoWriter
from schemas.flags import (
    CountOrNone,
    Envs,
    Episodes,
    EpisodeSteps,
    Hertz,
    LocalRank,
    NonEmpty,
    NonNegative,
    Pixels,
    Positive,
    Processes,
    PromptLength,
    Seed,
    Text,
)
from vla.checkpoint import complete_checkpoints
from vla.cli import flag_value, parse_layers, resolved_input
from vla.distributed import (
    UserError,
    all_gather_lists,
    barrier,
    checked,
    print0,
    rank,
    run_main,
    setup_distributed,
    world_size,
)  # fmt: skip
from vla.engine import DTYPES
from vla.episode_log import EpisodeLog, Progress
from vla.evaluation import Actor, PolicyActor, outcome, replay, run_episodes
from vla.flag_files import ROOT, Layer, read_yaml
from vla.logger import describe_run
from vla.pretrained import TINY_PRESETS, load_policy
from vla.report import plot_comparison, write_report
from vla.results import assemble, compare, comparison_table, headline, markdown_table
from vla.settings import Setting, parse_settings

PUBLISHED = Path(__file__).resolve().parent / "benchmarks" / "published.yaml"
MODEL_FLAGS = (
    "model_type", "unnorm_key", "image_resize", "oft_stop_token", "max_prompt_length", "dtype",
)  # fmt: skip
WORLD_FLAGS = (
    "instruction", "asset_pack", "asset_dir", "protocol", "image_size", "sim_freq", "sim_backend", "max_episode_steps",
)  # fmt: skip


@dataclass
class Args:
    # ---- what
    checkpoint: Text | None = None  # run folder, one checkpoint of it, published layout, or a tiny preset (random)
    # who acts: the checkpoint; the scripted expert, which sees states instead of pictures; or nobody
    policy: Literal["checkpoint", "expert", "idle"] = "checkpoint"
    # all (16), groups (in_distribution, vision, semantic, execution), or env id and object set such as Carrot-v1:test
    settings: NonEmpty[Text] = ("all",)
    num_episodes: Episodes = 256  # held-out episodes per setting and temperature
    # of sampling, one table each; 0 = greedy (published tables use 0.6)
    temperature: NonEmpty[NonNegative] = (0.0, 0.6)
    seed: Seed = 0  # everything random is a function of it; two runs with one seed on one machine are identical
    # output folders of two earlier evaluations: says per setting whether they differ, and runs nothing
    compare: tuple[Text, Text] | None = None

    # ---- results
    output: Text | None = None  # a new folder for the results (default: runs/evaluate_<time>)
    resume: bool = False  # go on with the evaluation in --output; more episodes or settings may be asked for
    # published rows to show beside, from benchmarks/published.yaml, such as rlinf-ppo-openvla; or all
    base: tuple[Text, ...] = ()
    film_episodes: tuple[CountOrNone, ...] = (0,)  # which of a setting's episodes to film, at the first temperature
    film_failures: CountOrNone = 1  # how many of a setting's failed episodes to film besides

    # ---- model
    # openvla: one action per decision, its 7 tokens written one by one; openvla_oft: chunk_size actions in one pass
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    unnorm_key: Text = "bridge_orig"  # which of the checkpoint's statistics turn tokens into metres and radians
    image_resize: Literal["tensor", "pil"] = "tensor"  # pictures are resized as in RLinf, or as in OpenVLA
    oft_stop_token: bool = False  # openvla_oft: end in </s>, as moojink's discrete checkpoints; RLinf's do not
    lora_path: Text | None = None  # folder of an adapter to continue; it keeps its own rank, alpha and layers
    max_prompt_length: PromptLength = 30  # prompts are padded to this many tokens
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations; master weights, moments are fp32

    # ---- env
    num_envs: Envs = 16  # parallel envs over all ranks
    num_env_workers: Processes = 0  # worker processes per rank that simulate; 0 = in the rank's own process
    # seconds after which a worker that gives no answer is replaced; simulating in the rank's own process, the run ends
    worker_timeout: Positive = 300.0
    instruction: Text | None = None  # what the policy is told in an env that is not of the family
    asset_pack: Literal["builtin", "bridge"] = "builtin"  # made by code, or the published meshes and photographs
    asset_dir: Text | None = None  # where the published assets are (`python doctor.py --download`)
    protocol: Literal["rl4vla", "rlinf"] = "rl4vla"  # RL4VLA's scene, or RLinf's departures, to compare with its table
    image_size: tuple[Pixels, Pixels] = (640, 480)  # camera width and height; pose and field of view stay
    sim_freq: Hertz = 500  # physics steps per second, control is at 5 Hz; results at different rates do not compare
    # physx_cpu repeats bit for bit; physx_cuda: all envs of a rank in one batch; auto: the GPU where there is one
    sim_backend: Literal["physx_cpu", "physx_cuda", "auto"] = "physx_cpu"
    # who draws what physx_cpu simulates; auto: the GPU where SAPIEN can draw on it
    render_backend: Literal["cpu", "cuda", "auto"] = "auto"
    max_episode_steps: EpisodeSteps = 80  # an episode is cut after this many actions
    ignore_terminations: bool = True  # do not end an episode on success

    # ---- system
    local_rank: LocalRank = -1  # set by the launcher


class ExpertActor:
    """The scripted expert behind the interface of evaluation.Actor."""

    def begin(self, episode_ids) -> None:
        self.experts = [Expert() for _ in episode_ids]

    def restart(self, env: int) -> None:
        self.experts[env] = Expert()

    def act(self, obs: dict, envs) -> np.ndarray:
        return np.stack([expert(state) for expert, state in zip(self.experts, envs.describe())])[:, None]  # [N, 1, 7]


class IdleActor:
    """Stays where it is, gripper open."""

    def begin(self, episode_ids) -> None:
        pass

    def restart(self, env: int) -> None:
        pass

    def act(self, obs: dict, envs) -> np.ndarray:
        actions = np.zeros((envs.num_envs, 1, 7), np.float32)
        actions[..., 6] = 1.0
        return actions


# ---------------------------------------------------------------------- the checkpoint
def find_checkpoint(path: str) -> tuple[Path, dict]:
    """What --checkpoint names -> the folder in the published layout, and the flags of its run ({} where unknown).

    Raises:
        UserError: it is no checkpoint, or one of which a part is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        if path in TINY_PRESETS:
            return folder, {}
        raise UserError(f"--checkpoint {path} is not a folder: give a run folder, a checkpoint or a published model")
    if (folder / "args.json").is_file():
        found = complete_checkpoints(folder)
        if not found:
            raise UserError(f"--checkpoint {folder}: this run has no complete checkpoint yet")
        folder = found[-1]
    if (folder / "policy").is_dir():
        folder = folder / "policy"
    if not (folder / "config.json").is_file():
        adapter = " alone: give its base model as --checkpoint, and this folder as --lora_path"
        wrong = f"holds an adapter{adapter}" if (folder / "adapter_config.json").is_file() else "has no config.json"
        raise UserError(f"--checkpoint {path} is no checkpoint: {folder} {wrong}")
    run_args = folder.resolve().parents[2] / "args.json" if folder.name == "policy" else None
    flags = json.loads(run_args.read_text()) if run_args and run_args.is_file() else {}
    check_complete(folder, flags)
    return folder, flags


def check_task(run_flags: dict, settings: list[Setting]) -> None:
    """A policy of another task would get 0 % in the 16 settings without a word."""
    trained_on = run_flags.get("env_id")
    if trained_on and trained_on not in VARIANTS and all(one.env_id in VARIANTS for one in settings):
        raise UserError(f"this policy was trained on {trained_on}: give --settings {trained_on}")


def check_complete(folder: Path, flags: dict) -> None:
    """A part that was lost in copying costs tens of points of success without a word."""
    has_critic = "value_learning_rate" in flags and flags.get("critic", "hidden") == "hidden"
    wanted = {"value_head.safetensors": has_critic}
    adapter = {name: (folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")}
    continued = flags.get("lora_path") is not None and not flags.get("merge_lora", False)
    trained_adapter = flags.get("lora_rank", 0) > 0 or continued
    wanted |= dict.fromkeys(adapter, trained_adapter or any(adapter.values()))
    for name, needed in wanted.items():
        if needed and not (folder / name).is_file():
            raise UserError(f"--checkpoint {folder} lacks {name}, which its run wrote: copy the whole folder again")


def fit_prompts(policy, settings: list[Setting], ids: dict[str, list[int]], instruction: str | None) -> None:
    """Raise max_prompt_length to the longest prompt of all settings: padding changes no action."""
    told = {instruction} - {None}
    for one in settings:
        if one.env_id in VARIANTS:
            told |= set(instructions(one.env_id, one.obj_set, ids[one.name]))
    wanted, policy.max_prompt_length = policy.max_prompt_length, sys.maxsize
    policy.max_prompt_length = max(wanted, *(len(policy.prompt_ids(text)) for text in told))


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of the weights' files: whether a folder still holds what it held."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {file.name: [file.stat().st_size, int(file.stat().st_mtime)] for file in files}


def parse(argv: list[str]) -> Args:
    """Flags that the checkpoint's run was started with, as far as they concern model and world, then argv."""
    layers, checkpoint = [], resolved_input("checkpoint", flag_value(argv, "checkpoint"))
    if checkpoint and not flag_value(argv, "compare"):
        saved = find_checkpoint(checkpoint)[1]
        values = {name: saved[name] for name in (*MODEL_FLAGS, *WORLD_FLAGS) if name in saved}
        layers.append(Layer(checkpoint, values, (ROOT, *Path(checkpoint).resolve().parents)))
    return parse_layers(Args, layers, argv, "\n\n".join(__doc__.split("\n\n")[:2]))


# ---------------------------------------------------------------------- the output folder
def open_output(output: str | None, resume: bool, identity: dict) -> Path:
    """The folder for the results; all ranks agree on it.

    Args:
        identity: what must be the same when an evaluation goes on: who acts, in which world.

    Raises:
        UserError: it holds older results, or with resume those of something else.
    """
    if resume and output is None:
        raise UserError("--resume needs --output, the folder of the evaluation to go on with")
    folder = Path(all_gather_lists([output or f"runs/evaluate_{time.strftime('%Y%m%d_%H%M%S')}"])[0])
    saved = folder / "evaluation.json"
    if resume:
        if not saved.is_file():
            raise UserError(f"--output {folder} is no evaluation to --resume: it has no evaluation.json")
        for key, value in json.loads(saved.read_text()).items():
            if value != json.loads(json.dumps(identity[key])):
                raise UserError(
                    f"--output {folder} was begun with {key} {value}, now it is {identity[key]}: pass the same, or "
                    "another --output"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} holds older results: pass --resume to go on with them, or another --output")
    barrier()  # everybody has looked
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(identity, indent=2) + "\n")
    return folder


def choose_published(names: tuple[str, ...]) -> dict[str, dict]:
    """Rows of benchmarks/published.yaml by key."""
    rows = read_yaml(PUBLISHED)
    for name in names:
        if name != "all" and name not in rows:
            near = difflib.get_close_matches(name, rows, n=1, cutoff=0.0)[0]
            raise UserError(f"--base {name} is unknown: did you mean {near}? There are {', '.join(rows)}")
    return {name: row for name, row in rows.items() if name in names or "all" in names}


# ---------------------------------------------------------------------- one setting
def run_setting(
    envs, name: str, episode_ids: list[int], actors: dict[float, Actor], log: EpisodeLog, progress: Progress
) -> None:
    """What the log still lacks, temperature by temperature."""
    for temperature, actor in actors.items():
        missing = log.missing(name, temperature, episode_ids)
        done = [episode_id for episode_id in episode_ids if episode_id not in missing]
        progress.begin(f"{name} T={temperature:g}", log.episodes(name, temperature, done))
        for batch in run_episodes(actor, envs, missing):
            log.add(name, temperature, batch)
            progress.add(batch)


def films(episodes: list[dict], folder: Path, setting: str, chosen: tuple[int, ...], failures: int) -> dict[Path, dict]:
    """Which episodes of a setting get a video, and where: chosen ones by place, then the first that failed."""
    places = [place for place in chosen if place < len(episodes)]
    failed = [place for place, episode in enumerate(episodes) if not episode["success_once"] and place not in places]
    stem = setting.replace(":", "_")
    return {
        folder / f"{stem}_{place:04d}_id{episodes[place]['episode_id']}_{outcome(episodes[place])}.mp4": episodes[place]
        for place in [*places, *failed[:failures]]
    }


def make_films(envs, wanted: dict[Path, dict]) -> None:
    """Replay episodes from their actions into videos; the ranks share the work."""
    left = [path for path in wanted if not path.exists()]
    barrier()  # all ranks have seen the same files
    mine = left[rank() :: world_size()]
    for start in range(0, len(mine), envs.num_envs):
        batch = mine[start : start + envs.num_envs]
        videos = [VideoWriter(path.with_name(f"partial_{path.name}")) for path in batch]
        with contextlib.ExitStack() as stack:
            replay(envs, [wanted[path] for path in batch], [stack.enter_context(video) for video in videos])
        for path, video in zip(batch, videos):
            os.replace(video.path, path)  # a file with its final name is whole


def name_of(policy: str, checkpoint: Path | None) -> str:
    """What the tables call it: run and checkpoint, or the folder."""
    if policy != "checkpoint":
        return {"expert": "scripted expert", "idle": "doing nothing"}[policy]
    if checkpoint.name == "policy":
        return f"{checkpoint.resolve().parents[2].name}/{checkpoint.resolve().parent.name}"
    return checkpoint.name


def compare_evaluations(first: str, second: str, output: str | None) -> None:
    """Print and write whether two evaluations differ, setting by setting."""
    halves = []
    for folder in (first, second):
        if not (Path(folder) / "results.json").is_file():
            raise UserError(f"--compare {folder}: it has no results.json, so it is no finished evaluation")
        halves.append(json.loads((Path(folder) / "results.json").read_text()))
    rows = compare(*halves)
    names = tuple(half["name"] for half in halves)
    names = names if names[0] != names[1] else (first, second)
    folder = Path(output or f"runs/compare_{time.strftime('%Y%m%d_%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} holds older results: pass another --output")
    folder.mkdir(parents=True, exist_ok=True)
    table = comparison_table(rows, names)
    (folder / "comparison.json").write_text(json.dumps({"names": names, "rows": rows}, indent=2) + "\n")
    (folder / "comparison.md").write_text(markdown_table(table) + "\n")
    plot_comparison(rows, names, folder / "comparison.png")
    print(f"{markdown_table(table)}\n\n{folder}/comparison.md, comparison.json, comparison.png")


def main(args: Args) -> None:
    if args.compare:
        with checked():
            if int(os.environ.get("RANK", "0")) == 0:
                compare_evaluations(*args.compare, args.output)
        return

    # ------------------------------------------------------------------ set-up: wrong input ends here
    with checked():
        device = setup_distributed(args.seed)
        settings = parse_settings(args.settings, VARIANTS, args.instruction)
        ids = {one.name: eval_episode_ids(one.env_id, one.obj_set, args.num_episodes) for one in settings}
        published = choose_published(args.base)
        checkpoint, actors = None, {0.0: ExpertActor() if args.policy == "expert" else IdleActor()}
        if args.policy == "checkpoint":
            if args.checkpoint is None:
                raise UserError("--checkpoint is missing: give a run folder, a checkpoint or a published model")
            checkpoint, run_flags = find_checkpoint(args.checkpoint)
            check_task(run_flags, settings)
            policy = load_policy(
                str(checkpoint), args.model_type, unnorm_key=args.unnorm_key,
                dtype=DTYPES[args.dtype], image_resize=args.image_resize, oft_stop_token=args.oft_stop_token,
                lora_path=args.lora_path, value_head=False, max_prompt_length=args.max_prompt_length, device=device,
                seed=args.seed,
            )  # fmt: skip
            policy.requires_grad_(False).eval()
            fit_prompts(policy, settings, ids, args.instruction)
            actors = {temperature: PolicyActor(policy, temperature, args.seed) for temperature in args.temperature}
        world = {name: getattr(args, name) for name in (*WORLD_FLAGS, "ignore_terminations")}
        identity = {
            "policy": args.policy,
            "checkpoint": str(checkpoint.resolve()) if checkpoint else None,
            "weights": fingerprint(checkpoint) if checkpoint else None,
            "model": {name: getattr(args, name) for name in (*MODEL_FLAGS, "lora_path")},
            "seed": args.seed,
            "world": world,
        }
        about = {"name": name_of(args.policy, checkpoint), **identity}
        about |= describe_run(asdict(args), {}, world_size())
        folder = open_output(args.output, args.resume, identity)
        log = EpisodeLog(folder / "episodes.jsonl")
        if rank() == 0:
            (folder / "episode_ids.json").write_text(json.dumps(ids) + "\n")

    # ------------------------------------------------------------------ setting by setting
    cells = [(one.name, temperature) for one in settings for temperature in actors]
    done = sum(len(ids[name]) - len(log.missing(name, temperature, ids[name])) for name, temperature in cells)
    progress = Progress(len(cells) * args.num_episodes, done)
    print0(f"{about['name']}: {len(settings)} settings x {args.num_episodes} episodes -> {folder}")
    of_model = f"{args.unnorm_key} statistics, {args.dtype}, " if checkpoint else ""
    width, height = args.image_size
    print0(f"{of_model}{width} x {height} pixels, {args.sim_freq} Hz physics, {args.max_episode_steps} steps")
    local_num_envs = min(max(1, args.num_envs // world_size()), -(-args.num_episodes // world_size()))
    first = next(iter(actors))  # the temperature that is filmed
    videos: dict[str, dict[Path, dict]] = {}
    for one in settings:
        own_ids = ids[one.name]
        plan = (folder / "videos", one.name, args.film_episodes, args.film_failures)
        finished = not any(log.missing(one.name, temperature, own_ids) for temperature in actors)
        if finished:  # by the evaluation that is being resumed
            videos[one.name] = films(log.episodes(one.name, first, own_ids), *plan)
            if all(path.exists() for path in videos[one.name]):
                continue
        own_world = world | {"instruction": None if one.env_id in VARIANTS else args.instruction}
        with checked():  # such as assets that are missing
            envs = make_envs(
                one.env_id, local_num_envs, obj_set=one.obj_set,
                num_env_workers=min(args.num_env_workers, local_num_envs), worker_timeout=args.worker_timeout,
                render_backend=args.render_backend, **own_world,
            )  # fmt: skip
        with envs:
            run_setting(envs, one.name, own_ids, actors, log, progress)
            videos[one.name] = films(log.episodes(one.name, first, own_ids), *plan)
            make_films(envs, videos[one.name])
    progress.close()
    log.close()

    # ------------------------------------------------------------------ results
    barrier()  # all films are there
    if rank() == 0:
        episodes = {
            temperature: {one.name: log.episodes(one.name, temperature, ids[one.name]) for one in settings}
            for temperature in actors
        }
        results = assemble(episodes, about)
        for name, wanted in videos.items():
            results["settings"][name]["videos"] = [
                {"file": f"videos/{path.name}", "episode_id": episode["episode_id"], "outcome": outcome(episode)}
                for path, episode in wanted.items()
            ]
        write_report(folder, results, published)
        print(f"{headline(results)}\n{folder}/results.html, results.md, results.json, results.png", flush=True)
    barrier()


if __name__ == "__main__":
    run_main(main, lambda: parse(sys.argv[1:]))
