"""Save and resume, on any number of ranks and under any ZeRO stage.

    <run_dir>/lock             held by the process that writes here (schemas/lock.py)
    <run_dir>/checkpoints/iteration_000004/
        policy/                the published layout (models/saving.py): what evaluation and other code bases load
        optimizer/             one file per rank: fp32 weights and Adam's moments, see optimizer_state.py
        envs.safetensors       where every env stood: stream position, episode, actions so far; knows nothing of ranks
        critic.safetensors     the critic beside the engine, where there is one (critics.py)
        state.json             iteration, global_step, what is trained, size and CRC-32 of every file above; last

Everything random is a function of (seed, iteration), so no generator state is kept. A checkpoint is written beside its
place and renamed when all of it has reached the disk: a folder with its final name was whole once. Files are read
against their sizes and checksums before a run goes on: what was damaged since is passed over for the checkpoint before,
and said. The ranks share that work: of the 105 GB of a 7B model that trains whole, each of 8 ranks reads 13, which
takes 6 s from memory (2.2 GB/s on one core, 2026-11) and else as long as the disk takes.

Nothing here is read with pickle, so a checkpoint of a stranger cannot run code (files/trees.py).
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

from schemas import UserError, read_json
from schemas.lock import LOCK, check_free, hold_folder
from schemas.runs import Header, OldState, State
from vla import VERSION
from vla.distributed import Engine, agree, all_gather_lists, print0, rank, world_size
from vla.files.tensors import first_not_finite
from vla.files.trees import REMEDY, checksum, load_old_tree, load_tree, one_line, save_tree
from vla.models.published import check_base
from vla.models.saving import save_policy, saves_adapter_alone
from vla.start.resume import check_resumed
from vla.training.critics import StateCritic
from vla.training.optimizer_state import load_shards, local_shards, save_shards, shard_file
from vla.training.stages import whole_state_dict

FORMAT = 3  # of state.json and the files beside it
OLD_FORMAT = 2  # without checksums; envs.pt and critic.pt are pickled, and read as data alone
FOLDER = re.compile(r"iteration_(\d{6,})")


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"iteration_{iteration:06d}"


def iteration_of(folder: Path) -> int | None:
    """Of a checkpoint, by its name; None for other folders, such as a copy that somebody keeps beside it."""
    found = FOLDER.fullmatch(folder.name)
    return int(found[1]) if found and folder.name == checkpoint_dir(folder, int(found[1])).name else None


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first. What is still being written, or was when its run was killed, ends in .partial."""
    place = run_dir / "checkpoints"
    folders = [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []
    return sorted((path for path in folders if iteration_of(path) is not None), key=iteration_of)


def read_state(folder: Path) -> State | OldState:
    """state.json of a checkpoint. Raises UserError for one that is damaged, or of a format that is not known here."""
    path = folder / "state.json"
    found = read_json(path, Header, REMEDY).format
    if found not in (OLD_FORMAT, FORMAT):
        raise UserError(
            f"{path} has format {found}, this version of the code reads {OLD_FORMAT} and {FORMAT}: {REMEDY}"
        )
    return read_json(path, State if found == FORMAT else OldState, REMEDY)


def sizes_of(state: State | OldState) -> dict[str, int]:
    """Bytes by file."""
    return {name: entry if isinstance(entry, int) else entry[0] for name, entry in state.files.items()}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has its final name, in words; None where every file has its full size."""
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
    """What is wrong with the contents of every `of`-th file, the largest first, from number `share` on.

    Args:
        below: only files whose names begin so.
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
            return f"{name} can not be read ({error.strerror})"
    return None


def check_policy_contents(folder: Path) -> None:
    """Raises UserError where the policy of a checkpoint is not what was saved; of other folders nothing is known.
    All ranks together."""
    checkpoint = folder.parent
    if folder.name != "policy" or not (checkpoint / "state.json").exists():
        return
    found = all_gather_lists([content_damage(checkpoint, rank(), world_size(), "policy/")])
    if wrong := next(filter(None, found), None):
        raise UserError(f"{checkpoint} is damaged ({wrong}): copy it again, or give another checkpoint")


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest whole checkpoint; damaged ones are named and passed over. All ranks together.

    Raises:
        UserError: there is none.
    """
    # what rank 0 finds: shared folders do not look alike on all nodes at all times
    for folder in reversed(all_gather_lists(complete_checkpoints(run_dir) if rank() == 0 else [])):
        found = all_gather_lists([damage(folder) if rank() == 0 else None])[0]
        if found is None:
            found = next(filter(None, all_gather_lists([content_damage(folder, rank(), world_size())])), None)
        if found is None:
            return folder
        print0(f"WARNING: {folder} is damaged ({found}) and is passed over")
    raise UserError(
        f"--resume {run_dir}: no complete checkpoint was saved there; start in another folder, or remove this one"
    )


def check_writable(folder: Path) -> None:
    """Raises UserError where neither the folder nor the first of its parents that exists can be written."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"the run folder {folder} can not be written: {place} is no folder, or not yours to write to; "
            "choose another --run_dir or mend its permissions"
        )


