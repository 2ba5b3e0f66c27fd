"""Learning curves: run them, and draw them from results/.

    python benchmarks/learning.py run                     every missing curve and seed of results/curves.yaml
    python benchmarks/learning.py run --only ppo_openvlaoft --seeds 0 1
    python benchmarks/learning.py draw                    RESULTS.md and docs/learning.png from results/**

A run is one `deepspeed` command on two CPU ranks. evaluate.py then runs 256 held-out episodes with its first and last
policy, sampled and greedy. results/ keeps the descriptions and metrics of the run folder.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import yaml
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vla.evaluation.settings import FAMILY  # noqa: E402
from vla.evaluation.statistics import COLUMNS, by_temperature  # noqa: E402
from vla.files.run_lines import read_lines  # noqa: E402
from vla.text import drawn, without_places  # noqa: E402

RESULTS = ROOT / "results"
RANKS = 2
TEMPERATURES = (1.0, 0.0)
NUM_EPISODES = 256
DESCRIPTION = "run_from_iteration_000000"
# of a run's flags, those that evaluate.py needs for a policy that is no run folder
EVAL_FLAGS = ("model_type", "unnorm_key", "dtype", "max_prompt_length", "asset_pack", "sim_freq", "max_episode_steps")
EVAL_FLAGS += ("instruction",)
BEGIN, END = "<!-- drawn by benchmarks/learning.py -->", "<!-- end of what is drawn -->"


def curves() -> dict[str, dict]:
    return yaml.safe_load((RESULTS / "curves.yaml").read_text())


def words_of(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def commands_of(curve: dict, seed: int, run_dir: str | None = None) -> list[list[str]]:
    """What a reader types for one curve and seed: a run and, for each entry of the curve's `then`, the same run resumed
    with other flags."""
    begin = ["deepspeed", "--num_gpus", str(RANKS), curve["script"]]
    place = run_dir or ("runs/my_run" if "then" in curve else None)
    first = [*begin, "--config", curve["config"], *words_of(curve["flags"]), "--seed", str(seed)]
    first += ["--run_dir", place] if place else []
    return [first, *([*begin, "--resume", place, *words_of(flags)] for flags in curve.get("then", []))]


def make_start(curve: dict) -> None:
    """Make the policy that the curve starts from, with the commands of its `start`, unless it exists."""
    if "start" in curve and not (ROOT / curve["start"]["makes"]).exists():
        for line in curve["start"]["commands"]:
            execute(line.split())


def execute(command: list[str]) -> None:
    """In the repository, on CPU ranks; raises SystemExit with what failed."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    print(" ".join(command), flush=True)
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


# ---------------------------------------------------------------------- run
def evaluated(
    checkpoint: str, flags: dict, output: Path, settings: str, num_episodes: int, temperatures: tuple[float, ...]
) -> dict:
    """results.json of a policy on held-out episodes, in the world that it was trained in."""
    command = ["deepspeed", "--num_gpus", str(RANKS), "evaluate.py", "--checkpoint", checkpoint, "--settings", settings]
    command += ["--num_episodes", str(num_episodes), "--temperature", *map(str, temperatures), "--video_failures", "0"]
    command += ["--no-ignore_terminations", "--output", str(output), "--image_size", *map(str, flags["image_size"])]
    command += words_of({name: flags[name] for name in EVAL_FLAGS if flags.get(name) is not None})
    execute(command)
    return json.loads((output / "results.json").read_text())


def success_of(checkpoint: str, flags: dict, output: Path, num_episodes: int | None) -> dict[str, dict]:
    """File of a kept run -> success by temperature and, with num_episodes, of the 16 settings at T = 1."""
    env_id, obj_set = flags["env_id"], flags["obj_set"]
    setting = f"{env_id.removeprefix(FAMILY)}:{obj_set}" if env_id.startswith(FAMILY) else env_id
    results = evaluated(checkpoint, flags, output / "training", setting, NUM_EPISODES, TEMPERATURES)
    kept = ("episodes", "success_once", "wilson_95", "return", "episode_ids")
    found = {
        "": {
            str(temperature): {name: part["settings"][setting][name] for name in kept}
            | {"successes": [episode["success_once"] for episode in part["settings"][setting]["outcomes"]]}
            for temperature, part in by_temperature(results)
        }
    }
    if num_episodes:
        table = evaluated(checkpoint, flags, output / "settings", "all", num_episodes, (1.0,))
        rows = {name: {key: row[key] for key in kept[:3]} for name, row in table["settings"].items()}
        found["_settings"] = {"settings": rows, "means": table["means"]}
    return found


