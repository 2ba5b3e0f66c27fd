"""Flags mean what they say: ranges, files of flags, their order, their paths, and what a run is checked for first."""

import ast
import dataclasses
import inspect
import io
import json
import math
import os
import sys
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from launching import python

import collect_demos
import evaluate
import train_eyes
import train_grpo
import train_ppo
import train_sft
from envs import check_envs, every_instruction, make_envs
from envs.vector import VectorEnv
from schemas import check_flags
from vla.cli import derive_sizes, flag_value, flag_values, parse_args, pick
from vla.distributed import UserError
from vla.start import checks, flag_files
from vla.start.flag_files import checked_values, read_yaml, resolved, saved_layer
from vla.start.resume import check_resumed
from vla.training.memory_plan import Recipe, make_plan

SCRIPTS = (train_ppo, train_grpo, train_sft, train_eyes, evaluate, collect_demos)
PRESETS = sorted(ROOT.glob("yaml/maniskill_*.yaml")) + sorted(ROOT.glob("yaml/quickstart_*.yaml"))


def parse(*argv: str) -> train_ppo.Args:
    return parse_args(train_ppo.Args, list(argv), "test")


def flags_of(kind: type) -> list[tuple]:
    """(Args, name) of all flags that take one or several numbers of a kind."""

    def takes(hint: object) -> bool:
        return hint is kind or any(takes(part) for part in typing.get_args(hint))

    return [
        pytest.param(script.Args, name, id=f"{script.__name__}-{name}")
        for script in SCRIPTS
        for name, hint in typing.get_type_hints(script.Args).items()
        if takes(hint)
    ]


def refused(args_class: type, name: str, value: object, sentence: str) -> None:
    """This value is refused, as often as the flag takes one."""
    default = getattr(args_class(), name)
    several = isinstance(default, tuple) or name == "compare"
    value = (value,) * (len(default) if isinstance(default, tuple) and default else 2) if several else value
    with pytest.raises(UserError, match=rf"^--{name} .*must be {sentence}"):
        check_flags(dataclasses.replace(args_class(), **{name: value}))


# ---------------------------------------------------------------------- ranges
@pytest.mark.parametrize("args_class, name", flags_of(float))
def test_every_number_is_finite(args_class, name):
    for value in (math.nan, math.inf):
        refused(args_class, name, value, "a finite number")


@pytest.mark.parametrize("args_class, name", flags_of(float) + flags_of(int))
def test_every_number_has_a_lower_end(args_class, name):
    if name == "ent_coef":  # a penalty
        check_flags(dataclasses.replace(args_class(), ent_coef=-7.0))
    else:
        refused(args_class, name, -7, "(at least|above|a multiple)")


@pytest.mark.parametrize("args_class, name", flags_of(int))
def test_every_whole_number_has_an_upper_end(args_class, name):
    refused(args_class, name, 10**12, "(at most|below|'constant'|1 or 2|1|2)")


