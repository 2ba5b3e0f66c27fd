"""Success of a policy in the 16 settings of the published protocol: table, intervals, plot and videos.

    # a run, one rank per GPU
    deepspeed evaluate.py --checkpoint runs/my_run --settings all
    # a published model in some of the settings
    python evaluate.py --checkpoint gen-robot/openvla-7b-rlvla-warmup --settings vision Carrot-v1:test
    # resume an evaluation
    python evaluate.py --checkpoint runs/my_run --output runs/evaluation --resume
    # compare two evaluations
    python evaluate.py --compare runs/evaluation_a runs/evaluation_b
    # the scripted expert, an upper bound
    python evaluate.py --policy expert --settings all

A checkpoint is a run folder (its newest checkpoint), one checkpoint of a run, a folder in the published layout, or a
model on the Hub. The flags of model and env come from the args.json of the run, or from the folder's solovla.json.
Those on the command line override them. The setting and an index decide an episode, which is never trained on. So any
number of ranks, workers and envs runs the same episodes.

--output gets results.json, results.md, results.png, report.html (all in one file), episode_ids.json and videos/. It
also gets episodes.jsonl: every episode with its actions, which --resume reads. SIGTERM, SIGUSR1 or one Ctrl-C ends an
evaluation between two steps with exit code 75.
"""

import difflib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("evaluate.py starts: loading packages takes about 10 s", file=sys.stderr, flush=True)

import numpy as np
import torch

from envs import VARIANTS, eval_episode_ids, instructions, make_envs
from envs.expert import Expert
from schemas import check, flags, is_taken, read_json
from schemas.evaluations import Identity, Published, Results, RunFlags
from schemas.flags import hulls_before
from schemas.hub import name_of as model_name
from schemas.hub import repo_of, small_folder
from schemas.lock import check_free, hold_folder
from vla.cli import HELP, compare_worlds, flag_value, parse_layers, resolved_input, typed_flags
from vla.distributed import (
    UserError,
    agree,
    all_gather_lists,
    barrier,
    print0,
    rank,
    run_main,
    setup_distributed,
    user_errors,
    world_size,
)
from vla.evaluation.episode_log import EpisodeLog, Progress
from vla.evaluation.episodes import NEVER, Actor, PolicyActor, Stop, Watch, outcome, run_episodes
from vla.evaluation.pairs import PairedEpisode, choose_pairs, differing_episodes, record_pairs
from vla.evaluation.recording import Look, OpenEnvs, Seen, record_share, warn
from vla.evaluation.settings import FAMILY, Setting, parse_settings
from vla.evaluation.statistics import assemble, compare, comparison_table, headline, markdown_table
from vla.evaluation.video import frame_size
from vla.files.trees import checksum
from vla.files.whole import write_whole
from vla.logger import describe_run
from vla.models.about import ABOUT, Known, known_flags
from vla.models.loading import load_policy
from vla.models.policy import VLAPolicy
from vla.models.published import check_on_hub
from vla.models.tiny import TINY_PRESETS
from vla.reports.evaluation_page import write_report
from vla.reports.evaluation_writer import EvaluationWriter
from vla.reports.pairs_page import PairVideos, pair_videos, pairs_page
from vla.reports.plots import plot_comparison
from vla.start.checks import fetch_weights
from vla.start.flag_files import ROOT, Layer, read_yaml
from vla.start.resume import check_present
from vla.text import counted, error_text, one_line, started_with, without_keys, without_machine, without_places
from vla.training.checkpoint import check_policy_contents, complete_checkpoints
from vla.training.engine import DTYPES
from vla.training.preemption import StopRequest

RENAMED = {"film_episodes": "video_episodes", "film_failures": "video_failures"}  # old name -> new name
WATCHED = 8  # episodes of a setting that are kept in case they fail, where the simulation does not repeat
PUBLISHED = Path(__file__).resolve().parent / "benchmarks" / "published.yaml"
MODEL_FLAGS = ("model_type", "unnorm_key", "image_resize", "oft_stop_token", "max_prompt_length", "dtype")
REMEDY = "copy the run folder again, or give its policy folder alone as --checkpoint"
WORLD_FLAGS = (
    "instruction",
    "reward_mode",
    "asset_pack",
    "asset_dir",
    "protocol",
    "hulls",
    "image_size",
    "sim_freq",
    "sim_backend",
    "max_episode_steps",
)


