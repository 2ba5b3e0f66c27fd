"""LoRA: read an adapter in peft's format, put it on a model, and merge it into the weights.

A model with an adapter computes what peft would compute with the same adapter_config.json. A file that asks for more is
refused with a sentence. schemas/policies.py lists the fields that are used, those that have no effect on a trained
adapter, and those that are refused.
"""

import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import regex
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from schemas import UserError, check, parse_json, quoted
from schemas.hub import whole_folder
from schemas.policies import WITHOUT_EFFECT, AdapterConfig
from vla.files.tensors import COPY_AGAIN, digest, entry, first_not_finite, open_shard, read_small
from vla.models.layers import LoraLinear
from vla.models.openvla import OpenVLA
from vla.models.published import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FLOATS, check_keys, check_on_hub, named
from vla.text import error_text

# RLinf's targets. "proj" also hits the patch embedding's convolution
LORA_TARGETS = [
    "proj",
    "qkv",
    "fc1",
    "fc2",
    "q",
    "kv",
    "fc3",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
]
# only the language model's, as a regular expression that peft matches against whole module names
LLM_TARGETS = r"language_model\.(lm_head|.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))"

MERGE = "merge the adapter with peft and load the result"
MATCH_SECONDS = 5.0  # limit for the names of all modules. An ordinary expression needs milliseconds
# fields of adapter_config.json that are passed to peft. Others concern the optimizer or the initial weights
HONOURED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
)
LARGEST_RANK = 1024  # a larger rank must be that of one of the file's factors


class Adapter(NamedTuple):
    """The content of an adapter's folder."""

    folder: Path
    config: dict  # adapter_config.json, unchanged
    weights: dict[str, torch.Tensor]  # by the names of parameters in an injected model


# ---------------------------------------------------------------------- reading
def find_adapter(folder: Path, lora_path: str | None) -> Path | None:
    """The folder that holds the adapter, or None.

    Raises:
        UserError: lora_path holds no adapter or cannot be fetched, or there are two adapters.
    """
    beside = (folder / ADAPTER_CONFIG).exists()
    if lora_path is None:
        return folder if beside else None
    check_on_hub(lora_path)
    adapter = whole_folder(lora_path, "--lora_path")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).exists():
            if (adapter / "adapter_model.bin").exists():
                reason = " but adapter_model.bin, a pickle: convert it with peft's save_pretrained"
            else:
                reason = ": it is not the folder of an adapter"
            raise UserError(f"--lora_path {adapter} has no {name}{reason}")
    if beside and folder.resolve() != adapter.resolve():
        raise UserError(f"{folder} holds an adapter itself, so --lora_path {adapter} would be a second one: merge one")
    return adapter


def read_adapter(folder: Path | None) -> Adapter | None:
    """Read and check an adapter's folder, before the base is read.

    Raises:
        UserError: a setting is not supported here, a factor is not finite, or there are no factors.
    """
    if folder is None:
        return None
    config, file = read_adapter_config(folder), folder / ADAPTER_WEIGHTS
    with open_shard(file) as shard:
        for key in shard.keys():  # noqa: SIM118 (a shard is not a dict)
            if (kind := shard.get_slice(key).get_dtype()) not in FLOATS:
                raise UserError(f"{file} has {key} as {kind}, it must be one of {', '.join(FLOATS)}: {COPY_AGAIN}")
        weights = {injected_name(key): shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    if not weights:
        raise UserError(f"{file} is empty: it holds no tensor")
    if name := first_not_finite(weights):
        raise UserError(f"{file} has {published_name(name)} with values that are not finite: {COPY_AGAIN}")
    ranks = {config["r"], *(config.get("rank_pattern") or {}).values()}
    factors = [value for name, value in weights.items() if ".lora_A." in name and value.dim()]
    num_rows = max((factor.shape[0] for factor in factors), default=0)
    if max(ranks) > max(num_rows, LARGEST_RANK):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} has r {max(ranks)}, the largest factor in {file.name} has {num_rows} rows: "
            f"{COPY_AGAIN}"
        )
    return Adapter(folder, config, weights)


def digest_of(adapter: Adapter) -> str:
    """A text that changes with everything that decides what the adapter adds to the weights."""
    settings = {key: adapter.config[key] for key in HONOURED if adapter.config.get(key) is not None}
    entries = {name: entry(value) for name, value in adapter.weights.items()}
    return digest(entries | {ADAPTER_CONFIG: (json.dumps(settings, sort_keys=True), (), 0)})


def read_adapter_config(folder: Path) -> dict:
    """The content of adapter_config.json. Raises UserError if it is not plain LoRA."""
    file = folder / ADAPTER_CONFIG
    config = parse_json(read_small(file), str(file), COPY_AGAIN)
    if isinstance(config, dict) and config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file} has peft_type {quoted(config['peft_type'])}, only LORA is supported: {MERGE}")
    checked: AdapterConfig = check(AdapterConfig, config, str(file), MERGE)
    for key, value in checked.model_extra.items():
        if value and key not in WITHOUT_EFFECT:
            raise UserError(f"{file} sets {key} {quoted(value)}, which is not supported: {MERGE}")
    return config


def injected_name(key: str) -> str:
    """The name of a parameter in an injected model, from its key in a peft file."""
    name = key.removeprefix("base_model.model.")
    return name.replace(".lora_A.weight", ".lora_A.default.weight").replace(".lora_B.weight", ".lora_B.default.weight")


def published_name(name: str) -> str:
    """The inverse of injected_name()."""
    return "base_model.model." + name.replace(".default.weight", ".weight")


