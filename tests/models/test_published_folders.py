"""Model and adapter folders: what is in them is honoured as transformers and peft do, or refused in one sentence."""

import ast
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from made_up import observation
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from schemas import UserError
from schemas.policies import WITHOUT_EFFECT, AdapterConfig
from vla.files.tensors import digest, entry, first_not_finite
from vla.models.loading import load_policy
from vla.models.lora import HONOURED, LORA_TARGETS, matching, read_adapter_config
from vla.models.saving import save_policy, save_weights
from vla.models.tiny import tiny_side_files
from vla.models.tokenizer import BOS_ID, PROMPT, encode_prompt, read_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def shaken(policy, seed: int = 1):
    """Every parameter moved, so that fresh zeros (lora_B, biases) do not hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A whole openvla-tiny in a folder of its own."""
    folder = tmp_path_factory.mktemp("base")
    policy = shaken(load_policy("openvla-tiny"))
    save_policy(policy, policy.state_dict(), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter on it, as a run of ours saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = shaken(load_policy(str(base), lora_rank=2))
    save_policy(policy, policy.state_dict(), folder)
    return folder


@pytest.fixture
def copy(tmp_path):
    def make(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return make


def edit(folder: Path, file: str, **changes) -> None:
    """Keys of a JSON file set; those set to ... are taken out."""
    content = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_text(folder: Path, **changes) -> None:
    edit(
        folder,
        "config.json",
        text_config={**json.loads((folder / "config.json").read_text())["text_config"], **changes},
    )


def edit_weights(folder: Path, change, file: str = WEIGHTS) -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file)


def edit_stats(folder: Path, **changes) -> None:
    stats = json.loads((folder / "config.json").read_text())["norm_stats"]["bridge_orig"]["action"]
    edit(folder, "config.json", norm_stats={"bridge_orig": {"action": {**stats, **changes}}})


def refusal(path: Path, **flags) -> str:
    """The one sentence that load_policy ends in."""
    with pytest.raises(UserError) as caught:
        load_policy(str(path), **flags)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


def logits_of(model, policy) -> torch.Tensor:
    inputs = policy.preprocess(observation(2))
    with torch.no_grad():
        return model(*inputs, tokens=torch.full((2, 7), 600))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    good = {"a": torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype), "ids": torch.arange(3), "none": torch.ones(0)}
    assert first_not_finite(good) is None
    bad = torch.zeros(2, 70, dtype=dtype)
    bad[1, 69] = value
    assert first_not_finite({**good, "b": bad, "c": bad}) == "b"
    assert first_not_finite(iter([("x", bad)])) == "x"


def test_a_digest_knows_every_byte_shape_and_name():
    def of(**tensors) -> str:
        return digest({name: entry(tensor) for name, tensor in tensors.items()})

    a, b = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    assert of(a=a, b=b) == of(b=b, a=a.clone())
    changed = a.clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    others = [of(a=changed, b=b), of(a=a.flip(0), b=b), of(a=a.view(2, 3), b=b), of(a=a.double(), b=b), of(c=a, b=b)]
    assert len({of(a=a, b=b), *others}) == 6


# ------------------------------------------------------------------ weights
def poisoned(name: str, value: float):
    def change(weights: dict) -> None:
        weights[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["language_model.lm_head.weight", "vision_backbone.featurizer.norm.bias"])
def test_weights_that_are_not_finite_are_named(base, copy, name, value):
    folder = copy(base)
    edit_weights(folder, poisoned(name, value))
    said = refusal(folder)
    assert f"{WEIGHTS} has {name} with values that are not finite" in said


def test_a_weight_too_large_for_the_precision_is_named(base, copy):
    folder = copy(base)
    edit_weights(folder, poisoned("projector.fc1.bias", 1e30))
    load_policy(str(folder))
    assert "projector.fc1.bias" in refusal(folder, dtype=torch.float16)


def test_adapters_and_critics_that_are_not_finite_are_named(base, adapter, copy):
    broken = copy(adapter)
    key = "base_model.model.projector.fc1.lora_B.weight"
    edit_weights(broken, lambda weights: weights.update({key: torch.tensor(1.0)}), "adapter_model.safetensors")
    assert "of shape (), adapter_config.json implies" in refusal(base, lora_path=str(broken))
    shutil.copy(adapter / "adapter_model.safetensors", broken)
    edit_weights(broken, poisoned(key, float("nan")), "adapter_model.safetensors")
    assert f"has {key} with values that are not finite" in refusal(base, lora_path=str(broken))
    folder = copy(base, "critic")
    edit_weights(folder, poisoned("value_head.mlp.2.bias", float("-inf")), "value_head.safetensors")
    assert "value_head.safetensors has mlp.2.bias with values that are not finite" in refusal(folder)
    load_policy(str(folder), value_head=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(base, copy, dtype):
    folder = copy(base)
    edit_weights(folder, lambda weights: weights.update({k: v.to(dtype) for k, v in weights.items() if "fc1" in k}))
    assert re.search(r"model\.safetensors has \S*fc1\S* as \w+, weights must be", refusal(folder))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15000000000\n")


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


SIDE = ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]


