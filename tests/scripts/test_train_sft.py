"""Behaviour cloning: its arithmetic by hand, and the script on CPU ranks."""

import dataclasses
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from launching import metrics, run_ranks, without_time
from made_up import write_demos
from safetensors.torch import load_file

import train_sft
from envs.demonstrations import Demos, Recipe
from envs.lerobot.write import write_set
from schemas.pixels import Pixels, resize
from train_sft import CloneBatch, clone_loss
from vla import VERSION
from vla.distributed import UserError
from vla.evaluation import model_card
from vla.evaluation.model_card import card, export_folder, export_policy
from vla.logger import describe_run
from vla.models.action_tokens import ActionTokens
from vla.models.loading import load_policy
from vla.models.policy import PolicyInputs, uniform_noise
from vla.training import augmentation, small_images
from vla.training.passes import batch_indices, learning_rate_at
from vla.training.small_images import SmallImages, read_ahead

ENV_ID = "PutOnPlateInScene25Single-v1"
PRESETS = ["yaml/sft_tiny_openvla.yaml", "yaml/sft_tiny_openvlaoft.yaml"]
SMALL = [
    "--batch_size",
    "8",
    "--micro_batch_size",
    "2",
    "--num_updates",
    "4",
    "--updates_per_iteration",
    "2",
    "--max_episode_steps",
    "4",
    "--num_eval_episodes",
    "2",
    "--num_eval_envs",
    "2",
    "--video_episodes",
    "0",
    "--image_size",
    "32",
    "24",
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Small images go into a cache of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """Four episodes of eight steps; each episode has its own colour and goes its own way."""
    recipe = Recipe(ENV_ID, "train", "builtin", "rl4vla", [32, 24], 100, 40, 0, 0.0, False, 0.05, 0.4)
    rng = np.random.default_rng(0)
    actions = [
        [np.array([*rng.uniform(-0.05, 0.05, 3), 0, 0, 0.1 * n, t % 2], np.float32) for t in range(8)] for n in range(4)
    ]
    images = [[np.full((24, 32, 3), 60 * n + 5 * t, np.uint8) for t in range(9)] for n in range(4)]
    folder = tmp_path_factory.mktemp("demos") / "set"
    write_demos(folder, recipe, actions, images)
    return folder


def policy_for(demos: Path, model_type: str = "openvla_oft", chunk_size: int = 4):
    """A tiny policy that speaks in the demonstrations' statistics."""
    preset = "openvla-tiny" if model_type == "openvla" else "openvla-oft-tiny"
    return load_policy(
        preset,
        model_type,
        chunk_size=chunk_size,
        unnorm_key=ENV_ID,
        norm_stats=Demos(demos).statistics,
        value_head=False,
    )


def read_by(recorded: Demos, policy) -> tuple:
    """The first arguments of read_batch(), with images that are read and resized every time."""
    return recorded, lambda index: resize(torch.from_numpy(recorded.images(index)), policy.image_size), policy


# ------------------------------------------------------------------ by hand
def test_learning_rate_by_hand():
    """Two updates of rise to 3, then half a cosine over the other four."""
    flags = dict(num_updates=6, learning_rate=3.0, warmup_updates=2)
    rates = [learning_rate_at(update, schedule="cosine", **flags) for update in range(6)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([1.0, 2.0, 3.0, 1.5 * (1 + half), 1.5, 1.5 * (1 - half)])
    assert [learning_rate_at(update, schedule="constant", **flags) for update in range(6)] == [1, 2, 3, 3, 3, 3]


def test_every_pass_sees_every_sample_once_in_another_order():
    passes = [torch.cat([batch_indices(4 * number + k, 12, 3, seed=1) for k in range(4)]) for number in range(2)]
    assert all(sorted(samples.tolist()) == list(range(12)) for samples in passes)
    assert passes[0].tolist() != passes[1].tolist()
    assert len(set(torch.cat([batch_indices(k, 11, 3, seed=1) for k in range(3)]).tolist())) == 9  # a rest is left out


def test_soft_targets_by_hand(demos):
    """Sigma 1: neighbours get exp(-1/2), the next exp(-2), ...; at the edge what would fall beyond is shared out."""
    tokens = policy_for(demos).action_tokens
    action = tokens.first_id + torch.tensor([100, 0, 50, 128, 128, 9, 255])
    middle, edge, *_, gripper = tokens.soft_targets(action, sigma=1.0)
    total = 1 + 2 * sum(math.exp(-0.5 * k * k) for k in range(1, 20))
    assert middle[100].item() == pytest.approx(1 / total) and middle[102].item() == pytest.approx(math.exp(-2) / total)
    assert edge[1].item() / edge[0].item() == pytest.approx(math.exp(-0.5)) and edge.sum().item() == pytest.approx(1)
    assert gripper[255].item() == 1.0  # open or shut: no scale
    assert torch.equal(tokens.soft_targets(action, sigma=0.0), F.one_hot(action - tokens.first_id, 256).float())


def test_what_never_moves_is_not_spread():
    """A dimension whose quantiles are one value, and one outside the mask, keep their token."""
    stats = {"q01": [-1.0, 0.0] + [-1.0] * 5, "q99": [1.0, 0.0] + [1.0] * 5, "mask": [True] * 6 + [False]}
    targets = ActionTokens(32000, stats).soft_targets(torch.full((2, 7), 31800), sigma=3.0)
    assert (targets.amax(-1) == 1).tolist() == [[False, True, False, False, False, False, True]] * 2


@pytest.mark.parametrize("model_type, chunk_size", [("openvla", 1), ("openvla_oft", 4)])
def test_hard_targets_are_the_models_own_cross_entropy(demos, model_type, chunk_size):
    """clone() equals the cross entropy of the network's logits over the whole vocabulary."""
    policy = policy_for(demos, model_type, chunk_size)
    batch = train_sft.read_batch(*read_by(Demos(demos), policy), torch.arange(3))
    logits = policy.model(*batch.inputs, tokens=batch.tokens.flatten(1))[0]
    losses, predicted = policy.clone(batch.inputs, batch.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten(), reduction="none")
    assert torch.allclose(losses.flatten(), expected, atol=1e-5)
    ids = slice(policy.action_tokens.first_id, policy.action_tokens.vocab_end)
    assert torch.equal(predicted.flatten(), logits[..., ids].argmax(-1).flatten() + ids.start)


@pytest.mark.parametrize("model_type, chunk_size", [("openvla", 1), ("openvla_oft", 4)])
def test_openvla_reads_tokens_drawn_from_its_targets(demos, model_type, chunk_size):
    """Spread as the targets are, for the model that reads them; the targets themselves stay exact."""
    policy = policy_for(demos, model_type, chunk_size)
    index = torch.arange(6).repeat(200)
    noise = uniform_noise(len(index), chunk_size, torch.Generator().manual_seed(0))
    exact = train_sft.read_batch(*read_by(Demos(demos), policy), index)
    batch = train_sft.read_batch(*read_by(Demos(demos), policy), index, noise=noise, label_sigma=3.0)
    assert torch.equal(exact.context_tokens, exact.tokens) and torch.equal(batch.tokens, exact.tokens)
    bins = exact.tokens - policy.action_tokens.first_id
    tokens = policy.action_tokens
    spread = tokens.mask & (tokens.q99 > tokens.q01)
    assert torch.equal(batch.context_tokens[..., ~spread], exact.tokens[..., ~spread])
    inner = (bins > 15) & (bins < 240) & spread  # where the Gaussian is whole
    moved = (batch.context_tokens - batch.tokens)[inner].double()
    assert inner.sum() > 1000 and abs(moved.mean()) < 0.3 and 2.7 < moved.std() < 3.3
    few = [PolicyInputs(*(None if field is None else field[:6] for field in batch.inputs)), batch.tokens[:6], 3.0]
    losses, told = policy.clone(*few)[0], policy.clone(*few, batch.context_tokens[:6])[0]
    assert torch.equal(losses[..., 0], told[..., 0])  # nothing was written before the first one
    assert torch.equal(losses, told) == (model_type == "openvla_oft")


def test_clone_loss_by_hand():
    """Two decisions of two actions, the last one past its episode's end: three actions count."""
    losses = torch.tensor([[1.0, 2.0], [3.0, 99.0]])[..., None].expand(2, 2, 7)
    tokens = torch.zeros(2, 2, 7, dtype=torch.int64)
    predicted = tokens.clone()
    predicted[0, 0, 0] = 1  # one token of 21 is wrong
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    batch = CloneBatch(None, tokens, tokens, torch.zeros(2, 2, 7), weights)
    loss, metrics = clone_loss(losses, predicted, batch, 0.5 * (predicted != 0).float(), 3.0)
    assert loss.item() == pytest.approx(2.0) and metrics["train/loss"].item() == pytest.approx(2.0)
    assert metrics["train/token_accuracy"].item() == pytest.approx(20 / 21)
    assert metrics["train/action_l1"].item() == pytest.approx(0.5 / 21)


def test_labels_come_back_from_their_tokens(demos):
    """What is cloned, decoded in robot units, is what the expert wanted, to half a bin."""
    policy, recorded = policy_for(demos), Demos(demos)
    batch = train_sft.read_batch(*read_by(recorded, policy), torch.arange(len(recorded)))
    labels, valid = recorded.chunks(np.arange(len(recorded)), 4)
    stats = recorded.statistics[ENV_ID]["action"]
    q01, q99 = np.array(stats["q01"]), np.array(stats["q99"])
    error = np.abs(policy.decode(batch.tokens).numpy()[..., :6] - np.clip(labels, q01, q99)[..., :6])
    assert (error <= (q99 - q01)[:6] / 255 + 1e-6)[valid].all()
    assert ((policy.decode(batch.tokens)[..., 6].numpy() > 0.5) == (labels[..., 6] > 0.5)).all()


def test_a_policy_learns_what_it_is_shown(demos):
    """Sixty updates on four frames: the loss falls by half and the greedy actions come close."""
    policy, recorded = policy_for(demos), Demos(demos)
    batch = train_sft.read_batch(*read_by(recorded, policy), torch.tensor([0, 8, 16, 24]))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    measured = []
    for _ in range(60):
        losses, predicted = policy.clone(batch.inputs, batch.tokens)
        decoded = policy.action_tokens.decode(predicted).float()
        loss, metrics = clone_loss(losses, predicted, batch, decoded, float(batch.weights.sum()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        measured.append((loss.item(), metrics["train/action_l1"].item()))
    assert measured[-1][0] < 0.5 * measured[0][0] and measured[-1][1] < 0.5 * measured[0][1]


# ------------------------------------------------------------------ images that are kept, and read ahead
class Camera:
    """Nine images at the camera's size. It notes which were read."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (9, 48, 64, 3), dtype=torch.uint8, generator=generator)
        self.images[4] = 0  # black, like a hole of a file
        self.seen: list[int] = []

    def __call__(self, index: list[int]) -> np.ndarray:
        self.seen += index
        return self.images[index].numpy()


SMALL_SIZE = Pixels((20, 24), "tensor")
ORDER = [5, 4, 5, 8, 0]


def kept_by(camera: Camera, file: Path, pixels: Pixels = SMALL_SIZE) -> SmallImages:
    return SmallImages(camera, len(camera.images), pixels, file)


@pytest.mark.parametrize("how", ["tensor", "pil"])
def test_each_image_is_read_once_and_stays_the_same(tmp_path, how):
    """By two ranks and a later run, with the bits of resizing a batch."""
    camera, pixels = Camera(), Pixels((20, 24), how)
    expected = resize(camera.images, *pixels)
    one, two = (kept_by(camera, tmp_path / "cache" / "set.images", pixels) for _ in range(2))
    assert torch.equal(one(ORDER), expected[ORDER]) and sorted(camera.seen) == [0, 4, 5, 8]
    assert torch.equal(two([8, 2, 4]), expected[[8, 2, 4]]) and camera.seen[4:] == [2]
    later = kept_by(camera, tmp_path / "cache" / "set.images", pixels)
    assert torch.equal(later(list(range(9))), expected) and sorted(camera.seen) == list(range(9))


def test_a_damaged_record_is_made_again(tmp_path):
    """Half a record, as of a process that died, a hole, and a bit that is wrong."""
    camera, file = Camera(), tmp_path / "set.images"
    images = kept_by(camera, file)
    expected = images(list(range(9)))
    content = bytearray(file.read_bytes())
    content[3 * images.record + 100] ^= 1
    content[4 * images.record : 5 * images.record] = bytes(images.record)
    file.write_bytes(content[: 8 * images.record + 99])
    camera.seen.clear()
    again = kept_by(camera, file)
    assert torch.equal(again(list(range(9))), expected) and camera.seen == [3, 4, 8]
    assert torch.equal(again(list(range(9))), expected) and camera.seen == [3, 4, 8]


def test_without_room_images_are_read_every_time(tmp_path, monkeypatch, capsys):
    """A disk with room for five, one that turns out to be full, and a folder that cannot be written."""
    camera = Camera()
    expected = resize(camera.images, *SMALL_SIZE)
    disk = Mock(f_bavail=10, f_frsize=kept_by(camera, tmp_path / "measure").record)
    monkeypatch.setattr(small_images.os, "fstatvfs", lambda descriptor: disk)
    few = kept_by(camera, tmp_path / "few")
    for _ in range(2):
        assert torch.equal(few(ORDER), expected[ORDER])
    assert camera.seen == [0, 4, 5, 8, 5, 8] and "room for 5 of 9 images" in capsys.readouterr().out
    monkeypatch.undo()
    full = kept_by(camera, tmp_path / "full")
    full(ORDER)
    monkeypatch.setattr(small_images.os, "pwrite", Mock(side_effect=OSError(28, "No space left on device")))
    camera.seen.clear()
    for _ in range(2):
        assert torch.equal(full([0, 1]), expected[[0, 1]])
    assert camera.seen == [1, 1] and capsys.readouterr().out.count("No space left on device") == 1
    (tmp_path / "file").touch()
    none = kept_by(camera, tmp_path / "file" / "set.images")
    assert torch.equal(none(ORDER), expected[ORDER]) and "cannot be written" in capsys.readouterr().out


def test_a_new_set_drops_what_was_not_used_for_longest(tmp_path, monkeypatch, capsys):
    """On a disk with room for four sets, of which two may be kept. What a run has open stays."""
    monkeypatch.setattr(small_images, "taken", lambda path: path.stat().st_size if path.exists() else 0)
    files = [tmp_path / f"{name}.images" for name in "abcd"]
    whole = 9 * kept_by(Camera(), tmp_path / "measure").record

    def disk(descriptor: int) -> Mock:
        return Mock(f_bavail=4 * whole - sum(map(small_images.taken, files)), f_frsize=1)

    monkeypatch.setattr(small_images.os, "fstatvfs", disk)
    opened = []
    for number, file in enumerate(files[:2]):
        opened.append(kept_by(Camera(), file))
        opened[-1](list(range(9)))
        os.utime(file, (number, number))
    assert f"{files[0]} keeps the images of this set, 0.0 GB" in capsys.readouterr().out
    os.close(opened[1].descriptor)
    opened.append(kept_by(Camera(), files[2]))  # a is older, and in use
    opened[2](list(range(9)))
    assert [file.exists() for file in files] == [True, False, True, False]
    assert f"{files[1]}, 0.0 GB, was deleted" in capsys.readouterr().out
    again = kept_by(Camera(), files[2])
    assert again.room == 9 and files[0].exists() and capsys.readouterr().out == ""  # nothing is new
    for images in (opened[0], opened[2], again):
        os.close(images.descriptor)
    os.utime(files[2], (5, 5))
    kept_by(Camera(), files[0])  # a use
    assert kept_by(Camera(), files[3]).room == 9
    assert [file.exists() for file in files] == [True, False, False, True]


def test_what_is_read_ahead_comes_in_order_and_errors_at_their_place():
    started = []

    def read(job: int) -> int:
        started.append(job)
        if job == 5:
            raise UserError("the file is damaged")
        return job * job

    received = []
    with pytest.raises(UserError, match="the file is damaged"):
        for job, result in read_ahead(read, range(100)):
            received.append((job, result))
    assert received == [(job, job * job) for job in range(5)] and max(started) <= 8
    threads = threading.active_count()
    for job, _ in read_ahead(read, range(4)):
        if job == 1:
            break  # as a run that is asked to end leaves its loop
    assert threading.active_count() <= threads


def test_a_batch_from_the_cache_is_the_one_that_is_read_anew(demos, tmp_path):
    """With crops and colours, which are made from the small image in every pass."""
    policy, recorded = policy_for(demos), Demos(demos)
    images = SmallImages(recorded.images, len(recorded), Pixels(policy.image_size, "tensor"), tmp_path / "images")
    sizes = dict(batch_size=8, micro_batch_size=3, chunk_size=4, seed=1, image_aug=True)
    for update in (0, 5):  # 4 updates are a pass
        parts = train_sft.parts_of(update, recorded, slice(0, 8), **sizes)
        assert [len(part.index) for part in parts] == [3, 3, 2]
        assert [part.last for part in parts] == [False, False, True]
        for part in parts:
            anew, kept = (
                train_sft.read_batch(recorded, source, policy, part.index, part.draws, part.noise, 3.0)
                for source in (read_by(recorded, policy)[1], images)
            )
            assert torch.equal(anew.inputs.images, kept.inputs.images)
            assert torch.equal(anew.context_tokens, kept.context_tokens)


# ------------------------------------------------------------------ augmentation
def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_augmentation_does_not_depend_on_the_batch():
    images, draws = pictures(5), augmentation.draw(5, torch.Generator().manual_seed(0))
    whole = augmentation.augment(images, draws)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape and draws.abs().max() <= 1
    assert torch.equal(whole[2:4], augmentation.augment(images[2:4], draws[2:4]))


def test_crop_by_hand():
    """A ramp of 100 columns: 94.87 of them are seen, from the left, the middle or the right."""
    ramp = torch.arange(100.0).expand(3, 3, 50, 100)
    seen = augmentation.crop(ramp, torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3))
    width = 100 * math.sqrt(0.9)
    for picture, left in zip(seen, (0.0, (100 - width) / 2, 100 - width)):
        assert picture[0, 25, 10].item() == pytest.approx(left + 10.5 * width / 100 - 0.5, abs=1e-3)


def test_colours_by_hand():
    one, zero = torch.ones(1), torch.zeros(1)
    gray = torch.full((1, 3, 4, 4), 0.5)
    for change in ((zero, one, zero, zero), (zero, zero, one, zero), (zero, zero, zero, one)):
        assert torch.allclose(augmentation.recolour(gray, *change), gray, atol=1e-6)  # nothing to contrast or colour
    assert torch.allclose(augmentation.recolour(gray, one, zero, zero, zero), gray + 0.2)
    colour = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)
    third = augmentation.turned(colour, torch.tensor([2 * math.pi / 3]))  # a third of a turn: red becomes green
    assert torch.allclose(third.flatten(), torch.tensor([0.1, 0.9, 0.1]), atol=1e-6)


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(demos="nowhere"), "--demos nowhere has no trajectory.json"),
        (dict(env_id="PutOnPlateInScene25Main-v3"), "was made with env_id='PutOnPlateInScene25Single-v1'"),
        (dict(sim_freq=500), "was made with sim_freq=100, this run has 500"),
        (dict(unnorm_key="fractal"), "--unnorm_key 'fractal' is not in the norm_stats"),
        (dict(unnorm_key="bridge_orig"), "actions are out of range in dimension"),
        (dict(num_updates=5), "--num_updates 5 is not a multiple"),
        (dict(batch_size=33), "has only 32 steps: lower --batch_size 33"),
        (dict(export_dir=str(ROOT / "tests")), "tests holds something other than a policy"),
        (dict(export_dir=str(ROOT / "checkpoints/openvla-tiny-warmup")), "holds a policy already: give --export_dir"),
    ],
)
def test_bad_input_is_one_sentence(demos, tmp_path, flags, sentence):
    good = dict(
        demos=str(demos),
        env_id=ENV_ID,
        sim_freq=100,
        image_size=(32, 24),
        unnorm_key=ENV_ID,
        lora_rank=0,
        num_updates=4,
        updates_per_iteration=2,
        batch_size=8,
        dtype="float32",
        run_dir=str(tmp_path / "run"),
    )
    with pytest.raises(UserError, match=re.escape(sentence)):
        train_sft.main(train_sft.Args(**good | flags))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ where the policy goes
def make_policy(folder: Path, *more: str) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md", *more):
        (folder / name).write_text("mine")
    return folder


def test_the_policy_stays_in_the_run_unless_somebody_says_so(tmp_path):
    run_dir, policy = tmp_path / "run", make_policy(tmp_path / "policy", "tokenizer.json", "LICENSE.md")
    make_policy_here = make_policy(run_dir.parent / "run_2") / "export"
    assert export_folder(run_dir, None, named=False) == run_dir / "export"
    assert export_folder(make_policy_here.parent, None, named=False) == make_policy_here  # made by this run before
    assert export_folder(run_dir, str(tmp_path / "new"), named=False) == tmp_path / "new"
    assert export_folder(run_dir, str(policy), named=True) == policy
    with pytest.raises(UserError, match=f"export_dir {policy} holds a policy already: give --export_dir {policy}"):
        export_folder(run_dir, str(policy), named=False)
    assert [(path / "config.json").read_text() for path in (policy,)] == ["mine"]


@pytest.mark.parametrize("foreign", ["thesis.tex", ".git", "modeling_prismatic.py", "model.safetensors.bak"])
def test_a_policy_folder_with_something_else_is_never_replaced(tmp_path, foreign):
    policy = make_policy(tmp_path / "policy", foreign)
    with pytest.raises(UserError, match=re.escape(f"something other than a policy ({foreign})")):
        export_folder(tmp_path / "run", str(policy), named=True)


@pytest.mark.parametrize("content, said", [({"config.json": "{}"}, "no weights"), (None, "a file")])
def test_what_is_no_policy_is_never_replaced(tmp_path, content, said):
    place = tmp_path / "place"
    if content is None:
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "config.json").write_text("{}")
    with pytest.raises(UserError, match=said):
        export_folder(tmp_path / "run", str(place), named=True)


def run_folder(folder: Path) -> Path:
    """What the card of a policy is written from, after a disk was full."""
    folder.mkdir()
    flags = train_sft.Args(env_id=ENV_ID, demos="/home/me/demos/tiny", model_path=str(ROOT / "checkpoints/openvla-7b"))
    command = f"train_sft.py --demos /home/me/demos/tiny --run_dir '{folder}' --model_path {flags.model_path}"
    description = describe_run(dataclasses.asdict(flags), {}, 1) | {"command": command}
    (folder / "run_from_iteration_000000.json").write_text(json.dumps(description))
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "global_step": 8, "time/update": 60.0}\n{"iter')
    evaluation = {
        "iteration": 1,
        "global_step": 8,
        "eval/success_once": 0.5,
        "eval/num_episodes": 4,
        "eval/return": 1.0,
    }
    (folder / "evaluations.jsonl").write_text(f"{json.dumps(evaluation)}\n\x00\x00\n")
    return folder


def test_exporting_touches_nothing_beside_the_policy(tmp_path, capsys):
    """A backup, a folder of the old temporary names and a policy that is replaced; then the disk is full."""
    run_dir, folder = run_folder(tmp_path / "run"), make_policy(tmp_path / "policy")
    for name in ("policy.old", "policy.partial"):
        make_policy(tmp_path / name)
    policy = load_policy("openvla-tiny", value_head=False)
    export_policy(policy, policy.state_dict(), run_dir, folder)
    assert capsys.readouterr().out == f"policy      {folder}, which replaces the one that was there\n"
    kept = ["policy", "policy.old", "policy.partial", "run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert all((tmp_path / name / "config.json").read_text() == "mine" for name in ("policy.old", "policy.partial"))
    assert folder.stat().st_mode & 0o777 == run_dir.stat().st_mode & 0o777  # others may read it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "save_policy", Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(UserError, match=f"could not be written to {folder} .No space left on device"):
            export_policy(policy, {}, run_dir, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept and (folder / "model.safetensors").is_file()


def test_a_card_names_no_place_and_survives_lines_that_are_cut(tmp_path):
    text = card(run_folder(tmp_path / "run"), tmp_path / "policy")
    assert "/home/me" not in text and str(tmp_path) not in text and str(ROOT) not in text
    assert "--demos .../demos/tiny --model_path checkpoints/openvla-7b" in text and "0.500 [0.15, 0.85] on 4" in text
    assert "| 1.0 of updates" in text or "1.0 of updates" in text
    assert f"| version | {VERSION} |" in text and "| started from | checkpoints/openvla-7b |" in text
    description = tmp_path / "run" / "run_from_iteration_000000.json"
    older = json.loads(description.read_text())
    older.pop("version")
    description.write_text(json.dumps(older))
    assert "| version | before 0.3.0 |" in card(tmp_path / "run", tmp_path / "policy")
    assert "--checkpoint runs/run/export" in card(tmp_path / "run", tmp_path / "run" / "export")


# ------------------------------------------------------------------ the script
def train(demos: Path, *flags: str, ranks: int = 1, preset: str = PRESETS[1]) -> None:
    place = ["--demos", str(demos), "--export_dir", str(demos.parent / "warm")]
    run = run_ranks(ranks, "train_sft.py", "--config", preset, *place, *SMALL, *flags)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def logged(run_dir: Path) -> list[dict]:
    return without_time(metrics(run_dir))


@pytest.fixture(scope="module")
def one_rank(demos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(demos, "--run_dir", str(folder / "run"), "--export_dir", str(folder / "warm"), "--save_freq", "1")
    return folder


@pytest.mark.slow
def test_two_ranks_under_zero3_make_the_same_updates(demos, one_rank, tmp_path):
    train(demos, "--run_dir", str(tmp_path / "run"), "--deepspeed_config", "ds_configs/zero3.json", ranks=2)
    for one, two in zip(logged(one_rank / "run"), logged(tmp_path / "run")):
        for tag in ("train/loss", "train/actor/grad_norm", "train/token_accuracy", "train/action_l1"):
            assert one[tag] == pytest.approx(two[tag], rel=1e-5), tag
    assert logged(tmp_path / "run")[0]["train/actor/lr"] == logged(one_rank / "run")[0]["train/actor/lr"]


@pytest.mark.slow
@pytest.mark.parametrize("images", ["lossless", pytest.param("png", marks=pytest.mark.full)])
def test_a_set_in_lerobots_format_trains_to_the_same_bits(demos, one_rank, tmp_path, monkeypatch, images):
    """Written to LeRobot's format without loss and read from there: the metrics and the policy are identical."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_set(demos, tmp_path / "lerobot", images)
    train(tmp_path / "lerobot", "--run_dir", str(tmp_path / "run"))
    assert logged(tmp_path / "run") == logged(one_rank / "run")
    ours, theirs = (load_file(folder / "warm" / "model.safetensors") for folder in (tmp_path, one_rank))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((tmp_path / "cache").rglob("trajectory.h5"))) == 1


@pytest.mark.slow
@pytest.mark.full
def test_a_set_that_lerobot_wrote_trains(tmp_path, monkeypatch):
    """Its statistics, with the name of its folder, become those of the policy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(ROOT / "tests/envs/lerobot_sets/video", tmp_path / "theirs"))
    camera = ["--demos_camera", "observation.images.top", "--unnorm_key", "theirs"]
    train(folder, "--run_dir", str(tmp_path / "run"), *camera)
    assert [math.isfinite(line["train/loss"]) for line in logged(tmp_path / "run")] == [True, True]
    policy = load_policy(str(tmp_path / "warm"), "openvla_oft", unnorm_key="theirs")
    assert policy.action_tokens.q99[0].item() == pytest.approx(0.02)


@pytest.mark.slow
def test_a_resumed_run_is_an_unbroken_one(demos, one_rank, tmp_path):
    run_dir = Path(shutil.copytree(one_rank / "run", tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints" / "iteration_000002")
    train(demos, "--resume", str(run_dir), "--export_dir", str(tmp_path / "warm"))
    assert logged(run_dir) == logged(one_rank / "run")
    ours, theirs = (load_file(folder / "warm" / "model.safetensors") for folder in (tmp_path, one_rank))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    made_by = (tmp_path / "warm" / "README.md").read_text()
    first, then = re.search(r"\| made by \| `([^`]+)`, then `([^`]+)` \|", made_by).groups()
    assert "--resume" not in first and " --resume runs/my_run" in then and str(run_dir) not in made_by


@pytest.mark.slow
def test_what_is_exported_acts_in_the_demonstrations_units(demos, one_rank):
    policy = load_policy(str(one_rank / "warm"), "openvla_oft", unnorm_key=ENV_ID)
    assert policy.chunk_size == 4
    stats = Demos(demos).statistics[ENV_ID]["action"]
    assert policy.action_tokens.q99.tolist() == stats["q99"] and policy.action_tokens.q01.tolist() == stats["q01"]
    card = (one_rank / "warm" / "README.md").read_text()
    for wanted in ("`train_sft.py --config", "held-out episodes", "4 of 8 decisions", "100 Hz", ENV_ID):
        assert wanted in card, card


@pytest.mark.slow
def test_an_adapter_is_trained_and_merged(demos, tmp_path):
    folder = str(tmp_path / "warm")
    flags = ["--lora_rank", "4", "--num_updates", "2", "--export_dir", folder, "--run_dir", str(tmp_path / "run")]
    train(demos, *flags, preset=PRESETS[0])
    assert not (tmp_path / "warm" / "adapter_config.json").exists()
    whole = load_policy(folder, "openvla", unnorm_key=ENV_ID)
    fresh = load_policy(str(ROOT / "checkpoints/tiny-eyes"), "openvla")
    changed = [not torch.equal(a, b) for a, b in zip(whole.model.parameters(), fresh.model.parameters())]
    assert any(changed) and len(changed) == len(list(fresh.model.parameters()))