def run(only: list[str] | None, seeds: list[int] | None, again: bool) -> None:
    """Runs what is not kept yet, or all of it; an older run goes when the new one is whole."""
    begun_with: dict[str, dict] = {}  # by curve: what its seeds begin with is evaluated once
    for name, curve in curves().items():
        for seed in curve["seeds"]:
            kept = RESULTS / name / f"seed_{seed}"
            if (only and name not in only) or (seeds and seed not in seeds) or (kept.is_dir() and not again):
                continue
            make_start(curve)
            with tempfile.TemporaryDirectory() as temporary:
                run_dir, new = Path(temporary) / "run", Path(temporary) / "kept"
                for command in commands_of(curve, seed, str(run_dir)):
                    execute(command)
                flags = json.loads((run_dir / "args.json").read_text())
                new.mkdir()
                each = curve.get("episodes_per_setting")
                if name not in begun_with:
                    begun_with[name] = success_of(flags["model_path"], flags, Path(temporary) / "before", each)
                after = success_of(str(run_dir), flags, Path(temporary) / "after", each)
                for moment, found in (("before", begun_with[name]), ("after", after)):
                    for file, success in found.items():
                        (new / f"{moment}{file}.json").write_text(json.dumps(success) + "\n")
                for file in ("metrics.jsonl", "evaluations.jsonl"):
                    shutil.copy(run_dir / file, new / file)
                for path in run_dir.glob("run_from_iteration_*.json"):
                    description = without_places(json.loads(path.read_text()))
                    (new / path.name).write_text(json.dumps(description, indent=2) + "\n")
                kept.parent.mkdir(exist_ok=True)
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(new, kept)