@pytest.mark.parametrize("file", [WEIGHTS, "value_head.safetensors", *SIDE])
@pytest.mark.parametrize(
    "damage, said",
    [
        (lfs_pointer, "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
        (cut_short, "truncated|not valid JSON|damaged"),
        (lambda file: file.write_bytes(b""), "is empty|truncated|damaged"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00rubbish" * 9), "not UTF-8|truncated|damaged"),
        (fifo, "is not a regular file"),
        (as_folder, "is not a regular file"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(base, copy, file, damage, said):
    folder = copy(base)
    damage(folder / file)
    sentence = refusal(folder)
    assert str(folder / file) in sentence and re.search(said, sentence)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_base.json"])
@pytest.mark.parametrize("damage", [lfs_pointer, cut_short, fifo])
def test_a_file_of_an_adapter_likewise(base, adapter, copy, file, damage):
    folder = copy(adapter)
    damage(folder / file)
    assert str(folder / file) in refusal(base, lora_path=str(folder))


def test_what_stands_in_place_of_weights_is_said(base, copy):
    folder = copy(base)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    said = refusal(folder)
    assert "it holds model-00001-of-00002.safetensors: copy the index" in said
    (folder / "model-00001-of-00002.safetensors").rename(folder / "pytorch_model-00001-of-00003.bin")
    assert "it holds pytorch_model-00001-of-00003.bin, a pickle" in refusal(folder)
    (folder / "pytorch_model-00001-of-00003.bin").unlink()
    (folder / WEIGHTS).symlink_to(folder / "nowhere")
    assert f"{folder / WEIGHTS} cannot be read" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert "lacks model.safetensors: copy or download it again" in refusal(folder)


def test_pickles_are_never_read(base, adapter, copy, tmp_path):
    """Of a model, of an adapter, of a critic: nothing in them runs."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    folder, lora = copy(base), copy(adapter, "lora")
    for name in ("pytorch_model.bin", "value_head.pt", "tokenizer.model", "model.pt"):
        torch.save(Payload(), folder / name)
    load_policy(str(folder))
    torch.save(Payload(), folder / "value_head.safetensors")
    assert "value_head.safetensors is truncated or damaged" in refusal(folder)
    torch.save(Payload(), folder / WEIGHTS)
    assert "model.safetensors is truncated or damaged" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert "a pickle" in refusal(folder)
    (lora / "adapter_model.safetensors").unlink()
    torch.save(Payload(), lora / "adapter_model.bin")
    assert "adapter_model.bin, a pickle" in refusal(base, lora_path=str(lora))
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------ shards and their index
@pytest.fixture
def sharded(base, copy) -> Path:
    folder = copy(base, "sharded")
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_weights(weights, folder, max_shard_bytes=2_000_000)
    return folder


def test_whole_weights_win_over_shards_as_in_transformers(base, sharded, tmp_path):
    """transformers' own model of the same kind, saved in both forms, with the shards stale."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    for scale, options in ((0.5, {"max_shard_size": "20kB"}), (1.0, {})):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        torch.nn.init.constant_(model.lm_head.weight, scale)
        model.save_pretrained(tmp_path / f"llama{scale}", **options)
    for file in (tmp_path / "llama0.5").glob("*.safetensors*"):
        shutil.copy(file, tmp_path / "llama1.0")
    assert (tmp_path / "llama1.0" / INDEX).exists() and (tmp_path / "llama1.0" / WEIGHTS).exists()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "llama1.0").lm_head.weight.unique().tolist() == [1.0]

    shutil.copy(base / WEIGHTS, sharded)
    edit_weights(sharded, lambda weights: weights["projector.fc1.bias"].fill_(7.0))
    assert load_policy(str(sharded)).model.projector.fc1.bias.unique().tolist() == [7.0]


def wrong_maps() -> dict:
    def moved(index: dict) -> None:
        names = sorted(set(index.values()))
        key = next(key for key, name in index.items() if name == names[0])
        index[key] = names[1]

    return {
        "outside": (lambda index: index.update(x="../base/model.safetensors"), "files in the same folder"),
        "absolute": (lambda index: index.update(x="/etc/model.safetensors"), "files in the same folder"),
        "a pickle": (lambda index: index.update(x="model.bin"), "files in the same folder"),
        "a number": (lambda index: index.update(x=3), "weight_map.x 3, but it must be text"),
        "empty": (lambda index: index.clear(), "weight_map {}, but it must be at least 1 long"),
        "more": (lambda index: index.update(x=next(iter(index.values()))), "has x in model-00001"),
        "less": (lambda index: index.pop("projector.fc1.bias"), "has projector.fc1.bias in no file"),
        "moved": (moved, "copy the index and its shards from one place"),
        "a missing shard": (lambda index: index.update(x="model-9.safetensors"), "lacks model-9.safetensors"),
    }


@pytest.mark.parametrize("name", wrong_maps())
def test_an_index_that_is_not_of_its_shards_is_refused(sharded, name):
    change, said = wrong_maps()[name]
    index = json.loads((sharded / INDEX).read_text())
    change(index["weight_map"])
    (sharded / INDEX).write_text(json.dumps(index))
    assert said in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    one, two = sorted(sharded.glob("model-*.safetensors"))[:2]
    key, value = next(iter(load_file(one).items()))
    edit_weights(sharded, lambda weights: weights.update({key: value}), two.name)
    assert f"has {key}, and {one.name} has it too" in refusal(sharded)


@pytest.mark.parametrize("form", ["of the model", "of each layer"])
def test_old_rotary_buffers_are_left_out_where_they_are_the_same(base, copy, form):
    folder, policy = copy(base), load_policy(str(base))
    frequencies = policy.model.language_model.model.rotary_emb.inv_freq
    keys = ["language_model.model.rotary_emb.inv_freq"]
    if form == "of each layer":
        keys = [f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    edit_weights(folder, lambda weights: weights.update({key: frequencies.bfloat16().clone() for key in keys}))
    loaded = load_policy(str(folder))
    assert torch.equal(loaded.model.language_model.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(logits_of(loaded.model, loaded), logits_of(policy.model, policy))
    edit_weights(folder, lambda weights: weights.update({keys[0]: frequencies * 1.5}))
    assert f"{keys[0]}, which contradicts config.json's rope_theta" in refusal(folder)


# ------------------------------------------------------------------ config.json
MILLION = 10**6


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(text_config=...), "config.json has no text_config"),
        (dict(image_sizes=...), "config.json has no image_sizes"),
        (dict(image_sizes=[64, 32]), "image_sizes [64, 32], but it must be two equal sizes"),
        (dict(image_sizes=64), "image_sizes 64, but it must be a list"),
        (dict(model_type="llava"), 'model_type "llava", but it must be'),
        (dict(use_fused_vision_backbone=False), "use_fused_vision_backbone false"),
        (dict(quantization_config={"load_in_8bit": True}), "quantization_config"),
        (dict(timm_override_act_layers=["quick_gelu", None]), "timm_override_act_layers"),
        (dict(vision_dims=[{"embed_dim": 64, "depth": MILLION, "num_heads": 4}] * 2), "depth 1000000"),
        (dict(vision_dims=[{"embed_dim": 64, "depth": 3, "num_heads": 5}] * 2), "num_heads (5) divides"),
        (dict(chunk_size=0), "chunk_size 0, but it must be at least 1"),
        (dict(n_action_bins=128), "n_action_bins 128"),
        (dict(norm_stats=[1]), "norm_stats [1], but it must be an object"),
    ],
)
def test_a_config_that_is_another_models_is_refused(base, copy, change, said):
    folder = copy(base)
    edit(folder, "config.json", **change)
    sentence = refusal(folder)
    assert said in sentence and str(folder) in sentence


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(vocab_size=...), "config.json has no text_config.vocab_size"),
        (dict(model_type="mistral"), "text_config.model_type \"mistral\", but it must be 'llama'"),
        (dict(num_hidden_layers=MILLION), "text_config.num_hidden_layers 1000000, the weights of"),
        (dict(num_hidden_layers=10**9), "text_config.num_hidden_layers 1000000000, but it must be at most"),
        (dict(num_hidden_layers="2"), 'text_config.num_hidden_layers "2", but it must be a whole number'),
        (dict(hidden_size=MILLION), "text_config.hidden_size 1000000, the weights of"),
        (dict(intermediate_size=MILLION), "text_config.intermediate_size 1000000, the weights of"),
        (dict(num_attention_heads=5), "num_attention_heads (5) divides"),
        (dict(hidden_act="gelu"), 'text_config.hidden_act "gelu"'),
        (dict(attention_dropout=0.1), "text_config.attention_dropout 0.1"),
        (dict(tie_word_embeddings=True), "text_config.tie_word_embeddings true"),
        (dict(rms_norm_eps=float("nan")), "text_config.rms_norm_eps NaN"),
        (dict(rope_theta=0), "text_config.rope_theta 0, but it must be above 0"),
        (dict(rope_parameters={"rope_type": "nonsense"}), "text_config from which no Llama can be built"),
        (dict(rope_scaling={"type": "linear"}), "text_config from which no Llama can be built"),
        (dict(head_dim=7), "text_config from which no Llama can be built"),
        (dict(bos_token_id="x"), "text_config from which no Llama can be built"),
    ],
)
def test_a_language_model_of_another_kind_is_refused(base, copy, change, said):
    folder = copy(base)
    text = {**json.loads((folder / "config.json").read_text())["text_config"], **change}
    edit(folder, "config.json", text_config={key: value for key, value in text.items() if value is not ...})
    sentence = refusal(folder)
    assert said in sentence and str(folder) in sentence


