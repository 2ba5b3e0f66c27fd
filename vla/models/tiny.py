"""Tiny models with random weights, made by code. They have a vocabulary of 768 ids and about one million parameters.

They have the layout of a published folder, so all code that reads such a folder can read them.
"""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vla.models.action_tokens import NUM_BINS
from vla.models.openvla_oft import PUBLISHED_CHUNK_SIZE
from vla.models.tokenizer import BOS, BOS_ID, PROMPT, begin_with_bos

# 1 % and 99 % quantiles of the BridgeData V2 actions, as in the published norm_stats: metres, radians, gripper
BRIDGE_ORIG = {
    "action": {
        "q01": [
            -0.02872725307941437,
            -0.04170349963009357,
            -0.026093858778476715,
            -0.08092105075716972,
            -0.09288699507713317,
            -0.20718276381492615,
            0.0,
        ],
        "q99": [
            0.028309678435325586,
            0.040855254605412394,
            0.040161586627364146,
            0.08192047759890528,
            0.07792850524187081,
            0.20382574498653397,
            1.0,
        ],
        "mask": [True, True, True, True, True, True, False],
    }
}

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
# of the builtin wooden table. Without mean 0 and std 1, learning is three times slower
TINY_MEAN, TINY_STD = [0.55, 0.45, 0.32], [0.1, 0.1, 0.1]
TINY_PRESETS = {"openvla-tiny": TINY_OPENVLA, "openvla-oft-tiny": {**TINY_OPENVLA, "chunk_size": PUBLISHED_CHUNK_SIZE}}

TINY_TEXT_IDS = 512
# the words that the tiny tokenizer learns. It spells out other words in bytes
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


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of at most 512 ids, with BOS = 1 as in Llama. It is the same every time."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_TEXT_IDS,
        special_tokens=["<unk>", BOS, "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_CORPUS * 3, trainer)
    tokenizer.post_processor = begin_with_bos()
    return tokenizer


def tiny_folder(name: str) -> tuple[dict, dict[str, bytes]]:
    """The content of config.json and the small files of a tiny preset."""
    return TINY_PRESETS[name], tiny_side_files(TINY_PRESETS[name]["image_sizes"])


def tiny_side_files(image_sizes: tuple[int, int] | list[int] = TINY_OPENVLA["image_sizes"]) -> dict[str, bytes]:
    """The small files of a tiny preset, by name."""
    contents = {
        "preprocessor_config.json": {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, *image_sizes]] * 2,
            "interpolations": ["bicubic", "bicubic"],
            "means": [TINY_MEAN] * 2,
            "stds": [TINY_STD] * 2,
            "use_fused_vision_backbone": True,
        },
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": 2, "pad_token_id": TINY_VOCAB_END},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    }
    files = {name: json.dumps(content, indent=2).encode() for name, content in contents.items()}
    return files | {"tokenizer.json": tiny_tokenizer().to_str().encode()}
