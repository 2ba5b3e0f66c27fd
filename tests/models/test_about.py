"""Folders that know themselves: solovla.json, what config.json gives away, and flags that contradict them."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

import envs
import evaluate
import train_ppo
import train_sft
from envs import control_mode, maniskill_task
from schemas import UserError
from schemas.flags import BUILTIN_EDITION
from schemas.policies import About
from vla.cli import parse_args
from vla.models.about import ABOUT, OF_MODEL, known_flags, read_about, world_of
from vla.models.loading import load_policy
from vla.models.saving import save_policy

OFT, OPENVLA = "checkpoints/openvla-oft-tiny-warmup", "checkpoints/openvla-tiny-warmup"
SINGLE = "PutOnPlateInScene25Single-v1"
WORLD = dict(env_id=SINGLE, image_size=(96, 96), sim_freq=100, max_episode_steps=40)
MODEL = dict(model_type="openvla_oft", unnorm_key=SINGLE, chunk_size=4, dtype="float32")


def parse(*argv: str, script=train_ppo):
    return parse_args(script.Args, list(argv), "test")


def some(args, names) -> dict:
    return {name: getattr(args, name) for name in names}


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of a shipped policy, to be changed."""
    return Path(shutil.copytree(ROOT / OFT, tmp_path / "policy"))


def edit(folder: Path, name: str = ABOUT, **change) -> None:
    content = json.loads((folder / name).read_text())
    content = {key: value for key, value in (content | change).items() if value is not ...}
    (folder / name).write_text(json.dumps(content))


# ---------------------------------------------------------------------- scripts
@pytest.mark.parametrize("script", [train_ppo, train_sft])
def test_a_path_is_all_that_must_be_typed(script, capsys):
    args = parse("--model_path", OFT, script=script)
    assert some(args, MODEL) == MODEL and some(args, WORLD) == WORLD and capsys.readouterr().out == ""


def test_flags_win_and_another_world_is_one_line(capsys):
    args = parse("--model_path", OFT, "--image_size", "640", "480", "--sim_freq", "500")
    assert some(args, MODEL) == MODEL and args.image_size == (640, 480) and args.env_id == SINGLE
    assert capsys.readouterr().out == (
        "note    the policy was made with 96 x 96 pixels, 100 Hz physics, and is used here with 640 x 480 pixels, "
        "500 Hz physics: do not compare its success\n"
    )


def test_another_env_of_the_family_has_the_same_world_and_others_have_their_own(capsys):
    args = parse("--model_path", OFT, "--env_id", "PutOnPlateInScene25Main-v3")
    assert args.image_size == (96, 96) and args.sim_freq == 100
    args = parse("--model_path", OFT, "--env_id", "PickCube-v1", "--instruction", "pick up the cube")
    own = ("image_size", "sim_freq", "max_episode_steps")
    assert some(args, own) == some(train_ppo.Args(), own)
    assert some(args, MODEL) == MODEL


def test_a_file_of_flags_wins_over_the_folder(tmp_path):
    (tmp_path / "a.yaml").write_text(f"model_path: {ROOT / OFT}\nsim_freq: 500\n")
    args = parse("--config", str(tmp_path / "a.yaml"))
    assert args.sim_freq == 500 and args.image_size == (96, 96) and args.model_type == "openvla_oft"


@pytest.mark.parametrize(
    "path, flags, said",
    [
        (
            OFT,
            ("--model_type", "openvla"),
            f"--model_type openvla, but .*/{ABOUT} says openvla_oft: leave the flag out",
        ),
        (OPENVLA, ("--model_type", "openvla_oft"), f"--model_type openvla_oft, but .*/{ABOUT} says openvla: leave"),
        (OFT, ("--chunk_size", "8"), f"--chunk_size 8, but .*/{ABOUT} says 4: leave the flag out"),
    ],
)
def test_a_contradiction_is_one_sentence(path, flags, said):
    with pytest.raises(UserError, match=said):
        parse("--model_path", path, *flags)
    with pytest.raises(UserError, match=said.replace("--model_path", "")):
        load_policy(str(ROOT / path), **{flags[0][2:]: int(flags[1]) if flags[1].isdigit() else flags[1]})


def test_the_adapter_of_a_run_knows_more_than_its_base(copied):
    edit(copied, max_prompt_length=55)
    args = parse("--model_path", OFT, "--lora_path", str(copied))
    assert args.max_prompt_length == 55 and args.model_type == "openvla_oft"


def test_presets_of_random_weights_know_their_type():
    assert some(parse("--model_path", "openvla-oft-tiny"), ("model_type", "chunk_size")) == {
        "model_type": "openvla_oft",
        "chunk_size": 8,
    }
    assert parse("--model_path", "openvla-oft-tiny", "--chunk_size", "4").chunk_size == 4
    assert parse("--model_path", "openvla-tiny").model_type == "openvla"


# ---------------------------------------------------------------------- evaluate.py
def test_evaluation_needs_no_flag_that_the_folder_knows(capsys):
    args = evaluate.parse(["--checkpoint", OFT])
    known = {name: value for name, value in (MODEL | WORLD).items() if name not in ("chunk_size", "env_id")}
    assert some(args, known) == known and capsys.readouterr().out == ""
    args = evaluate.parse(["--checkpoint", OFT, "--image_size", "640", "480", "--sim_freq", "500"])
    assert "the policy was made with 96 x 96 pixels, 100 Hz physics, and is used" in capsys.readouterr().out
    with pytest.raises(UserError, match="--model_type openvla, but"):
        evaluate.parse(["--checkpoint", OFT, "--model_type", "openvla"])


