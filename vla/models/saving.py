"""Writes a policy in the layout of the published checkpoints: a whole model, or an adapter that names its base."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vla.files.tensors import digest, entry, save_tensors
from vla.models.about import ABOUT, about_bytes
from vla.models.lora import merge_state, published_name
from vla.models.policy import VLAPolicy
from vla.models.published import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PolicyFiles:
    """The data that save_policy() needs besides weights."""

    config: dict  # config.json, without the statistics of dataset_statistics.json
    side_files: dict[str, bytes]  # name -> content
    adapter_config: dict | None  # adapter_config.json. Without base_model_name_or_path the base is saved, too
    base: dict  # published.describe_base() of the loaded and merged weights, before any training
    about: dict  # the flags of about.OF_MODEL
    world: dict | None  # the world that the policy acts in, from about.world_of()


def saves_adapter_alone(policy: VLAPolicy) -> bool:
    """Whether only the adapter is saved: the weights under it are unchanged, and are in a folder of their own."""
    config = policy.files.adapter_config
    return config is not None and config["base_model_name_or_path"] is not None


def save_policy(
    policy: VLAPolicy, state_dict: dict[str, torch.Tensor], folder: Path, *, merge_lora: bool = False
) -> None:
    """Write gathered tensors in the published layout. load_policy() restores them bit for bit.

    Args:
        state_dict: policy.state_dict() with whole tensors on the CPU. If saves_adapter_alone(), factors and critic are
            enough.
        merge_lora: write a whole model with the adapter merged in. Otherwise only the adapter is written, and it names
            its base. A preset's base is not on disk, so it is written with the adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = {k.removeprefix("model."): v.contiguous() for k, v in state_dict.items() if k.startswith("model.")}
    critic = {k: v.contiguous() for k, v in state_dict.items() if k.startswith("value_head.")}
    adapter_config = policy.files.adapter_config
    if adapter_config is None:
        save_weights(model, folder)
    elif merge_lora:
        save_weights(merge_state(policy.model, model), folder)
    else:
        adapter = {published_name(name): value for name, value in model.items() if ".lora_" in name}
        save_tensors(adapter, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(adapter_config, indent=2))
        base = policy.files.base
        if not saves_adapter_alone(policy):
            whole = {k.replace(".base_layer.", "."): v for k, v in model.items() if ".lora_" not in k}
            save_weights(whole, folder)
            base = {**base, "weights": digest({name: entry(value) for name, value in whole.items()})}
        (folder / ADAPTER_BASE).write_text(json.dumps(base, indent=2))
    if critic:
        save_tensors(critic, folder / "value_head.safetensors")
    (folder / "config.json").write_text(json.dumps(policy.files.config, indent=2))
    (folder / ABOUT).write_bytes(about_bytes(policy.files.about, policy.files.world))
    for name, content in policy.files.side_files.items():
        (folder / name).write_bytes(content)


def save_weights(weights: dict[str, torch.Tensor], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors, or numbered shards with an index if it would be larger than max_shard_bytes."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        save_tensors(weights, folder / WEIGHTS, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
