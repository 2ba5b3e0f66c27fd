"""What an asset pack's images show: whether its objects differ, how busy its tables are, how all looks.

    python benchmarks/object_views.py --classify                    # trains a small classifier, about 3 minutes
    python benchmarks/object_views.py --tables
    python benchmarks/object_views.py --sheet docs/builtin.png
    python benchmarks/object_views.py --sheet docs/bridge.png --asset_pack bridge --asset_dir assets
    python benchmarks/object_views.py --episode docs/episode.png
    python benchmarks/object_views.py --scenes docs/scenes.png

A view is an image of 64 x 64. It shows one of 25 objects and of 17 receptacles, at places and with a yaw of Main-v3's
start states, on one of 21 tables. The arm's joints and fingers are moved at random from the start pose. The classifier
gets the 24 x 24 pixels around the object's middle. Views with fewer than 6 pixels of the object are drawn
again. The views it is judged by are others than those it is trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import sapien
import torch
from PIL import Image, ImageDraw
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import assets, gym_env, variants
from envs.assets import catalog
from envs.expert import Expert
from envs.put_on_plate import START_QPOS, PutOnPlateInScene
from envs.rotations import rotation_matrix, yaw_quaternion
from envs.views import Scenes

MAIN = "PutOnPlateInScene25Main-v3"
SMALL = "PutOnPlateInScene25Single-v1"
SIZE, CROP = 64, 24  # pixels
FEWEST_PIXELS = 6
JOINT_NOISE = 0.12  # rad, standard deviation
VIEWS = 48  # of each pair of object and receptacle
HELD_OUT = 8  # of these
EPOCHS = 8
MOST_BYTES = 400_000  # of the sheet
SIDE = 8  # patches along a side of the tiny models' images
START_REGION = np.s_[36:72, 25:64]  # where objects lie in an image of 96 x 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classify", action="store_true", help="train and judge a classifier of the 25 objects")
    parser.add_argument("--tables", action="store_true", help="contrast and detail of each table where objects lie")
    parser.add_argument("--sheet", type=Path, help="write images of the pack to this PNG")
    parser.add_argument("--episode", type=Path, help="write five images of an episode of the small task to this PNG")
    parser.add_argument("--scenes", type=Path, help="write random scenes and what their patches show to this PNG")
    parser.add_argument("--asset_pack", default="builtin", choices=variants.ASSET_PACKS)
    parser.add_argument("--asset_dir", help="folder of the pack `bridge`")
    options = parser.parse_args()
    pack = dict(asset_pack=options.asset_pack, asset_dir=options.asset_dir)
    if options.tables:
        print_tables(pack)
    if options.classify:
        classify(pack)
    if options.sheet:
        write_sheet(pack, options.sheet)
    if options.episode:
        write_episode(pack, options.episode)
    if options.scenes:
        write_scenes(options.scenes)


# ---------------------------------------------------------------------------------------------------------------------
# views and the classifier
# ---------------------------------------------------------------------------------------------------------------------


def classify(pack: dict) -> None:
    """Print the share of held-out views whose object is named, and which objects are mistaken most."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    began = time.perf_counter()
    crops, labels, held_out = views(pack, np.random.RandomState(0))
    print(f"{len(crops)} views in {time.perf_counter() - began:.0f} s, {held_out.sum()} of them held out", flush=True)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels, test = torch.from_numpy(labels), torch.from_numpy(held_out)
    net = train(images[~test], labels[~test])
    with torch.no_grad():
        guess = torch.cat([net(part).argmax(1) for part in images[test].split(512)])
    right = guess == labels[test]
    print(f"{right.float().mean():.4f} of the held-out views named right, {time.perf_counter() - began:.0f} s in all")
    by_object = [(right[labels[test] == k].float().mean().item(), k) for k in range(len(catalog.OBJECTS))]
    for share, k in sorted(by_object)[:5]:
        wrong = guess[(labels[test] == k) & ~right]
        other = catalog.OBJECTS[int(wrong.mode().values)].name if len(wrong) else "none"
        print(f"  {catalog.OBJECTS[k].name}: {share:.3f}, most often taken for {other}")


