"""Rehearse the first launch of the published recipes on a cluster, with tiny weights, on two CPU cores.

    make rehearse                                        # every yaml/maniskill_*.yaml
    python benchmarks/rehearse.py --only ppo_openvla     # one of them
    python benchmarks/rehearse.py --folder /tmp/kept     # keep the runs and their logs

Every flag is the recipe's own but for sizes. So names of models and assets are those on the Hub. A server on this
machine has small folders with the same files there: sharded bfloat16 weights, index, tokenizer, statistics, adapter.
A stand-in for Slurm runs the sbatch files with the variables that sbatch and srun set. The steps of a recipe:

    plan      doctor.py: does it fit into 8 GPUs of 80 GB
    launch    sbatch: two ranks fetch everything, run one iteration, evaluate, and save
    stop      the cluster's signal in the second iteration: the ranks save, and the job is requeued
    resume    the requeued job ends the second iteration, evaluates, and saves
    switch    a third iteration by `deepspeed`: ZeRO-3, recomputed activations, offload, two pipeline stages
    evaluate  evaluate.py on the result
    cost      cost_model.py: ten iterations of the whole recipe on 8 GPUs

The published meshes are used if they are in ../shared/assets, else those made by code. The exit code is 1 if a step
failed. It cannot show what only GPUs show: CUDA, NCCL, memory, speed.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402
from fake_slurm import install  # noqa: E402
from hub_server import Hub, serving  # noqa: E402
from peft import LoraConfig  # noqa: E402

from benchmarks.bench import free_port  # noqa: E402
from envs.assets.download import DATA_SET  # noqa: E402
from vla.models.about import ABOUT  # noqa: E402
from vla.models.loading import load_policy  # noqa: E402
from vla.models.lora import LORA_TARGETS  # noqa: E402
from vla.models.saving import save_policy, save_weights  # noqa: E402
from vla.models.tiny import BRIDGE_ORIG  # noqa: E402
from vla.start.flag_files import yaml_layer  # noqa: E402
from vla.training.checkpoint import complete_checkpoints, damage  # noqa: E402

ASSETS = ROOT.parent / "shared" / "assets" / "maniskill"
RECIPES = sorted(path.stem.removeprefix("maniskill_") for path in (ROOT / "yaml").glob("maniskill_*.yaml"))
RANKS = 2
# sizes that two cores can do, as small as the recipes' other flags allow: 8 envs of a group are on one rank
SIZES = {
    "num_envs": 4,
    "num_steps": 16,
    "max_episode_steps": 16,
    "num_eval_episodes": 2,
    "num_eval_envs": 2,
    "eval_freq": 1,
    "save_freq": 1,
    "num_iterations": 2,
    "video_episodes": 1,
}
BUILTIN = {"asset_pack": "builtin", "asset_dir": None}  # without the published assets
SWITCHED = ["--num_iterations", "3", "--gradient_checkpointing", "--pipeline_stages", "2", "--micro_batch_size", "4"]
WITH_ADAPTER = ["--deepspeed_config", "ds_configs/zero3.json", "--offload", "stage"]
WHOLE = ["--deepspeed_config", "ds_configs/zero3_cpu_adam.json"]  # Adam on the CPU, which only whole models need
NAMES = ("plan", "launch", "stop", "resume", "switch", "evaluate", "cost")  # methods of Rehearsal
ITERATIONS = 10  # whose cost is computed
HANGS_AFTER = 3600.0  # seconds, which only end a step that would never end


class Step(NamedTuple):
    """What became of a step. failure: one line, or None."""

    recipe: str
    name: str
    seconds: float
    found: str
    failure: str | None = None


# ---------------------------------------------------------------------- what is published
def published(place: Path) -> dict[str, Path]:
    """Folders with tiny weights and the files of the published ones, by their names on the Hub."""
    found = {}
    for recipe in RECIPES:
        flags = yaml_layer(str(ROOT / f"yaml/maniskill_{recipe}.yaml")).values
        base = place / flags["model_path"].replace("/", "_")
        if not base.exists():
            write_base(base, flags["model_type"])
        found[flags["model_path"]] = base
        if name := flags.get("lora_path"):
            adapter = place / name.replace("/", "_")
            if not adapter.exists():
                write_adapter(adapter, base, flags["model_type"])
            found[name] = adapter
    return found


def write_base(folder: Path, model_type: str) -> None:
    """A whole model in bfloat16 and three shards. Like the published ones, it does not know its chunk size."""
    preset = "openvla-oft-tiny" if model_type == "openvla_oft" else "openvla-tiny"
    policy = load_policy(preset, model_type, value_head=False, dtype=torch.bfloat16)
    save_policy(policy, policy.state_dict(), folder)
    weights = {name.removeprefix("model."): value for name, value in policy.state_dict().items()}
    for name in ("model.safetensors", ABOUT):
        (folder / name).unlink()
    save_weights(weights, folder, max_shard_bytes=sum(value.nbytes for value in weights.values()) // 2)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if "chunk" not in key and "oft" not in key}
    auto_map = {"AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"}
    config |= {"auto_map": auto_map, "torch_dtype": "bfloat16", "transformers_version": "4.40.1"}
    config |= {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure"}
    config |= {"hf_llm_id": "meta-llama/Llama-2-7b-hf", "llm_max_length": 2048, "output_projector_states": False}
    config |= {"timm_override_act_layers": [None, None], "model_type": "openvla"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "dataset_statistics.json").write_text(json.dumps({"bridge_orig": BRIDGE_ORIG, "other": BRIDGE_ORIG}))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "modeling_prismatic.py").write_text("raise SystemExit('code of a model folder is never run')\n")
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n")


def write_adapter(folder: Path, base: Path, model_type: str) -> None:
    """An adapter of rank 32, with all fields that peft writes, and the path of another machine."""
    policy = load_policy(str(base), model_type, value_head=False, lora_rank=32, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    save_policy(policy, policy.state_dict(), folder)
    written = LoraConfig(r=32, lora_alpha=32, target_modules=LORA_TARGETS, init_lora_weights="gaussian").to_dict()
    written |= {"base_model_name_or_path": "/mnt/somewhere/else", "target_modules": LORA_TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(written, default=str))
    for path in folder.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(hub: Hub, place: Path) -> None:
    """Put models and meshes on the server."""
    for name, folder in published(place).items():
        hub.add(name, contents(folder))
    if ASSETS.is_dir():
        carrot = {f"carrot/{name}": data for name, data in contents(ASSETS / "carrot").items()}
        hub.add(DATA_SET, carrot, "dataset")


class Cluster(NamedTuple):
    """A place for runs, and the environment of everything that is started there."""

    folder: Path
    environment: dict[str, str]

    def without_models(self) -> "Cluster":
        """The same place with an empty cache of the Hub, so that a model has its published size and not that here."""
        return self._replace(environment=self.environment | {"HF_HOME": str(self.folder / "empty")})

    def start(self, words: list[str], log: Path) -> subprocess.Popen:
        """A process with a group of its own, which writes into the log."""
        program = shutil.which(words[0], path=self.environment["PATH"])
        with log.open("a") as file:
            same = dict(cwd=ROOT, env=self.environment, stdout=file, stderr=file, start_new_session=True)
            return subprocess.Popen([program, *words[1:]], **same)

    def run(self, words: list[str], log: Path) -> None:
        """RuntimeError, with the last line of the log: the exit code is not 0."""
        process = self.start(words, log)
        try:
            code = process.wait(timeout=HANGS_AFTER)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if code:
            raise RuntimeError(f"exit code {code}: {log.read_text().splitlines()[-1]}")


def make_cluster(folder: Path, hub: Hub) -> Cluster:
    """Commands of Slurm, an empty cache of the Hub, and ManiSkill's folder with what is not on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "maniskill" / "data"
    data.mkdir(parents=True)
    for part in ("robots", "tasks") if ASSETS.is_dir() else ():
        (data / part).symlink_to(ASSETS / part)
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in places}
    (folder / "slurm").mkdir()
    environment |= install(folder / "slurm") | hub.environment(folder / "hub")
    environment |= {"MS_ASSET_DIR": str(data.parent), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHON"] = sys.executable
    environment["PATH"] = f"{environment['PATH']}{os.pathsep}{Path(sys.executable).parent}"
    return Cluster(folder, environment)


# ---------------------------------------------------------------------- the steps
class Rehearsal:
    """One recipe. Every step is a method that says in a few words what it found, and raises where it fails."""

    def __init__(self, recipe: str, cluster: Cluster):
        self.recipe, self.cluster = recipe, cluster
        self.preset = f"yaml/maniskill_{recipe}.yaml"
        self.flags = yaml_layer(str(ROOT / self.preset)).values
        self.script = "train_grpo.py" if "grpo" in recipe else "train_ppo.py"
        self.run_dir = cluster.folder / recipe
        self.log = cluster.folder / f"{recipe}.log"
        self.nodes = 1 + RECIPES.index(recipe) % 2  # in turns, as the signal
        self.signal = (signal.SIGTERM, signal.SIGUSR1)[RECIPES.index(recipe) // 2 % 2]
        self.has_adapter = self.flags.get("lora_rank", 0) > 0 or "lora_path" in self.flags
        self.job: subprocess.Popen | None = None

    def sizes(self) -> list[str]:
        """The flags that differ from the recipe's."""
        small = SIZES | ({} if ASSETS.is_dir() else BUILTIN)
        small["num_envs"] = max(small["num_envs"], RANKS * self.flags.get("group_size", 1))
        return [word for name, value in small.items() for word in (f"--{name}", str(value))]

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        return ((name, getattr(self, name)) for name in NAMES)

    def plan(self) -> str:
        words = ["doctor.py", "--config", self.preset, "--num_gpus", "8", "--gpu_memory", "80", "--host_memory", "512"]
        self.cluster.without_models().run([sys.executable, *words], self.log)
        return ", ".join(re.findall(r"(?<=memory fits: )[\d.]+ of \d+ GiB", self.log.read_text())) + " of a GPU, a node"

    def launch(self) -> str:
        file, tasks = "train.sbatch" if self.nodes == 1 else "train_multinode.sbatch", RANKS // self.nodes
        words = ["sbatch", f"--nodes={self.nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
        words += [f"slurm/{file}", self.script, "--config", self.preset, *self.sizes(), "--run_dir", str(self.run_dir)]
        self.job = self.cluster.start(words, self.log)
        self.wait_for(lambda: self.iterations() == [1])
        self.check(iterations=1)
        return (
            f"{self.nodes} node{'s' * (self.nodes > 1)}, success {self.evaluated()} at the start and after iteration 1"
        )

    def stop(self) -> str:
        for rank in (self.cluster.folder / "slurm" / "pids").read_text().split():
            os.kill(int(rank), self.signal)
        self.wait_for(lambda: "start 1:" in self.log.read_text())
        self.check(iterations=1)
        return f"{self.signal.name} in iteration 2, exit code 75, requeued"

    def resume(self) -> str:
        if code := self.job.wait(timeout=HANGS_AFTER):
            raise RuntimeError(f"exit code {code}: {self.last_words()}")
        self.check(iterations=2)
        return f"from iteration 1, success {self.evaluated()}"

    def switch(self) -> str:
        more = SWITCHED + (WITH_ADAPTER if self.has_adapter else WHOLE)
        launcher = ["deepspeed", "--num_gpus", str(RANKS), "--master_port", free_port()]
        self.cluster.run([*launcher, self.script, "--resume", str(self.run_dir), *more], self.log)
        self.check(iterations=3)
        return " ".join(more[2:])

    def evaluate(self) -> str:
        words = ["evaluate.py", "--checkpoint", str(self.run_dir), "--settings", "Main-v3:train", "--num_episodes", "2"]
        output = self.cluster.folder / f"{self.recipe}_evaluation"
        self.cluster.run([sys.executable, *words, "--num_envs", "2", "--output", str(output)], self.log)
        return f"{output.name}/{'report.html' if (output / 'report.html').is_file() else 'without a page'}"

    def cost(self) -> str:
        """Of the recipe as it is, by the parts that were measured on cards and hosts."""
        steps = ITERATIONS * self.flags["num_envs"] * self.flags["num_steps"]
        words = ["benchmarks/cost_model.py", "--config", self.preset, "--num_gpus", "8", "--env_steps", str(steps)]
        self.cluster.without_models().run([sys.executable, *words], self.log)
        row = re.findall(r"^\| 8 \|.*$", self.log.read_text(), re.M)[-1].split(" | ")
        return f"{ITERATIONS} iterations in {steps / float(row[5]) / 60:.1f} min, {row[5]} env steps/s"

    # ------------------------------------------------------------------ what the files say
    def wait_for(self, condition: Callable[[], object]) -> None:
        """RuntimeError: the job has ended before."""
        end = time.monotonic() + HANGS_AFTER
        while not condition():
            if self.job.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"exit code {self.job.poll()}: {self.last_words()}")
            time.sleep(0.05)

    def iterations(self) -> list[int]:
        """Of the whole checkpoints."""
        return [int(folder.name.removeprefix("iteration_")) for folder in complete_checkpoints(self.run_dir)]

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / name).read_text().splitlines()]

    def evaluated(self) -> str:
        return ", ".join(f"{line['eval/success_once']:g}" for line in self.lines("evaluations.jsonl"))

    def check(self, iterations: int) -> None:
        """RuntimeError: a file of the run does not say what so many iterations should have left."""
        if found := damage(complete_checkpoints(self.run_dir)[-1]):
            raise RuntimeError(f"the newest checkpoint is damaged: {found}")
        logged = self.lines("metrics.jsonl")
        if [line["iteration"] for line in logged] != list(range(1, iterations + 1)):
            raise RuntimeError(f"metrics.jsonl has iterations {[line['iteration'] for line in logged]}")
        evaluated = [line["iteration"] for line in self.lines("evaluations.jsonl")]
        if evaluated != list(range(iterations + 1)):
            raise RuntimeError(f"evaluations.jsonl has iterations {evaluated}")
        wrong = [name for name, value in logged[-1].items() if not math.isfinite(value)]
        if wrong or logged[-1]["train/skipped_steps"]:
            raise RuntimeError(f"iteration {iterations} skipped a step, or has no finite {', '.join(wrong)}")

    def last_words(self) -> str:
        """The last lines of the ranks, or else of the log."""
        logs = sorted(Path(f"{self.run_dir}.logs").glob("rank_*.log"))
        return " / ".join((path.read_text().splitlines() or [""])[-1] for path in [*logs, self.log])

    def end(self) -> None:
        """End what a failed step has left."""
        if self.job is not None and self.job.poll() is None:
            os.killpg(self.job.pid, signal.SIGKILL)
            self.job.wait()


