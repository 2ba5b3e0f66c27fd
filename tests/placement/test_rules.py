"""--placement: its forms, every refusal, and which rank trains on which envs."""

import pytest
from conftest import ROOT

import train_grpo
import train_ppo
from schemas import UserError
from train_ppo import Args
from vla.cli import parse_args, pick
from vla.placement import place
from vla.placement.assignment import goes_ahead
from vla.placement.rules import EVERYWHERE, parse_placement, ranks_by_roles
from vla.start.launch import Launch


def parsed(words: str, ranks: int):
    return parse_placement(words.split(), ranks)


@pytest.mark.parametrize(
    "words, ranks, env, rollout, actor",
    [
        ("env,rollout,actor=all", 16, range(16), range(16), range(16)),
        ("env=0-7 rollout=8-15 actor=0-15", 16, range(8), range(8, 16), range(16)),
        ("env=0-3 rollout=4-7 actor=8-15", 16, range(4), range(4, 8), range(8, 16)),
        ("env=0-3 rollout,actor=4-7", 8, range(4), range(4, 8), range(4, 8)),
        ("env,rollout=0-3 actor=4-7", 8, range(4), range(4), range(4, 8)),
        ("actor=all rollout=1 env=0", 3, range(1), range(1, 2), range(3)),
        ("hybrid", 16, range(8), range(8, 16), range(16)),
        ("apart", 16, range(4), range(4, 8), range(8, 16)),
    ],
)
def test_every_form_is_read(words, ranks, env, rollout, actor):
    placement = parsed(words, ranks)
    assert (placement.env, placement.rollout, placement.actor) == (env, rollout, actor)
    assert placement.together == (words == EVERYWHERE[0])


