"""Flags of a script: what the policy's folder knows, then the run of --resume, then the files of --config, then argv.

    deepspeed train_ppo.py --config yaml/quickstart_ppo_openvla.yaml --config mine.yaml --num_envs 8

The later one wins. Every value is checked against its annotation in the script's Args before anything starts. You may
write names with hyphens or underscores.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import tyro

import schemas
from schemas import UserError
from vla import ROOT
from vla.evaluation.settings import FAMILY
from vla.models.about import Known, check_known, differences, known_flags, without_foreign_world
from vla.start.flag_files import INPUTS, OUTPUTS, Layer, checked_values, resolved, saved_layer, yaml_layer
from vla.start.help import help_text
from vla.start.launch import launched
from vla.text import counted
from vla.training.rollout_buffer import minibatch_block

ArgsType = TypeVar("ArgsType")
HELP = ("-h", "--help")


# ---------------------------------------------------------------------- parsing
def parse_args(args_class: type[ArgsType], argv: list[str], description: str, *, offline: bool = False) -> ArgsType:
    """Flags from the policy's folder, the run that --resume names, the files of --config, and argv. The later one wins.

    Of a policy on the Hub, its small files are fetched once all other flags are known to be good.

    Args:
        description: the docstring of the script, for --help.
        offline: whether the Hub is not asked. Its cache is looked at.

    Raises:
        UserError: a file is missing, a key or flag is unknown, a value does not fit its flag, or a flag contradicts
            the policy.
    """
    argv = with_underscores(argv)
    layers = []
    if resume := flag_value(argv, "resume"):
        layers.append(saved_layer(Path(resolved_input("resume", resume))))
    layers += [yaml_layer(name) for name in flag_values(argv, "config")]
    words = [word for word in argv if word not in HELP]
    if words != argv:
        with contextlib.suppress(UserError):  # help is for those who have a wrong flag, too
            chosen = parse_layers(args_class, layers, words, description)
            layers = [*known_layers(chosen, known_of(chosen, offline=True), layers, words), *layers]
        return parse_layers(args_class, layers, argv, description)  # prints the help, and exits
    chosen = parse_layers(args_class, layers, argv, description)
    found = [] if resume else known_of(chosen, offline)  # a run has all flags
    if not found:
        return chosen
    chosen = parse_layers(args_class, [*known_layers(chosen, found, layers, argv), *layers], argv, description)
    compare_worlds(found[-1], vars(chosen))  # an adapter was trained after its base
    return chosen


def known_of(flags: Any, offline: bool) -> list[Known]:
    """What the folders of the policy know: the base's, then the adapter's. Raises UserError if one cannot be read."""
    places = {name: getattr(flags, name, None) for name in ("model_path", "lora_path")}
    found = [known_flags(path, f"--{name}", offline=offline) for name, path in places.items() if path]
    return [known for known in found if known is not None]


def known_layers(flags: Any, found: list[Known], layers: list[Layer], argv: list[str]) -> list[Layer]:
    """What folders know, as layers below all others. An env that was given decides whether their world applies."""
    names = {field.name for field in dataclasses.fields(flags)}
    own_env = "env_id" in typed_flags(argv).union(*(layer.values for layer in layers))
    below = []
    for known in found:
        values = without_foreign_world(known.flags, flags.env_id, FAMILY) if own_env else known.flags
        below.append(Layer(known.source, {name: value for name, value in values.items() if name in names}, ()))
    return below


def compare_worlds(known: Known, used: dict[str, Any]) -> None:
    """Print, on rank 0, where a policy is used in another world than its own.

    Raises:
        UserError: a flag contradicts what the weights were trained for.
    """
    check_known(known, used)
    if launched().rank == 0 and (line := differences(known, used)):
        print(line, flush=True)


def parse_layers(args_class: type[ArgsType], layers: list[Layer], argv: list[str], description: str) -> ArgsType:
    """Flags from files and from argv. A later file wins over an earlier one, argv over all. Raises as parse_args()."""
    argv = with_underscores(argv)
    typed = typed_flags(argv)
    values: dict[str, Any] = {}
    for layer in layers:
        found = checked_values(layer, args_class, flag_value(argv, "env_id"))
        forget_total(values, found.keys())
        values |= found
    forget_total(values, typed)
    if "config" in typed:
        values["config"] = tuple(flag_values(argv, "config"))
        argv = without_flag(argv, "config")
    return parse_flags(args_class, argv, description, args_class(**values))


def forget_total(values: dict[str, Any], newer: Any) -> None:
    """Drop an older total_timesteps, which would win over a newer num_iterations."""
    if "num_iterations" in newer and "total_timesteps" not in newer:
        values.pop("total_timesteps", None)


def parse_flags(args_class: type[ArgsType], argv: list[str], description: str, default: ArgsType) -> ArgsType:
    """Parse argv with tyro, check ranges and resolve paths. `default` has the other values. --help prints and exits.

    Raises:
        UserError: a flag or value is wrong. One sentence replaces tyro's boxed report.
    """
    if {*HELP} & {*argv}:
        print(help_text(args_class, default, description), end="")
        raise SystemExit(0)
    check_switches(args_class, argv)
    # tyro's report depends on the encoding of stdout, and its lines on the width of the terminal
    report = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    wide = mock.patch.dict(os.environ, {"COLUMNS": "10000"})
    try:
        with wide, contextlib.redirect_stdout(report), contextlib.redirect_stderr(report):
            args = tyro.cli(args_class, args=argv, default=default, use_underscores=True)
    except SystemExit:
        report.flush()
        raise UserError(sentence_of(report.buffer.getvalue().decode("utf-8"))) from None
    schemas.check_flags(args)
    for name in {field.name for field in dataclasses.fields(args)} & {*INPUTS, *OUTPUTS}:
        setattr(args, name, resolved_input(name, getattr(args, name)))
    return args


def check_switches(args_class: type, argv: list[str]) -> None:
    """Raise UserError for `--auto_reset False`, since tyro's report would not name the flag."""
    types = typing.get_type_hints(args_class)
    for word, following in itertools.pairwise([*argv, "--"]):
        name, equals, value = word.removeprefix("--").partition("=")
        given = value if equals else following
        switch = name.removeprefix("no_")
        if word.startswith("--") and types.get(switch) is bool and (equals or not following.startswith("--")):
            raise UserError(f"--{name} takes no value such as {given!r}: write --{switch} or --no_{switch}")


