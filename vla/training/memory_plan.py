"""What a run needs of a GPU's memory and of its node's, stage by stage, before it is started.

    python doctor.py --config yaml/maniskill_ppo_openvla.yaml --num_gpus 8 --gpu_memory 80

Weights, gradients, fp32 weights and moments follow from the parameters' shapes and from how ZeRO cuts them. What a
forward and a backward need besides is counted: the policy runs on the meta device, which computes shapes and no
numbers, and the bytes of all tensors that live at the same time are added up. So the plan of a 7B model takes half a
minute on a laptop. What nobody can count there is a constant called ASSUMED_*: it was not measured by us.
"""

import json
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schemas import UserError
from vla.models.action_tokens import ACTION_DIM, ActionTokens
from vla.models.loading import build_model, cast_parameters, freeze, with_adapter
from vla.models.policy import PolicyInputs, VLAPolicy
from vla.models.tiny import BRIDGE_ORIG, TINY_PRESETS
from vla.models.value_head import ValueHead
from vla.training.rollout_buffer import RolloutBuffer

GIB = 2**30
ASSUMED_CONTEXT = int(1.5 * GIB)  # per GPU: CUDA's context, NCCL's and cuBLAS's workspaces, fragmentation
ASSUMED_RENDERER = int(0.3 * GIB)  # of GPU memory, per process that renders
ASSUMED_RANK = 3 * GIB  # of host memory: interpreter, torch's and CUDA's libraries
ASSUMED_WORKER = int(1.2 * GIB)  # of host memory, per process that simulates

# DeepSpeed's defaults (0.19.8), in elements: how much ZeRO-3 keeps gathered, how much one Adam call steps on
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP_SIZE = 1_000_000_000

PASSING = {
    "forward pass, KV cache",
    "activations",
    "gathered layers",
    "step of the optimizer",
    "gradients, passing",
    "gradient bucket, passing",
}

OPENVLA_7B = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {"vocab_size": 32064, "pad_token_id": 32000},  # the rest is LlamaConfig's defaults
}


@dataclass(frozen=True)
class Recipe:
    """The flags that memory depends on, and ZeRO's settings."""

    model_path: str
    model_type: str
    chunk_size: int
    lora_rank: int
    lora_scope: str
    dtype: str
    critic: bool
    max_prompt_length: int
    gradient_checkpointing: bool
    micro_batch_size: int
    num_envs: int
    num_eval_envs: int
    num_steps: int
    num_env_workers: int
    offload: str
    zero_stage: int
    cpu_adam: bool


@dataclass(frozen=True)
class Plan:
    """Bytes by what they are for: of one GPU in either stage, and of a node's host memory.

    Resident is what is there as a stage begins; the rest comes on top while it runs.
    """

    rollout: dict[str, int]
    update: dict[str, int]
    host: dict[str, int]

    def resident(self, stage: str) -> int:
        return sum(size for name, size in getattr(self, stage).items() if name not in PASSING)

    def peak(self, stage: str) -> int:
        """Activations and gathered layers are gone when gradients are whole and the optimizer steps: the larger of the
        two counts."""
        sizes = getattr(self, stage)
        forward = sum(sizes.get(name, 0) for name in ("forward pass, KV cache", "activations", "gathered layers"))
        step = sum(sizes.get(name, 0) for name in ("gradients, passing", "step of the optimizer"))
        return self.resident(stage) + sizes.get("gradient bucket, passing", 0) + max(forward, step)


