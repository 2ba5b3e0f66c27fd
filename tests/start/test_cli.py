"""yaml keys become flags; wrong input is named before anything starts."""

from pathlib import Path

import pytest
import yaml

import collect_demos
import train_eyes
import train_grpo
import train_sft
from train_ppo import Args
from vla.backends import check_backends
from vla.cli import check_combinations, check_whole_episodes, derive_sizes, parse_args, pick
from vla.distributed import UserError
from vla.training.engine import read_deepspeed_config

PRESETS = sorted(Path("yaml").glob("*.yaml"))


def parse(*argv: str) -> Args:
    return parse_args(Args, list(argv), "test")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_parses(preset):
    of_script = {"sft": train_sft.Args, "eyes": train_eyes.Args, "demos": collect_demos.Args}
    args_class = train_grpo.Args if "_grpo_" in preset.name else of_script.get(preset.name.split("_")[0], Args)
    args = parse_args(args_class, ["--config", str(preset)], "test", offline=True)
    for key, value in yaml.safe_load(preset.read_text()).items():
        assert getattr(args, key) == (tuple(value) if isinstance(value, list) else value), key


def test_later_flags_win_and_types_are_checked(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 3e-5\nimage_size: [96, 64]\nauto_reset: false\nnum_envs: 4\nvalue_clip: null\n")
    args = parse("--config", str(file), "--num_envs", "6", "--local_rank=1")
    assert args.learning_rate == 3e-5 and args.image_size == (96, 64) and args.auto_reset is False
    assert args.num_envs == 6 and args.value_clip is None and args.local_rank == 1
    assert parse(f"--config={file}").num_envs == 4


def test_unknown_yaml_key_gets_a_suggestion(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("num_env: 4\n")
    with pytest.raises(UserError, match=r"unknown key 'num_env', did you mean 'num_envs'"):
        parse("--config", str(file))


def test_missing_or_broken_config(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        parse("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid yaml"):
        parse("--config", str(tmp_path / "a.yaml"))
    with pytest.raises(UserError, match="flag: value"):
        (tmp_path / "a.yaml").write_text("- 1")
        parse("--config", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--num_envs", "lots"], r"--num_envs: .*'lots'"),
        (["--nun_envs", "4"], r"--nun_envs.*did you mean --num_envs\?"),
        (["--logprob_level", "word"], r"'word'.*--logprob_level.*'token', 'action'"),
        (["--image_size", "96"], r"--image_size"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        parse(*flags)
    assert "\n" not in str(caught.value)


def test_a_preset_of_another_script_says_so():
    with pytest.raises(UserError, match=r"unknown key 'group_size', it is a flag of train_grpo\.py"):
        parse("--config", "yaml/quickstart_grpo_openvlaoft.yaml")


def test_a_wrong_type_in_a_file_names_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("num_envs: lots\n")
    with pytest.raises(UserError, match=rf'^{tmp_path}/a\.yaml has num_envs "lots", but it must be a whole number$'):
        parse("--config", str(tmp_path / "a.yaml"))


SIZES = dict(
    num_envs=16,
    num_steps=40,
    chunk_size=1,
    num_minibatches=4,
    micro_batch_size=20,
    num_iterations=5,
    total_timesteps=None,
    group_size=1,
    num_eval_envs=3,
    num_env_workers=12,
    rank=1,
    world_size=2,
)


def test_sizes():
    sizes = derive_sizes(**SIZES)
    assert (sizes.local_num_envs, sizes.first_env, sizes.env_steps) == (8, 8, 640)
    assert (sizes.minibatch_size, sizes.micro_batches) == (160, 4)
    assert (sizes.num_env_workers, sizes.local_num_eval_envs, sizes.num_eval_env_workers) == (8, 1, 1)
    assert derive_sizes(**SIZES | {"total_timesteps": 2000}).num_iterations == 3
    assert derive_sizes(**SIZES | {"micro_batch_size": 32}).micro_batches == 3  # 32 + 32 + 16


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_envs": 15}, r"--num_envs 15 is not divisible by 2 ranks: use 14 or 16"),
        ({"chunk_size": 48}, r"--num_steps 40 is less than one chunk of 48"),
        ({"group_size": 3}, r"--group_size 3 does not divide the 8 envs of a rank"),
        ({"chunk_size": 3}, r"--num_steps 40 is not a multiple of --chunk_size 3"),
        ({"num_minibatches": 7}, r"--num_minibatches 7 .* use a divisor of 40"),
        ({"total_timesteps": 100}, r"less than one iteration of 640 env steps"),
    ],
)
def test_sizes_that_do_not_divide(change, sentence):
    with pytest.raises(UserError, match=sentence):
        derive_sizes(**SIZES | change)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--clip_ratio_low", "0.3"], "--clip_ratio_low 0.3 is above --clip_ratio_high 0.2"),
        (["--kl_coef", "0.1", "--lora_rank", "0"], "--kl_coef .* give --lora_rank"),
        (["--kl_coef", "0.1", "--lora_path", "x"], "--kl_coef .* --merge_lora"),
        (["--merge_lora"], "--merge_lora has no adapter"),
        (["--recompute_logprobs", "--rollout_ahead", "1"], "--recompute_logprobs would hide that --rollout_ahead 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, sentence):
    args = parse(*flags)
    with pytest.raises(UserError, match=sentence):
        check_combinations(**pick(args, check_combinations))


def test_pick_takes_what_a_function_has_by_keyword_only():
    def function(num_envs, *, seed, gamma=1.0, device=None): ...

    assert pick(parse("--seed", "3"), function, device="cpu") == {"seed": 3, "gamma": 0.99, "device": "cpu"}
    with pytest.raises(TypeError, match="function takes device: no flag and no caller gives it"):
        pick(parse(), function)


@pytest.mark.parametrize("name", ["openvla", "openvlaoft"])
def test_fan_presets_are_the_reproductions_with_fan(name):
    base, fan = (yaml.safe_load(Path(f"yaml/maniskill_ppo_{name}{end}.yaml").read_text()) for end in ("", "_fan"))
    assert fan.keys() - base.keys() == {"fan_coef", "fan_sigma"}
    assert {key: fan[key] for key in base} == base and fan["fan_coef"] > 0


def test_deepspeed_config(tmp_path):
    assert read_deepspeed_config("ds_configs/zero3.json", "float32")["bf16"]["enabled"] is False
    assert read_deepspeed_config("ds_configs/zero3.json", "bfloat16")["bf16"]["enabled"] is True
    file = tmp_path / "a.json"
    for text, sentence in (
        ('{"gradient_clipping": 1.0}', r"sets 'gradient_clipping', which is decided by --max_grad_norm"),
        ('{"bf16": {"enabled": true}}', r"bf16 on but --dtype is float32"),
        ("{", "not valid JSON"),
        ("[1]", r"a\.json holds \[1\], but it must be an object with keys"),
        ('{"bf16": {}, "bf16": {}}', "has the key 'bf16' twice"),
        ('{"zero_optimization": {"stage": "3"}}', r'has zero_optimization\.stage "3", but it must be a whole number'),
        ('{"zero_optimization": {"stage": 1}}', r"has zero_optimization\.stage 1, but it must be 0, 2 or 3"),
        ('{"zero_optimization": null}', "has zero_optimization null, but it must be an object with keys"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', r"device \"nvme\", but it must be 'cpu'"),
        ('{"bf16": {"enabled": "yes"}}', r'has bf16\.enabled.* "yes", but it must be'),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_deepspeed_config(str(file), "float32")
    with pytest.raises(UserError, match=r"zero3\.json"):
        read_deepspeed_config("ds_configs/zero9.json", "float32")


@pytest.mark.parametrize("num_steps, chunk_size, enough", [(20, 1, 40), (36, 4, 40), (32, 16, 48), (39, 13, 52)])
def test_a_rollout_without_whole_episodes_is_refused(num_steps, chunk_size, enough):
    sentence = f"^--num_steps {num_steps} .*--max_episode_steps 40.* use --num_steps {enough}$"
    with pytest.raises(UserError, match=sentence):
        check_whole_episodes(num_steps=num_steps, max_episode_steps=40, chunk_size=chunk_size)
    check_whole_episodes(num_steps=enough, max_episode_steps=40, chunk_size=chunk_size)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_counts_whole_episodes(preset):
    flags = yaml.safe_load(preset.read_text())
    if "num_steps" in flags and not flags.get("auto_reset", "_ppo_" in preset.name):
        check_whole_episodes(**{"chunk_size": 1} | {name: flags[name] for name in ("num_steps", "max_episode_steps")})


def test_a_logger_that_is_not_installed_is_refused():
    with pytest.raises(UserError, match="pip install wandb"):
        check_backends(("tensorboard", "wandb"))


@pytest.mark.parametrize("key", ["zero_optimisation", "Zero_optimization", "zero-optimization"])
def test_a_misspelt_key_of_deepspeeds_is_not_left_out(tmp_path, key):
    (tmp_path / "d.json").write_text(f'{{"{key}": {{"stage": 3}}}}')
    with pytest.raises(UserError, match=f"written with 'zero_optimization' instead of '{key}'"):
        read_deepspeed_config(str(tmp_path / "d.json"), "float32", "none")