def sentence_of(report: str) -> str:
    """tyro's boxed report of a bad flag, as one sentence."""
    lines = [line.strip("\u2502 ") for line in report.splitlines() if line.startswith("\u2502")]
    near = [line.split()[0] for line in lines if line.startswith("--")]
    sentence = " ".join(itertools.takewhile(lambda line: not line.startswith("\u2500"), lines)).rstrip(".")
    hint = f", did you mean {near[0]}?" if sentence.startswith("Unrecognized") and near else ""
    return f"{sentence}{hint} (see --help)"


def resolved_input(name: str, value: str | None) -> str | None:
    """A path of the command line, relative to the working directory or else to the repository."""
    try:
        return resolved(name, value, (Path.cwd(), ROOT))
    except FileNotFoundError:
        raise UserError("the working directory does not exist any more: change to another one") from None


# ---------------------------------------------------------------------- words of the command line
def with_underscores(argv: list[str]) -> list[str]:
    """--num-envs and --no-auto-reset as --num_envs and --no_auto_reset. Values stay as they are."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word)
    return words


def typed_flags(argv: list[str]) -> set[str]:
    """Names of the flags in argv: num_envs for --num-envs 4, auto_reset for --no_auto_reset."""
    names = {word.partition("=")[0][2:] for word in with_underscores(argv) if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def flag_values(argv: list[str], name: str) -> list[str]:
    """All values of --name in argv, in order: of `--name X Y`, `--name X --name Y` and `--name=X`.

    Raises:
        UserError: --name has no value.
    """
    values, open_flag = [], False
    for word, following in itertools.pairwise([*with_underscores(argv), "--"]):
        if word.startswith("--"):
            given, equals, value = word.partition("=")
            open_flag = given == f"--{name}" and not equals
            if given == f"--{name}" and equals:
                values.append(value)
            elif open_flag and following.startswith("--"):
                raise UserError(f"--{name} has no value: give one, or leave the flag out")
        elif open_flag:
            values.append(word)
    return values


def flag_value(argv: list[str], name: str) -> str | None:
    """The last value of --name in argv, or None."""
    return ([None] + flag_values(argv, name))[-1]


def without_flag(argv: list[str], name: str) -> list[str]:
    """argv without --name and its values."""
    kept, inside = [], False
    for word in argv:
        if word.startswith("--"):
            inside = word.partition("=")[0] == f"--{name}"
        if not inside:
            kept.append(word)
    return kept


# ---------------------------------------------------------------------- from flags to functions
def pick(flags: Any, function: Callable, **replaced: Any) -> dict:
    """The flags that `function` takes as keyword-only parameters. `replaced` wins over them.

    make_envs(args.env_id, 8, **pick(args, make_envs, auto_reset=False)) passes sim_freq, image_size and so on.

    Raises:
        TypeError: neither a flag nor the caller gives a parameter. Otherwise a renamed flag would silently get the
            default of the function.
    """
    wanted = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    given = {name: value for name, value in vars(flags).items() if name in wanted} | replaced
    if missing := wanted - given.keys():
        raise TypeError(f"{function.__qualname__} takes {', '.join(sorted(missing))}: no flag and no caller gives it")
    return given


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one rank that follow from the global flags."""

    num_iterations: int
    num_chunks: int  # T: decisions per env and rollout
    local_num_envs: int  # N
    first_env: int  # global index of this rank's first env
    local_num_eval_envs: int
    num_env_workers: int  # of this rank, at most one per env
    num_eval_env_workers: int
    env_steps: int  # per iteration, over all ranks
    minibatch_size: int  # decisions per optimizer step, over all ranks (fewer if some are dropped)
    micro_batches: int  # per optimizer step and rank, of which the last may be smaller
    trained_envs: int  # envs that this rank trains on, which are others than it simulates in some placements
    first_trained: int  # global index of the first of them

    def in_words(self, num_ranks: int, chunk_size: int, num_env_workers: int) -> str:
        """The sizes as one line for people. num_env_workers is the number that the user asked for."""
        fewer = f" ({num_env_workers} asked for)" if self.num_env_workers < num_env_workers else ""
        return (
            f"{counted(num_ranks, 'rank')} of {counted(self.trained_envs, 'env')} and "
            f"{counted(self.num_env_workers, 'worker')}{fewer}, {counted(self.num_chunks, 'decision')} an env of "
            f"{counted(chunk_size, 'action')}, {self.env_steps} env steps an iteration, "
            f"{counted(self.minibatch_size, 'decision')} an optimizer step, {counted(self.num_iterations, 'iteration')}"
        )


