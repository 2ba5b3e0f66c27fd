"""What TensorBoard, wandb and SwanLab get from a run, and what they do not get."""

import importlib
import inspect
import json
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from torch.utils.tensorboard import SummaryWriter
from trackers import PROBES, SETTINGS, SIGNATURES, Tracker, parameters_of

from vla.backends import GIF_FRAMES, GIF_WIDTH, gif_of, show_video
from vla.distributed import UserError
from vla.evaluation.video import VideoWriter
from vla.logger import Logger, describe_run

FLAGS = {"seed": 3, "num_eval_episodes": 8, "learning_rate": 1e-4, "critic": "state", "norm_adv": True, "resume": None}
FLAGS |= {"image_size": (96, 96), "model_path": "/home/me/models/openvla-7b", "instruction": "<b>put</b> | it"}


def video(path: Path, frames: int = 3, width: int = 64) -> Path:
    """A video of so many frames, each of another brightness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path) as video:
        for number in range(frames):
            video.add(np.full((64, width, 3), 255 * number // frames, np.uint8))
    return path


def run(folder: Path, backend: str, start: int = 0) -> Logger:
    """A run that is described, evaluated twice with a video, and closed."""
    logger = Logger(folder, True, 4, start, 10 * start, (backend,))
    logger.describe(describe_run(FLAGS, {}, 2))
    for iteration in (start, start + 1):
        video(folder / "videos" / f"eval_{iteration:06d}.mp4")
        means = {"success_once": 0.25 * iteration, "num_episodes": 8, "return": 0.5}
        logger.write_evaluation(iteration, 10 * iteration, means)
        logger.show_videos(iteration, 10 * iteration)
    logger.close()
    return logger


# ---------------------------------------------------------------------- TensorBoard
def test_tensorboard_shows_one_run_by_the_name_of_its_folder(tmp_path):
    run(tmp_path / "runs" / "my_run", "tensorboard")
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert list(found.Runs()) == ["my_run"]
    of_run = found.GetAccumulator("my_run")
    assert [event.value for event in of_run.Scalars("eval/success_once")] == [0.0, 0.25]
    assert [event.step for event in of_run.Images("video/evaluation")] == [0, 10]
    assert of_run.Images("video/evaluation")[0].encoded_image_string.startswith(b"GIF89a")
    texts = {tag: of_run.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode() for tag in RUN_TEXTS}
    assert "commit: " in texts["run"] and "| learning_rate | 0.0001 |" in texts["flags"]
    assert "<b>" not in texts["flags"] and r"\|" in texts["flags"] and "/home" not in texts["flags"]


RUN_TEXTS = ("run", "flags")


def test_tensorboard_gets_the_flags_as_hyperparameters(tmp_path):
    run(tmp_path / "runs" / "my_run", "tensorboard")
    of_run = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().GetAccumulator("runs/my_run")
    content = of_run.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    hparams = parse_session_start_info_plugin_data(content).hparams
    assert hparams["learning_rate"].number_value == 1e-4 and hparams["critic"].string_value == "state"
    assert hparams["image_size"].string_value == "96 96" and hparams["norm_adv"].string_value == "true"
    assert hparams["model_path"].string_value == ".../models/openvla-7b" and "resume" not in hparams


def test_a_resumed_run_of_an_older_version_keeps_its_curves_in_tensorboard(tmp_path):
    old = SummaryWriter(tmp_path / "runs" / "old" / "tensorboard")
    for step in (10, 20, 30):  # the last of them after the checkpoint
        old.add_scalar("train/loss", step, step)
    old.close()
    logger = Logger(tmp_path / "runs" / "old", True, 4, 2, 20)
    logger.write(3, 30, {"train/loss": 33.0}, [], 10)
    logger.close()
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert list(found.Runs()) == ["old"] and not (tmp_path / "runs" / "old" / "tensorboard").exists()
    assert [event.value for event in found.GetAccumulator("old").Scalars("train/loss")] == [10, 20, 33]


def test_a_video_that_is_damaged_ends_no_run(tmp_path, capsys):
    logger = Logger(tmp_path, True, 1)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    show_video(logger.backends, "video/evaluation", broken, 0)
    assert "broken.mp4 is not shown in TensorBoard" in capsys.readouterr().err
    show_video(logger.backends, "video/evaluation", tmp_path / "none.mp4", 0)
    assert capsys.readouterr().err == ""


def test_a_long_video_becomes_a_small_gif(tmp_path):
    content, size = gif_of(video(tmp_path / "long.mp4", frames=2 * GIF_FRAMES + 1, width=2 * GIF_WIDTH))
    assert size[0] == GIF_WIDTH and content.count(b"\x21\xf9\x04") <= GIF_FRAMES  # one such block a frame


# ---------------------------------------------------------------------- wandb and SwanLab
@pytest.fixture(params=["wandb", "swanlab"])
def tracker(request, monkeypatch) -> Tracker:
    """The stand-in, imported in place of the package."""
    found = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, found)
    return found


def test_a_resumed_run_continues_in_its_own_run(tmp_path, tracker):
    name, run_dir = tracker.__name__, tmp_path / "my_run"
    for start in (0, 2):
        Logger(run_dir, True, 4, start, 20, (name,), project_name="mine", experiment_name="first try")
    Logger(tmp_path / "other", True, 4, 0, 0, (name,))
    first, again, third = tracker.told
    assert first["id"] == again["id"] != third["id"] and len(first["id"]) == 21 and first["resume"] == "allow"
    assert (first["project"], first["name"]) == ("mine", "first try")
    assert (third["project"], third["name"]) == ("solovla", "other")


def test_they_get_flags_curves_and_videos(tmp_path, tracker):
    run(tmp_path / "my_run", tracker.__name__)
    (config,) = tracker.configs
    config = config[next(iter(config))]
    assert config["args"]["learning_rate"] == 1e-4 and config["num_ranks"] == 2 and config["commit"]
    assert [step for values, step in tracker.logged if "eval/success_once" in values] == [0, 10]
    videos = [(values["video/evaluation"], step) for values, step in tracker.logged if "video/evaluation" in values]
    assert [step for _, step in videos] == [0, 10] and tracker.ended == 1
    content = videos[1][0].data_or_path
    if tracker.__name__ == "wandb":
        assert content.endswith("videos/eval_000001.mp4") and videos[0][0].format == "mp4"
    else:
        assert content.getvalue().startswith(b"GIF89a")
        assert any("commit: " in values.get("run", "") for values, _ in tracker.logged)


def test_they_collect_nothing_and_learn_no_place_of_this_machine(tmp_path, tracker, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train_ppo.py", "--instruction", "hf_abcdefgh12345678", "--run_dir", "/home/me/a"]
    )
    run(tmp_path / "my_run", tracker.__name__)
    settings = tracker.told[0]["settings"]
    if tracker.__name__ == "wandb":
        assert (settings["console"], settings["host"], settings["x_save_requirements"]) == ("off", "", False)
        assert all(settings[key] for key in settings if key.startswith(("disable_", "x_disable_")))
    else:
        assert settings.terminal == {"proxy_type": "none"} and settings.probe == dict.fromkeys(PROBES.split(), False)
    told = json.dumps([tracker.configs, [values for values, _ in tracker.logged if "run" in values]])
    assert "/home" not in told and str(tmp_path) not in told and "hf_abc" not in told and ".../models/" in told


def test_a_version_that_would_collect_anyway_is_refused(tmp_path, tracker):
    del tracker.Settings.model_fields[SETTINGS[tracker.__name__].split()[0]]
    with pytest.raises(UserError, match=f"run `pip install --upgrade {tracker.__name__}`"):
        Logger(tmp_path, True, 4, 0, 0, (tracker.__name__,))


@pytest.mark.parametrize("content", ["", "{}", '{"id": "../../x"}', '{"id": 3}', "[]"])
def test_a_tracking_file_that_cannot_be_names_itself(tmp_path, tracker, content):
    (tmp_path / "tracking.json").write_text(content)
    with pytest.raises(UserError, match=r"tracking\.json .*: remove it"):
        Logger(tmp_path, True, 4, 0, 0, (tracker.__name__,))


# ---------------------------------------------------------------------- the stand-ins themselves
@pytest.mark.parametrize(("package", "function"), [(p, f) for p in SIGNATURES for f in SIGNATURES[p]])
def test_the_stand_ins_have_the_parameters_of_the_installed_packages(package, function):
    real = pytest.importorskip(package, reason=f"{package} is not installed")
    if function == "Run.config.update":
        place = {"wandb": "wandb.sdk.wandb_config", "swanlab": "swanlab.sdk.internal.run.components.config"}[package]
        found = importlib.import_module(place).Config.update
    else:
        found = reduce(getattr, function.split("."), real)
    named = {name: parameter.kind for name, parameter in inspect.signature(found).parameters.items()}
    recorded = {parameter.name: parameter.kind for parameter in parameters_of(package, function)}
    assert recorded.items() <= named.items()


@pytest.mark.parametrize("package", SETTINGS)
def test_the_installed_packages_have_the_settings(package):
    real = pytest.importorskip(package, reason=f"{package} is not installed")
    assert set(SETTINGS[package].split()) <= real.Settings.model_fields.keys()
    if package == "swanlab":
        assert set(PROBES.split()) <= type(real.Settings().probe).model_fields.keys()
