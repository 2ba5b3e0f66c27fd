"""Measure on an NVIDIA GPU what CPUs cannot show, the most valuable things first, in twelve minutes.

    python benchmarks/gpu_check.py                      # the first list below, to benchmarks/results/
    python benchmarks/gpu_check.py --only more          # the second list
    python benchmarks/gpu_check.py --only world         # the simulation alone, in 12 minutes
    python benchmarks/gpu_check.py --preset 100m        # for a GPU too small for 7B
    python benchmarks/gpu_check.py --dry                # the first list with tiny models on CPUs, to see that it runs

Weights are random, and assets are made by code. Only the simulation on the GPU needs a download, of PhysX's library for
GPUs. `python doctor.py --download` fetches it with the published assets. The part is "not done" without it. Every part
is a separate process with a time limit. A table follows each part. A part that fails is listed as "not done" with its
reason, and the others continue. The exit code is 2 without a GPU, and 1 if a part failed.

    card           measured matrix peak and memory bandwidth of one GPU, beside its data sheet
    logprobs       how far log-probabilities of the rollout are from those of the update: benchmarks/gpu_logprobs.py
    ppo_*_zero2    one GPU's share of an iteration of a recipe, 7B random weights: benchmarks/gpu_iteration.py.
                   Seconds, env steps/s, TFLOP/s with their share of the data sheet's peak, memory beside the plan
    world_draw     1, 4, 8 and 16 processes that draw on the GPU
    ppo_*_zero3    the same iterations under ZeRO-3

    graphs         CUDA graphs give the same results as single kernels, bit for bit
    offload        losses with and without --offload stage are equal bit for bit, and memory is freed
    openvla, openvla_oft    act with and without graphs, a LoRA update, on random weights of the preset
    render         images from the GPU, physics on the CPU, and the difference from the CPU's images

    world          what is open about simulation on the GPU, in twelve parts: benchmarks/gpu_world.py
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench, gpu_world
from benchmarks.bench import Row
from benchmarks.cards import peak_of
from benchmarks.model_speed import PRESETS
from envs.variants import train_episode_id
from vla.logger import describe_run
from vla.text import without_places

NO_CARD = (
    "error: torch sees no NVIDIA card here (torch.cuda.is_available() is False): run this on a machine that has one; "
    "benchmarks/bench.py measures CPUs"
)
MAIN = "PutOnPlateInScene25Main-v3"
OFFLOAD = ({"lora_rank": 4}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora_rank": 4})
ENV_STEPS = 48
Found = tuple[list[dict], list[Row]]


def run(words: list[str], seconds: float, accelerator: str = "cuda") -> str:
    """What a Python program of ours printed. RuntimeError as bench.run_group's."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = bench.environment_of(accelerator, **alone, MASTER_PORT=bench.free_port())
    return bench.run_group([[sys.executable, *words]], [environment], seconds)


def itself(part: str, flags: argparse.Namespace, seconds: float, *words: str) -> dict:
    """A part that is computed below, in a process of its own."""
    command = ["benchmarks/gpu_check.py", "--part", part, "--preset", flags.preset, *words]
    return result_of(run(command, seconds))


def result_of(printed: str) -> dict:
    return json.loads(re.search(r"^RESULT (.*)$", printed, re.M).group(1))


# ---------------------------------------------------------------------- parts, seen from here
def card(flags: argparse.Namespace, seconds: float) -> Found:
    found = bench.measure_parts(1, ("limits",), {"dtype": "bfloat16"}, seconds, "cpu" if flags.dry else "cuda")
    return found, bench.limit_rows(found)


def logprobs(flags: argparse.Namespace, seconds: float) -> Found:
    measured, rows = [], []
    for model_type in ("openvla", "openvla_oft"):
        words = ["--preset", "fixture" if flags.dry else flags.preset, "--model_type", model_type]
        words += ["--device", "cpu" if flags.dry else "cuda"]
        one = result_of(run(["benchmarks/gpu_logprobs.py", *words], seconds / 2, "cpu" if flags.dry else "cuda"))
        measured.append({"part": "logprobs", "ranks": 1, **one})
        rows += [Row(*line) for line in one["lines"]]
    return measured, rows


def iteration(recipe: str, stage: int) -> Callable[[argparse.Namespace, float], Found]:
    def measured_iteration(flags: argparse.Namespace, seconds: float) -> Found:
        words = ["--recipe", recipe, "--zero_stage", str(stage), *["--tiny"] * flags.dry]
        one = result_of(run(["benchmarks/gpu_iteration.py", *words], seconds, "cpu" if flags.dry else "cuda"))
        return [one], iteration_rows(one)

    return measured_iteration


