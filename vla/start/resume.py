"""Which flags may change when a run is resumed, and which would change its policy, its world or its log."""

import json
from collections.abc import Iterable
from pathlib import Path

from schemas import UserError, read_json
from schemas.flags import hulls_before
from schemas.runs import SavedFlags
from vla import ROOT
from vla.start.flag_files import resolved

# flags that only name a run or a start
OF_A_START = ("config", "run_dir", "resume", "local_rank")

# flag -> what a change would do
FIXED = {
    # the policy
    "model_type": "the policy would be read differently",
    "unnorm_key": "its actions would be decoded with other statistics",
    "image_resize": "its images would differ",
    "oft_stop_token": "its prompt would end differently",
    "chunk_size": "it would decide on another number of actions",
    "dtype": "its arithmetic would differ",
    "lora_path": "its adapter would differ",
    "merge_lora": "its base would differ",
    "lora_rank": "other weights would be trained",
    "lora_alpha": "its adapter would be scaled differently",
    "lora_scope": "other weights would be trained",
    "critic": "its critic would differ",
    # its world
    "env_id": "its task would differ",
    "instruction": "its task would differ",
    "reward_mode": "its rewards would differ",
    "obj_set": "its episodes would differ",
    "asset_pack": "its images would differ",
    "protocol": "its scenes would differ",
    "hulls": "its physics would differ",
    "image_size": "its images would differ",
    "sim_freq": "its physics would differ",
    "sim_backend": "its physics would differ",
    "max_episode_steps": "its episodes would be cut elsewhere",
    "auto_reset": "its episodes would start elsewhere",
    "ignore_terminations": "its episodes would end elsewhere",
    # which episodes and samples come next
    "seed": "its random numbers would differ",
    "num_envs": "its saved envs have this number",
    "group_size": "its groups would differ",
    "updates_per_iteration": "its iterations would have other updates",
    "batch_size": "its updates would see other samples",
}

# flags that older versions lack, which behaved like the default (train_sft.py: the first two, train_ppo.py: the third)
ADDED_LATER = ("instruction", "sim_backend", "critic", "reward_mode", "hulls")

# flag -> what it decides. Every change is printed
MAY_CHANGE = dict.fromkeys(
    ("model_path", "demos", "demos_camera", "asset_dir"), "where files are (the contents of the model are checked)"
)
MAY_CHANGE |= dict.fromkeys(("num_iterations", "total_timesteps", "num_updates"), "how far the run goes")
MAY_CHANGE |= dict.fromkeys(
    (
        "save_freq",
        "keep_checkpoints",
        "eval_freq",
        "logger_backends",
        "project_name",
        "experiment_name",
        "export_dir",
        "video_episodes",
        "video_size",
        "push_to_hub",
    ),
    "what is written, when and where",
)
MAY_CHANGE |= dict.fromkeys(
    ("eval_temperature", "num_eval_episodes", "num_eval_envs"), "how success is measured, without effect on training"
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
        "placement",
    ),
    "how the same work is distributed",
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
        "recompute_logprobs",
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
        "rollout_ahead",
    ),
    "how the policy learns from now on",
)
MAY_CHANGE |= dict.fromkeys(
    ("learning_rate", "schedule", "warmup_updates", "value_learning_rate", "weight_decay", "max_grad_norm"),
    "how large its steps are from now on",
)
# may be in another folder: its contents are checked (its weights, or its settings if it is trained further)
MAY_MOVE = ("lora_path",)
MAY_GROW = {"max_prompt_length": "its prompts may not fit, while longer padding would change no action"}


def changed_flags(saved: dict, now: dict) -> list[str]:
    """The flags that a resumed run changes, such as "--learning_rate 0.0001 -> 5e-05".

    Args:
        saved: content of args.json. now: all flags of this start. Flags of a newer version are not in args.json.

    Raises:
        UserError: a flag that must stay has changed. The sentence names it with both values.
    """
    changes = []
    for name, value in json.loads(json.dumps(now)).items():
        if name in OF_A_START or name not in saved or same_value(name, saved[name], value):
            continue
        change = f"--{name} {shown(saved[name])} -> {shown(value)}"
        if name in MAY_GROW:
            if value < saved[name]:
                raise UserError(f"{change} cannot resume, since {MAY_GROW[name]}: leave it out or raise it")
        elif name not in MAY_CHANGE and not (name in MAY_MOVE and saved[name] and value):
            raise UserError(f"{change} cannot resume, since {FIXED[name]}: leave it out or start a new run")
        changes.append(change)
    return changes


def check_present(saved: dict, wanted: Iterable[str], source: Path | str) -> None:
    """Raise UserError if args.json lacks a flag that would otherwise get the default of the script.

    Args:
        saved: content of args.json. wanted: names of flags. source: the file, as the sentence names it.
    """
    for name in wanted:
        if name not in saved and name not in ADDED_LATER:
            raise UserError(f"{source} has no {name}: copy the run folder again, or write the value into it")


def same_value(name: str, saved: object, now: object) -> bool:
    """Whether two values of a flag are the same. Paths are the same if they lead to the same place."""
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
        UserError: args.json cannot be read, or it lacks a flag that must stay, or has another value of it.
    """
    remedy = "copy the run folder again, or start a new run"
    saved = read_json(run_dir / "args.json", SavedFlags, remedy)
    saved |= hulls_before(saved)
    check_present(saved, [name for name in FIXED if name in now], run_dir / "args.json")
    folders = (ROOT, *run_dir.resolve().parents)  # like vla/start/flag_files.py
    return changed_flags({name: resolved(name, value, folders) for name, value in saved.items()}, now)
