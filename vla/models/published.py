"""Reads a folder in the published layout: config.json, action statistics, image normalisation and weights.

A setting in a folder has the effect that it has in transformers, or it is refused with one sentence. Otherwise a wrong
base, missing keys or wrong statistics would silently cost tens of points of success. Nothing is ever unpickled.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from schemas import UserError, check, parse_json
from schemas.hub import name_of, repo_of, top_files, whole_folder
from schemas.policies import ActionBounds, AdapterBase, PolicyConfig, Preprocessor, Statistics, WeightIndex
from vla.files.tensors import COPY_AGAIN, digest, entry, is_finite, open_shard, read_small
from vla.models.action_tokens import NUM_BINS
from vla.models.vision import VisionBackbone

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that weights may have

# copied byte for byte from the loaded folder to a saved one, so that the saved folder is as complete
SIDE_FILES = (
    "preprocessor_config.json",
    "generation_config.json",
    "dataset_statistics.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# parts of other variants of OpenVLA-OFT, by the beginning of their files' names
FOREIGN_PARTS = {
    "action_head--": "an L1 regression head, which has no distribution over actions: RL on it gives 0 % success",
    "noisy_action_projector--": "a diffusion head, which has no distribution over tokens",
    "proprio_projector--": "a proprioception input, which the discrete ManiSkill models do not have",
    "vision_backbone--": "FiLM-conditioned towers, which the discrete ManiSkill models do not have",
}
# weights in other formats than safetensors
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
IS_A_PICKLE = "a pickle, which could run code and is never read: convert it with transformers' save_pretrained"
# a tensor in files of old transformers versions. Newer ones compute it from config.json
OLD_BUFFER = re.compile(r"language_model\.model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


# ---------------------------------------------------------------------- config.json and the files beside it
def read_folder(folder: Path, presets: list[str]) -> tuple[dict, dict[str, bytes]]:
    """The content of config.json, and the small files next to it by name.

    Raises:
        UserError: the folder is missing, has another kind of model, or a config.json that is not supported.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: give a checkpoint folder, the name of a model on the Hub such as "
            f"gen-robot/openvla-7b-rlvla-warmup, or a name for random weights ({', '.join(presets)})"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: it is not an OpenVLA checkpoint folder")
    check_files([file.name for file in folder.iterdir()], str(folder))
    source = str(folder / "config.json")
    config = parse_json(read_small(folder / "config.json"), source, COPY_AGAIN)
    check(PolicyConfig, config, source, "use an OpenVLA or OpenVLA-OFT checkpoint, or fix the key")
    side_files = {name: read_small(folder / name) for name in SIDE_FILES if (folder / name).exists()}
    return config, side_files


def check_files(names: Collection[str], place: str) -> None:
    """Raise UserError if a folder of these files has a part of another model."""
    for name in sorted(names):
        for start, what in FOREIGN_PARTS.items():
            if name.startswith(start):
                raise UserError(
                    f"{place} holds {name}, {what}: use a discrete-token checkpoint, such as RLinf's for ManiSkill"
                )


def check_on_hub(path: str) -> None:
    """Raise UserError if a model on the Hub cannot be used, by the names of its files, before weights are fetched."""
    names = top_files(path)
    check_files(names, path)
    pickles = sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{path} holds no .safetensors but {pickles[0]}, {IS_A_PICKLE}")


def action_vocab_end(config: dict, tokenizer: Tokenizer | None, path: str) -> int:
    """One past the last action id.

    The 256 action ids are the last of the text vocabulary, right before the padding id. The model's vocabulary is
    rounded up from there.

    Raises:
        UserError: config.json or the tokenizer contradicts this, so every action would be read from wrong ids.
    """
    text_config = config["text_config"]
    vocab_size, rounding = text_config["vocab_size"], config.get("pad_to_multiple_of", 0)
    padding = config.get("pad_token_id", text_config.get("pad_token_id"))
    num_words = None if tokenizer is None else tokenizer.get_vocab_size(with_added_tokens=False)
    vocab_end = vocab_size - rounding
    config_fits = rounding > 0 and vocab_end >= NUM_BINS and padding == vocab_end
    tokenizer_fits = num_words is None or num_words <= vocab_end
    if not config_fits or not tokenizer_fits:
        raise UserError(
            f"the action ids do not fit the vocabulary of {path}: vocab_size {vocab_size} minus pad_to_multiple_of "
            f"{rounding} must be the padding id (it is {padding}) and at least the tokenizer's size "
            f"({'unknown' if num_words is None else num_words}), so check config.json"
        )
    return vocab_end


