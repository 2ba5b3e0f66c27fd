"""Builds the DeepSpeed engine from flags and a JSON file, and makes its steps.

The JSON holds ZeRO's settings and the precision. Sizes and rates are flags. So each value has one home, and a file that
sets one of those flags is refused. `"auto"` in the file's bf16 section is filled in from --dtype.
"""

import math
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.nn import functional as F

from schemas import UserError, check, parse_json, require_file
from schemas.engines import DeepSpeedConfig
from vla import ROOT
from vla.distributed import Engine, all_reduce_max, masked_mean_var
from vla.files.trees import save_tree
from vla.training.optimizer_state import write_weights

FLAG_OF_KEY = {
    "train_batch_size": "--num_envs, --num_steps and --num_minibatches",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--num_minibatches and --micro_batch_size",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and --value_learning_rate",
    "scheduler": "--schedule",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GATHERED_WHOLE = ["LlamaDecoderLayer", "Block"]  # classes of the language model's and the towers' blocks


def read_deepspeed_config(path: str, dtype: str, offload: str = "none") -> dict:
    """The content of the JSON file, with bf16 "auto" resolved.

    Args:
        offload: --offload of the run, "none" or "stage" (stages.py).

    Raises:
        UserError: the file is missing, sets a value that is a flag, or its settings do not fit together.
    """
    # a path below the repository works from every current folder
    file = Path(path) if Path(path).exists() else ROOT / path
    if not file.exists():
        known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "ds_configs").glob("*.json")))
        raise UserError(f"--deepspeed_config {path} does not exist: use one of {known}")
    remedy = "fix it, or use one of ds_configs/"
    require_file(file, remedy)
    config = parse_json(file.read_bytes(), path, remedy)
    check(DeepSpeedConfig, config, path, remedy)
    for key, flag in FLAG_OF_KEY.items():
        if key in config:
            raise UserError(f"{path} sets {key!r}, which is decided by {flag}: remove it from the file")
    zero = config.get("zero_optimization", {})
    if "memory_efficient_linear" in zero:
        raise UserError(f"{path}: memory_efficient_linear is decided by the engine: remove it from the file")
    check_offload(path, zero, offload)
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: fp16 is not supported, use --dtype bfloat16")
    if zero.get("stage", 0) == 0 and dtype == "bfloat16":  # 0.19.8: its unfused optimizer makes an empty first step
        raise UserError(f"{path} has no ZeRO, where DeepSpeed's bfloat16 makes other steps: use ds_configs/zero2.json")
    bf16, wants_bf16 = config.get("bf16", {}).get("enabled", False), dtype == "bfloat16"
    if bf16 == "auto":
        config["bf16"]["enabled"] = wants_bf16
    elif bf16 != wants_bf16:
        raise UserError(
            f'{path} has bf16 {"on" if bf16 else "off"} but --dtype is {dtype}: make them agree, or write "auto"'
        )
    return config


def check_offload(path: str, zero: dict, offload: str) -> None:
    """Raise UserError if two ways to save memory are combined, or need another ZeRO stage.

    Either Adam stays on the CPU, or --offload moves memory between the stages.
    """
    if "offload_param" in zero:
        raise UserError(f"{path}: offload_param is not supported: remove it, and use --offload stage to save memory")
    on_cpu = zero.get("offload_optimizer")
    if on_cpu is not None:
        if zero.get("stage", 0) != 3:
            raise UserError(f"{path}: offload_optimizer needs ZeRO-3: use ds_configs/zero3_cpu_adam.json")
        if offload == "stage":
            raise UserError(
                f"--offload stage cannot move an optimizer that {path} keeps on the CPU: use ds_configs/zero3.json, "
                "or --offload none"
            )
    if offload == "stage" and zero.get("stage", 0) != 3:
        raise UserError(
            f"--offload stage needs ZeRO-3, because only ZeRO-3 shards the weights, and {path} has another stage: use "
            "ds_configs/zero3.json"
        )


def zero_stage(config: dict) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def decay_at(schedule: str, progress: float) -> float:
    """The factor of the learning rate. progress: the part of the run that is done, 0 to 1.

    >>> decay_at("linear", 0.75), decay_at("cosine", 0.5)
    (0.25, 0.5)
    """
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return factors[schedule]


class TorchLinear(LinearFunctionForZeroStage3):
    """torch's own linear function forward, DeepSpeed's backward.

    ZeRO-3 frees a layer's gathered weight after its forward, and gathers it again for its backward. torch's function
    keeps a transposed view of the weight for the backward, and thereby its memory. So after a forward every rank would
    hold the whole model. DeepSpeed's function (0.19.8) keeps the parameter itself, which is emptied and filled in
    place. But it adds the bias in a separate kernel, so that the last bits would differ from those of evaluate.py.
    """

    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(input, weight, bias)


class GatheredLinear(nn.Linear):
    """A linear layer under ZeRO-3. It returns the same bits as nn.Linear, without keeping the weight."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "GatheredLinear":
        """A layer with the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return TorchLinear.apply(x, self.weight, self.bias)


def use_gathered_layers(policy: nn.Module) -> None:
    """Replace every plain linear layer by a GatheredLinear with the same parameters, under the same names."""
    for parent in list(policy.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, GatheredLinear.of(child))


