"""Flags + JSON -> deepspeed.initialize.

The JSON holds ZeRO settings and which precision is on; sizes and rates are flags, so each value has one home: a file
that sets them is
refused. `"auto"` in the file's bf16 section is filled in from --dtype.
"""

import json
from pathlib import Path

import deepspeed
import torch
from torch import nn

from vla.distributed import UserError

FLAG_OF_KEY = {
    "train_batch_size": "--num_envs, --num_steps and --num_minibatches",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--num_minibatches and --micro_batch_size",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and --value_learning_rate",
    "scheduler": "--learning_rate",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_deepspeed_config(path: str, dtype: str) -> dict:
    """The JSON with bf16 "auto" resolved. Raises UserError for a missing file, a key that is a flag, or a precision
    conflict."""
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json")))
        raise UserError(
            f"--deepspeed_config {path} does not exist; there are {known or 'none (run from the repository root)'}"
        )
    try:
        config = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed_config {path} is not valid JSON: {error}") from error
    for key, flag in FLAG_OF_KEY.items():
        if key in config:
            raise UserError(f"{path} sets {key!r}, which is decided by {flag}: remove it from the file")
    bf16 = config.get("bf16", {}).get("enabled", False)
    if bf16 == "auto":
        config["bf16"]["enabled"] = dtype == "bfloat16"
    elif bf16 != (dtype == "bfloat16"):
        raise UserError(
            f'{path} has bf16 {"on" if bf16 else "off"} but --dtype is {dtype}: make them agree, or write "auto"'
        )
    return config


def zero_stage(config: dict) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def build_engine(
    policy: nn.Module,
    config: dict,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    learning_rate: float,
    value_learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
) -> deepspeed.DeepSpeedEngine:
    """AdamW over two groups, the critic's parameters at their own rate; ZeRO as the config says. No schedule: rates
    are constant.

    Gradients are averaged over micro batches and ranks by DeepSpeed.
    """
    critic = [p for name, p in policy.named_parameters() if p.requires_grad and name.startswith("value_head.")]
    actor = [p for name, p in policy.named_parameters() if p.requires_grad and not name.startswith("value_head.")]
    groups = [{"params": actor, "lr": learning_rate}]
    if critic:
        groups.append({"params": critic, "lr": value_learning_rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    config = {
        **config,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=policy, optimizer=optimizer, config=config)[0]


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> list[float]:
    """engine.step(). Returns [norm of all gradients before clipping] where an optimizer step was made, else [].

    Without ZeRO and in fp32, DeepSpeed clips but does not tell the norm (0.19.8), so it is taken here, after the
    all-reduce.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    norm = None
    if boundary and engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
    engine.step()
    if not boundary:
        return []
    return [float(engine.get_global_grad_norm() if norm is None else norm)]
