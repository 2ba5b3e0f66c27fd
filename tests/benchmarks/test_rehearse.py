"""`make rehearse`: the first launch of every published recipe with tiny weights, which changes sizes alone."""

import argparse

import pytest
from conftest import ROOT
from hub_server import serving

import train_grpo
import train_ppo
from benchmarks import rehearse
from vla.cli import derive_sizes, parse_args, pick


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Models and meshes of all recipes."""
    with serving() as served:
        rehearse.publish(served, tmp_path_factory.mktemp("published"))
        yield served


@pytest.mark.slow
@pytest.mark.full  # a minute or two each
@pytest.mark.parametrize("recipe", rehearse.RECIPES)
def test_a_first_launch(recipe, hub, tmp_path):
    steps = rehearse.rehearse(recipe, rehearse.make_cluster(tmp_path / "cluster", hub), print)
    assert not steps[-1].failure, steps[-1]
    assert [step.name for step in steps] == list(rehearse.NAMES)


@pytest.mark.parametrize("recipe", rehearse.RECIPES)
def test_a_rehearsal_changes_nothing_but_sizes(recipe, tmp_path):
    one = rehearse.Rehearsal(recipe, rehearse.Cluster(tmp_path, {}))
    args_class = (train_grpo if "grpo" in recipe else train_ppo).Args
    words = ["--config", str(ROOT / one.preset)]
    own, small = (vars(parse_args(args_class, [*words, *more], "", offline=True)) for more in ([], one.sizes()))
    changed = {name for name, value in own.items() if small[name] != value}
    assert changed <= rehearse.SIZES.keys() | (set() if rehearse.ASSETS.is_dir() else rehearse.BUILTIN.keys())
    sizes = derive_sizes(
        **pick(argparse.Namespace(**{"group_size": 1} | small), derive_sizes, rank=0, world_size=rehearse.RANKS)
    )
    assert sizes.num_iterations == 2 and sizes.num_env_workers == sizes.local_num_envs