# ---------------------------------------------------------------------- the file
def test_what_is_saved_is_what_load_policy_reads(tmp_path):
    world = world_of(
        env_id="PickCube-v1",
        instruction="pick up the cube",
        image_size=(64, 48),
        sim_freq=500,
        asset_pack="builtin",
        protocol="rl4vla",
        hulls="gpu",
        max_episode_steps=50,
        control="pd_ee_delta_pose",
    )
    policy = load_policy("openvla-oft-tiny", chunk_size=3, image_resize="pil", max_prompt_length=40, world=world)
    save_policy(policy, policy.state_dict(), tmp_path)
    about = read_about(tmp_path).model_dump()
    assert {name: about[name] for name in OF_MODEL} == dict(
        model_type="openvla_oft",
        unnorm_key="bridge_orig",
        chunk_size=3,
        max_prompt_length=40,
        image_resize="pil",
        oft_stop_token=False,
        dtype="float32",
    )
    assert about["world"] | {"image_size": [64, 48]} == world
    again = load_policy(str(tmp_path))
    assert (again.chunk_size, again.image_resize, again.max_prompt_length) == (3, "pil", 40)
    assert again.files.about == policy.files.about and again.files.world is None


@pytest.mark.parametrize("folder", sorted((ROOT / "checkpoints").glob("*-warmup")), ids=lambda path: path.name)
def test_shipped_policies_say_what_their_card_and_config_say(folder):
    about, config = read_about(folder), json.loads((folder / "config.json").read_text())
    card = (folder / "README.md").read_text()
    world = about.world
    assert f"`--unnorm_key {about.unnorm_key}`" in card and about.unnorm_key == world.env_id
    assert f"{world.image_size[0]} x {world.image_size[1]} pixels, {world.max_episode_steps} steps" in card
    assert f"of {world.env_id}, temperature 1.0, {world.sim_freq} Hz physics" in card
    assert about.chunk_size == config.get("chunk_size", 1) and world.control == control_mode(world.env_id)
    assert about.model_type == ("openvla_oft" if "chunk_size" in config else "openvla")


def test_eyes_say_what_they_have_seen():
    folder = ROOT / "checkpoints" / "tiny-eyes"
    about, card = read_about(folder), (folder / "README.md").read_text()
    assert (about.model_type, about.chunk_size, about.world) == (None, None, None)
    seen = about.seen
    size = f"{seen.image_size[0]} x {seen.image_size[1]} pixels"
    assert f"| views | {seen.views} of edition {seen.edition} of the {seen.asset_pack} pack, {size}" in card
    assert seen.edition == BUILTIN_EDITION and seen.obj_set == "train"
    assert parse("--model_path", str(folder), script=train_sft).model_type == "openvla"
    oft = parse("--model_path", str(folder), "--model_type", "openvla_oft", "--chunk_size", "4")
    assert (oft.model_type, oft.chunk_size) == ("openvla_oft", 4)


def test_other_envs_have_maniskills_control():
    assert control_mode("PickCube-v1") == maniskill_task.CONTROL_MODE and "control_mode" in envs.__all__
    assert set(About.model_fields) == {"version", *OF_MODEL, "world", "seen"}


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(chunk_size="4"), 'has chunk_size "4", but it must be a whole number: delete the file'),
        (dict(model_type="pi0"), "has model_type \"pi0\", but it must be 'openvla' or 'openvla_oft'"),
        (dict(unnorm_key=...), "has no unnorm_key"),
        (dict(world={"env_id": SINGLE}), "has no world.image_size"),
    ],
)
def test_a_broken_file_is_one_sentence(copied, change, said):
    edit(copied, **change)
    with pytest.raises(UserError) as caught:
        parse("--model_path", str(copied))
    assert f"{copied}/{ABOUT} {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_strangers_file_imports_no_code(copied):
    about = json.loads((copied / ABOUT).read_text())
    edit(copied, world=about["world"] | {"env_id": "antigravity:Mine-v1"})
    with pytest.raises(UserError, match="which imports code: give --env_id antigravity:Mine-v1 yourself to allow it"):
        parse("--model_path", str(copied))
    assert parse("--model_path", str(copied), "--env_id", SINGLE).env_id == SINGLE


# ---------------------------------------------------------------------- folders without it
@pytest.mark.parametrize(
    "change, wanted",
    [
        ({}, {"model_type": "openvla_oft", "chunk_size": 4}),
        ({"chunk_size": ...}, {}),
        ({"chunk_size": ..., "model_type": "openvla_oft"}, {"model_type": "openvla_oft"}),
        ({"chunk_size": ..., "architectures": ["OpenVLAOFTForRLActionPrediction"]}, {"model_type": "openvla_oft"}),
        ({"chunk_size": ..., "norm_stats": None}, {"unnorm_key": SINGLE}),
    ],
)
def test_a_folder_without_it_gives_away_what_it_can(copied, change, wanted):
    (copied / ABOUT).unlink()
    edit(copied, "config.json", **change)
    known = known_flags(str(copied))
    assert (known.flags if known else {}) == wanted and (known is None or not known.is_sure)
    if not wanted:  # as before: the flags decide
        args = parse("--model_path", str(copied), "--model_type", "openvla_oft", "--chunk_size", "4")
        assert args.model_type == "openvla_oft" and args.unnorm_key == "bridge_orig"
