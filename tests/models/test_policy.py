"""The model against the published code's outputs, and against itself: rollout and update must agree."""

import json
import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from made_up import observation
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from schemas import UserError
from schemas.pixels import Pixels, resize
from vla.models.action_tokens import NUM_BINS, ActionTokens
from vla.models.loading import load_policy
from vla.models.policy import PolicyInputs, moved, sample_bins
from vla.models.saving import save_policy
from vla.models.tiny import BRIDGE_ORIG, TINY_PRESETS


@pytest.fixture(scope="module")
def tiny():
    return load_policy("openvla-tiny").eval()


# ------------------------------------------------------------------ images on their way to the model
class Transfers(TorchDispatchMode):
    """Notes dtype and shape of every tensor that goes to the meta device, which stands for a GPU here."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[torch.dtype, list[int]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        if function is torch.ops.aten._to_copy.default and result.is_meta and not arguments[0].is_meta:
            self.seen.append((arguments[0].dtype, list(arguments[0].shape)))
        return result


@pytest.mark.parametrize("image_resize, size", [("tensor", [96, 96]), ("pil", [224, 224])])
def test_an_image_is_transferred_once_as_bytes(image_resize, size):
    """At the camera's size where the model's device resizes it, and at the model's where Pillow did."""
    policy = load_policy("openvla-tiny", image_resize=image_resize).to("meta")
    policy.image_size = (224, 224)
    with Transfers() as transfers:
        inputs = policy.prepare(observation(3))
        assert inputs.images.is_meta and inputs.images.shape == (3, 224, 224, 3)
        assert policy.preprocess(inputs).images is inputs.images  # what is there stays
    texts = [(torch.int64, [3, 30]), (torch.bool, [3, 30])]
    assert transfers.seen == [(torch.uint8, [3, *size, 3]), *texts]


def test_a_transfer_to_a_gpu_leaves_from_page_locked_memory():
    """With a stand-in for a tensor. What is on a GPU already, and what goes to a CPU, is not pinned."""
    for is_cpu, target, pinned in ((True, "cuda", True), (False, "cuda", False), (False, "cpu", False)):
        tensor = Mock(is_cpu=is_cpu)
        result = moved(tensor, torch.device(target))
        assert tensor.pin_memory.called == pinned
        if pinned:
            tensor.pin_memory().to.assert_called_once_with(torch.device(target), non_blocking=True)
        else:
            tensor.to.assert_called_once_with(torch.device(target))
            assert result is tensor.to.return_value


