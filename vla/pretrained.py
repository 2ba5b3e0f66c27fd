"""Load and save policies in the layout of the published checkpoints; make the tiny ones.

A folder holds config.json, model.safetensors (or shards with model.safetensors.index.json), tokenizer files, optionally
dataset_statistics.json (merged over config.json's norm_stats) and value_head.safetensors. With LoRA,
adapter_config.json and
adapter_model.safetensors in peft's layout stand beside them.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from vla.action_tokens import NUM_BINS, ActionTokens
from vla.openvla import OpenVLA
from vla.policy import PROMPT, VLAPolicy
from vla.value_head import ValueHead

# RLinf's targets; "proj" also hits the patch embedding's convolution
LORA_TARGETS = [
    "proj", "qkv", "fc1", "fc2", "q", "kv", "fc3", "out_proj",
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
]  # fmt: skip

# 1 % and 99 % quantiles of the BridgeData V2 actions, as in the published norm_stats: metres, radians, gripper
BRIDGE_ORIG = {
    "action": {
        "q01": [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715,
                -0.08092105075716972, -0.09288699507713317, -0.20718276381492615, 0.0],
        "q99": [0.028309678435325586, 0.040855254605412394, 0.040161586627364146,
                0.08192047759890528, 0.07792850524187081, 0.20382574498653397, 1.0],
        "mask": [True, True, True, True, True, True, False],
    }
}  # fmt: skip

TINY_VOCAB_END = 768  # 512 text ids, then 256 action ids
TINY_PRESETS = {
    # about 1.3 M parameters: 96 x 96 pixels, 36 patches
    "openvla-tiny": {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "image_sizes": [96, 96],
        "image_resize_strategy": "resize-naive",
        "n_action_bins": NUM_BINS,
        "pad_to_multiple_of": 64,
        "pad_token_id": TINY_VOCAB_END,
        "vision_dims": [
            {"embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 16},
            {"embed_dim": 72, "depth": 4, "num_heads": 4, "patch_size": 16},
        ],
        "text_config": {
            "model_type": "llama",
            "vocab_size": TINY_VOCAB_END + 64,
            "initializer_range": 0.09,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pad_token_id": TINY_VOCAB_END,
        },
        "norm_stats": {"bridge_orig": BRIDGE_ORIG},
    },
}

# what the tiny tokenizer learns its words from: anything else is spelled out in bytes
TINY_WORDS = """
carrot, kitchen shovel, bread, plastic bottle, 7up can, zuchinni, ketchup bottle, watering can, pipe, toy bear, fast
food cup, plant, banana, hamburger, golf ball, bbq sauce, travel cup, pepper, nonstop can, potato, baguette,
champagne glass, kitchen spoon, onion, cup, plate, cloth, carpet, newspaper, sheet metal, drawing tablet, tomato
slice, pizza, flat bowl, gramophone disk, frying pan, mouse pad, cutting board, chess board, manhole cover,
envelope, notepad, the pick place move set lay up onto into top of cube, please can you, grab and, it there
"""
TINY_CORPUS = [
    PROMPT.format(task_description=f"put {words} on {words}") for words in " ".join(TINY_WORDS.split()).split(", ")
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 ids, BOS = 1 as in Llama, made by code; the same every time."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_END - NUM_BINS,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def load_policy(
    path: str,
    model_type: str = "openvla",
    *,
    chunk_size: int = 1,
    unnorm_key: str = "bridge_orig",
    value_head: bool = True,
    dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
    lora_alpha: int = 32,
    max_prompt_length: int = 30,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> VLAPolicy:
    """A checkpoint folder, or the name of a tiny preset (random weights from `seed`), as a policy ready to train.

    Args:
        unnorm_key: which statistics turn tokens into robot units.
        value_head: with a critic; a fresh one (from `seed`) where the folder has none.
        lora_rank: 0 trains all weights that a forward reads; otherwise only the adapter and the critic are trained.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file, the key or the flag, and the remedy.
    """
    if model_type != "openvla":
        raise ValueError(f"--model_type {model_type!r} is unknown: there is openvla")
    if chunk_size != VLAPolicy.chunk_size:
        raise ValueError(f"--chunk_size {chunk_size}: openvla writes one action per decision, use 1")
    folder = Path(path)
    tiny = path in TINY_PRESETS and not folder.is_dir()
    config = TINY_PRESETS[path] if tiny else read_config(folder)
    text_config = config["text_config"]
    action_tokens = ActionTokens(
        text_config["vocab_size"] - config["pad_to_multiple_of"], action_stats(config, unnorm_key)
    )

    with torch.random.fork_rng(devices=[]):  # the same weights on every rank, and torch's own generator is left alone
        torch.manual_seed(seed)
        model = OpenVLA(config)
        critic = ValueHead(model.hidden_size, VLAPolicy.chunk_size) if value_head else None
        if not tiny:
            load_strict(model, read_weights(folder), folder)
            if critic is not None and (folder / "value_head.safetensors").exists():
                weights = load_file(folder / "value_head.safetensors")
                load_strict(critic, {key.removeprefix("value_head."): value for key, value in weights.items()}, folder)
        if lora_rank:
            model = add_lora(model, lora_rank, lora_alpha)
    if not tiny and (folder / "adapter_model.safetensors").exists():
        load_adapter(model, folder, lora_rank)
    if gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.unused_parameters():
        parameter.requires_grad_(False)
    policy = VLAPolicy(
        model,
        critic,
        action_tokens,
        tiny_tokenizer() if tiny else load_tokenizer(folder),
        image_size=(config["image_sizes"][0],) * 2,
        pad_token_id=config["pad_token_id"],
        max_prompt_length=max_prompt_length,
    )
    policy.config = config
    policy.lora_config = {"r": lora_rank, "lora_alpha": lora_alpha} if lora_rank else None
    return cast_parameters(policy, dtype)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters only. Casting buffers too would round Llama's rotary frequencies and change its actions."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


# ---------------------------------------------------------------------- reading a folder
def read_config(folder: Path) -> dict:
    """config.json with dataset_statistics.json, where there is one, merged over its norm_stats."""
    if not folder.is_dir():
        presets = ", ".join(sorted(TINY_PRESETS))
        raise FileNotFoundError(
            f"--model_path {folder} is not a folder: give a checkpoint folder or a tiny preset ({presets})"
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not an OpenVLA checkpoint folder")
    config = json.loads((folder / "config.json").read_text())
    if (folder / "dataset_statistics.json").exists():
        statistics = json.loads((folder / "dataset_statistics.json").read_text())
        config["norm_stats"] = {**config.get("norm_stats", {}), **statistics}
    return config


def action_stats(config: dict, unnorm_key: str) -> dict:
    """The action statistics of one key; the wrong key would silently scale every action."""
    if unnorm_key not in config["norm_stats"]:
        known = ", ".join(sorted(config["norm_stats"]))
        raise ValueError(f"--unnorm_key {unnorm_key!r} is not in this checkpoint's norm_stats: it has {known}")
    return config["norm_stats"][unnorm_key]["action"]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors or of the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    weights = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} lacks {name}: download the checkpoint again")
        weights.update(load_file(folder / name))
    return weights


def load_strict(module: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """load_state_dict that names what is missing or unexpected instead of going on without it."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"the weights in {folder} do not fit the model: {len(missing)} keys missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The folder's tokenizer.json, or None where it has none."""
    return PreTrainedTokenizerFast.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None


