"""The four recipes with tiny models behind the published names: from an empty cache to the first iteration."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import warm
from hub_server import TOKEN, Hub, serving
from launching import metrics, python, run_ranks

import train_ppo
from schemas import UserError
from vla.evaluation.publish import check_push, push_policy
from vla.logger import describe_run
from vla.models.about import ABOUT
from vla.models.loading import load_policy
from vla.models.saving import save_policy

WARMUP = "gen-robot/openvla-7b-rlvla-warmup"
OFT, ADAPTER = "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Main", "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Lora"
# the recipes' flags but for sizes, and for the assets, which another test fetches
TINY = """--asset_pack builtin --asset_dir None --num_env_workers 0 --num_envs 4 --num_steps 16 --max_episode_steps 16
--num_minibatches 1 --micro_batch_size 8 --num_eval_episodes 2 --num_eval_envs 2 --num_iterations 1 --image_size 32 32
--sim_freq 100 --eval_freq 0 --video_episodes 0""".split()


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


@pytest.fixture(scope="module")
def warm_hub(tmp_path_factory):
    """A server, and a link that is HF_HOME. Programs with these two are forks of a warm process that knows them."""
    home = tmp_path_factory.mktemp("hub") / "home"
    with serving() as served, warm.also(served.environment(home)):
        yield served, home


@pytest.fixture
def server(published, warm_hub):
    """What is published, and nothing else."""
    served, _ = warm_hub
    served.clear()
    for name, files in published.items():
        served.add(name, files)
    return served


@pytest.fixture
def home(warm_hub, tmp_path):
    """HF_HOME, which leads to an empty folder of this test."""
    _, link = warm_hub
    (tmp_path / "home").mkdir()
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "home")
    return link


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
def test_a_recipe_needs_no_other_command(server, home, tmp_path, algorithm, model):
    more = ("--group_size", 2) if algorithm == "grpo" else ()
    run = recipe(server, home, algorithm, model, *more, "--run_dir", tmp_path / "run")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    name = OFT if model == "openvlaoft" else WARMUP
    assert f"fetch   {name} from {server.url}: 1 file" in run.stdout and len(metrics(tmp_path / "run")) == 1
    assert json.loads((tmp_path / "run/args.json").read_text())["model_path"] == name


@pytest.mark.slow
def test_two_ranks_fetch_once_over_a_broken_connection_then_none_offline(server, home, published, tmp_path):
    weights = published[OFT]["model.safetensors"]
    server.cuts[hashlib.sha256(weights).hexdigest()] = [len(weights) // 2]
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
    words += ["--num_envs", 2, "--temperature", 1, "--output", tmp_path / "evaluation", "--video_failures", 0]
    run = python(*words, env=server.environment(home, HF_HUB_OFFLINE="1"))
    assert run.returncode == 0 and not server.requests, run.stdout[-2000:] + run.stderr[-2000:]
    assert "as openvla_oft" not in run.stderr and (tmp_path / "evaluation/results.json").is_file()


@pytest.mark.slow
def test_a_failed_download_is_one_sentence_of_all_ranks(server, home, tmp_path):
    del server.repos["model", ADAPTER]
    run = recipe(server, home, "ppo", "openvlaoft", "--run_dir", tmp_path / "run", ranks=2)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert run.returncode == 2 and len(errors) == 1, run.stderr[-2000:]
    assert f"--lora_path {ADAPTER} is neither a folder here nor a model that" in errors[0]
    assert not (tmp_path / "run").exists() and not weights_of(server, OFT, ADAPTER)


@pytest.mark.full
def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(server, home, published, tmp_path):
    server.add("a/l1", published[OFT] | {"action_head--1_checkpoint.pt": b"x" * 2000})
    server.add("a/bin", {"config.json": published[OFT]["config.json"], "pytorch_model.bin": b"x" * 2000})
    for name, said in (("a/l1", "an L1 regression head"), ("a/bin", "no .safetensors but pytorch_model.bin, a pickle")):
        words = ["train_ppo.py", "--model_path", name, "--run_dir", tmp_path / "run"]
        run = python(*words, env=server.environment(home))
        assert run.returncode == 2 and said in run.stderr and name in run.stderr, run.stderr[-2000:]
    assert not weights_of(server, "a/l1")


# ---------------------------------------------------------------------- uploads
@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """A server for this process, which has the token."""
    from huggingface_hub import constants

    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield served


def finished_run(folder: Path) -> Path:
    """What is read of a run of train_ppo.py, and a policy with an adapter for a base on the Hub."""
    policy = folder / "checkpoints/iteration_000002/policy"
    (folder / "checkpoints/iteration_000004.partial/policy").mkdir(parents=True)
    policy.mkdir(parents=True)
    flags = dataclasses.asdict(train_ppo.Args(model_path=WARMUP, lora_path=None, push_to_hub="me/mine"))
    description = describe_run(flags, {}, 2) | {"command": f"train_ppo.py --run_dir {folder} --push_to_hub me/mine"}
    (folder / "run_from_iteration_000000.json").write_text(json.dumps(description))
    line = {"iteration": 2, "global_step": 640, "time/rollout": 60.0, "time/update": 30.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    adapter = {"base_model_name_or_path": WARMUP, "revision": "0" * 40}
    (policy / "adapter_config.json").write_text(json.dumps(adapter))
    (policy / "adapter_model.safetensors").write_bytes(os.urandom(5000))
    (policy / "config.json").write_text("{}")
    return folder


def test_a_policy_goes_to_the_hub_with_its_card(uploads, tmp_path, capsys):
    run_dir = finished_run(tmp_path / "my_run")
    push_policy("me/mine", run_dir)
    folder = run_dir / "checkpoints/iteration_000002/policy"
    assert uploads.files("me/mine") == content(folder) and "me/mine" in uploads.private
    assert len(uploads.commits) == 1 and "my_run (SoloVLA " in uploads.commits[0]["summary"]
    card = uploads.files("me/mine")["README.md"].decode()
    assert card.startswith("---\nbase_model: gen-robot/openvla-7b-rlvla-warmup\n") and "pipeline_tag: robotics" in card
    assert "\n# me/mine\n" in card and "2 iterations, 640 env steps of PutOnPlateInScene25Main-v3" in card
    assert "`python evaluate.py --checkpoint me/mine --settings Main-v3:train " in card and str(tmp_path) not in card
    assert "1.0 of rollouts, 0.5 of updates" in card
    assert capsys.readouterr().out.endswith(f"pushed      {folder} to {uploads.url}/me/mine\n")
    (folder / "config.json").write_text('{"again": 1}')
    push_policy("me/mine", run_dir)  # into the repository that is there now
    assert uploads.files("me/mine")["config.json"] == b'{"again": 1}' and len(uploads.commits) == 2


@pytest.mark.parametrize(
    "path, status", [("/api/repos/create", 403), ("/api/models/me/mine/commit", 500), ("/me/mine.git", 403)]
)
def test_a_failed_upload_is_one_sentence_with_the_command_that_repeats_it(uploads, tmp_path, path, status):
    run_dir, uploads.answers[path] = finished_run(tmp_path / "my_run"), status
    with pytest.raises(UserError) as caught:
        push_policy("me/mine", run_dir)
    folder = run_dir / "checkpoints/iteration_000002/policy"
    said = str(caught.value)
    assert said.startswith("--push_to_hub me/mine failed (") and "\n" not in said
    assert said.endswith(f"and the run is complete: repeat it with `hf upload me/mine {folder} .`")
    assert (folder / "adapter_model.safetensors").is_file() and not uploads.commits


def test_an_upload_that_can_not_work_is_refused_at_the_start(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push(None)
    check_push("me/mine")
    for repo in ("mine", "a/b/c", "me/", "../mine", "me/mine@main"):
        with pytest.raises(UserError, match="must be the name of a model, such as your-name/my-policy"):
            check_push(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_push("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="needs a token that may write: run `hf auth login`"):
        check_push("me/mine")


@pytest.mark.full
@pytest.mark.slow
def test_a_run_is_pushed_and_loads_by_its_name(server, home, tmp_path):
    """Two ranks train and push. evaluate.py then needs the name and nothing else of what the policy knows."""
    env = server.environment(home, HF_TOKEN=TOKEN)
    words = ["train_ppo.py", "--config", "yaml/quickstart_ppo_openvlaoft.yaml", *TINY[6:], "--push_to_hub", "me/mine"]
    run = run_ranks(2, *words, "--run_dir", tmp_path / "run", env=env)
    assert run.returncode == 0 and "pushed      " in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
    about = json.loads(server.files("me/mine")[ABOUT])
    assert (about["model_type"], about["chunk_size"], about["world"]["image_size"]) == ("openvla_oft", 4, [32, 32])
    words = ["evaluate.py", "--checkpoint", "me/mine", "--settings", "Single-v1:train", "--num_episodes", 2]
    words += ["--num_envs", 2, "--temperature", 1, "--output", tmp_path / "evaluation", "--video_failures", 0]
    run = python(*words, env=server.environment(tmp_path / "other", HF_TOKEN=TOKEN))
    assert run.returncode == 0 and "32 x 32 pixels, 100 Hz physics, 16 steps" in run.stdout, run.stderr[-2000:]
    assert "note " not in run.stdout
    saved = json.loads((tmp_path / "evaluation/results.json").read_text())
    assert saved["name"] == "me/mine" and saved["model"]["dtype"] == "float32"
