"""Convex hulls of published meshes: corners, resting poses against bodies built by hand, and what is said and saved."""

import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from launching import python

import evaluate
import train_ppo
from envs import gym_env, make_envs, variants
from envs.gpu import world as gpu_world
from envs.gpu.start_states import Settlers
from envs.rotations import yaw_quaternion
from envs.spec import EnvSpec
from schemas import UserError
from schemas.demonstrations import Recipe
from schemas.evaluations import Identity
from schemas.flags import hulls_before
from vla.cli import parse_args
from vla.models.about import Known, differences, world_of
from vla.start.resume import check_resumed

ASSETS = ROOT.parent / "shared" / "assets" / "maniskill"
needs_assets = pytest.mark.skipif(not ASSETS.exists(), reason=f"no published meshes at {ASSETS}")
MAIN = "PutOnPlateInScene25Main-v3"
GOLF_BALL = 14
BRIDGE = dict(asset_pack="bridge", asset_dir=str(ASSETS))
SMALL = dict(image_size=(16, 16))
# object -> corners of its hulls with PhysX's GPU simulation, and with its CPU simulation
CORNERS = {
    "015_golf ball_1": ([34], [93]),
    "014_hamburger_1": ([38, 38, 38], [74, 46, 51]),
    "004_plastic bottle_1": ([34], [73]),
    "003_bread_1": ([38, 37], [52, 58]),
    "001_carrot_simpler": ([22], [22]),  # simple enough for both
}
# Prints the hulls and start states of one env, and what is said to other envs of the same process.
PROGRAM = """
import json, sys
from envs import gym_env, variants
assets, ids = sys.argv[1], json.loads(sys.argv[2])
small = dict(image_size=(16, 16), render_backend="none")
env = gym_env.build("PutOnPlateInScene25Main-v3", asset_pack="bridge", asset_dir=assets, **small)
poses, corners = [], {}
for episode_id in ids:
    start = variants.decode(env.env_id, "train", episode_id)
    env.start_episode(start)
    poses.append(env.body_states()[:, :7].tolist())
    shapes = env._dynamics(env._bodies[0]).collision_shapes
    corners[env.pack.objects[start.object_index].key] = [len(shape.vertices) for shape in shapes]
said = []
for other in (dict(asset_pack="bridge", asset_dir=assets, hulls="cpu"), dict(asset_pack="builtin")):
    try:
        gym_env.build(env.env_id, **small, **other)
    except ValueError as error:
        said.append(str(error))
gym_env.build(env.env_id, asset_pack="bridge", asset_dir=assets, hulls="gpu", **small)
print(json.dumps([poses, corners, said]))
"""


def one_episode_of_each_object() -> list[variants.StartState]:
    found: dict[int, variants.StartState] = {}
    for number in range(100):
        start = variants.decode(MAIN, "train", 7919 * number)
        found.setdefault(start.object_index, start)
    return [found[index] for index in range(16)]


STARTS = one_episode_of_each_object()


def placement(start: variants.StartState) -> dict:
    """Where object and receptacle begin to fall, for tests/helpers/settle_by_hand.py."""
    bodies = {}
    for kind, database, index, position, yaw in (
        ("object", "carrot", start.object_index, start.object_position, start.object_yaw),
        ("receptacle", "plate", start.receptacle_index, start.receptacle_position, 0.0),
    ):
        models = json.loads((ASSETS / f"carrot/more_{database}/model_db.json").read_text())
        key = list(models)[index]
        places = dict(position=list(position), quaternion=yaw_quaternion(yaw))
        bodies[kind] = dict(key=key, density=models[key]["density"], **places)
    return bodies


@functools.cache
def by_hand(hulls: str) -> list[dict]:
    """Resting poses and corners of the hulls of STARTS, from a program that knows nothing of `envs`."""
    text = json.dumps([placement(start) for start in STARTS])
    command = [sys.executable, str(ROOT / "tests/helpers/settle_by_hand.py"), str(ASSETS), hulls]
    return json.loads(subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout)


