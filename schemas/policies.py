"""Model and adapter folders: config.json, adapter_config.json, dataset_statistics.json, solovla.json and others.

The keys named here change what a policy computes, so a value that this code does not support is refused. Other keys
change nothing here, and published files hold many of them.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from schemas import Schema, flags

NUM_BINS = 256
ACTION_DIM = 7

Size = Annotated[int, Field(ge=1, le=2**20)]  # of one dimension of a tensor
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Colours = Annotated[list[Finite], Field(min_length=3, max_length=3)]
Spreads = Annotated[list[Above0], Field(min_length=3, max_length=3)]
Bounds = Annotated[list[Finite], Field(min_length=ACTION_DIM, max_length=ACTION_DIM)]  # metres, radians, gripper
Mask = Annotated[list[bool], Field(min_length=ACTION_DIM, max_length=ACTION_DIM)]
Switch = bool | None


# ---------------------------------------------------------------------- config.json
class TextConfig(Schema):
    """The language model: sizes of Llama. LlamaConfig gives the defaults of missing keys."""

    model_type: Literal["llama"] = "llama"
    vocab_size: Size
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Above0 = 1e-6
    attention_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0  # rollout and update must agree
    tie_word_embeddings: Literal[False] = False
    attention_bias: bool = False
    mlp_bias: bool = False
    pretraining_tp: Literal[1] = 1
    rope_theta: Above0 | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def heads_divide(self) -> "TextConfig":
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.hidden_size % heads or heads % groups:
            raise ValueError(
                f"of a hidden_size that num_attention_heads ({heads}) divides, and of a number of heads that "
                f"num_key_value_heads ({groups}) divides"
            )
        return self


class VisionDims(Schema):
    """Sizes of one vision tower, if they differ from the published ones."""

    embed_dim: Size
    depth: Annotated[int, Field(ge=2, le=2**20)]  # the last block is not used
    num_heads: Size
    patch_size: Size = 14

    @model_validator(mode="after")
    def heads_divide(self) -> "VisionDims":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"of an embed_dim that num_heads ({self.num_heads}) divides")
        return self


class PolicyConfig(Schema):
    """config.json of an OpenVLA or an OpenVLA-OFT."""

    model_type: Literal["openvla", "openvla_oft"] = "openvla"
    text_config: TextConfig
    image_sizes: Annotated[list[Size], Field(min_length=2, max_length=2)]
    image_resize_strategy: Literal["resize-naive"] = "resize-naive"
    use_fused_vision_backbone: Literal[True] = True
    n_action_bins: Literal[256] = NUM_BINS
    pad_to_multiple_of: Annotated[int, Field(ge=0, le=2**20)] = 0
    pad_token_id: int | None = None
    timm_model_ids: list[str] | None = None
    timm_override_act_layers: list[None] | None = None  # null: exact GELU
    vision_dims: Annotated[list[VisionDims], Field(min_length=2, max_length=2)] | None = None
    norm_stats: dict[str, Any] | None = None
    quantization_config: None = None
    chunk_size: Annotated[int, Field(ge=1, le=2**10)] | None = None
    oft_stop_token: bool = False
    is_causal: Switch = None

    @field_validator("image_sizes")
    @classmethod
    def both_towers_see_one_size(cls, sizes: list[int]) -> list[int]:
        if sizes[0] != sizes[1]:
            raise ValueError("two equal sizes")
        return sizes


# ---------------------------------------------------------------------- statistics and images
class ActionBounds(Schema):
    """1 % and 99 % quantiles of the actions. Dimensions outside the mask are not scaled."""

    q01: Bounds
    q99: Bounds
    mask: Mask = [True] * ACTION_DIM

    @model_validator(mode="after")
    def bounds_in_order(self) -> "ActionBounds":
        for dim, (low, high, scaled) in enumerate(zip(self.q01, self.q99, self.mask)):
            if scaled and low > high:
                raise ValueError(f"quantiles with q01 at most q99 (dimension {dim} has {low:g} and {high:g})")
        return self


class Statistics(Schema):
    """Statistics under one unnorm_key."""

    action: ActionBounds


class Preprocessor(Schema):
    """Normalisation of an image: one mean and one standard deviation per colour, for DINOv2 and for SigLIP."""

    means: Annotated[list[Colours], Field(min_length=2, max_length=2)]
    stds: Annotated[list[Spreads], Field(min_length=2, max_length=2)]
    image_resize_strategy: Literal["resize-naive"] = "resize-naive"
    interpolations: Annotated[list[Literal["bicubic"]], Field(min_length=1)] = Field(default=["bicubic"])
    input_sizes: list[tuple[int, int, int]] | None = None
    use_fused_vision_backbone: Literal[True] = True
    tvf_do_letterbox: Literal[False] | None = None


# ---------------------------------------------------------------------- weights and tokenizer
class WeightIndex(Schema):
    """model.safetensors.index.json: which file holds which tensor."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]

    @field_validator("weight_map")
    @classmethod
    def inside_the_folder(cls, weight_map: dict[str, str]) -> dict[str, str]:
        for name in weight_map.values():
            if "/" in name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"names of .safetensors files in the same folder, not {name!r}")
        return weight_map