@dataclass
class Args:
    # ---- most used
    checkpoint: flags.Text | None = None
    """Policy to evaluate: a run folder, one of its checkpoints, or a folder in the published layout. A model on the
    Hugging Face Hub and a tiny preset with random weights work, too."""
    settings: flags.NonEmpty[flags.Text] = ("all",)
    """Settings to evaluate: all 16, a group (in_distribution, vision, semantic, execution), or an env id with an object
    set such as Carrot-v1:test."""
    num_episodes: flags.Episodes = 256
    """Held-out episodes per setting and temperature."""
    temperature: flags.NonEmpty[flags.NonNegative] = (0.0, 0.6)
    """Sampling temperatures, with one table each. 0 is greedy. Published tables use 0.6."""
    output: flags.Text | None = None
    """New folder for the results. Without it, runs/evaluate_<time> is made."""
    resume: bool = False
    """Continue the evaluation in --output. You may ask for more episodes or settings than before."""
    compare: tuple[flags.Text, flags.Text] | None = None
    """Output folders of two finished evaluations to compare, setting by setting. No policy acts."""
    policy: Literal["checkpoint", "expert", "idle"] = "checkpoint"
    """Who acts: the checkpoint, the scripted expert (which sees states instead of images), or nobody (idle)."""
    num_envs: flags.Envs = 16
    """Parallel envs over all ranks."""
    num_env_workers: flags.Processes = 0
    """Worker processes per rank that simulate the envs. 0 simulates in the rank's own process."""

    # ---- results
    base: tuple[flags.Text, ...] = ()
    """Published rows from benchmarks/published.yaml to show next to yours, such as rlinf-ppo-openvla, or all."""
    video_episodes: tuple[flags.CountOrNone, ...] = (0,)
    """Indices, counted from 0, of each setting's episodes that become videos (at the first temperature)."""
    video_failures: flags.CountOrNone = 1
    """Number of failed episodes per setting that become videos in addition."""
    video_pairs: flags.CountOrNone = 4
    """Number of episodes in which the two of --compare differ that become videos."""
    video_size: tuple[flags.Pixels, flags.Pixels] = (480, 360)
    """Width and height of the videos' images. What the policy saw is inset, unless it is at least that large."""

    # ---- model
    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    """Model family: openvla (writes the 7 tokens of one action one by one) or openvla_oft (predicts a chunk of actions
    in one pass). A folder that SoloVLA wrote knows it."""
    unnorm_key: flags.Text = "bridge_orig"
    """Name of the checkpoint's action statistics, which turn tokens into metres and radians."""
    image_resize: Literal["tensor", "pil"] = "tensor"
    """How camera images are resized: tensor as in RLinf, pil as in OpenVLA."""
    oft_stop_token: bool = False
    """End the sequence of openvla_oft in </s>, as moojink's discrete checkpoints need. Those of RLinf do not."""
    lora_path: flags.Text | None = None
    """LoRA adapter to load, a folder or a name on the Hub. It keeps its own rank, alpha and layers."""
    max_prompt_length: flags.PromptLength = 30
    """Tokens that prompts are padded to. A task with a longer prompt raises it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of weights and activations. Master weights and optimizer moments are always float32."""

    # ---- env
    worker_timeout: flags.Positive = 300.0
    """Seconds without an answer after which a worker is replaced. Without workers, the run ends instead."""
    instruction: flags.Text | None = None
    """Instruction for the policy in an env outside the PutOnPlateInScene25 family."""
    reward_mode: Literal["sparse", "dense", "normalized_dense"] | None = None
    """ManiSkill's reward in an env outside the PutOnPlateInScene25 family. Without it, such an env pays 1 when the task
    becomes solved and -1 when it is undone."""
    asset_pack: Literal["builtin", "bridge"] = "builtin"
    """Meshes and textures: made by code (builtin), or the published meshes and photographs (bridge)."""
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
    sim_backend: Literal["physx_cpu", "physx_cuda", "auto"] = "physx_cpu"
    """Simulator: physx_cpu repeats bit for bit. physx_cuda, one batch per rank on the GPU, is experimental: it was not
    run on a GPU yet. auto is physx_cuda where there is a GPU."""
    render_backend: Literal["cpu", "cuda", "auto"] = "auto"
    """Device that renders images for physx_cpu: cpu, cuda, or auto (the GPU if SAPIEN can render on it)."""
    max_episode_steps: flags.EpisodeSteps = 80
    """Time limit of an episode in actions."""
    ignore_terminations: bool = True
    """Continue an episode after success until its time limit."""

    # ---- system
    seed: flags.Seed = 0
    """Seed of everything random. Two runs with one seed on one machine's CPUs are identical."""
    local_rank: flags.LocalRank = -1
    """Number of this rank on its machine. The launcher sets it."""


