"""Cost of the models: number of parameters against the specification, actions per second, one LoRA update.

    python benchmarks/model_speed.py --preset openvla-7b --meta    every tensor of openvla-7b, without weights or memory
    python benchmarks/model_speed.py --preset fixture                 act() against a plain Hugging Face style loop
    python benchmarks/model_speed.py --preset 100m --model_type openvla_oft
    python benchmarks/model_speed.py --preset openvla-7b --device cuda --dtype bfloat16 --update

It prints one line of JSON per measurement. Weights are random, since time does not depend on them. Both loops alternate
in one process, and medians are reported, so that their ratio holds on a shared machine too. On a GPU, act() is also
measured without graphs, with its memory. The matrix peak is that of one large product in the same run.

The plain loop does what a script around a Hugging Face model does for each sample. It encodes the image, calls
`generate` with a dynamic cache, and encodes everything again for log-probabilities and value. Its first half is also
reported.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.models.action_tokens import ACTION_DIM, ActionTokens
from vla.models.loading import build_model, cast_parameters, freeze, with_adapter
from vla.models.openvla import positions
from vla.models.policy import PolicyInputs, VLAPolicy
from vla.models.tiny import BRIDGE_ORIG
from vla.models.value_head import ValueHead
from vla.training.memory_plan import OPENVLA_7B

PROMPT_LENGTH = 20  # ids of "put carrot on plate" in OpenVLA's prompt


def scaled(dino: tuple[int, int, int], siglip: tuple[int, int, int], **text: int) -> dict:
    """openvla-7b with smaller towers, (embed_dim, depth, num_heads), and a smaller language model."""
    dims = [dict(zip(("embed_dim", "depth", "num_heads"), tower)) for tower in (dino, siglip)]
    return {**OPENVLA_7B, "vision_dims": dims, "text_config": {**OPENVLA_7B["text_config"], **text}}


PRESETS = {
    # the sizes of shared/fixtures/openvla_tiny
    "fixture": scaled(
        (64, 4, 4),
        (72, 5, 4),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "100m": scaled(
        (384, 12, 6),
        (384, 12, 6),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
    ),
    "openvla-7b": OPENVLA_7B,
}


# ---------------------------------------------------------------------- parameters against the specification
def tower_shapes(prefix: str, dim: int, depth: int, mlp_dim: int, is_dino: bool) -> dict[str, tuple]:
    """Keys and shapes of one vision tower in the published files, written out from the specification."""

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str) -> dict[str, tuple]:
        return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}

    def mlp(name: str) -> dict[str, tuple]:
        return linear(f"{name}.fc1", mlp_dim, dim) | linear(f"{name}.fc2", dim, mlp_dim)

    shapes = {"pos_embed": (1, 256, dim), "patch_embed.proj.weight": (dim, 3, 14, 14), "patch_embed.proj.bias": (dim,)}
    shapes |= norm("norm")
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | mlp(f"{block}.mlp")
        shapes |= linear(f"{block}.attn.qkv", 3 * dim, dim) | linear(f"{block}.attn.proj", dim, dim)
        if is_dino:
            shapes |= {f"{block}.ls1.scale_factor": (dim,), f"{block}.ls2.scale_factor": (dim,)}
    if is_dino:
        shapes |= {"cls_token": (1, 1, dim), "reg_token": (1, 4, dim)}
    else:
        shapes |= {"attn_pool.latent": (1, 1, dim)} | linear("attn_pool.q", dim, dim) | mlp("attn_pool.mlp")
        shapes |= linear("attn_pool.kv", 2 * dim, dim) | linear("attn_pool.proj", dim, dim) | norm("attn_pool.norm")
    return {f"vision_backbone.{prefix}.{name}": shape for name, shape in shapes.items()}


def openvla_7b_shapes() -> dict[str, tuple]:
    """Every key of openvla-7b and its shape. Source: the published class built with the published config (982 tensors,
    7,541,237,184 parameters)."""
    shapes = tower_shapes("featurizer", 1024, 24, 4096, is_dino=True)
    shapes |= tower_shapes("fused_featurizer", 1152, 27, 4304, is_dino=False)
    for name, rows, columns in (("fc1", 8704, 2176), ("fc2", 4096, 8704), ("fc3", 4096, 4096)):
        shapes |= {f"projector.{name}.weight": (rows, columns), f"projector.{name}.bias": (rows,)}
    shapes |= {
        "language_model.model.embed_tokens.weight": (32064, 4096),
        "language_model.lm_head.weight": (32064, 4096),
    }
    shapes["language_model.model.norm.weight"] = (4096,)
    for index in range(32):
        layer = f"language_model.model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (4096, 11008)
        shapes |= {f"{layer}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return shapes


def check_meta(preset: str, model_type: str) -> dict:
    """Build a preset on the meta device. openvla-7b is compared key by key. Raises SystemExit where it differs."""
    model = build_model(model_type, PRESETS[preset], 8 if model_type == "openvla_oft" else 1, False, on_meta=True)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if preset == "openvla-7b":
        expected = openvla_7b_shapes()
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise SystemExit(f"{len(wrong)} tensors differ from the specification, first {wrong[0]}")
    return {"tensors": len(found), "parameters": sum(p.numel() for p in model.parameters())}


# ---------------------------------------------------------------------- speed
def fill_randomly(model: torch.nn.Module, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Draw the weights of a model on the meta device, where and how they are wanted."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            spread = 0.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.0
            value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, max(spread, 1e-6))
            is_norm = parameter.dim() == 1 and name == "weight"
            module._parameters[name] = torch.nn.Parameter(torch.ones_like(value) if is_norm else value)
    return model.to(device)


def random_policy(
    preset: str, model_type: str, device: str, dtype: torch.dtype, lora_rank: int, scope: str
) -> VLAPolicy:
    """A preset with random weights, made where and how they are wanted."""
    config, chunk_size = PRESETS[preset], 8 if model_type == "openvla_oft" else 1
    model = fill_randomly(build_model(model_type, config, chunk_size, False, on_meta=True), dtype, device)
    model, adapter_config = with_adapter(model, None, lora_rank, 32, scope, False, None)
    freeze(cast_parameters(model, dtype), adapter_config is not None, scope)
    return VLAPolicy(
        model,
        ValueHead(model.hidden_size, chunk_size),
        ActionTokens(32000, BRIDGE_ORIG["action"]),
        None,
        image_size=(224, 224),
        pad_token_id=32000,
        chunk_size=chunk_size,
        caches_features=scope == "llm",
    ).to(device)


def random_inputs(policy: VLAPolicy, batch: int, device: str) -> PolicyInputs:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, generator=generator)
    prompts = [[1, *torch.randint(3, 31000, (PROMPT_LENGTH - 1,), generator=generator).tolist()] for _ in range(batch)]
    return PolicyInputs(images, *policy.collate(prompts)).to(torch.device(device))


class ActionIdsOnly(LogitsProcessor):
    """Masks all but the 256 action ids, as RLinf's and RL4VLA's generate loops do."""

    def __init__(self, first_id: int, vocab_end: int):
        self.first_id, self.vocab_end = first_id, vocab_end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, : self.first_id] = -torch.inf
        scores[:, self.vocab_end :] = -torch.inf
        return scores


def hugging_face_loop(policy: VLAPolicy, inputs: PolicyInputs, encode_again: bool) -> torch.Tensor:
    """One sample after the other: generate greedily, then (encode_again) one pass over all of it for log-probabilities
    and value. Returns tokens [N, C, D]."""
    model, bins = policy.model, policy.action_tokens
    only_actions = LogitsProcessorList([ActionIdsOnly(bins.first_id, bins.vocab_end)])
    rows = []
    for row in range(len(inputs.images)):
        one = PolicyInputs(*(None if field is None else field[row : row + 1] for field in inputs))
        if policy.chunk_size > 1:  # nothing is generated: one pass per sample, and one more for the value
            logits, _ = model(*one)
            rows.append(logits[..., bins.first_id : bins.vocab_end].argmax(-1) + bins.first_id)
        else:
            embeddings, mask = model.prefix(*one)
            rows.append(
                model.language_model.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask.long(),
                    position_ids=positions(mask),
                    max_new_tokens=ACTION_DIM,
                    do_sample=False,
                    logits_processor=only_actions,
                    use_cache=True,
                    pad_token_id=policy.pad_token_id,
                )
            )
        if encode_again:
            policy.logprobs_and_values(one, rows[-1].view(1, policy.chunk_size, ACTION_DIM), 1.0)
    return torch.cat(rows).view(-1, policy.chunk_size, ACTION_DIM)


def seconds(calls: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each call, turn by turn, after one warm-up of each."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_act(policy: VLAPolicy, batch: int, repeats: int, device: str) -> dict:
    """Actions per second of act() and of the plain loop. Raises SystemExit where their greedy tokens differ."""
    inputs = random_inputs(policy, batch, device)
    with torch.inference_mode():
        calls = {
            "act": lambda: policy.act(inputs, 0.0),
            "plain": lambda: hugging_face_loop(policy, inputs, encode_again=True),
            "plain_generate_only": lambda: hugging_face_loop(policy, inputs, encode_again=False),
        }
        if not torch.equal(policy.act(inputs, 0.0)[0], calls["plain"]()) and inputs.images.device.type == "cpu":
            raise SystemExit("the two loops choose different greedy actions")
        if device == "cuda":
            calls["act_without_graphs"] = lambda: act_without_graphs(policy, inputs)
            pairs = zip(policy.act(inputs, 0.0), calls["act_without_graphs"]())
            if not all(torch.equal(graphed, eager) for graphed, eager in pairs):
                raise SystemExit("graphs and eager kernels do not give the same tokens, log-probabilities and values")
        medians = seconds(calls, repeats, device)
    num_actions = batch * policy.chunk_size
    result = {f"{name}_actions_per_s": round(num_actions / value, 2) for name, value in medians.items()}
    result["speedup"] = round(medians["plain"] / medians["act"], 2)
    result["speedup_over_generate_only"] = round(medians["plain_generate_only"] / medians["act"], 2)
    if device == "cuda":
        result["speedup_by_graphs"] = round(medians["act_without_graphs"] / medians["act"], 2)
    return result


def act_without_graphs(policy: VLAPolicy, inputs: PolicyInputs) -> tuple[torch.Tensor, ...]:
    """The same kernels, issued one by one."""
    policy.model.cuda_graphs = False
    try:
        return policy.act(inputs, 0.0)
    finally:
        policy.model.cuda_graphs = True


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of one large square product, here and now: best of ten."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(11):  # the first one warms up
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times[1:])


def update_flops(policy: VLAPolicy, inputs: PolicyInputs) -> float:
    """Multiplications and additions of one LoRA update, without recomputation.

    Per position two per weight forward, two more backward for gradients of activations, and two for an adapter's own:
    frozen weights get none. Attention: four per pair of positions and channel forward, twice that backward (arXiv
    2104.04473, appendix). Where features are cached (towers and projector frozen) the towers are not run and the
    projector has no backward. Without attention it is what torch's FlopCounterMode counts at the 100m preset.
    """

    def linear(module: torch.nn.Module) -> float:
        return sum((6.0 if "lora_" in name else 4.0) * p.numel() for name, p in module.named_parameters())

    def block(blocks: torch.nn.Module, width: int, num: int) -> float:
        return linear(blocks) * num + 12.0 * len(blocks) * width * num**2

    model, (num_patches, _) = policy.model, policy.feature_shape()
    num_tokens = policy.chunk_size * ACTION_DIM
    prompt = inputs.prompt_mask if inputs.prompt_mask.is_cpu else torch.ones_like(inputs.prompt_mask)
    num_positions = num_patches + int(prompt.sum(1).max()) + num_tokens - (policy.chunk_size == 1)
    per_sample = block(model.language_model.model.layers, model.hidden_size, num_positions)
    per_sample += linear(model.language_model.lm_head) * num_tokens
    per_sample += (0.5 if policy.caches_features else 1.0) * linear(model.projector) * num_patches
    if not policy.caches_features:
        for tower in (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer):
            per_sample += block(tower.blocks[:-1], tower.embed_dim, num_patches + tower.num_prefix_tokens)
    return per_sample * len(inputs.images)


def measure_update(policy: VLAPolicy, batch: int, repeats: int, device: str) -> dict:
    """Samples per second of one LoRA update: forward, backward and AdamW on one micro batch of PPO's size."""
    inputs = random_inputs(policy, batch, device)
    with torch.no_grad():
        inputs = policy.prepare(inputs)
        tokens, old_logprobs, _ = policy.act(inputs, 1.0)
    policy.train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6)

    def update() -> None:
        logprobs, _, values = policy.logprobs_and_values(inputs, tokens, 1.0)
        loss = (logprobs - old_logprobs).exp().mean() + values.pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    median = seconds({"update": update}, repeats, device)["update"]
    peak = matrix_peak(device, next(policy.model.parameters()).dtype)
    result = {"update_samples_per_s": round(batch / median, 3), "matrix_peak_tflops": round(peak / 1e12, 3)}
    result["share_of_matrix_peak"] = round(update_flops(policy, inputs) / median / peak, 3)
    return result