def iteration_rows(one: dict) -> list[Row]:
    setting = f"{one['recipe']}, ZeRO-{one['zero_stage']}, {one['num_envs']} envs x {one['num_steps']}, "
    setting += f"{one['num_env_workers']} workers"
    rows = [Row("iteration", setting, one["env_steps"] / (one["rollout_s"] + one["update_s"]), "env steps/s")]
    for stage in ("rollout", "update"):
        rate = one[f"{stage}_flops"] / one[f"{stage}_s"] / 1e12
        rows += [Row(stage, setting, one[f"{stage}_s"], "s"), Row(f"{stage}, arithmetic", setting, rate, "TFLOP/s")]
        peak, planned = one[f"{stage}_peak_gib"], one[f"{stage}_planned_gib"]
        rows.append(Row(f"{stage}, memory", setting, peak, "GiB", "doctor.py's plan", peak / planned))
    return [*rows, Row("first ratios, farthest from 1", setting, one["ratio_first_microbatch_error"], "")]


def with_shares(rows: list[Row], name: str, measured: list[dict]) -> list[Row]:
    """The same rows. Those of arithmetic have their share of the card's peak.

    The peak is that of the card's data sheet, or else the matrix peak that was measured in this run.

    Args:
        name: of the card, as CUDA gives it.
        measured: entries of this run so far.
    """
    peak, source, units = peak_of(name), "data sheet", {"TFLOP/s": 1.0, "GFLOP/s": 1e-3}
    if peak is None:
        found = bench.pick_entry(measured, "limits", ranks=1)
        if found is None:
            return rows
        peak, source = found["matrix_flops_per_s"] / 1e12, "matrix peak"
    return [
        row._replace(limit=f"{source}, {peak:.3g} TFLOP/s", share=row.value * units[row.unit] / peak)
        if row.unit in units and row.part != source
        else row
        for row in rows
    ]


def graphs(flags: argparse.Namespace, seconds: float) -> Found:
    """tests/models/test_cuda_graphs.py. A test that was skipped has shown nothing."""
    said = run(["-m", "pytest", "-q", "-m", "gpu", "tests/models/test_cuda_graphs.py"], seconds).splitlines()[-1]
    if "skipped" in said or "passed" not in said:
        raise RuntimeError(f"the tests did not run: {said}")
    return [], [Row("graphs equal eager", said, 1, "yes")]


def offload(flags: argparse.Namespace, seconds: float) -> Found:
    """tests/helpers/engine_program.py, on one rank. Each has a process: cuBLAS keeps 64 MiB from its first call on."""
    measured, rows = [], []
    for settings in OFFLOAD:
        scenarios = [["losses", {**settings, "offload": how}] for how in ("none", "stage")]
        kept, moved = (
            result_of(run(["tests/helpers/engine_program.py", json.dumps([scenario])], seconds / len(OFFLOAD) / 2))
            for scenario in scenarios
        )
        setting = ", ".join(f"{name} {value}" for name, value in settings.items())
        if kept["losses"] != moved["losses"]:
            raise RuntimeError(f"{setting}: --offload stage changes losses, {kept['losses']} and {moved['losses']}")
        resident = [one["memory"]["memory/rollout_resident_gib"] for one in (kept, moved)]
        if resident[0] - resident[1] < 0.99 * moved["movable_gib"]:
            raise RuntimeError(
                f"{setting}: {moved['movable_gib']} GiB should be freed, {resident[0] - resident[1]} are"
            )
        measured.append({"part": "offload", "ranks": 1, "settings": settings, "kept": kept, "moved": moved})
        peaks = [1024 * one["memory"]["memory/rollout_peak_gib"] for one in (kept, moved)]
        rows += [
            Row("offload, losses equal", setting, 1, "yes"),
            Row("offload, rollout peak", setting, peaks[1], "MiB", f"{peaks[0]:.1f} MiB without", peaks[1] / peaks[0]),
        ]
    return measured, rows


def model(model_type: str) -> Callable[[argparse.Namespace, float], Found]:
    def measured_model(flags: argparse.Namespace, seconds: float) -> Found:
        words = ["--preset", flags.preset, "--model_type", model_type, "--device", "cuda", "--dtype", "bfloat16"]
        words += ["--batch", str(flags.batch), "--repeats", "3", "--update"]
        one = json.loads(
            run(["benchmarks/model_speed.py", *words, "--gradient_checkpointing"], seconds / 2).splitlines()[-1]
        )
        entries, rows = model_entries(one, flags.preset, model_type), model_rows(one, f"{flags.preset}, {model_type}")
        if model_type == "openvla":  # where memory allows it. The other model's forward is the same
            kept = json.loads(
                run(["benchmarks/model_speed.py", *words, "--repeats", "1"], seconds / 2).splitlines()[-1]
            )
            entries.append({"part": "update, activations kept", "ranks": 1, "printed": kept})
            rows += update_rows(kept, f"{flags.preset}, {model_type}, activations kept")
        return entries, rows

    return measured_model


