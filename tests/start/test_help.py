"""--help of every script: each flag once, in a titled group, with a whole phrase."""

import dataclasses
import re

import pytest

import collect_demos
import doctor
import evaluate
import train_eyes
import train_grpo
import train_ppo
import train_sft
from vla.cli import parse_args
from vla.start.help import MAX_COLUMNS, flag_groups

SCRIPTS = (train_ppo, train_grpo, train_sft, train_eyes, evaluate, collect_demos)
PREPOSITIONS = "a about above after an as at before below by for from in into of on over per see since that the to with"

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


def printed(script, capsys, *argv: str) -> str:
    """What the script prints for --help and other flags, before it exits with code 0."""
    with pytest.raises(SystemExit) as stop:
        if script is evaluate:
            evaluate.parse([*argv, "--help"])
        else:
            parse_args(script.Args, [*argv, "--help"], script.__doc__)
    assert stop.value.code == 0
    return capsys.readouterr().out


def texts_of(script) -> dict[str, str]:
    """{flag: its docstring}."""
    return {name: text for flags in flag_groups(script.Args).values() for name, text in flags.items()}


@scripts
def test_every_flag_is_in_a_titled_group(script):
    groups = flag_groups(script.Args)
    names = [name for flags in groups.values() for name in flags]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(script.Args))
    assert "" not in groups
    assert next(iter(groups)) == "most used" and len(groups["most used"]) == 10


@scripts
def test_every_flag_says_what_it_does(script):
    """A whole phrase: it begins with a capital letter, not with a preposition or an article, and ends with a period."""
    for name, text in texts_of(script).items():
        first = text.split()[0] if text else ""
        assert first[:1].isupper(), f"--{name}: {text!r}"
        assert first.lower().rstrip(",:") not in PREPOSITIONS.split(), f"--{name} begins with {first!r}"
        assert text.endswith("."), f"--{name} does not end its sentence"
        assert "----" not in text and ";" not in text, f"--{name}: {text!r}"
        for sentence in re.split(r"(?<=[.:]) ", text):
            assert len(sentence.split()) <= 25, f"--{name} has a sentence of {len(sentence.split())} words"


@scripts
def test_no_text_repeats_the_default(script):
    for name, text in texts_of(script).items():
        assert "default" not in text, f"--{name}: --help adds the default itself"


@scripts
@pytest.mark.parametrize("columns", [80, 160])
def test_help_is_printed(script, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = printed(script, capsys)
    below = text[text.index("most used:") :]
    assert max(map(len, below.splitlines())) < min(columns, MAX_COLUMNS)
    assert "python " in text and "----" not in text
    shown = re.findall(r"^  --(\w+)", text, re.M)
    assert sorted(shown) == sorted(texts_of(script))
    words = " ".join(text.split())
    for name, said in texts_of(script).items():
        assert said in words, f"the text of --{name} is cut"


def test_help_shows_types_and_defaults(capsys):
    text = " ".join(printed(train_ppo, capsys).split())
    for part in (
        "--image_size INT INT Width and height",
        "--dtype {float32,bfloat16} ",
        "--auto_reset, --no_auto_reset ",
        "--logger_backends {tensorboard,wandb,swanlab} ... ",
        "--value_clip FLOAT Largest",
        "(default: 640 480)",
        "(default: on)",
        "(default: tensorboard)",
    ):
        assert part in text, part
    assert "default: None" not in text and "default: )" not in text


def test_help_shows_the_values_of_a_preset(capsys):
    text = " ".join(printed(train_ppo, capsys, "--config", "yaml/quickstart_ppo_openvlaoft.yaml").split())
    assert f"--chunk_size INT {texts_of(train_ppo)['chunk_size']} (default: 4)" in text


def test_help_of_doctor():
    """Its own few flags have the same form as those of the scripts."""
    parser = doctor.make_parser()
    assert len(parser._actions) == 9 and parser.format_help().startswith("usage: ")
    for action in parser._actions:
        assert action.help[0].isupper() and re.search(r"\.( \(default: \d+\))?$", action.help), action.option_strings
        assert parser.format_help().count(action.option_strings[-1]) >= 1
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert titles == ["rows", "assets", "memory of a run"]