# ------------------------------------------------------------------ statistics and pictures
NAN = float("nan")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(q01=[1.0] * 7, q99=[-1.0] * 7), "q01 at most q99 (dimension 0 has 1 and -1)"),
        (dict(q01=None), "action.q01 null, but it must be a list"),
        (dict(q01=[0.0] * 6), "action.q01 [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], but it must be at least 7 long"),
        (dict(q99=[0.5] * 14), "action.q99"),
        (dict(q99=[NAN] * 7), "action.q99.0 NaN, but it must be a finite number"),
        (dict(q99=["1"] * 7), 'action.q99.0 "1", but it must be a number'),
        (dict(mask=[True] * 6), "action.mask"),
        (dict(mask=None), "action.mask null, but it must be a list"),
        (dict(mask=[2] * 7), "action.mask.0 2, but it must be true or false"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "dataset_statistics.json"])
def test_statistics_that_would_scale_wrongly_are_refused(base, copy, change, said, file):
    folder = copy(base)
    action = json.loads((folder / "config.json").read_text())["norm_stats"]["bridge_orig"]["action"]
    statistics = {"bridge_orig": {"action": {**action, **change}}}
    if file == "config.json":
        edit(folder, file, norm_stats=statistics)
    else:
        (folder / file).write_text(json.dumps(statistics))
    sentence = refusal(folder)
    assert said in sentence and f"{folder / file}, in 'bridge_orig'," in sentence


