"""CUDA graphs. Without a GPU: what surrounds a graph, with a stand-in that runs the recorded function again, and that
nothing in a recorded function waits for the host. With one: graph equals eager, bit for bit."""

import copy

import pytest
import torch
from made_up import observation
from torch.utils._python_dispatch import TorchDispatchMode

from vla.models import cuda_graphs, openvla
from vla.models.loading import build_model, load_policy
from vla.models.policy import uniform_noise
from vla.models.tiny import TINY_OPENVLA

BOTH = pytest.mark.parametrize(
    "path, model_type", [("openvla-tiny", "openvla"), ("openvla-oft-tiny", "openvla_oft")], ids=["openvla", "oft"]
)


@pytest.fixture
def recorded(monkeypatch) -> list:
    """capture() and can_capture() as on a GPU; returns the list of what was captured so far."""
    captured = []

    def capture(function, inputs):
        outputs = tuple(output.clone() for output in function(*inputs))
        captured.append(function)

        def replay() -> None:
            for output, new in zip(outputs, function(*inputs)):
                output.copy_(new)

        return replay, outputs

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(openvla, "can_capture", lambda tensor: not torch.is_grad_enabled())
    return captured


def act(policy, num: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    noise = uniform_noise(num, policy.chunk_size, torch.Generator().manual_seed(seed))
    return policy.act(observation(num, seed), 0.8, noise)


def assert_equal(ours, theirs) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------ without a GPU
def test_recorded_calls_give_what_eager_ones_give(recorded):
    policy, eager = (load_policy("openvla-tiny", cuda_graphs=on).eval() for on in (True, False))
    for num, seed, captures in ((2, 0, 1), (5, 1, 2), (2, 2, 2), (5, 3, 2)):  # one recording per batch size
        assert_equal(act(policy, num, seed), act(eager, num, seed))
        assert len(recorded) == captures
    first = act(policy, 2, 0)
    act(policy, 2, 2)
    assert_equal(first, act(eager, 2, 0))  # what was returned is no buffer of the graph
    with torch.inference_mode():
        assert_equal(act(policy, 3), act(eager, 3))
    assert_equal(act(policy, 3, 1), act(eager, 3, 1))  # recorded in inference mode, used outside it
    assert not eager.model.graphs


def test_one_pass_is_not_recorded(recorded):
    """OpenVLA-OFT gained 0.7 % on an H100, for the memory of a whole pass."""
    policy = load_policy("openvla-oft-tiny", "openvla_oft").eval()
    act(policy, 2)
    assert recorded == [] and policy.model.graphs is None


def test_weights_in_place_are_seen_and_moved_ones_recorded_anew(recorded):
    policy, eager = (load_policy("openvla-tiny", lora_rank=2, cuda_graphs=on).eval() for on in (True, False))
    act(policy, 2)
    with torch.no_grad():
        for one, other in zip(policy.parameters(), eager.parameters()):
            one.mul_(1.25), other.mul_(1.25)
    assert_equal(act(policy, 2), act(eager, 2))
    assert len(recorded) == 1
    for parameter in policy.parameters():  # as after a stay in host memory
        parameter.data = parameter.data.clone()
    assert_equal(act(policy, 2), act(eager, 2))
    assert len(recorded) == 2
    policy.model.vision_backbone.set_normalization([([0.3] * 3, [0.4] * 3)] * 2)  # a buffer that was replaced
    eager.model.vision_backbone.set_normalization([([0.3] * 3, [0.4] * 3)] * 2)
    assert_equal(act(policy, 2), act(eager, 2))
    assert len(recorded) == 3
    assert copy.deepcopy(policy).model.graphs is None
    policy.free_graphs()
    assert_equal(act(policy, 2), act(eager, 2))
    assert len(recorded) == 4


def test_only_so_many_are_kept_and_shapes_are_checked(recorded):
    policy = load_policy("openvla-tiny").eval()
    for num in range(1, cuda_graphs.MAX_KEPT + 3):
        act(policy, num)
    assert len(policy.model.graphs.kept) == cuda_graphs.MAX_KEPT
    double = cuda_graphs.GraphedCall(lambda x: (2 * x,))
    assert double(torch.ones(2))[0].tolist() == [2, 2] and double(torch.zeros(2))[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        double(torch.ones(1))


def test_stale_places_of_a_kept_cache_do_no_harm(recorded):
    """A graph's cache outlives a call; what an earlier one left behind its prompt, even NaN, must not be read."""
    policy, eager = (load_policy("openvla-tiny", cuda_graphs=on).eval() for on in (True, False))
    act(policy, 2)
    (cache, _), *_ = policy.model.graphs.kept.values()
    cache.pairs.fill_(torch.nan)
    assert_equal(act(policy, 2), act(eager, 2))


class OnDevice(TorchDispatchMode):
    """Fails on what a capture forbids: reading a value back, shapes that follow from values, host data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "_unique")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::")
        assert not name.startswith(self.FORBIDDEN), f"{name} waits for the host"
        return op(*args, **(kwargs or {}))


@BOTH
def test_what_is_recorded_never_waits_for_the_host(path, model_type):
    """On the meta device there are no values to wait for."""
    chunk_size = 8 if model_type == "openvla_oft" else 1
    model = build_model(model_type, TINY_OPENVLA, chunk_size, chunk_size > 1, on_meta=True).to("meta").eval()
    images = torch.empty(2, *TINY_OPENVLA["image_sizes"], 3, dtype=torch.uint8, device="meta")
    ids, mask = torch.empty(2, 30, dtype=torch.long, device="meta"), torch.empty(2, 30, dtype=torch.bool, device="meta")
    asked = []

    def choose(logits: torch.Tensor, start: int) -> torch.Tensor:
        asked.append((start, tuple(logits.shape)))
        return logits.argmax(-1)

    with torch.no_grad(), OnDevice():
        hidden = model.generate(images, ids, mask, num_tokens=7 * chunk_size, choose=choose)
    assert hidden.shape == (2, TINY_OPENVLA["text_config"]["hidden_size"])
    assert asked == ([(0, (2, 56, 832))] if chunk_size > 1 else [(index, (2, 1, 832)) for index in range(7)])
    with pytest.raises(AssertionError, match="_local_scalar_dense"), OnDevice():
        int(torch.ones(1))


# ------------------------------------------------------------------ with a GPU
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager_on_a_gpu(dtype):
    policy, eager = (
        load_policy("openvla-tiny", lora_rank=4, dtype=dtype, device="cuda", cuda_graphs=on).eval()
        for on in (True, False)
    )
    for num, seed in ((2, 0), (5, 1), (2, 2)):
        assert_equal(act(policy, num, seed), act(eager, num, seed))
    assert policy.model.graphs.kept and not eager.model.graphs
    with torch.no_grad():
        for one, other in zip(policy.parameters(), eager.parameters()):
            one.mul_(1.25), other.mul_(1.25)
    assert_equal(act(policy, 2, 3), act(eager, 2, 3))
    policy.cpu().cuda()  # other addresses
    assert_equal(act(policy, 2, 4), act(eager, 2, 4))
    held = torch.cuda.memory_allocated()
    policy.free_graphs()
    assert torch.cuda.memory_allocated() < held


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@BOTH
def test_a_gpu_and_a_cpu_agree(path, model_type):
    """Observations on the host, the model on the device; the CPU leaves padding columns out, the GPU masks them."""
    on_gpu, on_cpu = (load_policy(path, model_type, device=device).eval() for device in ("cuda", "cpu"))
    obs = observation(4)
    with torch.no_grad():
        tokens, logprobs, values = on_gpu.act(obs, 1.0)
        again, _, values_again = on_cpu.logprobs_and_values(obs, tokens.cpu(), 1.0)
    assert torch.allclose(logprobs.cpu(), again, atol=1e-3) and torch.allclose(values.cpu(), values_again, atol=1e-3)
