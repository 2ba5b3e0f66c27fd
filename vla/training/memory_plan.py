"""Predicts the memory that a run needs on a GPU and on its node, stage by stage, before you start it.

    python doctor.py --config yaml/maniskill_ppo_openvla.yaml --num_gpus 8 --gpu_memory 80

Weights, gradients, fp32 weights and moments follow from the parameters' shapes and from ZeRO's sharding. The memory of
a forward and a backward is counted: the policy runs on the meta device, which computes only shapes, and the bytes of
all tensors that exist at the same time are added up. So the plan of a 7B model takes half a minute on a laptop. Memory
that cannot be counted is a constant ASSUMED_*, which was not measured.
"""

import json
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cache
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schemas import UserError
from schemas.hub import small_folder
from vla.models.action_tokens import ACTION_DIM, ActionTokens
from vla.models.loading import build_model, cast_parameters, freeze, with_adapter
from vla.models.lora import inject, read_adapter_config
from vla.models.policy import PolicyInputs, VLAPolicy
from vla.models.published import ADAPTER_CONFIG
from vla.models.tiny import BRIDGE_ORIG, TINY_PRESETS
from vla.models.value_head import ValueHead
from vla.training.engine import read_deepspeed_config, zero_stage
from vla.training.optimizer_state import can_be_copied
from vla.training.rollout_buffer import RolloutBuffer

GIB = 2**30
ASSUMED_CONTEXT = int(1.5 * GIB)  # per GPU: CUDA's context, NCCL's and cuBLAS's workspaces, fragmentation
ASSUMED_RENDERER = int(0.3 * GIB)  # of GPU memory, per process that renders
ASSUMED_RANK = 3 * GIB  # of host memory: interpreter, torch's and CUDA's libraries
ASSUMED_RANK_OF_LORA = 32  # of an adapter that is not on this machine: that of the published ones
ASSUMED_WORKER = int(1.2 * GIB)  # of host memory, per process that simulates

# DeepSpeed's defaults (0.19.8), in elements: ZeRO-3 keeps at most so many gathered, one Adam call steps on so many,
# and a bucket for gradients holds so many
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP_SIZE = 1_000_000_000
BUCKET_ELEMENTS = 500_000_000


class Use(StrEnum):
    """The uses of a GPU's memory. A value is the title of a row in table()."""

    TRAINED = "weights, trained"
    FROZEN = "weights, frozen"
    FP32_WEIGHTS = "fp32 weights"
    MOMENTS = "Adam's moments"
    GRADIENTS = "gradients"
    BUCKET = "gradient bucket"
    BACKWARD_GRADIENTS = "gradients until the step"  # made in every backward pass, freed after the step
    BACKWARD_BUCKET = "bucket until the step"
    ACTIVATIONS = "activations"
    STEP = "step of the optimizer"
    CONTEXT = "CUDA, NCCL (assumed)"
    RENDERERS = "renderers (assumed)"
    GATHERED = "gathered layers"
    COPY = "whole copy for the rollout"
    FORWARD = "forward pass, KV cache"


# uses that come and go while a stage runs. Those of a forward pass have ended when those of the step begin
DURING_FORWARD = (Use.FORWARD, Use.ACTIVATIONS, Use.GATHERED)
DURING_STEP = (Use.BACKWARD_GRADIENTS, Use.STEP)
DURING_BOTH = (Use.BACKWARD_BUCKET,)

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
    """The flags that decide how much memory a run needs, and ZeRO's settings."""

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
    lora_path: str | None = None
    merge_lora: bool = False


def recipe_of(flags: dict) -> Recipe:
    """The recipe of a script's flags and of its --deepspeed_config. Raises as read_deepspeed_config()."""
    settings = read_deepspeed_config(flags["deepspeed_config"], flags["dtype"], flags["offload"])
    known = {field.name for field in fields(Recipe)} & flags.keys() - {"critic"}
    return Recipe(
        **{name: flags[name] for name in known},
        critic=flags.get("critic") == "hidden",
        zero_stage=zero_stage(settings),
        cpu_adam="offload_optimizer" in settings.get("zero_optimization", {}),
    )


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU in either stage, by use, and bytes of a node's host memory, by use."""

    rollout: dict[Use, int]
    update: dict[Use, int]
    host: dict[str, int]

    def resident(self, stage: str) -> int:
        """Bytes that are there when a stage begins."""
        passing = (*DURING_FORWARD, *DURING_STEP, *DURING_BOTH)
        return sum(size for use, size in getattr(self, stage).items() if use not in passing)

    def peak(self, stage: str) -> int:
        """The largest number of bytes during a stage: in a forward and backward pass, or in the optimizer's step."""

        def total(uses: Iterable[Use]) -> int:
            return sum(getattr(self, stage).get(use, 0) for use in uses)

        return self.resident(stage) + total(DURING_BOTH) + max(total(DURING_FORWARD), total(DURING_STEP))


