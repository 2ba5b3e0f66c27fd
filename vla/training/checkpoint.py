"""Saves and resumes a run, on any number of ranks and under any ZeRO stage.

    <run_dir>/lock             held by the process that writes here (schemas/lock.py)
    <run_dir>/checkpoints/iteration_000004/
        policy/                the published layout (models/saving.py), for evaluation and other code bases
        optimizer/             one file per rank: fp32 weights and Adam's moments (optimizer_state.py)
        envs.safetensors       state of every env (stream position, episode, actions so far), independent of ranks
        critic.safetensors     the critic outside the engine, if there is one (critics.py)
        state.json             iteration, global_step, trained parameters, size and CRC-32 of every file above

Everything random is a function of (seed, iteration), so no generator state is kept. A checkpoint is written under
another name, and renamed when all of it has reached the disk. So a folder with its final name was complete at that
time. Before a run resumes, all files are compared with their sizes and checksums. A damaged checkpoint is reported, and
the one before it is used.

The ranks share the reading. A 7B model with all weights trained has 105 GB, and each of 8 ranks reads 13 GB. This takes
6 s from memory (2.2 GB/s on one core, 2026-11), or as long as the disk needs.

Nothing here is read with pickle, so a checkpoint from a stranger cannot run code (files/trees.py).
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from schemas import UserError, is_taken, read_json
from schemas.lock import LOCK, check_free, hold_folder
from schemas.runs import Header, OldState, State
from vla import VERSION
from vla.distributed import Engine, agree, all_gather_lists, print0, rank, world_size
from vla.files.tensors import first_not_finite
from vla.files.trees import REMEDY, checksum, load_old_tree, load_tree, save_tree
from vla.models.published import check_base
from vla.models.saving import save_policy, saves_adapter_alone
from vla.start.resume import check_resumed
from vla.text import error_text
from vla.training.critics import StateCritic
from vla.training.optimizer_state import load_shards, local_shards, save_shards, shard_file
from vla.training.stages import whole_state_dict

FORMAT = 3  # of state.json and the files beside it
OLD_FORMAT = 2  # without checksums. envs.pt and critic.pt are pickles, and are read without running code
FOLDER = re.compile(r"iteration_(\d{6,})")


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"iteration_{iteration:06d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration of a checkpoint, from its name. None for other folders, such as a copy under another name."""
    found = FOLDER.fullmatch(folder.name)
    return int(found[1]) if found and folder.name == checkpoint_dir(folder, int(found[1])).name else None


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoints of a run, oldest first. Unfinished ones end in .partial and are left out."""
    place = run_dir / "checkpoints"
    folders = [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []
    return sorted((path for path in folders if iteration_of(path) is not None), key=iteration_of)


def read_state(folder: Path) -> State | OldState:
    """The content of state.json. Raises UserError if it is damaged, or has a format that this code does not read."""
    path = folder / "state.json"
    format = read_json(path, Header, REMEDY).format
    if format not in (OLD_FORMAT, FORMAT):
        raise UserError(f"{path} has format {format}, this version reads {OLD_FORMAT} and {FORMAT}: {REMEDY}")
    return read_json(path, State if format == FORMAT else OldState, REMEDY)


def sizes_of(state: State | OldState) -> dict[str, int]:
    """{file: its size in bytes}."""
    return {name: entry if isinstance(entry, int) else entry[0] for name, entry in state.files.items()}


def damage(folder: Path) -> str | None:
    """A phrase that says what is wrong with a checkpoint, or None if every file is there in its full size."""
    try:
        state = read_state(folder)
    except UserError as error:
        return str(error).replace(f"{folder}/", "").removesuffix(f": {REMEDY}")
    for name, size in sizes_of(state).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def content_damage(folder: Path, share: int = 0, of: int = 1, below: str = "") -> str | None:
    """A phrase that says what is wrong with the contents of some files of a checkpoint, or None.

    Args:
        share, of: check every `of`-th file, beginning with number `share`. The largest file has number 0.
        below: check only files whose names begin so.
    """
    state = read_state(folder)
    if state.format == OLD_FORMAT:
        return None
    names = [name for name in state.files if name.startswith(below)]
    for name in sorted(names, key=lambda name: -state.files[name][0])[share::of]:
        try:
            if checksum(folder / name) != state.files[name][1]:
                return f"{name} is not what was saved: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def check_policy_contents(folder: Path) -> dict[str, int]:
    """Read all files of a checkpoint's policy and compare their checksums. All ranks together, and they share the work.

    Args:
        folder: `policy` of a checkpoint. Nothing is recorded about other folders, so they are not read.

    Returns:
        {name: CRC-32} of the files that were compared.

    Raises:
        UserError: a file is not what was saved.
    """
    checkpoint = folder.parent
    if folder.name != "policy" or not (checkpoint / "state.json").exists():
        return {}
    found = all_gather_lists([content_damage(checkpoint, rank(), world_size(), "policy/")])
    if wrong := next(filter(None, found), None):
        raise UserError(f"{checkpoint} is damaged ({wrong}): copy it again, or give another checkpoint")
    state = read_state(checkpoint)
    if state.format == OLD_FORMAT:
        return {}
    policy_files = {name: entry for name, entry in state.files.items() if name.startswith("policy/")}
    return {name.removeprefix("policy/"): checksum for name, (_, checksum) in policy_files.items()}


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint that is not damaged. Damaged ones are reported. All ranks together.

    Raises:
        UserError: there is none.
    """
    # rank 0 decides for all, because a shared folder can look different on other nodes for a while
    for folder in reversed(all_gather_lists(complete_checkpoints(run_dir) if rank() == 0 else [])):
        found = all_gather_lists([damage(folder) if rank() == 0 else None])[0]
        if found is None:
            found = next(filter(None, all_gather_lists([content_damage(folder, rank(), world_size())])), None)
        if found is None:
            return folder
        print0(f"WARNING: {folder} is damaged ({found}) and is not used")
    raise UserError(
        f"--resume {run_dir}: no complete checkpoint was saved there; start in another folder, or remove this one"
    )


