"""Check on an NVIDIA GPU what CPUs cannot test, and measure its speed.

    python benchmarks/gpu_check.py                      # everything in half an hour, to benchmarks/results/
    python benchmarks/gpu_check.py --only graphs offload
    python benchmarks/gpu_check.py --only world         # the simulation alone, in 12 minutes
    python benchmarks/gpu_check.py --preset 100m        # for a GPU too small for 7B

Weights are random, and assets are made by code. Only the simulation on the GPU needs a download, of PhysX's library for
GPUs: `python doctor.py --download` fetches it with the published assets, and the part is "not done" without it. Every
part is a separate process with a time limit. A part that fails is listed as "not done" with its reason, and the others
continue. The exit code is 2 without a GPU, and 1 if a part failed.

    card           measured matrix peak and memory bandwidth of one GPU
    graphs         CUDA graphs give the same results as single kernels, bit for bit
    offload        losses with and without --offload stage are equal bit for bit, and memory is freed
    openvla, openvla_oft    act with and without graphs, a LoRA update, on random weights of the preset
    zero3          the preset with ZeRO-3 on one GPU, rollout and update in turns, next to doctor.py's plan
    quickstart     the real script on the GPU
    render         images from the GPU, physics on the CPU, and the difference from the CPU's images
    batch          physics and images of all envs in one batch on the GPU (experimental)
    world          what is open about that batch, in twelve parts of 12 minutes in total: benchmarks/gpu_world.py
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench, gpu_world
from benchmarks.bench import Row
from benchmarks.model_speed import PRESETS, random_inputs, random_policy
from envs.variants import train_episode_id
from vla.distributed import rank, setup_distributed
from vla.logger import describe_run
from vla.text import without_places
from vla.training.engine import backward, build_engine, read_deepspeed_config
from vla.training.memory_plan import Recipe, make_plan
from vla.training.stages import GIB, StageSwitcher, make_rollout_copy, rollout_stage, update_stage

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
    found = bench.measure_parts(1, ("limits",), {"dtype": "bfloat16"}, seconds, "cuda")
    return found, bench.limit_rows(found)


def graphs(flags: argparse.Namespace, seconds: float) -> Found:
    """tests/models/test_cuda_graphs.py; a test that was skipped has shown nothing."""
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
        if model_type == "openvla":  # where memory allows it; the other model's forward is the same
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


def zero3(flags: argparse.Namespace, seconds: float) -> Found:
    measured, rows = [], []
    for how in ("stage", "none"):
        one = itself("zero3", flags, seconds / 2, "--batch", str(flags.batch), "--offload", how)
        measured.append({"part": "zero3", "ranks": 1, "preset": flags.preset, "offload": how, **one})
        setting = f"{flags.preset}, LoRA, offload {how}, {flags.batch} decisions"
        for stage in ("rollout", "update"):
            rows.append(Row(f"ZeRO-3 {stage}", setting, one[f"{stage}_s"], "s"))
            peak, planned = one[f"{stage}_peak_gib"], one.get(f"{stage}_planned_gib")
            planned_row = ("doctor.py's plan", peak / planned) if planned else ()
            rows.append(Row(f"ZeRO-3 {stage}, memory", setting, peak, "GiB", *planned_row))
    return measured, rows


def quickstart(flags: argparse.Namespace, seconds: float) -> Found:
    short = {**bench.SHORT, "dtype": "bfloat16", "offload": "stage"}
    one = bench.measure_iterations(1, short, seconds, "cuda")
    one["part"] = "iteration on a card"  # plan.py has no parts to check it with
    rate = one["env_steps"] / one["iteration_s"]
    return [one], [Row("quickstart iteration", "ZeRO-3, offload stage, bfloat16", rate, "env steps/s")]


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


def batch(flags: argparse.Namespace, seconds: float) -> Found:
    one = itself("batch", flags, seconds, "--num_envs", str(flags.num_envs))
    setting = f"{flags.num_envs} envs, 640 x 480, 500 Hz, physx_cuda"
    return [one], [Row("env steps in one batch", setting, one["env_steps_per_s"], "env steps/s")]


def world(part: str) -> Callable[[argparse.Namespace, float], Found]:
    """A part of benchmarks/gpu_world.py."""

    def measured_part(flags: argparse.Namespace, seconds: float) -> Found:
        settings = json.dumps({"asset_dir": flags.asset_dir})
        lines = result_of(run(["benchmarks/gpu_world.py", part, "--settings", settings], seconds))["lines"]
        return [{"part": part, "ranks": 1, "lines": lines}], [Row(*line) for line in lines]

    return measured_part


PARTS: dict[str, tuple[Callable[[argparse.Namespace, float], Found], int]] = {  # and its time limit, seconds
    "card": (card, 180),
    "graphs": (graphs, 600),
    "offload": (offload, 900),
    "openvla": (model("openvla"), 900),
    "openvla_oft": (model("openvla_oft"), 900),
    "zero3": (zero3, 1200),
    "quickstart": (quickstart, 600),
    "render": (render, 300),
    "batch": (batch, 600),
    **{part: (world(part), seconds) for part, (_, seconds) in gpu_world.PARTS.items()},
}
GROUPS = {"world": tuple(gpu_world.PARTS)}


# ---------------------------------------------------------------------- parts, in their own process
def part_zero3(flags: argparse.Namespace) -> dict:
    """A LoRA policy of random weights under ZeRO-3: rollout and update in turns, the first turn left out."""
    device = setup_distributed(0)
    config = read_deepspeed_config("ds_configs/zero3.json", "bfloat16", flags.offload)
    policy = random_policy(flags.preset, "openvla", device.type, torch.bfloat16, 32, "all")
    policy.model.enable_gradient_checkpointing()
    rollout_copy = make_rollout_copy(policy, 3, flags.offload)
    rates = dict(learning_rate=1e-6, value_learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1.0)
    engine = build_engine(policy, config, micro_batch_size=flags.batch, **rates)
    stages, seconds = StageSwitcher(engine, rollout_copy, flags.offload), {"rollout": 0.0, "update": 0.0}
    inputs = random_inputs(policy, flags.batch, device.type)
    for turn in range(3):
        began = time.perf_counter()
        with rollout_stage(stages) as actor:
            tokens, old_logprobs, _ = actor.act(inputs, 1.0)
            old_logprobs = old_logprobs.clone()
            tokens.cpu()  # waits for the card
        acted = time.perf_counter()
        with update_stage(stages):
            new = engine("evaluate", inputs, tokens)
            loss = (new.logprobs - old_logprobs).exp().mean() + new.values.pow(2).mean()
            norm = backward(engine, loss, last=True)
        if turn:
            seconds["rollout"] += (acted - began) / 2
            seconds["update"] += (time.perf_counter() - acted) / 2
    memory = stages.pop_metrics()
    result = {f"{name}_s": value for name, value in seconds.items()} | {"gradient_norm": norm}
    result |= {f"{stage}_peak_gib": memory[f"memory/{stage}_peak_gib"] for stage in seconds}
    return result | (planned_gib(flags) if flags.preset == "openvla-7b" else {})


def planned_gib(flags: argparse.Namespace) -> dict[str, float]:
    """doctor.py's peaks for the same run of openvla-7b, without what torch does not allocate."""
    recipe = Recipe(
        model_path="openvla-7b",
        model_type="openvla",
        chunk_size=1,
        lora_rank=32,
        lora_scope="all",
        dtype="bfloat16",
        critic=True,
        max_prompt_length=30,
        gradient_checkpointing=True,
        micro_batch_size=flags.batch,
        num_envs=flags.batch,
        num_eval_envs=1,
        num_steps=1,
        num_env_workers=0,
        offload=flags.offload,
        zero_stage=3,
        cpu_adam=False,
    )
    plan = make_plan(recipe, 1)
    system = sum(size for name, size in plan.rollout.items() if name.endswith("(assumed)"))
    return {f"{stage}_planned_gib": (plan.peak(stage) - system) / GIB for stage in ("rollout", "update")}