def model_entries(one: dict, preset: str, model_type: str) -> list[dict]:
    """What benchmarks/model_speed.py printed, as benchmarks/cost_model.py reads it."""
    chunk_size, batch = 8 if model_type == "openvla_oft" else 1, one["batch"]
    same = {"ranks": 1, "model_path": preset, "model_type": model_type, "chunk_size": chunk_size, "printed": one}
    acting = [[batch, batch * chunk_size / one["act_actions_per_s"]]]
    return [
        {**same, "part": "act", "points": acting},
        {
            **same,
            "part": "update",
            "micro_batch_size": batch,
            "seconds": batch / one["update_samples_per_s"],
            "step_seconds": 0.0,
            "gradient_checkpointing": True,
        },
    ]


def model_rows(one: dict, setting: str) -> list[Row]:
    acting, eager, plain = (one[f"{name}_actions_per_s"] for name in ("act", "act_without_graphs", "plain"))
    return [
        Row("act", setting, acting, "actions/s"),
        Row("act, memory", setting, one["act_peak_gib"], "GiB"),
        Row("act without graphs", setting, eager, "actions/s", "act", eager / acting),
        Row("act, one sample at a time", setting, plain, "actions/s", "act", plain / acting),
        *update_rows(one, setting),
    ]


def update_rows(one: dict, setting: str) -> list[Row]:
    updating, share = one["update_samples_per_s"], one["share_of_matrix_peak"]
    return [
        Row("LoRA update", setting, updating, "decisions/s", "matrix peak", share),
        Row("LoRA update, memory", setting, one["update_peak_gib"], "GiB"),
    ]


def render(flags: argparse.Namespace, seconds: float) -> Found:
    """Two processes: SAPIEN draws on one device per process."""
    setting = "640 x 480, physics on the CPU, 500 Hz"
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{device}.npy") for device in ("card", "cpu")]
        one = itself("render", flags, seconds / 2, "--pictures", files[0])
        whole = one["physics_s"] + one["task_s"] + one["picture_s"]
        share = one["picture_s"] / whole
        rows = [
            Row("env step, rendered on the card", setting, 1 / whole, "env steps/s"),
            Row("render on the card", setting, 1 / one["picture_s"], "env steps/s", "env step", share),
        ]
        if one["has_lavapipe"]:  # else SAPIEN's "cpu" is the card too
            itself("render", flags, seconds / 2, "--pictures", files[1], "--render_backend", "sapien_cpu")
            ours, theirs = (np.load(file).astype(float) for file in files)
            one["difference"] = float(abs(ours - theirs).mean())
            rows.append(Row("picture against the CPU's", setting, one["difference"], "of 255, mean"))
    return [one], rows


def world(part: str) -> Callable[[argparse.Namespace, float], Found]:
    """A part of benchmarks/gpu_world.py."""

    def measured_part(flags: argparse.Namespace, seconds: float) -> Found:
        settings = {"asset_dir": flags.asset_dir} | ({"stand_in": True} if flags.dry else {})
        words = ["benchmarks/gpu_world.py", part, "--settings", json.dumps(settings)]
        lines = result_of(run(words, seconds, "cpu" if flags.dry else "cuda"))["lines"]
        return [{"part": part, "ranks": 1, "lines": lines}], [Row(*line) for line in lines]

    return measured_part


FIRST: dict[str, tuple[Callable[[argparse.Namespace, float], Found], int]] = {  # and its time limit, seconds
    "card": (card, 45),
    "logprobs": (logprobs, 110),
    "ppo_openvlaoft_zero2": (iteration("ppo_openvlaoft", 2), 110),
    "ppo_openvla_zero2": (iteration("ppo_openvla", 2), 110),
    "world_draw": (world("world_draw"), gpu_world.PARTS["world_draw"][1]),
    "ppo_openvlaoft_zero3": (iteration("ppo_openvlaoft", 3), 110),
    "ppo_openvla_zero3": (iteration("ppo_openvla", 3), 110),
}
MORE: dict[str, tuple[Callable[[argparse.Namespace, float], Found], int]] = {
    "graphs": (graphs, 600),
    "offload": (offload, 900),
    "openvla": (model("openvla"), 900),
    "openvla_oft": (model("openvla_oft"), 900),
    "render": (render, 300),
}
WORLD = {part: (world(part), seconds) for part, (_, seconds) in gpu_world.PARTS.items()}
PARTS = FIRST | MORE | WORLD
GROUPS = {"first": tuple(FIRST), "more": tuple(MORE), "world": tuple(WORLD)}