def check_writable(folder: Path) -> None:
    """Raise UserError if the folder, or the first of its parents that exists, cannot be written."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"the run folder {folder} cannot be written, because {place} is not a folder or you may not write there: "
            "choose another --run_dir or change the permissions"
        )


def on_rank_0(action, *arguments) -> None:
    """Call action(*arguments) on rank 0. If it raises UserError, every rank raises it. All ranks together."""
    error = None
    if rank() == 0:
        try:
            action(*arguments)
        except UserError as failure:
            error = failure
    message = all_gather_lists([None if error is None else str(error)])[0]
    if message is not None:
        raise UserError(message) from error


def open_run(run_dir: str | None, resume: str | None, default: str, flags: dict[str, Any]) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to resume from. All ranks together.

    Args:
        run_dir, resume: the flags, or None.
        default: the folder of a new run without run_dir.
        flags: all flags of this start. Changes to a resumed run are printed.

    Returns:
        the folder, and None instead of a checkpoint for a new run, whose folder begin_run() creates.

    Raises:
        UserError: the same on every rank. The folder of a new run exists, there is nothing to resume, the folder
            cannot be written, another process writes there, or the flags do not fit the resumed run.
    """
    if resume:
        if run_dir and Path(run_dir) != Path(resume):
            raise UserError(f"--run_dir {run_dir} and --resume {resume} name two folders: give only --resume")
        on_rank_0(hold_run, Path(resume), flags)
        return Path(resume), latest_checkpoint(Path(resume))
    folder = Path(all_gather_lists([run_dir or default])[0])  # the default has the time of rank 0's clock
    on_rank_0(check_new, folder)
    return folder, None


def hold_run(folder: Path, flags: dict[str, Any]) -> None:
    """Take the lock of a run that is resumed. Raises UserError if it cannot be resumed here. Only on rank 0."""
    for change in check_resumed(folder, flags):
        print(f"{folder} resumes with {change}", flush=True)
    check_writable(folder)
    hold_folder(folder, f"--resume {folder}")


def check_new(folder: Path) -> None:
    """Raise UserError if the folder of a new run is not empty, or cannot be written."""
    check_free(folder, f"--run_dir {folder}")
    if is_taken(folder, apart_from=(LOCK,)):
        if complete_checkpoints(folder):
            remedy = f"pass --resume {folder} to continue it, or another --run_dir"
        elif (folder / "args.json").is_file():
            remedy = "its run saved nothing, so remove it or give another --run_dir"
        else:
            remedy = "it holds no run, so give another --run_dir"
        raise UserError(f"--run_dir {folder} exists already: {remedy}")
    check_writable(folder)