# ---------------------------------------------------------------------- LoRA
def add_lora(model: OpenVLA, rank: int, alpha: int) -> OpenVLA:
    """Put a fresh adapter on every linear layer (RLinf's targets, Gaussian A, zero B); nothing else stays trainable."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=LORA_TARGETS,
        init_lora_weights="gaussian",
        bias="none",
    )
    model = inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def load_adapter(model: OpenVLA, folder: Path, lora_rank: int) -> None:
    """Continue an adapter that save_policy() wrote."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    if lora_rank != saved["r"]:
        raise ValueError(f"{folder} holds an adapter of rank {saved['r']}: pass --lora_rank {saved['r']}")
    weights = load_file(folder / "adapter_model.safetensors")
    expected = dict(model.named_parameters())
    for key, value in weights.items():
        name = (
            key.removeprefix("base_model.model.")
            .replace(".lora_A.", ".lora_A.default.")
            .replace(".lora_B.", ".lora_B.default.")
        )
        if name not in expected:
            raise ValueError(f"{folder}/adapter_model.safetensors has {key}, which this model has no place for")
        with torch.no_grad():
            expected[name].copy_(value)


# ---------------------------------------------------------------------- saving
def save_policy(policy: VLAPolicy, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """Write whole tensors (gathered already) in the published layout. load_policy() of the folder gives them back bit
    for bit.

    Args:
        state_dict: policy.state_dict() with whole tensors on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = {k.removeprefix("model."): v.contiguous() for k, v in state_dict.items() if k.startswith("model.")}
    critic = {k: v.contiguous() for k, v in state_dict.items() if k.startswith("value_head.")}
    if policy.lora_config:
        adapter = get_peft_model_state_dict(policy.model, state_dict=model, save_embedding_layers=False)
        save_file({f"base_model.model.{k}": v for k, v in adapter.items()}, folder / "adapter_model.safetensors")
        adapter_config = {"peft_type": "LORA", "target_modules": LORA_TARGETS, "bias": "none", **policy.lora_config}
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2))
        model = {k.replace(".base_layer.", "."): v for k, v in model.items() if ".lora_" not in k}
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
    if critic:
        save_file(critic, folder / "value_head.safetensors")
    (folder / "config.json").write_text(json.dumps(policy.config, indent=2))
    if policy.tokenizer is not None:
        policy.tokenizer.save_pretrained(folder)
