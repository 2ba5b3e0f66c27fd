"""Load and save policies in the layout of the published checkpoints; make the tiny ones.

A folder holds config.json, model.safetensors (or shards with model.safetensors.index.json), tokenizer files,
preprocessor_config.json, optionally dataset_statistics.json (merged over config.json's norm_stats) and
value_head.safetensors. An adapter is adapter_config.json and adapter_model.safetensors as peft writes them, in a folder
of its own (`lora_path`) or beside the weights; a folder with an adapter alone names its base model in
base_model_name_or_path.

Weights are read tensor by tensor from mapped shards into a model built without memory, in the precision and on the
device they are wanted, so the host never holds more than the model and one shard's pages. Under ZeRO-3 what is read is
the whole model that every rank acts with in the rollout (stages.make_rollout_copy); the engine's shards are cut from it
and there is no second whole copy.

Whatever does not fit is an error that names it: a wrong base, missing keys or the wrong statistics cost tens of points
of success without a word otherwise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from vla.action_tokens import ACTION_DIM, NUM_BINS, ActionTokens
from vla.fused import use_fused_layers
from vla.openvla import OpenVLA
from vla.openvla_oft import OpenVLAOFT
from vla.policy import PROMPT, VLAPolicy
from vla.tensors import open_shard, save_tensors
from vla.value_head import ValueHead
from vla.vision import VisionBackbone

MODEL_TYPES = ("openvla", "openvla_oft")
PUBLISHED_CHUNK_SIZE = 8  # actions per decision of the discrete OpenVLA-OFT checkpoints; their config.json omits it
BOS_ID = 1
MAX_SHARD_BYTES = 5 * 10**9

# kept byte for byte from load to save, so that a saved folder is as complete as the one it came from
SIDE_FILES = (
    "preprocessor_config.json", "generation_config.json", "dataset_statistics.json", "processor_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip

# parts that only other variants of OpenVLA-OFT have, by the start of their files' names
FOREIGN_PARTS = {
    "action_head--": "an L1 regression head, which has no distribution over actions: RL on it gives 0 % success",
    "noisy_action_projector--": "a diffusion head, which has no distribution over tokens",
    "proprio_projector--": "a proprioception input, which the discrete ManiSkill models do not have",
    "vision_backbone--": "FiLM-conditioned towers, which the discrete ManiSkill models do not have",
}

# RLinf's targets; "proj" also hits the patch embedding's convolution
LORA_TARGETS = [
    "proj", "qkv", "fc1", "fc2", "q", "kv", "fc3", "out_proj",
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
]  # fmt: skip
# the language model's alone, as the regular expression that peft matches whole module names with
LLM_TARGETS = r"language_model\.(lm_head|.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))"

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
# about 1 M parameters: 64 x 64 pixels, 64 patches
TINY_OPENVLA = {
    "model_type": "openvla",
    "architectures": ["OpenVLAForActionPrediction"],
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "image_sizes": [64, 64],
    "image_resize_strategy": "resize-naive",
    "n_action_bins": NUM_BINS,
    "pad_to_multiple_of": 64,
    "pad_token_id": TINY_VOCAB_END,
    "vision_dims": [
        {"embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": 8},
        {"embed_dim": 72, "depth": 3, "num_heads": 4, "patch_size": 8},
    ],
    "text_config": {
        "model_type": "llama",
        "vocab_size": TINY_VOCAB_END + 64,
        "initializer_range": 0.1,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": TINY_VOCAB_END,
    },
    "norm_stats": {"bridge_orig": BRIDGE_ORIG},
}
# of the builtin wooden table; colours that are not about zero and one learn three times slower
TINY_MEAN, TINY_STD = [0.55, 0.45, 0.32], [0.1, 0.1, 0.1]
TINY_PRESETS = {
    "openvla-tiny": TINY_OPENVLA,
    "openvla-oft-tiny": {**TINY_OPENVLA, "chunk_size": PUBLISHED_CHUNK_SIZE},
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


@dataclass(frozen=True)
class PolicyFiles:
    """What save_policy() needs besides weights."""

    config: dict  # config.json, without the statistics merged over it
    side_files: dict[str, bytes]  # name -> content
    adapter_config: dict | None  # peft's adapter_config.json; base_model_name_or_path None: the base is saved beside it


def load_policy(
    path: str,
    model_type: str = "openvla",
    *,
    unnorm_key: str = "bridge_orig",
    norm_stats: dict | None = None,
    lora_path: str | None = None,
    value_head: bool | str | None = None,
    dtype: torch.dtype = torch.float32,
    image_resize: str = "tensor",
    chunk_size: int | None = None,
    oft_stop_token: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 32,
    lora_scope: str = "all",
    merge_lora: bool = False,
    max_prompt_length: int = 30,
    gradient_checkpointing: bool = False,
    cuda_graphs: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> VLAPolicy:
    """A checkpoint folder, or the name of a tiny preset (random weights from `seed`), as a policy ready to train.

    Args:
        model_type: openvla or openvla_oft; published folders do not say which they are.
        unnorm_key: which statistics turn tokens into robot units.
        norm_stats: statistics that the folder lacks, as in dataset_statistics.json: {key: {"action": ...}}. They become
            part of the policy and of what is saved.
        lora_path: folder of a published adapter; it keeps its own rank, alpha and targets.
        value_head: None or True: the critic in lora_path or path, else a fresh one (from `seed`). False: no critic. A
            file or folder: the critic in there. It stays fp32 whatever dtype is.
        image_resize: "tensor" (RLinf) or "pil" (upstream's evaluation).
        chunk_size: actions per decision; None: what the folder says, else 1 (openvla) or 8 (openvla_oft).
        oft_stop_token: end OFT's sequence in </s>, as moojink's discrete checkpoints were trained; RLinf's were not.
        lora_rank: of a fresh adapter where the folder has none; 0 trains the weights themselves.
        lora_scope: "all" (RLinf's targets), or "llm": vision towers and projector stay frozen, without adapter too.
        merge_lora: add the loaded adapter into the weights; lora_rank then puts a fresh one on top.
        cuda_graphs: on a GPU act() launches recorded graphs (graphs.py).
        device: where weights are read to, tensor by tensor.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file, the key or the flag, and the remedy.
    """
    check_choices(model_type, lora_path, image_resize, lora_scope)
    folder = Path(path)
    tiny = path in TINY_PRESETS and not folder.is_dir()
    adapter_folder = find_adapter(folder, lora_path)
    config, side_files = (TINY_PRESETS[path], tiny_side_files()) if tiny else read_folder(folder)
    side_files = with_statistics(side_files, norm_stats)
    chunk_size = pick_chunk_size(model_type, chunk_size, config, path)
    tokenizer = read_tokenizer(side_files)
    stats = action_stats(config, side_files, unnorm_key, path)
    action_tokens = ActionTokens(action_vocab_end(config, tokenizer, path), stats)
    if model_type == "openvla_oft":
        oft_stop_token = oft_stop_token or config.get("oft_stop_token", False)
        config = {**config, "chunk_size": chunk_size, "oft_stop_token": oft_stop_token}
    base_folder = None if tiny else find_base(folder)

    with torch.random.fork_rng(devices=[]):  # the same weights on every rank, and torch's own generator is left alone
        torch.manual_seed(seed)
        model = build_model(model_type, config, chunk_size, oft_stop_token, on_meta=not tiny)
        fill_weights(model, base_folder, dtype, device)
        critic = make_critic(model.hidden_size, chunk_size, value_head, (adapter_folder, folder))
        model, adapter_config = with_adapter(
            model, adapter_folder, lora_rank, lora_alpha, lora_scope, merge_lora, base_folder
        )
    cast_parameters(model, dtype)
    freeze(model, adapter_config is not None, lora_scope)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.vision_backbone.set_normalization(read_normalization(side_files, path))
    if model_type == "openvla_oft":
        model.check_bidirectional()
    policy = VLAPolicy(
        model, critic, action_tokens, tokenizer, image_size=(config["image_sizes"][0],) * 2,
        pad_token_id=action_tokens.vocab_end, max_prompt_length=max_prompt_length, chunk_size=chunk_size,
        image_resize=image_resize, cuda_graphs=cuda_graphs,
        caches_features=not any(parameter.requires_grad for parameter in model.vision_backbone.parameters()),
    )  # fmt: skip
    policy.files = PolicyFiles(config, side_files, adapter_config)
    return policy.to(device)


def check_choices(model_type: str, lora_path: str | None, image_resize: str, lora_scope: str) -> None:
    """Flags with few values."""
    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model_type {model_type!r} is unknown: there are {', '.join(MODEL_TYPES)}")
    if lora_path is not None and not str(lora_path).strip():
        raise ValueError("--lora_path is empty: give the folder of an adapter, or leave the flag out")
    if image_resize not in ("tensor", "pil"):
        raise ValueError(f"--image_resize {image_resize!r} is unknown: there are tensor, pil")
    if lora_scope not in ("all", "llm"):
        raise ValueError(f"--lora_scope {lora_scope!r} is unknown: there are all, llm")


def with_statistics(side_files: dict[str, bytes], norm_stats: dict | None) -> dict[str, bytes]:
    """norm_stats added to dataset_statistics.json, which is merged over config.json's."""
    if not norm_stats:
        return side_files
    known = json.loads(side_files.get("dataset_statistics.json", "{}"))
    return {**side_files, "dataset_statistics.json": json.dumps({**known, **norm_stats}, indent=2).encode()}


def build_model(model_type: str, config: dict, chunk_size: int, stop_token: bool, on_meta: bool) -> OpenVLA:
    """The network; on_meta: parameters without memory, to be filled by stream_weights(), buffers as they should be."""

    def build() -> OpenVLA:
        if model_type == "openvla":
            return OpenVLA(config)
        return OpenVLAOFT(config, chunk_size * ACTION_DIM, stop_token)

    # cuDNN's attention gives other bits from one call to the next (H100, torch 2.11); the other kernels take as long
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
    """Leave trainable what is to be trained: the adapter where there is one, never what no forward reads."""
    for name, parameter in model.named_parameters():
        in_scope = lora_scope == "all" or name.startswith("language_model.")
        parameter.requires_grad_(in_scope and ("lora_" in name or not has_adapter))
    for parameter in model.unused_parameters():
        parameter.requires_grad_(False)


# ---------------------------------------------------------------------- reading a folder
def read_folder(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """config.json as it is, and the small files beside it."""
    if not folder.is_dir():
        presets = ", ".join(sorted(TINY_PRESETS))
        raise FileNotFoundError(
            f"--model_path {folder} is not a folder: give a checkpoint folder or a tiny preset ({presets})"
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not an OpenVLA checkpoint folder")
    for file in sorted(folder.iterdir()):
        for start, what in FOREIGN_PARTS.items():
            if file.name.startswith(start):
                raise ValueError(
                    f"{folder} holds {file.name}: {what}; use a discrete-token checkpoint, such as RLinf's for "
                    "ManiSkill"
                )
    config = json.loads((folder / "config.json").read_text())
    side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).exists()}
    return config, side_files


def pick_chunk_size(model_type: str, chunk_size: int | None, config: dict, path: str) -> int:
    """Actions per decision, from the flag and from config.json (which names it where save_policy() wrote an OFT)."""
    known = config.get("chunk_size")
    if model_type == "openvla":
        if known:
            raise ValueError(f"{path} is an OpenVLA-OFT (chunk_size {known}): pass --model_type openvla_oft")
        if chunk_size not in (None, 1):
            raise ValueError(f"--chunk_size {chunk_size}: openvla writes one action per decision, use 1")
        return 1
    if chunk_size is None:
        return known or PUBLISHED_CHUNK_SIZE
    if chunk_size < 2:
        raise ValueError(
            f"--chunk_size {chunk_size}: openvla_oft writes a chunk of actions per decision, use "
            f"{known or PUBLISHED_CHUNK_SIZE}"
        )
    if known and chunk_size != known and path not in TINY_PRESETS:
        raise ValueError(f"--chunk_size {chunk_size}, but {path} was trained with {known}: use {known}")
    return chunk_size


def action_vocab_end(config: dict, tokenizer: Tokenizer | None, path: str) -> int:
    """One past the last action id. The 256 action ids are the last of the text vocabulary, right before the padding
    id, and the model's vocabulary is that rounded up.

    Raises:
        ValueError: they can not be there: every action would be read from ids that mean something else.
    """
    vocab_size, rounding = config["text_config"]["vocab_size"], config.get("pad_to_multiple_of", 0)
    vocab_end, padding = vocab_size - rounding, config.get("pad_token_id", config["text_config"].get("pad_token_id"))
    if config.get("n_action_bins", NUM_BINS) != NUM_BINS:
        raise ValueError(f"{path} has n_action_bins {config['n_action_bins']}: only {NUM_BINS} are supported")
    fits = rounding > 0 and vocab_end >= NUM_BINS and padding == vocab_end
    if not fits or (tokenizer is not None and tokenizer.get_vocab_size(with_added_tokens=False) > vocab_end):
        words = "unknown" if tokenizer is None else tokenizer.get_vocab_size(with_added_tokens=False)
        raise ValueError(
            f"the action ids do not fit the vocabulary of {path}: vocab_size {vocab_size} minus pad_to_multiple_of "
            f"{rounding} must be the padding id (it is {padding}) and at least the tokenizer's size ({words}); check "
            "config.json"
        )
    return vocab_end


def action_stats(config: dict, side_files: dict[str, bytes], unnorm_key: str, path: str) -> dict:
    """The action statistics of one key, dataset_statistics.json before config.json; the wrong key would silently scale
    every action."""
    norm_stats = {**config.get("norm_stats", {}), **json.loads(side_files.get("dataset_statistics.json", "{}"))}
    if unnorm_key not in norm_stats:
        known = ", ".join(sorted(norm_stats)) or "none"
        raise ValueError(f"--unnorm_key {unnorm_key!r} is not in the norm_stats of {path}: it has {known}")
    stats = norm_stats[unnorm_key]["action"]
    if len(stats["q01"]) != ACTION_DIM:
        raise ValueError(f"--unnorm_key {unnorm_key!r} describes actions of {len(stats['q01'])} dimensions, not 7")
    return stats


def read_normalization(side_files: dict[str, bytes], path: str) -> tuple:
    """((mean, std) of DINOv2, of SigLIP) from preprocessor_config.json; the published values where it is missing."""
    if "preprocessor_config.json" not in side_files:
        return VisionBackbone.NORMALIZATION
    config = json.loads(side_files["preprocessor_config.json"])
    strategy = config.get("image_resize_strategy", "resize-naive")
    if strategy != "resize-naive" or set(config.get("interpolations", ["bicubic"])) != {"bicubic"}:
        raise ValueError(
            f"{path}/preprocessor_config.json resizes by {strategy}, {config.get('interpolations')}: only resize-naive "
            "with bicubic interpolation is supported"
        )
    return tuple(zip(config["means"], config["stds"]))


def shard_paths(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} lacks {name}: download the checkpoint again")
    return [folder / name for name in names]


def check_keys(expected: dict[str, tuple], found: dict[str, tuple], what: str) -> None:
    """{name: shape} of the model against that of a file."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{what} does not fit the model: {len(missing)} keys missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )
    for name, shape in expected.items():
        if tuple(shape) != tuple(found[name]):
            raise ValueError(f"{what} has {name} of shape {tuple(found[name])}, config.json implies {tuple(shape)}")


def fill_weights(model: OpenVLA, folder: Path | None, dtype: torch.dtype, device: torch.device | str) -> None:
    """From a folder, or random ones."""
    if folder is None:
        model.init_weights()
    else:
        stream_weights(model, folder, dtype, device)


def stream_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fill a model built on meta from a folder's shards, tensor by tensor. All headers are compared first."""
    paths, found = shard_paths(folder), {}
    for path in paths:
        with open_shard(path) as shard:
            found |= {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
    check_keys({name: tuple(p.shape) for name, p in model.named_parameters()}, found, f"the checkpoint in {folder}")
    for path in paths:
        with open_shard(path) as shard:
            for key in shard.keys():  # noqa: SIM118 (a shard is not a dict)
                owner, _, leaf = key.rpartition(".")
                # a copy: the mapped pages go with the file, which a later save may replace
                value = shard.get_tensor(key).to(device=device, dtype=dtype, copy=True)
                model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value)


def make_critic(
    hidden_size: int, chunk_size: int, wanted: bool | str | None, folders: tuple[Path | None, ...]
) -> ValueHead | None:
    """load_policy's value_head: False is none; else one output per action, read from where it lies or fresh."""
    if wanted is False:
        return None
    critic = ValueHead(hidden_size, chunk_size)
    load_critic(critic, wanted, folders)
    return critic


def load_critic(critic: ValueHead, wanted: bool | str | None, folders: tuple[Path | None, ...]) -> None:
    """Read value_head.safetensors from where the caller says, or from the first folder that has one; without any the
    critic stays fresh."""
    files = [folder / "value_head.safetensors" for folder in folders if folder is not None]
    if wanted not in (None, True):
        file = Path(wanted)
        files = [file / "value_head.safetensors" if file.is_dir() else file]
        if not files[0].is_file():
            raise FileNotFoundError(f"value_head {wanted}: there is no such file")
    for file in files:
        if file.is_file():
            with open_shard(file) as shard:
                weights = {key.removeprefix("value_head."): shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
            expected = {name: tuple(parameter.shape) for name, parameter in critic.named_parameters()}
            check_keys(expected, {name: tuple(value.shape) for name, value in weights.items()}, str(file))
            critic.load_state_dict(weights)
            return


# ---------------------------------------------------------------------- tokenizer
def tiny_tokenizer() -> Tokenizer:
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
    tokenizer.post_processor = begin_with_bos()
    return tokenizer


def begin_with_bos() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])


def tiny_side_files() -> dict[str, bytes]:
    """The small files of a tiny preset, as a published folder has them."""
    contents = {
        "preprocessor_config.json": {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, *TINY_OPENVLA["image_sizes"]]] * 2,
            "interpolations": ["bicubic", "bicubic"],
            "means": [TINY_MEAN] * 2,
            "stds": [TINY_STD] * 2,
            "use_fused_vision_backbone": True,
        },
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": 2, "pad_token_id": TINY_VOCAB_END},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    }
    files = {name: json.dumps(content, indent=2).encode() for name, content in contents.items()}
    return files | {"tokenizer.json": tiny_tokenizer().to_str().encode()}


