"""Try wrong inputs one by one, and report how each of them ends.

    python benchmarks/trials.py --every 8                every eighth input of each kind
    python benchmarks/trials.py                          all of them: about 2,500 starts
    python benchmarks/trials.py --only flags yaml        some kinds
    python benchmarks/trials.py --only flags --list      their names, nothing is run

The kinds are flags, yaml, runs (run folders and checkpoints), policies (model and adapter folders), evaluations and
demos. Each trial is a script with one wrong input, in a process and a folder of its own. It ends in one of these:

    sentence     exit code 2, and one sentence that names the wrong thing
    unnamed      exit code 2, and one sentence that does not name it
    traceback    any other exit code but 0
    hang         no end within the time limit
    taken        exit code 0: the input was accepted, which is right for some of them

Inputs that do not end in a sentence are printed, with all files that were written. --output keeps all answers.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECONDS = 60.0  # after which a trial counts as hanging
WORLD = {"image_size": ["32", "32"], "sim_freq": ["100"], "max_episode_steps": ["8"]}
ENV_ID = "PutOnPlateInScene25Single-v1"
TRAIN = {
    "model_path": ["openvla-oft-tiny"],
    "model_type": ["openvla_oft"],
    "chunk_size": ["4"],
    "lora_rank": ["4"],
    "dtype": ["float32"],
    "env_id": [ENV_ID],
    "num_envs": ["4"],
    "num_steps": ["8"],
    "num_minibatches": ["1"],
    "num_eval_episodes": ["2"],
    "num_eval_envs": ["2"],
    "num_iterations": ["1"],
    "eval_freq": ["0"],
    "video_episodes": ["0"],
    "deepspeed_config": ["ds_configs/zero0.json"],
    **WORLD,
}
SFT = {name: value for name, value in TRAIN.items() if name not in ("num_envs", "num_steps", "num_minibatches")}
SFT = {name: value for name, value in SFT.items() if name != "num_iterations"} | {
    "unnorm_key": [ENV_ID],
    "num_updates": ["1"],
    "updates_per_iteration": ["1"],
    "batch_size": ["2"],
}
EVALUATE = {
    "settings": ["Single-v1:train"],
    "num_episodes": ["2"],
    "num_envs": ["2"],
    "temperature": ["0"],
    "video_episodes": [],
    "video_failures": ["0"],
}
DEMOS = {"env_id": [ENV_ID], "num_demos": ["2"], "num_env_workers": ["0"], "max_translation": ["0.05"], **WORLD}
DEMOS |= {"max_rotation": ["0.4"], "max_episode_steps": ["40"]}


@dataclasses.dataclass
class Trial:
    kind: str
    name: str
    script: str
    flags: dict[str, list[str]]
    names: str  # a piece of text that the sentence should hold
    prepare: Callable[[Path], None] = lambda folder: None  # works in the trial's folder, which is the working directory
    more: list[str] = dataclasses.field(default_factory=list)  # words behind the flags


# ---------------------------------------------------------------------- one trial
def words(flags: dict[str, list[str]]) -> list[str]:
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def run_script(script: str, argv: list[str], log: Path, seconds: float) -> int | None:
    """Exit code of a script that runs in a fork of this warm process. None: it did not end in time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.argv = [str(ROOT / script), *argv]
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def try_one(trial: Trial, base: Path, place: Path) -> dict | None:
    """How a trial ends, in a copy of the base folder. None: the file has nothing that could be damaged like that."""
    folder = place / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    try:
        trial.prepare(folder)
    except StopIteration:
        return None
    os.chdir(folder)
    before = listing(folder)
    began = time.monotonic()
    code = run_script(trial.script, words(trial.flags) + trial.more, place / "log", SECONDS)
    text = (place / "log").read_text(errors="replace")
    said = [line for line in text.splitlines() if line.startswith("error")]
    ending = "traceback"
    if code is None:
        ending = "hang"
    elif code == 0:
        ending = "taken"
    elif code == 2 and len(said) == 1 and "Traceback" not in text:
        ending = "sentence" if trial.names in text else "unnamed"
    written = sorted(str(path) for path in listing(folder) - before)
    os.chdir("/")
    return {
        "kind": trial.kind,
        "name": trial.name,
        "ending": ending,
        "seconds": round(time.monotonic() - began, 1),
        "said": said[0] if said else text[-300:],
        "written": written if ending != "taken" else [],
    }


