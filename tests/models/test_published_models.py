"""OpenVLA-OFT, published folders and adapters, frozen towers: against the published code, against peft, against
themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launching import python
from made_up import observation
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from schemas import UserError
from schemas.pixels import resize
from vla.models.about import ABOUT
from vla.models.loading import load_policy
from vla.models.lora import LORA_TARGETS
from vla.models.openvla import OpenVLA
from vla.models.policy import PolicyInputs
from vla.models.saving import save_policy, save_weights
from vla.models.tiny import TINY_OPENVLA, tiny_side_files
from vla.models.tokenizer import read_tokenizer
from vla.training.rollout_buffer import RolloutBuffer


def shaken(policy, size: float = 0.05):
    """Every parameter moved, so that fresh zeros (lora_B, biases) do not hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return policy.eval()


def assert_same_outputs(one, other, atol: float) -> None:
    obs = observation(3)
    with torch.no_grad():
        tokens = one.act(obs, 0.0)[0]
        for ours, theirs in zip(one.logprobs_and_values(obs, tokens, 1.0), other.logprobs_and_values(obs, tokens, 1.0)):
            assert torch.allclose(ours, theirs, atol=atol)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A whole openvla-tiny in a folder of its own."""
    folder = tmp_path_factory.mktemp("base")
    policy = shaken(load_policy("openvla-tiny"))
    save_policy(policy, policy.state_dict(), folder)
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    text_config = {**config["text_config"], **changes.pop("text_config", {})}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text_config, **changes}))
    return folder


# ------------------------------------------------------------------ OpenVLA-OFT
def test_oft_matches_the_published_code_and_not_its_causal_twin(fixtures):
    folder = fixtures / "openvla_oft_tiny"
    expected = load_file(folder / "expected.safetensors")
    policy = load_policy(str(folder), "openvla_oft").eval()
    prompt = expected["D.input_ids"][0][expected["D.attention_mask"][0].bool()].tolist()
    ids, mask = policy.collate([prompt])
    assert torch.equal(ids, expected["D.input_ids"]) and torch.equal(mask, expected["D.attention_mask"].bool())
    inputs = PolicyInputs(expected["D.resized_uint8_tensor_path"].permute(0, 2, 3, 1).contiguous(), ids, mask)
    with torch.no_grad():
        tokens, logprobs, values = policy.act(inputs, 0.0)
        logits = policy.model(*inputs)[0][..., 31744:32064]
        again, _, values_again = policy.logprobs_and_values(inputs, tokens, 1.0)
        with_stop = load_policy(str(folder), "openvla_oft", oft_stop_token=True).eval().model(*inputs)[0]
    assert torch.allclose(logits, expected["D.logits_action_31744_32064"], atol=1e-4)
    assert (logits - expected["D.NEGATIVE_CONTROL_causal_logits_action_31744_32064"]).abs().max() > 1.0
    assert (with_stop[..., 31744:32064] - logits).abs().max() > 1.0  # the specification measured 11
    assert torch.equal(tokens, expected["D.action_tokens"])
    for found in (logprobs, again):
        assert torch.allclose(found.flatten(1), expected["D.train_logprobs"], atol=1e-4)
    for found in (values, values_again):
        assert torch.allclose(found, expected["D.prev_values"], atol=1e-4)
    assert torch.allclose(policy.decode(tokens).double(), expected["D.chunk_actions"], atol=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("stop_token", [False, True])
def test_oft_rollout_and_update_agree(lora_rank, stop_token):
    policy = shaken(
        load_policy("openvla-oft-tiny", "openvla_oft", chunk_size=4, lora_rank=lora_rank, oft_stop_token=stop_token),
        0.01,
    )
    obs = observation(3)
    with torch.no_grad():
        tokens, logprobs, values = policy.act(obs, 0.7)
        again, entropy, values_again = policy.logprobs_and_values(obs, tokens, 0.7)
        assert torch.allclose(policy.value(obs), values, atol=1e-5)
        for i in range(3):  # alone and in a batch with longer prompts: the same
            one = {"image": obs["image"][i : i + 1], "task_description": obs["task_description"][i : i + 1]}
            alone, _, value = policy.logprobs_and_values(one, tokens[i : i + 1], 0.7)
            assert torch.allclose(alone[0], logprobs[i], atol=1e-4) and torch.allclose(value[0], values[i], atol=1e-4)
    assert tokens.shape == logprobs.shape == entropy.shape == (3, 4, 7) and values.shape == (3, 4)
    assert torch.allclose(logprobs, again, atol=1e-4) and torch.allclose(values, values_again, atol=1e-4)
    assert policy.decode(tokens).shape == (3, 4, 7)


def test_oft_sees_its_last_placeholder_from_the_first(monkeypatch):
    """The check that runs at every load passes here, and fails where the kernel is causal."""
    policy = load_policy("openvla-oft-tiny", "openvla_oft")
    policy.model.check_bidirectional()
    attention = torch.nn.functional.scaled_dot_product_attention

    def causal(query, key, value, attn_mask=None, **options):
        return attention(query, key, value, **{**options, "is_causal": True})

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", causal)
    with pytest.raises(RuntimeError, match="causal"):
        policy.model.check_bidirectional()


def test_gradient_checkpointing_changes_no_gradient():
    for model_type, path in (("openvla", "openvla-tiny"), ("openvla_oft", "openvla-oft-tiny")):
        gradients = []
        for checkpointing in (False, True):
            policy = load_policy(path, model_type, gradient_checkpointing=checkpointing).train()
            tokens = torch.full((2, policy.chunk_size, 7), 600)
            logprobs, _, values = policy.logprobs_and_values(observation(2), tokens, 1.0)
            (logprobs.sum() + values.sum()).backward()
            gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert any("featurizer" in name for name in gradients[0])
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name
    with pytest.raises(RuntimeError, match="eval mode"):
        load_policy("openvla-tiny", gradient_checkpointing=True).train().act(observation(1), 1.0)


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize("path, model_type", [("openvla-tiny", "openvla"), ("openvla-oft-tiny", "openvla_oft")])
def test_bf16_rollout_and_update_stay_close_and_the_critic_is_fp32(path, model_type):
    policy = load_policy(path, model_type, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.value_head.parameters()} == {torch.float32}
    obs = observation(4)
    with torch.no_grad():
        tokens, logprobs, values = policy.act(obs, 1.0)
        again, _, values_again = policy.logprobs_and_values(obs, tokens, 1.0)
        policy.value_head.bfloat16()  # what DeepSpeed's bf16 engine does: arithmetic stays fp32
        assert policy.value(obs).dtype == torch.float32
    assert logprobs.dtype == values.dtype == torch.float32
    error = (logprobs - again).abs()
    print(f"{model_type} bf16: |logprob difference| mean {error.mean():.4f} max {error.max():.4f}")
    assert error.max() < 0.25 and error.mean() < 0.05 and (values - values_again).abs().max() < 0.02


# ------------------------------------------------------------------ folders
@pytest.mark.parametrize("path, model_type", [("openvla-tiny", "openvla"), ("openvla-oft-tiny", "openvla_oft")])
def test_sharded_folder_gives_the_same_model(tmp_path, path, model_type):
    policy = shaken(load_policy(path, model_type))
    save_policy(policy, policy.state_dict(), tmp_path / "whole")
    sharded = copy_of(tmp_path / "whole", tmp_path / "sharded")
    weights = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    save_weights(weights, sharded, max_shard_bytes=1_000_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 4
    loaded = load_policy(str(sharded), model_type)
    for (name, ours), theirs in zip(policy.named_parameters(), loaded.parameters()):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name
    save_policy(loaded, loaded.state_dict(), tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    short = next(sharded.glob("model-00002-*"))
    short.write_bytes(short.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{short.name} is truncated"):
        load_policy(str(sharded), model_type)
    short.unlink()
    with pytest.raises(UserError, match=short.name):
        load_policy(str(sharded), model_type)


def test_fixture_round_trip_and_statistics(fixtures, tmp_path):
    """A folder that the published code wrote: saved again bit for bit, bf16 values and all; statistics are merged."""
    folder = fixtures / "openvla_tiny"
    policy = load_policy(str(folder), unnorm_key="unmasked_demo", dtype=torch.bfloat16)
    assert policy.action_tokens.mask.all() and policy.action_tokens.q99[1] == 0.5
    save_policy(policy, policy.state_dict(), tmp_path / "saved")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    for name in ("config.json", "dataset_statistics.json", "preprocessor_config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "saved" / name).read_text()), name
    saved, original = (load_file(place / "value_head.safetensors") for place in (tmp_path / "saved", folder))
    assert all(torch.equal(saved[name], original[name]) for name in original)


def test_pil_resize_is_upstreams(fixtures):
    import numpy as np

    expected = load_file(fixtures / "openvla_tiny" / "expected.safetensors")
    archive = np.load(fixtures / "openvla_tiny" / "image_480x640_uint8.npz")
    image = torch.from_numpy(archive[archive.files[0]])[None]
    assert torch.equal(resize(image, (224, 224), "pil").permute(0, 3, 1, 2), expected["A.resized_uint8_pil_path"])


def test_preprocessor_config_decides_the_normalisation(base, tmp_path):
    folder = copy_of(base, tmp_path / "other")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "means": [[0.1] * 3, [0.2] * 3]}))
    means = load_policy(str(folder)).model.vision_backbone.pixel_mean
    assert torch.equal(means.flatten(), torch.tensor([0.1] * 3 + [0.2] * 3))
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "image_resize_strategy": "letterbox"}))
    with pytest.raises(ValueError, match="letterbox"):
        load_policy(str(folder))


def test_tokenizer_without_template_still_begins_with_bos():
    files = tiny_side_files()
    content = json.loads(files["tokenizer.json"])
    bare = read_tokenizer({"tokenizer.json": json.dumps({**content, "post_processor": None}).encode()})
    assert bare.encode("put carrot").ids == read_tokenizer(files).encode("put carrot").ids
    assert read_tokenizer({}) is None


def test_value_head_from_a_file(base, tmp_path):
    critic = {name: torch.randn_like(value) for name, value in load_file(base / "value_head.safetensors").items()}
    save_file(critic, tmp_path / "critic.safetensors")
    policy = load_policy(str(base), value_head=str(tmp_path / "critic.safetensors"))
    assert torch.equal(policy.value_head.mlp[0].weight, critic["value_head.mlp.0.weight"])
    assert load_policy(str(base), value_head=False).value_head is None
    with pytest.raises(UserError, match="nowhere"):
        load_policy(str(base), value_head=str(tmp_path / "nowhere"))
    nameless = copy_of(base, tmp_path / "nameless")  # a folder that does not say what it is
    (nameless / ABOUT).unlink()
    with pytest.raises(ValueError, match=r"mlp\.4\.weight"):  # 1 output, 8 are wanted
        load_policy(str(nameless), "openvla_oft")


PEAK = """
import sys, torch
def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])
from vla.models.loading import load_policy
load_policy("openvla-tiny", dtype=torch.bfloat16)
before = kib("VmRSS")
policy = load_policy(sys.argv[1], dtype=torch.bfloat16, value_head=False)
print((kib("VmHWM") - before) * 1024, sum(p.nbytes for p in policy.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of memory")
def test_peak_host_memory_is_the_model_and_one_shard(tmp_path):
    """At most the model and 1.2 times the largest shard, in a fresh process; 17 shards of 20 MB in fp32."""
    config = {
        **TINY_OPENVLA,
        "text_config": {
            **TINY_OPENVLA["text_config"],
            "hidden_size": 512,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_bytes(tiny_side_files()["preprocessor_config.json"])
    save_weights(OpenVLA(config).state_dict(), tmp_path, max_shard_bytes=20_000_000)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, model = map(int, run.stdout.split())
    print(
        f"peak {peak / 1e6:.0f} MB, model {model / 1e6:.0f} MB, largest of {len(shards)} shards {max(shards) / 1e6:.0f}"
    )
    assert len(shards) > 10 and model > 150e6
    assert peak <= model + 1.2 * max(shards)


# ------------------------------------------------------------------ adapters
@pytest.fixture(scope="module")
def published_adapter(base, tmp_path_factory) -> Path:
    """An adapter that peft itself trained and wrote, with its stray copy of lm_head."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_policy(str(base)).model
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=2, target_modules=LORA_TARGETS))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    peft_model.save_pretrained(str(folder))
    weights = load_file(folder / "adapter_model.safetensors")
    stray = load_file(base / "model.safetensors")["language_model.lm_head.weight"]
    weights["base_model.model.language_model.lm_head.base_layer.weight"] = stray
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_published_adapter_computes_what_peft_computes(base, published_adapter):
    policy = load_policy(str(base), lora_path=str(published_adapter)).eval()
    peft_model = PeftModel.from_pretrained(load_policy(str(base)).model, str(published_adapter)).eval()
    names = dict(policy.model.named_parameters())
    assert names["vision_backbone.featurizer.patch_embed.proj.lora_A.default.weight"].shape == (4, 3, 8, 8)
    inputs, tokens = policy.preprocess(observation(2)), torch.full((2, 7), 600)
    with torch.no_grad():
        ours, theirs = (model(*inputs, tokens=tokens)[0] for model in (policy.model, peft_model))
        plain = load_policy(str(base)).eval().model(*inputs, tokens=tokens)[0]
    assert torch.allclose(ours, theirs, atol=1e-5) and (ours - plain).abs().max() > 0.1
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name or name.startswith("value_head.") for name in trainable)


def test_merged_adapter_equals_the_unmerged(base, published_adapter, tmp_path):
    policy = load_policy(str(base), lora_path=str(published_adapter)).eval()
    merged = load_policy(str(base), lora_path=str(published_adapter), merge_lora=True).eval()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert_same_outputs(policy, merged, atol=1e-5)
    save_policy(policy, policy.state_dict(), tmp_path / "merged", merge_lora=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    reloaded = load_policy(str(tmp_path / "merged")).eval()
    for (name, ours), theirs in zip(merged.named_parameters(), reloaded.parameters()):
        assert torch.equal(ours, theirs), name
    fresh = load_policy(str(base), lora_path=str(published_adapter), merge_lora=True, lora_rank=2).eval()
    assert_same_outputs(policy, fresh, atol=1e-5)  # a fresh adapter on top starts as nothing


def test_adapter_is_saved_alone_and_continues(base, published_adapter, tmp_path):
    policy = shaken(load_policy(str(base), lora_path=str(published_adapter)), 0.0)
    save_policy(policy, policy.state_dict(), tmp_path / "a")
    assert not list((tmp_path / "a").glob("model*.safetensors"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    loaded = load_policy(str(tmp_path / "a")).eval()
    for (name, ours), theirs in zip(policy.named_parameters(), loaded.named_parameters()):
        assert name == theirs[0] and torch.equal(ours, theirs[1]), name
    save_policy(loaded, loaded.state_dict(), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    # the published side reads what we write
    peft_model = PeftModel.from_pretrained(load_policy(str(base)).model, str(tmp_path / "a")).eval()
    inputs = policy.preprocess(observation(2))
    with torch.no_grad():
        assert torch.allclose(peft_model(*inputs)[0], policy.model(*inputs)[0], atol=1e-5)
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**loaded.files.adapter_config, "base_model_name_or_path": "/gone"})
    )
    with pytest.raises(UserError, match=r"'/gone'.*--lora_path"):
        load_policy(str(tmp_path / "a"))
    assert_same_outputs(policy, load_policy(str(base), lora_path=str(tmp_path / "a")).eval(), atol=1e-5)


def test_adapter_refusals(base, published_adapter, tmp_path):
    def broken(name: str) -> Path:
        return copy_of(published_adapter, tmp_path / name)

    with pytest.raises(ValueError, match="--lora_path is empty"):
        load_policy(str(base), lora_path="")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_policy(str(base), lora_path=str(tmp_path / "nothing"))
    weights = load_file(published_adapter / "adapter_model.safetensors")
    folder = broken("no_tensor")
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="empty"):
        load_policy(str(base), lora_path=str(folder))
    folder, lost = broken("lost"), "base_model.model.projector.fc1.lora_B.weight"
    save_file({name: value for name, value in weights.items() if name != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys missing \(projector\.fc1\.lora_B"):
        load_policy(str(base), lora_path=str(folder))
    folder = broken("dora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_policy(str(base), lora_path=str(folder))
    with pytest.raises(ValueError, match="another base model"):
        load_policy("openvla-tiny", lora_path=str(published_adapter))
    with pytest.raises(ValueError, match="merge_lora"):
        load_policy(str(base), merge_lora=True)


# ------------------------------------------------------------------ frozen towers
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("path, model_type", [("openvla-tiny", "openvla"), ("openvla-oft-tiny", "openvla_oft")])
def test_frozen_towers_run_once(path, model_type, lora_rank, monkeypatch):
    policy = load_policy(path, model_type, lora_rank=lora_rank, lora_scope="llm").eval()
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable and all(name.startswith(("model.language_model.", "value_head.")) for name in trainable)
    inputs = policy.preprocess(observation(2))
    with torch.no_grad():
        tokens, logprobs, values = policy.act(inputs, 1.0)
        cached = policy.prepare(inputs)
        assert cached.features.shape[1:] == policy.feature_shape()
        buffer = RolloutBuffer(1, 2, policy.chunk_size, policy.image_size, 30, feature_shape=policy.feature_shape())
        chunk = torch.zeros(2, policy.chunk_size)
        buffer.add_decision(0, slice(0, 2), cached, tokens=tokens, logprobs=logprobs)
        mb = buffer.micro_batch(torch.arange(2), *[chunk[None]] * 3, 1.0, True)
        monkeypatch.setattr(policy.model.vision_backbone, "forward", None)  # from here on nothing may call it
        again, _, values_again = policy.logprobs_and_values(mb.inputs, mb.tokens, 1.0)
    assert torch.allclose(again, logprobs, atol=1e-4) and torch.allclose(values_again, values, atol=1e-4)


def test_trained_towers_are_not_cached():
    for lora_rank in (0, 4):
        policy = load_policy("openvla-tiny", lora_rank=lora_rank)
        inputs = policy.preprocess(observation(1))
        assert policy.prepare(inputs).features is None


# ------------------------------------------------------------------ refusals
def test_refusals_of_folders(base, tmp_path):
    def changed(name: str, **changes) -> str:
        folder = copy_of(base, tmp_path / name)
        (folder / ABOUT).unlink()  # as the published folders, it does not say what it is
        return str(edit_config(folder, **changes))

    folder = copy_of(base, tmp_path / "l1")
    (folder / ABOUT).unlink()
    (folder / "action_head--150000_checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"action_head--150000.*0 % success"):
        load_policy(str(folder), "openvla_oft")
    with pytest.raises(ValueError, match="bidirectional"):
        load_policy(changed("causal", text_config={"is_causal": True}), "openvla_oft", value_head=False)
    for name, changes in {
        "pad": {"pad_token_id": 700},
        "rounding": {"pad_to_multiple_of": 0},
        "vocabulary": {"text_config": {"vocab_size": 768}},
    }.items():
        with pytest.raises(ValueError, match="action ids do not fit"):
            load_policy(changed(name, **changes))
    config = json.loads((base / "config.json").read_text())
    with pytest.raises(ValueError, match=r"vision towers.*clip"):
        OpenVLA({**{k: v for k, v in config.items() if k != "vision_dims"}, "timm_model_ids": ["clip"]})
    with pytest.raises(ValueError, match="n_action_bins"):
        load_policy(changed("bins", n_action_bins=128))
    with pytest.raises(ValueError, match=r"'libero'.*bridge_orig"):
        load_policy(str(base), unnorm_key="libero")
    with pytest.raises(ValueError, match=r"intermediate_size 256.*hold 384"):
        load_policy(changed("width", text_config={"intermediate_size": 256}))
    for flags in ({"model_type": "pi0"}, {"image_resize": "cv2"}, {"lora_scope": "vision"}):
        with pytest.raises(ValueError, match="unknown"):
            load_policy(str(tmp_path / "bins"), **flags)


def test_chunk_size_is_the_models(tmp_path):
    assert load_policy("openvla-oft-tiny", "openvla_oft").chunk_size == 8
    policy = load_policy("openvla-oft-tiny", "openvla_oft", chunk_size=4, oft_stop_token=True)
    save_policy(policy, policy.state_dict(), tmp_path / "four")
    loaded = load_policy(str(tmp_path / "four"), "openvla_oft")
    assert loaded.chunk_size == 4 and loaded.model.stop_token
    with pytest.raises(ValueError, match="says 4"):
        load_policy(str(tmp_path / "four"), "openvla_oft", chunk_size=8)
    with pytest.raises(ValueError, match=r"--model_type openvla, but .* says openvla_oft"):
        load_policy(str(tmp_path / "four"), "openvla")
    with pytest.raises(ValueError, match="one action per decision"):
        load_policy("openvla-tiny", chunk_size=8)
    with pytest.raises(ValueError, match="--chunk_size 1"):
        load_policy("openvla-oft-tiny", "openvla_oft", chunk_size=1)


# ------------------------------------------------------------------ benchmark
def benchmark(*flags: str) -> dict:
    run = python("benchmarks/model_speed.py", *flags, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_openvla_7b_key_by_key():
    result = benchmark("--preset", "openvla-7b", "--meta")
    assert (result["tensors"], result["parameters"]) == (982, 7_541_237_184)


@pytest.mark.full
def test_act_is_faster_than_a_plain_loop():
    result = benchmark("--preset", "fixture", "--repeats", "3", "--update", "--lora_scope", "llm")
    assert result["speedup"] >= 1.5 and result["update_samples_per_s"] > 0


# ---------------------------------------------------------------------- layers with fewer passes over memory
@pytest.mark.parametrize("alpha", [4, 6])  # scaled by 1, and by 1.5
def test_fused_layers_compute_what_the_libraries_compute(alpha):
    from peft.tuners.lora import Linear
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    policy = load_policy("openvla-tiny", "openvla", lora_rank=4, lora_alpha=alpha)
    layers = {type(module).__name__: module for module in policy.model.modules()}
    generator = torch.Generator().manual_seed(0)
    for name, theirs in (("FusedRMSNorm", LlamaRMSNorm), ("LoraLinear", Linear)):
        layer = layers[name]
        for parameter in layer.parameters():
            parameter.data.normal_(generator=generator)
        x = torch.randn(3, 5, layers[name].weight.shape[-1], generator=generator)
        torch.testing.assert_close(layer(x), theirs.forward(layer, x), rtol=1e-5, atol=1e-5)
    assert "LlamaRMSNorm" not in layers
    assert Linear not in {type(module) for module in policy.model.modules() if hasattr(module, "lora_A")}


def test_blocks_have_the_names_that_zero3_gathers_whole():
    """A renamed class would not fail, only make every small layer be gathered by itself."""
    from vla.training.engine import GATHERED_WHOLE

    policy = load_policy("openvla-tiny", "openvla", lora_rank=0)
    towers = (policy.model.vision_backbone.featurizer, policy.model.vision_backbone.fused_featurizer)
    blocks = [*policy.model.language_model.model.layers, *towers[0].blocks, *towers[1].blocks]
    assert {type(block).__name__ for block in blocks} == set(GATHERED_WHOLE)