class ExpertActor:
    """The scripted expert with the interface of vla.evaluation.episodes.Actor."""

    chunk_size = 1

    def begin(self, episode_ids) -> None:
        self.experts = [Expert() for _ in episode_ids]

    def restart(self, env: int) -> None:
        self.experts[env] = Expert()

    def act(self, obs: dict, envs) -> np.ndarray:
        return np.stack([expert(state) for expert, state in zip(self.experts, envs.describe())])[:, None]  # [N, 1, 7]


class IdleActor:
    """An actor that does not move and keeps the gripper open."""

    chunk_size = 1

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
    """The folder in the published layout that --checkpoint names, and the flags of its run ({} if unknown).

    Raises:
        UserError: it is not a checkpoint, or a part of it is missing.
    """
    if path in TINY_PRESETS:
        return Path(path), {}
    folder = small_folder(path, "--checkpoint")
    check_on_hub(path)
    if not folder.is_dir():
        raise UserError(
            f"--checkpoint {path} is not a folder: give a run folder, a checkpoint, a published model, or the name of "
            "one on the Hub"
        )
    if (folder / "args.json").exists():
        found = complete_checkpoints(folder)
        if not found:
            raise UserError(f"--checkpoint {folder} has no complete checkpoint yet: train longer, or give another run")
        folder = found[-1]
    if (folder / "policy").is_dir():
        folder = folder / "policy"
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            remedy = "give its base model as --checkpoint, and this folder as --lora_path"
            raise UserError(f"--checkpoint {path} holds only an adapter: {remedy}")
        raise UserError(f"--checkpoint {path} is not a checkpoint, since {folder} has no config.json: give another one")
    run_args = args_of(folder)
    saved = read_json(run_args, dict[str, Any], REMEDY) if run_args else {}
    saved |= hulls_before(saved)
    check_complete(folder, check(RunFlags, saved, str(run_args), REMEDY))
    return folder, saved


def known_of(checkpoint: str, folder: Path) -> Known | None:
    """What the folder of a checkpoint knows about itself. The checkpoint may be a name on the Hub."""
    return known_flags(checkpoint if repo_of(checkpoint) else str(folder))


def args_of(policy: Path) -> Path | None:
    """The args.json of the run to which a folder <run>/checkpoints/iteration_*/policy belongs, or None.

    A checkpoint may be a link. Its run is then the one that the given path goes through.
    """
    for place in (policy.absolute(), policy.resolve()):
        if place.name == "policy" and len(place.parents) > 2:
            found = place.parents[2] / "args.json"
            if found.exists():
                return found
    return None


def check_task(trained_on: str | None, settings: list[Setting]) -> None:
    """Raise UserError for a policy of another task, which would silently get 0 % in the 16 settings."""
    if trained_on and trained_on not in VARIANTS and all(one.env_id in VARIANTS for one in settings):
        raise UserError(
            f"the policy was trained on {one_line(trained_on)!r}, not on these settings: name its env in --settings"
        )


