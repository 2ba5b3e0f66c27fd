"""Save and resume, on any number of ranks and under any ZeRO stage.

    <run_dir>/checkpoints/iteration_000004/
        policy/        the published layout (pretrained.py): what evaluation and other code bases load
        optimizer/     one file per rank: fp32 weights and Adam's moments, see shards.py
        envs.pt        where every env stood: stream position, episode, actions so far; knows nothing of ranks
        critic.pt      the critic beside the engine, where there is one (state_critic.py)
        state.json     iteration, global_step, what is trained, size of every file above; written last

Everything random is a function of (seed, iteration), so no generator state is kept. A checkpoint is written beside its
place and renamed when all of it has reached the disk: a folder with its final name was whole once. Files are measured
again before they are read: what was cut short since is passed over for the checkpoint before, and said.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError

from schemas import UserError
from vla.distributed import agree, all_gather_lists, print0, rank, world_size
from vla.folders import check_base
from vla.pretrained import save_policy, saves_adapter_alone
from vla.shards import load_shards, save_shards
from vla.stages import whole_state_dict
from vla.state_critic import StateCritic

FORMAT = 2  # of state.json and optimizer/


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"iteration_{iteration:06d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first. What is still being written, or was when its run was killed, ends in .partial."""
    return sorted(path for path in (run_dir / "checkpoints").glob("iteration_*") if path.suffix != ".partial")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has its final name, in words; None where every file has its full size."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return "state.json is missing or cut short"
    if state.get("format") != FORMAT:
        return f"it has format {state.get('format', 1)} and this version of the code reads format {FORMAT}"
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest whole checkpoint; damaged ones are named and passed over. Raises UserError where there is none."""
    for folder in reversed(complete_checkpoints(run_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder
        print0(f"WARNING: {folder} is damaged ({wrong}) and is passed over")
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


def open_run(run_dir: str | None, resume: str | None, default: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from (None for a new run, whose folder the logger makes).

    Raises:
        UserError: the folder of a new run exists, there is nothing to resume, or it can not be written; the same on
            every rank.
    """
    if resume:
        if run_dir and Path(run_dir) != Path(resume):
            raise UserError(f"--run_dir {run_dir} and --resume {resume} name two folders: give only --resume")
        # what rank 0 finds: shared folders do not look alike on all nodes at all times
        error, found = None, None
        if rank() == 0:
            try:
                found = latest_checkpoint(Path(resume))
                check_writable(Path(resume))
            except UserError as failure:
                error = str(failure)
        if said := agree(error):
            raise UserError(said)
        return Path(resume), all_gather_lists([found])[0]
    folder = Path(all_gather_lists([run_dir or default])[0])  # rank 0's clock names it
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if complete_checkpoints(folder):
            remedy = f"pass --resume {folder} to go on with it, or another --run_dir"
        elif (folder / "args.json").is_file():
            remedy = "its run saved nothing, so remove it or give another --run_dir"
        else:
            remedy = "it holds no run, so give another --run_dir"
        raise UserError(f"--run_dir {folder} exists already: {remedy}")
    check_writable(folder)
    return folder, None


def trained_shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    """Names and whole shapes of the parameters that are trained, in the model's order."""
    sharded = engine.zero_optimization_stage() == 3
    return {
        name: list(parameter.ds_shape if sharded else parameter.shape)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


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


def put_in_place(partial: Path, final: Path, state: dict) -> None:
    """Write state.json with the sizes of all files, wait for the disk, give the folder its final name."""
    contents = sorted(partial.rglob("*"))
    files = {str(path.relative_to(partial)): path.stat().st_size for path in contents if path.is_file()}
    (partial / "state.json").write_text(json.dumps(state | {"format": FORMAT, "files": files}))
    for path in (*contents, partial / "state.json", partial):
        reach_disk(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    reach_disk(final.parent)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
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
        UserError: the disk is full or the folder can not be written; earlier checkpoints are as they were.
    """
    final = checkpoint_dir(run_dir, iteration)
    partial = final.with_name(final.name + ".partial")
    env_states = all_gather_lists(env_states)
    weights = whole_state_dict(engine, keep=rank() == 0, without_base=saves_adapter_alone(engine.module))
    with written_by_all(partial, str(final)):
        if rank() == 0:
            for abandoned in final.parent.glob("*.partial"):
                shutil.rmtree(abandoned)
            (partial / "optimizer").mkdir(parents=True)
            save_policy(engine.module, weights, partial / "policy")
            torch.save(env_states, partial / "envs.pt")
            if critic is not None:
                torch.save(critic.state_dict(), partial / "critic.pt")
    with written_by_all(partial, str(final)):
        save_shards(engine, partial / "optimizer")
    state = {"iteration": iteration, "global_step": global_step, "trained": trained_shapes(engine)}
    state["base"] = engine.module.files.base
    with written_by_all(partial, str(final)):
        if rank() == 0:
            put_in_place(partial, final, state)
            for old in complete_checkpoints(run_dir)[:-keep] if keep else []:
                shutil.rmtree(old)
    return final


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, folder: Path, first_env: int, local_num_envs: int
) -> tuple[int, int, list[dict]]:
    """Restore weights and optimizer. Returns iteration, global_step and this rank's env states.

    Learning rates and weight decay are those of this run's flags.

    Raises:
        UserError: another number of envs, set of trained weights or base model than the checkpoint's.
    """
    state = json.loads((folder / "state.json").read_text())
    if state["trained"] != trained_shapes(engine):
        raise UserError(
            f"{folder} was written with other weights trained: pass the same --model_path, --lora_rank, "
            "--lora_scope and --critic"
        )
    check_base(state.get("base"), engine.module.files.base, f"the run in {folder}", "the model loaded now")
    env_states = torch.load(folder / "envs.pt", weights_only=False)
    num_envs = local_num_envs * world_size()
    if len(env_states) != num_envs:
        raise UserError(f"{folder} holds {len(env_states)} envs, this run has {num_envs}: pass the same --num_envs")
    load_shards(engine, folder / "optimizer")
    return state["iteration"], state["global_step"], env_states[first_env : first_env + local_num_envs]
