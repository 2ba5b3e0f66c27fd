"""Random scenes for pre-training: what their labels say is what the images show."""

import numpy as np
import pytest

from envs.put_on_plate import START_QPOS
from envs.views import FACTS, MIDDLE, THINGS, UNIT, VIEWS_PER_SCENE, Scenes, direction_of, finger_angle_of

MAIN = "PutOnPlateInScene25Main-v3"
SIDE = 8


@pytest.fixture(scope="module")
def scenes():
    opened = Scenes(MAIN, "train", (96, 96), SIDE, seed=0)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def drawn(scenes):
    """The views of two scenes, with the state of the simulator behind each."""
    found = []
    for number in range(2):
        for view in scenes.views(number):
            ids = scenes.env._camera.get_picture("PositionSegmentation")[..., 3].copy()
            found.append((view, scenes.env.describe(), ids, [body.per_scene_id for body in scenes.env._bodies]))
    return found


def fact(view, thing: str, name: str) -> float:
    return float(view.facts[FACTS.index((thing, name))])


def place(view, thing: str, axes: str = "xyz") -> np.ndarray:
    return MIDDLE[: len(axes)] + UNIT * np.array([fact(view, thing, axis) for axis in axes])


def test_a_scene_is_a_function_of_its_number(scenes, drawn):
    again = list(scenes.views(1))
    assert len(again) == VIEWS_PER_SCENE
    for view, (first, *_) in zip(again, drawn[VIEWS_PER_SCENE:]):
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(view, first))
    assert not np.array_equal(again[0].image, again[1].image)


def test_facts_are_those_of_the_simulator(drawn):
    for view, state, _, _ in drawn:
        lower, upper = np.asarray(state["object_bbox"])
        assert place(view, "tool") == pytest.approx(state["tcp_pose"][:3], abs=1e-4)
        assert place(view, "receptacle", "xy") == pytest.approx(state["receptacle_pose"][:2], abs=1e-5)
        assert np.linalg.norm(place(view, "object") - state["object_pose"][:3]) <= np.abs([lower, upper]).max() + 1e-4
        angle = direction_of(finger_angle_of(np.array(state["tcp_pose"][3:])))
        assert [fact(view, "tool", "cos"), fact(view, "tool", "sin")] == pytest.approx(angle, abs=1e-3)


def test_shares_count_the_pixels_of_each_patch(drawn):
    for view, _, ids, (obj, receptacle) in drawn:
        assert view.shares.shape == (SIDE * SIDE, len(THINGS)) and view.image.shape == (96, 96, 3)
        for row, column in ((3, 3), (4, 2), (5, 4)):
            patch = ids[12 * row : 12 * row + 12, 12 * column : 12 * column + 12]
            seen = view.shares[SIDE * row + column]
            assert seen[:2] == pytest.approx([(patch == obj).mean(), (patch == receptacle).mean()], abs=1e-6)
    shown = np.mean([view.shares.max(axis=0) > 0.03 for view, *_ in drawn], axis=0)
    assert (shown > 0.9).all(), shown  # nearly every image shows all three


def test_the_arm_roams_approaches_and_holds(drawn):
    """In some views the object is in the air between the fingers, in some the tool is above it, in some elsewhere."""
    apart = np.array([place(view, "tool") - place(view, "object") for view, *_ in drawn])
    aside = np.linalg.norm(apart[:, :2], axis=1)
    heights = np.array([place(view, "object")[2] for view, *_ in drawn])
    held = (aside < 0.03) & (heights > np.median(heights) + 0.02)
    assert held.mean() > 0.1 and (aside < 0.05).mean() > 0.4 and (aside > 0.08).mean() > 0.1
    assert len({view.image.tobytes() for view, *_ in drawn}) == len(drawn)
    openings = [fact(view, "tool", "opening") for view, *_ in drawn]
    assert min(openings) >= 0 and max(openings) <= 1 and len(set(openings)) > len(openings) / 3
    assert START_QPOS[6] == pytest.approx(0.037)


def test_what_other_settings_hold_out_is_not_shown(scenes):
    for number in range(40):
        next(scenes.views(number))
        start = scenes.env.start
        assert start.object_index < 16 and start.receptacle_index == 0 and start.texture_index is None
    assert list(scenes.tables) == list(range(16))
