"""Run folders as training and cloning leave them, small and made in a second."""

import json
import shutil
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from conftest import ROOT

KEPT = ROOT / "results" / "make_train" / "seed_0"  # a real run of PPO
PRESET = {"learning_rate": 2e-4, "eval_freq": 0}


def ppo_folder(folder: Path, *events: tuple, flags: dict | None = None, **description) -> Path:
    """The kept run of PPO as a run folder.

    Args:
        events: (event, iteration, reason) of sessions.jsonl. Without any, that file is missing, as in older runs.
        flags, description: values that replace those of the run.
    """
    shutil.copytree(KEPT, folder)
    path = folder / "run_from_iteration_000000.json"
    said = json.loads(path.read_text())
    said["args"] |= {"config": ["yaml/quickstart_ppo_openvlaoft.yaml"]} | (flags or {})
    said |= {"defaults": {"learning_rate": 1e-4, "eval_freq": 10}, "preset": PRESET} | description
    path.write_text(json.dumps(said))
    write_sessions(folder, *events)
    return folder


def write_sessions(folder: Path, *events: tuple) -> None:
    lines = [
        {"event": event, "time": time.time() - 600 + 60 * place, "iteration": iteration, "reason": reason}
        for place, (event, iteration, reason) in enumerate(events)
    ]
    if lines:
        (folder / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def cloning_folder(folder: Path) -> Path:
    """A run of train_sft.py with three iterations and two evaluations."""
    folder.mkdir(parents=True)
    args = {"updates_per_iteration": 10, "model_path": "openvla-tiny", "env_id": "PutOnPlateInScene25Main-v3"}
    said = json.loads((KEPT / "run_from_iteration_000000.json").read_text())
    said |= {"args": args | {"seed": 0, "config": []}, "command": "train_sft.py --demos demos.h5", "num_ranks": 1}
    said["sizes"] = {"num_iterations": 3}
    (folder / "run_from_iteration_000000.json").write_text(json.dumps(said))
    lines = [
        {
            "iteration": number,
            "global_step": 80 * number,
            "train/loss": 4.0 / number,
            "train/token_accuracy": 0.2 * number,
            "train/action_l1": 0.5 / number,
            "train/actor/grad_norm": 1.0,
            "env/num_episodes": 0,
            "time/rollout": 0.0,
            "time/update": 5.0,
            "time/eval": 1.0,
            "time/iteration": 6.5,
        }
        for number in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [evaluation(0, 0, 0.0), evaluation(3, 240, 0.25)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return folder


def evaluation(iteration: int, global_step: int, success: float) -> dict:
    line = {"eval/success_once": success, "eval/success_at_end": success, "eval/return": success}
    more = {"eval/episode_len": 12.0, "eval/reward": 0.01, "eval/num_episodes": 8.0}
    return {"iteration": iteration, "global_step": global_step} | line | more


def write_episodes(folder: Path, iteration: int, successes: dict[int, float], **facts: str) -> None:
    """episodes/eval_*.jsonl: one line per held-out episode.

    Args:
        successes: success_once by episode id. facts: object and so on, the same for all, or made from the id with {}.
    """
    lines = []
    for episode_id, success in successes.items():
        line = {"episode_id": episode_id, "success_once": success, "success_at_end": success, "return": success}
        line |= {"episode_len": 2, "reward": success / 2, "actions": [[0.0] * 7] * 2}
        lines.append(line | {name: text.format(episode_id) for name, text in facts.items()})
    place = folder / "episodes" / f"eval_{iteration:06d}.jsonl"
    place.parent.mkdir(exist_ok=True)
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_clips(folder: Path, iteration: int, successes: dict[int, float], instruction: str = "put it there") -> None:
    """videos/eval_*/: a clip and a poster per episode, and clips.json."""
    place = folder / "videos" / f"eval_{iteration:06d}"
    place.mkdir(parents=True)
    listed = []
    for episode_id, success in successes.items():
        frames = np.random.default_rng(episode_id).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
        iio.imwrite(place / f"{episode_id}.mp4", frames, fps=5)
        iio.imwrite(place / f"{episode_id}.jpg", frames[-1])
        item = {"episode_id": episode_id, "file": f"{episode_id}.mp4", "poster": f"{episode_id}.jpg"}
        item |= {"outcome": "success" if success else "failed", "instruction": instruction}
        listed.append(item | {"return": success, "episode_len": 12})
    (place / "clips.json").write_text(json.dumps(listed))
