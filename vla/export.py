"""A finished policy in a folder of its own, with a card that says where it comes from.

The folder has the published layout (pretrained.py) with an adapter merged in: a whole model, the start of another run.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import torch

from schemas import UserError
from vla.distributed import barrier, rank
from vla.logger import read_lines, wilson_interval, without_places
from vla.policy import VLAPolicy
from vla.pretrained import save_policy
from vla.settings import FAMILY
from vla.text import markdown_code, markdown_text


def check_export_dir(folder: Path) -> None:
    """Raises UserError where something else than an exported policy would be overwritten."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").is_file())):
        raise UserError(f"--export_dir {folder} holds something else than a policy: name another folder")


def export_policy(policy: VLAPolicy, weights: dict[str, torch.Tensor], run_dir: Path, folder: Path) -> None:
    """Write `folder` whole or not at all; an older policy in it goes. All ranks together, after the last metrics.

    Args:
        weights: stages.whole_state_dict() on rank 0; what other ranks give is not read.
    """
    if rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_policy(policy, weights, partial, merge_lora=True)
        (partial / "README.md").write_text(card(run_dir, folder.name))
        if folder.is_dir():
            os.replace(folder, partial.with_suffix(".old"))
        os.replace(partial, folder)
        shutil.rmtree(partial.with_suffix(".old"), ignore_errors=True)
    barrier()


def evaluate_command(flags: dict, name: str) -> str:
    """What success in the card was measured with, as evaluate.py takes it: such a folder does not know its world."""
    setting = f"{flags['env_id'].removeprefix(FAMILY)}:{flags['obj_set']}"
    words = [
        "python evaluate.py --checkpoint",
        f"checkpoints/{name}",
        "--settings",
        setting,
        "--no-ignore_terminations",
    ]
    words += ["--num_episodes", flags["num_eval_episodes"], "--temperature", flags["eval_temperature"]]
    words += ["--image_size", *flags["image_size"]]
    for flag in ("model_type", "unnorm_key", "dtype", "sim_freq", "max_episode_steps"):
        words += [f"--{flag}", flags[flag]]
    return " ".join(word if word == words[0] else shlex.quote(str(word)) for word in words)


def card(run_dir: Path, name: str) -> str:
    """What the run folder says of itself, as Markdown; of a run that was resumed, with what it was resumed."""
    paths = sorted(run_dir.glob("run_from_iteration_*.json"))
    descriptions = [without_places(json.loads(path.read_text())) for path in paths]
    description = descriptions[-1]
    flags, lines = description["args"], read_lines(run_dir / "metrics.jsonl")
    evaluation = read_lines(run_dir / "evaluations.jsonl")[-1]
    success, episodes = evaluation["eval/success_once"], evaluation["eval/num_episodes"]
    low, high = wilson_interval(success, episodes)
    minutes = {name: sum(line[f"time/{name}"] for line in lines) / 60 for name in ("update", "eval")}
    commits = [d["commit"] + " (with uncommitted changes)" * d["uncommitted_changes"] for d in descriptions]
    facts = {
        "made by": ", then ".join(markdown_code(d["command"]) for d in descriptions),
        "commit": ", then ".join(dict.fromkeys(commits)),
        "seed": flags["seed"],
        "demonstrations": f"{markdown_text(flags['demos'])}, {description['sizes']['num_samples']} steps",
        "updates": f"{flags['num_updates']} of {flags['batch_size']} decisions",
        "minutes": f"{minutes['update']:.1f} of updates, {minutes['eval']:.1f} of evaluation, "
        f"{description['num_ranks']} ranks on {description['device']}, {descriptions[0]['started']}",
        "token accuracy, L1 in training": f"{lines[-1]['train/token_accuracy']:.3f}, "
        f"{lines[-1]['train/action_l1']:.4f}",
        "success": f"{success:.3f} [{low:.2f}, {high:.2f}] on {episodes:.0f} held-out episodes of {flags['env_id']}, "
        f"temperature {flags['eval_temperature']}, {flags['sim_freq']} Hz physics, "
        f"{flags['image_size'][0]} x {flags['image_size'][1]} pixels, {flags['max_episode_steps']} steps",
        "statistics": markdown_code(f"--unnorm_key {flags['unnorm_key']}"),
        "evaluate": markdown_code(evaluate_command(flags, name)),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    said = "Cloned from scripted demonstrations; a start for PPO and GRPO."
    return f"# {markdown_text(name)}\n\n{said}\n\n| | |\n|---|---|\n{rows}\n"