class AddedToken(BaseModel):
    content: str


def special_token(value: Any) -> Any:
    """Name of a token, from text or from the object that transformers writes for it."""
    name = value.get("content") if isinstance(value, dict) else value
    if name is None or isinstance(name, str):
        return name
    raise ValueError("text")


class TokenizerConfig(Schema):
    """tokenizer_config.json, as far as it changes ids."""

    add_eos_token: Literal[False] | None = None
    bos_token: Annotated[Any, AfterValidator(special_token)] = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], AddedToken] = Field(default={})


# ---------------------------------------------------------------------- adapters
Rank = Annotated[int, Field(ge=1, le=2**16)]
PLAIN_NAME = r"^\^?(?:[\w-]|\\?\.)+\$?$"  # a name or its end, not a regular expression that could hang
ModuleName = Annotated[str, Field(pattern=PLAIN_NAME)]


def one_or_more(kind: type, said: str) -> Callable[[Any], Any]:
    """A validator for one value, a list of values or None, as peft takes them.

    A union would put the names of its types into the keys of pydantic's findings.
    """

    def validate(value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        if value is None or (entries and all(type(entry) is kind and entry != "" for entry in entries)):
            return value
        raise ValueError(f"{said}, or a list of these")

    return validate


Names = Annotated[Any, AfterValidator(one_or_more(str, "a module's name or a regular expression"))]
Layers = Annotated[Any, AfterValidator(one_or_more(int, "a whole number"))]
# kinds of initialisation that leave the weights of the base as they are
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# keys that do not change the function: names, records, and settings of initialisation or dropout in training
WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "base_model_name_or_path",
    "peft_type",
}


class AdapterConfig(Schema):
    """adapter_config.json of peft's LoRA: the fields that this code applies, those without effect, and no others.

    All other fields of peft, present or future, are in model_extra. vla/models/lora.py refuses them if they are set,
    because the adapter would compute something else here.
    """

    peft_type: Literal["LORA"] = "LORA"
    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: Finite
    target_modules: Names
    exclude_modules: Names = None
    use_rslora: Switch = None
    rank_pattern: dict[ModuleName, Rank] | None = None
    alpha_pattern: dict[ModuleName, Finite] | None = None
    layers_to_transform: Layers = None
    layers_pattern: Names = None
    init_lora_weights: Any = True
    bias: Literal["none"] = "none"

    @field_validator("target_modules")
    @classmethod
    def some_modules(cls, names: Any) -> Any:
        if names is None:
            raise ValueError("a module's name or a regular expression, or a list of these")
        return names

    @field_validator("layers_pattern")
    @classmethod
    def plain_names(cls, names: Any) -> Any:
        for name in names if isinstance(names, list) else [names or "layers"]:
            if not re.match(PLAIN_NAME, name):
                raise ValueError("a module's name, or a list of these")
        return names

    @field_validator("init_lora_weights")
    @classmethod
    def base_stays(cls, kind: Any) -> Any:
        if kind not in PLAIN_STARTS:
            raise ValueError("true, false, gaussian, eva or orthogonal, since others change the weights of the base")
        return kind


class AdapterBase(Schema):
    """adapter_base.json: digests of the model that an adapter was trained on."""

    weights: str
    config: str
    pictures: str
    tokenizer: str | None
    statistics: dict[str, str]


# ---------------------------------------------------------------------- solovla.json
class World(Schema):
    """The world that a policy was made in. The names are those of flags, but for `control`."""

    env_id: flags.EnvId
    instruction: flags.Text | None = None
    image_size: tuple[flags.Pixels, flags.Pixels]  # width, height
    sim_freq: flags.Hertz
    asset_pack: Literal["builtin", "bridge"]
    protocol: Literal["rl4vla", "rlinf"]
    hulls: flags.SavedHulls = None  # None where the asset pack has no meshes
    edition: flags.SavedEdition = None  # of the builtin pack, None in another one
    max_episode_steps: flags.EpisodeSteps
    control: str  # what an action means: ManiSkill's control mode


class Seen(Schema):
    """What the eyes of a policy have seen before any demonstration."""

    env_id: flags.EnvId
    obj_set: Literal["train", "test", "all"]
    asset_pack: Literal["builtin", "bridge"]
    edition: flags.SavedEdition
    image_size: tuple[flags.Pixels, flags.Pixels]  # width, height
    views: flags.Count


class About(Schema):
    """solovla.json: what a policy's folder knows about itself. The names are those of flags."""

    version: str  # of SoloVLA
    model_type: Literal["openvla", "openvla_oft"] | None  # None: either, since the language model is random
    unnorm_key: flags.Text
    chunk_size: flags.Chunk | None  # None: any
    max_prompt_length: flags.PromptLength
    image_resize: Literal["tensor", "pil"]
    oft_stop_token: bool
    dtype: Literal["float32", "bfloat16"]
    world: World | None = None  # None if it is not known
    seen: Seen | None = None  # of a policy that train_eyes.py wrote
