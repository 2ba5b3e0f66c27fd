"""Prints, for each published recipe, the flags that make it fit into a card, as a table in Markdown.

    python benchmarks/memory_table.py
    python benchmarks/memory_table.py --num_gpus 8 16 32 --gpu_memory 24 40 48 80

A cell has the peak in GiB, after the flags that are needed for it. The numbers are those of `doctor.py --config`.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import parse_args
from vla.training.memory_plan import fitting, recipe_of

PRESETS = sorted((Path(__file__).resolve().parent.parent / "yaml").glob("maniskill_*.yaml"))


def flags_of(preset: Path, *words: str) -> dict:
    """The flags of a preset's script, with some that replace its own."""
    script = importlib.import_module("train_grpo" if "grpo" in preset.name else "train_ppo")
    return vars(parse_args(script.Args, ["--config", str(preset), *words], "", offline=True))


def cells(preset: Path, num_gpus: int, sizes: list[float]) -> list[str]:
    """One cell per card, such as "56.7" or "`--micro_batch_size 8` 41.2"."""
    recipe = recipe_of(flags_of(preset))
    found = [fitting(recipe, num_gpus, size) for size in sizes]
    return ["-" if one is None else f"{'`' * bool(one[0])}{one[0]}{'` ' * bool(one[0])}{one[1]:.1f}" for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--gpu_memory", type=float, nargs="+", default=[24.0, 40.0, 48.0, 80.0])
    flags = parser.parse_args()
    print(f"| preset | GPUs | {' | '.join(f'{size:g} GiB' for size in flags.gpu_memory)} |")
    print(f"|---|--:|{'---|' * len(flags.gpu_memory)}")
    for preset in PRESETS:
        for num_gpus in flags.num_gpus:
            row = " | ".join(cells(preset, num_gpus, flags.gpu_memory))
            print(f"| {preset.stem.removeprefix('maniskill_')} | {num_gpus} | {row} |", flush=True)


if __name__ == "__main__":
    main()