def read_statistics(config: dict, side_files: dict[str, bytes], path: str) -> dict[str, tuple[str, Any]]:
    """{unnorm_key: (its file, its content)}. dataset_statistics.json takes precedence over config.json's norm_stats."""
    source = f"{path}/dataset_statistics.json"
    beside = parse_json(side_files.get("dataset_statistics.json", b"{}"), source, COPY_AGAIN)
    beside = check(dict[str, Any], beside, source, COPY_AGAIN)
    inside = {key: (f"{path}/config.json", value) for key, value in (config.get("norm_stats") or {}).items()}
    return inside | {key: (source, value) for key, value in beside.items()}


def action_stats(config: dict, side_files: dict[str, bytes], unnorm_key: str, path: str) -> dict:
    """The action statistics of one key. A wrong key would silently scale every action.

    Raises:
        UserError: the key is missing, or does not have seven finite quantiles in order and a mask of seven.
    """
    norm_stats = read_statistics(config, side_files, path)
    if unnorm_key not in norm_stats:
        known = ", ".join(sorted(norm_stats)) or "none"
        raise UserError(f"--unnorm_key {unnorm_key!r} is not in the norm_stats of {path}: it has {known}")
    source, stats = norm_stats[unnorm_key]
    remedy = "use the statistics that the model was trained with, or another --unnorm_key"
    checked: ActionBounds = check(Statistics, stats, f"{source}, in {unnorm_key!r},", remedy).action
    return {"q01": checked.q01, "q99": checked.q99, "mask": checked.mask}


def read_normalization(config: dict, side_files: dict[str, bytes], path: str) -> tuple:
    """((mean, std) of DINOv2, (mean, std) of SigLIP) from preprocessor_config.json.

    Without that file, the published towers have known values.

    Raises:
        UserError: the file is missing for other towers, or it prepares images in a way that is not supported.
    """
    source = f"{path}/preprocessor_config.json"
    if "preprocessor_config.json" not in side_files:
        if "vision_dims" in config:
            raise UserError(
                f"{source} is missing, and these towers' means and stds are not known without it: {COPY_AGAIN}"
            )
        return VisionBackbone.NORMALIZATION
    remedy = "use the preprocessor_config.json that the model was published with"
    content = parse_json(side_files["preprocessor_config.json"], source, remedy)
    if isinstance(content, dict) and "means" not in content and "image_mean" in content:
        raise UserError(
            f"{source} has image_mean, which is for a model with one tower. This model needs means and stds with an "
            f"entry per tower: {remedy}"
        )
    read: Preprocessor = check(Preprocessor, content, source, remedy)
    for _, *size in read.input_sizes or []:
        if size != config["image_sizes"]:
            raise UserError(
                f"{source} has input_sizes of {size} pixels, config.json has image_sizes {config['image_sizes']}: "
                f"{remedy}"
            )
    return tuple(zip(read.means, read.stds))


# ---------------------------------------------------------------------- weights
def has_weights(folder: Path) -> bool:
    """Whether the folder has weights, or a broken link to them, which is reported when it is read."""
    return os.path.lexists(folder / WEIGHTS) or os.path.lexists(folder / INDEX)