def rehearse(recipe: str, cluster: Cluster, say: Callable[[Step], None]) -> list[Step]:
    """All steps of a recipe, until one fails. `say` gets each as it ends."""
    one, done = Rehearsal(recipe, cluster), []
    try:
        for name, step in one.steps():
            began, failure, found = time.monotonic(), None, ""
            try:
                found = step()
            except Exception as error:  # whatever goes wrong with one recipe, the others are rehearsed
                failure = f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
            done.append(Step(recipe, name, time.monotonic() - began, found, failure))
            say(done[-1])
            if failure:
                break
    finally:
        one.end()
    return done


def in_words(step: Step) -> str:
    state = "FAILED" if step.failure else "ok"
    return f"{step.recipe:20} {step.name:9} {state:6} {step.seconds:6.1f} s  {step.failure or step.found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="Recipes. Without it, all.")
    parser.add_argument("--folder", type=Path, help="New folder that keeps runs and logs. Without it, none is kept.")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started, too
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as temporary, serving() as hub:
        place = flags.folder or Path(temporary)
        publish(hub, place / "published")
        for recipe in flags.only:
            cluster = make_cluster(place / recipe, hub)
            steps += rehearse(recipe, cluster, lambda step: print(in_words(step), flush=True))
    print("\n| recipe | " + " | ".join(NAMES) + " | seconds |\n|---|" + "---|" * len(NAMES) + "--:|")
    for recipe in flags.only:
        own = {step.name: step for step in steps if step.recipe == recipe}
        cells = [("FAILED" if own[name].failure else "ok") if name in own else "-" for name in NAMES]
        print(f"| {recipe} | {' | '.join(cells)} | {sum(step.seconds for step in own.values()):.0f} |")
    return 1 if any(step.failure for step in steps) else 0


if __name__ == "__main__":
    raise SystemExit(main())
