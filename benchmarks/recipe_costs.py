"""Prints what an iteration of each published recipe should cost on 8 GPUs, before anybody has run one.

    python benchmarks/recipe_costs.py          # all tables in Markdown, 3 minutes of one core
    python benchmarks/recipe_costs.py --only ppo_openvla --cards "H100 80 GB"

The first table has the seconds of each part on the card that was measured. The second has env steps per second by card.
"As it is" has the flags that `doctor.py --config` names where the recipe does not fit. "Fastest" is the best of the
settings that fit. A third party's run of RLinf on 8 H200 stands beside it. The others compare placements:
benchmarks/placement_costs.py. Parts are those of benchmarks/cost_model.py, measured on one H100. Other cards are scaled
from it by the peaks in their data sheets. The lines below the tables say what was measured and what is assumed.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cost_model, flops, placement_costs
from benchmarks.cards import CARDS, Card
from benchmarks.cost_model import Assumed, Inputs
from benchmarks.memory_table import PRESETS, flags_of
from vla.training.memory_plan import fitting, largest, make_plan, recipe_of

GPUS = placement_costs.GPUS
CORES = 16  # of each GPU's share of the host
H100, HOST = "2026-11-23_nvidia-h100-80gb-hbm3", "2026-11-23_intel-xeon-2-cores"
FILES = [cost_model.RESULTS / f"{name}.json" for name in (f"{H100}-by-hand", f"{H100}-16-cores", HOST)]
PARTS = ("acting", "simulation", "images", "learning", "ranks")
MEASURED = "H100 80 GB"


def assumed_of(card: Card, files: list[dict]) -> Assumed:
    """The peaks that a card reaches, as a share of its data sheet that the measured one reaches."""
    found, sheet = Inputs(files).find("limits", device="cuda"), CARDS[MEASURED]
    peak, memory = found["matrix_flops_per_s"] / sheet.peak, found["memory_bytes_per_s"] / sheet.bandwidth
    return Assumed(card.peak * peak, card.bandwidth * memory, card.link * 1e9, utilisation=1.0)


def bare_act(policy, assumed: Assumed, envs: int) -> float:
    """Seconds of acting at the peaks: arithmetic for the prompt, and all weights read again for each further token."""
    reading = flops.num_bytes(policy) / assumed.memory
    return max(envs * flops.act_flops(policy) / assumed.peak, reading) + (flops.passes(policy.chunk_size) - 1) * reading


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
def settings() -> Iterator[list[str]]:
    """Flags that change how the same work is done, not what is learned."""
    checkpointing = ("--no_gradient_checkpointing", "--gradient_checkpointing")
    for again, zero, stages in itertools.product(checkpointing, (2, 3), (1, 2)):
        for offload in ("none", "stage") if zero == 3 else ("none",):
            words = ["--deepspeed_config", f"ds_configs/zero{zero}.json", "--offload", offload]
            yield [again, *words, "--pipeline_stages", str(stages)]


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
    """Seconds and flags of the fastest setting that fits, each with the largest micro batch that fits."""
    found, own = [], flags_of(preset)["micro_batch_size"]
    if (needed := as_it_is(preset, card)) is not None:
        found.append((predicted(files, flags_of(preset, *needed), card)[0]["iteration"], needed))
    for words in settings():
        recipe = recipe_of(flags_of(preset, *words))
        for size in sorted({80, own, 16, 8, 4}, reverse=True):
            if largest(make_plan(replace(recipe, micro_batch_size=size), GPUS)) <= card.memory:
                words = [*words, "--micro_batch_size", str(size)]
                found.append((predicted(files, flags_of(preset, *words), card)[0]["iteration"], words))
                break
    return min(found, key=lambda one: one[0], default=None)


def differing(preset: Path, words: list[str]) -> str:
    """Those of the flags that differ from the recipe's."""
    own, now = flags_of(preset), flags_of(preset, *words)
    names = (
        "gradient_checkpointing",
        "deepspeed_config",
        "offload",
        "micro_batch_size",
        "pipeline_stages",
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
    yield "| recipe | 8 cards | model's times | as it is | flags that it needs | fastest | flags | published |"
    yield "|---|---|---|--:|---|--:|---|--:|"
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
        how = "measured" if name == MEASURED else "scaled"
        yield f"| {recipe} | {name} | {how} | {own} | {needs} | {faster[0]} | {faster[1].replace('``', '')} | {known} |"


def placed(preset: Path, files: list[dict]) -> placement_costs.Costs:
    """The recipe's costs on the measured card, from which those of a placement follow."""
    flags, card = flags_of(preset), CARDS[MEASURED]
    inputs = inputs_of(card, files, flags, flags["num_envs"] // GPUS)
    return placement_costs.Costs(inputs, flags, CORES, assumed_of(card, files))


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
    recipes = {preset.stem.removeprefix("maniskill_"): placed(preset, files) for preset in presets}
    print("", *placement_costs.tables(recipes, MEASURED), sep="\n", flush=True)
    print(f"\npublished: {cost_model.PUBLISHED_SOURCE}")
    print("\n".join(f"- {what}: {how}" for what, how in used.items()))
    print(f"- other cards: assumed: times of the model scaled from {MEASURED} by the data sheets' peaks")
    print("- a part of a rank's envs: assumed: arithmetic in proportion, and weights read as for all of them")
    print(f"- between ranks of other roles: assumed: {placement_costs.WIRE / 1e9:g} GB/s of a sender, weights as above")


if __name__ == "__main__":
    main()