def shard_paths(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names. transformers looks in this order.

    Raises:
        UserError: both are missing, or a shard is missing.
    """
    if os.path.lexists(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if not os.path.lexists(folder / INDEX):
        raise UserError(no_weights(folder))
    names = sorted(set(weight_map(folder).values()))
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder} lacks {name}, which {INDEX} names: {COPY_AGAIN}")
    return [folder / name for name in names]


def weight_map(folder: Path) -> dict[str, str]:
    """{tensor: file} from model.safetensors.index.json."""
    source = str(folder / INDEX)
    content = parse_json(read_small(folder / INDEX), source, COPY_AGAIN)
    return check(WeightIndex, content, source, COPY_AGAIN).weight_map


def no_weights(folder: Path) -> str:
    """The error message for a folder without weights: what it holds instead, and what to do."""
    problem = f"{folder} lacks {WEIGHTS}"
    others = {ADAPTER_WEIGHTS, "value_head.safetensors"}
    if shards := sorted(path for path in folder.glob("*.safetensors") if path.name not in others):
        return f"{problem} and {INDEX}, it holds {shards[0].name}: copy the index, which lists the files' tensors"
    for pattern in PICKLES:
        if pickles := sorted(folder.glob(pattern)):
            return f"{problem}, it holds {pickles[0].name}, {IS_A_PICKLE}"
    return f"{problem}: {COPY_AGAIN}"


def read_headers(folder: Path, paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of all shards. No weight is read.

    Raises:
        UserError: a tensor has integers or is in two files, or the index lists other tensors.
    """
    found, places = {}, {}
    for path in paths:
        with open_shard(path) as shard:
            for key in shard.keys():  # noqa: SIM118 (a shard is not a dict)
                header = shard.get_slice(key)
                if header.get_dtype() not in FLOATS:
                    raise UserError(
                        f"{path} has {key} as {header.get_dtype()}, weights must be one of {', '.join(FLOATS)}: use "
                        "the checkpoint that is not quantized"
                    )
                if key in places:
                    raise UserError(f"{path} has {key}, and {places[key]} has it too: {COPY_AGAIN}")
                found[key], places[key] = tuple(header.get_shape()), path.name
    if paths != [folder / WEIGHTS]:
        check_index(weight_map(folder), places, folder / INDEX)
    return found


def check_index(listed: dict[str, str], found: dict[str, str], index: Path) -> None:
    """Raise UserError unless the index lists exactly the tensors in the shards. Both arguments are {tensor: file}."""
    for key in sorted(listed.keys() | found.keys()):
        if listed.get(key) != found.get(key):
            raise UserError(
                f"{index} has {key} in {listed.get(key, 'no file')}, it is in {found.get(key, 'none')}: copy the index "
                "and its shards from one place"
            )


def check_keys(expected: dict[str, tuple], found: dict[str, tuple], what: str, implied_by: str = "config.json") -> None:
    """Raise UserError unless a file has the tensors of the model.

    Args:
        expected, found: {name: shape} of the model and of the file.
        what: names the file in the error message.
        implied_by: names the source of the expected shapes.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"{what} does not fit the model: {len(missing)} keys missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )
    for name, shape in expected.items():
        if tuple(shape) != tuple(found[name]):
            raise UserError(f"{what} has {name} of shape {tuple(found[name])}, {implied_by} implies {tuple(shape)}")


def check_sizes(config: dict, found: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare the sizes in config.json with the shapes in the files, before a network of these sizes is built.

    Raises:
        UserError: they differ, such as a million layers in config.json and two in the files.
    """
    text = check(PolicyConfig, config, "config.json").text_config

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in found if key.startswith(prefix)})

    embedding = found.get("language_model.model.embed_tokens.weight", (0, 0))
    gate = found.get("language_model.model.layers.0.mlp.gate_proj.weight", (0, 0))
    sizes = {
        "text_config.num_hidden_layers": (text.num_hidden_layers, layers("language_model.model.layers.")),
        "text_config.vocab_size": (text.vocab_size, embedding[0]),
        "text_config.hidden_size": (text.hidden_size, embedding[-1]),
        "text_config.intermediate_size": (text.intermediate_size, gate[0]),
    }
    for tower, dims in zip(("featurizer", "fused_featurizer"), config.get("vision_dims", [])):
        number = layers(f"vision_backbone.{tower}.blocks.")
        sizes[f"vision_dims, {tower}: depth"] = (dims["depth"], number)
    for key, (configured, stored) in sizes.items():
        if configured != stored:
            raise UserError(
                f"{folder}/config.json has {key} {configured}, the weights of {folder} hold {stored}: use the "
                "config.json and the weights of one model"
            )


def stream_weights(
    model: nn.Module, folder: Path, found: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str
) -> str:
    """Fill a model on the meta device with the weights of a folder's shards, tensor by tensor.

    Args:
        found: read_headers() of the folder. All names and shapes are compared before weights are read.

    Returns:
        digest() of the files' tensors.

    Raises:
        UserError: the files have other tensors than the model, or one that is not finite.
    """
    what, entries = f"the checkpoint in {folder}", {}
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_keys(expected, {key: shape for key, shape in found.items() if not OLD_BUFFER.fullmatch(key)}, what)
    for path in shard_paths(folder):
        with open_shard(path) as shard:
            for key in shard.keys():  # noqa: SIM118 (a shard is not a dict)
                stored = shard.get_tensor(key)
                if OLD_BUFFER.fullmatch(key):
                    check_old_buffer(model, stored, path, key)
                    continue
                # a copy, because the mapped pages belong to the file, which a later save may replace
                value = stored.to(device=device, dtype=dtype, copy=True)
                if not is_finite(value):
                    raise UserError(f"{path} has {key} with values that are not finite as {dtype}: {COPY_AGAIN}")
                entries[key] = entry(stored)
                owner, _, leaf = key.rpartition(".")
                model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value)
    return digest(entries)


def check_old_buffer(model: nn.Module, stored: torch.Tensor, path: Path, key: str) -> None:
    """Raise UserError unless a stored buffer equals the one that is computed from config.json, which the model uses."""
    ours = model.language_model.model.rotary_emb.inv_freq.cpu().float()
    if stored.shape != ours.shape or not torch.allclose(stored.float(), ours, rtol=1e-2):  # it may be stored in bf16
        raise UserError(
            f"{path} has {key}, which contradicts config.json's rope_theta: set text_config.rope_theta to the value "
            "that the model was trained with"
        )


