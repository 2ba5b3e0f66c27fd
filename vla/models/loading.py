"""Load policies in the layout of the published checkpoints.

A folder holds config.json, model.safetensors (or shards with model.safetensors.index.json), tokenizer files, and
preprocessor_config.json. It can hold dataset_statistics.json (which takes precedence over config.json's norm_stats) and
value_head.safetensors.

An adapter consists of peft's adapter_config.json and adapter_model.safetensors. They are in a folder of their own
(`lora_path`) or next to the weights. A folder with only an adapter names its base model in base_model_name_or_path. Our
own adapters also have adapter_base.json, with digests of the base that they were trained on. They load on no other.

Weights are read tensor by tensor from mapped shards into a model that was built without memory, in the final precision
and on the final device. So the host never holds more than the model and the pages of one shard. Under ZeRO-3 the model
that is read here becomes the whole copy for the rollout (stages.make_rollout_copy). The engine's shards are cut from
it, and there is no second whole copy.

published.py reads a folder's files, lora.py its adapter and tokenizer.py its tokenizer. Their errors name the file that
does not fit.
"""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from torch import nn

from schemas import UserError, parse_json
from schemas.hub import whole_folder
from vla.files.tensors import COPY_AGAIN, first_not_finite, open_shard
from vla.models.about import OF_MODEL, check_known, known_flags
from vla.models.action_tokens import ACTION_DIM, ActionTokens
from vla.models.lora import digest_of, find_adapter, read_adapter, with_adapter
from vla.models.openvla import OpenVLA
from vla.models.openvla_oft import PUBLISHED_CHUNK_SIZE, OpenVLAOFT
from vla.models.policy import VLAPolicy
from vla.models.published import (
    action_stats,
    action_vocab_end,
    check_base,
    check_keys,
    check_on_hub,
    check_sizes,
    describe_base,
    find_base,
    read_base,
    read_folder,
    read_headers,
    read_normalization,
    shard_paths,
    stream_weights,
)
from vla.models.saving import PolicyFiles
from vla.models.tiny import TINY_PRESETS, tiny_folder
from vla.models.tokenizer import read_tokenizer
from vla.models.value_head import ValueHead
from vla.text import error_text

MODEL_TYPES = ("openvla", "openvla_oft")
DEFAULTS = dict(
    model_type="openvla", unnorm_key="bridge_orig", image_resize="tensor", oft_stop_token=False, max_prompt_length=30
)


