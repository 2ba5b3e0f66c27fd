"""Stand-ins for wandb and SwanLab that refuse calls which the real packages would refuse, and keep what they are told.

SIGNATURES holds the parameters of wandb 0.31.0 and SwanLab 0.10.3, in their order. tests/training/test_backends.py
compares them with the installed packages where they are installed.
"""

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

KEYWORD = inspect.Parameter.KEYWORD_ONLY
EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD
SIGNATURES = {
    "wandb": {
        "init": (
            EITHER,
            "entity project dir id name notes tags config config_exclude_keys config_include_keys allow_val_change "
            "group job_type mode force reinit resume resume_from fork_from save_code tensorboard sync_tensorboard "
            "monitor_gym settings",
        ),
        "Run.log": (EITHER, "data step commit"),
        "Run.finish": (EITHER, "exit_code"),
        "Run.config.update": (EITHER, "d allow_val_change"),
        "Video": (EITHER, "data_or_path caption fps format"),
    },
    "swanlab": {
        "init": (
            KEYWORD,
            "reinit log_dir mode workspace project public name color description job_type group tags id resume "
            "parallel config settings callbacks",
        ),
        "Run.log": (EITHER, "data step"),
        "Run.finish": (EITHER, "state error async_log_timeout"),
        "Run.config.update": (EITHER, "_Config__m"),
        "Video": (EITHER, "data_or_path caption"),
        "Text": (EITHER, "content caption"),
    },
}
SETTINGS = {  # those that this project relies on
    "wandb": "x_disable_meta x_disable_machine_info x_disable_stats x_save_requirements disable_git disable_code "
    "console host",
    "swanlab": "probe terminal",
}
PROBES = "hardware runtime requirements conda git swanlab monitor"  # fields of SwanLab's Settings.probe


def parameters_of(package: str, function: str) -> list[inspect.Parameter]:
    """The parameters as they are recorded. All of them may be left out, as far as this stand-in knows."""
    kind, names = SIGNATURES[package][function]
    return [inspect.Parameter(name, kind, default=None) for name in names.split()]


class Tracker(ModuleType):
    """wandb or SwanLab. `told` holds what init() got, `logged` pairs of data and step, `configs` and `ended`."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = True  # as far as find_spec looks
        self.told: list[dict] = []
        self.logged: list[tuple[dict, int]] = []
        self.configs: list[dict] = []
        self.ended = 0
        tracker = self

        class Settings(SimpleNamespace):
            model_fields = dict.fromkeys(SETTINGS[name].split())

        self.Settings = Settings
        self.Video = lambda *args, **named: SimpleNamespace(**tracker.bind("Video", args, named))
        if name == "swanlab":
            self.Text = lambda *args, **named: tracker.bind("Text", args, named)["content"]

    def bind(self, function: str, args: tuple, named: dict) -> dict[str, Any]:
        """Names and values of a call. Raises TypeError if the real function would."""
        return inspect.Signature(parameters_of(self.__name__, function)).bind(*args, **named).arguments

    def init(self, *args: Any, **named: Any) -> SimpleNamespace:
        self.told.append(self.bind("init", args, named))
        config = SimpleNamespace(update=self.update)
        return SimpleNamespace(log=self.log, finish=self.finish, config=config, notes=None)

    def log(self, *args: Any, **named: Any) -> None:
        call = self.bind("Run.log", args, named)
        self.logged.append((call["data"], call["step"]))

    def update(self, *args: Any, **named: Any) -> None:
        self.configs.append(self.bind("Run.config.update", args, named))

    def finish(self, *args: Any, **named: Any) -> None:
        self.bind("Run.finish", args, named)
        self.ended += 1