def millimetres(pose, other) -> float:
    return float(1e3 * np.linalg.norm(np.subtract(pose[:3], other[:3])))


# ---------------------------------------------------------------------- physics
@needs_assets
def test_published_meshes_have_the_gpus_hulls_and_lie_where_these_lie():
    ids = [start.episode_id for start in STARTS]
    run = python("-c", PROGRAM, ASSETS, json.dumps(ids), check=True)
    poses, corners, said = json.loads(run.stdout)
    expected = by_hand("gpu")
    for (obj, receptacle), wanted, start in zip(poses, expected, STARTS):
        assert millimetres(obj, wanted["object"]) < 1 and millimetres(receptacle, wanted["receptacle"]) < 1, start
        assert abs(np.dot(obj[3:], wanted["object"][3:])) > np.cos(np.deg2rad(0.5)), start
    assert list(corners.values()) == [one["corners"] for one in expected]
    assert {key: corners[key] for key in CORNERS} == {key: of_gpu for key, (of_gpu, _) in CORNERS.items()}
    sentence = "this process already simulates with hulls='gpu', and PhysX can not change that, so make envs with"
    assert len(said) == 2 and all(text.startswith(sentence) for text in said)
    assert "is being created while PhysX GPU" not in run.stdout + run.stderr


@needs_assets
def test_the_cpus_hulls_lie_elsewhere():
    env = gym_env.build(MAIN, **SMALL, **BRIDGE, hulls="cpu")
    moved = 0
    for start, wanted, of_gpu in zip(STARTS, by_hand("cpu"), by_hand("gpu")):
        env.start_episode(start)
        shapes = env._dynamics(env._bodies[0]).collision_shapes
        corners = [len(shape.vertices) for shape in shapes]
        assert corners == wanted["corners"] and corners == CORNERS.get(env._bodies[0].name, (0, corners))[1]
        assert millimetres(env.describe()["object_pose"], wanted["object"]) < 1, start
        moved += millimetres(of_gpu["object"], wanted["object"]) > 1
    env.close()
    assert moved >= 5  # so the test above would see the wrong hulls
    with pytest.raises(
        ValueError, match=r"already simulates with hulls='cpu', .* so make envs with hulls='gpu' in ano"
    ):
        gym_env.build(MAIN, **SMALL, **BRIDGE)
    with pytest.raises(ValueError, match="unknown hulls 'fine': use one of gpu, cpu"):
        gym_env.build(MAIN, **SMALL, **BRIDGE, hulls="fine")


@needs_assets
def test_workers_and_settlers_have_the_gpus_hulls():
    """In processes of their own, so that this one may have others."""
    start, wanted = STARTS[GOLF_BALL], by_hand("gpu")[GOLF_BALL]["object"]
    settlers = Settlers(MAIN, 1, **BRIDGE, hulls="gpu")
    try:
        settlers.ask(start)
        with make_envs(MAIN, 1, image_size=(16, 16), **BRIDGE, num_env_workers=1) as envs:
            envs.reset([start.episode_id])
            assert millimetres(envs.describe()[0]["object_pose"], wanted) < 1
            saved = envs.state_dict()
        assert millimetres(settlers.get(start).bodies[0], wanted) < 1
    finally:
        settlers.close()
    assert saved[0]["world"]["hulls"] == "gpu"


def test_settlers_have_the_hulls_of_their_batch(monkeypatch):
    asked = []
    monkeypatch.setattr("envs.gpu.start_states.Settlers", lambda *words, **settings: asked.append(settings))
    monkeypatch.setattr(
        "envs.gpu.simulation.BatchedPutOnPlate", lambda *words, **settings: SimpleNamespace(device="cpu")
    )
    for backend, pack, hulls in (("physx_cuda:0", "builtin", None), ("physx_cpu", "bridge", "cpu")):
        spec = spec_of(pack, hulls)
        gpu_world.open_batch(spec, 1, 1, (backend, "cpu"))
    assert [settings["hulls"] for settings in asked] == ["gpu", "cpu"]


