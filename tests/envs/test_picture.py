"""What the built-in pack looks like: tables, paint on plates, shadows, and boxes that the looks keep to."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from envs import shadows, variants
from envs.assets import paint, shapes
from envs.assets.catalog import OBJECTS, RECEPTACLES, TABLE_HEIGHT, TABLES

MAIN = "PutOnPlateInScene25Main-v3"
START_ROWS, START_COLUMNS = slice(36, 72), slice(25, 64)  # where objects lie in an image of 96 x 96
PLATE = RECEPTACLES[0]


def small(index: int) -> np.ndarray:
    """Table `index` at 96 x 96."""
    return np.asarray(Image.fromarray(paint.table_image(index)).resize((96, 96), Image.Resampling.BOX)).astype(float)


def test_tables_are_as_plain_as_the_photographs():
    """Mean step between neighbouring pixels where objects lie. The published photographs have 0.3 to 5.7, mean 1.6."""
    detail = []
    for index in range(len(TABLES)):
        grey = small(index)[START_ROWS, START_COLUMNS] @ [0.299, 0.587, 0.114]
        detail.append((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2)
        assert grey.std() < 35  # the photographs' largest
    assert max(detail) < 5.7 and np.mean(detail) < 1.6


def test_tables_differ():
    """No two tables are alike: their images at 96 x 96 differ by more than 8 levels on average."""
    images = np.array([small(index) for index in range(len(TABLES))])
    for i in range(1, len(images)):
        assert np.abs(images[:i] - images[i]).mean(axis=(1, 2, 3)).min() > 8


def test_a_table_ends_in_front_of_the_robot():
    """Where objects lie there is table, and the floor is seen in the lower left corner."""
    for index, table in enumerate(TABLES):
        image = paint.table_image(index)
        floor = np.asarray(table.backdrop) * 0.55
        assert np.abs(image[470:, :10].mean(axis=(0, 1)) - floor).max() < 30
        near = image[359, 169:422].astype(float)
        assert np.abs(np.diff(near.mean(axis=1))).max() < 40  # no edge runs through it


@pytest.mark.parametrize("model", [*OBJECTS, *RECEPTACLES], ids=lambda model: model.name)
def test_what_is_seen_keeps_to_the_box(model):
    """Within half a millimetre. Collision shapes are apart, so a look cannot change an episode."""
    for mesh in shapes.meshes_of(model).values():
        assert (mesh.vertices > np.asarray(model.lower) - 5e-4).all()
        assert (mesh.vertices < np.asarray(model.upper) + 5e-4).all()
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-6)
        corners = mesh.vertices[mesh.triangles]
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert ((across * mesh.normals[mesh.triangles].mean(axis=1)).sum(axis=1) > 0).all()  # faces outwards


@pytest.mark.parametrize("model", RECEPTACLES, ids=lambda model: model.name)
def test_paint_on_receptacles_has_no_sides(model):
    """Sides of paint would show as loose dots. So above its foot, a receptacle has steep faces at its outline alone."""
    for mesh in shapes.meshes_of(model).values():
        corners = mesh.vertices[mesh.triangles]
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        steep = np.abs(across[:, 2]) < 0.5 * np.linalg.norm(across, axis=1)
        middle = np.abs(
            corners.mean(axis=1)[steep][:, :2] - (np.asarray(model.lower) + np.asarray(model.upper))[:2] / 2
        )
        share = (middle / (model.size[:2] / 2)).max(axis=1) if len(middle) else np.ones(1)
        assert share.min() > 0.6


@pytest.fixture(scope="module")
def env():
    from envs import gym_env

    with closing(gym_env.build(MAIN, image_size=(96, 96), sim_freq=100)) as made:
        yield made


def test_vertices_are_drawn_once(env):
    """A loader that gives each triangle vertices of its own triples the work of an image."""
    import sapien

    start = variants.decode(MAIN, "train", 183_316)
    env.start_episode(start)
    models = OBJECTS[start.object_index], RECEPTACLES[start.receptacle_index]
    for model, entity in zip(models, env._bodies):
        visual = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        drawn = [len(part.vertices) for shape in visual.render_shapes for part in shape.parts]
        assert drawn == [len(mesh.vertices) for mesh in shapes.meshes_of(model).values()]


def test_a_plate_has_two_colours_and_no_dots(env):
    """At 96 x 96 every pixel of a plate without shadows is close to one of its two colours."""
    env.start_episode(variants.decode(MAIN, "train", 183_316))
    env._casters = []
    seen = env.render_image()
    ids = env._camera.get_picture("PositionSegmentation")[..., 3]
    pixels = seen[ids == env._bodies[1].per_scene_id].astype(int)
    assert len(pixels) > 100
    assert (pixels.min(axis=1) > 20).all() and pixels[:, :2].min() > 150  # none is dark


def shadow_at(height: float, **changes) -> tuple[np.ndarray, shadows.Spot]:
    """What the plate's shadow leaves of white at 96 x 96, when the plate is `height` metres above the table."""
    image = np.full((96, 96, 3), 255, np.uint8)
    ids = np.zeros((96, 96), np.int16)
    pose = (-0.16, 0.0, TABLE_HEIGHT + height, 1.0, 0.0, 0.0, 0.0)
    spot = shadows.spot_of(pose, *shadows.box_of(PLATE), shadows.eye_of(96, 96))
    shadows.darken(image, ids, ids != 0, [], spot)
    return image[..., 0], spot