def derive_sizes(
    *,
    num_envs: int,
    num_steps: int,
    chunk_size: int,
    num_minibatches: int,
    micro_batch_size: int,
    group_size: int,
    num_eval_envs: int,
    num_env_workers: int,
    num_iterations: int,
    total_timesteps: int | None,
    rank: int,
    world_size: int,
) -> Sizes:
    """Sizes of one rank from global flags. Raises UserError if one does not divide another."""
    if num_envs % world_size:
        below, above = num_envs // world_size * world_size, -(-num_envs // world_size) * world_size
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"--num_envs {num_envs} is not divisible by {world_size} ranks: use {choices}")
    if num_steps < chunk_size:
        raise UserError(f"--num_steps {num_steps} is less than one chunk of {chunk_size} actions: raise it")
    if num_steps % chunk_size:
        raise UserError(f"--num_steps {num_steps} is not a multiple of --chunk_size {chunk_size}: change one of them")
    num_chunks, local_num_envs = num_steps // chunk_size, num_envs // world_size
    if local_num_envs % group_size:
        raise UserError(
            f"--group_size {group_size} does not divide the {local_num_envs} envs of a rank: change one of them"
        )
    decisions = num_chunks * num_envs
    block = minibatch_block(num_chunks, num_minibatches)
    if decisions % num_minibatches or local_num_envs % block:
        raise UserError(
            f"--num_minibatches {num_minibatches} does not split the decisions of a rank evenly, {num_chunks} of each "
            f"of its {local_num_envs} envs: use a divisor of {num_chunks}"
        )
    if total_timesteps is not None:
        num_iterations = total_timesteps // (num_envs * num_steps)
        if num_iterations < 1:
            raise UserError(
                f"--total_timesteps {total_timesteps} is less than one iteration of {num_envs * num_steps} env steps: "
                "raise it"
            )
    local_num_eval_envs = max(1, num_eval_envs // world_size)
    return Sizes(
        num_iterations=num_iterations,
        num_chunks=num_chunks,
        local_num_envs=local_num_envs,
        first_env=rank * local_num_envs,
        local_num_eval_envs=local_num_eval_envs,
        num_env_workers=min(num_env_workers, local_num_envs),
        num_eval_env_workers=min(num_env_workers, local_num_eval_envs),
        env_steps=num_envs * num_steps,
        minibatch_size=decisions // num_minibatches,
        micro_batches=-(-decisions // num_minibatches // world_size // micro_batch_size),
        trained_envs=local_num_envs,
        first_trained=rank * local_num_envs,
    )


def check_whole_episodes(*, num_steps: int, max_episode_steps: int, chunk_size: int) -> None:
    """Check that a rollout holds whole episodes, for runs that reset all envs at the start of an iteration.

    Longer episodes would not be counted, and the successful ones are the short ones. Raises UserError.
    """
    if num_steps < max_episode_steps:
        enough = -(-max_episode_steps // chunk_size) * chunk_size
        raise UserError(
            f"--num_steps {num_steps} is less than --max_episode_steps {max_episode_steps}, so only episodes that "
            f"succeed early would be counted: use --num_steps {enough}"
        )


def check_combinations(
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    kl_coef: float,
    lora_rank: int,
    lora_path: str | None,
    merge_lora: bool,
    recompute_logprobs: bool,
    rollout_ahead: int,
) -> None:
    """Check combinations of flags. schemas.check_flags() checks each flag alone.

    Raises:
        UserError: two flags do not fit together.
    """
    if clip_ratio_high < clip_ratio_low:
        raise UserError(f"--clip_ratio_low {clip_ratio_low} is above --clip_ratio_high {clip_ratio_high}: change one")
    if kl_coef and (not lora_rank or (lora_path and not merge_lora)):
        raise UserError(
            "--kl_coef needs an adapter that starts at zero, since it compares with the policy without the adapter: "
            "give --lora_rank, and with --lora_path also --merge_lora"
        )
    if recompute_logprobs and rollout_ahead:
        raise UserError(
            "--recompute_logprobs would hide that --rollout_ahead 1 acts with older weights, which ratios have to "
            "correct: leave one out"
        )
    if merge_lora and not lora_path:
        raise UserError("--merge_lora has no adapter to merge: give --lora_path")
