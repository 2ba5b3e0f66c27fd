"""Pre-training of the eyes: its loss by hand, and the script on CPU ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from launching import run_ranks
from safetensors.torch import load_file

import train_eyes
import train_sft
from envs.views import FACTS, THINGS
from schemas import UserError
from train_eyes import Eyes, errors_of, eyes_loss
from vla.cli import parse_args
from vla.models.about import read_about
from vla.models.loading import load_policy

T, F = len(THINGS), len(FACTS)
SMALL = "--num_scenes 4 --num_updates 4 --updates_per_iteration 2 --batch_size 8 --warmup_updates 1".split()


def test_the_loss_by_hand():
    """One patch of four shows the receptacle, 1 unit in x from where it is said to be. The other view shows nothing."""
    shown, said, shares = torch.zeros(2, 4, T), torch.zeros(2, 4, F), torch.zeros(2, 4, T)
    shares[0, 2, THINGS.index("receptacle")] = 0.5
    facts = torch.zeros(2, F)
    facts[0, FACTS.index(("receptacle", "x"))] = 1.0
    facts[0, FACTS.index(("object", "x"))] = 9.0  # no patch shows the object, so none is asked
    loss, metrics = eyes_loss(shown, said, shares, facts)
    assert metrics["train/seeing"].item() == pytest.approx(math.log(2))
    # smooth L1 with beta 0.1: |d| - 0.05, the mean over the two facts of a receptacle, and over the two views
    assert metrics["train/locating"].item() == pytest.approx(0.95 / 2 / 2)
    assert loss.item() == pytest.approx(math.log(2) + 0.95 / 4)


def test_the_patches_that_seem_to_show_a_thing_are_asked_where_it_is():
    shown, said, shares = torch.full((1, 4, T), -20.0), torch.full((1, 4, F), 7.0), torch.zeros(1, 4, T)
    tool = THINGS.index("tool")
    shares[0, 1, tool] = 0.2
    shown[0, 1:3, tool] = 20.0  # one patch is wrong about it
    said[0, 1], said[0, 2] = 1.0, 2.0
    errors = errors_of(shown, said, shares, torch.full((1, F), 0.5))[0]
    for (thing, _), error in zip(FACTS, errors.tolist()):
        assert error == pytest.approx(1.0) if thing == "tool" else math.isnan(error)


def test_patches_answer_through_the_projector():
    model = load_policy("openvla-tiny", value_head=False).model
    shown, said = Eyes(model)(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    assert shown.shape == (2, 64, T) and said.shape == (2, 64, F)
    (shown.sum() + said.sum()).backward()
    unused = {id(parameter) for parameter in model.unused_parameters()}
    for name, parameter in model.named_parameters():
        is_eye = name.startswith(("vision_backbone.", "projector.")) and id(parameter) not in unused
        assert (parameter.grad is not None) == is_eye, name


def test_other_light_moves_nothing():
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    image[0, 4:8, 8:12] = 200
    changed = train_eyes.in_other_light(image, torch.tensor([[1.0, 1.0, 0.4, -0.3, 0.5, 0.8]]))
    inside = changed[0, 4:8, 8:12]
    assert not torch.equal(changed, image) and (inside == inside[0, 0]).all()
    outside = changed[0, 8:, :8]
    assert (outside == outside[0, 0]).all() and (inside[0, 0] > outside[0, 0]).all()


def train(folder: Path, ranks: int) -> list[dict]:
    """A small run. Returns its lines of metrics, without times."""
    run = run_ranks(ranks, "train_eyes.py", "--run_dir", str(folder), *SMALL)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in line.items() if tag != "seconds"} for line in lines]


@pytest.mark.slow
def test_only_the_eyes_learn_and_both_models_can_have_them(tmp_path):
    assert [line["iteration"] for line in train(tmp_path / "run", 1)] == [1, 2]
    assert not list((tmp_path / "run").glob("*.npy"))
    folder = tmp_path / "run" / "export"
    before, after = load_policy("openvla-tiny").state_dict(), load_file(folder / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[f"model.{name}"])}
    assert changed and all(name.startswith(("vision_backbone.", "projector.")) for name in changed)
    assert load_policy(str(folder), "openvla_oft", chunk_size=4).chunk_size == 4
    assert load_policy(str(folder)).chunk_size == 1
    card = (folder / "README.md").read_text()
    for wanted in ("`train_eyes.py", "128 of edition 2", "16 objects | carrot, kitchen shovel", "4 of 8 views"):
        assert wanted in card, card
    about = read_about(folder)
    assert about.model_type is None and about.seen.views == 128 and about.seen.edition == 2
    assert parse_args(train_sft.Args, ["--model_path", str(folder)], "").model_type == train_sft.Args().model_type


@pytest.mark.slow
@pytest.mark.full
def test_ranks_share_scenes_and_updates(tmp_path):
    """One rank and two draw the same views and learn the same from them."""
    for one, two in zip(train(tmp_path / "one", 1), train(tmp_path / "two", 2), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(num_scenes=2), "--num_scenes 2 has only 32 views to train on, and --batch_size is 64: raise"),
        (dict(num_updates=7), "--num_updates 7 is not a multiple of --updates_per_iteration 250"),
        (dict(env_id="PickCube-v1"), "unknown env_id 'PickCube-v1'"),
        (dict(image_size=(100, 96)), "--image_size .100, 96. has no 8 x 8 equal patches: use multiples of 8"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        train_eyes.main(train_eyes.Args(run_dir=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()


def test_the_presets_of_cloning_start_from_the_shipped_eyes():
    for preset in ("openvla", "openvlaoft", "openvlaoft_main"):
        args = parse_args(train_sft.Args, ["--config", str(ROOT / f"yaml/sft_tiny_{preset}.yaml")], "")
        assert Path(args.model_path).name == "tiny-eyes" and args.chunk_size == (4 if "oft" in preset else 1)


def test_the_second_half_of_cloning_starts_where_make_warmup_puts_the_first():
    second = yaml.safe_load((ROOT / "yaml/sft_tiny_openvlaoft_main_all.yaml").read_text())
    assert f"sft_tiny_openvlaoft_main,{second['model_path']})" in (ROOT / "Makefile").read_text()