# ---------------------------------------------------------------------- counting on the meta device
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at the same time: `live` now, `peak` at most.

    Args:
        known: tensors that are there already and do not count.
        item: what a computed integer is taken for on the meta device (the longest prompt); computed truths are False.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), item: int = 0):
        super().__init__()
        self.live = self.peak = 0
        self.item = item
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta:
            return False if arguments[0].dtype == torch.bool else self.item
        result = function(*arguments, **(settings or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass, without its numbers; on the meta device torch would
    fall back to whole attention matrices."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *unused, **settings) -> torch.Tensor:
    """In the place of F.scaled_dot_product_attention."""
    return FusedAttention.apply(query, key, value)


@cache
def meta_policy(
    model_path: str,
    model_type: str,
    chunk_size: int,
    lora_rank: int,
    lora_scope: str,
    dtype: str,
    critic: bool,
    max_prompt_length: int,
) -> VLAPolicy:
    """The policy without memory. A model_path that is not here is taken for an OpenVLA of the published size."""
    config = TINY_PRESETS.get(model_path, OPENVLA_7B)
    if (Path(model_path) / "config.json").is_file():
        config = json.loads((Path(model_path) / "config.json").read_text())
    with init_empty_weights(include_buffers=False):
        model = build_model(model_type, config, chunk_size, False, on_meta=True)
        model, adapter_config = with_adapter(model, None, lora_rank, 32, lora_scope, False, None)
        value_head = ValueHead(model.hidden_size, chunk_size) if critic else None
    freeze(cast_parameters(model, getattr(torch, dtype)), adapter_config is not None, lora_scope)
    vocab_end = config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]
    return VLAPolicy(
        model,
        cast_parameters(value_head, getattr(torch, dtype)) if critic else None,
        ActionTokens(vocab_end, BRIDGE_ORIG["action"]),
        None,
        image_size=(config["image_sizes"][0],) * 2,
        pad_token_id=vocab_end,
        max_prompt_length=max_prompt_length,
        chunk_size=chunk_size,
        caches_features=not any(parameter.requires_grad for parameter in model.vision_backbone.parameters()),
    ).to("meta")


def policy_of(recipe: Recipe) -> VLAPolicy:
    return meta_policy(
        recipe.model_path,
        recipe.model_type,
        recipe.chunk_size,
        recipe.lora_rank,
        recipe.lora_scope,
        recipe.dtype,
        recipe.critic,
        recipe.max_prompt_length,
    )


def meta_inputs(policy: VLAPolicy, batch: int) -> tuple[PolicyInputs, torch.Tensor]:
    """Inputs and tokens [B, C, D]."""
    length = policy.max_prompt_length
    with torch.device("meta"):
        features = None
        if policy.caches_features:
            features = torch.empty(batch, *policy.feature_shape(), dtype=next(policy.model.parameters()).dtype)
        inputs = PolicyInputs(
            torch.empty(batch, *policy.image_size, 3, dtype=torch.uint8),
            torch.empty(batch, length, dtype=torch.int64),
            torch.empty(batch, length, dtype=torch.bool),
            features,
        )
        return inputs, torch.empty(batch, policy.chunk_size, ACTION_DIM, dtype=torch.int64)


def set_checkpointing(policy: VLAPolicy, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    if on:
        policy.model.enable_gradient_checkpointing()
        return
    policy.model.language_model.activation_checkpointing_disable()
    for tower in (policy.model.vision_backbone.featurizer, policy.model.vision_backbone.fused_featurizer):
        tower.gradient_checkpointing = False


@cache
def update_bytes(policy: VLAPolicy, gradient_checkpointing: bool) -> int:
    """The most that one decision's forward and backward keep alive besides weights and their gradients."""
    set_checkpointing(policy, gradient_checkpointing)
    inputs, tokens = meta_inputs(policy, 1)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in trained  # ZeRO takes gradients as they come: they are counted as its own
    ]
    known = [*policy.parameters(), *policy.buffers(), *tree_leaves(inputs), tokens]
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention):
        with LiveBytes([tensor for tensor in known if tensor is not None], item=policy.max_prompt_length) as count:
            new = policy.train()("evaluate", inputs, tokens)
            (new.logprobs.exp().sum() + new.entropy.sum() + new.values.square().sum()).backward()
    for hook in hooks:
        hook.remove()
    return count.peak


@cache
def rollout_bytes(policy: VLAPolicy) -> int:
    """The most that acting in one env keeps alive besides weights: towers, prompt, KV cache."""
    inputs, _ = meta_inputs(policy, 1)
    inputs = inputs._replace(features=None)
    known = [*policy.parameters(), *policy.buffers(), *inputs[:3]]
    noise = torch.empty(1, policy.chunk_size, ACTION_DIM, dtype=torch.float64, device="meta")
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention), torch.no_grad():
        with LiveBytes(known, item=policy.max_prompt_length) as count:
            policy.eval().act(policy.with_features(inputs), 1.0, noise)
    return count.peak


