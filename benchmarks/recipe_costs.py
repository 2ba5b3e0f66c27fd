"""Prints what an iteration of each published recipe should cost on 8 GPUs, before anybody has run one.

    python benchmarks/recipe_costs.py          # both tables in Markdown, in some minutes
    python benchmarks/recipe_costs.py --only ppo_openvla --cards "H100 80 GB"

The first table has the seconds of each part on the first card. The second has env steps per second by card: with the
recipe as it is (or with the flags that `doctor.py --config` names if it does not fit), and with the fastest of the
settings that fit. A third party's run of RLinf on 8 H200 stands beside it. Parts are those of benchmarks/cost_model.py,
measured on one H100. Other cards are scaled from it by the peaks in their data sheets. The lines below the tables say
what was measured and what is assumed.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cost_model, flops
from benchmarks.cost_model import Assumed, Inputs
from benchmarks.memory_table import PRESETS
from vla.cli import parse_args
from vla.training.memory_plan import fitting, largest, make_plan, recipe_of

GPUS, CORES = 8, 16  # cores of each GPU's share of the host
H100, HOST = "2026-11-23_nvidia-h100-80gb-hbm3", "2026-11-23_intel-xeon-2-cores"
FILES = [cost_model.RESULTS / f"{name}.json" for name in (f"{H100}-by-hand", f"{H100}-16-cores", HOST)]
PARTS = ("acting", "simulation", "images", "learning", "ranks")


class Card(NamedTuple):
    """Data sheet: GiB, dense bfloat16 TFLOP/s, TB/s of memory, GB/s to other cards in one direction."""

    memory: float
    peak: float
    bandwidth: float
    link: float


CARDS = {
    "H100 80 GB": Card(80, 989, 3.35, 450),
    "H200 141 GB": Card(141, 989, 4.8, 450),
    "A100 80 GB": Card(80, 312, 2.04, 300),
    "A100 40 GB": Card(40, 312, 1.56, 300),
    "L40S 48 GB": Card(48, 362, 0.864, 25),
    "RTX 4090 24 GB": Card(24, 165, 1.008, 25),
}
MEASURED = "H100 80 GB"


def assumed_of(card: Card, files: list[dict]) -> Assumed:
    """The peaks that a card reaches, as a share of its data sheet that the measured one reaches."""
    found, sheet = Inputs(files).find("limits", device="cuda"), CARDS[MEASURED]
    peak, memory = found["matrix_flops_per_s"] / sheet.peak, found["memory_bytes_per_s"] / sheet.bandwidth
    return Assumed(card.peak * peak, card.bandwidth * memory, card.link * 1e9, utilisation=1.0)


def bare_act(policy, assumed: Assumed, envs: int) -> float:
    """Seconds of acting at the peaks: arithmetic for the prompt, and all weights read again for each further token."""
    reading = flops.num_bytes(policy) / assumed.memory
    return max(envs * flops.act_flops(policy) / assumed.peak, reading) + (flops.passes(policy) - 1) * reading


def inputs_of(card: Card, files: list[dict], flags: dict, envs: int) -> Inputs:
    """What was measured, with times of the model scaled to this card."""
    inputs, policy = Inputs(files), flops.meta_policy_of(flags)
    here, there = assumed_of(card, files), assumed_of(CARDS[MEASURED], files)
    factors = {"act": bare_act(policy, here, envs) / bare_act(policy, there, envs), "update": there.peak / here.peak}
    for place, entry in enumerate(inputs.entries):
        if (factor := factors.get(entry["part"], 1.0)) != 1.0 and entry["model_path"] == cost_model.MODEL_7B:
            scaled = {"points": [[many, factor * seconds] for many, seconds in entry.get("points", [])]}
            scaled["seconds"] = factor * entry.get("seconds", 0.0)
            inputs.entries[place] = entry | scaled
    return inputs


# ---------------------------------------------------------------------- settings
def flags_of(preset: Path, *words: str) -> dict:
    script = importlib.import_module("train_grpo" if "grpo" in preset.name else "train_ppo")
    return vars(parse_args(script.Args, ["--config", str(preset), *words], "", offline=True))


def settings() -> Iterator[list[str]]:
    """Flags that change how the same work is done, not what is learned."""
    for again, zero in itertools.product(("--no_gradient_checkpointing", "--gradient_checkpointing"), (2, 3)):
        for offload in ("none", "stage") if zero == 3 else ("none",):
            yield [again, "--deepspeed_config", f"ds_configs/zero{zero}.json", "--offload", offload]


def predicted(files: list[dict], flags: dict, card: Card) -> tuple[dict, Inputs]:
    envs = flags["num_envs"] // GPUS
    inputs = inputs_of(card, files, flags, envs)
    here = flags | {"num_env_workers": min(flags["num_env_workers"], envs)}
    return cost_model.predict(inputs, here, GPUS, CORES, assumed_of(card, files)), inputs


def as_it_is(preset: Path, card: Card) -> list[str] | None:
    """The flags that the recipe needs on this card, as doctor.py names them. None: it does not fit."""
    found = fitting(recipe_of(flags_of(preset)), GPUS, card.memory)
    return None if found is None else found[0].split()


def fastest(preset: Path, card: Card, files: list[dict]) -> tuple[float, list[str]] | None:
    """Seconds and flags of the fastest setting that fits, with the largest micro batch of 16 and below, or 80."""
    found = []
    for words in settings():
        recipe = recipe_of(flags_of(preset, *words))
        for size in (80, 16, 8, 4):
            if largest(make_plan(replace(recipe, micro_batch_size=size), GPUS)) <= card.memory:
                words = [*words, "--micro_batch_size", str(size)]
                found.append((predicted(files, flags_of(preset, *words), card)[0]["iteration"], words))
                break
    return min(found, default=None)


def differing(preset: Path, words: list[str]) -> str:
    """Those of the flags that differ from the recipe's."""
    own, now = flags_of(preset), flags_of(preset, *words)
    names = (
        "gradient_checkpointing",
        "deepspeed_config",
        "offload",
        "micro_batch_size",
        "num_env_workers",
        "lora_rank",
    )
    texts = []
    for name in names:
        if isinstance(now[name], bool) and own[name] != now[name]:
            texts.append(f"--{name}" if now[name] else f"--no_{name}")
        elif own[name] != now[name]:
            texts.append(f"--{name} {now[name]}")
    return " ".join(texts).replace("ds_configs/", "").replace(".json", "")