def test_a_shadow_says_how_high_a_thing_is():
    """Higher: fainter and larger, in the same place. A thing that has fallen off casts none."""
    low, high = shadow_at(0.0), shadow_at(0.15)
    assert low[0].min() < high[0].min() < 250
    assert (low[0] < 255).sum() < (high[0] < 255).sum()
    middles = [
        np.average(np.indices(left.shape).reshape(2, -1), axis=1, weights=255.0 - left.ravel())
        for left, _ in (low, high)
    ]
    np.testing.assert_allclose(*middles, atol=1.0)
    assert (shadow_at(-0.3)[0] == 255).all()


def test_a_shadow_lies_straight_below(env):
    """Lifted by 10 cm, the object leaves its shadow where it lay. Nothing else of the image changes."""
    env.start_episode(variants.decode(MAIN, "train", 183_316))
    obj = env._bodies[0]
    for entity in (obj,):
        pose = entity.pose
        pose.p = [*pose.p[:2], pose.p[2] + 0.1]
        entity.pose = pose
    with_shadow = env.render_image().astype(int)
    casters, env._casters = env._casters, []
    without = env.render_image().astype(int)
    env._casters = casters
    darker = (with_shadow != without).any(axis=-1)
    ids = env._camera.get_picture("PositionSegmentation")[..., 3]
    assert darker.any() and (with_shadow <= without).all()
    assert set(np.unique(ids[darker])) <= {0, env._bodies[1].per_scene_id}  # on table and plate alone
    spot = shadows.spot_of((*obj.pose.p.tolist(), *obj.pose.q.tolist()), *casters[0][1:], shadows.eye_of(96, 96))
    assert darker[int(spot.v), int(spot.u)] or ids[int(spot.v), int(spot.u)] not in (0, env._bodies[1].per_scene_id)


def test_the_batch_draws_the_same_shadows():
    """To the last bit, and whatever the window of the one that draws part of the image only."""
    random = np.random.RandomState(0)
    count = 40
    poses = np.empty((count, 7))
    poses[:, :2] = random.uniform((-0.4, -0.4), (0.1, 0.4), (count, 2))
    poses[:, 2] = TABLE_HEIGHT + random.uniform(-0.02, 0.3, count)
    poses[:, 3:] = random.normal(size=(count, 4))
    poses[:, 3:] /= np.linalg.norm(poses[:, 3:], axis=1, keepdims=True)
    half = random.uniform(0.005, 0.06, (count, 3))
    images = random.randint(0, 256, (count, 48, 64, 3), np.uint8)
    upright = random.rand(count, 48, 64) < 0.2
    eye = shadows.eye_of(64, 48)
    columns = torch.from_numpy(poses).unbind(1), (0.0, 0.0, 0.0), torch.from_numpy(half).unbind(1)
    got = shadows.darkened(torch.from_numpy(images), torch.from_numpy(upright), shadows.spot_of(*columns, eye)).numpy()
    assert (got != images).any(axis=(1, 2, 3)).sum() > count / 2
    for i in range(count):
        image = images[i].copy()
        spot = shadows.spot_of(tuple(poses[i].tolist()), (0.0, 0.0, 0.0), tuple(half[i].tolist()), eye)
        shadows.darken(image, np.zeros((48, 64), np.int16), upright[i], [], spot)
        np.testing.assert_array_equal(got[i], image)
