"""OpenVLA-OFT on two sharded ranks: a base folder, an adapter to continue, and the memory that a rank takes."""

import json
from pathlib import Path

import pytest
import torch
from launching import run_ranks, train

from vla.models.loading import load_policy
from vla.models.openvla import OpenVLA
from vla.models.saving import save_policy, save_weights
from vla.models.tiny import TINY_OPENVLA, tiny_side_files

pytestmark = pytest.mark.slow


def saved(policy, folder: Path) -> str:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_policy(policy, policy.state_dict(), folder)
    return str(folder)


@pytest.mark.full
def test_oft_continues_an_adapter_on_two_sharded_ranks(tmp_path):
    """Frozen towers, gradient checkpointing, ZeRO-3: the checkpoint holds the adapter and the critic alone."""
    torch.manual_seed(0)
    base = saved(load_policy("openvla-oft-tiny", "openvla_oft", chunk_size=4), tmp_path / "base")
    adapter = saved(load_policy(base, "openvla_oft", lora_rank=4), tmp_path / "adapter")
    run_dir = tmp_path / "run"
    place = ["--run_dir", str(run_dir), "--model_path", base, "--lora_path", adapter]
    model = "--model_type openvla_oft --lora_scope llm --gradient_checkpointing --chunk_size 4 --micro_batch_size 4"
    train(*place, *model.split(), "--num_iterations", "1", "--recompute_logprobs", ranks=2)
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["train/actor/ratio_first_microbatch_error"] == 0 and line["train/actor/grad_norm"] > 0
    policy = run_dir / "checkpoints" / "iteration_000001" / "policy"
    assert not (policy / "model.safetensors").exists() and (policy / "value_head.safetensors").exists()
    start = dict(load_policy(base, "openvla_oft", lora_path=adapter).named_parameters())
    trained = dict(load_policy(str(policy), "openvla_oft").named_parameters())
    assert start.keys() == trained.keys()
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert any("lm_head.lora_B" in name for name in moved) and "value_head.mlp.4.weight" in moved
    for name in moved:
        assert name.startswith("value_head.") or (name.startswith("model.language_model.") and "lora_" in name), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of memory")
def test_a_sharded_rank_holds_one_whole_model_and_its_shard(tmp_path):
    """From load_policy to the engine, two ranks, 110 M parameters in bf16: 220 MB whole, 111 MB of shards, files of at
    most 30 MB. Measured peak 371 MB above what a tiny model takes; with a second whole model it was 493 MB."""
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 4}
    config = {**TINY_OPENVLA, "text_config": {**TINY_OPENVLA["text_config"], **sizes}}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    (base / "preprocessor_config.json").write_bytes(tiny_side_files()["preprocessor_config.json"])
    save_weights(OpenVLA(config).bfloat16().state_dict(), base, max_shard_bytes=30_000_000)
    files = [file.stat().st_size for file in base.glob("*.safetensors")]
    run = run_ranks(2, "tests/helpers/zero3_memory.py", base, tmp_path)
    assert run.returncode == 0, run.stderr
    for rank in range(2):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        print(measured, "largest file", max(files))
        assert measured["equal"] and measured["model"] > 200e6 and len(files) > 5
        assert measured["shards"] < 0.52 * measured["model"]
        # 20 MB: the objects of modules and hooks
        assert measured["peak"] <= measured["model"] + measured["shards"] + max(files) + 20e6