# ---------------------------------------------------------------------- tables
def by_part(presets: list[Path], files: list[dict]) -> tuple[list[str], dict[str, str]]:
    lines = [f"| recipe, 8 x {MEASURED} | " + " | ".join(PARTS) + " | sum | env steps/s |"]
    lines.append("|---|" + "--:|" * (len(PARTS) + 2))
    used: dict[str, str] = {}
    for preset in presets:
        flags = flags_of(preset)
        seconds, inputs = predicted(files, flags, CARDS[MEASURED])
        used |= inputs.used
        rate = flags["num_envs"] * flags["num_steps"] / seconds["iteration"]
        cells = " | ".join(f"{seconds[part]:.1f}" for part in PARTS)
        lines.append(
            f"| {preset.stem.removeprefix('maniskill_')} | {cells} | {seconds['iteration']:.0f} | {rate:.0f} |"
        )
    return lines, used


def by_card(presets: list[Path], cards: list[str], files: list[dict]) -> Iterator[str]:
    yield "| recipe | 8 cards | as it is | flags that it needs | fastest | flags | published |"
    yield "|---|---|--:|---|--:|---|--:|"
    for preset, name in itertools.product(presets, cards):
        card, flags = CARDS[name], flags_of(preset)
        steps = flags["num_envs"] * flags["num_steps"]
        needed, best = as_it_is(preset, card), fastest(preset, card, files)
        own = (
            "-"
            if needed is None
            else f"{steps / predicted(files, flags_of(preset, *needed), card)[0]['iteration']:.0f}"
        )
        needs = "does not fit" if needed is None else f"`{differing(preset, needed)}`" * bool(needed)
        faster = ("-", "") if best is None else (f"{steps / best[0]:.0f}", f"`{differing(preset, best[1])}`")
        known = cost_model.PUBLISHED[flags["model_type"]] if "ppo" in preset.name and "H200" in name else ""
        recipe = preset.stem.removeprefix("maniskill_")
        yield f"| {recipe} | {name} | {own} | {needs} | {faster[0]} | {faster[1].replace('``', '')} | {known} |"


def main() -> None:
    names = [preset.stem.removeprefix("maniskill_") for preset in PRESETS if "fan" not in preset.stem]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="Recipes. (default: all but FAN's)")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS), help="Cards. (default: all)")
    options = parser.parse_args()
    presets = [preset for preset in PRESETS if preset.stem.removeprefix("maniskill_") in options.only]
    files = cost_model.read_results(FILES)
    lines, used = by_part(presets, files)
    print("\n".join(lines), "\n", flush=True)
    for line in by_card(presets, options.cards, files):
        print(line, flush=True)
    print(f"\npublished: {cost_model.PUBLISHED_SOURCE}")
    print("\n".join(f"- {what}: {how}" for what, how in used.items()))
    print(f"- other cards: assumed: times of the model scaled from {MEASURED} by the data sheets' peaks")


if __name__ == "__main__":
    main()