def on_rank_0(action, *arguments) -> None:
    """action(*arguments) on rank 0; the UserError that it raises is raised on every rank. All ranks together."""
    error = None
    if rank() == 0:
        try:
            action(*arguments)
        except UserError as failure:
            error = failure
    said = all_gather_lists([None if error is None else str(error)])[0]
    if said is not None:
        raise UserError(said) from error


def open_run(run_dir: str | None, resume: str | None, default: str, flags: dict[str, Any]) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from (None for a new run, whose folder begin_run() makes).

    Args:
        default: the folder of a new run that has no run_dir.
        flags: all of this start; what a run that goes on changes is said.

    Raises:
        UserError: the folder of a new run exists, there is nothing to resume, it can not be written, or another
            process writes there, or it would go on as another run; the same on every rank.
    """
    if resume:
        if run_dir and Path(run_dir) != Path(resume):
            raise UserError(f"--run_dir {run_dir} and --resume {resume} name two folders: give only --resume")
        on_rank_0(hold_run, Path(resume), flags)
        return Path(resume), latest_checkpoint(Path(resume))
    folder = Path(all_gather_lists([run_dir or default])[0])  # rank 0's clock names it
    on_rank_0(check_new, folder)
    return folder, None


def hold_run(folder: Path, flags: dict[str, Any]) -> None:
    """Raises UserError where a run can not go on in this folder; else nobody else can. For rank 0."""
    for change in check_resumed(folder, flags):
        print(f"{folder} goes on with {change}", flush=True)
    check_writable(folder)
    hold_folder(folder, f"--resume {folder}")


def check_new(folder: Path) -> None:
    """Raises UserError where the folder of a new run holds something, or can not be written."""
    check_free(folder, f"--run_dir {folder}")
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        if complete_checkpoints(folder):
            remedy = f"pass --resume {folder} to go on with it, or another --run_dir"
        elif (folder / "args.json").is_file():
            remedy = "its run saved nothing, so remove it or give another --run_dir"
        else:
            remedy = "it holds no run, so give another --run_dir"
        raise UserError(f"--run_dir {folder} exists already: {remedy}")
    check_writable(folder)


def begin_run(run_dir: Path, checkpoint: Path | None) -> None:
    """Make the folder of a new run, which nobody else may have begun meanwhile. All ranks together, after set-up.

    Raises:
        UserError: another process was faster; the same on every rank.
    """
    if checkpoint is None:
        on_rank_0(make_run, run_dir)


def make_run(folder: Path) -> None:
    """begin_run() on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    hold_folder(folder, f"--run_dir {folder}")
    check_new(folder)


def trained_shapes(engine: Engine) -> dict[str, list[int]]:
    """Names and whole shapes of the parameters that are trained, in the model's order."""
    sharded = engine.zero_optimization_stage() == 3
    return {
        name: list(parameter.ds_shape if sharded else parameter.shape)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def adapter_settings(engine: Engine) -> dict | None:
    """What decides how an adapter's weights act, as JSON."""
    config = engine.module.files.adapter_config
    return config and json.loads(json.dumps({k: v for k, v in config.items() if k != "base_model_name_or_path"}))


def check_same_model(engine: Engine, state: State, folder: Path) -> None:
    """Raises UserError where a run would go on with another base, adapter or set of trained weights."""
    if state.trained != trained_shapes(engine):
        raise UserError(
            f"{folder} was written with other weights trained: pass the same --model_path, --lora_rank, "
            "--lora_scope and --critic"
        )
    check_base(state.base, engine.module.files.base, str(folder), "the one in --model_path")
    if state.adapter is not None and state.adapter != (adapter_settings(engine) or {}):
        raise UserError(f"{folder} was written with another adapter_config.json: put the one back that --lora_path had")


@contextlib.contextmanager
def written_by_all(partial: Path, what: str) -> Iterator[None]:
    """What one rank cannot write ends the run on all of them, with nothing half-written left behind."""
    error = None
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as failure:  # the last two: a full disk as torch and safetensors say
        error = failure
    said = agree(None if error is None else f"{error}")
    if said is not None:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{what} could not be written ({said}): mend that, then --resume goes on") from error


def reach_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, final: Path, state: dict, checksums: dict[str, int]) -> None:
    """Write state.json with sizes and checksums of all files, wait for the disk, give the folder its final name."""
    contents = sorted(partial.rglob("*"))
    files = {}
    for path in (path for path in contents if path.is_file()):
        name = str(path.relative_to(partial))
        files[name] = [path.stat().st_size, checksums[name] if name in checksums else checksum(path)]
    (partial / "state.json").write_text(json.dumps(state | {"format": FORMAT, "version": VERSION, "files": files}))
    for path in (*contents, partial / "state.json", partial):
        reach_disk(path)
    replaced = final.with_name(final.name + ".replaced.partial")
    if os.path.lexists(final):  # a damaged one: it goes when the new one is in its place
        os.replace(final, replaced)
    os.replace(partial, final)
    reach_disk(final.parent)
    remove(replaced)


