"""A yaml file becomes flags in front of the user's own, so types are checked alike and the later one wins.

    deepspeed train_ppo.py --config yaml/quickstart_ppo_openvla.yaml --num_envs 8

is read as `[every key of the file as a flag] --num_envs 8`. Loading yaml straight into the dataclass would let `3e-5`
through as a string (YAML 1.1) and a misspelt choice unchecked.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

import yaml
from schemas import UserError
from vla.rollout_buffer import minibatch_block

ArgsType = TypeVar("ArgsType")
ROOT = Path(__file__).resolve().parent.parent


def parse_args(args_class: type[ArgsType], argv: list[str], description: str) -> ArgsType:
    """Flags of a run: those saved in the folder that --resume names, then those of --config, then argv; the last wins.

    Raises:
        UserError: a missing file, an unknown key or flag, a value of the wrong type.
    """
    flags = []
    resume, config = flag_value(argv, "resume"), flag_value(argv, "config")
    if resume:
        saved = saved_args(Path(resume))
        if flag_value(argv, "num_iterations"):
            saved.pop("total_timesteps", None)  # it would win over what was just asked for
        flags += mapping_to_flags(saved, args_class, resume)
    if config:
        flags += mapping_to_flags(read_yaml(Path(config)), args_class, config)
        parse_flags(args_class, flags, description, f"{config}: ")  # so that a bad value is laid at the file's door
    return parse_flags(args_class, flags + argv, description, "")


def parse_flags(args_class: type[ArgsType], flags: list[str], description: str, source: str) -> ArgsType:
    """tyro, with its boxed report of a bad flag turned into a UserError of one sentence. --help prints and exits."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(args_class, args=flags, description=description, use_underscores=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("\u2502 ") for line in report.getvalue().splitlines() if line.startswith("\u2502")]
        near = [line.split()[0] for line in lines if line.startswith("--")]
        said = " ".join(itertools.takewhile(lambda line: not line.startswith("\u2500"), lines)).rstrip(".")
        hint = f"; did you mean {near[0]}?" if said.startswith("Unrecognized") and near else ""
        raise UserError(f"{source}{said}{hint} (see --help)") from None