@pytest.mark.parametrize(
    "statistics, said",
    [
        ({"bridge_orig": {"action": {"min": [0.0] * 7, "max": [1.0] * 7}}}, "has no action.q01"),
        ({"bridge_orig": {}}, "has no action"),
        ({"bridge_orig": []}, "must be an object with keys"),
        ({"bridge_orig": None}, "must be an object with keys"),
        ([], "dataset_statistics.json holds [], but it must be"),
        (None, "dataset_statistics.json holds null, but it must be"),
    ],
)
def test_statistics_of_another_form_are_refused(base, copy, statistics, said):
    folder = copy(base)
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    assert said in refusal(folder)


def test_statistics_that_are_fine(base, copy):
    """None in config.json but some beside it; a mask left out; a dimension that never moves; the gripper's bounds
    exchanged, which are not used."""
    folder = copy(base)
    stats = json.loads((folder / "config.json").read_text())["norm_stats"]
    action = stats["bridge_orig"]["action"]
    edit(folder, "config.json", norm_stats=None)
    assert "is not in the norm_stats" in refusal(folder)
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    ours = load_policy(str(folder)).action_tokens
    assert ours.q01.tolist() == action["q01"] and ours.mask.tolist() == action["mask"]
    still = {**action, "q99": [action["q01"][0], *action["q99"][1:6], -1.0]}
    (folder / "dataset_statistics.json").write_text(json.dumps({"bridge_orig": {"action": still}}))
    assert load_policy(str(folder)).action_tokens.q99[0] == action["q01"][0]
    (folder / "dataset_statistics.json").write_text(
        json.dumps({"bridge_orig": {"action": {k: v for k, v in action.items() if k != "mask"}}, "other": None})
    )
    assert load_policy(str(folder)).action_tokens.mask.all()


@pytest.mark.parametrize(
    "content, said",
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 64}}, "has image_mean, which is for"),
        ({"means": [[0.5] * 3] * 2}, "has no stds"),
        ({"means": [[0.5] * 3], "stds": [[0.5] * 3]}, "means [[0.5, 0.5, 0.5]], but it must be at least 2 long"),
        ({"means": [[0.5] * 3] * 2, "stds": [[0.5, 0.5, 0.0]] * 2}, "stds.0.2 0.0, but it must be above 0"),
        ({"means": [[NAN] * 3] * 2, "stds": [[0.5] * 3] * 2}, "means.0.0 NaN"),
        ({"means": [[0.5] * 3] * 2, "stds": [[0.5] * 3] * 2, "tvf_do_letterbox": True}, "tvf_do_letterbox true"),
        ({"means": [[0.5] * 3] * 2, "stds": [[0.5] * 3] * 2, "interpolations": ["lanczos"]}, 'interpolations.0 "lan'),
        (
            {"means": [[0.5] * 3] * 2, "stds": [[0.5] * 3] * 2, "input_sizes": [[3, 224, 224]] * 2},
            "input_sizes of [224",
        ),
        ([], "must be an object with keys"),
    ],
)
def test_a_preprocessor_of_another_kind_is_refused(base, copy, content, said):
    folder = copy(base)
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    sentence = refusal(folder)
    assert said in sentence and f"{folder}/preprocessor_config.json" in sentence


def test_unknown_towers_without_preprocessor_are_refused(base, copy):
    folder = copy(base)
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json is missing" in refusal(folder)


