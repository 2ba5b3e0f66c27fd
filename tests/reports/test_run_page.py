"""report.html and progress.png of run folders: what stands there, in every state, and what a browser makes of it."""

import json
import os
import re
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
from chromium import Page, find_chromium
from run_folders import cloning_folder, ppo_folder, write_clips, write_episodes, write_sessions

from vla.reports.plots import plot_progress
from vla.reports.run_page import breakdowns, changed_flags, gallery, history, tiles_of, write_run_page
from vla.reports.run_record import read_run

STARTED = ("started", 0, "")
EVIL = "</script><img src=x onerror='window.owned=1'><script>window.owned=1</script>"


def page_of(folder: Path) -> str:
    """The text of the page without plotly's script."""
    text = write_run_page(read_run(folder), time.time()).read_text(encoding="utf-8")
    return max(re.split(r"<script nonce=[^>]*>", text), key=lambda part: "<h1>" in part)


def idents(text: str) -> list[str]:
    return re.findall(r'<script type="application/json" id="([\w-]+)-spec">', text)


# ---------------------------------------------------------------------- what stands there
def test_the_page_of_a_ppo_run(tmp_path):
    text = page_of(ppo_folder(tmp_path / "my_run", STARTED, ("finished", 16, "")))
    assert "<h1>my_run</h1>" in text and "PPO on openvla-oft-tiny-warmup in PutOnPlateInScene25Single-v1" in text
    wanted = "success return train-actor-approx_kl train-actor-clip_fraction train-entropy_loss "
    wanted += "train-critic-explained_variance train-actor-grad_norm seconds memory"
    assert sorted(idents(text)) == sorted(wanted.split())
    captions = re.findall(r'<p class="caption">(.*?)</p>', text)
    assert len(captions) == len(idents(text)) and all(caption.startswith("Good: ") for caption in captions)
    for said in ("46.1 %", "[40.1, 52.2] of 256 episodes", "16 / 16", "train_ppo.py --config", "2 ranks on Intel"):
        assert said in text
    assert "6def22310301db0933b695f08a3a17b4f24b9935" in text and "torch 2.13.0" in text


def test_success_before_and_after_and_their_difference(tmp_path):
    before, now, change, returns, done = tiles_of(read_run(ppo_folder(tmp_path / "run")))
    assert (before.label, before.value, now.label) == ("Success before", "46.1 %", "Success now")
    low, high = (float(word.strip("[,]")) for word in change.more.split())
    assert low < float(change.value) < high and now.more.endswith("of 256 episodes")
    assert returns.more == "from 0.586" and done.more.startswith("63,516 env steps in ")


