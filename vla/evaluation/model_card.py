"""Export of a finished policy into a folder of its own, with a card that says how it was made.

The folder has the published layout (models/saving.py). An adapter is merged into the weights. Another run can start
from the folder.
"""

import math
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import torch

from schemas import UserError, read_json
from schemas.runs import Description
from vla.distributed import agree, rank
from vla.evaluation.settings import FAMILY
from vla.evaluation.statistics import wilson_interval
from vla.files.run_lines import read_evaluations, read_lines
from vla.models.policy import VLAPolicy
from vla.models.saving import save_policy
from vla.text import counted, markdown_code, markdown_text, without_places

WEIGHTS = re.compile(r"(?:adapter_)?model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
BESIDE = re.compile(  # other files of published policies
    r"(?:config|generation_config|preprocessor_config|processor_config|dataset_statistics|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|adapter_config|adapter_base|solovla)\.json"
    r"|tokenizer\.model|value_head\.safetensors|README\.md|LICENSE(?:\.\w+)?|\.gitattributes"
)


def export_folder(run_dir: Path, export_dir: str | None, named: bool) -> Path:
    """The folder for the final policy: export_dir, or a folder in the run.

    Args:
        named: whether the user gave export_dir on the command line of this start, not in a file.

    Raises:
        UserError: the folder holds something that is not a policy, or a policy that the user did not name.
    """
    if export_dir is None:
        return run_dir / "export"
    folder = Path(export_dir)
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if os.path.lexists(folder):
        if foreign := foreign_file(folder):
            raise UserError(
                f"--export_dir {folder} holds something other than a policy ({foreign}): name another folder"
            )
        if not named:
            raise UserError(
                f"export_dir {folder} holds a policy already: give --export_dir {folder} yourself to replace it"
            )
    return folder


def foreign_file(folder: Path) -> str | None:
    """The first file that does not belong to a policy, or what else is wrong. None if the folder is only a policy."""
    if not folder.is_dir():
        return "a file"
    has_weights = False
    for path in sorted(folder.iterdir()):
        is_weights = path.is_file() and WEIGHTS.fullmatch(path.name) is not None
        is_beside = path.is_file() and BESIDE.fullmatch(path.name) is not None
        if not is_weights and not is_beside:
            return path.name
        has_weights = has_weights or is_weights
    return None if has_weights else "no weights"


def export_policy(
    policy: VLAPolicy, weights: dict[str, torch.Tensor], run_dir: Path, folder: Path, text: str | None = None
) -> None:
    """Write `folder` completely or not at all, and replace an older policy. All ranks together, after the last metrics.

    Args:
        weights: stages.whole_state_dict() on rank 0. Other ranks can pass anything.
        text: the text beside the policy. None writes card().

    Raises:
        UserError: the folder cannot be written. An older policy is unchanged.
    """
    error = None
    if rank() == 0:
        try:
            replaced = replace_policy(policy, weights, folder, text or card(run_dir, folder))
        except (OSError, RuntimeError, UserError) as failure:  # RuntimeError: how safetensors reports a full disk
            error = failure
    if message := agree(None if error is None else str(error)):
        raise UserError(f"the policy could not be written to {folder} ({message}): fix that and --resume") from error
    if rank() == 0:
        print(f"policy      {folder}{', which replaces the one that was there' if replaced else ''}", flush=True)


def replace_policy(policy: VLAPolicy, weights: dict[str, torch.Tensor], folder: Path, text: str) -> bool:
    """export_policy() on rank 0. Returns whether there was a policy before.

    Temporary files are in a new folder beside `folder`, so nothing else is overwritten.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_policy(policy, weights, own / "new", merge_lora=True)
        (own / "new" / "README.md").write_text(text)
        exists = os.path.lexists(folder)
        if exists:
            os.replace(folder, own / "old")
        try:
            os.replace(own / "new", folder)
        except OSError:
            if exists:
                os.replace(own / "old", folder)
            raise
        return exists and (own / "old" / "config.json").is_file()
    finally:
        shutil.rmtree(own, ignore_errors=True)


def evaluate_command(flags: dict, folder: str) -> str:
    """The evaluate.py command that measures the card's success. The folder knows the model and its world."""
    setting = f"{flags['env_id'].removeprefix(FAMILY)}:{flags['obj_set']}"
    words = ["--checkpoint", folder, "--settings", setting, "--no-ignore_terminations"]
    words += ["--num_episodes", flags["num_eval_episodes"], "--temperature", flags["eval_temperature"]]
    return f"python evaluate.py {shlex.join(map(str, words))}"


def measured(run_dir: Path) -> str:
    """Success in the last evaluation, such as "0.250 [0.17, 0.35] on 64"."""
    evaluations = read_evaluations(run_dir)
    if not evaluations:
        return "not known, on no"
    success, episodes = evaluations[-1]["eval/success_once"], evaluations[-1]["eval/num_episodes"]
    low, high = wilson_interval(success, episodes)
    return f"{success:.3f} [{low:.2f}, {high:.2f}] on {episodes:.0f}"


def card(run_dir: Path, folder: Path, repo: str | None = None) -> str:
    """A description of the run as Markdown. If the run was resumed, the card has the commands of all its starts.

    Args:
        folder: the folder of the policy, in the run folder or elsewhere.
        repo: the name that the policy gets on the Hub, if it goes there.
    """
    inside = run_dir in folder.parents
    name = repo or (run_dir.resolve().name if inside else folder.name)
    place = repo or (f"runs/{name}/{folder.name}" if inside else f"checkpoints/{name}")
    paths = sorted(run_dir.glob("run_from_iteration_*.json"))
    remedy = "copy the run folder again"
    descriptions = [without_places(read_json(path, Description, remedy).model_dump()) for path in paths]
    description = descriptions[-1]
    flags, lines = description["args"], read_lines(run_dir / "metrics.jsonl")
    commits = [commit_of(description) for description in descriptions]
    facts = {
        "made by": ", then ".join(markdown_code(d["command"]) for d in descriptions),
        "version": ", then ".join(dict.fromkeys(d["version"] or "before 0.3.0" for d in descriptions)),
        "commit": ", then ".join(dict.fromkeys(commits)),
        "seed": flags["seed"],
        **(facts_of_imitation if "demos" in flags else facts_of_rl)(flags, description["sizes"], lines),
        "minutes": f"{minutes_of(lines)}, {counted(description['num_ranks'], 'rank')} on {description['device']}, "
        f"{descriptions[0]['started']}",
        "success": f"{measured(run_dir)} held-out episodes of {flags['env_id']}, "
        f"temperature {flags['eval_temperature']}, {flags['sim_freq']} Hz physics, "
        f"{flags['image_size'][0]} x {flags['image_size'][1]} pixels, {flags['max_episode_steps']} steps",
        "statistics": markdown_code(f"--unnorm_key {flags['unnorm_key']}"),
        "evaluate": markdown_code(evaluate_command(flags, place)),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return f"# {markdown_text(name)}\n\n{summary_of(flags)}\n\n| | |\n|---|---|\n{rows}\n"


def summary_of(flags: dict) -> str:
    """What the policy is, in two sentences."""
    if "demos" in flags:
        return "Trained on scripted demonstrations by train_sft.py. PPO and GRPO can start from it."
    algorithm = "GRPO" if "group_size" in flags else "PPO"
    return f"Trained by {algorithm} in simulation, from reward alone. SoloVLA wrote it, and other tools can read it."


def facts_of_imitation(flags: dict, sizes: dict, lines: list[dict]) -> dict[str, str]:
    """What the policy imitated. lines: of metrics.jsonl, empty if a full disk cut the file off."""
    last = lines[-1] if lines else {}
    return {
        "started from": markdown_text(flags["model_path"]),
        "demonstrations": f"{markdown_text(flags['demos'])}, {sizes.get('num_samples', '?')} steps",
        "updates": f"{flags['num_updates']} of {flags['batch_size']} decisions",
        "token accuracy, L1 in training": f"{last.get('train/token_accuracy', math.nan):.3f}, "
        f"{last.get('train/action_l1', math.nan):.4f}",
    }


def facts_of_rl(flags: dict, sizes: dict, lines: list[dict]) -> dict[str, str]:
    """Where the policy started, and how long it learned."""
    last = lines[-1] if lines else {}
    adapter = f" with the adapter {markdown_text(flags['lora_path'])}" if flags.get("lora_path") else ""
    return {
        "started from": f"{markdown_text(flags['model_path'])}{adapter}",
        "learned from": f"{last.get('iteration', '?')} iterations, {last.get('global_step', '?')} env steps of "
        f"{markdown_text(flags['env_id'])}",
    }


def minutes_of(lines: list[dict]) -> str:
    """Such as "3.0 of rollouts, 1.0 of updates, 0.5 of evaluation", without what the run did not do."""
    seconds = {name: sum(line.get(f"time/{name}", 0.0) for line in lines) for name in ("rollout", "update", "eval")}
    words = {"rollout": "rollouts", "update": "updates", "eval": "evaluation"}
    return ", ".join(
        f"{seconds[name] / 60:.1f} of {words[name]}" for name in words if seconds[name] or name != "rollout"
    )


def commit_of(description: dict) -> str:
    """The commit of one start of a run, with a note if the working tree was not clean."""
    return description["commit"] + (" (with uncommitted changes)" if description["uncommitted_changes"] else "")