# ------------------------------------------------------------------ tokenizer
def llama_like() -> Tokenizer:
    """Llama's rules on a small vocabulary: a space in front, spaces as words' parts, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"InWhatcosudherbkp:?Olm\u00e9"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def files_of(tokenizer: Tokenizer, **config) -> dict[str, bytes]:
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def test_llamas_own_rules_are_taken():
    tokenizer = read_tokenizer(files_of(llama_like(), bos_token={"content": "<s>"}, add_eos_token=False))
    prompt = PROMPT.format(task_description="put  caf\u00e9 \u4e2d on plate")
    ids = encode_prompt(tokenizer, prompt, "x")
    assert ids[0] == BOS_ID and ids[1:] == llama_like().encode(prompt).ids and ids[-1] == llama_like().token_to_id("▁")


def tiny() -> Tokenizer:
    return Tokenizer.from_str(tiny_side_files()["tokenizer.json"].decode())


def with_template(template: str) -> Tokenizer:
    tokenizer = tiny()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2), ("<unk>", 0)]
    )
    return tokenizer


def with_normalizer(*rules) -> Tokenizer:
    tokenizer = tiny()
    tokenizer.normalizer = normalizers.Sequence(list(rules))
    return tokenizer


def with_token(content: str, **options) -> Tokenizer:
    tokenizer = tiny()
    tokenizer.add_special_tokens([AddedToken(content, **options)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, said",
    [
        (with_template("<s> $A </s>"), "has a post_processor that makes"),
        (with_template("<s> <s> $A"), "has a post_processor that makes"),
        (with_template("</s> $A"), "has a post_processor that makes"),
        (with_normalizer(normalizers.Strip()), "change or drop a part"),
        (with_normalizer(normalizers.Lowercase()), "change or drop a part"),
        (with_normalizer(normalizers.Replace("?", "")), "change or drop a part"),
        (with_token("plate?", rstrip=True), "change or drop a part"),
    ],
)
def test_rules_that_add_to_a_prompt_or_swallow_of_it_are_refused(base, copy, tokenizer, said):
    folder = copy(base)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    sentence = refusal(folder)
    assert said in sentence and str(folder / "tokenizer.json") in sentence


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(add_eos_token=True), "add_eos_token true"),
        (dict(bos_token="</s>"), "gives '</s>' the id 1, "),
        (dict(added_tokens_decoder={"600": {"content": "carrot"}}), "gives 'carrot' the id 600, "),
        (dict(added_tokens_decoder={"x": {"content": "carrot"}}), "added_tokens_decoder.x"),
        (dict(bos_token=5), "bos_token 5, but it must be text"),
    ],
)
def test_a_tokenizer_config_that_transformers_would_follow_is_refused(base, copy, config, said):
    folder = copy(base)
    edit(folder, "tokenizer_config.json", **config)
    sentence = refusal(folder)
    assert said in sentence and str(folder / "tokenizer_config.json") in sentence


def test_truncation_and_padding_are_left_out_as_in_transformers():
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=60)
    text = PROMPT.format(task_description="put carrot on plate")
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))(text)["input_ids"]
    assert read_tokenizer(files_of(tokenizer)).encode(text).ids == theirs == tiny().encode(text).ids


def test_random_tokenization_is_refused(base, copy):
    folder = copy(base)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "model.dropout" in refusal(folder)


def test_a_panic_of_the_tokenizers_package_is_a_sentence(base, copy):
    """A template that names a token it does not define ends in Rust's panic, which is no Exception."""
    folder = copy(base)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer.json is damaged or of another kind" in refusal(folder)


def test_words_that_are_actions_are_refused(base, copy):
    policy = load_policy(str(base))
    policy.tokenizer.add_tokens(["brick", *(f"word{number}" for number in range(300))])
    for word, number in (("brick", 512), ("word7", 520), ("word299", 812)):  # the last is past the actions: padding
        with pytest.raises(UserError, match=rf"'Take {word}' has the id {number}, and ids from 512 on are actions"):
            policy.prompt_ids(f"Take {word}")
    policy.prompt_ids("take carrot")


# ------------------------------------------------------------------ adapters
OTHERS = {field.name for field in dataclasses.fields(LoraConfig)} - set(HONOURED) - WITHOUT_EFFECT
OTHERS -= {"bias", "init_lora_weights"}


def test_every_field_of_peft_is_known():
    """Those that are honoured, those without effect, and the rest, each of which is refused below where it is set."""
    assert {"use_dora", "modules_to_save", "lora_bias", "layer_replication", "arrow_config"} <= OTHERS
    assert set(HONOURED) <= AdapterConfig.model_fields.keys() and not OTHERS & AdapterConfig.model_fields.keys()