@pytest.mark.parametrize("args_class, name", flags_of(str))
def test_no_text_is_empty(args_class, name):
    for value in ("", " "):
        refused(args_class, name, value, "(text that is not empty|a name|an id such as)")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--huber_delta", "0"], "--huber_delta 0.0 must be above 0"),
        (["--chunk_size", "0"], "--chunk_size 0 must be at least 1"),
        (["--value_clip", "0"], "--value_clip 0.0 must be above 0"),
        (["--dual_clip", "1"], "--dual_clip 1.0 must be above 1"),
        (["--clip_ratio_low", "1"], "--clip_ratio_low 1.0 must be below 1"),
        (["--gamma", "1.1"], "--gamma 1.1 must be at most 1"),
        (["--lora_alpha", "0"], "--lora_alpha 0 must be at least 1"),
        (["--lora_rank", "1000000"], "--lora_rank 1000000 must be at most 4096"),
        (["--num_envs", "1000000"], "--num_envs 1000000 must be at most 65536"),
        (["--image_size", "1000000", "1000000"], "--image_size 1000000 1000000 must be at most 4096"),
        (["--sim_freq", "101"], "--sim_freq 101 must be a multiple of 5"),
        (["--resume", ""], "--resume '' must be text that is not empty"),
        (["--run_dir", " "], "--run_dir ' ' must be text that is not empty"),
        (["--config", ""], "--config is empty"),
        (["--config"], "--config has no value"),
        (["--image_size", "96", "96", "96"], "Unrecognized options: 96"),
        (["--image_size", "96"], "--image_size"),
    ],
)
def test_a_flag_out_of_range_is_one_sentence(flags, sentence):
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="--group_size 1 must be at least 2"):
        parse_args(train_grpo.Args, ["--group_size", "1"], "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("flags, said", [(["--nun_envs", "4"], "--num_envs"), (["--num_envs", "lots"], "'lots'")])
def test_a_wrong_flag_is_named_whatever_the_terminal_can_write(monkeypatch, encoding, flags, said):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setenv("COLUMNS", "30")
    with pytest.raises(UserError, match=said):
        parse(*flags)


# ---------------------------------------------------------------------- yaml files
@pytest.mark.parametrize(
    "content, said",
    [
        (b"num_envs: 4\nnum_envs: 8\n", "line 2: the key 'num_envs' occurs twice"),
        (b"num_envs: 4\nnum-envs: 8\n", "line 2: the key 'num-envs' occurs twice"),
        (b"num_envs: {a: {b: 1, b: 2}}\n", "the key 'b' occurs twice"),
        (b"seed: 010\n", 'has seed "010", but it must be a whole number'),
        (b"sim_freq: 1:40\n", 'has sim_freq "1:40", but it must be a whole number'),
        (b"num_envs: true\n", "has num_envs true, but it must be a whole number"),
        (b"num_envs: 8.5\n", "has num_envs 8.5, but it must be a whole number"),
        (b"num_envs:\n", "has num_envs null, but it must be a whole number"),
        (b"num_envs: {a: 1}\n", "it must be a whole number"),
        (b"learning_rate: .nan\n", "has learning_rate NaN, but it must be a finite number"),
        (b"gamma: .inf\n", "has gamma Infinity, but it must be a finite number"),
        (b"auto_reset: 1\n", "has auto_reset 1, but it must be true or false"),
        (b"unnorm_key: ''\n", "it must be text that is not empty"),
        (b'run_dir: "a\\0b"\n', "it must be text without null characters"),
        (b"image_size: 96\n", "has image_size 96, but it must be a list"),
        (b"image_size: [96]\n", "image_size"),
        (b"schedule: off\n", "has schedule false, but it must be 'constant', 'linear' or 'cosine'"),
        (b"- num_envs\n", "must hold `flag: value` lines"),
        (b"# nothing\n", "must hold `flag: value` lines, but is empty"),
        (b"num_envs:\n\t4\n", "yaml indents with spaces, not with tabs"),
        ("seed: 1\n".encode("utf-16"), "is not UTF-8 text"),
        (b"seed: 1 # caf\xe9\n", "is not UTF-8 text"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "is not valid yaml"),
        (b"config: x\n", "belongs on the command line"),
        (b"1: 2\n", "unknown key '1'"),
        (b"? [1, 2]\n: 3\n", "line 1: a key is not text"),
        (b"seed: 1\n? {a: 1}\n: 3\n", "line 2: a key is not text"),
        (b"num_envs: !!binary aGVsbG8=\n", "could not determine a constructor for the tag"),
        (b"seed: !!timestamp 2020-01-01\n", "could not determine a constructor for the tag"),
        (b"logger_backends: !!set {tensorboard}\n", "could not determine a constructor for the tag"),
        (b"image_size: &a [*a, 1]\n", "line 1: an alias of a list is refused"),
        (b"image_size:\n- &a [1]\n- &b [*a, *a]\n- [*b, *b]\n", "line 3: an alias of a list is refused"),
    ],
)
def test_a_wrong_yaml_file_is_one_sentence_that_names_it(tmp_path, content, said):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        parse("--config", str(file))
    assert str(caught.value).startswith(str(file)) and said in str(caught.value) and "\n" not in str(caught.value)


def test_one_number_may_stand_for_another(tmp_path):
    (tmp_path / "a.yaml").write_text("num_envs: &n 8\nnum_eval_envs: *n\n")
    assert read_yaml(tmp_path / "a.yaml") == {"num_envs": 8, "num_eval_envs": 8}


def test_numbers_in_yaml_are_read_as_people_mean_them(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 3e-5\nb: 1.0e-4\nc: -2\nd: 1_000\ne: .5\nf: 2026-11-30\ng: null\nh: [1, 2.5]\ni: yes\n")
    assert read_yaml(file) == dict(a=3e-5, b=1e-4, c=-2, d=1000, e=0.5, f="2026-11-30", g=None, h=[1, 2.5], i=True)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="is not a regular file"):
        parse("--config", str(tmp_path / "pipe.yaml"))


# ---------------------------------------------------------------------- order
def write(path: Path, **flags) -> str:
    path.write_text(yaml.safe_dump(flags))
    return str(path)


def write_run(folder: Path, **flags) -> str:
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(train_ppo.Args(**flags))))
    return str(folder)


