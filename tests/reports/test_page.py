"""The engine of pages: text stays text, files are inside the page, axes magnify no noise."""

import json
import re

import jinja2
import pytest

from vla.reports.charts import Dots, curves, dots, plain, stacked_bars
from vla.reports.curves import MAX_POINTS, Curve, normal_interval, steady_range, thinned
from vla.reports.page import Media, State, data_url, origin_of, render

EVIL = "</script><script>alert(1)</script>\u2028<b>&\"'"


def chart(**changes) -> str:
    values = dict(template="evaluation.html", title="t", with_charts=False, headline=["h"], means=[], brackets="b")
    values |= dict(notes=[], chart=dots("c", "C", "good", []), settings=[["setting"]], clips=[], sampling="greedy")
    values |= dict(facts={}, media=None, has_results=True, state=State("stopped", EVIL, 0.0, EVIL, EVIL, EVIL))
    return render(**(values | changes))


def test_a_template_escapes_every_value():
    text = chart(title=EVIL, notes=[EVIL], headline=[EVIL], facts={EVIL: EVIL}, settings=[[EVIL], {"cells": [EVIL]}])
    assert "alert(1)</script>" not in text and text.count("&lt;script&gt;alert(1)") >= 10
    assert "\u2028" not in text and "\udcff" not in chart(title="\udcff")


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        render("evaluation.html", title="t", with_charts=False, state=State("finished", "", 0.0))


def test_only_scripts_of_the_template_may_run():
    """Each page draws a number of its own, and the policy allows no other script and no network."""
    texts = [chart(), chart()]
    nonces = [re.search(r"script-src 'nonce-([\w-]+)'", text)[1] for text in texts]
    assert nonces[0] != nonces[1] and "default-src 'none'" in texts[0]
    for text, nonce in zip(texts, nonces):
        for script in re.findall(r"<script[^>]*>", text):
            assert f'nonce="{nonce}"' in script or "application/json" in script


def test_names_in_a_chart_end_no_script_and_are_no_markup():
    line = Curve(EVIL, [1, 2], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3])
    made = (
        curves("a", "t", "c", [line], x_title=EVIL, percent=True),
        stacked_bars("b", "t", "c", [1, 2], {EVIL: [1, 2]}, x_title=EVIL),
        dots("c", "t", "c", [Dots(EVIL, [EVIL], [0.5], [0.4], [0.6])]),
    )
    for one in made:
        assert "<" not in one.spec and "\u2028" not in one.spec
        assert plain(EVIL) in json.dumps(json.loads(one.spec), ensure_ascii=False).replace('\\"', '"')
        assert "<script" not in json.dumps(json.loads(one.spec))


def test_values_that_are_not_finite_make_no_chart_that_a_browser_refuses():
    spec = json.loads(curves("a", "t", "c", [Curve("x", [1, 2], [0.1, float("nan")])]).spec)
    assert spec["data"][0]["y"] == [0.1, None]


# ---------------------------------------------------------------------- videos
def test_videos_are_in_the_page_until_it_is_large(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, size in (("a.mp4", 60), ("b #1.mp4", 60), ("c.mp4", 30)):
        (tmp_path / "videos" / name).write_bytes(bytes(size))
    media = Media(tmp_path, room=100)
    sources = [media.source(tmp_path / "videos" / name) for name in ("a.mp4", "b #1.mp4", "c.mp4")]
    assert sources[0].startswith("data:video/mp4;base64,AAAA") and sources[2].startswith("data:")
    assert sources[1] == "videos/b%20%231.mp4" and media.linked == ["videos/b #1.mp4"]
    assert media.poster(None) == media.poster(tmp_path / "none.jpg") == ""


def test_a_file_of_another_kind_is_not_inlined(tmp_path):
    with pytest.raises(KeyError):
        data_url(tmp_path / "page.svg")


# ---------------------------------------------------------------------- curves
@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.571, 0.574], (0.4294, 0.7156)),  # half of the magnitude, not 0.003
        ([0.0, 0.001], (0.0, 0.1)),  # never below 0 for what is not negative
        ([-0.2, 0.6], (-0.24, 0.64)),
        ([0.0], (0.0, 0.1)),
    ],
)
def test_an_axis_does_not_magnify_noise(values, expected):
    low, high = steady_range([Curve("x", range(len(values)), values)])
    assert (low, high) == pytest.approx(expected, abs=2e-3)
    assert low <= min(values) and max(values) <= high


def test_an_axis_holds_the_bands():
    low, high = steady_range([Curve("x", [1, 2], [1.0, 1.1], [None, 0.2], [None, 2.0])])
    assert low <= 0.2 and high >= 2.0
    assert steady_range([]) is None and steady_range([Curve("x", [], [])]) is None
    assert steady_range([Curve("x", [1], [0.0])], least=0.0) == (0.0, 1.0)


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 12345])
def test_a_long_curve_is_thinned_and_keeps_its_end(length):
    x = list(range(length))
    thin = thinned(Curve("x", x, x, x, None, color="#123456", markers=True))
    assert len(thin.x) <= MAX_POINTS and thin.x[-1] == length - 1 and thin.y == thin.low == thin.x and thin.high is None
    assert thin.color == "#123456" and thin.markers
    assert length > MAX_POINTS or list(thin.x) == x


def test_the_interval_of_a_mean():
    low, high = normal_interval(1.0, 0.5, 100)
    assert (low, high) == pytest.approx((0.902, 1.098))
    assert normal_interval(1.0, None, 100) == normal_interval(1.0, 0.5, 1) == (None, None)


def test_origin_of_an_old_description():
    facts = origin_of({"command": "train_ppo.py", "num_ranks": 2, "device": "A CPU", "uncommitted_changes": True})
    assert facts["machine"] == "2 ranks on A CPU" and facts["commit"] == "unknown with uncommitted changes"
    assert "started" not in facts and "versions" not in facts
