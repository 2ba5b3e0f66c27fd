"""One of the ranks of test_sharded_policy.py: the memory that load_policy, rollout copy and engine take at their peak.

python tests/helpers/zero3_memory.py FOLDER OUT        with RANK, WORLD_SIZE, MASTER_PORT as a launcher sets them
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vla.distributed import rank, setup_distributed
from vla.models.loading import load_policy
from vla.training.engine import build_engine, read_deepspeed_config
from vla.training.stages import StageSwitcher, make_rollout_copy, rollout_stage


def resident(field: str) -> int:
    """Bytes that Linux accounts to this process: VmRSS now, VmHWM at the peak."""
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])


def build(path: str):
    """As the training scripts do."""
    config = read_deepspeed_config("ds_configs/zero3.json", "bfloat16")
    policy = load_policy(path, dtype=torch.bfloat16, lora_rank=1)
    rollout_copy = make_rollout_copy(policy, 3)
    engine = build_engine(
        policy,
        config,
        micro_batch_size=1,
        learning_rate=0.1,
        value_learning_rate=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    return engine, rollout_copy


def main(path: str, out: str) -> None:
    """Measure the model in `path` and write `out`/<rank>.json."""
    device = setup_distributed(0)
    kept = build("openvla-tiny")  # code and buffers that any model needs
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident("VmRSS")
    engine, rollout_copy = build(path)
    result = {"peak": resident("VmHWM") - before, "after": resident("VmRSS") - before}
    result["model"] = sum(p.nbytes for p in rollout_copy.model.parameters())
    result["shards"] = sum(p.ds_tensor.nbytes for p in engine.module.parameters())
    equal = []
    with rollout_stage(StageSwitcher(engine, rollout_copy)) as actor:
        for whole, sharded in zip(actor.parameters(), engine.module.parameters()):
            with deepspeed.zero.GatheredParameters([sharded]):
                equal.append(torch.equal(whole.to(sharded.dtype), sharded.to(device)))
    result["equal"] = all(equal) and len(equal) > 0
    (Path(out) / f"{rank()}.json").write_text(json.dumps(result))
    del kept


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