def spec_of(pack: str, hulls: str | None, backend: str = "physx_cpu") -> EnvSpec:
    settings = dict(obj_set="train", asset_pack=pack, asset_dir=None, image_size=(16, 16), sim_freq=500, seed=0)
    more = dict(max_episode_steps=8, auto_reset=True, ignore_terminations=False, protocol="rl4vla", first_env=0)
    return EnvSpec(MAIN, 1, **settings, **more, hulls=hulls, sim_backend=backend)


# ---------------------------------------------------------------------- what is said and saved
def test_hulls_that_cannot_be_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="unknown hulls 'fine': use gpu or cpu"):
        spec_of("bridge", "fine").check(0, 1, 1.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="'physx_cuda' simulates with the GPU's hulls: leave hulls='cpu' out"):
        spec_of("bridge", "cpu", "physx_cuda").check(0, 1, 1.0)
    spec_of("bridge", "gpu", "physx_cuda").check(0, 1, 1.0)


def test_what_was_saved_without_hulls_had_the_cpus():
    assert hulls_before({"asset_pack": "bridge"}) == {"hulls": "cpu"}
    for other in ({"asset_pack": "bridge", "hulls": "gpu"}, {"asset_pack": "builtin"}, {}):
        assert hulls_before(other) == {}
    assert hulls_before({"asset_pack": "bridge", "sim_backend": "physx_cuda"}) == {}
    world = dict(env_id=MAIN, obj_set="train", protocol="rl4vla", image_size=(16, 16), sim_freq=100)
    assert Recipe(**world, asset_pack="bridge", max_episode_steps=8).hulls == "cpu"
    assert Recipe(**world, asset_pack="builtin", max_episode_steps=8).hulls is None
    evaluation = dict(policy="idle", weights={}, model={}, seed=0)
    assert Identity(**evaluation, world={"asset_pack": "bridge"}).world["hulls"] == "cpu"


def test_an_old_run_resumes_with_the_hulls_that_it_had(tmp_path):
    flags = json.loads(json.dumps(vars(train_ppo.Args(asset_pack="bridge", hulls="cpu"))))
    del flags["hulls"]
    (tmp_path / "args.json").write_text(json.dumps(flags))
    args = parse_args(train_ppo.Args, ["--resume", str(tmp_path)], "test")
    assert args.hulls == "cpu" and check_resumed(tmp_path, vars(args)) == []
    args = parse_args(train_ppo.Args, ["--resume", str(tmp_path), "--hulls", "gpu"], "test")
    with pytest.raises(UserError, match="--hulls cpu -> gpu cannot resume, since its physics would differ"):
        check_resumed(tmp_path, vars(args))


def test_a_policy_says_which_hulls_it_was_made_with():
    common = dict(env_id=MAIN, instruction=None, image_size=(96, 96), sim_freq=500, protocol="rl4vla")
    world = world_of(**common, asset_pack="bridge", hulls="cpu", max_episode_steps=80, control="x")
    used = world | {"hulls": "gpu"}
    assert "made with cpu hulls, and is used here with gpu hulls" in differences(Known("x", world, True), used)
    builtin = world_of(**common, asset_pack="builtin", hulls="cpu", max_episode_steps=80, control="x")
    assert builtin["hulls"] is None and "hulls" in world


def test_an_evaluation_without_meshes_is_the_one_of_before():
    args = evaluate.Args(policy="idle")
    assert "hulls" not in evaluate.identity_of(args, None)["world"]
    args.asset_pack = "bridge"
    assert evaluate.identity_of(args, None)["world"]["hulls"] == "gpu"