# ---------------------------------------------------------------------- putting it on
def with_adapter(
    model: OpenVLA, adapter: Adapter | None, rank: int, alpha: int, scope: str, merge: bool, base_folder: Path | None
) -> tuple[OpenVLA, dict | None]:
    """Put an adapter on the model: one that was read, a fresh one, or none.

    Args:
        adapter: from read_adapter(), or None.
        rank, alpha, scope: of a fresh adapter. Rank 0 makes none.
        merge: whether to merge `adapter` into the weights.
        base_folder: the folder of the base weights, for adapter_config.json.

    Returns:
        the model, and the adapter_config.json of the adapter that is on it (None without one).
    """
    if merge and adapter is None:
        raise UserError("merge_lora needs an adapter: give --lora_path")
    if adapter is not None:
        source = str(adapter.folder / ADAPTER_CONFIG)
        model = inject(model, adapter.config, source)
        load_adapter(model, adapter)
        if not merge:
            # a base in the adapter's own folder is saved together with the adapter, so no path is needed
            apart = base_folder is not None and base_folder != adapter.folder
            return model, {**adapter.config, **(named(base_folder) if apart else {"base_model_name_or_path": None})}
        merge_adapter(model)
    if not rank:
        return model, None
    adapter_config = {
        "peft_type": "LORA",
        **({"base_model_name_or_path": None} if merge or base_folder is None else named(base_folder)),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": LLM_TARGETS if scope == "llm" else LORA_TARGETS,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": "gaussian",
        "task_type": None,
    }
    return inject(model, adapter_config, "the fresh adapter"), adapter_config


def matching(pattern: str, names: list[str], source: str) -> list[str]:
    """The names that a regular expression matches as a whole, which is peft's rule.

    Raises:
        UserError: the text is not a regular expression, or matching takes longer than MATCH_SECONDS.
    """
    end = time.monotonic() + MATCH_SECONDS
    try:
        re.compile(pattern)  # peft uses `re`, but only `regex` has a time limit
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError:
        raise UserError(
            f"{source} has the regular expression {quoted(pattern)}, which takes more than {MATCH_SECONDS:g} s to "
            "match: list the modules by name"
        ) from None
    except (re.error, regex.error, RecursionError) as error:
        raise UserError(
            f"{source} has {quoted(pattern)}, which is not a regular expression ({error}): list the modules by name"
        ) from None


def inject(model: OpenVLA, adapter_config: dict, source: str) -> OpenVLA:
    """Put adapters (Gaussian A, zero B) on the target modules.

    There is no dropout, whatever the file says, because rollout and update must give a token the same probability.

    Args:
        source: names the adapter at the beginning of an error message.

    Raises:
        UserError: the model lacks a target module, or the file's settings do not fit it.
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen = {key: adapter_config[key] for key in HONOURED if adapter_config.get(key) is not None}
    for key in ("target_modules", "exclude_modules"):
        if chosen.get(key) == "all-linear":  # moojink's choice, and the same modules as RLinf's list
            chosen[key] = LORA_TARGETS
        elif isinstance(chosen.get(key), str):
            if key == "target_modules" and chosen.keys() & {"layers_to_transform", "layers_pattern"}:
                raise UserError(f"{source} has layers_to_transform and a text as target_modules: list the modules")
            chosen[key] = matching(chosen[key], names, f"{source}, {key},")
    try:
        config = LoraConfig(lora_dropout=0.0, init_lora_weights="gaussian", bias="none", **chosen)
        config._register_custom_module({nn.Linear: LoraLinear})
        inject_adapter_in_model(config, model)
    except (ValueError, TypeError) as error:  # such as no module of these names
        reason = error_text(error)[:200]
        raise UserError(f"{source} does not fit the model ({reason}): use the adapter of this model") from error
    return model


def load_adapter(model: OpenVLA, adapter: Adapter) -> None:
    """Fill the injected factors.

    peft also writes lm_head.base_layer.weight, because lm_head is a target. It must equal the base model's weight.
    Otherwise the adapter was made for another base.

    Raises:
        UserError: the adapter has other factors than the model, or was made for another base.
    """
    parameters, weights = dict(model.named_parameters()), dict(adapter.weights)
    strays = {name: weights.pop(name) for name in [*weights] if "lora_" not in name and name in parameters}
    for name, value in strays.items():
        ours = parameters[name].cpu().bfloat16()
        if value.shape != ours.shape or not torch.equal(value.bfloat16(), ours):
            raise UserError(
                f"{adapter.folder} was made for another base model, because its {name} is not the one loaded: load the "
                "base model that adapter_config.json names"
            )
    expected = {name: tuple(p.shape) for name, p in parameters.items() if "lora_" in name}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    check_keys(expected, found, str(adapter.folder / ADAPTER_WEIGHTS), ADAPTER_CONFIG)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


# ---------------------------------------------------------------------- taking it off
def merged_weight(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling * B A in fp32, rounded once to W's precision.

    Args:
        base: W [out, in], or [out, in, height, width] of a convolution.
        down, up: A [rank, in, ...] and B [out, rank, ...].
    """
    delta = (up.flatten(1).float() @ down.flatten(1).float()).view(base.shape)
    return (base.float() + scaling * delta).to(base.dtype)


def merge_adapter(model: OpenVLA) -> None:
    """Merge every adapter into its layer, and remove it from the model."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        layer = module.get_base_layer()
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        layer.weight.data = merged_weight(layer.weight.data, down.data, up.data, module.scaling["default"])
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer)
    del model.peft_config  # peft's note that there is an adapter


def merge_state(model: OpenVLA, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge whole tensors, by name, and leave the model unchanged. Under ZeRO-3 the model's own tensors are shards."""
    merged = {name: value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            down, up = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            base = f"{name}.base_layer.weight"
            merged[base] = merged_weight(state[base], down, up, module.scaling["default"])
    return {name.replace(".base_layer.", "."): value for name, value in merged.items()}
