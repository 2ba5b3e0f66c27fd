"""What the videos of an evaluation cost: seconds to record episodes that a run has stored, on the launcher's ranks.

    deepspeed --num_gpus 2 benchmarks/video_cost.py --run runs/my_run --episodes 16

The episodes are replayed with the flags of the run, as training does it. Nothing is written into the run folder.
"""

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from envs import make_envs  # noqa: E402
from schemas import read_json  # noqa: E402
from vla.distributed import all_gather_lists, barrier, print0, rank, setup_distributed, world_size  # noqa: E402
from vla.evaluation.episode_log import episode_file, read_episodes  # noqa: E402
from vla.evaluation.episodes import NEVER  # noqa: E402
from vla.evaluation.recording import Recorder  # noqa: E402

WORLD = ("obj_set", "asset_pack", "asset_dir", "protocol", "sim_freq", "max_episode_steps", "ignore_terminations")


@dataclass
class Options:
    run: str
    """Folder of a training run that has made an evaluation."""
    episodes: int = 16
    """Number of held-out episodes to record."""
    local_rank: int = -1
    """Number of this rank on its machine. The launcher sets it."""


def main(options: Options) -> None:
    folder = Path(options.run)
    flags = read_json(folder / "args.json", dict, "give the folder of a training run")
    setup_distributed(0)
    newest = max(int(path.stem[5:]) for path in (folder / "episodes").glob("eval_*.jsonl"))
    episodes = read_episodes(episode_file(folder, newest))[: options.episodes]
    facts = {one["episode_id"]: {"instruction": one["instruction"]} for one in episodes}
    open_envs = partial(make_envs, flags["env_id"], auto_reset=False, **{name: flags[name] for name in WORLD})
    place = all_gather_lists([tempfile.mkdtemp()] if rank() == 0 else [])[0]
    sizes = dict(video_size=flags["video_size"], image_size=flags["image_size"], chunk_size=flags["chunk_size"])
    recorder = Recorder(
        Path(place),
        SimpleNamespace(repeats=True),
        open_envs,
        facts,
        NEVER,
        video_episodes=options.episodes,
        num_env_workers=flags["num_env_workers"],
        **sizes,
    )
    for number in (1, 2):  # the first one reads meshes and compiles shaders
        barrier()
        start = time.perf_counter()
        recorder.keep(number, episodes)
        recorder.record(number, episodes)
        barrier()
        seconds = time.perf_counter() - start
        print0(
            f"{len(episodes)} videos on {world_size()} ranks, time {number}: {seconds:.1f} s, {os.cpu_count()} cores"
        )
    if rank() == 0:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