@pytest.mark.parametrize(
    "words, ranks, sentence",
    [
        ("env:0 rollout=1 actor=all", 2, "'env:0' is not ROLES=RANKS"),
        ("env=0 rollout=1 actor=", 2, "'actor=' is not ROLES=RANKS"),
        ("envs=0 rollout=1 actor=all", 2, "'envs' is no role: name env, rollout or actor"),
        ("env,env=0 rollout=1 actor=all", 2, "names env twice"),
        ("env=0 rollout=1", 2, "has no ranks for actor"),
        ("env=1-0 rollout=2-3 actor=all", 4, "env=1-0 counts down: write 0-1"),
        ("env=0-7 rollout=8-15 actor=all", 8, "rollout=8-15 names rank 15, but 8 were launched: launch at least 16"),
        ("env,rollout=0 actor=1", 3, "gives rank 2 nothing to do"),
        ("env=0-1 rollout=1-2 actor=all", 3, "ranks of env and rollout overlap"),
        ("env=0 rollout=1-2 actor=all", 3, "1 env and 2 rollout ranks, which work in pairs"),
        ("env=0-1 rollout=2-3 actor=1-3", 4, "some ranks of env train and others do not"),
        ("env=0-1 rollout=2-3 actor=0-2", 4, "some ranks of rollout train and others do not"),
        ("env,actor=0 rollout=1", 2, "ranks of env train, but those of rollout do not"),
        ("env=0 rollout=1 actor=1-2", 3, "give actor the ranks of rollout, or others"),
        ("hybrid", 3, "hybrid divides the ranks into 2 equal parts, but 3 were launched"),
        ("apart", 6, "launch a multiple of 4"),
        ("apart actor=all", 4, "'apart' is not ROLES=RANKS: .* hybrid and apart alone"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(words, ranks, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        parsed(words, ranks)
    assert str(refused.value).startswith("--placement") and "\n" not in str(refused.value)


def test_a_file_may_hold_a_list_or_a_mapping(tmp_path):
    for text in ("[env=0, rollout=1, actor=0-1]", "{env: 0, rollout: 1, actor: 0-1}"):
        (tmp_path / "a.yaml").write_text(f"placement: {text}\n")
        assert parse_args(Args, ["--config", str(tmp_path / "a.yaml")], "").placement == (
            "env=0",
            "rollout=1",
            "actor=0-1",
        )


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("yaml/maniskill_*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("form", ["hybrid", "apart"])
def test_every_recipe_takes_every_form(recipe, form):
    """The sizes of all 16 ranks of two nodes: every env is simulated once, acted in once, and trained on once."""
    overlay = f"{ROOT}/yaml/placement_{form}.yaml"
    script = train_grpo if "grpo" in recipe.name else train_ppo
    args = parse_args(script.Args, ["--config", str(recipe), "--config", overlay], "", offline=True)
    assert args.pipeline_stages == 2
    words = " ".join(args.placement)
    flags = pick(args, place.derive_sizes, group_size=getattr(args, "group_size", 1), rank=0, world_size=16)
    ranks = [apart(words, 16, rank) for rank in range(16)]
    sizes = [one.sizes(**flags) for one in ranks]
    for does in ("simulates", "acts"):
        assert sum(size.local_num_envs for one, size in zip(ranks, sizes) if getattr(one, does)) == args.num_envs
    assert sum(size.trained_envs for one, size in zip(ranks, sizes) if one.trains) == args.num_envs


@pytest.mark.parametrize("rollouts", [1, 2, 3, 8, 16])
def test_every_env_is_assigned_once_from_its_rollout_rank_to_its_actor(rollouts):
    for actors in range(1, 17):
        num_envs = rollouts * actors * 2
        words = f"env,rollout=0-{rollouts - 1} actor={rollouts}-{rollouts + actors - 1}"
        placement = parsed(words, rollouts + actors)
        assigned = []
        for part in placement.overlaps(num_envs):
            acted = placement.rollout.index(part.rollout) * (num_envs // rollouts)
            trained = placement.actor.index(part.actor) * (num_envs // actors)
            envs = range(acted + part.acted.start, acted + part.acted.stop)
            assert envs == range(trained + part.trained.start, trained + part.trained.stop)
            assigned += envs
        assert assigned == list(range(num_envs))
        assert placement.keepers(num_envs).keys() == {*placement.rollout}


def apart(words: str, ranks: int, rank: int) -> place.Apart:
    return place.Apart(parsed(words, ranks), Launch(rank, ranks, ranks, rank), None)


def test_sizes_are_those_of_a_ranks_roles():
    args = Args(num_envs=8, num_steps=4, num_minibatches=2, num_eval_envs=4, num_env_workers=3)

    def sizes(words: str, ranks: int, rank: int):
        flags = pick(args, place.derive_sizes, group_size=1, rank=rank, world_size=ranks)
        found = apart(words, ranks, rank).sizes(**flags)
        acted, trained = (found.first_env, found.local_num_envs), (found.first_trained, found.trained_envs)
        return acted, trained, found.local_num_eval_envs

    hybrid, three = "env=0 rollout=1 actor=0-1", "env=0-1 rollout=2-3 actor=4-7"
    assert apart(hybrid, 2, 0).roles == [["0", "simulate and train"], ["1", "act and train"]]
    assert apart("env=1 rollout=2 actor=0-3", 4, 0).roles[0] == ["0, 3", "train"]
    assert [sizes(hybrid, 2, rank) for rank in (0, 1)] == [((0, 8), (0, 4), 2), ((0, 8), (4, 4), 2)]
    assert sizes(three, 8, 1)[0] == sizes(three, 8, 3)[0] == (4, 4)
    assert sizes(three, 8, 6) == ((0, 0), (4, 2), 2)


@pytest.mark.parametrize(
    "words, group_size, sentence",
    [
        ("env,rollout=0-2 actor=3", 1, "--num_envs 8 is not divisible by 3 rollout ranks"),
        ("env,rollout=0-1 actor=2-3", 8, "--group_size 8 does not divide the 4 envs"),
    ],
)
def test_envs_and_groups_stay_whole_on_every_role(words, group_size, sentence):
    flags = pick(Args(num_envs=8, num_minibatches=1), place.derive_sizes, group_size=group_size, rank=0, world_size=4)
    with pytest.raises(UserError, match=sentence):
        apart(words, 4, 0).sizes(**flags)


def test_offload_needs_a_rank_that_acts_and_trains(monkeypatch):
    monkeypatch.setattr(place, "launched", lambda: Launch(0, 2, 2, 0))
    assert isinstance(place.placed(EVERYWHERE, "stage", 0, None), place.Together)
    with pytest.raises(UserError, match="--offload stage makes room"):
        place.placed(("env,rollout=0", "actor=1"), "stage", 0, None)


def test_a_rollout_ahead_needs_a_rank_that_only_acts(monkeypatch):
    monkeypatch.setattr(place, "launched", lambda: Launch(0, 2, 2, 0))
    for words in (EVERYWHERE, ("env=0", "rollout=1", "actor=all"), ("env=0", "rollout,actor=1")):
        with pytest.raises(UserError, match="--rollout_ahead 1 needs ranks that act and do not train"):
            place.placed(words, "none", 1, None)
    assert isinstance(place.placed(("env,rollout=0", "actor=1"), "none", 1, None), place.Apart)
    ahead = [goes_ahead(i, rollout_ahead=1, num_iterations=6, eval_freq=0, save_freq=3) for i in range(6)]
    assert ahead == [True, True, False, True, True, False]  # not before a checkpoint, nor after the last iteration


def test_each_role_needs_its_own_memory_on_a_gpu():
    """An actor has an optimizer and no renderer, a rank that only simulates has neither weights nor an optimizer."""
    from vla.placement.memory import BUFFER, PROCESSES, placed_table, role_plan
    from vla.training.memory_plan import ASSUMED_RENDERER, GIB, Use, make_plan, recipe_of

    recipe = recipe_of(vars(Args(model_path="openvla-tiny", num_envs=8, num_eval_envs=4)))
    three = parsed("env=0 rollout=1 actor=2-3", 4)
    plans = {roles: role_plan(recipe, three, roles) for roles in ranks_by_roles(three)}
    env, rollout, actor = (plans[(role,)] for role in ("env", "rollout", "actor"))
    assert {*env.rollout} == {*env.update} == {Use.CONTEXT, Use.RENDERERS}
    assert (
        Use.RENDERERS not in rollout.rollout and Use.MOMENTS not in rollout.rollout and Use.FORWARD in rollout.rollout
    )
    assert Use.COPY not in actor.update and actor.update[Use.MOMENTS] == make_plan(recipe, 2).update[Use.MOMENTS]
    hybrid = parsed("env=0 rollout=1 actor=all", 2)
    assert Use.COPY in role_plan(recipe, hybrid, ("env", "actor")).rollout
    fits, lines = placed_table(recipe, three, 80.0, 64.0)
    assert fits and lines[-1].startswith("host memory fits: ") and not placed_table(recipe, three, 0.1, 64.0)[0]
    # 4 ranks of 3 GiB each, of which one holds the whole rollout and two a half of it
    assert [plan.host[PROCESSES] for plan in (env, rollout, actor)] == [3 * GIB] * 3
    assert env.host[BUFFER] == 0 and rollout.host[BUFFER] == 2 * actor.host[BUFFER] > 0
    fits, lines = placed_table(recipe, three, 80.0, 12.0)
    assert not fits and lines[-1].startswith("host memory does not fit (1") and "ranks 0-3" in lines[-1]
    assert placed_table(recipe, three, 80.0, 12.0, gpus_per_node=2)[0]  # two nodes

    # with workers: those of training where envs are simulated, and in a hybrid placement those of evaluation elsewhere
    recipe = recipe_of(vars(Args(model_path="openvla-tiny", num_envs=8, num_eval_envs=4, num_env_workers=6)))
    workers = {
        roles: role_plan(recipe, hybrid, roles).rollout[Use.RENDERERS] // ASSUMED_RENDERER
        for roles in (("env", "actor"), ("rollout", "actor"))
    }
    assert [*workers.values()] == [6, 2]
