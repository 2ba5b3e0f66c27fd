"""A finished policy in a folder of its own, with a card that says where it comes from.

The folder has the published layout (models/saving.py), with an adapter merged in. Another run can start from it.
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
from vla.distributed import agree, print0, rank
from vla.evaluation.settings import FAMILY
from vla.logger import read_evaluations, read_lines, wilson_interval, without_places
from vla.models.policy import VLAPolicy
from vla.models.saving import save_policy
from vla.text import markdown_code, markdown_text

WEIGHTS = re.compile(r"(?:adapter_)?model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
BESIDE = re.compile(  # what published policies have beside their weights
    r"(?:config|generation_config|preprocessor_config|processor_config|dataset_statistics|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|adapter_config|adapter_base)\.json"
    r"|tokenizer\.model|value_head\.safetensors|README\.md|LICENSE(?:\.\w+)?|\.gitattributes"
)


def export_folder(run_dir: Path, export_dir: str | None, named: bool) -> Path:
    """Where the final policy goes: export_dir, else a folder in the run.

    Args:
        named: export_dir was given on the command line of this start, not by a file.

    Raises:
        UserError: something would be overwritten that is no policy, or that nobody named.
    """
    if export_dir is None:
        return run_dir / "export"
    folder = Path(export_dir)
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if os.path.lexists(folder):
        if foreign := what_is_foreign(folder):
            raise UserError(
                f"--export_dir {folder} holds something else than a policy ({foreign}): name another folder"
            )
        if not named:
            raise UserError(
                f"export_dir {folder} holds a policy already: give --export_dir {folder} yourself to replace it"
            )
    return folder


def what_is_foreign(folder: Path) -> str | None:
    """What keeps a folder from being a policy and nothing else; None where it is one."""
    if not folder.is_dir():
        return "a file"
    weights = False
    for path in sorted(folder.iterdir()):
        here = path.is_file() and bool(WEIGHTS.fullmatch(path.name))
        if not here and not (path.is_file() and BESIDE.fullmatch(path.name)):
            return path.name
        weights = weights or here
    return None if weights else "no weights"


def export_policy(policy: VLAPolicy, weights: dict[str, torch.Tensor], run_dir: Path, folder: Path) -> None:
    """Write `folder` whole or not at all; an older policy in it goes. All ranks together, after the last metrics.

    Args:
        weights: stages.whole_state_dict() on rank 0; what other ranks give is not read.

    Raises:
        UserError: it can not be written; what was there is as it was.
    """
    error = None
    if rank() == 0:
        try:
            replaced = replace_policy(policy, weights, run_dir, folder)
        except (OSError, RuntimeError, UserError) as failure:  # RuntimeError: a full disk as safetensors says it
            error = failure
    if said := agree(None if error is None else str(error)):
        raise UserError(f"the policy could not be written to {folder} ({said}): mend that and --resume") from error
    print0(f"policy      {folder}{', in place of the one that was there' if rank() == 0 and replaced else ''}")


def replace_policy(policy: VLAPolicy, weights: dict[str, torch.Tensor], run_dir: Path, folder: Path) -> bool:
    """export_policy() on rank 0. Returns whether there was one. All that is made beside it has a name of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_policy(policy, weights, own / "new", merge_lora=True)
        (own / "new" / "README.md").write_text(card(run_dir, folder))
        there = os.path.lexists(folder)
        if there:
            os.replace(folder, own / "old")
        try:
            os.replace(own / "new", folder)
        except OSError:
            if there:
                os.replace(own / "old", folder)
            raise
        return there and (own / "old" / "config.json").is_file()
    finally:
        shutil.rmtree(own, ignore_errors=True)


def evaluate_command(flags: dict, folder: str) -> str:
    """What success in the card was measured with, as evaluate.py takes it: such a folder does not know its world."""
    setting = f"{flags['env_id'].removeprefix(FAMILY)}:{flags['obj_set']}"
    words = ["python evaluate.py --checkpoint", folder, "--settings", setting, "--no-ignore_terminations"]
    words += ["--num_episodes", flags["num_eval_episodes"], "--temperature", flags["eval_temperature"]]
    words += ["--image_size", *flags["image_size"]]
    for flag in ("model_type", "unnorm_key", "dtype", "sim_freq", "max_episode_steps"):
        words += [f"--{flag}", flags[flag]]
    return " ".join(word if word == words[0] else shlex.quote(str(word)) for word in words)


def measured(run_dir: Path) -> str:
    """Success in the last evaluation: "0.250 [0.17, 0.35] on 64"."""
    evaluations = read_evaluations(run_dir)
    if not evaluations:
        return "not known, on no"
    success, episodes = evaluations[-1]["eval/success_once"], evaluations[-1]["eval/num_episodes"]
    low, high = wilson_interval(success, episodes)
    return f"{success:.3f} [{low:.2f}, {high:.2f}] on {episodes:.0f}"


def card(run_dir: Path, folder: Path) -> str:
    """What the run folder says of itself, as Markdown; of a run that was resumed, with what it was resumed.

    Args:
        folder: where the policy goes, in the run or somewhere else.
    """
    inside = folder.parent == run_dir
    name = run_dir.resolve().name if inside else folder.name
    place = f"runs/{name}/{folder.name}" if inside else f"checkpoints/{name}"
    paths = sorted(run_dir.glob("run_from_iteration_*.json"))
    remedy = "copy the run folder again"
    descriptions = [without_places(read_json(path, Description, remedy).model_dump()) for path in paths]
    description = descriptions[-1]
    flags, lines = description["args"], read_lines(run_dir / "metrics.jsonl")
    last = lines[-1] if lines else {}  # what a full disk has cut off is no number here
    minutes = {name: sum(line.get(f"time/{name}", 0.0) for line in lines) / 60 for name in ("update", "eval")}
    commits = [d["commit"] + " (with uncommitted changes)" * d["uncommitted_changes"] for d in descriptions]
    facts = {
        "made by": ", then ".join(markdown_code(d["command"]) for d in descriptions),
        "version": ", then ".join(dict.fromkeys(d["version"] or "before 0.3.0" for d in descriptions)),
        "commit": ", then ".join(dict.fromkeys(commits)),
        "seed": flags["seed"],
        "demonstrations": f"{markdown_text(flags['demos'])}, {description['sizes'].get('num_samples', '?')} steps",
        "updates": f"{flags['num_updates']} of {flags['batch_size']} decisions",
        "minutes": f"{minutes['update']:.1f} of updates, {minutes['eval']:.1f} of evaluation, "
        f"{description['num_ranks']} ranks on {description['device']}, {descriptions[0]['started']}",
        "token accuracy, L1 in training": f"{last.get('train/token_accuracy', math.nan):.3f}, "
        f"{last.get('train/action_l1', math.nan):.4f}",
        "success": f"{measured(run_dir)} held-out episodes of {flags['env_id']}, "
        f"temperature {flags['eval_temperature']}, {flags['sim_freq']} Hz physics, "
        f"{flags['image_size'][0]} x {flags['image_size'][1]} pixels, {flags['max_episode_steps']} steps",
        "statistics": markdown_code(f"--unnorm_key {flags['unnorm_key']}"),
        "evaluate": markdown_code(evaluate_command(flags, place)),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    said = "Cloned from scripted demonstrations; a start for PPO and GRPO."
    return f"# {markdown_text(name)}\n\n{said}\n\n| | |\n|---|---|\n{rows}\n"