def load_policy(
    path: str,
    model_type: str | None = None,
    *,
    unnorm_key: str | None = None,
    norm_stats: dict | None = None,
    lora_path: str | None = None,
    value_head: bool | str | None = None,
    dtype: torch.dtype = torch.float32,
    image_resize: str | None = None,
    chunk_size: int | None = None,
    oft_stop_token: bool | None = None,
    lora_rank: int = 0,
    lora_alpha: int = 32,
    lora_scope: str = "all",
    merge_lora: bool = False,
    max_prompt_length: int | None = None,
    gradient_checkpointing: bool = False,
    cuda_graphs: bool = True,
    world: dict | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> VLAPolicy:
    """Load a policy for training from a checkpoint folder, from the Hub, or from a tiny preset.

    model_type, unnorm_key, image_resize, oft_stop_token and max_prompt_length can be None. The folder's own value is
    then used if it knows it (about.py), or else the default: openvla, bridge_orig, tensor, False and 30.

    Args:
        path: a checkpoint folder, a model on the Hub (schemas/hub.py), or the name of a tiny preset, which has random
            weights from `seed`.
        model_type: openvla or openvla_oft.
        unnorm_key: the key of the statistics that turn tokens into robot units.
        norm_stats: statistics that the folder lacks, as in dataset_statistics.json: {key: {"action": ...}}. They become
            part of the policy, and are saved with it.
        lora_path: folder of a published adapter, or its name on the Hub. It keeps its own rank, alpha and targets.
        value_head: None or True uses the critic in lora_path or path, or a fresh one (from `seed`). False makes no
            critic. A file or folder names the critic to use. The critic stays fp32 whatever dtype is.
        image_resize: "tensor" (RLinf) or "pil" (upstream's evaluation).
        chunk_size: actions per decision. None takes the folder's value, or else 1 (openvla) or 8 (openvla_oft).
        oft_stop_token: end OFT's sequence with </s>. moojink's discrete checkpoints were trained so, RLinf's were not.
        lora_rank: rank of a fresh adapter if the folder has none. 0 trains the weights themselves.
        lora_scope: "all" (RLinf's targets), or "llm", which freezes vision towers and projector, also without adapter.
        merge_lora: merge the loaded adapter into the weights. lora_rank then puts a fresh one on top.
        cuda_graphs: whether act() uses recorded graphs on a GPU (cuda_graphs.py).
        world: about.world_of() of the world that the policy acts in from now on, to be saved with it.
        device: where the weights are read to, tensor by tensor.

    Raises:
        UserError: one sentence that names the file, key or flag, and the remedy.
    """
    given = dict(model_type=model_type, unnorm_key=unnorm_key, chunk_size=chunk_size)
    given |= dict(image_resize=image_resize, oft_stop_token=oft_stop_token, max_prompt_length=max_prompt_length)
    about = with_defaults(given, path, lora_path)
    model_type, unnorm_key, oft_stop_token = about["model_type"], about["unnorm_key"], about["oft_stop_token"]
    check_choices(model_type, lora_path, about["image_resize"], lora_scope)
    check_on_hub(path)
    tiny, folder = path in TINY_PRESETS, whole_folder(path)
    adapter_folder = find_adapter(folder, lora_path)
    config, side_files = tiny_folder(path) if tiny else read_folder(folder, sorted(TINY_PRESETS))
    side_files = with_statistics(side_files, norm_stats)
    chunk_size = pick_chunk_size(model_type, chunk_size, config, path)
    tokenizer, stats, normalization = read_meaning(config, side_files, unnorm_key, path)
    action_tokens = ActionTokens(action_vocab_end(config, tokenizer, path), stats)
    if model_type == "openvla_oft":
        oft_stop_token = oft_stop_token or config.get("oft_stop_token", False)
        config = {**config, "chunk_size": chunk_size, "oft_stop_token": oft_stop_token}
    base_folder = None if tiny else find_base(folder)
    adapter = read_adapter(adapter_folder)

    with torch.random.fork_rng(devices=[]):  # the same weights on every rank, and torch's generator is unchanged
        torch.manual_seed(seed)
        model, weights = make_model(model_type, config, chunk_size, oft_stop_token, base_folder, dtype, device)
        base = describe_base(weights, config, side_files, unnorm_key, stats, normalization)
        check_base(read_base(adapter_folder), base, str(adapter_folder), str(base_folder or path))
        if merge_lora and adapter:
            base["weights"] += f", with {digest_of(adapter)} merged in"
        critic = make_critic(model.hidden_size, chunk_size, value_head, (adapter_folder, folder))
        model, adapter_config = with_adapter(model, adapter, lora_rank, lora_alpha, lora_scope, merge_lora, base_folder)
    cast_parameters(model, dtype)
    freeze(model, adapter_config is not None, lora_scope)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.vision_backbone.set_normalization(normalization)
    if model_type == "openvla_oft":
        model.check_bidirectional()
    policy = VLAPolicy(
        model,
        critic,
        action_tokens,
        tokenizer,
        image_size=(config["image_sizes"][0],) * 2,
        pad_token_id=action_tokens.vocab_end,
        max_prompt_length=about["max_prompt_length"],
        chunk_size=chunk_size,
        image_resize=about["image_resize"],
        cuda_graphs=cuda_graphs,
        caches_features=not any(parameter.requires_grad for parameter in model.vision_backbone.parameters()),
    )
    about |= {"chunk_size": chunk_size, "oft_stop_token": oft_stop_token, "dtype": str(dtype).removeprefix("torch.")}
    policy.files = PolicyFiles(config, side_files, adapter_config, base, about, world)
    return policy.to(device)


def with_defaults(given: dict, path: str, lora_path: str | None) -> dict:
    """The flags of a model: those given, else those that its adapter's or its own folder knows, else the defaults.

    Raises:
        UserError: a given one contradicts what the weights were trained for.
    """
    known = (lora_path and known_flags(lora_path, "--lora_path")) or known_flags(path)
    given = {name: value for name, value in given.items() if value is not None}
    if known is not None:
        check_known(known, given)
        given = {name: value for name, value in known.flags.items() if name in OF_MODEL} | given
    return DEFAULTS | given


def read_meaning(
    config: dict, side_files: dict[str, bytes], unnorm_key: str, path: str
) -> tuple[Tokenizer | None, dict, tuple]:
    """The tokenizer, the action statistics and the image normalisation."""
    tokenizer = read_tokenizer(side_files, path)
    stats = action_stats(config, side_files, unnorm_key, path)
    return tokenizer, stats, read_normalization(config, side_files, path)


def check_choices(model_type: str, lora_path: str | None, image_resize: str, lora_scope: str) -> None:
    """Raise UserError if a flag has none of its few values."""
    if model_type not in MODEL_TYPES:
        raise UserError(f"--model_type {model_type!r} is unknown: use one of {', '.join(MODEL_TYPES)}")
    if lora_path is not None and not str(lora_path).strip():
        raise UserError("--lora_path is empty: give the folder of an adapter, or leave the flag out")
    if image_resize not in ("tensor", "pil"):
        raise UserError(f"--image_resize {image_resize!r} is unknown: use tensor or pil")
    if lora_scope not in ("all", "llm"):
        raise UserError(f"--lora_scope {lora_scope!r} is unknown: use all or llm")


def pick_chunk_size(model_type: str, chunk_size: int | None, config: dict, path: str) -> int:
    """Actions per decision, from the flag and from config.json, which has it if save_policy() wrote an OFT policy."""
    known = config.get("chunk_size")
    if model_type == "openvla":
        if known:
            raise UserError(f"{path} is an OpenVLA-OFT (chunk_size {known}): pass --model_type openvla_oft")
        if chunk_size not in (None, 1):
            raise UserError(f"--chunk_size {chunk_size}: openvla writes one action per decision, use 1")
        return 1
    if chunk_size is None:
        return known or PUBLISHED_CHUNK_SIZE
    if chunk_size < 2:
        raise UserError(
            f"--chunk_size {chunk_size}: openvla_oft writes a chunk of actions per decision, use "
            f"{known or PUBLISHED_CHUNK_SIZE}"
        )
    if known and chunk_size != known and path not in TINY_PRESETS:
        raise UserError(f"--chunk_size {chunk_size}, but {path} was trained with {known}: use {known}")
    return chunk_size


def with_statistics(side_files: dict[str, bytes], norm_stats: dict | None) -> dict[str, bytes]:
    """side_files with norm_stats added to dataset_statistics.json."""
    if not norm_stats:
        return side_files
    known = parse_json(side_files.get("dataset_statistics.json", b"{}"), "dataset_statistics.json", COPY_AGAIN)
    return {**side_files, "dataset_statistics.json": json.dumps({**known, **norm_stats}, indent=2).encode()}


def build_model(model_type: str, config: dict, chunk_size: int, stop_token: bool, on_meta: bool) -> OpenVLA:
    """The network. With on_meta its parameters have no memory, until stream_weights() fills them. Its buffers have."""

    def build() -> OpenVLA:
        if model_type == "openvla":
            return OpenVLA(config)
        return OpenVLAOFT(config, chunk_size * ACTION_DIM, stop_token)

    # cuDNN's attention is not deterministic (H100, torch 2.11), and the other kernels are as fast
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not on_meta:
        return build()
    with init_empty_weights(include_buffers=False):
        return build()


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters only. Casting buffers too would round Llama's rotary frequencies and change its actions."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def freeze(model: OpenVLA, has_adapter: bool, lora_scope: str) -> None:
    """Leave only those parameters trainable that are trained: those of the adapter, or without one all in lora_scope.

    Parameters that no forward reads are frozen.
    """
    for name, parameter in model.named_parameters():
        in_scope = lora_scope == "all" or name.startswith("language_model.")
        parameter.requires_grad_(in_scope and ("lora_" in name or not has_adapter))
    for parameter in model.unused_parameters():
        parameter.requires_grad_(False)


def make_model(
    model_type: str,
    config: dict,
    chunk_size: int,
    stop_token: bool,
    folder: Path | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[OpenVLA, str]:
    """The network, and a text that identifies its weights.

    The text is the digest() of a folder's weights. Without a folder the weights are random, and the text says how they
    were drawn: their digest depends on the machine, because vector instructions change the last bits.
    """
    if folder is None:
        model = build_model(model_type, config, chunk_size, stop_token, on_meta=False)
        model.init_weights()
        return model, f"drawn from seed {torch.initial_seed()} in {dtype}"
    headers = read_headers(folder, shard_paths(folder))
    check_sizes(config, headers, folder)
    try:
        model = build_model(model_type, config, chunk_size, stop_token, on_meta=True)
    except UserError:
        raise
    except Exception as error:  # transformers' checks raise errors of ten kinds
        reason = error_text(error)[:160]
        raise UserError(
            f"{folder}/config.json has a text_config from which no Llama can be built ({reason}): use the config.json "
            "that the model was published with"
        ) from error
    return model, stream_weights(model, folder, headers, dtype, device)


def make_critic(
    hidden_size: int, chunk_size: int, wanted: bool | str | None, folders: tuple[Path | None, ...]
) -> ValueHead | None:
    """The critic that load_policy()'s value_head asks for, with one output per action. False makes none."""
    if wanted is False:
        return None
    critic = ValueHead(hidden_size, chunk_size)
    load_critic(critic, wanted, folders)
    return critic


def load_critic(critic: ValueHead, wanted: bool | str | None, folders: tuple[Path | None, ...]) -> None:
    """Read value_head.safetensors from the wanted place, or from the first folder that has one, or from none.

    Raises:
        UserError: the wanted file is missing, does not fit the model, or has values that are not finite.
    """
    files = [folder / "value_head.safetensors" for folder in folders if folder is not None]
    if wanted not in (None, True):
        file = Path(wanted)
        files = [file / "value_head.safetensors" if file.is_dir() else file]
        if not files[0].exists():
            raise UserError(f"value_head {wanted}: there is no such file")
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return
    with open_shard(file) as shard:
        weights = {key.removeprefix("value_head."): shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    expected = {name: tuple(parameter.shape) for name, parameter in critic.named_parameters()}
    check_keys(expected, {name: tuple(value.shape) for name, value in weights.items()}, str(file), "the model")
    if name := first_not_finite(weights):
        raise UserError(f"{file} has {name} with values that are not finite: {COPY_AGAIN}")
    critic.load_state_dict(weights)