def build_engine(
    policy: nn.Module,
    config: dict,
    *,
    micro_batch_size: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    value_learning_rate: float | None = None,
) -> Engine:
    """A DeepSpeed engine with AdamW over two parameter groups: the actor's, and the critic's with its own rate.

    The scripts may change the rates between iterations. DeepSpeed sums gradients over micro batches and averages them
    over ranks. The script tells backward() which micro batch is the last of a minibatch, because minibatches may have
    different numbers of micro batches.

    Args:
        config: from read_deepspeed_config().
        value_learning_rate: the critic's learning rate, or None for a policy without a critic.
    """
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    critic = [parameter for name, parameter in trained if name.startswith("value_head.")]
    actor = [parameter for name, parameter in trained if not name.startswith("value_head.")]
    groups = [{"params": actor, "lr": learning_rate}]
    if critic:
        groups.append({"params": critic, "lr": value_learning_rate})
    # torch's fused loop if Adam runs on the CPU, because DeepSpeed's CPUAdam would have to be compiled first
    on_cpu = "offload_optimizer" in config.get("zero_optimization", {})
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True if on_cpu else None
    )
    # DeepSpeed's default bucket for gradients has 5e8 elements, and an adapter would never fill it
    bucket = min(500_000_000, sum(p.numel() for group in groups for p in group["params"]))
    # memory_efficient_linear would replace torch's linear function in the whole process, rollouts included, but only
    # the engine's own layers need another one (GatheredLinear)
    zero = {"reduce_bucket_size": bucket, **config.get("zero_optimization", {}), "memory_efficient_linear": False}
    config = {
        **config,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    # ZeRO-3 then gathers and frees whole blocks instead of single layers, of which an adapter makes three each
    set_z3_leaf_modules(policy, GATHERED_WHOLE, raise_if_not_found=False)
    if zero_stage(config) == 3:
        use_gathered_layers(policy)
    # under bfloat16 DeepSpeed makes the optimizer's fp32 weights from rounded ones, so the critic's weights, which are
    # read in fp32, are written again without rounding
    unrounded = {}
    if config.get("bf16", {}).get("enabled"):
        unrounded = {name: p.detach().clone() for name, p in policy.named_parameters() if p.dtype == torch.float32}
    engine = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)[0]
    write_weights(engine, unrounded)
    return engine


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> float | None:
    """Backward of one micro batch. After the last one of a minibatch, also an optimizer step. All ranks together.

    Returns:
        the norm of all gradients before clipping if there was a step, else None. It is the same on every rank. If it is
        not finite, the step was skipped. DeepSpeed (0.19.8) neither checks nor returns it without ZeRO and in fp32.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)
    norm = None
    if last and engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])))
        if not math.isfinite(norm):
            engine.zero_grad()
    engine.step()
    if not last:
        return None
    return float(engine.get_global_grad_norm()) if norm is None else norm


class NonFiniteGuard:
    """Counts skipped optimizer steps. After `limit` in a row the run ends, and the micro batch is kept in a file."""

    def __init__(self, run_dir: Path, rank: int, limit: int = 3):
        self.path, self.limit = run_dir / f"not_finite_rank{rank}.safetensors", limit
        self.norms: list[float] = []  # of the steps since pop_metrics()
        self.skipped = 0  # since pop_metrics()
        self.in_a_row = 0
        self.first_errors: torch.Tensor | None = None  # ratio - 1 of tokens, since pop_metrics()

    def check_ratio(self, new_logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> None:
        """Remember the ratios of an iteration's first micro batch. Before any update every ratio should be 1."""
        if self.first_errors is None:
            self.first_errors = (new_logprobs.detach() - old_logprobs).expm1().cpu()

    def check_gradients(self, norm: float | None, micro_batch: NamedTuple, loss: torch.Tensor) -> None:
        """Check what backward() returned. RuntimeError, on all ranks together: `limit` steps in a row were skipped."""
        if norm is None:
            return
        if math.isfinite(norm):
            self.norms.append(norm)
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == self.limit:
            save_tree({"loss": loss, "micro_batch": micro_batch}, self.path)
            raise RuntimeError(
                f"{self.limit} optimizer steps in a row had gradients that are not finite: look at the micro batch in "
                f"{self.path}, lower --learning_rate, or resume from the last checkpoint"
            )

    def pop_metrics(self) -> dict[str, float]:
        """The metrics of the iteration over all ranks. Counting then starts again. All ranks together."""
        errors = torch.zeros(1) if self.first_errors is None else self.first_errors
        mean, variance = masked_mean_var(errors, errors.isfinite())
        metrics = {
            "train/actor/grad_norm": sum(self.norms) / len(self.norms) if self.norms else 0.0,
            "train/actor/ratio_first_microbatch_error": float(all_reduce_max(errors.abs().max())),
            "train/actor/ratio_first_microbatch_mean": 1.0 + mean,
            "train/actor/ratio_first_microbatch_std": variance**0.5,
            "train/skipped_steps": float(self.skipped),
        }
        self.norms, self.skipped, self.first_errors = [], 0, None
        return metrics