def read_tokenizer(side_files: dict[str, bytes]) -> Tokenizer | None:
    """tokenizer.json, made to begin a text with BOS (in some published files that is left to Python code), or None."""
    if "tokenizer.json" not in side_files:
        return None
    tokenizer = Tokenizer.from_str(side_files["tokenizer.json"].decode())
    tokenizer.no_truncation()  # some files keep what they were last used with
    tokenizer.no_padding()
    if tokenizer.encode("a").ids[0] != BOS_ID:
        tokenizer.post_processor = begin_with_bos()
    return tokenizer


# ---------------------------------------------------------------------- LoRA
def find_adapter(folder: Path, lora_path: str | None) -> Path | None:
    """The folder that holds the adapter, if there is one."""
    if lora_path is None:
        return folder if (folder / "adapter_config.json").exists() else None
    adapter = Path(lora_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).exists():
            raise FileNotFoundError(f"--lora_path {adapter} has no {name}: it is not the folder of an adapter")
    return adapter


def find_base(folder: Path) -> Path:
    """Where the weights lie: the folder itself, or the base that the adapter in it names."""
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return folder
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} lacks model.safetensors: download the checkpoint again")
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise FileNotFoundError(
            f"{folder} holds an adapter alone and its base model {base!r} is not a folder here: pass the base as "
            f"--model_path and {folder} as --lora_path"
        )
    return find_base(Path(base))