def bicubic_weights(source: int, target: int) -> torch.Tensor:
    """fp32 [target, source], as torch's CUDA kernel makes them (aten/src/ATen/native/cuda/UpSample.cuh, 2.13).

    The kernel is Keys' cubic with a = -0.5, widened by the scale where an image shrinks.
    """
    scale = torch.tensor(source / target)
    wide = max(1.0, float(scale))
    rows = torch.zeros(target, source)
    for row in range(target):
        center = scale * (row + 0.5)
        first = max(int(center - 2 * wide + 0.5), 0)
        places = torch.arange(first, min(int(center + 2 * wide + 0.5), source))
        x = ((places - center + 0.5) / wide).abs()
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        part = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
        rows[row, places] = part / part.sum()
    return rows


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (480, 600)])
def test_another_order_of_sums_changes_a_pixel_by_one_at_most(size):
    """A GPU adds in another order. Both are within 1e-3 of exact arithmetic, so only values near a half may differ.

    Noise of black and white is the hardest image. Measured: 1 of 255 in 2 of 100,000 values.
    """
    image = 255 * torch.randint(0, 2, (1, 480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    columns, rows = bicubic_weights(640, size[1]), bicubic_weights(480, size[0])

    def resized(dtype: torch.dtype) -> torch.Tensor:
        wide = torch.einsum("wx,nyxc->nywc", columns.to(dtype), image.to(dtype))
        return torch.einsum("hy,nywc->nhwc", rows.to(dtype), wide)

    exact, other = resized(torch.float64), resized(torch.float32)
    ours = resize(image, size).short()
    assert (other - exact).abs().max() < 1e-3
    assert (ours - exact.clamp(0, 255)).abs().max() < 0.5 + 1e-3
    difference = (ours - other.round().clamp(0, 255).short()).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_resized_on_a_gpu_differ_by_one_at_most():
    image = torch.randint(0, 256, (16, 480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = resize(image, (224, 224)).short(), resize(moved(image, torch.device("cuda")), (224, 224)).short()
    difference = (ours - theirs.cpu()).abs()
    print(f"differ: {(difference > 0).double().mean():.2e} of all values, by {difference.max()} of 255 at most")
    assert difference.max() <= 1


# ------------------------------------------------------------------ parity with the published code
def test_openvla_matches_the_published_code(fixtures):
    folder = fixtures / "openvla_tiny"
    expected = load_file(folder / "expected.safetensors")
    policy = load_policy(str(folder)).eval()
    archive = np.load(folder / "image_480x640_uint8.npz")
    image = torch.from_numpy(archive[archive.files[0]])[None]
    resized = resize(image, (224, 224)).permute(0, 3, 1, 2)
    assert torch.equal(resized, expected["B.resized_uint8_tensor_path"])
    pixels = expected["A.resized_uint8_pil_path"].permute(0, 2, 3, 1).contiguous()
    prompt = expected["A0.generated_ids_full"][:-7].tolist()
    inputs = PolicyInputs(pixels, *policy.collate([prompt]))
    with torch.no_grad():
        features = policy.model.vision_backbone(pixels)[0]
        patches = policy.model.projector(features)
        tokens, _, values = policy.act(inputs, temperature=0.0)
        logits, _ = policy.model(*inputs, tokens=tokens.flatten(1))
    assert torch.allclose(features[:, :64], expected["A0.dino_features"], atol=1e-4)
    assert torch.allclose(features[:, 64:], expected["A0.siglip_features"], atol=1e-4)
    assert torch.allclose(patches, expected["A0.projected_patches"], atol=1e-4)
    assert tokens.flatten().tolist() == expected["A0.action_tokens"].tolist()
    assert torch.allclose(logits[0], expected["A0.logits_action_positions_fullvocab"], atol=1e-4)
    assert torch.allclose(policy.decode(tokens)[0, 0].double(), expected["A0.actions_bridge_orig"], atol=1e-6)
    assert values.shape == (1, 1) and torch.isfinite(values).all()
    bins = policy.action_tokens
    assert torch.allclose(bins.bins, expected["C.bins"]) and torch.allclose(bins.bin_centers, expected["C.bin_centers"])


def test_a_folder_without_tokenizer_loads_and_only_prompts_raise(fixtures):
    policy = load_policy(str(fixtures / "openvla_tiny"))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        policy.prompt_ids("put carrot on plate")


# ------------------------------------------------------------------ rollout against update
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_act_and_evaluate_agree(lora_rank, temperature):
    policy = load_policy("openvla-tiny", lora_rank=lora_rank).eval()
    obs = observation(5)
    with torch.no_grad():
        tokens, logprobs, values = policy.act(obs, temperature)
        again, entropy, values_again = policy.logprobs_and_values(obs, tokens, temperature)
        assert torch.allclose(policy.value(obs), values, atol=1e-5)
    assert tokens.shape == logprobs.shape == entropy.shape == (5, 1, 7) and values.shape == (5, 1)
    assert torch.allclose(logprobs, again, atol=1e-4) and torch.allclose(values, values_again, atol=1e-4)
    assert tokens.min() >= policy.action_tokens.first_id and tokens.max() < policy.action_tokens.vocab_end
    assert (entropy > 0).all() and (entropy <= np.log(NUM_BINS) + 1e-5).all()


def test_batch_and_padding_change_nothing(tiny):
    """One sample alone, in a batch with longer prompts, and padded further: the same values and log-probabilities."""
    obs = observation(3)
    with torch.no_grad():
        tokens, logprobs, values = tiny.act(obs, 1.0)
        for i in range(3):
            one = {"image": obs["image"][i : i + 1], "task_description": obs["task_description"][i : i + 1]}
            alone, _, value = tiny.logprobs_and_values(one, tokens[i : i + 1], 1.0)
            assert torch.allclose(alone[0], logprobs[i], atol=1e-4) and torch.allclose(value[0], values[i], atol=1e-4)


def test_observations_as_numpy_and_ids_of_ones_own(tiny, fixtures):
    """prompt_ids() is the one place where text becomes ids: what stands in for it may give any lengths."""
    obs = observation(3)
    as_numpy = {"image": obs["image"].numpy(), "task_description": tuple(obs["task_description"])}
    tokens, logprobs, values = tiny.act(as_numpy, 0.0)  # with autograd on: sampling needs none
    assert torch.equal(tokens, tiny.act(obs, 0.0)[0]) and not logprobs.requires_grad and not values.requires_grad
    policy = load_policy(str(fixtures / "openvla_tiny"), image_resize="pil").eval()
    prompts = {"short": [1, 512, 29901, 29871], "long": [1, *range(500, 540), 29871]}  # longer than 30 as well
    policy.prompt_ids = prompts.__getitem__
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    mixed = {"image": images, "task_description": ["long", "short", "long"]}
    with torch.no_grad():
        tokens, logprobs, values = policy.act(mixed, 1.6)
        alone = policy.logprobs_and_values({"image": images[1:2], "task_description": ["short"]}, tokens[1:2], 1.6)
    assert torch.allclose(alone[0], logprobs[1:2], atol=1e-4) and torch.allclose(alone[2], values[1:2], atol=1e-4)
    for broken, words in (
        ({**obs, "image": obs["image"].float()}, "uint8"),
        ({**obs, "image": obs["image"][0]}, "uint8"),
        ({**obs, "task_description": "put carrot on plate"}, "3 strings, one per image"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny.act(broken, 0.0)


def test_greedy_is_the_argmax_and_noise_decides_the_sample(tiny):
    obs, noise = observation(2), torch.rand(2, 1, 7, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(tiny.act(obs, 0.0)[0], tiny.act(obs, 0.0)[0])
        assert torch.equal(tiny.act(obs, 1.0, noise)[0], tiny.act(obs, 1.0, noise)[0])
        assert not torch.equal(tiny.act(obs, 1.0, noise)[0], tiny.act(obs, 1.0, 1.0 - noise)[0])


def test_sampling_follows_the_distribution():
    logprobs = torch.log(torch.tensor([0.5, 0.25, 0.25] + [0.0] * 253)).expand(40_000, -1)
    noise = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = sample_bins(logprobs, noise, greedy=False).bincount(minlength=4)[:4] / 40_000
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25, 0.0]), atol=0.01)
    edge = sample_bins(logprobs[:2], torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64), greedy=False)
    assert edge[0] == 0 and edge[1] <= 255


# ------------------------------------------------------------------ tokens and units
def test_action_tokens_by_hand():
    """Ids 31999 .. 31744 stand for -1 .. 1; the two lowest ids share the top centre; bridge statistics give robot
    units."""
    tokens = ActionTokens(32000, BRIDGE_ORIG["action"])
    assert tokens.encode(torch.tensor([-1.0, 1.0, 0.0, 5.0])).tolist() == [31999, 31744, 31872, 31744]
    decoded = tokens.decode(torch.tensor([31999, 31745, 31744]))
    assert decoded.tolist() == pytest.approx([-1 + 1 / 255, 1 - 1 / 255, 1 - 1 / 255])
    robot = tokens.unnormalize(torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.3], dtype=torch.float64))
    q01, q99 = BRIDGE_ORIG["action"]["q01"], BRIDGE_ORIG["action"]["q99"]
    middle = [(low + high) / 2 for low, high in zip(q01, q99)]
    assert robot.tolist() == pytest.approx([q01[0], q99[1], *middle[2:6], 0.3])


def test_encode_inverts_decode():
    tokens = ActionTokens(768, BRIDGE_ORIG["action"])
    ids = torch.arange(tokens.first_id + 1, tokens.vocab_end)
    assert torch.equal(tokens.encode(tokens.decode(ids)), ids)
    actions = torch.rand(50, 7, dtype=torch.float64) * 2 - 1
    assert torch.allclose(tokens.normalize(tokens.unnormalize(actions)), actions, atol=1e-9)


def test_prompt(tiny):
    ids = tiny.prompt_ids("Put Carrot On Plate")
    assert ids[0] == 1 and ids == tiny.prompt_ids("put carrot on plate")
    assert tiny.tokenizer.decode(ids[1:]) == "In: What action should the robot take to put carrot on plate?\nOut: "
    assert max(ids) < tiny.action_tokens.first_id
    with pytest.raises(ValueError, match="max_prompt_length"):
        tiny.prompt_ids("a very long story about " * 20)


# ------------------------------------------------------------------ loading and saving
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_save_load_save_is_bit_identical(tmp_path, lora_rank):
    policy = load_policy("openvla-tiny", lora_rank=lora_rank, seed=3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_policy(policy, policy.state_dict(), tmp_path / "a")
    loaded = load_policy(str(tmp_path / "a"), lora_rank=lora_rank)
    for (name, ours), theirs in zip(policy.named_parameters(), loaded.parameters()):
        assert torch.equal(ours, theirs), name
    save_policy(loaded, loaded.state_dict(), tmp_path / "b")
    files = list((tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "value_head.safetensors"} <= {
        file.name for file in files
    }
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    obs = observation(2)
    with torch.no_grad():
        assert torch.equal(policy.eval().act(obs, 0.0)[0], loaded.eval().act(obs, 0.0)[0])


def test_saved_weights_can_be_read_by_whoever_may_read_new_files(tmp_path):
    policy, old = load_policy("openvla-tiny"), os.umask(0o027)
    try:
        save_policy(policy, policy.state_dict(), tmp_path / "policy")
    finally:
        os.umask(old)
    rights = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "policy").iterdir()}
    assert rights["model.safetensors"] == rights["value_head.safetensors"] == rights["config.json"] == "0o640", rights


def test_lora_trains_the_adapter_and_the_critic_alone():
    names = [name for name, p in load_policy("openvla-tiny", lora_rank=4).named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("value_head.") for name in names)
    assert any("patch_embed.proj.lora_A" in name for name in names) and any("lm_head.lora_B" in name for name in names)
    assert not any("blocks.3." in name or "attn_pool" in name for name in names)  # never read by a forward


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_policy(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="bridge_orig"):
        load_policy("openvla-tiny", unnorm_key="libero")
    policy = load_policy("openvla-tiny")
    save_policy(policy, policy.state_dict(), tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["projector.fc9.weight"] = weights.pop("projector.fc1.weight")
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(ValueError, match=r"projector\.fc1\.weight.*projector\.fc9\.weight"):
        load_policy(str(tmp_path / "broken"))


def test_tiny_presets_are_plain_json():
    for config in TINY_PRESETS.values():
        assert json.loads(json.dumps(config)) == config


# ------------------------------------------------------------------ regularisers
@pytest.mark.parametrize("path, model_type", [("openvla-tiny", "openvla"), ("openvla-oft-tiny", "openvla_oft")])
def test_the_reference_is_the_base_model(path, model_type):
    base, policy = load_policy(path, model_type).eval(), load_policy(path, model_type, lora_rank=4).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # they start at zero
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    obs = observation(3)
    with torch.no_grad():
        noise = torch.rand(3, policy.chunk_size, 7, dtype=torch.float64, generator=generator)
        tokens, logprobs, _ = policy.act(obs, 1.0, noise)
        reference = policy.reference_logprobs(obs, tokens, 0.7)
        assert torch.allclose(reference, base.logprobs_and_values(obs, tokens, 0.7)[0], atol=1e-6)
        assert not torch.allclose(reference, policy.logprobs_and_values(obs, tokens, 0.7)[0], atol=1e-2)
        assert torch.allclose(
            policy.logprobs_and_values(obs, tokens, 1.0)[0], logprobs, atol=1e-4
        )  # the adapter is back


def test_fan_pulls_a_policy_into_a_gaussian(tiny):
    """Minimising fan_kl through the model: what falls is the distance to a Gaussian around its own mode."""
    policy = load_policy("openvla-tiny")
    inputs = policy.preprocess(observation(2))
    tokens = torch.full((2, 1, 7), policy.action_tokens.first_id + 3)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    assert policy("evaluate", inputs, tokens).fan_kl is None
    distances = []
    for _ in range(15):
        distances.append(policy("evaluate", inputs, tokens, fan_sigma=0.3).fan_kl.mean())
        optimizer.zero_grad()
        distances[-1].backward()
        optimizer.step()
    assert distances[-1] < 0.5 * distances[0]


def test_who_makes_images_small(tiny, monkeypatch):
    """Workers do what the rank's CPU would do. What they made is taken as it is."""
    made = tiny.pixels
    assert made == Pixels(tiny.image_size, "tensor")
    obs = observation(2)
    small = obs | {"image": resize(torch.as_tensor(obs["image"]), *made)}
    assert torch.equal(tiny.preprocess(small).images, tiny.preprocess(obs).images)
    monkeypatch.setattr(type(tiny), "device", torch.device("cuda"))
    assert tiny.pixels is None
    monkeypatch.setattr(tiny, "image_resize", "pil")
    assert tiny.pixels == Pixels(tiny.image_size, "pil")