# ---------------------------------------------------------------------- the plan
def numel(parameters: Iterable[nn.Parameter], ranks: int = 1) -> int:
    """Elements, or of the share of one of so many ranks: every parameter is cut by itself and padded."""
    return sum(math.ceil(parameter.numel() / ranks) for parameter in parameters)


def make_plan(recipe: Recipe, num_gpus: int, gpus_per_node: int = 8) -> Plan:
    """Bytes of a run with `num_gpus` ranks.

    Raises:
        UserError: the envs do not divide by the ranks.
    """
    if recipe.num_envs % num_gpus:
        raise UserError(f"--num_envs {recipe.num_envs} is not divisible by {num_gpus} GPUs: use another --num_gpus")
    policy = policy_of(recipe)
    width = torch.finfo(getattr(torch, recipe.dtype)).bits // 8
    everything = list(policy.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    frozen = [parameter for parameter in everything if not parameter.requires_grad]
    cut = num_gpus if recipe.zero_stage else 1  # of fp32 weights, moments and gradients
    own = numel(trained, cut)
    sharded = recipe.zero_stage == 3
    shards = num_gpus if sharded else 1
    moments = {"fp32 weights": 4 * own if recipe.zero_stage else 0, "Adam's moments": 8 * own}
    gradients, passing_gradients = {"gradients": 4 * own}, {}
    if recipe.zero_stage:
        gradients["gradient bucket"] = width * min(500_000_000, numel(trained))
    if not sharded:  # made anew in every backward pass
        gradients, passing_gradients = {}, {f"{name}, passing": size for name, size in gradients.items()}
    # Adam's own, and under ZeRO a flat copy of the gradients
    step = {"step of the optimizer": (8 if recipe.zero_stage else 4) * min(own, SUB_GROUP_SIZE)}
    shown = {"weights, trained": width * numel(trained, shards), "weights, frozen": width * numel(frozen, shards)}
    copy = {"whole copy for the rollout": width * numel(everything)} if sharded else {}
    host: dict[str, int] = {}
    if recipe.cpu_adam:
        host["Adam on the CPU"] = 16 * own + 4 * own  # masters, moments, gradients
        moments, step = {}, {}
        del gradients["gradients"]
    evaluating = max(1, recipe.num_eval_envs // num_gpus)
    workers = [min(recipe.num_env_workers, envs) for envs in (recipe.num_envs // num_gpus, evaluating)]
    system = {
        "CUDA, NCCL (assumed)": ASSUMED_CONTEXT,
        "renderers (assumed)": sum(max(1, number) for number in workers) * ASSUMED_RENDERER,
    }
    activations = recipe.micro_batch_size * update_bytes(policy, recipe.gradient_checkpointing)
    update = shown | moments | gradients | passing_gradients | {"activations": activations} | step | system
    if sharded:
        update["gathered layers"] = width * min(numel(everything), MAX_LIVE_PARAMETERS)
    rollout = shown | system
    if recipe.offload == "stage":
        rollout |= copy | {"weights, frozen": 0}
        host |= {"moved out between the stages": 16 * own + width * numel(frozen, shards)}
    else:
        rollout |= copy | moments | gradients
        update |= copy
    envs = max(recipe.num_envs // num_gpus, math.ceil(recipe.num_eval_envs / num_gpus))
    rollout["forward pass, KV cache"] = envs * rollout_bytes(policy)
    host |= {
        "start of the iteration": 12 * own,  # preemption.py's copy
        "rollout buffer": buffer_bytes(policy, recipe, num_gpus),
        "processes (assumed)": ASSUMED_RANK + sum(workers) * ASSUMED_WORKER,
    }
    ranks_here = min(num_gpus, gpus_per_node)
    return Plan(rollout, update, {name: ranks_here * size for name, size in host.items()})


def buffer_bytes(policy: VLAPolicy, recipe: Recipe, num_gpus: int) -> int:
    """GRPO has two, so that dead groups can be drawn again."""
    with torch.device("meta"):
        buffer = RolloutBuffer.of(policy, recipe.num_steps // recipe.chunk_size, recipe.num_envs // num_gpus)
    return (1 if recipe.critic else 2) * sum(field.nbytes for field in buffer.fields.values())


def remedies(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Knobs in the order in which they should be turned, each on top of those before it; what costs time comes late."""
    turned: list[tuple[str, Recipe]] = []

    def turn(sentence: str, **changes) -> None:
        turned.append((sentence, replace(turned[-1][1] if turned else recipe, **changes)))

    def halve_micro_batches() -> None:
        while (size := (turned[-1][1] if turned else recipe).micro_batch_size // 2) > 0:
            turn(f"--micro_batch_size {size}", micro_batch_size=size)

    if recipe.zero_stage != 3:
        turn("--deepspeed_config ds_configs/zero3.json", zero_stage=3)
    if recipe.offload == "none" and not recipe.cpu_adam:
        turn("--offload stage", offload="stage")
    halve_micro_batches()
    if not recipe.gradient_checkpointing:
        turn(
            f"--gradient_checkpointing --micro_batch_size {recipe.micro_batch_size}",
            gradient_checkpointing=True,
            micro_batch_size=recipe.micro_batch_size,
        )
        halve_micro_batches()
    if not recipe.cpu_adam:
        turn("--deepspeed_config ds_configs/zero3_cpu_adam.json --offload none", cpu_adam=True, offload="none")
    if recipe.lora_rank == 0:
        turn("--lora_rank 32 and --offload stage", lora_rank=32, cpu_adam=False, offload="stage")
    return turned


def table(plan: Plan, gpu_memory: float) -> list[str]:
    """The plan in GiB, one line per purpose."""
    lines = [f"{'GiB on one GPU':28} {'rollout':>9} {'update':>9}"]
    for name in [*plan.rollout, *(name for name in plan.update if name not in plan.rollout)]:
        sizes = [stage[name] / GIB if name in stage else None for stage in (plan.rollout, plan.update)]
        lines.append(f"  {name:26} " + " ".join(f"{'-' if size is None else f'{size:.2f}':>9}" for size in sizes))
    for name in ("resident", "peak"):
        sizes = [getattr(plan, name)(stage) / GIB for stage in ("rollout", "update")]
        lines.append(f"{name:28} " + " ".join(f"{size:9.2f}" for size in sizes) + f"  of {gpu_memory:g}")
    lines += ["", "GiB of host memory on one node", *(f"  {n:36} {s / GIB:9.2f}" for n, s in plan.host.items())]
    return [*lines, f"{'sum':38} {sum(plan.host.values()) / GIB:9.2f}"]


def largest(plan: Plan) -> float:
    """GiB of one GPU at the worst moment."""
    return max(plan.peak("rollout"), plan.peak("update")) / GIB


def advice(recipe: Recipe, num_gpus: int, gpu_memory: float) -> tuple[bool, str]:
    """Does it fit, and if not, which flags make it fit: in the order in which they should be tried."""
    need = largest(make_plan(recipe, num_gpus))
    if need <= gpu_memory:
        return True, f"fits: {need:.1f} of {gpu_memory:g} GiB at the worst moment"
    tried: list[str] = []
    for sentence, changed in remedies(recipe):
        if tried and sentence.startswith("--micro_batch_size") and "--micro_batch_size" in tried[-1]:
            head, _, _ = tried.pop().partition("--micro_batch_size")  # a smaller one in the place of the last one
            sentence = head + sentence
        tried.append(sentence)
        need_then = largest(make_plan(changed, num_gpus))
        if need_then <= gpu_memory:
            turned = ", then ".join(tried)
            return False, f"does not fit ({need:.1f} of {gpu_memory:g} GiB): {turned} needs {need_then:.1f} GiB"
    return (
        False,
        f"does not fit ({need:.1f} of {gpu_memory:g} GiB): it takes fewer --num_envs, or more or larger GPUs",
    )
