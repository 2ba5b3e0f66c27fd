"""Checks before a model or a simulator is made, so that a wrong start ends within seconds.

Nothing here joins the process group. Rank and number of ranks come from the launcher.
"""

import os
from collections.abc import Collection
from pathlib import Path

from schemas import UserError
from schemas.hub import small_folder, whole_folder
from schemas.pixels import Pixels
from vla.models.policy import PROMPT
from vla.models.published import ADAPTER_CONFIG, check_on_hub, find_base, read_folder
from vla.models.tiny import TINY_PRESETS, tiny_side_files
from vla.models.tokenizer import read_tokenizer
from vla.start.launch import launched

GIB = 2**30
LONGEST_PROMPT = 2048  # tokens, as PromptLength of schemas/flags.py
SCENE_BYTES = 2**20  # least host memory per env (measured: 1.9 MiB with one object and 16 x 16 pixels)
PROCESS_BYTES = 100 * 2**20  # least per process that simulates (measured: 520 MiB, some of them shared)


def small_files(model_path: str) -> tuple[dict, dict[str, bytes]]:
    """config.json of a checkpoint folder, a model on the Hub or a tiny preset, and the other small files."""
    if model_path in TINY_PRESETS:
        return TINY_PRESETS[model_path], tiny_side_files()
    folder = small_folder(model_path, "--model_path")
    check_on_hub(model_path)
    return read_folder(folder, sorted(TINY_PRESETS))


def pixels_of(model_path: str, image_resize: str) -> Pixels:
    """The images that a policy reads, from its config.json."""
    side = small_files(model_path)[0]["image_sizes"][0]
    return Pixels((side, side), image_resize)


def fetch_weights(source: str, model_path: str, lora_path: str | None) -> None:
    """Fetch what a policy lacks here from the Hub, before the ranks join a group in which waiting could time out.

    Args:
        source: the flag that names model_path.

    Raises:
        UserError: something cannot be fetched.
    """
    if model_path in TINY_PRESETS and not lora_path:
        return
    folder = whole_folder(model_path, source)
    if (folder / ADAPTER_CONFIG).exists():
        find_base(folder)
    if lora_path:
        whole_folder(lora_path, "--lora_path")


# ---------------------------------------------------------------------- the prompt
def prompt_room(model_path: str, texts: Collection[str], max_prompt_length: int) -> int:
    """Number of tokens that prompts are padded to: max_prompt_length, or the length of the longest text.

    This reads only the tokenizer of the checkpoint. Padding changes no action, so more of it does no harm.

    Args:
        texts: all instructions that can occur.

    Raises:
        UserError: an instruction is longer than any prompt may be.
    """
    tokenizer = read_tokenizer(small_files(model_path)[1], model_path)
    if tokenizer is None:  # load_policy() says so
        return max_prompt_length
    lengths = {text: len(tokenizer.encode(PROMPT.format(task_description=text.lower())).ids) for text in texts}
    longest = max(lengths, key=lengths.get)
    if lengths[longest] > LONGEST_PROMPT:
        raise UserError(
            f"--instruction {longest[:40]!r}... has {lengths[longest]} tokens, and a prompt has at most "
            f"{LONGEST_PROMPT}: shorten it"
        )
    if lengths[longest] > max_prompt_length and launched().rank == 0:
        print(
            f"prompts have {lengths[longest]} tokens instead of {max_prompt_length}, since {longest!r} needs them",
            flush=True,
        )
    return max(max_prompt_length, lengths[longest])


# ---------------------------------------------------------------------- the machine's memory
def host_memory() -> int:
    """Memory of this machine or its container in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            memory = min(memory, int(text))
    return memory


def refuse_above_memory(need: int, flags: str) -> None:
    """Raise UserError if more bytes are needed than the machine has."""
    if need > (memory := host_memory()):
        raise UserError(
            f"{flags} ask for at least {need / GIB:.0f} GiB of memory, but this machine has {memory / GIB:.0f}: "
            "lower them"
        )


def check_rollout_memory(model_path: str, decisions: int) -> None:
    """Raise UserError if the images of a rollout do not fit. decisions: number on all ranks of this machine."""
    side = small_files(model_path)[0]["image_sizes"][0]
    refuse_above_memory(decisions * 3 * side**2, "--num_envs and --num_steps")


def check_scene_memory(scenes: int, processes: int, image_size: tuple[int, int], flags: str) -> None:
    """Raise UserError if scenes and processes do not fit, by a low estimate.

    Args:
        scenes, processes: numbers on all ranks of this machine.
        image_size: (width, height) of the camera. flags: the flags that the user can lower.
    """
    need = scenes * (SCENE_BYTES + 3 * image_size[0] * image_size[1]) + processes * PROCESS_BYTES
    refuse_above_memory(need, flags)


# ---------------------------------------------------------------------- what applies
def check_iterations_left(checkpoint: Path | None, wanted: int, flag: str) -> None:
    """Print a line if the run that is resumed has finished its iterations.

    Args:
        wanted: the number of iterations that the run is to have.
        flag: the flag that decides this number, such as --num_iterations.

    Raises:
        UserError: the run has more iterations than that.
    """
    finished = int(checkpoint.name.rpartition("_")[2]) if checkpoint else 0
    if finished > wanted:
        raise UserError(
            f"{checkpoint.parents[1]} has finished {finished} iterations, but {flag} asks for {wanted}: raise it"
        )
    if checkpoint and finished == wanted and launched().rank == 0:
        print(f"{checkpoint.parents[1]} has finished all {finished} iterations: raise {flag} for more", flush=True)


def what_applies(
    *,
    config: Collection[str],
    resume: str | None,
    model_path: str,
    model_type: str,
    lora_path: str | None,
    lora_rank: int,
    merge_lora: bool,
    unnorm_key: str,
    dtype: str,
    max_prompt_length: int,
    deepspeed_config: str,
    env_id: str,
    instruction: str | None,
    obj_set: str,
    asset_pack: str,
    protocol: str,
    hulls: str,
    image_size: tuple[int, int],
    sim_freq: int,
    max_episode_steps: int,
    sizes: str,
) -> str:
    """Presets, model, env and sizes of a run, and what comes next, in six lines for people.

    Args:
        sizes: how much is collected and learned from, in the words of the script.
    """
    adapter = f"a fresh adapter of rank {lora_rank}" if lora_rank else "all weights are trained"
    if lora_path:
        adapter = f"the adapter {lora_path}" + (f" merged in, {adapter}" if merge_lora else "")
    task = (
        f"instruction {instruction!r}"
        if instruction
        else f"{obj_set} objects, {asset_pack} assets, protocol {protocol}"
    )
    if asset_pack == "bridge":
        task += f", {hulls} hulls"
    rate = "" if instruction else f", {sim_freq} Hz physics"
    files = [f"the run {resume}"] if resume else []
    files += [*config] or ([] if resume else ["no file (defaults of the script)"])
    return "\n".join(
        (
            f"flags   {', then '.join(files)}, then the command line",
            f"model   {model_path} as {model_type} in {dtype}, {adapter}",
            f"        statistics of {unnorm_key}, prompts of {max_prompt_length} tokens, {deepspeed_config}",
            f"env     {env_id}, {task}, {image_size[0]} x {image_size[1]} pixels{rate}, "
            f"{max_episode_steps} steps an episode",
            f"sizes   {sizes}",
            "next    model, simulator and optimizer: seconds for a tiny model, minutes for one of 7B",
        )
    )