def test_files_apply_in_order_and_the_command_line_last(tmp_path):
    one = write(tmp_path / "one.yaml", num_envs=4, seed=1, gamma=0.5)
    two = write(tmp_path / "two.yaml", num_envs=6, seed=2)
    run = write_run(tmp_path / "run", num_envs=2, gamma=0.25, num_steps=7, total_timesteps=50)
    for flags in (["--config", one, "--config", two], ["--config", one, two], [f"--config={one}", f"--config={two}"]):
        args = parse(*flags, "--seed", "3")
        assert (args.num_envs, args.seed, args.gamma, args.config) == (6, 3, 0.5, (one, two))
        args = parse("--resume", run, *flags)
        assert (args.num_envs, args.seed, args.gamma, args.num_steps) == (6, 2, 0.5, 7)
    assert parse("--config", two, "--config", one).num_envs == 4


@pytest.mark.parametrize("spelt", ["--num-iterations", "--num_iterations"])
def test_iterations_win_over_an_older_total(tmp_path, spelt):
    run = write_run(tmp_path / "run", total_timesteps=50)
    args = parse("--resume", run, spelt, "3")
    assert (args.num_iterations, args.total_timesteps) == (3, None)
    file = write(tmp_path / "a.yaml", **{spelt.removeprefix("--"): 4})
    assert parse("--resume", run, "--config", file).total_timesteps is None
    assert parse("--resume", run).total_timesteps == 50
    assert parse("--resume", run, spelt, "3", "--total-timesteps", "70").total_timesteps == 70


def test_hyphens_are_underscores_everywhere(tmp_path):
    file = write(tmp_path / "a.yaml", **{"num-envs": 4, "no-such": 1} | {})
    with pytest.raises(UserError, match="unknown key 'no-such'"):
        parse("--config", file)
    args = parse("--config", write(tmp_path / "b.yaml", **{"num-envs": 4}), "--no-auto-reset", "--image-size", "9", "8")
    assert (args.num_envs, args.auto_reset, args.image_size) == (4, False, (9, 8))
    assert flag_value(["--num-envs=3"], "num_envs") == "3" and flag_values(["--a", "x", "y", "--a=-1"], "a") == [
        "x",
        "y",
        "-1",
    ]


# ---------------------------------------------------------------------- what strangers give us
@pytest.mark.parametrize(
    "flags, said",
    [
        ({"image_size": [32, 32, "--settings", "x.y:Z-v1"]}, "image_size"),
        ({"logger_backends": ["tensorboard", "--num_envs", "4"]}, "logger_backends"),
        ({"env_id": "payload:X-v1"}, "imports code: give --env_id payload:X-v1 yourself"),
    ],
)
def test_a_saved_file_adds_no_flags_and_imports_nothing(tmp_path, flags, said):
    run = Path(write_run(tmp_path / "run"))
    (run / "args.json").write_text(json.dumps(flags))
    file = write(tmp_path / "a.yaml", **flags)
    for argv in (["--resume", str(run)], ["--config", file]):
        with pytest.raises(UserError, match=said):
            parse(*argv)


def test_the_command_line_may_name_a_module(tmp_path):
    file = write(tmp_path / "a.yaml", env_id="my_tasks:X-v1")
    assert parse("--config", file, "--env_id", "my_tasks:X-v1").env_id == "my_tasks:X-v1"


def test_a_text_that_looks_like_a_flag_stays_a_text(tmp_path):
    file = write(tmp_path / "a.yaml", instruction="--num_envs", unnorm_key="-h")
    args = parse("--config", file)
    assert (args.instruction, args.unnorm_key, args.num_envs) == ("--num_envs", "-h", 128)


@pytest.mark.parametrize("content", ["", '{"num_envs": 4', "[]", '{"num_envs": "4"}', '{"num_envs": 4, "num_envs": 5}'])
def test_a_damaged_args_json_is_named(tmp_path, content):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(UserError, match=r"args\.json"):
        parse("--resume", str(tmp_path))