# ---------------------------------------------------------------------- the base of an adapter
def find_base(folder: Path) -> Path:
    """The folder with the weights: the folder itself, or the base that its adapter names.

    Raises:
        UserError: there are no weights, or two folders could be meant.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        if not has_weights(folder):
            raise UserError(no_weights(folder))
        return folder
    source = folder / ADAPTER_CONFIG
    content = check(dict[str, Any], parse_json(read_small(source), str(source), COPY_AGAIN), str(source), COPY_AGAIN)
    base = content.get("base_model_name_or_path")
    if has_weights(folder):
        names_another = base and (not isinstance(base, str) or Path(base).resolve() != folder.resolve())
        if names_another:
            raise UserError(
                f"{folder} holds weights, and {source.name} names the base {base!r}: set base_model_name_or_path to "
                "null if these weights are the base, else move the adapter into a folder of its own"
            )
        return folder
    return named_base(folder, source, base, content.get("revision"))


def named_base(folder: Path, source: Path, base: object, revision: object) -> Path:
    """The folder that the adapter in `folder` names as its base in `source`. A model of the Hub is downloaded.

    Raises:
        UserError: it is not a folder with weights alone.
    """
    if not isinstance(base, str) or not base or not (os.path.isdir(base) or repo_of(base)):
        raise UserError(
            f"{source} has base_model_name_or_path {base!r}, which is not a folder here: load the base model and give "
            f"{folder} as --lora_path"
        )
    pinned = f"{base}@{revision}" if repo_of(base) and revision else base
    place = whole_folder(pinned, f"{source}: base_model_name_or_path")
    if (place / ADAPTER_CONFIG).exists():
        itself = "itself" if place.resolve() == folder.resolve() else f"{base}, which holds an adapter too"
        raise UserError(
            f"{source} has base_model_name_or_path {itself}: name a folder with whole weights, with any other adapter "
            "merged into them"
        )
    if not has_weights(place):
        raise UserError(no_weights(place))
    return place


def named(folder: Path) -> dict:
    """How adapter_config.json names the base in a folder: a model of the Hub with its commit, or the path."""
    if found := name_of(folder):
        return {"base_model_name_or_path": found[0], "revision": found[1]}
    return {"base_model_name_or_path": str(folder.resolve())}


def describe_base(
    weights: str, config: dict, side_files: dict[str, bytes], unnorm_key: str, stats: dict, normalization: tuple
) -> dict:
    """Digests of all parts of a policy: {weights, config, pictures, tokenizer, statistics: {unnorm_key: ...}}.

    It is saved with an adapter (schemas.policies.AdapterBase). Values that cannot change an action are left out:
    statistics of other keys, names, and versions.
    """

    def of(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    size_keys = ("image_sizes", "text_config", "vision_dims", "timm_model_ids", "pad_to_multiple_of", "pad_token_id")
    irrelevant = ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "initializer_range", "use_cache")
    sizes = {key: config.get(key) for key in size_keys}
    sizes["text_config"] = {key: value for key, value in config["text_config"].items() if key not in irrelevant}
    tokenizer = side_files.get("tokenizer.json")
    return {
        "weights": weights,
        "config": of(sizes),
        "pictures": of(normalization),
        "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest(),
        "statistics": {unnorm_key: of(stats)},
    }


BASE_PARTS = {
    "weights": "its weights differ",
    "config": "the sizes in its config.json differ",
    "pictures": "its preprocessor_config.json differs",
    "tokenizer": "its tokenizer.json differs",
    "statistics": "its action statistics differ",
}


def check_base(recorded: dict | None, found: dict, what: str, base: str) -> None:
    """Check that an adapter or a run is used with the base that it was trained on.

    Args:
        recorded: describe_base() from when the adapter or the run was saved, or None without a record.
        found: describe_base() of the base that is loaded now.
        what: names the adapter or the run in the error message.
        base: the folder that is loaded now.

    Raises:
        UserError: the base is another one. Statistics are compared for those keys that both have.
    """
    if recorded is None:
        return
    remedy = "copy it again, or delete the record to continue without this check"
    recorded = check(AdapterBase, recorded, f"the record of the base of {what}", remedy).model_dump()
    for key, difference in BASE_PARTS.items():
        ours, theirs = recorded[key], found[key]
        if key == "statistics":
            theirs = {name: theirs[name] for name in ours if name in theirs}
            ours = {name: ours[name] for name in theirs}
        if ours != theirs:
            raise UserError(
                f"{what} was trained on another base than {base}, because {difference}: use the base that it was "
                "trained on"
            )


def read_base(folder: Path | None) -> dict | None:
    """The record of the base in an adapter's folder, or None. Published adapters have none."""
    if folder is None or not (folder / ADAPTER_BASE).exists():
        return None
    return parse_json(read_small(folder / ADAPTER_BASE), str(folder / ADAPTER_BASE), COPY_AGAIN)