# ---------------------------------------------------------------------- counting on the meta device
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside it: `live` at this time, `peak` at most.

    Args:
        known: existing tensors, which are not counted.
        item: the value of every computed integer on the meta device (the longest prompt). Computed bools are False.
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
    """A stand-in for a fused attention kernel. It keeps the same tensors for the backward pass, but computes nothing.

    On the meta device torch would use whole attention matrices instead.
    """

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *unused, **settings) -> torch.Tensor:
    """A replacement of F.scaled_dot_product_attention."""
    return FusedAttention.apply(query, key, value)


def known_adapter(recipe: Recipe) -> dict | None:
    """adapter_config.json of the adapter that is trained on, as far as this machine has it. None for a fresh one."""
    if recipe.merge_lora:
        return None
    folder = small_folder(recipe.lora_path or recipe.model_path, offline=True)
    return read_adapter_config(folder) if (folder / ADAPTER_CONFIG).is_file() else None


def adapter_is_elsewhere(recipe: Recipe) -> bool:
    """Whether the adapter that is trained on was not fetched yet. Then it is taken for one of ASSUMED_RANK_OF_LORA."""
    return recipe.lora_path is not None and not recipe.merge_lora and known_adapter(recipe) is None


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
    adapter: str | None = None,
) -> VLAPolicy:
    """The policy on the meta device. If model_path is not on this machine, it has the size of the published OpenVLA.

    adapter: JSON of the adapter_config.json of a known adapter, in whose place lora_rank and lora_scope do not count.
    """
    config = TINY_PRESETS.get(model_path, OPENVLA_7B)
    folder = small_folder(model_path, offline=True)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
    with init_empty_weights(include_buffers=False):
        model = build_model(model_type, config, chunk_size, False, on_meta=True)
        if adapter is not None:
            model, has_adapter = inject(model, json.loads(adapter), ADAPTER_CONFIG), True
        else:
            model, fresh = with_adapter(model, None, lora_rank, 32, lora_scope, False, None)
            has_adapter = fresh is not None
        value_head = ValueHead(model.hidden_size, chunk_size) if critic else None
    freeze(cast_parameters(model, getattr(torch, dtype)), has_adapter, lora_scope)
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
    adapter = known_adapter(recipe)
    return meta_policy(
        recipe.model_path,
        recipe.model_type,
        recipe.chunk_size,
        ASSUMED_RANK_OF_LORA if adapter_is_elsewhere(recipe) else recipe.lora_rank,
        recipe.lora_scope,
        recipe.dtype,
        recipe.critic,
        recipe.max_prompt_length,
        None if adapter is None else json.dumps(adapter, sort_keys=True),
    )


def meta_inputs(policy: VLAPolicy, batch: int) -> tuple[PolicyInputs, torch.Tensor]:
    """Inputs and tokens [B, C, D] on the meta device, for B = batch."""
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
    """Recompute activations in the backward pass (on), or keep them (off)."""
    if on:
        policy.model.enable_gradient_checkpointing()
        return
    policy.model.language_model.activation_checkpointing_disable()
    for tower in (policy.model.vision_backbone.featurizer, policy.model.vision_backbone.fused_featurizer):
        tower.gradient_checkpointing = False


@cache
def update_bytes(policy: VLAPolicy, gradient_checkpointing: bool, batch: int) -> int:
    """The peak bytes of a micro batch's forward and backward, without weights and the gradients that ZeRO keeps.

    The gradient of a weight counts while it is made. It has one size for every batch, so nothing is multiplied here.
    """
    set_checkpointing(policy, gradient_checkpointing)
    inputs, tokens = meta_inputs(policy, batch)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in trained  # ZeRO moves gradients into its own buffers, which are counted there
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
def rollout_bytes(policy: VLAPolicy, batch: int) -> int:
    """The peak bytes of acting in a batch of envs, without weights: towers, prompt, KV cache."""
    inputs, _ = meta_inputs(policy, batch)
    inputs = inputs._replace(features=None)
    known = [*policy.parameters(), *policy.buffers(), *inputs[:3]]
    noise = torch.empty(batch, policy.chunk_size, ACTION_DIM, dtype=torch.float64, device="meta")
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention), torch.no_grad():
        with LiveBytes(known, item=policy.max_prompt_length) as count:
            policy.eval().act(policy.prepare(inputs), 1.0, noise)
    return count.peak


