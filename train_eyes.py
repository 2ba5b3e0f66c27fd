"""Pre-training of a tiny model's eyes: its vision towers and projector learn to see before they learn to act.

    # two ranks on a CPU, from random weights
    export DS_ACCELERATOR=cpu
    deepspeed --num_gpus 2 train_eyes.py --config yaml/eyes_tiny.yaml --export_dir checkpoints/tiny-eyes
    # every flag
    python train_eyes.py --help

Published towers have seen millions of images, and a tiny model's towers are random. Here they see random scenes of the
simulator (`envs/views.py`), and answer for each patch what it shows and where that is. A linear layer on the
projector's output gives the answers, and is thrown away in the end. The result is a policy whose language model is
still random. It fits both model types, and train_sft.py starts from it.

The scenes are drawn first, into files of the run folder, which are removed in the end. The seed and the number of an
update decide which views it reads. So any number of ranks trains on the same batches.

    B views   P patches   T things   F facts (envs/views.py)   H hidden width
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("train_eyes.py starts: loading packages takes about 10 s", file=sys.stderr, flush=True)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from envs.assets.catalog import OBJECTS, RECEPTACLES, TABLES
from envs.variants import lookup
from envs.views import FACTS, THINGS, UNIT, VIEWS_PER_SCENE, Scenes
from schemas import UserError, flags
from schemas.pixels import resize
from vla.cli import flag_value, parse_args, pick
from vla.distributed import print0, rank, run_main, setup_distributed, user_errors, world_size
from vla.evaluation.model_card import commit_of, export_folder, export_policy
from vla.logger import Averages, describe_run
from vla.models.loading import load_policy
from vla.models.openvla import OpenVLA
from vla.start.launch import launched
from vla.text import counted, markdown_code, without_places
from vla.training import augmentation
from vla.training.checkpoint import begin_run, open_run
from vla.training.engine import backward, build_engine, read_deepspeed_config
from vla.training.passes import batch_indices, check_sizes, learning_rate_at

OBJ_SET = "train"  # what the other settings hold out is not shown
SHOWN = 0.03  # share of a patch above which it counts as showing a thing
HELD_OUT = 16  # one scene in so many is not trained on
OF_FACT = [THINGS.index(thing) for thing, _ in FACTS]  # the thing of each fact
SMOOTH = 0.1  # distance, in the facts' units, below which the loss is quadratic
LIGHT = 0.5  # share of fine-tuning's augmentation of colours, so that the light differs


@dataclass
class Args:
    # ---- most used
    config: tuple[flags.Text, ...] = ()
    """Yaml files of flags. A later file wins over an earlier one, and the command line wins over all."""
    run_dir: flags.Text | None = None
    """New folder for everything that the run writes. Without it, runs/<algorithm>_<env_id>_<time> is made."""
    seed: flags.Seed = 0
    """Seed of everything random. Two runs with one seed on one machine's CPUs are identical."""
    num_scenes: flags.Count = 1280
    """Scenes to draw: an object and a receptacle each, in 32 views. One in 16 is held out, to measure what is seen."""
    num_updates: flags.Count = 4000
    """Optimizer steps of the run."""
    model_path: Literal["openvla-tiny", "openvla-oft-tiny"] = "openvla-tiny"
    """Random weights to start from. Both names have the same towers."""
    batch_size: flags.Count = 64
    """Views per optimizer step, over all ranks."""
    learning_rate: flags.NonNegative = 2e-3
    """Peak learning rate of the towers."""
    env_id: flags.EnvId = "PutOnPlateInScene25Main-v3"
    """Env: one of the 17 PutOnPlateInScene25 ids."""
    export_dir: flags.Text | None = None
    """Folder for the final policy and its model card, with an adapter merged in. Without it, export/ in the run folder
    is used. A folder that you name on the command line may hold an older policy, which is replaced."""

    # ---- run
    updates_per_iteration: flags.Count = 250
    """Optimizer steps per iteration. Each iteration writes one line of metrics."""

    # ---- env
    image_size: tuple[flags.Pixels, flags.Pixels] = (96, 96)
    """Width and height of the camera image in pixels. The camera's pose and field of view stay the same."""

    # ---- update
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the policy's learning rate. It falls to 0 at the end with linear and cosine."""
    warmup_updates: flags.CountOrNone = 200
    """Optimizer steps over which the learning rate rises to --learning_rate."""
    weight_decay: flags.NonNegative = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: flags.NonNegative = 1.0
    """Largest gradient norm. Larger gradients are scaled down to it. 0 sets no limit."""

    # ---- system
    local_rank: flags.LocalRank = -1
    """Number of this rank on its machine. The launcher sets it."""


