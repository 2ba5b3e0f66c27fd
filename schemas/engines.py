"""Schema of a DeepSpeed config. Keys that it does not name go to DeepSpeed unchanged."""

import difflib
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from schemas import Schema


def a_stage(stage: int) -> int:
    """Check that the stage is supported. Stage 1 saves no more than 2, and runs different code with bfloat16."""
    if stage not in (0, 2, 3):
        raise ValueError("0, 2 or 3")
    return stage


Size = Annotated[float, Field(ge=1, allow_inf_nan=False)]  # 5e8 is a float in JSON


class OffloadOptimizer(Schema):
    model_config = ConfigDict(extra="forbid")

    device: Literal["cpu"]
    pin_memory: bool = False


class ZeroOptimization(Schema):
    stage: Annotated[int, AfterValidator(a_stage)] = 0
    offload_optimizer: OffloadOptimizer = OffloadOptimizer(device="cpu")  # a default for the type only
    overlap_comm: bool = False
    reduce_scatter: bool = True
    contiguous_gradients: bool = True
    reduce_bucket_size: Size = 500_000_000
    stage3_param_persistence_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    stage3_max_live_parameters: Size = 1_000_000_000
    sub_group_size: Size = 1_000_000_000


class Bf16(Schema):
    enabled: bool | Literal["auto"] = False


class Fp16(Schema):
    enabled: bool = False


class DeepSpeedConfig(Schema):
    zero_optimization: ZeroOptimization = ZeroOptimization()
    bf16: Bf16 = Bf16()
    fp16: Fp16 = Fp16()

    @model_validator(mode="after")
    def without_misspelt_keys(self) -> "DeepSpeedConfig":
        """DeepSpeed silently ignores unknown keys, so `zero_optimisation` would mean stage 0."""
        for name in self.model_extra or {}:
            if near := difflib.get_close_matches(name, type(self).model_fields, n=1, cutoff=0.8):
                raise ValueError(f"written with {near[0]!r} instead of {name!r}")
        return self