def test_the_page_of_a_run_with_a_placement(tmp_path):
    """Which ranks do what, what crossed between them, and how old the weights were."""
    folder = ppo_folder(tmp_path / "run", STARTED)
    path = folder / "run_from_iteration_000000.json"
    description = json.loads(path.read_text())
    description["roles"] = [["0, 3", "train"], ["1", "simulate and train"], ["2", "act and train"]]
    path.write_text(json.dumps(description))
    text = page_of(folder)
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text[text.index('id="placement"') :])
    assert rows[:3] == [tuple(row) for row in description["roles"]]
    assert not {"wire-seconds", "wire-gib", "rollout-staleness"} & {*idents(text)}  # a run without these metrics

    crossed = {"time/wire_experience": 0.5, "time/wire_experience_gib": 2.0, "time/wire_weights_gib": 0.0}
    lines = [json.loads(line) | crossed | {"rollout/staleness": 1.0} for line in (folder / "metrics.jsonl").open()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = page_of(folder)
    assert {"wire-seconds", "wire-gib", "rollout-staleness"} <= {*idents(again)}
    assert [trace["name"] for trace in spec_of(again, "wire-gib")["data"] if trace.get("name")] == ["experience"]


def test_curves_have_intervals_where_they_are_known(tmp_path):
    """Success from its counts, the held-out return from its episodes, the training return from env/return_std."""
    folder = ppo_folder(tmp_path / "run")
    bands = {ident: spec_of(page_of(folder), ident)["data"] for ident in ("success", "return")}
    assert [len(bands["success"]), len(bands["return"])] == [4, 4]
    assert [len(trace["x"]) for trace in bands["success"]] == [32, 16, 6, 3]
    assert [len(trace["x"]) for trace in bands["return"]] == [0, 16, 0, 3]
    lines = [json.loads(line) | {"env/return_std": 0.5} for line in (folder / "metrics.jsonl").open()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_episodes(folder, 8, {1: 1.0, 2: 0.0, 3: 1.0})
    again = spec_of(page_of(folder), "return")["data"]
    assert [len(trace["x"]) for trace in again] == [32, 16, 2, 3]


def spec_of(text: str, ident: str) -> dict:
    return json.loads(re.search(rf'id="{ident}-spec">(.*?)</script>', text)[1])


def test_the_page_of_a_cloning_run(tmp_path):
    text = page_of(cloning_folder(tmp_path / "clone"))
    wanted = "success return train-loss train-token_accuracy train-action_l1 train-actor-grad_norm seconds"
    assert sorted(idents(text)) == sorted(wanted.split()) and "Cloning on openvla-tiny" in text
    labels = {tile.label: tile for tile in tiles_of(read_run(tmp_path / "clone"))}
    assert labels["Loss"].value == "1.333" and labels["Loss"].more == "from 4.000"
    assert labels["Token accuracy"].value == "60.0 %" and "240 decisions" in labels["Iterations"].more
    assert [trace["name"] for trace in spec_of(text, "success")["data"] if "name" in trace] == ["held-out episodes"]


def test_a_page_before_anything_happened(tmp_path):
    folder = ppo_folder(tmp_path / "run", STARTED)
    for name in ("metrics", "evaluations"):
        (folder / f"{name}.jsonl").unlink()
    text = page_of(folder)
    assert "running" in text and "after iteration 0 of 16" in text and idents(text) == []
    assert (folder / "report.html").stat().st_size < 100_000  # without charts it needs no plotly


def test_an_empty_folder_still_has_a_page(tmp_path):
    assert "<h1>" in page_of(tmp_path)
    for name in ("metrics.jsonl", "sessions.jsonl", "run_from_iteration_000000.json"):
        (tmp_path / name).write_text('{"cut')
    assert "<h1>" in page_of(tmp_path)


def test_seconds_are_stacked_by_stage_and_thinned(tmp_path):
    folder = ppo_folder(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parts = {trace["name"]: trace["y"] for trace in spec_of(page_of(folder), "seconds")["data"]}
    assert list(parts) == ["rollout", "update", "evaluation", "saving and the rest"]
    for place, line in enumerate(map(json.loads, lines)):
        assert sum(values[place] for values in parts.values()) == pytest.approx(line["time/iteration"])
    long = [json.dumps(json.loads(lines[0]) | {"iteration": number}) + "\n" for number in range(1, 1002)]
    (folder / "metrics.jsonl").write_text("".join(long))
    trace = spec_of(page_of(folder), "seconds")["data"][0]
    assert len(trace["x"]) == 91 and trace["x"][-1] == 1001


def test_flags_that_differ(tmp_path):
    """The run's own first: the preset says otherwise, or the command names them. Then those of preset and model."""
    flags = {"learning_rate": 3e-4, "eval_freq": 0, "gamma": 0.9, "chunk_size": 4}
    defaults = {"learning_rate": 1e-4, "eval_freq": 10, "gamma": 0.99, "chunk_size": 1}
    command = "train_ppo.py --config a.yaml --learning-rate 3e-4 --gamma=0.9"
    folder = ppo_folder(tmp_path / "run", flags=flags, defaults=defaults, command=command)
    rows = {row["name"]: row for row in changed_flags(read_run(folder))}
    own = {name: (row["value"], row["of_preset"], row["default"]) for name, row in rows.items() if row["own"]}
    assert own == {"gamma": ("0.9", "", "0.99"), "learning_rate": ("0.0003", "0.0002", "0.0001")}
    assert [name for name, row in rows.items() if not row["own"]] == ["chunk_size", "eval_freq"]
    text = page_of(folder)
    assert "differs from the preset" in text and "yaml/quickstart_ppo_openvlaoft.yaml" in text


def test_keys_are_not_shown(tmp_path):
    key = "hf_abcdefgh12345678"
    text = page_of(ppo_folder(tmp_path / "run", ("failed", 3, "x"), flags={"instruction": key}))
    assert key not in text and "***" in text


def test_success_by_what_is_in_the_scene(tmp_path):
    folder = ppo_folder(tmp_path / "run")
    write_episodes(folder, 0, {1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0}, object="thing {}", table="oak")
    write_episodes(folder, 16, {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}, object="thing {}", table="oak")
    (by_object,) = breakdowns(read_run(folder))  # all tables are the same, and nothing names a receptacle
    assert [(row["name"], row["count"], row["before"], row["now"]) for row in by_object["rows"]] == [
        ("thing 2", 1, "0.0", "100.0"),
        ("thing 3", 1, "0.0", "100.0"),
        ("thing 4", 1, "100.0", "100.0"),
        ("thing 1", 1, "0.0", "0.0"),
    ]
    assert "Success by what is in the scene" in page_of(folder)


def test_pairs_of_the_same_episodes(tmp_path):
    folder = ppo_folder(tmp_path / "run")
    write_clips(folder, 0, {1: 1.0, 2: 0.0, 3: 0.0})
    write_clips(folder, 16, {1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0})
    pairs, alone = gallery(read_run(folder))
    assert [(pair.after.episode_id, pair.change) for pair in pairs] == [(3, "won"), (1, "both"), (2, "neither")]
    assert [clip.episode_id for clip in alone] == [4]
    text = page_of(folder)
    assert text.count("<video") == 7 and text.count('poster="data:image/jpeg') == 7
    (folder / "videos" / "eval_000016" / "1.mp4").unlink()
    (folder / "videos" / "eval_000000" / "2.jpg").unlink()
    assert page_of(folder).count("<video") == 5 and page_of(folder).count("poster=") == 4
    (folder / "videos" / "eval_000016" / "clips.json").write_text("[{}]")
    assert page_of(folder).count("<video") == 0


def test_the_video_is_before_and_after_or_else_the_newest(tmp_path):
    folder = ppo_folder(tmp_path / "run")
    write_clips(folder, 0, {1: 1.0})
    clip = (folder / "videos" / "eval_000000" / "1.mp4").read_bytes()
    for name in ("eval_000000.mp4", "eval_000016.mp4"):
        (folder / "videos" / name).write_bytes(clip)
    assert "The newest evaluation, the same" in page_of(folder)
    (folder / "videos" / "before_after.mp4").write_bytes(clip)
    assert "The first evaluation above the newest one" in page_of(folder)


# ---------------------------------------------------------------------- states
def test_a_running_run_says_so_and_reloads(tmp_path):
    text = page_of(ppo_folder(tmp_path / "run", STARTED, sizes={"num_iterations": 20}))
    assert 'http-equiv="refresh"' in text and 'data-reload="30"' in text and "about 1 min left" in text
    assert ">running<" in text and "deepspeed --num_gpus 2 train_ppo.py --resume" in text


@pytest.mark.parametrize(
    "last, said",
    [
        (("stopped", 9, "SIGTERM"), "SIGTERM asked it to stop"),
        (("failed", 9, "OutOfMemoryError: too big"), "The error: OutOfMemoryError: too big"),
        (("finished", 16, ""), ">finished<"),
    ],
)
def test_a_run_that_ended_says_how(tmp_path, last, said):
    text = page_of(ppo_folder(tmp_path / "run", STARTED, last))
    assert said in text and 'http-equiv="refresh"' not in text and "data-reload" not in text
    assert ("--resume" in text.split('class="tiles"')[0]) == (last[0] != "finished")


def test_a_run_that_was_resumed_twice(tmp_path):
    events = (STARTED, ("stopped", 5, "SIGTERM"), ("started", 5, ""), ("started", 8, ""))
    record = read_run(ppo_folder(tmp_path / "run", *events))
    said = json.loads((record.folder / "run_from_iteration_000000.json").read_text())
    again = record.folder / "run_from_iteration_000008.json"
    again.write_text(json.dumps(said | {"command": "train_ppo.py --resume runs/run"}))
    text = page_of(record.folder)
    assert record.times_resumed == 2 and "resumed twice" in text
    commands = re.findall(r"<dt>(command|resumed by)</dt><dd><code>(.*?)</code>", text)
    assert commands == [("command", said["command"]), ("resumed by", "train_ppo.py --resume runs/run")]
    assert [row["what"] for row in history(record)] == [
        "started",
        "stopped after iteration 5",
        "resumed after iteration 5",
        "killed, or the machine went down",
        "resumed after iteration 8",
    ]


def test_a_run_of_an_older_version(tmp_path):
    folder = ppo_folder(tmp_path / "run")
    assert read_run(folder).phase == "finished"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert read_run(folder).phase == "unknown" and "not finished" in page_of(folder)


# ---------------------------------------------------------------------- the plot
def test_the_plot_of_a_run_has_bands_and_a_title(tmp_path, monkeypatch):
    from vla.reports import plots

    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    name = "run_$x$" + "_of_long_flags" * 9  # a long name is cut, the state of the run never
    record = read_run(ppo_folder(tmp_path / name, STARTED, ("stopped", 16, "SIGTERM")))
    plot_progress(record)
    success, returns = kept[0].axes
    assert kept[0].get_suptitle().startswith(r"run_\$x\$")
    assert kept[0].get_suptitle().endswith("...: stopped after iteration 16 of 16")
    assert len(success.collections) == 2 and success.get_legend() is not None  # a band for each curve
    assert [line.get_label() for line in success.lines] == ["training episodes", "held-out episodes"]
    record.description["roles"] = [["0", "simulate and act"], ["1", "train"]]
    record.description["args"]["rollout_ahead"] = 1
    plot_progress(record)
    assert kept[1].get_suptitle().endswith("\nranks 0: simulate and act; ranks 1: train; 1 rollout ahead")
    low, high = returns.get_ylim()
    assert high - low >= 0.4 and low <= 0.55 and returns.get_ylabel() == "return"


def test_the_plot_is_a_picture(tmp_path):
    assert iio.imread(plot_progress(read_run(ppo_folder(tmp_path / "run")))).std() > 5
    (tmp_path / "empty").mkdir()
    assert plot_progress(read_run(tmp_path / "empty")).stat().st_size > 0


# ---------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def evil_run(tmp_path_factory) -> Path:
    """A run whose every text is a script."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=window.owned=1><script>window.owned=1"
    flags = {"instruction": EVIL, "env_id": EVIL, "model_path": EVIL, "config": [EVIL]}
    more = dict(command=f"train_ppo.py --instruction {EVIL}", device=EVIL, preset={"instruction": EVIL + "2"})
    more |= dict(defaults={"instruction": EVIL}, versions={EVIL: EVIL}, commit=EVIL)
    ppo_folder(folder, STARTED, ("failed", 16, EVIL), flags=flags, **more)
    facts = dict(object=EVIL + "{}", receptacle="{}" + EVIL, table=EVIL + "{}", instruction=EVIL)
    for iteration in (0, 16):
        write_episodes(folder, iteration, {1: 0.0, 2: 1.0}, **facts)
        write_clips(folder, iteration, {1: 0.0, 2: float(iteration > 0)}, instruction=EVIL)
    write_run_page(read_run(folder), time.time())
    return folder


def opened(path: Path, tmp_path: Path, width: int = 1280) -> Page:
    if find_chromium() is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    return Page(path.as_uri(), tmp_path / "profile", width=width)


def wait_until_drawn(page: Page) -> None:
    page.wait_for("document.body.dataset.drawn === 'yes'", seconds=120)


REQUESTS = "performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:'))"


@pytest.mark.slow
def test_no_text_of_a_run_runs_as_a_script(evil_run, tmp_path):
    with opened(evil_run / "report.html", tmp_path) as page:
        wait_until_drawn(page)
        assert page.script("window.owned === undefined")
        assert page.script("document.querySelectorAll('img, main svg image').length") == 0
        assert page.script("document.querySelector('h1').innerText") == evil_run.name
        own = page.script("document.querySelector('#own-flags').innerText")
        assert "window.owned=1</script>" in own
        assert page.script(REQUESTS) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_its_window_and_draws_every_chart(evil_run, tmp_path, width):
    with opened(evil_run / "report.html", tmp_path, width) as page:
        screen = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        page.call("Emulation.setDeviceMetricsOverride", **screen)
        wait_until_drawn(page)
        fits = f"innerWidth === {width} && document.documentElement.scrollWidth <= {width}"
        page.wait_for(fits, seconds=30)  # the browser lays the page out again
        drawn = page.script(
            "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg .trace').length)"
        )
        assert len(drawn) == 9 and min(drawn) >= 1
        inside = (
            "[...document.querySelectorAll('.chart svg')].every(s => s.getBoundingClientRect().right <= innerWidth)"
        )
        page.wait_for(inside, seconds=30)


@pytest.mark.slow
def test_a_clip_plays_on_a_click(evil_run, tmp_path):
    with opened(evil_run / "report.html", tmp_path) as page:
        wait_until_drawn(page)
        assert page.script("[...document.querySelectorAll('video')].every(v => !v.controls && v.poster)")
        page.click(".pair:nth-child(2) .play")
        page.wait_for("[...document.querySelectorAll('video')].some(v => v.currentTime > 0.2 && v.controls)")
        assert page.script("document.querySelectorAll('.play').length") == 3


@pytest.mark.slow
def test_a_running_page_loads_its_newest_version_and_keeps_its_place(tmp_path):
    folder = ppo_folder(tmp_path / "run", STARTED)
    write_run_page(read_run(folder), time.time() - 10_000, silent_after=3600)
    with opened(folder / "report.html", tmp_path) as page:
        wait_until_drawn(page)
        assert page.script("document.querySelector('[data-written]').innerText") == "(3 h ago)"
        assert not page.script("document.getElementById('silent').hidden")  # nobody has written for long
        page.script("scrollTo(0, 500)")
        write_sessions(folder, STARTED, ("stopped", 16, "SIGTERM"))
        write_run_page(read_run(folder), time.time())
        page.script("reloadUnlessBusy()")
        page.wait_for("document.getElementById('phase') && document.getElementById('phase').innerText === 'stopped'")
        wait_until_drawn(page)
        assert page.script("scrollY") == 500 and page.script("wait") == 0


def test_the_page_does_not_need_its_folder_name(tmp_path):
    """A folder that is given by a link has its own name, and the page is written through it."""
    folder = ppo_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(folder)
    assert "<h1>real</h1>" in page_of(tmp_path / "link") and os.path.exists(folder / "report.html")