def check_complete(folder: Path, flags: RunFlags) -> None:
    """Raise UserError if a part was lost in copying, which would silently cost tens of points of success."""
    has_critic = flags.value_learning_rate is not None and flags.critic == "hidden"
    wanted = {"value_head.safetensors": has_critic}
    adapter = {name: (folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")}
    continued = flags.lora_path is not None and not flags.merge_lora
    wanted |= dict.fromkeys(adapter, flags.lora_rank > 0 or continued or any(adapter.values()))
    for name, needed in wanted.items():
        if needed and not (folder / name).is_file():
            raise UserError(f"--checkpoint {folder} lacks {name}, which its run wrote: copy the whole folder again")


def check_actor(policy: str, checkpoint: str | None, lora_path: str | None, settings: list[Setting]) -> Path | None:
    """The folder of the checkpoint, or None if no policy acts.

    Raises:
        UserError: no checkpoint is given, it is of another task, or the actor cannot act in these settings.
    """
    if policy != "checkpoint":
        if lora_path:
            raise UserError(f"--policy {policy} reads no model: leave --lora_path out")
        unknown = [one.env_id for one in settings if one.env_id not in VARIANTS]
        if policy == "expert" and unknown:
            raise UserError(f"--policy expert knows only the {FAMILY} envs: leave {unknown[0]} out of --settings")
        return None
    if checkpoint is None:
        raise UserError("--checkpoint is missing: give a run folder, a checkpoint or a published model")
    folder, run_flags = find_checkpoint(checkpoint)
    known = known_of(checkpoint, folder)
    check_task(run_flags.get("env_id") or (known and known.flags.get("env_id")), settings)
    fetch_weights("--checkpoint", checkpoint if repo_of(checkpoint) else str(folder), lora_path)
    return folder


def load_actor(args: Args, checkpoint: Path, device: torch.device | str) -> VLAPolicy:
    """The policy with the settings that it was trained with. parse() has read them from its run."""
    policy = load_policy(
        str(checkpoint),
        args.model_type,
        unnorm_key=args.unnorm_key,
        dtype=DTYPES[args.dtype],
        image_resize=args.image_resize,
        oft_stop_token=args.oft_stop_token,
        lora_path=args.lora_path,
        value_head=False,
        max_prompt_length=args.max_prompt_length,
        device=device,
        seed=args.seed,
    )
    return policy.requires_grad_(False).eval()


def fit_prompts(policy, settings: list[Setting], ids: dict[str, list[int]], instruction: str | None) -> None:
    """Raise max_prompt_length to the longest prompt of all settings. Padding changes no action."""
    texts = set() if instruction is None else {instruction}
    for one in settings:
        if one.env_id in VARIANTS:
            texts |= set(instructions(one.env_id, one.obj_set, ids[one.name]))
    wanted, policy.max_prompt_length = policy.max_prompt_length, sys.maxsize
    policy.max_prompt_length = max(wanted, *(len(policy.prompt_ids(text)) for text in texts))


def fingerprint(folder: Path, lora_folder: Path | None = None) -> dict[str, str]:
    """Size and CRC-32 of the files that decide what a policy does. All ranks together.

    A checkpoint's files are compared with their saved checksums. These are then used instead of reading the files
    again, and rank 0 reads only the files of other folders.

    Returns:
        {file: "<size> bytes, <CRC-32>"} on rank 0, and {} elsewhere. It does not contain the folders' paths.

    Raises:
        UserError: a checkpoint's file is not what was saved.
    """
    found = {}
    for prefix, place in (("", folder), ("adapter ", lora_folder)):
        if place is None:
            continue
        verified = check_policy_contents(place)
        if rank() > 0:
            continue
        if not place.is_dir():
            found[place.name] = "random weights from the seed"
        files = [*place.glob("*.safetensors"), *place.glob("*.json")]
        for path in sorted(path for path in files if path.name != ABOUT):  # its flags are compared
            crc = verified[path.name] if path.name in verified else checksum(path)
            found[f"{prefix}{path.name}"] = f"{path.stat().st_size} bytes, {crc:08x}"
    return found


def parse(argv: list[str]) -> Args:
    """Flags of model and env from the run of the checkpoint, or from its folder, overridden by argv."""
    for old in sorted(typed_flags(argv) & RENAMED.keys()):
        raise UserError(f"Unrecognized options: --{old}, did you mean --{RENAMED[old]}? (see --help)")
    checkpoint = resolved_input("checkpoint", flag_value(argv, "checkpoint"))
    if not checkpoint or flag_value(argv, "compare") or {*HELP} & {*argv}:
        return parse_layers(Args, [], argv, __doc__)
    folder, saved = find_checkpoint(checkpoint)
    known = Known(f"{checkpoint}: its run's args.json", saved, True) if saved else known_of(checkpoint, folder)
    if lora_path := resolved_input("lora_path", flag_value(argv, "lora_path")):
        known = known_flags(lora_path, "--lora_path") or known
    if known is None:
        return parse_layers(Args, [], argv, __doc__)
    wanted, typed = (*MODEL_FLAGS, *WORLD_FLAGS), typed_flags(argv)
    values = {name: known.flags[name] for name in wanted if name in known.flags}
    layers = [Layer(known.source, values, (ROOT, *Path(checkpoint).resolve().parents))]
    args = parse_layers(Args, layers, argv, __doc__)
    if saved:
        check_present(saved, [name for name in wanted if name not in typed], known.source)
    compare_worlds(known, vars(args))
    return args


# ---------------------------------------------------------------------- the output folder
def find_output(output: str | None, resume: bool, identity: dict) -> Path:
    """The folder for the results, the same on all ranks. Nothing is written yet.

    Args:
        identity: what must stay the same when an evaluation is resumed: who acts, in which world.

    Raises:
        UserError: the folder holds older results, or (with resume) those of another evaluation.
    """
    if resume and output is None:
        raise UserError("--resume needs --output: name the folder of the evaluation to resume")
    folder = Path(all_gather_lists([output or f"runs/evaluate_{time.strftime('%Y%m%d_%H%M%S')}"])[0])
    saved = folder / "evaluation.json"
    if resume:
        if not saved.exists():
            raise UserError(f"--output {folder} has no evaluation.json to --resume: give the folder of an evaluation")
        check_same(saved, identity)
        if rank() == 0:
            check_free(folder, f"--output {folder}")
    else:
        check_new(folder, "pass --resume to continue them, or give another --output")
    barrier()  # all ranks have looked
    return folder


def check_new(folder: Path, remedy: str) -> None:
    """Raise UserError if the folder holds older results or cannot be written."""
    if is_taken(folder):
        raise UserError(f"--output {folder} holds older results: {remedy}")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problem = "is not writable" if place.is_dir() else "is not a folder"
        raise UserError(f"--output {folder} cannot be written, since {place} {problem}: give another --output")


def open_output(folder: Path, resume: bool, identity: dict, ids: dict[str, list[int]]) -> EpisodeLog:
    """Start to write, or resume, after find_output(). All ranks call it together.

    Raises:
        UserError: another process writes there, or has written since find_output().
    """
    saved, error = folder / "evaluation.json", None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hold_folder(folder, f"--output {folder}")
            if saved.exists() and not resume:
                error = f"--output {folder} now holds the results of another evaluation: give another --output"
        except UserError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"--output {folder} cannot be written ({failure.strerror}): give another --output"
    if said := agree(error):
        raise UserError(said)
    log = EpisodeLog(folder / "episodes.jsonl")
    if rank() == 0:
        saved.write_text(json.dumps(identity, indent=2) + "\n")
        (folder / "episode_ids.json").write_text(json.dumps(ids) + "\n")
    return log


def check_same(saved: Path, identity: dict) -> None:
    """Raise UserError for the first setting that differs from the one the evaluation was started with."""
    remedy = "give another --output"
    before = flat(read_json(saved, Identity, remedy).model_dump())
    now = flat(json.loads(json.dumps(identity)))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            found, asked = (json.dumps(values[key]) if key in values else "nothing" for values in (before, now))
            started = f"--output {saved.parent} was started with {key} {found}, but now it is {asked}"
            raise UserError(f"{started}: give the same, or another --output")


def flat(nested: dict) -> dict[str, Any]:
    """{"world": {"sim_freq": 500}, "seed": 0} -> {"world.sim_freq": 500, "seed": 0}."""
    found = {}
    for key, value in nested.items():
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def choose_published(names: tuple[str, ...]) -> dict[str, dict]:
    """{key: row} of benchmarks/published.yaml, for the names that --base gives."""
    rows = read_yaml(PUBLISHED)
    check(dict[str, Published], rows, str(PUBLISHED), "restore the file")
    for name in names:
        if name != "all" and name not in rows:
            near = difflib.get_close_matches(name, rows, n=1, cutoff=0.0)[0]
            raise UserError(f"--base {name} is unknown, did you mean {near}? Choose from {', '.join(rows)}")
    return {name: row for name, row in rows.items() if name in names or "all" in names}


# ---------------------------------------------------------------------- one setting
def run_setting(
    envs,
    name: str,
    episode_ids: list[int],
    actors: dict[float, Actor],
    log: EpisodeLog,
    progress: Progress,
    stop: Stop = NEVER,
    watch: Watch | None = None,
) -> bool:
    """Run the episodes that the log lacks, for each temperature. False on all ranks if one was asked to stop.

    watch: gets what the policy sees at the first temperature.
    """
    for temperature, actor in actors.items():
        missing = log.missing(name, temperature, episode_ids)
        done = [episode_id for episode_id in episode_ids if episode_id not in missing]
        progress.begin(f"{name} T={temperature:g}", log.episodes(name, temperature, done))
        for batch in run_episodes(actor, envs, missing, watch, stop):
            log.add(name, temperature, batch)
            progress.add(batch)
        watch = None
        if log.missing(name, temperature, episode_ids):
            return False
    return True


def choose_videos(
    episodes: list[dict], folder: Path, setting: str, chosen: tuple[int, ...], failures: int, seen: set[int] | None
) -> dict[Path, dict]:
    """{video file: episode} of one setting: the chosen places, then the first `failures` failed episodes.

    seen: the ids of the episodes that can be shown, or None for all.
    """
    shown = [place for place, one in enumerate(episodes) if seen is None or one["episode_id"] in seen]
    places = [place for place in chosen if place in shown]
    failed = [place for place in shown if not episodes[place]["success_once"] and place not in places]
    stem = re.sub(r"[^\w.-]", "_", setting)
    return {
        folder / f"{stem}_{place:04d}_id{episodes[place]['episode_id']}_{outcome(episodes[place])}.mp4": episodes[place]
        for place in [*places, *failed[:failures]]
    }


def watch_few(episode_ids: list[int], chosen: tuple[int, ...], failures: int) -> Seen:
    """Keeps what the policy sees in the chosen episodes, and in the first WATCHED ones if failures are wanted."""
    places = [*chosen, *(range(WATCHED) if failures else ())]
    return Seen([episode_ids[place] for place in dict.fromkeys(places) if place < len(episode_ids)])


def record_videos(
    wanted: dict[Path, dict], setting: str, open_envs: OpenEnvs, look: Look, stop: Stop, watch: Seen | None
) -> None:
    """Record videos and posters. The ranks share the work, and end early if asked to stop. A failure is a warning."""
    left = [path for path in wanted if not path.exists()]
    barrier()  # all ranks have seen the same files
    mine = left[rank() :: world_size()]
    if watch is not None:  # the images are where the episode ran
        mine = [path for path in left if wanted[path]["episode_id"] in watch.whole()]
    problem = agree(record_share({path: wanted[path] for path in mine}, open_envs, look, stop, watch))
    if problem is not None and rank() == 0:
        warn(f"of {setting}", problem)


def name_of(policy: str, checkpoint: Path | None) -> str:
    """Name of the actor in the tables: run and checkpoint, or the folder."""
    if policy != "checkpoint":
        return {"expert": "scripted expert", "idle": "doing nothing"}[policy]
    place = checkpoint.resolve()
    if found := model_name(place):
        return one_line(found[0])
    if place.name == "policy" and len(place.parents) > 2:
        return one_line(f"{place.parents[2].name}/{place.parent.name}")
    return one_line(place.name)


# ---------------------------------------------------------------------- two evaluations
def compare_evaluations(args: Args) -> None:
    """Print and write whether two evaluations differ, for each setting, with videos of episodes in which they do."""
    halves = []
    for folder in args.compare:
        path = Path(folder) / "results.json"
        if not path.exists():
            raise UserError(f"--compare {folder} has no results.json: give the output folder of a finished evaluation")
        remedy = "evaluate again with this version of the code"
        halves.append(read_json(path, Results, remedy).model_dump())
    rows = compare(*halves)
    names = tuple(half["name"] for half in halves)
    names = names if names[0] != names[1] else args.compare
    folder = Path(args.output or f"runs/compare_{time.strftime('%Y%m%d_%H%M%S')}")
    check_new(folder, "give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = differing_episodes(*halves)
    table = comparison_table(rows, names)
    write_whole(folder / "comparison.json", json.dumps({"names": names, "rows": rows}, indent=2) + "\n")
    write_whole(folder / "comparison.md", markdown_table(table) + "\n")
    plot_comparison(rows, names, folder / "comparison.png")
    print(f"{markdown_table(table)}\n", flush=True)
    try:
        chosen = choose_pairs(pairs, args.video_pairs)
        videos, problem = compare_videos(args, chosen, halves[0]["world"], folder / "videos")
    except (UserError, TypeError, ValueError) as error:  # a page without videos is better than none
        videos, problem = [], error_text(error)
    problem = problem and without_machine(problem)
    write_whole(folder / "report.html", pairs_page(folder, names, rows, len(pairs), videos, problem))
    print(f"{folder}/report.html, comparison.md, comparison.json, comparison.png")


def compare_videos(
    args: Args, pairs: list[PairedEpisode], world: dict, folder: Path
) -> tuple[list[PairVideos], str | None]:
    """Replay both sides of these episodes into videos.

    Args:
        world: the one in which both evaluations were run, from results.json.

    Returns:
        the videos, and why some of them are missing or None.
    """
    if not pairs:
        return [], None
    world = {"reward_mode": None, "hulls": None} | world  # left out where they mean nothing
    names = {*WORLD_FLAGS, "ignore_terminations"} - {"asset_dir"}  # a folder of one machine
    if lacking := sorted(names - world.keys()):
        raise UserError(f"results.json has no world.{lacking[0]}, so the episodes cannot be replayed")
    shared = {name: world[name] for name in names}
    shared |= {"asset_dir": args.asset_dir, "worker_timeout": args.worker_timeout}

    def setting_of(name: str) -> Setting:
        return parse_settings((name,), VARIANTS, world["instruction"])[0]

    def open_envs(name: str) -> OpenEnvs:
        one = setting_of(name)
        instruction = None if one.env_id in VARIANTS else world["instruction"]
        own = shared | {"instruction": instruction, "render_backend": args.render_backend}
        return partial(make_envs, one.env_id, obj_set=one.obj_set, **own)

    def words(pair: PairedEpisode) -> str:
        one = setting_of(pair.setting)
        if one.env_id not in VARIANTS:
            return world["instruction"]
        return instructions(one.env_id, one.obj_set, [pair.episode_id])[0]

    print(f"replaying {counted(len(pairs), 'episode')} in which they differ, for the videos ...", flush=True)
    size = frame_size(args.video_size, tuple(world["image_size"]))
    look = Look(size, size, 1, args.num_env_workers)  # without an inset: what they saw is in each evaluation's videos
    problem = record_pairs(pairs, (Path(args.compare[0]), Path(args.compare[1])), folder, open_envs, look)
    found = [pair_videos(folder, pair, words(pair)) for pair in pairs]
    return [one for one in found if one is not None], problem


# ---------------------------------------------------------------------- the steps of main
def identity_of(args: Args, checkpoint: Path | None) -> dict:
    """What must stay the same when an evaluation is resumed: who acts, with which weights, in which world."""
    adapter = Path(args.lora_path) if args.lora_path else None
    weights = fingerprint(checkpoint, adapter) if checkpoint else {}
    world = {name: getattr(args, name) for name in (*WORLD_FLAGS, "ignore_terminations")}
    del world["asset_dir"]  # a folder of this machine
    if args.reward_mode is None:
        del world["reward_mode"]  # evaluations of before version 0.4.0 have none
    if args.asset_pack != "bridge":
        del world["hulls"]  # there are no meshes
    return {
        "policy": args.policy,
        "weights": all_gather_lists([weights])[0],
        "model": {name: getattr(args, name) for name in MODEL_FLAGS},
        "seed": args.seed,
        "world": world,
    }


def describe(args: Args, checkpoint: Path | None, identity: dict) -> dict:
    """What results.json says about the evaluation: name, checkpoint, identity, flags and machine."""
    about = {"name": name_of(args.policy, checkpoint), "checkpoint": checkpoint and str(checkpoint.resolve())}
    return without_machine(about | identity | without_places(describe_run(asdict(args), {}, world_size())))


def make_actors(
    args: Args, checkpoint: Path | None, settings: list[Setting], ids: dict[str, list[int]], device: torch.device
) -> dict[float, Actor]:
    """{temperature: actor}. Actors that are not policies have the temperature 0."""
    if checkpoint is None:
        return {0.0: ExpertActor() if args.policy == "expert" else IdleActor()}
    policy = load_actor(args, checkpoint, device)
    fit_prompts(policy, settings, ids, args.instruction)
    return {t: PolicyActor(policy, t, args.seed, name=str(checkpoint)) for t in args.temperature}


def print_start(args: Args, name: str, num_settings: int, folder: Path) -> None:
    """Two lines: what runs, and in which world."""
    print0(f"{name}: {counted(num_settings, 'setting')} x {counted(args.num_episodes, 'episode')} -> {folder}")
    of_model = f"{args.unnorm_key} statistics, {args.dtype}, " if args.policy == "checkpoint" else ""
    width, height = args.image_size
    of_meshes = f", {args.hulls} hulls" if args.asset_pack == "bridge" else ""
    of_world = f"{width} x {height} pixels, {args.sim_freq} Hz physics{of_meshes}, {args.max_episode_steps} steps"
    print0(f"{of_model}{of_world}")


def envs_of(args: Args, setting: Setting) -> OpenEnvs:
    """make_envs() for one setting. It still takes num_envs, image_size and num_env_workers."""
    world = {name: getattr(args, name) for name in (*WORLD_FLAGS, "ignore_terminations")}
    if setting.env_id in VARIANTS:  # both are for other envs
        world |= dict(instruction=None, reward_mode=None)
    return partial(
        make_envs,
        setting.env_id,
        obj_set=setting.obj_set,
        worker_timeout=args.worker_timeout,
        render_backend=args.render_backend,
        **world,
    )


def evaluate_setting(
    args: Args,
    one: Setting,
    ids: list[int],
    actors: dict[float, Actor],
    log: EpisodeLog,
    progress: Progress,
    stop: Stop,
) -> Seen | None:
    """Run the episodes of one setting that the log lacks. Ends with one sentence for missing assets and the like.

    Returns:
        what the policy saw in a few episodes. None where episodes can be replayed.
    """
    num_envs = min(max(1, args.num_envs // world_size()), -(-args.num_episodes // world_size()))
    actor = next(iter(actors.values()))
    pixels = actor.policy.pixels if isinstance(actor, PolicyActor) else None  # others do not look at images
    with user_errors():
        workers = min(args.num_env_workers, num_envs)
        opened = envs_of(args, one)(num_envs=num_envs, num_env_workers=workers, pixels=pixels)
    with opened as envs:
        watch = None if envs.repeats else watch_few(ids, args.video_episodes, args.video_failures)
        run_setting(envs, one.name, ids, actors, log, progress, stop, watch)
    return watch


def results_so_far(
    log: EpisodeLog,
    ids: dict[str, list[int]],
    temperatures: Iterable[float],
    videos: dict[str, dict[Path, dict]],
    about: dict,
) -> dict | None:
    """The content of results.json for the episodes that have ended, or None before the first.

    A setting is left out until it has an episode at every temperature.

    Args:
        ids: {setting: episode ids}. videos: {setting: {video file: episode}}. about: see describe().
    """
    ended = {t: {name: log.ended(name, t, own_ids) for name, own_ids in ids.items()} for t in temperatures}
    names = [name for name in ids if all(by_setting[name] for by_setting in ended.values())]
    if not names:
        return None
    results = assemble({t: {name: by_setting[name] for name in names} for t, by_setting in ended.items()}, about)
    for name, recorded in videos.items():
        results["settings"][name]["videos"] = [
            {
                "file": f"videos/{path.name}",
                "poster": f"videos/{path.with_suffix('.jpg').name}",
                "episode_id": episode["episode_id"],
                "outcome": outcome(episode),
            }
            for path, episode in recorded.items()
            if path.exists()
        ]
    return results


def resume_command(folder: Path) -> str:
    """The command that continues this evaluation, which writes into `folder`."""
    words, kept = iter(sys.argv), []
    for word in words:
        name = word.partition("=")[0]
        if name not in ("--output", "--resume", "--local_rank"):
            kept.append(word)
        elif word == "--output":
            next(words, None)  # its value
    command = without_keys(shlex.join(kept))
    return f"{started_with(world_size())} {command} --output {shlex.quote(str(folder))} --resume"


def main(args: Args) -> None:
    if args.compare:
        with user_errors():
            if int(os.environ.get("RANK", "0")) == 0:
                compare_evaluations(args)
        return

    # ------------------------------------------------------------------ set-up: wrong input ends here
    with user_errors():
        settings = parse_settings(args.settings, VARIANTS, args.instruction)
        ids = {one.name: eval_episode_ids(one.env_id, one.obj_set, args.num_episodes) for one in settings}
        published = choose_published(args.base)
        checkpoint = check_actor(args.policy, args.checkpoint, args.lora_path, settings)
        device = setup_distributed(args.seed)
        identity = identity_of(args, checkpoint)
        about = describe(args, checkpoint, identity)
        folder = find_output(args.output, args.resume, identity)
        actors = make_actors(args, checkpoint, settings, ids, device)
        log = open_output(folder, args.resume, identity, ids)
        stop = StopRequest(folder)

    # ------------------------------------------------------------------ setting by setting
    cells = [(one.name, temperature) for one in settings for temperature in actors]
    done = sum(len(ids[name]) - len(log.missing(name, temperature, ids[name])) for name, temperature in cells)
    videos: dict[str, dict[Path, dict]] = {}
    results_now = partial(results_so_far, log, ids, actors, videos, about)
    total = len(cells) * args.num_episodes
    page = EvaluationWriter(folder, results_now, about, published, total, resume_command(folder))
    progress = Progress(total, done, page)
    print_start(args, about["name"], len(settings), folder)
    first = next(iter(actors))  # the temperature of the videos
    size = frame_size(args.video_size, args.image_size)
    look = Look(size, args.image_size, actors[first].chunk_size, args.num_env_workers)
    for one in settings:
        own_ids, watch = ids[one.name], None
        if any(log.missing(one.name, temperature, own_ids) for temperature in actors):  # else done before --resume
            watch = evaluate_setting(args, one, own_ids, actors, log, progress, stop)
        if not any(log.missing(one.name, temperature, own_ids) for temperature in actors):
            seen = None if watch is None else set(all_gather_lists(watch.whole()))
            places = (folder / "videos", one.name, args.video_episodes, args.video_failures, seen)
            videos[one.name] = choose_videos(log.episodes(one.name, first, own_ids), *places)
            record_videos(videos[one.name], one.name, envs_of(args, one), look, stop, watch)
        if stop.agreed():
            progress.close(stopped_by=stop.signal or str(stop.stop_file))
            kept = f"{progress.done} of {progress.total} episodes are in {folder}/episodes.jsonl"
            stop.end(f"{kept}. Resume with the same flags and --output {folder} --resume")
    progress.close()
    log.close()

    # ------------------------------------------------------------------ results
    barrier()  # all ranks have recorded their videos
    if rank() == 0:
        results = results_now()
        write_report(folder, results, published)
        print(f"{headline(results)}\n{folder}/report.html, results.md, results.json, results.png", flush=True)
    barrier()


if __name__ == "__main__":
    run_main(main, lambda: parse(sys.argv[1:]))