def train(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A small convolutional net for images float32 [N, 3, 24, 24] and labels int64 [N]."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 36, len(catalog.OBJECTS))),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    batches = EPOCHS * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=batches)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def views(pack: dict, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crops uint8 [N, 24, 24, 3], the index of each object int64 [N], and which are held out, bool [N]."""
    env = gym_env.build(MAIN, image_size=(SIZE, SIZE), sim_freq=100, **pack)
    total = variants.num_start_states(MAIN, "train")
    crops, labels, held_out = [], [], []
    for obj in range(len(catalog.OBJECTS)):
        for receptacle in range(len(catalog.RECEPTACLES)):
            start = variants.decode(MAIN, "train", random.randint(total))
            env.start_episode(replace(start, object_index=obj, receptacle_index=receptacle))
            at_rest = [body.pose for body in env._bodies]
            count = 0
            while count < VIEWS:
                rearrange(env, at_rest, variants.decode(MAIN, "train", random.randint(total)), random)
                crop = crop_of(env)
                if crop is not None:
                    crops.append(crop)
                    labels.append(obj)
                    held_out.append(count >= VIEWS - HELD_OUT)
                    count += 1
    env.close()
    return np.array(crops), np.array(labels), np.array(held_out)


def rearrange(
    env: PutOnPlateInScene, at_rest: list[sapien.Pose], start: variants.StartState, random: np.random.RandomState
) -> None:
    """Put settled bodies to the places of another start state, and take another table and arm pose."""
    turn = yaw_quaternion(random.uniform(0, 2 * np.pi))
    for body, pose, place in zip(env._bodies, at_rest, (start.object_position, start.receptacle_position)):
        rotation = sapien.Pose(q=turn) * sapien.Pose(q=pose.q) if body is env._bodies[0] else sapien.Pose(q=pose.q)
        body.pose = sapien.Pose([*place[:2], pose.p[2]], rotation.q)
    env._overlay = env.pack.table_image(random.randint(len(catalog.TABLES)), SIZE, SIZE)
    qpos = np.array(START_QPOS)
    qpos[:6] += random.normal(0, JOINT_NOISE, 6)
    qpos[6:] = random.uniform(0.015, 0.037)
    env._robot.qpos = qpos.astype(np.float32)


def crop_of(env: PutOnPlateInScene) -> np.ndarray | None:
    """The pixels around the object's middle, uint8 [24, 24, 3]. None if hardly any of it is seen."""
    image = env.render_image()
    ids = env._camera.get_picture("PositionSegmentation")[..., 3]
    if (ids == env._bodies[0].per_scene_id).sum() < FEWEST_PIXELS:
        return None
    model, pose = env.pack.objects[env.start.object_index], env._bodies[0].pose
    middle = pose.p + rotation_matrix(pose.q) @ (np.asarray(model.lower) + np.asarray(model.upper)) / 2
    u, v = pixel_of(middle, SIZE)
    padded = np.pad(image, ((CROP // 2, CROP // 2), (CROP // 2, CROP // 2), (0, 0)), mode="edge")
    top, left = (int(np.clip(round(at), 0, SIZE)) for at in (v, u))
    return padded[top : top + CROP, left : left + CROP]


def pixel_of(point: np.ndarray, size: int) -> tuple[float, float]:
    """Where a square image of this size shows a point of the world: u, v."""
    base = rotation_matrix([0, 0, 0, 1])  # a yaw of 180 degrees
    camera = np.asarray(catalog.ROBOT_BASE_POSITION) + base @ np.asarray(catalog.CAMERA_POSITION)
    x, y, z = (base @ rotation_matrix(catalog.CAMERA_QUATERNION)).T @ (point - camera)
    fx, fy, cx, cy = catalog.CAMERA_INTRINSICS
    return (cx - fx * y / x) * size / catalog.CAMERA_SIZE[0], (cy - fy * z / x) * size / catalog.CAMERA_SIZE[1]


# ---------------------------------------------------------------------------------------------------------------------
# tables
# ---------------------------------------------------------------------------------------------------------------------


def print_tables(pack: dict) -> None:
    """Standard deviation of the brightness, and its mean step between neighbours at 96 x 96, where objects lie."""
    tables = assets.asset_pack(pack["asset_pack"], pack["asset_dir"])
    rows = []
    for index, table in enumerate(tables.tables):
        image = Image.fromarray(tables.table_image(index, *catalog.CAMERA_SIZE)).resize((96, 96), Image.Resampling.BOX)
        grey = (np.asarray(image).astype(float) @ [0.299, 0.587, 0.114])[START_REGION]
        rows.append((grey.std(), (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2))
        print(f"{index:2d} {table.name:20} contrast {rows[-1][0]:5.1f}  detail {rows[-1][1]:5.2f}")
    contrast, detail = np.array(rows).T
    for name, values in (("contrast", contrast), ("detail", detail)):
        print(f"{name}: median {np.median(values):.2f}, mean {values.mean():.2f}, largest {values.max():.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# the sheet
# ---------------------------------------------------------------------------------------------------------------------


def write_sheet(pack: dict, path: Path) -> None:
    """One image of 640 x 480, the 25 objects and 17 receptacles as parts of such, and images of 96 and 64, enlarged."""
    env = gym_env.build(MAIN, image_size=(640, 480), sim_freq=100, **pack)
    whole = mid_episode(env, 0, 0, 3)
    parts = []
    for index in range(len(catalog.OBJECTS)):
        parts.append((part_of(env, index, 0, 0), env.pack.objects[index].name))
    for index in range(len(catalog.RECEPTACLES)):
        parts.append((part_of(env, 14, index, 1), env.pack.receptacles[index].name))
    env.close()
    sheet = Image.new("RGB", (1280, 484 + 4 * 116), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(whole), (0, 0))
    for k, (part, name) in enumerate(parts):
        row, column = divmod(k, 12)
        x, y = column * 106 + 4, 484 + row * 116
        sheet.paste(part.resize((102, 96), Image.Resampling.BOX), (x, y))
        draw.text((x, y + 98), name, fill="black")
    for k, size in enumerate((96, 64)):
        env = gym_env.build(MAIN, image_size=(size, size), sim_freq=100, **pack)
        for i, (obj, table, steps) in enumerate(((0, 0, 0), (13, 10, 6), (18, 6, 12))):
            image = Image.fromarray(mid_episode(env, obj, table, steps))
            sheet.paste(image.resize((208, 208), Image.Resampling.NEAREST), (648 + i * 212, 4 + k * 236))
        draw.text((648, 4 + k * 236 + 210), f"{size} x {size}", fill="black")
        env.close()
    levels = np.asarray(sheet)
    for step in (1, 4, 8, 12, 16, 24, 32):  # fewer shades make a smaller file
        fewer = np.minimum(np.round(levels / step) * step, 255).astype(np.uint8)
        Image.fromarray(fewer).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            break
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, shades {step} levels apart")


def write_episode(pack: dict, path: Path) -> None:
    """Five images of 96 x 96 of an episode by the expert, enlarged, from its start to its success."""
    env = gym_env.build(SMALL, image_size=(96, 96), sim_freq=100, **pack)
    env.start_episode(variants.decode(SMALL, "train", 2000))
    expert, images, success = Expert(), [env.render_image()], False
    while not success and len(images) < 80:
        action = expert(env.describe() | {"elapsed_steps": len(images) - 1})
        action[6] = 1 if action[6] > 0.5 else -1
        _, success = env.advance(torch.from_numpy(action[None]))
        images.append(env.render_image())
    env.close()
    chosen = np.linspace(0, len(images) - 1, 5).round().astype(int)
    strip = Image.new("RGB", (5 * 196 - 4, 192), "white")
    for k, index in enumerate(chosen):
        strip.paste(Image.fromarray(images[index]).resize((192, 192), Image.Resampling.NEAREST), (k * 196, 0))
    strip.save(path, optimize=True)
    print(f"{path}: steps {', '.join(map(str, chosen))}, success {success}")


def write_scenes(path: Path) -> None:
    """Seven random scenes that train_eyes.py shows. Below, patches with the object are red, plate green, tool blue."""
    scenes = Scenes(MAIN, "train", (96, 96), SIDE, seed=0)
    columns = []
    for number in range(7):
        view = next(scenes.views(number))
        shown = (view.shares > 0.03).reshape(SIDE, SIDE, 3).repeat(12, 0).repeat(12, 1)
        tinted = np.where(shown, view.image // 2 + 127, view.image // 2).astype(np.uint8)
        columns.append(np.concatenate([view.image, np.full((4, 96, 3), 255, np.uint8), tinted]))
        columns.append(np.full((196, 4, 3), 255, np.uint8))
    scenes.close()
    strip = Image.fromarray(np.concatenate(columns[:-1], axis=1))
    strip.resize((2 * strip.width, 2 * strip.height), Image.Resampling.NEAREST).save(path, optimize=True)


def mid_episode(env: PutOnPlateInScene, obj: int, table: int, steps: int) -> np.ndarray:
    """The image after some steps of the expert."""
    start = variants.decode(MAIN, "train", 183_316)
    env.start_episode(replace(start, object_index=obj, table_index=table))
    expert = Expert()
    for step in range(steps):
        action = expert(env.describe() | {"elapsed_steps": step})
        action[6] = 1 if action[6] > 0.5 else -1
        env.advance(torch.from_numpy(action[None]))
    return env.render_image()


def part_of(env: PutOnPlateInScene, obj: int, receptacle: int, which: int) -> Image.Image:
    """The part of an image of 640 x 480 around the object (which 0) or the receptacle (which 1)."""
    start = variants.decode(MAIN, "train", 300_000)
    table = (obj * 5 + receptacle * 3) % len(catalog.TABLES)
    env.start_episode(replace(start, object_index=obj, receptacle_index=receptacle, table_index=table))
    u, v = pixel_of(env._bodies[which].pose.p, 1)
    u, v, half = u * 640, v * 480, (68, 64) if which == 0 else (102, 96)
    box = [u - half[0], v - half[1], u + half[0], v + half[1]]
    return Image.fromarray(env.render_image()).crop([round(edge) for edge in box])


if __name__ == "__main__":
    main()
