"""Save and resume.

    <run_dir>/checkpoints/iteration_000004/
        deepspeed/     weights, master weights and optimizer moments, as DeepSpeed shards them
        policy/        the published layout (pretrained.py): what evaluation and other code bases load
        state.json     iteration, global_step, number of ranks, ZeRO stage, names of what is trained
        envs.pt        where every env stood: stream position, episode, actions so far

Everything random is a function of (seed, iteration), so no generator state is kept. A checkpoint is written beside
its place and renamed when it is whole: a folder with its final name is complete.
"""

import json
import os
import shutil
from pathlib import Path

import deepspeed
import torch

from vla.distributed import UserError, all_gather_lists, barrier, rank, world_size
from vla.pretrained import save_policy, saves_adapter_alone
from vla.stages import whole_state_dict


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"iteration_{iteration:06d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first. What is still being written, or was when its run was killed, ends in .partial."""
    return sorted(path for path in (run_dir / "checkpoints").glob("iteration_*") if path.suffix != ".partial")


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest complete checkpoint. Raises UserError where there is none."""
    found = complete_checkpoints(run_dir)
    if not found:
        raise UserError(
            f"--resume {run_dir}: there is no complete checkpoint in {run_dir}/checkpoints; start a new run"
        )
    return found[-1]


def open_run(run_dir: str | None, resume: str | None, default: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from (None for a new run, whose folder the logger makes).

    Raises:
        UserError: the folder of a new run exists, or there is nothing to resume; the same on every rank.
    """
    if resume:
        if run_dir and Path(run_dir) != Path(resume):
            raise UserError(f"--run_dir {run_dir} and --resume {resume} name two folders: give only --resume")
        return Path(resume), latest_checkpoint(Path(resume))
    folder = Path(all_gather_lists([run_dir or default])[0])  # rank 0's clock names it
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--run_dir {folder} exists already: pass --resume {folder} to go on with it, or another --run_dir"
        )
    return folder, None


def trainable_names(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Names of the parameters that are trained, in the model's order."""
    return [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    run_dir: Path,
    iteration: int,
    global_step: int,
    env_states: list[dict],
    keep: int,
) -> Path:
    """Write one checkpoint and delete all but the newest `keep` (0 = keep all). All ranks together.

    Args:
        env_states: one entry per env of this rank.
    """
    final = checkpoint_dir(run_dir, iteration)
    partial = final.with_name(final.name + ".partial")
    env_states = all_gather_lists(env_states)
    weights = whole_state_dict(engine, keep=rank() == 0, without_base=saves_adapter_alone(engine.module))
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        save_policy(engine.module, weights, partial / "policy")
        torch.save(env_states, partial / "envs.pt")
    barrier()
    # frozen weights are not kept: a resumed run builds them again from --model_path
    engine.save_checkpoint(str(partial / "deepspeed"), tag="engine", save_latest=False, exclude_frozen_parameters=True)
    barrier()
    if rank() == 0:
        state = {
            "iteration": iteration,
            "global_step": global_step,
            "num_ranks": world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "trainable": trainable_names(engine),
        }
        (partial / "state.json").write_text(json.dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in complete_checkpoints(run_dir)[:-keep] if keep else []:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, folder: Path, first_env: int, local_num_envs: int
) -> tuple[int, int, list[dict]]:
    """Restore weights and optimizer. Returns iteration, global_step and this rank's env states.

    Raises:
        UserError: another number of ranks or envs, ZeRO stage or set of trained weights than the checkpoint's.
    """
    state = json.loads((folder / "state.json").read_text())
    if state["num_ranks"] != world_size():
        raise UserError(
            f"{folder} was written by {state['num_ranks']} ranks and this run has {world_size()}: "
            f"launch with --num_gpus {state['num_ranks']}"
        )
    if state["zero_stage"] != engine.zero_optimization_stage():
        raise UserError(
            f"{folder} was written under ZeRO stage {state['zero_stage']}: resume with that --deepspeed_config"
        )
    # frozen weights are not in the file, so DeepSpeed has to load leniently: what must fit is checked here
    if state["trainable"] != trainable_names(engine):
        raise UserError(
            f"{folder} was written with other weights trained: pass the same --model_path, --lora_rank and --lora_scope"
        )
    env_states = torch.load(folder / "envs.pt", weights_only=False)
    if len(env_states) != local_num_envs * world_size():
        num_envs = local_num_envs * world_size()
        raise UserError(f"{folder} holds {len(env_states)} envs, this run has {num_envs}: pass the same --num_envs")
    # DeepSpeed answers a missing folder with (None, None) and a missing tag with an empty AssertionError
    if not (folder / "deepspeed" / "engine").is_dir():
        raise UserError(
            f"{folder} is incomplete: deepspeed/engine is missing; delete it to fall back to the one before"
        )
    # DeepSpeed restores the rates that were saved; flags of the resumed run win
    settings = [{key: group[key] for key in ("lr", "weight_decay")} for group in engine.optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(folder / "deepspeed"), tag="engine", load_module_strict=False)
    if path is None:
        raise UserError(
            f"DeepSpeed could not read {folder}/deepspeed: delete {folder} to fall back to the checkpoint before"
        )
    for group, kept in zip(engine.optimizer.param_groups, settings):
        group.update(kept)
    return state["iteration"], state["global_step"], env_states[first_env : first_env + local_num_envs]
