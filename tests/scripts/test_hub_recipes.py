"""The four recipes with tiny models behind the published names: from an empty cache to the first iteration."""

import hashlib
import json
from pathlib import Path

import pytest
from hub_server import Hub, serving
from launching import metrics, python, run_ranks

from vla.models.about import ABOUT
from vla.models.loading import load_policy
from vla.models.saving import save_policy

WARMUP = "gen-robot/openvla-7b-rlvla-warmup"
OFT, ADAPTER = "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Main", "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Lora"
# the recipes' flags but for sizes, and for the assets, which another test fetches
TINY = """--asset_pack builtin --asset_dir None --num_env_workers 0 --num_envs 4 --num_steps 16 --max_episode_steps 16
--num_minibatches 1 --micro_batch_size 8 --num_eval_episodes 2 --num_eval_envs 2 --num_iterations 1 --image_size 32 32
--sim_freq 100 --eval_freq 0""".split()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Tiny models with the layout of the published ones, which do not know that they are OpenVLA-OFT."""
    place, found = tmp_path_factory.mktemp("published"), {}
    for name, preset, lora_rank in ((WARMUP, "openvla-tiny", 0), (OFT, "openvla-oft-tiny", 0), (ADAPTER, OFT, 4)):
        path = str(place / OFT.replace("/", "_")) if preset == OFT else preset
        kind = "openvla" if name == WARMUP else "openvla_oft"
        policy = load_policy(path, kind, value_head=False, lora_rank=lora_rank)
        folder = place / name.replace("/", "_")
        save_policy(policy, policy.state_dict(), folder)
        (folder / ABOUT).unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "chunk" not in k}))
        found[name] = content(folder)
    found[ADAPTER] = {name: found[ADAPTER][name] for name in ("adapter_config.json", "adapter_model.safetensors")}
    return found


@pytest.fixture
def server(published):
    with serving() as served:
        for name, files in published.items():
            served.add(name, files)
        yield served


def weights_of(server: Hub, *names: str) -> int:
    """How often weights of these models were asked for."""
    files = [data for name in names for file, data in (server.files(name) or {}).items() if file.endswith("tensors")]
    return sum(server.bodies()[f"/lfs/{hashlib.sha256(data).hexdigest()}"] for data in files)


def recipe(server: Hub, home: Path, algorithm: str, model: str, *flags: object, ranks: int = 1, **more: str):
    words = [f"train_{algorithm}.py", "--config", f"yaml/maniskill_{algorithm}_{model}.yaml", *TINY, *flags]
    env = server.environment(home, **more)
    return run_ranks(ranks, *words, env=env) if ranks > 1 else python(*words, env=env)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, model",
    [
        pytest.param("ppo", "openvla", marks=pytest.mark.full),
        ("grpo", "openvlaoft"),
        pytest.param("grpo", "openvla", marks=pytest.mark.full),
    ],
)
def test_a_recipe_needs_no_other_command(server, tmp_path, algorithm, model):
    more = ("--group_size", 2) if algorithm == "grpo" else ()
    run = recipe(server, tmp_path / "home", algorithm, model, *more, "--run_dir", tmp_path / "run")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    name = OFT if model == "openvlaoft" else WARMUP
    assert f"fetch   {name} from {server.url}: 1 file" in run.stdout and len(metrics(tmp_path / "run")) == 1
    assert json.loads((tmp_path / "run/args.json").read_text())["model_path"] == name


@pytest.mark.slow
def test_two_ranks_fetch_once_over_a_broken_connection_then_none_offline(server, published, tmp_path):
    weights = published[OFT]["model.safetensors"]
    server.cuts[hashlib.sha256(weights).hexdigest()] = [len(weights) // 2]
    home = tmp_path / "home"
    run = recipe(server, home, "ppo", "openvlaoft", "--run_dir", tmp_path / "one", ranks=2)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    bodies = server.bodies()
    assert bodies.pop(f"/lfs/{hashlib.sha256(weights).hexdigest()}") == 2  # broken, and again
    assert set(bodies.values()) == {1} and run.stdout.count("fetch   ") == 4  # begin and end of model and adapter
    # what is saved names its base on the Hub, by its commit, and not a folder of this machine
    (policy,) = (tmp_path / "one/checkpoints").glob("iteration_*/policy")
    adapter = json.loads((policy / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (OFT, server.refs["model", OFT]["main"])
    server.requests.clear()
    words = ["evaluate.py", "--checkpoint", tmp_path / "one", "--settings", "Single-v1:train", "--num_episodes", 2]
    words += ["--num_envs", 2, "--temperature", 1, "--output", tmp_path / "evaluation", "--film_failures", 0]
    run = python(*words, env=server.environment(home, HF_HUB_OFFLINE="1"))
    assert run.returncode == 0 and not server.requests, run.stdout[-2000:] + run.stderr[-2000:]
    assert "as openvla_oft" not in run.stderr and (tmp_path / "evaluation/results.json").is_file()


@pytest.mark.slow
def test_a_failed_download_is_one_sentence_of_all_ranks(server, tmp_path):
    del server.repos["model", ADAPTER]
    run = recipe(server, tmp_path / "home", "ppo", "openvlaoft", "--run_dir", tmp_path / "run", ranks=2)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert run.returncode == 2 and len(errors) == 1, run.stderr[-2000:]
    assert f"--lora_path {ADAPTER} is neither a folder here nor a model that" in errors[0]
    assert not (tmp_path / "run").exists() and not weights_of(server, OFT, ADAPTER)


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(server, published, tmp_path):
    server.add("a/l1", published[OFT] | {"action_head--1_checkpoint.pt": b"x" * 2000})
    server.add("a/bin", {"config.json": published[OFT]["config.json"], "pytorch_model.bin": b"x" * 2000})
    for name, said in (("a/l1", "an L1 regression head"), ("a/bin", "no .safetensors but pytorch_model.bin, a pickle")):
        words = ["train_ppo.py", "--model_path", name, "--run_dir", tmp_path / "run"]
        run = python(*words, env=server.environment(tmp_path / "home"))
        assert run.returncode == 2 and said in run.stderr and name in run.stderr, run.stderr[-2000:]
    assert not weights_of(server, "a/l1")
