"""Which flags a run may change when it goes on, and which would make its policy, its world or its log another's."""

import json
from collections.abc import Iterable
from pathlib import Path

from schemas import UserError, read_json
from schemas.runs import SavedFlags
from vla import ROOT
from vla.start.flag_files import resolved

# what names a run or a start, and says nothing about either
OF_A_START = ("config", "run_dir", "resume", "local_rank")

# flag -> what would be another's
FIXED = {
    # the policy
    "model_type": "the policy would be read in another way",
    "unnorm_key": "its actions would be decoded with other statistics",
    "image_resize": "it would see other pictures",
    "oft_stop_token": "its prompt would end differently",
    "chunk_size": "it would decide on another number of actions",
    "dtype": "its arithmetic would be another",
    "lora_path": "its adapter would be another",
    "merge_lora": "its base would be another",
    "lora_rank": "other weights would be trained",
    "lora_alpha": "its adapter would be scaled differently",
    "lora_scope": "other weights would be trained",
    "critic": "the critic would be another",
    # its world
    "env_id": "the task would be another",
    "instruction": "the task would be another",
    "obj_set": "its episodes would be others",
    "asset_pack": "its pictures would be others",
    "protocol": "its scenes would be others",
    "image_size": "its pictures would be others",
    "sim_freq": "its physics would be another",
    "sim_backend": "its physics would be another",
    "max_episode_steps": "its episodes would be cut elsewhere",
    "auto_reset": "its episodes would begin elsewhere",
    "ignore_terminations": "its episodes would end elsewhere",
    # which episodes and samples come next
    "seed": "what is random would be drawn anew",
    "num_envs": "the saved envs are that many",
    "group_size": "its groups would be others",
    "updates_per_iteration": "iterations would count other updates",
    "batch_size": "updates would see other samples",
}

# what older versions lack and did as the default does: train_sft.py the first two, train_ppo.py the last
ADDED_LATER = ("instruction", "sim_backend", "critic")

# flag -> why it may change; every change is said
MAY_CHANGE = dict.fromkeys(
    ("model_path", "demos", "asset_dir"), "where things lie; that the model is the same one is checked by its contents"
)
MAY_CHANGE |= dict.fromkeys(("num_iterations", "total_timesteps", "num_updates"), "how far the run goes")
MAY_CHANGE |= dict.fromkeys(
    ("save_freq", "keep_checkpoints", "eval_freq", "logger_backends", "project_name", "experiment_name", "export_dir"),
    "what is written down, when and where",
)
MAY_CHANGE |= dict.fromkeys(
    ("eval_temperature", "num_eval_episodes", "num_eval_envs"), "how success is measured; training does not see it"
)
MAY_CHANGE |= dict.fromkeys(
    (
        "num_env_workers",
        "worker_timeout",
        "pipeline_stages",
        "render_backend",
        "micro_batch_size",
        "gradient_checkpointing",
        "deepspeed_config",
        "offload",
    ),
    "how the same work is shared out",
)
MAY_CHANGE |= dict.fromkeys(
    (
        "num_steps",
        "temperature",
        "gamma",
        "gae_lambda",
        "bootstrap",
        "norm_adv",
        "logprob_level",
        "clip_ratio_low",
        "clip_ratio_high",
        "dual_clip",
        "value_clip",
        "huber_delta",
        "vf_coef",
        "ent_coef",
        "kl_coef",
        "fan_coef",
        "fan_sigma",
        "update_epochs",
        "num_minibatches",
        "critic_warmup_iterations",
        "critic_epochs",
        "target_kl",
        "grpo_baseline",
        "grpo_scale",
        "length_norm",
        "dynamic_sampling",
        "max_resamples",
        "label_sigma",
        "image_aug",
    ),
    "how the policy learns from here on",
)
MAY_CHANGE |= dict.fromkeys(
    ("learning_rate", "schedule", "warmup_updates", "value_learning_rate", "weight_decay", "max_grad_norm"),
    "how large its steps are from here on",
)
# may lie elsewhere: what it adds to the weights, or its settings where it is trained on, are checked by contents
MAY_MOVE = ("lora_path",)
MAY_GROW = {"max_prompt_length": "longer padding changes no action, but a shorter one may not hold its prompts"}


def changed_flags(saved: dict, now: dict) -> list[str]:
    """What a run that goes on changes, one text per flag: "--learning_rate 0.0001 -> 5e-05".

    Args:
        saved: args.json. now: all flags of this start; those that args.json lacks came with a newer version.

    Raises:
        UserError: a flag that has to stay. It is named, with both values.
    """
    changes = []
    for name, value in json.loads(json.dumps(now)).items():
        if name in OF_A_START or name not in saved or same_value(name, saved[name], value):
            continue
        change = f"--{name} {shown(saved[name])} -> {shown(value)}"
        if name in MAY_GROW:
            if value < saved[name]:
                raise UserError(f"{change} can not go on: {MAY_GROW[name]}, so leave it out or raise it")
        elif name not in MAY_CHANGE and not (name in MAY_MOVE and saved[name] and value):
            raise UserError(f"{change} can not go on: {FIXED[name]}, so leave it out or start a new run")
        changes.append(change)
    return changes


def check_present(saved: dict, wanted: Iterable[str], source: Path | str) -> None:
    """Raise UserError where args.json lacks a flag without which the policy or its world would be the script's default.

    Args:
        saved: its content. wanted: names of flags. source: the file, as the sentence names it.
    """
    for name in wanted:
        if name not in saved and name not in ADDED_LATER:
            raise UserError(f"{source} has no {name}: copy the run folder again, or write the value into it")


def same_value(name: str, saved: object, now: object) -> bool:
    """Paths are the same where they lead to the same place."""
    if name == "lora_path" and isinstance(saved, str) and isinstance(now, str):
        return Path(saved).resolve() == Path(now).resolve() or saved == now
    return saved == now


def shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def check_resumed(run_dir: Path, now: dict) -> list[str]:
    """changed_flags() of a run folder.

    Raises:
        UserError: args.json can not be read, lacks a flag that has to stay, or has another value of it.
    """
    remedy = "copy the run folder again, or start a new run"
    saved = read_json(run_dir / "args.json", SavedFlags, remedy)
    check_present(saved, [name for name in FIXED if name in now], run_dir / "args.json")
    folders = (ROOT, *run_dir.resolve().parents)  # as vla/start/flag_files.py reads them
    return changed_flags({name: resolved(name, value, folders) for name, value in saved.items()}, now)