def listing(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


# ---------------------------------------------------------------------- flags and yaml
def fields_of(script: str) -> dict[str, typing.Any]:
    """Name of every flag of a script -> its type, without annotations."""
    module = __import__(script.removesuffix(".py"))
    hints = typing.get_type_hints(module.Args)
    return {field.name: hints[field.name] for field in dataclasses.fields(module.Args)}


def numbers_in(kind: typing.Any) -> set[type]:
    """Which of int, float and str a flag takes."""
    if kind in (int, float, str):
        return {kind}
    return set().union(*(numbers_in(part) for part in typing.get_args(kind)), set())


def flag_trials() -> Iterator[Trial]:
    """Every flag with what no run can want."""
    for script, start in (
        ("train_ppo.py", TRAIN),
        ("train_grpo.py", TRAIN | {"group_size": ["2"]}),
        ("train_sft.py", SFT | {"demos": ["demos"]}),
        (
            "evaluate.py",
            EVALUATE | WORLD | {"checkpoint": ["policy"], "model_type": ["openvla_oft"], "dtype": ["float32"]},
        ),
        ("collect_demos.py", DEMOS | {"output": ["new_demos"]}),
    ):
        for flag, kind in fields_of(script).items():
            if flag == "local_rank" or bool in typing.get_args(kind) or kind is bool:
                continue
            found = numbers_in(kind)
            values = ["nan", "inf", "-inf", "-1", "1e400", "one"] if float in found else []
            values += ["-1", "1.5", "9" * 30, "one"] if int in found else []
            values += [""] if str in found and typing.get_origin(kind) is not tuple else []
            for value in values:
                count = 2 if flag == "image_size" else 1
                yield Trial(
                    "flags", f"{script} --{flag} {value!r}", script, start | {flag: [value] * count}, f"--{flag}"
                )
        for flag in (
            "num_envs",
            "num_steps",
            "chunk_size",
            "lora_rank",
            "micro_batch_size",
            "num_env_workers",
            "num_demos",
        ):
            if flag in fields_of(script):
                yield Trial("flags", f"{script} --{flag} 1000000", script, start | {flag: ["1000000"]}, f"--{flag}")
        if "image_size" in fields_of(script):
            huge = start | {"image_size": ["1000000", "1000000"]}
            yield Trial("flags", f"{script} --image_size 1000000 1000000", script, huge, "--image_size")


YAMLS = {
    "utf-16": "num_iterations: 1\n".encode("utf-16"),
    "latin-1": "instruction: Möhre\n".encode("latin-1"),
    "empty": b"",
    "a list": b"- num_iterations\n- 1\n",
    "a number": b"7\n",
    "tabs": b"num_iterations:\n\t1\n",
    "a key twice": b"num_iterations: 1\nnum_iterations: 2\n",
    "a key twice in both spellings": b"num_iterations: 1\nnum-iterations: 2\n",
    "octal": b"seed: 010\n",
    "nan": b"learning_rate: .nan\n",
    "infinity": b"learning_rate: .inf\n",
    "null": b"learning_rate: null\n",
    "a text for a number": b"learning_rate: fast\n",
    "a number for a switch": b"auto_reset: 3\n",
    "a switch for a number": b"num_envs: true\n",
    "a mapping for a number": b"num_envs: {a: 1}\n",
    "a list for a number": b"num_envs: [1, 2]\n",
    "nested lists": b"image_size: [[32, 32]]\n",
    "one of two": b"image_size: [32]\n",
    "a flag in a list": b'image_size: [32, 32, "--seed", "3"]\n',
    "a flag in a text": b'run_dir: "--seed=3"\n',
    "a flag as a key": b"--seed: 3\n",
    "python": b"seed: !!python/object/apply:os.system ['touch owned']\n",
    "an unknown tag": b"seed: !thing 3\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "unknown key": b"learning_rat: 1\n",
    "a number as a key": b"3: 1\n",
    "an empty text": b'run_dir: ""\n',
    "NUL": b"seed: 1\0\n",
    "an anchor that holds itself": b"image_size: &a [*a, *a]\n",
}


def yaml_trials() -> Iterator[Trial]:
    for name, content in YAMLS.items():

        def prepare(folder: Path, content: bytes = content) -> None:
            (folder / "wrong.yaml").write_bytes(content)

        flags = {name: value for name, value in TRAIN.items() if f"{name}: ".encode() not in content}
        yield Trial("yaml", name, "train_ppo.py", {"config": ["wrong.yaml"]} | flags, "wrong.yaml", prepare)
    yield Trial("yaml", "a pipe", "train_ppo.py", {"config": ["p"]}, "--config", lambda f: os.mkfifo(f / "p"))
    yield Trial("yaml", "a folder", "train_ppo.py", {"config": ["d"]}, "--config", lambda f: (f / "d").mkdir())
    yield Trial("yaml", "missing", "train_ppo.py", {"config": ["none.yaml"]}, "none.yaml")


# ---------------------------------------------------------------------- files that were damaged
def damages(path: str, keys: bool = True) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Ways to damage a file of the trial's folder, JSON key by key."""

    def write(content: bytes) -> Callable[[Path], None]:
        return lambda folder: (folder / path).write_bytes(content)

    def cut(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: len(content) // 2])

    def pipe(folder: Path) -> None:
        (folder / path).unlink()
        os.mkfifo(folder / path)

    def as_folder(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).mkdir()

    def link_to_itself(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).symlink_to(folder / path)

    yield "missing", lambda folder: (folder / path).unlink()
    yield "empty", write(b"")
    yield "cut short", cut
    yield "binary", write(bytes(range(256)))
    yield "a pipe", pipe
    yield "a folder", as_folder
    yield "a link to itself", link_to_itself
    yield "a Git LFS pointer", write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    if keys:
        yield "a list", write(b"[]")
        yield "null", write(b"null")
        yield "nested deeply", write(b"[" * 100_000)
        yield "utf-16", lambda folder: (folder / path).write_bytes((folder / path).read_text().encode("utf-16"))


WRONG_VALUES = (("gone", ...), ("null", None), ("a list", []), ("a text", "x"), ("-1", -1), ("NaN", math.nan))


def key_damages(base: Path, path: str, chosen: list[tuple] | None = None) -> Iterator[tuple[str, Callable, str]]:
    """Every key of a JSON file (or the chosen paths of keys) gone, or of another type. Also names the key."""
    content = json.loads((base / path).read_text().splitlines()[0] if path.endswith("l") else (base / path).read_text())
    for keys in chosen or [(key,) for key in content]:
        for name, value in WRONG_VALUES:

            def prepare(folder: Path, keys: tuple = keys, value: typing.Any = value) -> None:
                text = (folder / path).read_text()
                first, rest = (text.split("\n", 1) + [""])[:2] if path.endswith("l") else (text, "")
                whole = json.loads(first)
                inner = whole
                for key in keys[:-1]:
                    inner = inner[key]
                if value is ...:
                    del inner[keys[-1]]
                else:
                    inner[keys[-1]] = value
                (folder / path).write_text(json.dumps(whole) + ("\n" + rest if rest else ""))

            yield f"{'.'.join(map(str, keys))} {name}", prepare, str(keys[-1])


def change_weights(path: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / path)
        change(tensors)
        save_file(tensors, folder / path, metadata={"format": "pt"})

    return prepare


def not_finite(value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        name = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].numel())
        tensors[name].view(-1)[0] = value

    return change


def rename_first(tensors: dict) -> None:
    tensors["strange"] = tensors.pop(sorted(tensors)[0])


def as_integers(tensors: dict) -> None:
    import torch

    name = sorted(tensors)[0]
    tensors[name] = tensors[name].to(torch.int8)


def cut_rows(tensors: dict) -> None:
    name = next(name for name in sorted(tensors) if tensors[name].dim() and len(tensors[name]))
    tensors[name] = tensors[name][1:].clone()


WEIGHTS = {
    "NaN": not_finite(math.nan),
    "infinity": not_finite(math.inf),
    "another name": rename_first,
    "int8": as_integers,
    "another shape": cut_rows,
    "no tensor": dict.clear,
}


def flip_a_bit(path: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        content[-5] ^= 0x10
        (folder / path).write_bytes(content)

    return prepare


def huge_header(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def file_trials(kind: str, base: Path, path: str, script: str, flags: dict, keys: list | bool) -> Iterator[Trial]:
    """All damages of one file."""
    is_json = path.endswith((".json", ".jsonl"))
    for name, prepare in damages(path, keys=is_json):
        yield Trial(kind, f"{script} {path} {name}", script, flags, Path(path).name, prepare)
    if is_json and keys is not False:  # True: all of them
        for name, prepare, key in key_damages(base, path, None if keys is True else keys):
            yield Trial(kind, f"{script} {path} {name}", script, flags, key, prepare)
    if path.endswith(".safetensors"):
        for name, change in WEIGHTS.items():
            prepare = change_weights(path, change)
            yield Trial(kind, f"{script} {path} {name}", script, flags, Path(path).name, prepare)
        yield Trial(kind, f"{script} {path} a flipped bit", script, flags, Path(path).name, flip_a_bit(path))
        yield Trial(kind, f"{script} {path} a huge header", script, flags, Path(path).name, huge_header(path))


RESUME = {"resume": ["run"], "num_iterations": ["2"]}


def run_trials(base: Path) -> Iterator[Trial]:
    yield from file_trials("runs", base, "run/args.json", "train_ppo.py", RESUME, True)
    checkpoint = "run/checkpoints/iteration_000001"
    for path in sorted((base / checkpoint).rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".pt"):
            name = str(path.relative_to(base))
            yield from file_trials("runs", base, name, "train_ppo.py", RESUME, name.endswith("state.json"))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        yield from file_trials("runs", base, f"run/{name}", "train_ppo.py", RESUME, False)
    yield from file_trials("runs", base, "run/args.json", "evaluate.py", {"checkpoint": ["run"]} | EVALUATE, True)
    for flag, value in {
        "model_path": "openvla-tiny",
        "unnorm_key": "other",
        "lora_rank": "2",
        "lora_alpha": "7",
        "image_resize": "pil",
        "chunk_size": "2",
        "max_prompt_length": "3",
        "model_type": "openvla",
        "lora_scope": "llm",
        "sim_freq": "50",
        "image_size": "64",
        "obj_set": "test",
        "env_id": "PutOnPlateInScene25Main-v3",
        "num_envs": "2",
        "seed": "7",
        "max_episode_steps": "4",
        "protocol": "rlinf",
        "critic": "hidden",
        "dtype": "bfloat16",
        "oft_stop_token": "",
    }.items():
        values = [value] * (2 if flag == "image_size" else 1) if value else []
        yield Trial("runs", f"--resume with another --{flag}", "train_ppo.py", RESUME | {flag: values}, flag)


LLAMA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type")
CONFIG_KEYS = [("text_config",), ("norm_stats",), ("image_sizes",), ("vision_dims",), ("n_action_bins",)]
CONFIG_KEYS += [("pad_to_multiple_of",), ("chunk_size",), *[("text_config", name) for name in LLAMA]]
STATS = ("norm_stats", "bridge_orig", "action")
CONFIG_KEYS += [STATS, STATS[:2], *[(*STATS, name) for name in ("q01", "q99", "mask")]]


def policy_trials(base: Path) -> Iterator[Trial]:
    whole = EVALUATE | WORLD | {"checkpoint": ["policy"], "model_type": ["openvla_oft"], "dtype": ["float32"]}
    yield from file_trials("policies", base, "policy/config.json", "evaluate.py", whole, CONFIG_KEYS)
    for name in ("model.safetensors", "tokenizer.json"):
        yield from file_trials("policies", base, f"policy/{name}", "evaluate.py", whole, False)
    keys = [("means",), ("stds",), ("interpolations",), ("image_resize_strategy",), ("input_sizes",)]
    yield from file_trials("policies", base, "policy/preprocessor_config.json", "evaluate.py", whole, keys)
    adapter = whole | {"lora_path": ["adapter"]}
    yield from file_trials("policies", base, "adapter/adapter_config.json", "evaluate.py", adapter, True)
    yield from file_trials("policies", base, "adapter/adapter_model.safetensors", "evaluate.py", adapter, False)
    for name, change in {
        "layers a million": ("text_config", "num_hidden_layers", 10**6),
        "a vocabulary of 10^12": ("text_config", "vocab_size", 10**12),
        "bounds exchanged": (*STATS, "q01", [1.0] * 7),
        "six bounds": (*STATS, "q99", [1.0] * 6),
        "NaN bounds": (*STATS, "q99", [math.nan] * 7),
        "a mask of texts": (*STATS, "mask", ["yes"] * 7),
        "image of 10^6": ("image_sizes", [10**6, 10**6]),
    }.items():

        def prepare(folder: Path, change: tuple = change) -> None:
            content = json.loads((folder / "policy/config.json").read_text())
            inner = content
            for key in change[:-2]:
                inner = inner[key]
            inner[change[-2]] = change[-1]
            (folder / "policy/config.json").write_text(json.dumps(content))

        yield Trial("policies", f"config.json: {name}", "evaluate.py", whole, "config.json", prepare)
    settings = {
        "init_lora_weights": ("pissa", "olora", "eva", "corda", "loftq"),
        "use_dora": (True,),
        "fan_in_fan_out": (True,),
        "layers_to_transform": ([0],),
        "layer_replication": ([[0, 1]],),
        "trainable_token_indices": ([1],),
        "target_modules": ("(a+)+$", "((.*)*)*x", "nothing", [], 7),
        "r": (0, 10**7),
        "bias": ("all",),
        "peft_type": ("IA3",),
        "modules_to_save": (["lm_head"],),
        "use_qalora": (True,),
        "something_new": (True,),
        "lora_alpha": (0,),
    }
    for key, values in settings.items():
        for value in values:

            def prepare(folder: Path, key: str = key, value: typing.Any = value) -> None:
                content = json.loads((folder / "adapter/adapter_config.json").read_text())
                (folder / "adapter/adapter_config.json").write_text(json.dumps(content | {key: value}))

            yield Trial("policies", f"adapter_config.json: {key} {value}", "evaluate.py", adapter, key, prepare)


def evaluation_trials(base: Path) -> Iterator[Trial]:
    again = {"checkpoint": ["run"]} | EVALUATE | {"num_episodes": ["3"], "output": ["evaluation"], "resume": []}
    yield from file_trials("evaluations", base, "evaluation/evaluation.json", "evaluate.py", again, True)
    yield from file_trials("evaluations", base, "evaluation/episodes.jsonl", "evaluate.py", again, True)
    both = {"compare": ["evaluation", "evaluation_b"], "output": ["comparison"]}
    yield from file_trials("evaluations", base, "evaluation_b/results.json", "evaluate.py", both, True)


def demo_trials(base: Path) -> Iterator[Trial]:
    import h5py

    flags = SFT | {"demos": ["demos"]}
    yield from file_trials("demos", base, "demos/trajectory.json", "train_sft.py", flags, True)
    yield from file_trials("demos", base, "demos/trajectory.h5", "train_sft.py", flags, False)
    for name in sorted(path.name for path in (base / "demos").glob("*.json") if path.name != "trajectory.json"):
        yield from file_trials("demos", base, f"demos/{name}", "train_sft.py", flags, False)
    names: list[str] = []
    with h5py.File(base / "demos/trajectory.h5") as file:
        file.visititems(lambda name, node: names.append(name))
    for name in [name for name in names if name.startswith("traj_0")]:
        for how in ("gone", "another type", "shorter", "an external link"):

            def prepare(folder: Path, name: str = name, how: str = how) -> None:
                with h5py.File(folder / "demos/trajectory.h5", "a") as file:
                    node = file[name]
                    value = None if isinstance(node, h5py.Group) else node[()]
                    del file[name]
                    if how == "another type":
                        file[name] = "text"
                    elif how == "shorter" and value is not None and value.ndim:
                        file[name] = value[:-1]
                    elif how == "an external link":
                        file[name] = h5py.ExternalLink("/etc/hostname.h5", "/x")

            yield Trial("demos", f"trajectory.h5 {name} {how}", "train_sft.py", flags, name.split("/")[-1], prepare)


# ---------------------------------------------------------------------- the whole
def make_base(place: Path) -> Path:
    """A run folder, a policy, an adapter, two evaluations and a set of demonstrations, all tiny."""
    base = place / "base"
    base.mkdir()
    os.chdir(base)
    commands = [
        ("collect_demos.py", words(DEMOS | {"output": ["demos"], "max_episode_steps": ["40"]})),
        ("train_ppo.py", words(TRAIN | {"run_dir": ["run"], "critic": ["state"]})),
        ("evaluate.py", words(EVALUATE | {"checkpoint": ["run"], "output": ["evaluation"]})),
        ("evaluate.py", words(EVALUATE | {"checkpoint": ["run"], "output": ["evaluation_b"]})),
    ]
    for script, argv in commands:
        if run_script(script, argv, place / "log", 600.0) != 0:
            raise RuntimeError(f"{script} {' '.join(argv)} failed:\n{(place / 'log').read_text()}")
    saved = base / "run/checkpoints/iteration_000001/policy"
    shutil.copytree(saved, base / "policy", ignore=shutil.ignore_patterns("adapter_*", "base*"))
    (base / "adapter").mkdir()
    for file in saved.glob("adapter_*"):
        shutil.copy(file, base / "adapter")
    os.chdir("/")
    return base


KINDS: dict[str, Callable[..., Iterator[Trial]]] = {
    "flags": lambda base: flag_trials(),
    "yaml": lambda base: yaml_trials(),
    "runs": run_trials,
    "policies": policy_trials,
    "evaluations": evaluation_trials,
    "demos": demo_trials,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=[*KINDS], help="Kinds of inputs. (default: %(default)s)"
    )
    parser.add_argument("--match", default="", help="Text that the names of the inputs must contain.")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        help="Step through the inputs of each kind: 3 takes every third. (default: %(default)s)",
    )
    parser.add_argument("--skip", type=int, default=0, help="Number of the first input. (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="Print the names of the inputs and run nothing.")
    parser.add_argument("--output", type=Path, help="JSON file for all answers.")
    parser.add_argument(
        "--show",
        nargs="+",
        default=["unnamed", "traceback", "hang", "taken"],
        help="Endings to print. (default: %(default)s)",
    )
    flags = parser.parse_args()
    for module in ("train_ppo", "train_grpo", "train_sft", "evaluate", "collect_demos", "mani_skill.envs"):
        importlib.import_module(module)  # once, for all the forks

    answers = []
    with tempfile.TemporaryDirectory(prefix="solovla_trials_") as name:
        place = Path(name)
        base = make_base(place)
        trials = []
        for kind in flags.only:
            matching = [trial for trial in KINDS[kind](base) if flags.match in trial.name]
            trials += matching[flags.skip :: flags.every]
        for number, trial in enumerate(trials):
            if flags.list:
                print(trial.kind, trial.name)
                continue
            answer = try_one(trial, base, place)
            if answer is None:
                continue
            answers.append(answer)
            if answer["ending"] in flags.show or answer["written"]:
                took = f"{answer['ending']:9} {answer['seconds']:5.1f} s"
                print(f"{number}/{len(trials)} {took}  {trial.kind}: {trial.name}")
                print(f"      {answer['said'][-300:]!r} {answer['written'][:3] or ''}", flush=True)
    for kind in flags.only:
        counts = Counter(answer["ending"] for answer in answers if answer["kind"] == kind)
        print(f"{kind:12} {sum(counts.values()):4} inputs: {dict(counts)}")
    if flags.output:
        flags.output.write_text(json.dumps(answers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