def part_render(flags: argparse.Namespace) -> dict:
    """One env, expert actions; some of its pictures go to a file."""
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


def part_batch(flags: argparse.Namespace) -> dict:
    """The arm held still, which a batch in lock-step does not care about."""
    from envs import make_envs

    actions = torch.zeros(flags.num_envs, 1, 7)
    with make_envs(MAIN, flags.num_envs, sim_backend="physx_cuda", num_env_workers=4, auto_reset=True) as envs:
        envs.reset()
        for _ in range(3):
            envs.step(actions)
        began, turns = time.perf_counter(), 20
        for _ in range(turns):
            envs.step(actions)
        seconds = time.perf_counter() - began
    return {
        "part": "batch",
        "ranks": 1,
        "num_envs": flags.num_envs,
        "env_steps_per_s": turns * flags.num_envs / seconds,
    }


ALONE = {"zero3": part_zero3, "render": part_render, "batch": part_batch}


# ---------------------------------------------------------------------- the program
def chosen_parts(only: list[str] | None) -> list[str]:
    """Names of --only as parts, in their order. A group stands for its parts."""
    names = {part for name in only or PARTS for part in GROUPS.get(name, (name,))}
    return [part for part in PARTS if part in names]


def main(flags: argparse.Namespace) -> int:
    if flags.part:
        result = ALONE[flags.part](flags)
        if rank() == 0:
            print("RESULT " + json.dumps(result), flush=True)
        return 0
    if not torch.cuda.is_available():
        print(NO_CARD, file=sys.stderr)
        return 2
    host, name = bench.machine(), torch.cuda.get_device_name()
    description = without_places(describe_run(vars(flags) | {"seed": 0}, {}, num_ranks=1))
    files = bench.new_files(flags.output, flags.machine or bench.machine_name(host, name))
    measured, rows, not_done = [], [], {}
    for part in chosen_parts(flags.only):
        check, seconds = PARTS[part]
        print(f"{part} ...", file=sys.stderr, flush=True)
        found, more = [], []
        try:
            found, more = check(flags, seconds)
            measured, rows = measured + [{"job": part, **one} for one in found], rows + more
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
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *GROUPS], help="Parts to run. Without it, all are run.")
    parser.add_argument("--asset_dir", help="Folder of the published meshes. Without it, ManiSkill's is searched.")
    parser.add_argument(
        "--preset", choices=PRESETS, default="openvla-7b", help="Sizes of the random weights. (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=16, help="Decisions per rollout step and per micro batch. (default: %(default)s)"
    )
    parser.add_argument("--num_envs", type=int, default=64, help="Envs in the batch on the GPU. (default: %(default)s)")
    parser.add_argument(
        "--machine", help="Name of the machine in the file name of the results. Without it, the GPU gives the name."
    )
    parser.add_argument(
        "--output", type=Path, default=bench.RESULTS, help="Folder of the results. (default: %(default)s)"
    )
    parser.add_argument("--part", choices=ALONE, help=argparse.SUPPRESS)
    parser.add_argument("--offload", default="none", help=argparse.SUPPRESS)
    parser.add_argument("--render_backend", default="sapien_cuda", help=argparse.SUPPRESS)
    parser.add_argument("--pictures", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main(parse()))