# ---------------------------------------------------------------------- paths
def test_paths_lead_from_the_repository_whatever_the_working_directory(tmp_path, monkeypatch):
    preset = "yaml/quickstart_ppo_openvlaoft.yaml"
    monkeypatch.chdir(ROOT)
    args = parse("--config", preset)
    assert args.model_path == "checkpoints/openvla-oft-tiny-warmup"  # kept relative where it leads from here
    monkeypatch.chdir(tmp_path)
    args = parse("--config", preset)
    assert args.model_path == str(ROOT / "checkpoints/openvla-oft-tiny-warmup")
    assert Path(args.deepspeed_config).is_file()
    typed = parse("--model_path", "checkpoints/openvla-tiny-warmup")
    assert typed.model_path == str(ROOT / "checkpoints/openvla-tiny-warmup")
    (tmp_path / "checkpoints/openvla-tiny-warmup").mkdir(parents=True)
    typed = parse("--model_path", "checkpoints/openvla-tiny-warmup")
    assert typed.model_path == str(tmp_path / "checkpoints/openvla-tiny-warmup")
    sft = parse_args(train_sft.Args, ["--config", "yaml/sft_tiny_openvla.yaml"], "")
    assert sft.demos == "demos/tiny" or Path(sft.demos) == ROOT / "demos/tiny"  # where there is one
    assert sft.model_path == str(ROOT / "checkpoints/tiny-eyes")
    eyes = parse_args(train_eyes.Args, ["--config", "yaml/eyes_tiny.yaml"], "")
    assert eyes.model_path == "openvla-tiny"  # random weights, no path
    made = parse_args(collect_demos.Args, ["--config", "yaml/demos_tiny.yaml"], "")
    assert made.output == str(ROOT / "demos/tiny")