# ---------------------------------------------------------------------- the plan
def numel(parameters: Iterable[nn.Parameter], ranks: int = 1) -> int:
    """Number of elements, or of one rank's share. Every parameter is cut separately, and padded."""
    return sum(math.ceil(parameter.numel() / ranks) for parameter in parameters)


def make_plan(recipe: Recipe, num_gpus: int, gpus_per_node: int = 8) -> Plan:
    """The bytes of a run with `num_gpus` ranks.

    Raises:
        UserError: the number of envs is not divisible by the number of ranks.
    """
    if recipe.num_envs % num_gpus:
        raise UserError(f"--num_envs {recipe.num_envs} is not divisible by {num_gpus} GPUs: use another --num_gpus")
    policy = policy_of(recipe)
    width = torch.finfo(getattr(torch, recipe.dtype)).bits // 8
    sharded, moves_memory = recipe.zero_stage == 3, recipe.offload == "stage"
    shards = num_gpus if sharded else 1
    everything = list(policy.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    frozen = [parameter for parameter in everything if not parameter.requires_grad]
    own = numel(trained, num_gpus if recipe.zero_stage else 1)  # elements that this rank's optimizer steps on
    frozen_bytes = width * numel(frozen, shards)
    train_envs, eval_envs = recipe.num_envs // num_gpus, max(1, recipe.num_eval_envs // num_gpus)
    workers = min(recipe.num_env_workers, max(train_envs, eval_envs))  # evaluation runs in those of training

    weights = {Use.TRAINED: width * numel(trained, shards), Use.FROZEN: frozen_bytes}
    copy = {Use.COPY: width * numel(everything)} if sharded else {}
    optimizer, gradients, step = optimizer_bytes(recipe, own, width * min(BUCKET_ELEMENTS, numel(trained)))
    renderers = max(workers, 1)  # the rank itself renders the envs that have no workers
    system = {Use.CONTEXT: ASSUMED_CONTEXT, Use.RENDERERS: renderers * ASSUMED_RENDERER}
    activations = update_bytes(policy, recipe.gradient_checkpointing, recipe.micro_batch_size)
    update = weights | optimizer | gradients | {Use.ACTIVATIONS: activations} | step | system
    if sharded:
        update[Use.GATHERED] = width * min(numel(everything), MAX_LIVE_PARAMETERS)
    rollout = weights | system | copy
    if moves_memory:
        rollout[Use.FROZEN] = 0
    else:
        rollout |= optimizer | (gradients if sharded else {})
        update |= copy
    rollout[Use.FORWARD] = rollout_bytes(policy, max(train_envs, eval_envs))

    host = {"Adam on the CPU": (16 + 4) * own} if recipe.cpu_adam else {}  # fp32 weights and moments, and gradients
    if moves_memory:
        host["moved out between the stages"] = 16 * own + frozen_bytes
    if can_be_copied(numel(trained)):
        host["start of the iteration"] = 12 * own  # the copy of preemption.py
    host["rollout buffer"] = buffer_bytes(policy, recipe, num_gpus)
    host["processes (assumed)"] = ASSUMED_RANK + workers * ASSUMED_WORKER
    ranks_per_node = min(num_gpus, gpus_per_node)
    return Plan(rollout, update, {use: ranks_per_node * size for use, size in host.items()})


def optimizer_bytes(recipe: Recipe, own: int, bucket: int) -> tuple[dict[Use, int], dict[Use, int], dict[Use, int]]:
    """Bytes on a GPU of the optimizer's fp32 weights and moments, of the gradients, and of the optimizer's step.

    Only ZeRO-3 keeps gradients between the steps.

    Args:
        own: elements that this rank's optimizer steps on.
        bucket: bytes of ZeRO's bucket for gradients.
    """
    if recipe.cpu_adam:  # under ZeRO-3 only
        return {}, {Use.BUCKET: bucket}, {}
    has_zero = recipe.zero_stage > 0
    optimizer = {Use.FP32_WEIGHTS: 4 * own if has_zero else 0, Use.MOMENTS: 8 * own}
    # Adam's temporary values, and under ZeRO a flat copy of the gradients
    step = {Use.STEP: (8 if has_zero else 4) * min(own, SUB_GROUP_SIZE)}
    if recipe.zero_stage == 3:
        return optimizer, {Use.GRADIENTS: 4 * own, Use.BUCKET: bucket}, step
    gradients = {Use.BACKWARD_GRADIENTS: 4 * own}
    if has_zero:
        gradients[Use.BACKWARD_BUCKET] = bucket
    return optimizer, gradients, step


def buffer_bytes(policy: VLAPolicy, recipe: Recipe, num_gpus: int) -> int:
    """Bytes of the rollout buffer. GRPO has two, so that groups without a signal can be replaced."""
    with torch.device("meta"):
        buffer = RolloutBuffer.of(policy, recipe.num_steps // recipe.chunk_size, recipe.num_envs // num_gpus)
    return (1 if recipe.critic else 2) * sum(field.nbytes for field in buffer.fields.values())


def remedies(recipe: Recipe) -> Iterator[tuple[str, dict]]:
    """Flags that save memory of a GPU, and what they change, in a fixed order. Those that cost more time come later.

    With an adapter, ZeRO-3 comes late: it gathers weights in every micro batch, to cut what the rollout needs whole. A
    flag replaces an earlier one of the same name.
    """
    has_adapter = recipe.lora_rank > 0 or recipe.lora_path is not None
    if not has_adapter:
        yield from sharding_remedies(recipe)
    yield from micro_batch_remedies(recipe)
    workers = recipe.num_env_workers
    while (workers := workers // 2) > 0:
        yield f"--num_env_workers {workers}", {"num_env_workers": workers}
    if has_adapter:
        yield from sharding_remedies(recipe)
    if not recipe.cpu_adam:
        on_the_cpu = {"zero_stage": 3, "cpu_adam": True, "offload": "none"}
        yield "--deepspeed_config ds_configs/zero3_cpu_adam.json --offload none", on_the_cpu
    if not has_adapter:
        with_adapter = {"lora_rank": 32, "zero_stage": 3, "cpu_adam": False, "offload": "stage"}
        yield "--lora_rank 32 --deepspeed_config ds_configs/zero3.json --offload stage", with_adapter


def sharding_remedies(recipe: Recipe) -> Iterator[tuple[str, dict]]:
    """ZeRO-3, then with what the stage at hand does not need in host memory."""
    if recipe.zero_stage != 3:
        yield "--deepspeed_config ds_configs/zero3.json", {"zero_stage": 3}
    if not recipe.cpu_adam and recipe.offload != "stage":
        file = "" if recipe.zero_stage == 3 else "--deepspeed_config ds_configs/zero3.json "
        yield f"{file}--offload stage", {"zero_stage": 3, "offload": "stage"}


def micro_batch_remedies(recipe: Recipe) -> Iterator[tuple[str, dict]]:
    """Smaller micro batches down to a quarter, then recomputed activations, with micro batches as small as needed."""

    def halves(smallest: int) -> Iterator[tuple[str, dict]]:
        size = recipe.micro_batch_size
        while (size := size // 2) >= max(1, smallest):
            yield f"--micro_batch_size {size}", {"micro_batch_size": size}

    yield from halves(1 if recipe.gradient_checkpointing else recipe.micro_batch_size // 4)
    if not recipe.gradient_checkpointing:
        again = {"gradient_checkpointing": True, "micro_batch_size": recipe.micro_batch_size}
        yield f"--gradient_checkpointing --micro_batch_size {recipe.micro_batch_size}", again
        yield from halves(1)


def named_flags(text: str) -> dict[str, str]:
    """{name: flag as it is written} for flags in a row.

    >>> named_flags("--offload none --gradient_checkpointing")
    {'--offload': '--offload none', '--gradient_checkpointing': '--gradient_checkpointing'}
    """
    written = [f"--{flag.strip()}" for flag in text.split("--") if flag]
    return {flag.split()[0]: flag for flag in written}


def fitting(recipe: Recipe, num_gpus: int, gpu_memory: float) -> tuple[str, float] | None:
    """The flags that make a run fit into a GPU ("" if it fits as it is) and its peak in GiB. None: nothing does.

    A flag that saves nothing here is left out: under LoRA, ZeRO-3 alone needs more than ZeRO-2. So is one that a later
    flag has made needless.
    """
    turned: dict[str, str] = {}
    asked, need = recipe, largest(make_plan(recipe, num_gpus))
    for flags, change in remedies(recipe):
        if need <= gpu_memory:
            break
        changed = replace(recipe, **change)
        need_then = largest(make_plan(changed, num_gpus))
        if need_then < need:
            recipe, need = changed, need_then
            turned |= named_flags(flags)
    if need > gpu_memory:
        return None
    for name in ("num_env_workers", "micro_batch_size"):
        changed = replace(recipe, **{name: getattr(asked, name)})
        if f"--{name}" in turned and largest(make_plan(changed, num_gpus)) <= gpu_memory:
            recipe = changed
            del turned[f"--{name}"]
    return " ".join(turned.values()), largest(make_plan(recipe, num_gpus))


def table(plan: Plan, gpu_memory: float, host_memory: float) -> list[str]:
    """The plan in GiB, one line per use, beside the memory of a GPU and of a node."""
    lines = [f"{'GiB on one GPU':28} {'rollout':>9} {'update':>9}"]
    for name in [*plan.rollout, *(name for name in plan.update if name not in plan.rollout)]:
        sizes = [stage[name] / GIB if name in stage else None for stage in (plan.rollout, plan.update)]
        lines.append(f"  {name:26} " + " ".join(f"{'-' if size is None else f'{size:.2f}':>9}" for size in sizes))
    for name in ("resident", "peak"):
        sizes = [getattr(plan, name)(stage) / GIB for stage in ("rollout", "update")]
        lines.append(f"{name:28} " + " ".join(f"{size:9.2f}" for size in sizes) + f"  of {gpu_memory:g}")
    lines += ["", "GiB of host memory on one node", *(f"  {n:36} {s / GIB:9.2f}" for n, s in plan.host.items())]
    return [*lines, f"{'sum':38} {host_need(plan):9.2f}  of {host_memory:g}"]


def largest(plan: Plan) -> float:
    """The peak GiB of one GPU over both stages."""
    return max(plan.peak("rollout"), plan.peak("update")) / GIB


def host_need(plan: Plan) -> float:
    """GiB of host memory that the ranks of one node need."""
    return sum(plan.host.values()) / GIB


def host_remedies(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Changes of flags that save host memory, each in addition to those before it."""
    turned, changed = [], recipe
    while (workers := changed.num_env_workers // 2) or changed.num_env_workers:
        changed = replace(changed, num_env_workers=workers)
        turned.append((f"--num_env_workers {workers}", changed))
    if changed.cpu_adam:
        changed = replace(changed, cpu_adam=False)
        turned.append(("--deepspeed_config ds_configs/zero3.json", changed))
    if changed.offload == "stage":
        turned.append(("--offload none", replace(changed, offload="none")))
    return turned


def host_advice(recipe: Recipe, num_gpus: int, gpu_memory: float, host_memory: float) -> tuple[bool, str]:
    """Whether a run fits into the host memory of a node, and a sentence with flags that make it fit.

    Flags that move memory to the GPU are named only if it fits there.
    """
    need = host_need(make_plan(recipe, num_gpus))
    if need <= host_memory:
        return True, f"host memory fits: {need:.1f} of {host_memory:g} GiB on a node"
    tried: list[str] = []
    for sentence, changed in host_remedies(recipe):
        if sentence.startswith("--num_env_workers"):
            tried.clear()  # a smaller number replaces the last one
        tried.append(sentence)
        plan = make_plan(changed, num_gpus)
        if host_need(plan) <= host_memory and largest(plan) <= gpu_memory:
            turned = " and ".join(tried)
            return False, (
                f"host memory does not fit ({need:.1f} of {host_memory:g} GiB on a node): {turned} needs "
                f"{host_need(plan):.1f} GiB"
            )
    return False, (
        f"host memory does not fit ({need:.1f} of {host_memory:g} GiB on a node): use fewer --num_envs, or more nodes"
    )


def advice(recipe: Recipe, num_gpus: int, gpu_memory: float) -> tuple[bool, str]:
    """Whether a run fits into memory, and a sentence that names the flags that make it fit."""
    need = largest(make_plan(recipe, num_gpus))
    if need <= gpu_memory:
        return True, f"GPU memory fits: {need:.1f} of {gpu_memory:g} GiB at the peak"
    found = fitting(recipe, num_gpus, gpu_memory)
    remedy = "use fewer --num_envs, or more or larger GPUs" if found is None else f"{found[0]} needs {found[1]:.1f} GiB"
    return False, f"GPU memory does not fit ({need:.1f} of {gpu_memory:g} GiB): {remedy}"