@pytest.mark.parametrize("key", [*sorted(OTHERS), "of_a_later_peft"])
@pytest.mark.parametrize("value", [True, {"a": 1}, [1]])
def test_a_setting_that_would_do_something_else_is_refused(adapter, copy, key, value):
    folder = copy(adapter)
    edit(folder, "adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json sets {key} .*, which is not supported: merge"):
        read_adapter_config(folder)
    for nothing in (None, False, {}, []):
        edit(folder, "adapter_config.json", **{key: nothing})
        read_adapter_config(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(init_lora_weights="pissa"), 'init_lora_weights "pissa", but it must be true'),
        (dict(init_lora_weights="pissa_niter_4"), 'init_lora_weights "pissa_niter_4"'),
        (dict(init_lora_weights="olora"), 'init_lora_weights "olora"'),
        (dict(init_lora_weights="loftq"), 'init_lora_weights "loftq"'),
        (dict(init_lora_weights="corda"), 'init_lora_weights "corda"'),
        (dict(peft_type="IA3"), 'peft_type "IA3"'),
        (dict(bias="all"), "bias \"all\", but it must be 'none'"),
        (dict(r=0), "r 0, but it must be at least 1"),
        (dict(r=...), "has no r"),
        (dict(r=MILLION), "r 1000000, but it must be at most"),
        (dict(r=65536), "r 65536, the largest factor in adapter_model.safetensors has 2 rows"),
        (dict(lora_alpha=NAN), "lora_alpha NaN"),
        (dict(target_modules=...), "has no target_modules"),
        (dict(target_modules=[]), "[], but it must be a module's name or a regular expression, or a list"),
        (dict(target_modules=None), "target_modules null, but it must be a module's name"),
        (dict(target_modules=5), "target_modules 5, but it must be a module's name"),
        (dict(exclude_modules=["fc1", 5]), "exclude_modules"),
        (dict(layers_to_transform="1"), 'layers_to_transform "1", but it must be a whole number, or a list of these'),
        (dict(init_lora_weights=["pissa"]), 'init_lora_weights ["pissa"], but it must be true'),
        (dict(target_modules=["nothing_of_this_name"]), "does not fit the model"),
        (dict(target_modules="(("), "not a regular expression"),
        (dict(rank_pattern={"(a+)+$": 2}), "rank_pattern"),
        (dict(alpha_pattern={"fc1": NAN}), "alpha_pattern.fc1 NaN"),
        (dict(layers_pattern="(.*)*"), "layers_pattern"),
        (dict(layers_pattern=["layers", "(.*)*"]), "it must be a module's name, or a list of these"),
        (dict(target_modules=".*fc1", layers_to_transform=[0]), "layers_to_transform and a text as target_modules"),
    ],
)
def test_an_adapter_that_cannot_be_honoured_is_refused(base, adapter, copy, change, said):
    folder = copy(adapter)
    edit(folder, "adapter_config.json", **change)
    sentence = refusal(base, lora_path=str(folder))
    assert said in sentence and str(folder) in sentence


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern", [r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)\7\6\5\4\3\2\1", r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6\7z"]
)
def test_an_expression_that_never_ends_is_given_up(base, adapter, copy, monkeypatch, key, pattern):
    monkeypatch.setattr("vla.models.lora.MATCH_SECONDS", 0.2)
    folder = copy(adapter)
    edit(folder, "adapter_config.json", **{key: pattern})
    said = refusal(base, lora_path=str(folder))
    assert f"adapter_config.json, {key}, has the regular expression" in said and "list the modules by name" in said


@pytest.mark.parametrize("pattern", [r"((\w|\.)+)+!", r"(\w+)*$x", r"(a|\w|\.)*!"])
def test_an_expression_that_would_never_end_in_peft_ends_here(base, adapter, copy, pattern):
    folder = copy(adapter)
    edit(folder, "adapter_config.json", target_modules=pattern)
    assert "adapter_config.json does not fit the model" in refusal(base, lora_path=str(folder))


def test_expressions_match_as_in_peft():
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [name for name, _ in load_policy("openvla-tiny").model.named_modules() if name]
    for pattern in (r".*\.(q_proj|v_proj)", r"language_model\.lm_head", r".*blocks\.[01]\..*fc\d", "projector"):
        config = SimpleNamespace(target_modules=pattern, target_parameters=None, exclude_modules=None)
        theirs = [name for name in names if check_target_module_exists(config, name)]
        assert matching(pattern, names, "x") == theirs