def test_a_run_keeps_paths_that_lead_from_anywhere(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(project)
    args = parse("--model_path", "models/mine")
    run = write_run(project / "runs/run", **dataclasses.asdict(args))
    monkeypatch.chdir(tmp_path)
    assert parse("--resume", run).model_path == str(project / "models/mine")
    old = write_run(project / "runs/old", model_path="models/mine")  # from the time before: relative, from elsewhere
    assert checked_values(saved_layer(Path(old)), train_ppo.Args, None)["model_path"] == str(project / "models/mine")


def test_a_run_that_goes_on_elsewhere_has_changed_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse("--lora_path", "checkpoints/openvla-tiny-warmup", "--model_path", "checkpoints/openvla-tiny-warmup")
    run = write_run(tmp_path / "run", **dataclasses.asdict(args))
    monkeypatch.chdir(tmp_path)
    assert check_resumed(Path(run), dataclasses.asdict(parse("--resume", run))) == []
    assert parse("--resume", "run").lora_path == str(ROOT / "checkpoints/openvla-tiny-warmup")


def test_names_of_tiny_presets_are_no_paths(tmp_path, monkeypatch):
    (tmp_path / "openvla-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse().model_path == "openvla-tiny"
    assert resolved("model_path", "openvla-oft-tiny", (tmp_path,)) == "openvla-oft-tiny"
    assert evaluate.find_checkpoint("openvla-tiny") == (Path("openvla-tiny"), {})


# ---------------------------------------------------------------------- pick
def calls_of_pick(script) -> list[tuple[str, set[str]]]:
    """Of every pick(args, f, ...) in a script: f, and the keywords that the call gives besides flags."""
    tree = ast.parse(inspect.getsource(script))
    dicts: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(node.value, ast.Call):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if getattr(node.value.func, "id", "") == "dict" and isinstance(target, ast.Name):
                dicts.setdefault(target.id, set()).update(word.arg for word in node.value.keywords)
    for function in tree.body:  # def check_start(args, **of_world): what its callers give
        if isinstance(function, ast.FunctionDef) and function.args.kwarg:
            given = dicts.setdefault(function.args.kwarg.arg, set())
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function.name:
                    for word in node.keywords:
                        given |= {word.arg} if word.arg else dicts[word.value.id]
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pick":
            given = {word.arg for word in node.keywords if word.arg}
            for word in node.keywords:
                if word.arg is None:
                    given |= dicts[word.value.id]
            calls.append((ast.unparse(node.args[1]), given))
    return calls


@pytest.mark.parametrize("script", [train_ppo, train_grpo, train_sft], ids=lambda script: script.__name__)
def test_every_pick_gives_every_keyword(script):
    calls = calls_of_pick(script)
    assert len(calls) > 5
    for name, given in calls:
        function = vars(script).get(name) or getattr(script.Demos, name.rpartition(".")[2])
        pick(script.Args(), function, **dict.fromkeys(given))  # raises where one is missing


def test_what_nobody_gives_is_an_error():
    def renamed(*, learning_rates=1e-3): ...

    with pytest.raises(TypeError, match="learning_rates: no flag and no caller gives it"):
        pick(train_ppo.Args(), renamed)


# ---------------------------------------------------------------------- presets on many ranks
def args_of(preset: Path):
    script = train_grpo if "_grpo_" in preset.name else train_ppo
    return parse_args(script.Args, ["--config", str(preset)], "", offline=True)


@pytest.mark.parametrize("ranks", [8, 16, 32])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_starts_on_many_ranks(preset, ranks):
    args = args_of(preset)
    if preset.stem == "quickstart_ppo_openvlaoft" and ranks == 32:
        ranks = 16  # it has 16 envs
    given = {"group_size": getattr(args, "group_size", 1), "rank": ranks - 1, "world_size": ranks}
    if "grpo" in preset.stem and args.num_envs // ranks % args.group_size:
        with pytest.raises(UserError, match="does not divide"):
            derive_sizes(**pick(args, derive_sizes, **given))
        return
    sizes = derive_sizes(**pick(args, derive_sizes, **given))
    own = dict(auto_reset=True, ignore_terminations=False, asset_pack="builtin", asset_dir=None)  # no network here
    own |= dict(num_env_workers=sizes.num_env_workers, first_env=sizes.first_env, privileged=False)
    check_envs(args.env_id, sizes.local_num_envs, **pick(args, make_envs, **own))
    own["num_env_workers"] = sizes.num_eval_env_workers
    check_envs(args.env_id, sizes.local_num_eval_envs, **pick(args, make_envs, **own))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_a_memory_plan_on_many_ranks(preset, monkeypatch):
    """Of one-layer models in the place of 7B ones: what is looked at is whether the plan can be made."""
    monkeypatch.setattr("vla.training.memory_plan.OPENVLA_7B", small_openvla())
    flags = vars(args_of(preset))
    known = {field.name for field in dataclasses.fields(Recipe)} & flags.keys() - {"critic", "model_path"}
    recipe = Recipe(
        **{name: flags[name] for name in known},
        model_path=f"none/{preset.stem}",
        critic="_ppo_" in preset.stem,
        zero_stage=3,
        cpu_adam=False,
    )
    plans = [make_plan(recipe, ranks) for ranks in (8, 16, 32) if flags["num_envs"] % ranks == 0]
    assert plans and all(plan.peak("update") > 0 for plan in plans)
    if "maniskill_ppo" in preset.stem:  # 16 workers are asked for, and 16, 8 and 4 envs are there
        workers = [plan.host["processes (assumed)"] for plan in plans]
        assert workers[0] > workers[1] > workers[2]


def small_openvla() -> dict:
    from vla.models.tiny import TINY_OPENVLA
    from vla.training.memory_plan import OPENVLA_7B

    return {**TINY_OPENVLA, "pad_to_multiple_of": OPENVLA_7B["pad_to_multiple_of"]}


# ---------------------------------------------------------------------- before a model and a simulator
def test_prompts_get_the_room_that_the_longest_instruction_needs(capsys):
    model = str(ROOT / "checkpoints/openvla-tiny-warmup")
    assert checks.prompt_room(model, {"put carrot on plate"}, 21) == 21 and not capsys.readouterr().out
    assert checks.prompt_room(model, {"push the cube away"}, 21) == 25
    assert "prompts have 25 tokens instead of 21" in capsys.readouterr().out
    with pytest.raises(UserError, match="shorten it"):
        checks.prompt_room(model, {"push " * 3000}, 21)


@pytest.mark.parametrize("preset", sorted(ROOT.glob("yaml/quickstart_*.yaml")), ids=lambda path: path.stem)
def test_no_preset_gets_longer_prompts(preset):
    args = args_of(preset)
    told = every_instruction(args.env_id, args.obj_set, args.instruction)
    assert checks.prompt_room(str(ROOT / args.model_path), told, args.max_prompt_length) == args.max_prompt_length


def test_every_instruction_of_the_family():
    one = every_instruction("PutOnPlateInScene25Single-v1", "train", None)
    assert one == {"put carrot on plate"}
    assert len(every_instruction("PutOnPlateInScene25Instruct-v1", "test", None)) == 16 * 16
    assert every_instruction("PickCube-v1", "train", "push it") == {"push it"}


def test_sizes_that_no_memory_holds(monkeypatch):
    monkeypatch.setattr(checks, "host_memory", lambda: 64 * 2**30)
    checks.check_rollout_memory("openvla-tiny", 100_000)
    with pytest.raises(UserError, match=r"--num_envs and --num_steps ask for at least \d+ GiB .* has 64: lower them"):
        checks.check_rollout_memory("openvla-tiny", 10**8)
    checks.check_scene_memory(128, 16, (640, 480), "--num_envs")
    with pytest.raises(UserError, match="--num_envs ask for at least"):
        checks.check_scene_memory(65536, 0, (640, 480), "--num_envs")
    with pytest.raises(UserError, match="--num_env_workers ask for at least"):
        checks.check_scene_memory(1024, 1024, (96, 96), "--num_env_workers")
    assert math.isfinite(checks.host_memory())


def test_iterations_that_were_made_already(tmp_path, capsys):
    checkpoint = tmp_path / "run/checkpoints/iteration_000005"
    checks.check_iterations_left(checkpoint, 6, "--num_iterations")
    checks.check_iterations_left(None, 1, "--num_iterations")
    assert not capsys.readouterr().out
    checks.check_iterations_left(checkpoint, 5, "--num_iterations")
    assert "has finished all 5 iterations: raise --num_iterations for more" in capsys.readouterr().out
    with pytest.raises(UserError, match="has finished 5 iterations, but --num_iterations asks for 2"):
        checks.check_iterations_left(checkpoint, 2, "--num_iterations")


@pytest.mark.parametrize(
    "module, said",
    [("no_such_module:X-v1", "there is no module no_such_module"), ("PickCube-v1", "needs an instruction")],
)
def test_an_env_is_checked_without_a_simulator(module, said):
    args = train_ppo.Args(env_id=module, instruction="x" if ":" in module else None)
    settings = pick(args, make_envs, first_env=0, privileged=False)
    with pytest.raises(ValueError, match=said):
        check_envs(args.env_id, 4, **settings)


def test_a_wrong_start_from_elsewhere_ends_with_one_sentence_and_nothing_written(tmp_path):
    flags = ["--config", "yaml/quickstart_ppo_openvlaoft.yaml", "--num_envs", "15"]
    flags += ["--num_steps", "256", "--num_minibatches", "7", "--run_dir", "run"]
    ended = python(ROOT / "train_ppo.py", *flags, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("error:") == 1, ended.stderr
    assert "--num_minibatches 7 does not split" in ended.stderr and "Traceback" not in ended.stderr
    assert not [*tmp_path.iterdir()]


def test_files_of_flags_are_known_to_the_module():
    """Every flag that names a file or folder is resolved."""
    names = {name for script in SCRIPTS for name in typing.get_type_hints(script.Args)}
    paths = {name for name in names if name.endswith(("_path", "_dir", "_config")) or name in ("demos", "output")}
    assert paths <= {*flag_files.INPUTS, *flag_files.OUTPUTS}


@pytest.mark.parametrize("words", [["--auto_reset", "False"], ["--auto-reset=true"], ["--no_auto_reset", "1"]])
def test_a_switch_takes_no_value(words):
    flag = words[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
    with pytest.raises(UserError, match=f"^{flag} takes no value"):
        parse(*words)


def test_a_home_is_one_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("lora_path: ~/adapters/a\n")
    args = parse("--config=~/mine.yaml", "--run_dir=~/runs/a", "--asset_dir", "~")
    assert args.lora_path == f"{tmp_path}/adapters/a" and args.run_dir == f"{tmp_path}/runs/a"
    assert args.asset_dir == str(tmp_path)
    with pytest.raises(UserError, match="starts with a home folder that this machine does not know"):
        parse("--run_dir", "~nobody_of_this_name/runs")


def test_a_blank_in_a_value_is_shown():
    with pytest.raises(UserError, match="--env_id 'PickCube-v1 ' must be an id"):
        parse("--env_id", "PickCube-v1 ")


@pytest.mark.parametrize("value, sentence", [(9.0, "check the units"), (math.nan, "actions must be finite")])
def test_actions_of_other_statistics_are_the_users_to_mend(value, sentence):
    """dataset_statistics.json of another robot, or in other units, is found by the first action."""
    with pytest.raises(UserError, match=sentence):
        VectorEnv._checked(None, [[[value] * 7]], 1)