def with_adapter(
    model: OpenVLA,
    folder: Path | None,
    rank: int,
    alpha: int,
    scope: str,
    merge: bool,
    base_folder: Path | None,
) -> tuple[OpenVLA, dict | None]:
    """The model with the adapter of `folder`, a fresh one, or none; and its adapter_config.json."""
    if merge and folder is None:
        raise ValueError("merge_lora needs an adapter: give --lora_path")
    if folder is not None:
        adapter_config = read_adapter_config(folder)
        model = inject(model, adapter_config)
        load_adapter(model, folder)
        if not merge:
            # base and adapter in one folder stay together in what is saved
            apart = base_folder is not None and base_folder != folder
            return model, {**adapter_config, "base_model_name_or_path": str(base_folder.resolve()) if apart else None}
        merge_adapter(model)
    if not rank:
        return model, None
    adapter_config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if merge or base_folder is None else str(base_folder.resolve()),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": LLM_TARGETS if scope == "llm" else LORA_TARGETS,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": "gaussian",
        "task_type": None,
    }
    return inject(model, adapter_config), adapter_config


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json. Raises ValueError for what is no plain LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder} holds a {config['peft_type']} adapter: only LORA is supported")
    for key in ("use_dora", "modules_to_save", "lora_bias", "target_parameters"):
        if config.get(key):
            raise ValueError(f"{folder}/adapter_config.json sets {key}, which is not supported: merge it with peft")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder}/adapter_config.json trains biases ({config['bias']}): merge it with peft")
    return config


