"""How far the rollout's log-probabilities are from those of the update, for the same weights and tokens.

    python benchmarks/gpu_logprobs.py --preset openvla-7b --model_type openvla     # on a GPU, in a minute
    python benchmarks/gpu_logprobs.py --preset fixture --device cpu --stand_in sums

The rollout acts in small batches with a KV cache and CUDA graphs. The update reads larger micro batches in one pass, so
other kernels round differently. PPO divides the two probabilities. A standard deviation s of their logarithms' distance
looks like a KL divergence of s^2 / 2. A distance above 0.18 is clipped at a clip ratio of 0.2.

A CPU gives the same bits in both. There the update's side can be a stand-in. `--stand_in sums` adds up every product of
matrices in two halves, as a GPU's kernels may: this is the least that another kernel does. `--stand_in float32`
computes the same weights in float32, which is more than two kernels differ. `--head float32` computes the last layer in
float32 on both sides, and shows how much of the distance comes from there.
"""

import argparse
import contextlib
import copy
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.model_speed import PRESETS, random_inputs, random_policy
from vla.models.policy import PolicyInputs, VLAPolicy, uniform_noise

ACTING, EVALUATING = 16, 80  # envs of a GPU, and decisions of an optimizer step, in the published recipes
CLIPPED = 0.18  # log(1.2)


def use_float32_head(policy: VLAPolicy) -> None:
    """Compute the logits in float32, from the same weights."""
    head = policy.model.language_model.lm_head.float()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def linear_in_halves(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, linear=F.linear) -> Tensor:
    """F.linear with float32 sums of each half of the inputs, rounded once: another order of the same sum."""
    halves = zip(x.float().chunk(2, -1), weight.float().chunk(2, -1))
    total = sum(linear(*half) for half in halves)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def linear_at_once(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, linear=F.linear) -> Tensor:
    """F.linear with float32 sums, rounded once."""
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def summed_by(linear: object) -> contextlib.AbstractContextManager:
    return mock.patch.object(F, "linear", linear)


def distances(policy: VLAPolicy, acting: int, evaluating: int, device: str, stand_in: str | None = None) -> Tensor:
    """new - old log-probabilities of sampled tokens, float32 [evaluating, C, D] on the CPU."""
    updated: nn.Module = copy.deepcopy(policy).float() if stand_in == "float32" else policy
    sums = stand_in == "sums"
    inputs = random_inputs(policy, evaluating, device)
    noise = uniform_noise(evaluating, policy.chunk_size, torch.Generator().manual_seed(0))
    tokens, old = [], []
    with torch.no_grad():
        for begin in range(0, evaluating, acting):
            rows = slice(begin, begin + acting)
            some = PolicyInputs(*(None if field is None else field[rows] for field in inputs))
            with summed_by(linear_at_once) if sums else contextlib.nullcontext():
                found = policy.eval().act(policy.prepare(some), 1.0, noise[rows].to(device))
            tokens.append(found[0].clone())
            old.append(found[1].float().cpu())
        policy.free_graphs()
        with summed_by(linear_in_halves) if sums else contextlib.nullcontext():
            new = updated.train()("evaluate", inputs, torch.cat(tokens)).logprobs
    return new.float().cpu() - torch.cat(old)


def lines_of(apart: Tensor, setting: str) -> list[tuple[str, str, float, str]]:
    """Rows for the table of gpu_check.py. An action is the sum over its 7 tokens."""
    found = []
    for unit, values in (("a token", apart), ("an action", apart.sum(-1))):
        clipped = (values.abs() > CLIPPED).float().mean()
        found += [
            (f"log-probability of {unit}, deviation", setting, float(values.std()), "nats"),
            (f"log-probability of {unit}, farthest", setting, float(values.abs().max()), "nats"),
            (f"{unit.split()[1]}s beyond the clip range", setting, 100 * float(clipped), "%"),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="openvla-7b", help="Default: %(default)s.")
    parser.add_argument("--model_type", choices=("openvla", "openvla_oft"), default="openvla")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="Default: %(default)s.")
    parser.add_argument("--head", choices=("bfloat16", "float32"), default="bfloat16", help="Default: %(default)s.")
    parser.add_argument("--stand_in", choices=("sums", "float32"), help="What the update's side is, on a CPU.")
    flags = parser.parse_args()
    policy = random_policy(flags.preset, flags.model_type, flags.device, torch.bfloat16, 32, "all")
    if flags.head == "float32":
        use_float32_head(policy)
    apart = distances(policy, ACTING, EVALUATING, flags.device, flags.stand_in)
    setting = f"{flags.preset}, {flags.model_type}, bfloat16, act({ACTING}) and evaluate({EVALUATING})"
    setting += ", head in float32" if flags.head == "float32" else ""
    setting += f", stand-in {flags.stand_in}" if flags.stand_in else ""
    print("RESULT " + json.dumps({"lines": lines_of(apart, setting)}), flush=True)


if __name__ == "__main__":
    main()