def begin_run(run_dir: Path, checkpoint: Path | None) -> None:
    """Create the folder of a new run. All ranks together, after set-up.

    Raises:
        UserError: another process has created it in the meantime. The same on every rank.
    """
    if checkpoint is None:
        on_rank_0(make_run, run_dir)


def make_run(folder: Path) -> None:
    """Create and lock the folder of a new run. Only on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    hold_folder(folder, f"--run_dir {folder}")
    check_new(folder)


def trained_shapes(engine: Engine) -> dict[str, list[int]]:
    """Names and whole shapes of the trained parameters, in the model's order."""
    sharded = engine.zero_optimization_stage() == 3
    return {
        name: list(parameter.ds_shape if sharded else parameter.shape)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def adapter_settings(engine: Engine) -> dict | None:
    """The adapter_config.json without the place of the base, or None without an adapter."""
    config = engine.module.files.adapter_config
    if config is None:
        return None
    settings = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    return json.loads(json.dumps(settings))  # as it is read back: lists instead of tuples


def check_same_model(engine: Engine, state: State, folder: Path) -> None:
    """Raise UserError if a run would resume with another base, adapter or set of trained weights."""
    if state.trained != trained_shapes(engine):
        raise UserError(
            f"{folder} was written by a run that trains other weights: pass the same --model_path, --lora_rank, "
            "--lora_scope and --critic"
        )
    check_base(state.base, engine.module.files.base, str(folder), "the one in --model_path")
    saved = state.adapter and {key: value for key, value in state.adapter.items() if key != "revision"}
    if saved is not None and saved != (adapter_settings(engine) or {}):
        raise UserError(f"{folder} was written with another adapter_config.json: restore the one that --lora_path had")


@contextlib.contextmanager
def written_by_all(partial: Path, what: str) -> Iterator[None]:
    """If one rank cannot write, raise UserError on all ranks and remove the partial files.

    torch reports a full disk as RuntimeError, and safetensors as SafetensorError.
    """
    error = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as failure:
        error = failure
    message = agree(None if error is None else f"{error}")
    if message is not None:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{what} could not be written ({message}): fix that, then continue with --resume") from error


def reach_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, final: Path, state: dict, checksums: dict[str, int]) -> None:
    """Write state.json with sizes and checksums of all files, wait for the disk, and rename the folder.

    Args:
        checksums: {name: CRC-32} of files whose checksum is known already.
    """
    contents = sorted(partial.rglob("*"))
    files = {}
    for path in filter(Path.is_file, contents):
        name = str(path.relative_to(partial))
        files[name] = [path.stat().st_size, checksums[name] if name in checksums else checksum(path)]
    (partial / "state.json").write_text(json.dumps(state | {"format": FORMAT, "version": VERSION, "files": files}))
    for path in (*contents, partial / "state.json", partial):
        reach_disk(path)
    replaced = final.with_name(final.name + ".replaced.partial")
    if os.path.lexists(final):  # a damaged one, which is removed when the new one has its name
        os.replace(final, replaced)
    os.replace(partial, final)
    reach_disk(final.parent)
    remove(replaced)


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one. The target of a link stays."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Delete the checkpoints that are older than the newest `keep` undamaged ones. 0 keeps all.

    Links stay, because somebody has moved the checkpoint that they lead to.

    Args:
        newest: the checkpoint that was just written. Later ones are not looked at.
    """
    own = [path for path in complete_checkpoints(run_dir) if not path.is_symlink()]
    own = own[: own.index(newest) + 1]
    undamaged = [path for path in own if damage(path) is None]
    if not 0 < keep <= len(undamaged):
        return
    oldest_kept = own.index(undamaged[-keep])
    for old in own[:oldest_kept]:
        shutil.rmtree(old)


def check_finite(engine: Engine, critic: StateCritic | None, iteration: int, run_dir: Path) -> None:
    """Raise UserError on every rank if a trained weight or moment of any rank is not finite. All ranks together."""
    found = None
    for shard in local_shards(engine):
        if key := first_not_finite(shard.tensors):
            found = f"{shard.name} ({key})"
            break
    if critic is not None and found is None:
        found = first_not_finite({f"critic.{name}": tensor for name, tensor in critic.net.state_dict().items()})
    found = next(filter(None, all_gather_lists([found])), None)
    if found is not None:
        raise UserError(
            f"{found} is not finite after iteration {iteration} and is not saved, but earlier checkpoints in {run_dir} "
            "are kept: lower the learning rate and --resume"
        )


def save_checkpoint(
    engine: Engine,
    run_dir: Path,
    iteration: int,
    global_step: int,
    env_states: list[dict],
    keep: int,
    critic: StateCritic | None = None,
) -> Path:
    """Write one checkpoint and delete all but the newest `keep` (0 keeps all). All ranks together.

    Args:
        env_states: one entry per env of this rank.
        critic: the critic outside the engine, the same on every rank, or None.

    Raises:
        UserError: the disk is full, the folder cannot be written, or weights are not finite. Earlier checkpoints are
            unchanged.
    """
    check_finite(engine, critic, iteration, run_dir)
    final = checkpoint_dir(run_dir, iteration)
    partial = final.with_name(final.name + ".partial")
    env_states = all_gather_lists(env_states)
    weights = whole_state_dict(engine, keep=rank() == 0, without_base=saves_adapter_alone(engine.module))
    with written_by_all(partial, str(final)):
        if rank() == 0:
            for abandoned in final.parent.glob("*.partial"):
                remove(abandoned)
            (partial / "optimizer").mkdir(parents=True)
            save_policy(engine.module, weights, partial / "policy")
            save_tree(env_states, partial / "envs.safetensors")
            if critic is not None:
                save_tree(critic.state_dict(), partial / "critic.safetensors")
    own_file = shard_file(partial / "optimizer", rank())
    with written_by_all(partial, str(final)):
        save_shards(engine, partial / "optimizer")
        written = [(str(own_file.relative_to(partial)), checksum(own_file))] if own_file.is_file() else []
    checksums = dict(all_gather_lists(written))
    state = {"iteration": iteration, "global_step": global_step, "trained": trained_shapes(engine)}
    state |= {"base": engine.module.files.base, "adapter": adapter_settings(engine)}
    with written_by_all(partial, str(final)):
        if rank() == 0:
            put_in_place(partial, final, state, checksums)
            prune(run_dir, final, keep)
    return final


def load_checkpoint(engine: Engine | None, folder: Path, envs: slice, num_envs: int) -> tuple[int, int, list[dict]]:
    """Restore weights and optimizer. Returns iteration, global_step and the states of `envs`. All ranks together.

    Learning rates and weight decay are those of this run's flags.

    Args:
        engine: None on a rank that does not train. num_envs: over all ranks.

    Raises:
        UserError: the checkpoint has another number of envs, another model or other trained weights than this run.
    """
    state = read_state(folder)
    if engine is not None:
        check_same_model(engine, state, folder)
    path = folder / ("envs.safetensors" if state.format == FORMAT else "envs.pt")
    env_states = load_tree(path) if state.format == FORMAT else load_old_tree(path)
    if not isinstance(env_states, list) or not all(isinstance(one, dict) for one in env_states):
        raise UserError(f"{path} does not hold a list of envs: {REMEDY}")
    if len(env_states) != num_envs:
        raise UserError(f"{folder} holds {len(env_states)} envs, this run has {num_envs}: pass the same --num_envs")
    shards = [folder / name for name in state.files if name.startswith("optimizer/")]
    if engine is not None:
        load_shards(engine, shards)
    return state.iteration, state.global_step, env_states[envs]


def load_critic(critic: StateCritic, folder: Path) -> None:
    """Restore the critic outside the engine. Raises UserError if the checkpoint has none that fits."""
    is_old = read_state(folder).format == OLD_FORMAT
    path = folder / ("critic.pt" if is_old else "critic.safetensors")
    state = load_old_tree(path) if is_old else load_tree(path)
    try:
        critic.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} does not fit this run's critic ({error_text(error)[:200]}): {REMEDY}") from error