def remove(folder: Path) -> None:
    """A folder, or a link to one: what a link leads to is not ours."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Delete what is older than the newest `keep` whole checkpoints (0 = keep all), up to one that was just written.

    Links stay: somebody moved what they lead to.
    """
    own = [path for path in complete_checkpoints(run_dir) if not path.is_symlink()]
    own = own[: own.index(newest) + 1]
    whole = [path for path in own if damage(path) is None]
    for old in own[: own.index(whole[-keep])] if 0 < keep <= len(whole) else []:
        shutil.rmtree(old)


def check_finite(engine: Engine, critic: StateCritic | None, iteration: int, run_dir: Path) -> None:
    """Raises UserError on every rank where a trained weight or moment is NaN or infinite on any. All ranks together."""
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
            f"{found} is not finite after iteration {iteration} and is not saved: earlier checkpoints in {run_dir} "
            "stay, so lower the learning rate and --resume"
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
    """Write one checkpoint and delete all but the newest `keep` (0 = keep all). All ranks together.

    Args:
        env_states: one entry per env of this rank.
        critic: beside the engine, the same on every rank.

    Raises:
        UserError: the disk is full, the folder can not be written, or weights are not finite; earlier checkpoints are
            as they were.
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
    mine = shard_file(partial / "optimizer", rank())
    with written_by_all(partial, str(final)):
        save_shards(engine, partial / "optimizer")
        written = {str(mine.relative_to(partial)): checksum(mine)} if mine.is_file() else {}
    checksums = {name: value for part in all_gather_lists([written]) for name, value in part.items()}
    state = {"iteration": iteration, "global_step": global_step, "trained": trained_shapes(engine)}
    state |= {"base": engine.module.files.base, "adapter": adapter_settings(engine)}
    with written_by_all(partial, str(final)):
        if rank() == 0:
            put_in_place(partial, final, state, checksums)
            prune(run_dir, final, keep)
    return final


def load_checkpoint(engine: Engine, folder: Path, first_env: int, local_num_envs: int) -> tuple[int, int, list[dict]]:
    """Restore weights and optimizer. Returns iteration, global_step and this rank's env states.

    Learning rates and weight decay are those of this run's flags.

    Raises:
        UserError: another number of envs, model or set of trained weights than the checkpoint's.
    """
    state = read_state(folder)
    check_same_model(engine, state, folder)
    path = folder / ("envs.safetensors" if state.format == FORMAT else "envs.pt")
    env_states = load_tree(path) if state.format == FORMAT else load_old_tree(path)
    if not isinstance(env_states, list) or not all(isinstance(one, dict) for one in env_states):
        raise UserError(f"{path} holds no list of envs: {REMEDY}")
    num_envs = local_num_envs * world_size()
    if len(env_states) != num_envs:
        raise UserError(f"{folder} holds {len(env_states)} envs, this run has {num_envs}: pass the same --num_envs")
    shards = [folder / name for name in state.files if name.startswith("optimizer/")]
    load_shards(engine, shards)
    return state.iteration, state.global_step, env_states[first_env : first_env + local_num_envs]


def load_critic(critic: StateCritic, folder: Path) -> None:
    """Restore the critic beside the engine. Raises UserError where the checkpoint has none that fits."""
    old = read_state(folder).format == OLD_FORMAT
    path = folder / ("critic.pt" if old else "critic.safetensors")
    state = load_old_tree(path) if old else load_tree(path)
    try:
        critic.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} does not fit this run's critic ({one_line(error)[:200]}): {REMEDY}") from error