# what an adapter may ask for; each is trained by peft itself and loaded by both
SETTINGS = {
    "plain": {},
    "rslora": dict(use_rslora=True),
    "ranks": dict(rank_pattern={"q_proj": 2, "projector.fc1": 5}, alpha_pattern={"q_proj": 3, "^projector.fc2": 1}),
    "ranks of rslora": dict(use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 6}, alpha_pattern={"kv": 9}),
    "excluded": dict(exclude_modules=["lm_head", "layers.1.mlp.up_proj"]),
    "excluded by expression": dict(exclude_modules=r"vision_backbone\..*"),
    "expression": dict(target_modules=r"language_model\..*\.(q_proj|down_proj)"),
    "layers": dict(target_modules=["q_proj", "fc1"], layers_to_transform=[1], layers_pattern=["layers", "blocks"]),
    "all linear": dict(target_modules="all-linear"),
    "one layer": dict(target_modules=["q_proj"], layers_to_transform=0),
    "dropout": dict(lora_dropout=0.3),
    "fan": dict(fan_in_fan_out=True, target_modules=["q_proj", "fc2"]),
    "orthogonal": dict(init_lora_weights="orthogonal", target_modules=["q_proj", "fc1"]),
    "random": dict(init_lora_weights=False),
    "explained variance": dict(init_lora_weights="eva", target_modules=["q_proj", "fc1"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_computes_what_peft_computes(base, tmp_path, name):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LORA_TARGETS, **SETTINGS[name]}
    trained = get_peft_model(load_policy(str(base)).model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    for key, parameter in trained.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    trained.save_pretrained(str(tmp_path))
    theirs = PeftModel.from_pretrained(load_policy(str(base)).model, str(tmp_path)).eval()
    policy = load_policy(str(base), lora_path=str(tmp_path)).eval()
    expected, plain = logits_of(theirs, policy), load_policy(str(base)).eval()
    assert torch.allclose(logits_of(policy.model, policy), expected, atol=1e-5)
    assert (logits_of(plain.model, plain) - expected).abs().max() > 1e-2
    merged = load_policy(str(base), lora_path=str(tmp_path), merge_lora=True).eval()
    assert torch.allclose(logits_of(merged.model, merged), expected, atol=1e-5 * expected.abs().max())


def test_a_converted_pissa_adapter_computes_what_was_trained(base, tmp_path):
    """As peft trains it, it is refused, since its base is what PiSSA left of the weights; converted or merged by peft,
    it is honoured: the same outputs as the trained model's."""
    model = load_policy(str(base)).model
    settings = dict(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"])
    peft_model = get_peft_model(model, LoraConfig(**settings, init_lora_weights="pissa"))
    peft_model.peft_config["default"].init_lora_weights = True  # as peft's documentation has it
    peft_model.save_pretrained(str(tmp_path / "start"))
    peft_model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for key, parameter in peft_model.named_parameters():
            if "lora_B" in key:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    policy = load_policy(str(base))
    expected = logits_of(peft_model.eval(), policy)
    peft_model.save_pretrained(str(tmp_path / "raw"))
    assert 'init_lora_weights "pissa"' in refusal(base, lora_path=str(tmp_path / "raw"))
    theirs = PeftModel.from_pretrained(load_policy(str(base)).model, str(tmp_path / "raw")).merge_and_unload()
    policy.model.load_state_dict(theirs.state_dict())
    save_policy(policy, policy.state_dict(), tmp_path / "merged")  # what the sentence advises
    merged = load_policy(str(tmp_path / "merged")).eval()
    assert torch.allclose(logits_of(merged.model, merged), expected, atol=1e-5 * expected.abs().max())
    peft_model.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    converted = load_policy(str(base), lora_path=str(tmp_path / "plain")).eval()
    assert torch.allclose(logits_of(converted.model, converted), expected, atol=1e-5 * expected.abs().max())


# ------------------------------------------------------------------ the base of an adapter
def test_a_base_that_names_itself_or_another_adapter_is_refused(adapter, copy):
    loop = copy(adapter, "loop")
    edit(loop, "adapter_config.json", base_model_name_or_path=str(loop))
    assert "base_model_name_or_path itself" in refusal(loop)
    upper = copy(adapter, "upper")
    edit(upper, "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "which holds an adapter too" in refusal(upper)
    edit(upper, "adapter_config.json", base_model_name_or_path=["x"])
    assert "adapter_config.json has base_model_name_or_path ['x'], which is not a folder" in refusal(upper)


def test_an_adapter_beside_weights_that_names_another_base_is_refused(base, adapter, copy):
    folder = copy(adapter)
    shutil.copy(base / WEIGHTS, folder)
    assert "holds weights, and adapter_config.json names the base" in refusal(folder)
    edit(folder, "adapter_config.json", base_model_name_or_path=None)
    assert any("lora_" in name for name, _ in load_policy(str(folder)).named_parameters())
    assert "would be a second one" in refusal(folder, lora_path=str(adapter))


def other_base(folder: Path, what: str) -> None:
    if what == "weights":
        edit_weights(folder, poisoned("language_model.model.layers.0.mlp.up_proj.weight", 0.25))
    elif what == "order of bytes":
        edit_weights(folder, lambda weights: weights["projector.fc1.bias"].copy_(weights["projector.fc1.bias"].flip(0)))
    elif what == "tokenizer":
        tokenizer = tiny()
        tokenizer.add_tokens(["carrot on"])
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
    elif what == "statistics":
        edit_stats(folder, q99=[1.0] * 7)
    elif what == "pictures":
        edit(folder, "preprocessor_config.json", means=[[0.5] * 3] * 2)
    else:
        edit_text(folder, rms_norm_eps=1e-5)


CHANGES = {
    "weights": "its weights differ",
    "order of bytes": "its weights differ",
    "tokenizer": "its tokenizer.json differs",
    "statistics": "its action statistics differ",
    "pictures": "its preprocessor_config.json differs",
    "sizes": "the sizes in its config.json differ",
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_adapter_refuses_another_base(base, adapter, copy, what):
    other = copy(base)
    load_policy(str(other), lora_path=str(adapter))  # the same base in another place
    other_base(other, what)
    sentence = refusal(other, lora_path=str(adapter))
    assert f"{adapter} was trained on another base than {other}, because {CHANGES[what]}" in sentence
    published = copy(adapter, "published")
    (published / "adapter_base.json").unlink()
    edit(published, "adapter_config.json", base_model_name_or_path="openvla/openvla-7b")
    if what in ("statistics", "pictures", "sizes", "tokenizer"):
        load_policy(str(other), lora_path=str(published))  # nobody noted what it was trained on


@pytest.mark.parametrize("what", ["weights", "order of bytes"])
def test_a_saved_adapter_refuses_a_base_that_was_replaced_in_its_place(base, copy, tmp_path, what):
    """The folder of a run's policy names its base by path: evaluate.py and a new run load it so."""
    place = copy(base, "place")
    policy = shaken(load_policy(str(place), lora_rank=2))
    save_policy(policy, policy.state_dict(), tmp_path / "policy")
    load_policy(str(tmp_path / "policy"), dtype=torch.bfloat16)  # the precision of acting does not matter
    other_base(place, what)
    said = refusal(tmp_path / "policy")
    assert f"policy was trained on another base than {place}, because its weights differ" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_beside_its_base_notices_the_same(tmp_path, dtype):
    """A preset has no folder, so its weights are saved beside the adapter, in the precision of the run."""
    policy = shaken(load_policy("openvla-tiny", lora_rank=2, dtype=dtype))
    assert policy.files.base == load_policy("openvla-tiny", dtype=dtype).files.base
    assert policy.files.base != load_policy("openvla-tiny", dtype=dtype, seed=1).files.base
    save_policy(policy, policy.state_dict(), tmp_path / "policy")
    load_policy(str(tmp_path / "policy"))
    other_base(tmp_path / "policy", "weights")
    assert "its weights differ" in refusal(tmp_path / "policy")


def test_statistics_of_another_key_are_the_users_choice(base, adapter, copy):
    folder = copy(base)
    stats = json.loads((folder / "config.json").read_text())["norm_stats"]["bridge_orig"]
    (folder / "dataset_statistics.json").write_text(json.dumps({"other": stats}))
    load_policy(str(folder), lora_path=str(adapter), unnorm_key="other")
    load_policy(str(folder), lora_path=str(adapter))


@pytest.mark.parametrize("what", ["weights", "statistics"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_resumed_run_refuses_another_base(base, copy, tmp_path, lora_rank, what):
    """state.json notes the base of every run, with adapter and without."""
    from vla.training.checkpoint import adapter_settings, check_same_model, trained_shapes

    place = copy(base, "place")
    engine = SimpleNamespace(module=load_policy(str(base), lora_rank=lora_rank), zero_optimization_stage=lambda: 0)
    noted = {"trained": trained_shapes(engine), "base": engine.module.files.base, "adapter": adapter_settings(engine)}
    state = SimpleNamespace(**json.loads(json.dumps(noted)))
    engine.module = load_policy(str(place), lora_rank=lora_rank)
    check_same_model(engine, state, tmp_path)
    other_base(place, what)
    engine.module = load_policy(str(place), lora_rank=lora_rank)
    with pytest.raises(UserError, match=f"{tmp_path} was trained on another base.*{CHANGES[what]}"):
        check_same_model(engine, state, tmp_path)


@pytest.mark.parametrize("what", ["factors", "scale", "nothing"])
def test_a_resumed_run_refuses_another_adapter_in_its_base(base, adapter, copy, tmp_path, what):
    """What --merge_lora added to the weights is part of what the run's own adapter was trained on."""
    from vla.training.checkpoint import adapter_settings, check_same_model, trained_shapes

    def loaded() -> SimpleNamespace:
        policy = load_policy(str(base), lora_path=str(place), merge_lora=True, lora_rank=2)
        return SimpleNamespace(module=policy, zero_optimization_stage=lambda: 0)

    place = copy(adapter, "place")
    engine = loaded()
    noted = {"trained": trained_shapes(engine), "base": engine.module.files.base, "adapter": adapter_settings(engine)}
    state = SimpleNamespace(**json.loads(json.dumps(noted)))
    if what == "factors":
        file = place / "adapter_model.safetensors"
        save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    elif what == "scale":
        edit(place, "adapter_config.json", lora_alpha=77)
    else:
        place = place.rename(tmp_path / "elsewhere")
        edit(place, "adapter_config.json", base_model_name_or_path="openvla/openvla-7b")
        check_same_model(loaded(), state, tmp_path)
        return
    with pytest.raises(UserError, match=r"was trained on another base.*its weights differ"):
        check_same_model(loaded(), state, tmp_path)


# ------------------------------------------------------------------ what sentences advise
READERS = """models/loading models/published models/lora models/tokenizer
files/tensors models/policy models/openvla models/openvla_oft models/value_head""".split()


def test_no_sentence_of_loading_advises_a_flag_that_evaluate_lacks():
    """load_policy speaks to every script; a flag that some lack may stand only where its own value is refused."""
    import evaluate

    known = set(evaluate.Args.__dataclass_fields__)
    files = [ROOT / "vla" / f"{name}.py" for name in READERS] + [ROOT / "schemas" / "policies.py"]
    advised = set()
    for path in files:
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                for flag in re.findall(r"--(\w+)", node.value):
                    advised.add(flag)
                    own = re.match(rf"--{flag} ", node.value) and flag in ("chunk_size", "lora_scope")
                    assert flag in known or own, f"{path.name}: {node.value!r}"
    assert {"lora_path", "model_type", "unnorm_key"} <= advised
