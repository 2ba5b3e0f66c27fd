"""How far the rollout's log-probabilities are from those of the update, for the same weights and tokens.

    python benchmarks/gpu_logprobs.py --preset openvla-7b --model_type openvla     # on a GPU, in a minute
    python benchmarks/gpu_logprobs.py --preset fixture --device cpu

The rollout acts in small batches with a KV cache and CUDA graphs. The update reads larger micro batches in one pass, so
other kernels round differently. PPO divides the two probabilities. A standard deviation s of their logarithms' distance
looks like a KL divergence of s^2 / 2, and a distance above 0.18 is clipped at a clip ratio of 0.2.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.model_speed import PRESETS, random_inputs, random_policy
from vla.models.policy import PolicyInputs, VLAPolicy, uniform_noise

ACTING, EVALUATING = 16, 80  # envs of a GPU, and decisions of an optimizer step, in the published recipes
CLIPPED = 0.18  # log(1.2)


def distances(policy: VLAPolicy, acting: int, evaluating: int, device: str) -> torch.Tensor:
    """new - old log-probabilities of sampled tokens, float32 [evaluating, C, D] on the CPU."""
    inputs = random_inputs(policy, evaluating, device)
    noise = uniform_noise(evaluating, policy.chunk_size, torch.Generator().manual_seed(0))
    tokens, old = [], []
    with torch.no_grad():
        for begin in range(0, evaluating, acting):
            rows = slice(begin, begin + acting)
            some = PolicyInputs(*(None if field is None else field[rows] for field in inputs))
            found = policy.eval().act(policy.prepare(some), 1.0, noise[rows].to(device))
            tokens.append(found[0].clone())
            old.append(found[1].float().cpu())
        policy.free_graphs()
        new = policy.train()("evaluate", inputs, torch.cat(tokens)).logprobs
    return new.float().cpu() - torch.cat(old)


def lines_of(apart: torch.Tensor, setting: str) -> list[tuple[str, str, float, str]]:
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
    flags = parser.parse_args()
    policy = random_policy(flags.preset, flags.model_type, flags.device, torch.bfloat16, 32, "all")
    apart = distances(policy, ACTING, EVALUATING, flags.device)
    setting = f"{flags.preset}, {flags.model_type}, bfloat16, act({ACTING}) and evaluate({EVALUATING})"
    print("RESULT " + json.dumps({"lines": lines_of(apart, setting)}), flush=True)


if __name__ == "__main__":
    main()