class Eyes(nn.Module):
    """Towers and projector of a policy, with a linear layer that answers for each patch."""

    def __init__(self, model: OpenVLA):
        super().__init__()
        self.vision_backbone, self.projector = model.vision_backbone, model.projector
        self.head = nn.Linear(model.hidden_size, len(THINGS) + len(FACTS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of images uint8 [B, H, W, 3] at the towers' size, what each patch says.

        Returns:
            shown [B, P, T], logits of whether it shows a thing.
            said [B, P, F], the facts.
        """
        answers = self.head(self.projector(self.vision_backbone(images)))
        return answers.split([len(THINGS), len(FACTS)], dim=-1)


class Views(NamedTuple):
    """Drawn views: arrays in files of the run folder, which all ranks read."""

    images: np.ndarray  # uint8 [N, H, W, 3], at the towers' size
    shares: np.ndarray  # float32 [N, P, T]
    facts: np.ndarray  # float32 [N, F]

    def read(self, index: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, shares and facts of some views, index int64 [B]."""
        return tuple(torch.from_numpy(part[index.numpy()]).to(device) for part in self)


def draw_views(folder: Path, num_scenes: int, size: int, side: int, args: Args) -> Views:
    """Draw scenes, each rank its share of them, and wait for the others'. size: pixels of the towers' input."""
    count = num_scenes * VIEWS_PER_SCENE
    shapes = {"images": (count, size, size, 3), "shares": (count, side**2, len(THINGS)), "facts": (count, len(FACTS))}
    if rank() == 0:
        for name, shape in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8 if name == "images" else np.float32, shape)
    dist.barrier()
    views = Views(*(np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes))
    scenes = Scenes(args.env_id, OBJ_SET, args.image_size, side, args.seed)
    for number in range(rank(), num_scenes, world_size()):
        images, *labels = (np.stack(part) for part in zip(*scenes.views(number)))
        rows = slice(number * VIEWS_PER_SCENE, (number + 1) * VIEWS_PER_SCENE)
        views.images[rows] = resize(torch.from_numpy(images), (size, size)).numpy()
        views.shares[rows], views.facts[rows] = labels
    scenes.close()
    dist.barrier()
    return views


def eyes_loss(
    shown: torch.Tensor, said: torch.Tensor, shares: torch.Tensor, facts: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Whether each patch knows what it shows, and how far the facts that it says are from the true ones.

    A patch is asked for the facts about the things that it shows. Every view counts alike.

    Args:
        shown, said: of Eyes. shares: [B, P, T]. facts: [B, F].
    """
    targets = (shares > SHOWN).float()  # [B, P, T]
    seeing = F.binary_cross_entropy_with_logits(shown, targets)
    asked = targets[..., OF_FACT]  # [B, P, F]
    apart = F.smooth_l1_loss(said, facts[:, None].expand_as(said), reduction="none", beta=SMOOTH)
    locating = ((apart * asked).sum(dim=(1, 2)) / asked.sum(dim=(1, 2)).clamp(min=1)).mean()
    return seeing + locating, {"train/seeing": seeing.detach(), "train/locating": locating.detach()}


def errors_of(shown: torch.Tensor, said: torch.Tensor, shares: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Distance of each fact, [B, F], as the patches that seem to show its thing say it. NaN if none shows it.

    The arguments are those of eyes_loss().
    """
    weights = shown.sigmoid() ** 2  # [B, P, T]
    weights = (weights / weights.sum(dim=1, keepdim=True))[..., OF_FACT]
    is_shown = (shares.amax(dim=1) > SHOWN)[:, OF_FACT]
    return torch.where(is_shown, ((weights * said).sum(dim=1) - facts).abs(), torch.nan)


def main(args: Args) -> None:
    # ------------------------------------------------------------------ set-up: wrong input ends here
    with user_errors():
        launch = launched()
        lookup(args.env_id, OBJ_SET)
        check_sizes(**pick(args, check_sizes, world_size=launch.world_size))
        num_tests = -(-args.num_scenes // HELD_OUT) * VIEWS_PER_SCENE  # the first ones
        if args.num_scenes * VIEWS_PER_SCENE - num_tests < args.batch_size:
            raise UserError(
                f"--num_scenes {args.num_scenes} has only {args.num_scenes * VIEWS_PER_SCENE - num_tests} views to "
                f"train on, and --batch_size is {args.batch_size}: raise the first or lower the second"
            )
        ds_config = read_deepspeed_config("ds_configs/zero0.json", "float32")
        device = setup_distributed(args.seed)
        default_dir = f"runs/eyes_{args.env_id}_{time.strftime('%Y%m%d_%H%M%S')}"
        run_dir, _ = open_run(args.run_dir, None, default_dir, asdict(args))
        export_dir = export_folder(run_dir, args.export_dir, flag_value(sys.argv[1:], "export_dir") is not None)
        policy = load_policy(args.model_path, value_head=False, device=device, seed=args.seed)
        side = math.isqrt(policy.feature_shape()[0])
        if any(edge % side for edge in args.image_size):
            raise UserError(
                f"--image_size {args.image_size} has no {side} x {side} equal patches: use multiples of {side}"
            )
        begin_run(run_dir, None)
    began = time.perf_counter()
    description = describe_run(asdict(args), {}, world_size(), asdict(Args()))
    print0(f"{run_dir}: {counted(world_size(), 'rank')} on {description['device']}, {args.num_scenes} scenes are drawn")
    views = draw_views(run_dir, args.num_scenes, policy.image_size[0], side, args)
    drawn = time.perf_counter() - began
    print0(f"{len(views.images):,} views in {drawn:.0f} s, {num_tests:,} of them held out")
    eyes = Eyes(policy.model).to(device)
    local_batch_size = args.batch_size // world_size()
    sizes = dict(micro_batch_size=local_batch_size, value_learning_rate=None)
    engine = build_engine(eyes, ds_config, **pick(args, build_engine, **sizes))
    mine = slice(rank() * local_batch_size, (rank() + 1) * local_batch_size)

    for iteration in range(args.num_updates // args.updates_per_iteration):
        # ------------------------------------------------------------------ update: ranks in lock-step
        averages = Averages()
        for update in range(iteration * args.updates_per_iteration, (iteration + 1) * args.updates_per_iteration):
            engine.optimizer.param_groups[0]["lr"] = learning_rate_at(update, **pick(args, learning_rate_at))
            index = batch_indices(update, len(views.images) - num_tests, args.batch_size, args.seed) + num_tests
            draws = augmentation.draw(args.batch_size, torch.Generator().manual_seed(args.seed + 7919 * update))
            images, shares, facts = views.read(index[mine], device)
            loss, metrics = eyes_loss(*engine(in_other_light(images, draws[mine].to(device))), shares, facts)
            backward(engine, loss, last=True)
            averages.add(metrics)

        # ------------------------------------------------------------------ log: what held-out views show
        metrics = averages.reduce(count=args.updates_per_iteration)
        errors = []
        with torch.no_grad():
            for rows in torch.arange(num_tests).split(args.batch_size):
                images, shares, facts = views.read(rows, device)
                errors.append(errors_of(*engine(images), shares, facts))
        medians = torch.cat(errors).nanmedian(dim=0).values.tolist()
        metrics |= {f"eval/{thing}_{fact}": error for (thing, fact), error in zip(FACTS, medians)}
        if rank() == 0:
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"iteration": iteration + 1, "seconds": time.perf_counter() - began} | metrics))
                file.write("\n")
        print0(f"update {(iteration + 1) * args.updates_per_iteration} of {args.num_updates}: {in_words(metrics)}")

    seen = dict(env_id=args.env_id, obj_set=OBJ_SET, asset_pack="builtin", edition=flags.BUILTIN_EDITION)
    seen |= dict(image_size=args.image_size, views=len(views.images))
    # the language model is random, so both types can use it
    policy.files.about.update(model_type=None, chunk_size=None, seen=seen)
    if rank() == 0:
        for file in run_dir.glob("*.npy"):
            file.unlink()
    text = card(description, in_words(metrics), (drawn, time.perf_counter() - began - drawn))
    export_policy(policy, policy.state_dict(), run_dir, export_dir, text)


def in_other_light(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Images uint8 [B, H, W, 3] in other colours, by random numbers [B, 6] in [-1, 1]. Nothing in them moves."""
    pixels = images.permute(0, 3, 1, 2).float() / 255.0
    changed = augmentation.recolour(pixels, *(LIGHT * draws[:, 2:]).unbind(dim=1))
    return (changed * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def in_words(metrics: dict[str, float]) -> str:
    """Such as "object 0.85 cm, receptacle 0.24 cm, tool 0.52 cm": medians along one axis, over held-out views."""
    places = {thing: [metrics[f"eval/{thing}_{axis}"] for axis in "xy"] for thing in THINGS}
    return ", ".join(f"{thing} {100 * UNIT * sum(errors) / 2:.2f} cm" for thing, errors in places.items())


def card(description: dict, seen: str, seconds: tuple[float, float]) -> str:
    """A description of the run as Markdown. seconds: of drawing and of updates."""
    description = without_places(description)
    args = description["args"]
    ranges = lookup(args["env_id"], OBJ_SET)
    shown = {
        "object": [OBJECTS[k].name for k in ranges.objects],
        "receptacle": [RECEPTACLES[k].name for k in ranges.receptacles],
        "table": [f"{TABLES[k].key[:3]} {TABLES[k].name}" for k in ranges.tables],
    }
    drawing, updates = (f"{part / 60:.1f}" for part in seconds)
    facts = {
        "made by": markdown_code(description["command"]),
        "version": description["version"],
        "commit": commit_of(description),
        "seed": args["seed"],
        "started from": f"{args['model_path']}, random weights",
        "views": f"{args['num_scenes'] * VIEWS_PER_SCENE} of edition {flags.BUILTIN_EDITION} of the builtin pack, "
        f"{args['image_size'][0]} x {args['image_size'][1]} pixels, arm anywhere above the table",
        **{counted(len(names), kind): ", ".join(names) for kind, names in shown.items()},
        "not shown": "other objects, receptacles and tables, textures, instructions",
        "updates": f"{args['num_updates']} of {args['batch_size']} views",
        "minutes": f"{drawing} of drawing, {updates} of updates, {counted(description['num_ranks'], 'rank')} on "
        f"{description['device']}, {description['started']}",
        "median error along an axis, held-out views": seen,
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return (
        "# tiny-eyes\n\nVision towers and projector that have seen random scenes, with a language model of random "
        f"weights. train_sft.py starts from it.\n\n| | |\n|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    run_main(main, lambda: parse_args(Args, sys.argv[1:], __doc__))