def inject(model: OpenVLA, adapter_config: dict) -> OpenVLA:
    """Put adapters (Gaussian A, zero B) on the target modules. No dropout, whatever the file says: rollout and update
    must give a token the same probability."""
    targets = adapter_config["target_modules"]
    if targets == "all-linear":  # moojink's choice resolves to the same modules as RLinf's list
        targets = LORA_TARGETS
    optional = ("rank_pattern", "alpha_pattern", "use_rslora", "exclude_modules")
    config = LoraConfig(
        r=adapter_config["r"],
        lora_alpha=adapter_config["lora_alpha"],
        lora_dropout=0.0,
        target_modules=targets,
        init_lora_weights="gaussian",
        bias="none",
        **{key: adapter_config[key] for key in optional if adapter_config.get(key)},
    )
    inject_adapter_in_model(config, model)
    use_fused_layers(model)
    return model


def load_adapter(model: OpenVLA, folder: Path) -> None:
    """Fill the injected factors from adapter_model.safetensors.

    peft writes lm_head.base_layer.weight beside the factors, since lm_head is a target. It must be the base model's: if
    it is not, the adapter was made for another base.
    """
    file = folder / "adapter_model.safetensors"
    parameters = dict(model.named_parameters())
    with open_shard(file) as shard:
        weights = {injected_name(key): shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    if not weights:
        raise ValueError(f"{file} is empty: it holds no tensor")
    strays = {name: weights.pop(name) for name in [*weights] if "lora_" not in name and name in parameters}
    for name, value in strays.items():
        if not torch.equal(value.bfloat16(), parameters[name].cpu().bfloat16()):
            raise ValueError(
                f"{folder} was made for another base model: its {name} is not the one loaded; pass the base model that "
                "adapter_config.json names as --model_path"
            )
    expected = {name: tuple(p.shape) for name, p in parameters.items() if "lora_" in name}
    check_keys(expected, {name: tuple(value.shape) for name, value in weights.items()}, str(file))
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def injected_name(key: str) -> str:
    """A key of a peft file -> the parameter's name in an injected model."""
    name = key.removeprefix("base_model.model.")
    return name.replace(".lora_A.weight", ".lora_A.default.weight").replace(".lora_B.weight", ".lora_B.default.weight")


def published_name(name: str) -> str:
    """The inverse of injected_name()."""
    return "base_model.model." + name.replace(".default.weight", ".weight")


def merged_weight(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling * B A in fp32, rounded once to W's precision; a convolution's factors are flattened."""
    delta = (up.flatten(1).float() @ down.flatten(1).float()).view(base.shape)
    return (base.float() + scaling * delta).to(base.dtype)


def merge_adapter(model: OpenVLA) -> None:
    """Add every adapter into its layer and take it off."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        layer = module.get_base_layer()
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        layer.weight.data = merged_weight(layer.weight.data, down.data, up.data, module.scaling["default"])
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer)
    del model.peft_config  # peft's note that there is an adapter


def merge_state(model: OpenVLA, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same for whole tensors by name, leaving the model alone: under ZeRO-3 its own tensors are shards."""
    merged = {name: value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            down, up = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            base = f"{name}.base_layer.weight"
            merged[base] = merged_weight(state[base], down, up, module.scaling["default"])
    return {name.replace(".base_layer.", "."): value for name, value in merged.items()}


# ---------------------------------------------------------------------- saving
def saves_adapter_alone(policy: VLAPolicy) -> bool:
    """The weights under the adapter are unchanged and lie in a folder of their own, so they need not be written."""
    return (
        policy.files.adapter_config is not None and policy.files.adapter_config["base_model_name_or_path"] is not None
    )


def save_policy(
    policy: VLAPolicy, state_dict: dict[str, torch.Tensor], folder: Path, *, merge_lora: bool = False
) -> None:
    """Write whole tensors (gathered already) in the published layout. load_policy() of the folder gives them back bit
    for bit.

    Args:
        state_dict: policy.state_dict() with whole tensors on the CPU; where saves_adapter_alone(), factors and critic
            are enough.
        merge_lora: write a whole model with the adapter added in. Otherwise the adapter alone, which names its base; a
            preset's adapter has no base on disk, so its base is written beside it.
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
        save_tensors(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2))
        if not saves_adapter_alone(policy):
            base = {k.replace(".base_layer.", "."): v for k, v in model.items() if ".lora_" not in k}
            save_weights(base, folder)
    if critic:
        save_tensors(critic, folder / "value_head.safetensors")
    (folder / "config.json").write_text(json.dumps(policy.files.config, indent=2))
    for name, content in policy.files.side_files.items():
        (folder / name).write_bytes(content)


def save_weights(weights: dict[str, torch.Tensor], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """model.safetensors, or numbered shards with an index where it would be larger than max_shard_bytes."""
    shards, size = [{}], 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