def peak_memory(what: str, device: str) -> dict:
    """Largest device memory since the last call. Nothing on a CPU."""
    if device != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return {f"{what}_peak_gib": round(peak, 2)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=PRESETS, default="fixture", help="Sizes of the random weights. (default: %(default)s)"
    )
    parser.add_argument(
        "--model_type",
        choices=("openvla", "openvla_oft"),
        default="openvla",
        help="Model family. (default: %(default)s)",
    )
    parser.add_argument("--meta", action="store_true", help="Count parameters without using memory, and stop.")
    parser.add_argument("--batch", type=int, default=8, help="Samples per call. (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="Repeats per measurement. (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="Device to measure. (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Number format of the weights. (default: %(default)s)",
    )
    parser.add_argument("--update", action="store_true", help="Measure a LoRA update (rank 32) too.")
    parser.add_argument(
        "--lora_scope",
        choices=("all", "llm"),
        default="all",
        help="Layers that are trained. With llm, the vision towers are frozen and run once. (default: %(default)s)",
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations in the backward pass."
    )
    return parser.parse_args()


def main() -> None:
    flags = parse()
    result = {"preset": flags.preset, "model_type": flags.model_type}
    if flags.meta:
        result |= check_meta(flags.preset, flags.model_type)
    else:
        if flags.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device here; --device cpu measures the smaller presets")
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[flags.dtype]
        rank, scope = (32, flags.lora_scope) if flags.update else (0, "all")
        policy = random_policy(flags.preset, flags.model_type, flags.device, dtype, rank, scope).eval()
        result |= {"device": flags.device, "dtype": flags.dtype, "batch": flags.batch}
        result["threads"] = torch.get_num_threads()
        result |= measure_act(policy, flags.batch, flags.repeats, flags.device) | peak_memory("act", flags.device)
        if flags.update:
            if flags.gradient_checkpointing:
                policy.model.enable_gradient_checkpointing()
            policy.free_graphs()  # as between the stages of an iteration
            result |= measure_update(policy, flags.batch, flags.repeats, flags.device)
            result |= peak_memory("update", flags.device)
        if flags.device == "cuda":
            result["card"] = torch.cuda.get_device_name()
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