def flag_value(argv: list[str], name: str) -> str | None:
    """The value of --name in argv, in either spelling (`--name X`, `--name=X`); the last one, or None."""
    value = None
    for position, word in enumerate(argv):
        if word == f"--{name}" and position + 1 < len(argv):
            value = argv[position + 1]
        elif word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
    return value


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("yaml").glob("*.yaml")))
        raise UserError(
            f"--config {path} does not exist; presets here: {known or 'none (run from the repository root)'}"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines")
    return content


def saved_args(run_dir: Path) -> dict:
    """The flags that a run folder was started with, without those that name a run."""
    path = run_dir / "args.json"
    if not path.is_file():
        raise UserError(f"--resume {run_dir} is not a run folder: it has no args.json")
    saved = json.loads(path.read_text())
    return {name: value for name, value in saved.items() if name not in ("config", "resume", "run_dir", "local_rank")}


def mapping_to_flags(mapping: dict, args_class: type, source: str) -> list[str]:
    """{"num_envs": 8, "auto_reset": False, "image_size": [96, 96]} -> ["--num_envs", "8", "--no-auto_reset", ...]."""
    known = [field.name for field in dataclasses.fields(args_class)]
    flags = []
    for name, value in mapping.items():
        if name in ("config", "resume", "local_rank"):
            raise UserError(f"{source}: {name!r} belongs on the command line, not into a file")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see --help for all of them."
            if other := script_that_knows(str(name)):
                hint = f"it is a flag of {other}: is this preset meant for that script?"
            raise UserError(f"{source}: unknown key {name!r}; {hint}")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return flags


def script_that_knows(name: str) -> str | None:
    """Which of the scripts has this flag, by its source: importing them all for one sentence would take seconds."""
    for script in sorted(ROOT.glob("train_*.py")):
        if f"\n    {name}: " in script.read_text():
            return script.name
    return None


def pick(flags: Any, function: Callable, **replaced: Any) -> dict:
    """Those fields of a flags dataclass that `function` takes by keyword only, and `replaced` over them.

    make_envs(args.env_id, 8, **pick(args, make_envs, auto_reset=False)) passes --sim_freq, --image_size, ... on.
    """
    taken = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return {name: value for name, value in vars(flags).items() if name in taken} | replaced


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Per-rank quantities that follow from the global flags."""

    num_iterations: int
    num_chunks: int  # T: decisions per env and rollout
    local_num_envs: int  # N
    first_env: int  # global index of this rank's first env
    env_steps: int  # per iteration, over all ranks
    minibatch_size: int  # decisions per optimizer step, over all ranks (at most: dropped ones leave it smaller)
    micro_batches: int  # per optimizer step and rank; the last may be smaller


def derive_sizes(
    *,
    num_envs: int,
    num_steps: int,
    chunk_size: int,
    num_minibatches: int,
    micro_batch_size: int,
    group_size: int = 1,
    num_iterations: int,
    total_timesteps: int | None,
    rank: int,
    world_size: int,
) -> Sizes:
    """Global flags -> what one rank does. Raises UserError where something does not divide."""
    check_at_least(
        1, num_envs=num_envs, num_steps=num_steps, num_minibatches=num_minibatches, micro_batch_size=micro_batch_size
    )
    if num_envs % world_size:
        below, above = num_envs // world_size * world_size, -(-num_envs // world_size) * world_size
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"--num_envs {num_envs} is not divisible by {world_size} ranks: use {choices}")
    if num_steps < chunk_size:
        raise UserError(f"--num_steps {num_steps} is shorter than one chunk of {chunk_size} actions: raise it")
    if num_steps % chunk_size:
        raise UserError(f"--num_steps {num_steps} is not a multiple of --chunk_size {chunk_size}")
    num_chunks, local_num_envs = num_steps // chunk_size, num_envs // world_size
    if local_num_envs % group_size:
        raise UserError(
            f"--group_size {group_size} does not divide the {local_num_envs} envs of a rank: a group stays on one rank"
        )
    decisions = num_chunks * num_envs
    block = minibatch_block(num_chunks, num_minibatches)
    if decisions % num_minibatches or local_num_envs % block:
        raise UserError(
            f"--num_minibatches {num_minibatches} does not cut {num_chunks} decisions of {local_num_envs} envs a rank "
            f"evenly: use a divisor of {num_chunks}"
        )
    if total_timesteps is not None:
        num_iterations = total_timesteps // (num_envs * num_steps)
        if num_iterations < 1:
            raise UserError(
                f"--total_timesteps {total_timesteps} is less than one iteration ({num_envs * num_steps} env steps)"
            )
    if num_iterations < 1:
        raise UserError(f"--num_iterations {num_iterations} must be at least 1")
    return Sizes(
        num_iterations=num_iterations,
        num_chunks=num_chunks,
        local_num_envs=local_num_envs,
        first_env=rank * local_num_envs,
        env_steps=num_envs * num_steps,
        minibatch_size=decisions // num_minibatches,
        micro_batches=-(-decisions // num_minibatches // world_size // micro_batch_size),
    )


def check_flags(
    *,
    update_epochs: int,
    num_eval_episodes: int,
    num_eval_envs: int,
    save_freq: int,
    eval_freq: int,
    keep_checkpoints: int,
    temperature: float,
    eval_temperature: float,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None,
    kl_coef: float,
    fan_coef: float,
    fan_sigma: float,
    lora_rank: int,
    lora_path: str | None,
    merge_lora: bool,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    value_learning_rate: float = 0.0,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    critic_epochs: int = 1,
    group_size: int | None = None,
) -> None:
    """What flags must be, taken each for itself or two together. Raises UserError for the first that is not."""
    check_at_least(1, update_epochs=update_epochs, critic_epochs=critic_epochs)
    check_at_least(1, num_eval_episodes=num_eval_episodes, num_eval_envs=num_eval_envs)
    check_at_least(0, save_freq=save_freq, eval_freq=eval_freq, keep_checkpoints=keep_checkpoints, lora_rank=lora_rank)
    check_at_least(0, eval_temperature=eval_temperature, kl_coef=kl_coef, fan_coef=fan_coef, weight_decay=weight_decay)
    check_at_least(0, learning_rate=learning_rate, value_learning_rate=value_learning_rate, max_grad_norm=max_grad_norm)
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} {value} must lie between 0 and 1")
    if temperature <= 0:
        raise UserError(f"--temperature {temperature} must be above 0: without chance in its actions nothing is learnt")
    if fan_sigma <= 0:
        raise UserError(f"--fan_sigma {fan_sigma} must be above 0; --fan_coef 0 switches FAN off")
    if not 0 <= clip_ratio_low < 1 or clip_ratio_high < clip_ratio_low:
        raise UserError(
            f"--clip_ratio_low {clip_ratio_low} and --clip_ratio_high {clip_ratio_high} are out of order: "
            "0 <= low < 1 and low <= high"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise UserError(f"--dual_clip {dual_clip} must be above 1, or it would limit ratios that have not moved")
    if kl_coef and (not lora_rank or (lora_path and not merge_lora)):
        raise UserError(
            "--kl_coef compares with the policy whose adapter is switched off, which must be the one that training "
            "starts from: give --lora_rank, and with --lora_path also --merge_lora"
        )
    if merge_lora and not lora_path:
        raise UserError("--merge_lora has no adapter to merge: give --lora_path")
    if group_size is not None and group_size < 2:
        raise UserError(f"--group_size {group_size}: a group of one has nothing to be compared with, use 2 or more")


def check_at_least(minimum: int, **flags: float) -> None:
    """Raise UserError for the first flag below the minimum."""
    for name, value in flags.items():
        if value < minimum:
            raise UserError(f"--{name} {value} must be at least {minimum}")