# ---------------------------------------------------------------------- draw
def read_run(folder: Path) -> dict:
    """Of one seed: steps, minutes and success of its evaluations; success before and after by temperature."""
    wanted = {"global_step", "eval/success_once"}
    evaluations = [line for line in read_lines(folder / "evaluations.jsonl") if wanted <= line.keys()]
    minutes = {0: 0.0}  # of rollouts and updates, by iteration
    for line in read_lines(folder / "metrics.jsonl"):
        seconds = line.get("time/rollout", 0.0) + line.get("time/update", 0.0)
        minutes[line["iteration"]] = max(minutes.values()) + seconds / 60
    return {
        "steps": [line["global_step"] for line in evaluations],
        "minutes": [max(m for made, m in minutes.items() if made <= line["iteration"]) for line in evaluations],
        "success": [line["eval/success_once"] for line in evaluations],
        **{path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")},
    }


def all_runs(specs: dict[str, dict]) -> dict[str, dict[int, dict]]:
    """Curve -> seed -> read_run(); what has not been run is left out."""
    found = {}
    for name in specs:
        folders = sorted((RESULTS / name).glob("seed_*"))
        if folders:
            found[name] = {int(folder.name.removeprefix("seed_")): read_run(folder) for folder in folders}
    return found


def rate(success: dict) -> str:
    low, high = success["wilson_95"]
    return f"{success['success_once']:.3f} [{low:.2f}, {high:.2f}]"


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of Markdown."""
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]


def folded(title: str, lines: list[str]) -> list[str]:
    """Lines that a reader opens with a click. `markdown` is for mkdocs, and GitHub leaves it out."""
    return [f'<details markdown="1"><summary>{title}</summary>', "", *lines, "", "</details>", ""]


def machine(description: dict) -> str:
    """ "Intel(R) Xeon(R) Processor" and 2 ranks -> "Intel Xeon, 2 ranks"."""
    name = re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b", "", description["device"])
    return f"{' '.join(name.split())}, {description['num_ranks']} ranks"


def summary_table(runs: dict[str, dict[int, dict]], specs: dict[str, dict]) -> list[str]:
    """One row per curve, at T = 1. Seeds share their episodes, so what they have together is a mean and a range."""
    rows = []
    for name, seeds in runs.items():
        ends = [[of[moment]["1.0"]["success_once"] for moment in ("before", "after")] for of in seeds.values()]
        before, after = (sum(column) / len(ends) for column in zip(*ends))
        gains, last = [end - start for start, end in ends], [end for _, end in ends]
        machines = sorted({machine(of[DESCRIPTION]) for of in seeds.values()})
        minutes = sum(of["minutes"][-1] for of in seeds.values()) / len(seeds)
        row = [specs[name]["title"], len(seeds), " and ".join(machines), f"{minutes:.0f}", f"{before:.3f}"]
        row += [f"**{after:.3f}** ({min(last):.3f} to {max(last):.3f})", f"{min(gains):+.3f} to {max(gains):+.3f}"]
        rows.append(row)
    return table(["curve", "seeds", "machine", "minutes", "before", "after: mean (range)", "gain"], rows)


def choices_table(runs: dict[str, dict[int, dict]], specs: dict[str, dict]) -> list[str]:
    """One row per curve: what its settings were chosen by, and what had been seen by then."""
    header = ["curve", "settings were chosen by", "held-out success that was seen before", "runs that were repeated"]
    return table(
        header,
        [[specs[name]["title"], *(specs[name]["chosen"][key] for key in ("by", "seen", "repeated"))] for name in runs],
    )


def seeds_table(runs: dict[str, dict[int, dict]], specs: dict[str, dict]) -> list[str]:
    """One row per run. "+ changes": the working tree had uncommitted changes."""
    header = ["curve", "seed", "commit", "machine", "env steps", "minutes"]
    header += ["T = 1, before", "after", "greedy, before", "after"]
    rows = []
    for name, seeds in runs.items():
        for seed, of in seeds.items():
            description = of[DESCRIPTION]
            commit = description["commit"][:7] + " + changes" * description["uncommitted_changes"]
            row = [specs[name]["title"], seed, commit, machine(description)]
            row += [f"{of['steps'][-1]:,}", f"{of['minutes'][-1]:.1f}"]
            row += [rate(of[moment][str(t)]) for t in TEMPERATURES for moment in ("before", "after")]
            rows.append(row)
    return table(header, rows)


def commands(runs: dict[str, dict[int, dict]], specs: dict[str, dict]) -> list[str]:
    lines = ["```bash"]
    for name, seeds in runs.items():
        lines += specs[name].get("start", {}).get("commands", [])
        first, *rest = [" ".join(command) for command in commands_of(specs[name], min(seeds))]
        lines += [f"{first}    # seeds {list(seeds)}", *rest]
    return [*lines, "```"]


def settings_tables(runs: dict[str, dict[int, dict]], specs: dict[str, dict]) -> list[str]:
    """Lines of Markdown: the 16 settings before and after, folded, for the curves that ran them."""
    lines: list[str] = []
    for name, seeds in runs.items():
        tables = {seed: of for seed, of in seeds.items() if "after_settings" in of}
        if not tables:
            continue
        starts = [of["before_settings"]["means"] for of in tables.values()]
        parts = {f"seed {seed}, before": start for seed, start in zip(tables, starts)}
        if starts.count(starts[0]) == len(starts):  # what all seeds begin with, once
            parts = {"before": starts[0]}
        parts |= {f"seed {seed}, after": of["after_settings"]["means"] for seed, of in tables.items()}
        rows = [[title, *(rate(means[column]) for means in parts.values())] for column, title in COLUMNS.items()]
        each = specs[name]["episodes_per_setting"]
        said = f"Each of the 16 settings has {each} held-out episodes, at temperature 1."
        lines += folded(f"{specs[name]['title']}: the settings of evaluate.py", [said, "", *table(["", *parts], rows)])
    return lines


def figure(runs: dict[str, dict[int, dict]], specs: dict[str, dict], path: Path) -> None:
    """Mean over seeds and the band from the lowest to the highest, against env steps and against minutes."""
    matplotlib.use("Agg")
    drawing, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for name, seeds in runs.items():
        of, points = list(seeds.values()), min(len(run["success"]) for run in seeds.values())
        columns = [[run["success"][k] for run in of] for k in range(points)]
        for axis, by in zip(axes, ("steps", "minutes")):
            x = [sum(run[by][k] for run in of) / len(of) for k in range(points)]
            label = f"{drawn(specs[name]['title'])}, {len(of)} seed{'s' * (len(of) > 1)}"
            (line,) = axis.plot(x, [sum(c) / len(c) for c in columns], label=label)
            axis.fill_between(
                x, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, color=line.get_color()
            )
    for axis, label in zip(axes, ("env steps", "minutes on two CPU cores, evaluations left out")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel(f"success on {NUM_EPISODES} held-out episodes")
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def draw() -> None:
    """Replace the drawn part of RESULTS.md. What people wrote around it stays."""
    specs = curves()
    runs = all_runs(specs)
    if not runs:
        raise SystemExit("error: results/ holds no run yet: python benchmarks/learning.py run")
    figure(runs, specs, ROOT / "docs" / "learning.png")
    page = ROOT / "RESULTS.md"
    head, _, rest = page.read_text().partition(BEGIN)
    lines = [
        BEGIN,
        "",
        "![Success on held-out episodes against env steps and against minutes](docs/learning.png)",
        "",
        *summary_table(runs, specs),
        "",
        "## How settings were chosen",
        "",
        *choices_table(runs, specs),
        "",
        *folded("Every run: commit, machine, env steps, intervals, greedy success", seeds_table(runs, specs)),
        *settings_tables(runs, specs),
        *folded("The commands", commands(runs, specs)),
        END,
    ]
    page.write_text(head + "\n".join(lines) + rest.partition(END)[2])
    print(f"{page} and docs/learning.png: {sum(map(len, runs.values()))} runs of {len(runs)} curves")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--only", nargs="+", choices=list(curves()), help="Curves to run or draw. Without it, all.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Seeds to run. Without it, those of results/curves.yaml.")
    parser.add_argument("--again", action="store_true", help="Repeat runs that exist already.")
    given = parser.parse_args()
    if given.what == "run":
        run(given.only, given.seeds, given.again)
    else:
        draw()
