"""Editions of the builtin pack: what knows its own, and what is said where two of them meet."""

import dataclasses
import json
import shutil

import pytest
from conftest import ROOT

import evaluate
import train_ppo
from envs import make_envs
from envs.demonstrations import Recipe
from schemas import UserError
from schemas.demonstrations import Recipe as SavedRecipe
from schemas.evaluations import Identity, Results
from schemas.flags import BUILTIN_EDITION, edition_before, edition_now
from vla.cli import parse_args
from vla.evaluation.statistics import compare
from vla.models.about import ABOUT, read_about, world_of

OFT, SINGLE = "checkpoints/openvla-oft-tiny-warmup", "PutOnPlateInScene25Single-v1"
NOTE = f"edition 1 of the builtin pack, and is used here with edition {BUILTIN_EDITION} of the builtin pack: do not"


def policy_of_edition(folder, edition: int | None):
    """A copy of a shipped policy. None is one from before editions."""
    shutil.copytree(ROOT / OFT, folder)
    about = json.loads((folder / ABOUT).read_text())
    about["world"] = {name: value for name, value in about["world"].items() if name != "edition"}
    about["world"] |= {} if edition is None else {"edition": edition}
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def test_the_builtin_pack_has_an_edition_and_others_have_none():
    assert edition_now({"asset_pack": "builtin"}) == BUILTIN_EDITION and edition_before({"asset_pack": "builtin"})
    for world in ({"asset_pack": "bridge"}, {"asset_pack": "builtin", "instruction": "pick up the cube"}, {}):
        assert edition_now(world) is None and edition_before(world) == {}
    common = dict(env_id=SINGLE, image_size=(96, 96), sim_freq=100, protocol="rl4vla", hulls="gpu", control="x")
    for pack, wanted in (("builtin", BUILTIN_EDITION), ("bridge", None)):
        world = world_of(**common, instruction=None, asset_pack=pack, max_episode_steps=40)
        assert world["edition"] == wanted


@pytest.mark.parametrize("edition", [None, BUILTIN_EDITION])
def test_scripts_say_that_a_policy_is_of_another_edition(tmp_path, capsys, edition):
    folder = policy_of_edition(tmp_path / "policy", edition)
    assert read_about(folder).world.edition == (edition or 1)
    parse_args(train_ppo.Args, ["--model_path", str(folder)], "test")
    evaluate.parse(["--checkpoint", str(folder)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (0 if edition else 2) and all(NOTE in line for line in said)
    parse_args(train_ppo.Args, ["--model_path", str(folder), "--asset_pack", "bridge"], "test")
    assert "edition" not in capsys.readouterr().out  # the packs differ, which is said


def test_a_run_has_the_edition_of_its_policy(tmp_path, capsys):
    policy = policy_of_edition(tmp_path / "run/checkpoints/iteration_000001/policy", None)
    args = train_ppo.Args(model_path=OFT, model_type="openvla_oft", chunk_size=4, critic="state", lora_rank=0)
    (tmp_path / "run/args.json").write_text(json.dumps(dataclasses.asdict(args)))
    evaluate.parse(["--checkpoint", str(policy)])
    assert NOTE in capsys.readouterr().out


def test_evaluations_of_two_editions_are_not_compared_and_not_mixed(tmp_path):
    args = evaluate.Args(policy="idle")
    now = evaluate.identity_of(args, None)
    assert now["world"]["edition"] == BUILTIN_EDITION
    before = now | {"world": {name: value for name, value in now["world"].items() if name != "edition"}}
    (tmp_path / "evaluation.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=f"was started with world.edition 1, but now it is {BUILTIN_EDITION}"):
        evaluate.find_output(str(tmp_path), True, now)
    halves = [
        Results(name="x", temperature=0.0, settings={}, other_temperatures={}, world=one["world"]).model_dump()
        for one in (before, now)
    ]
    with pytest.raises(UserError, match=f"evaluated with edition 1 and {BUILTIN_EDITION}: evaluate one of them again"):
        compare(*halves)
    pair = [None]  # any, since no episode of another edition can be replayed
    with pytest.raises(UserError, match="both were evaluated in edition 1 of the builtin pack"):
        evaluate.compare_videos(args, pair, halves[0]["world"], tmp_path)
    assert Identity(**before).world["edition"] == 1


def test_demonstrations_and_states_know_their_edition(recwarn):
    recipe = Recipe(SINGLE, "train", "builtin", "rl4vla", [5, 4], 100, 40, 0, 0.0, False, 0.05, 0.4)
    assert recipe.edition == BUILTIN_EDITION and dataclasses.replace(recipe, asset_pack="bridge").edition is None
    saved = {name: value for name, value in vars(recipe).items() if name not in ("edition", "image_size")}
    assert SavedRecipe(**saved, image_size=(5, 4)).edition == 1
    with make_envs(SINGLE, 1, image_size=(16, 16), sim_freq=100) as envs:
        state = envs.state_dict()
        assert state[0]["world"]["edition"] == BUILTIN_EDITION
        envs.load_state_dict(state)
        assert not [one for one in recwarn if "edition" in str(one.message)]
        del state[0]["world"]["edition"]
        with pytest.warns(RuntimeWarning, match="began in edition 1 of the builtin pack and continue in edition 2"):
            envs.load_state_dict(state)