# ---------------------------------------------------------------------- parts, in their own process
def part_render(flags: argparse.Namespace) -> dict:
    """One env, expert actions. Some of its images go to a file."""
    import sapien

    from benchmarks.components import Stopwatch, instrumented
    from benchmarks.env_speed import expert_actions
    from envs import num_start_states, variants
    from envs.gym_env import build

    total, watch, pictures = num_start_states(MAIN, "train"), Stopwatch(), []
    env = build(MAIN, render_backend=flags.render_backend)
    device = str(env.backend.render_device)
    if flags.render_backend != "sapien_cpu" and "cuda" not in device.lower():
        raise RuntimeError(f"SAPIEN fell back to the render device {device}: no Vulkan driver for the card")
    for number in range(2):
        start = variants.decode(MAIN, "train", train_episode_id(total, 0, number, 0))
        env.start_episode(start)
        actions = expert_actions(env)[: ENV_STEPS // 2]
        env.start_episode(start)
        for step, action in enumerate(actions):
            with instrumented(watch):
                env.advance(action)
                picture = env.render_image()
            if step % 8 == 0:
                pictures.append(picture.copy())
    np.save(flags.pictures, np.stack(pictures))
    steps = watch.calls["advance"]
    physics = watch.per("physics", steps)
    return {
        "part": "env",
        "ranks": 1,
        "env_id": MAIN,
        "image_size": [640, 480],
        "sim_freq": 500,
        "asset_pack": "builtin",
        "max_episode_steps": 80,
        "render": flags.render_backend,
        "device": device,
        "physics_s": physics,
        "task_s": watch.per("advance", steps) - physics,
        "picture_s": watch.per("picture", watch.calls["picture"]),
        "reset_s": 0.0,
        "resets_per_step": 0.0,
        "steps": steps,
        "has_lavapipe": "llvmpipe" in sapien.render.get_device_summary(),
    }


ALONE = {"render": part_render}


# ---------------------------------------------------------------------- the program
def chosen_parts(only: list[str] | None) -> list[str]:
    """Names of --only as parts, in their order. A group stands for its parts. Without names it is the first group."""
    names = {part for name in only or ["first"] for part in GROUPS.get(name, (name,))}
    return [part for part in PARTS if part in names]


def main(flags: argparse.Namespace) -> int:
    if flags.part:
        print("RESULT " + json.dumps(ALONE[flags.part](flags)), flush=True)
        return 0
    if not (flags.dry or torch.cuda.is_available()):
        print(NO_CARD, file=sys.stderr)
        return 2
    host, name = bench.machine(), "dry run" if flags.dry else torch.cuda.get_device_name()
    description = without_places(describe_run(vars(flags) | {"seed": 0}, {}, num_ranks=1))
    files = bench.new_files(flags.output, flags.machine or bench.machine_name(host, name))
    measured, rows, not_done = [], [], {}
    for part in chosen_parts(flags.only):
        check, seconds = PARTS[part]
        print(f"{part} ...", file=sys.stderr, flush=True)
        found, more = [], []
        try:
            found, more = check(flags, seconds)
            measured = measured + [{"job": part, **one} for one in found]
            more = with_shares(more, name, measured)
            rows = rows + more
        except Exception as failure:  # whatever goes wrong in one part, the others go on
            not_done[part] = f"{type(failure).__name__}: {failure}".replace("|", "/").replace("\n", " ")[:300]
        lines = [*bench.header(description, host), "", *bench.table(rows, not_done)]
        content = {
            "kind": "gpu_check",
            "description": description,
            "machine": host | {"card": name},
            "measured": measured,
            "not_done": not_done,
            "rows": [row._asdict() for row in rows],
        }
        # after every part: a run that is cut off keeps what it has
        bench.write_results(files, content, lines)
        own = {name: reason for name, reason in not_done.items() if name == part}
        print("\n".join(bench.table(more, own)), file=sys.stderr, flush=True)
    print("\n".join(lines))
    print("written: " + " ".join(map(str, files)))
    return 1 if not_done else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[*PARTS, *GROUPS], help="Parts or lists to run. Without it, the first."
    )
    parser.add_argument("--asset_dir", help="Folder of the published meshes. Without it, ManiSkill's is searched.")
    parser.add_argument(
        "--preset", choices=PRESETS, default="openvla-7b", help="Sizes of the random weights. (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=16, help="Decisions per rollout step and per micro batch. (default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="Tiny models on CPUs: the code of the first list, no speed.")
    parser.add_argument(
        "--machine", help="Name of the machine in the file name of the results. Without it, the GPU gives the name."
    )
    parser.add_argument(
        "--output", type=Path, default=bench.RESULTS, help="Folder of the results. (default: %(default)s)"
    )
    parser.add_argument("--part", choices=ALONE, help=argparse.SUPPRESS)
    parser.add_argument("--render_backend", default="sapien_cuda", help=argparse.SUPPRESS)
    parser.add_argument("--pictures", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main(parse()))
