"""What an iteration costs in each placement of env, rollout and actor, by the parts of benchmarks/cost_model.py.

benchmarks/recipe_costs.py prints it. A rollout rank has n envs and decides T times in each:

    one pipeline stage      T x (act(n) + simulate(n))
    two stages              T x the longest of: 2 act(n/2), act(n/2) + simulate(n/2), and all simulation on all cores
    an iteration            rollout + update + what is sent
    --rollout_ahead 1       the longer of rollout and update, + what is sent

Where one rank acts and another one simulates, simulate() also makes images small and sends them. Ranks that simulate
share the cores and workers of their machine.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks import cost_model, flops
from benchmarks.cost_model import Assumed, Inputs
from schemas import UserError
from vla.placement.rules import Placement, parse_placement
from vla.training.engine import read_deepspeed_config, zero_stage
from vla.training.rollout_buffer import RolloutBuffer

# bytes per second of one sender over gloo: messages of 2.4 MB between two processes of one machine (dev/LOG.md)
WIRE = 0.6e9
# env steps/s on 8 GPUs, hybrid over apart, of RLinf (arXiv 2510.06710, section V-B)
PUBLISHED_HYBRID = 1.88
GPUS = 8


class Form(NamedTuple):
    """A placement of 8 GPUs. Further ranks have no GPU, and simulate."""

    name: str
    words: str
    stages: int = 1
    ahead: bool = False
    ranks: int = GPUS


TOGETHER, HYBRID, APART = "env,rollout,actor=all", "env=0-3 rollout=4-7 actor=all", "env=0-1 rollout=2-3 actor=4-7"
FORMS = (
    Form("together (default)", TOGETHER),
    Form("together, two pipeline stages", TOGETHER, 2),
    Form("hybrid", HYBRID, 2),
    Form("simulators of their own", "env=0-3 rollout,actor=4-7", 2),
    Form("an update of its own", "env,rollout=0-3 actor=4-7"),
    Form("the same, one rollout ahead", "env,rollout=0-3 actor=4-7", 1, True),
    Form("apart", APART, 2),
    Form("apart, one rollout ahead", APART, 2, True),
    Form("simulators on 8 more machines without GPUs", "env=8-15 rollout,actor=0-7", 2, ranks=16),
)


class Simulator(NamedTuple):
    """How long it simulates. With `call`, an action of n envs takes call + n x env seconds on a GPU."""

    name: str
    times: float = 1.0  # of the seconds that were measured
    call: float = 0.0
    env: float = 0.0


SIMULATORS = (
    Simulator("as measured"),
    Simulator("5 times as slow", times=5.0),
    Simulator("25 times as slow", times=25.0),
    Simulator("on GPUs, 0.1 s + 2 ms for each env (a guess)", call=0.1, env=0.002),
)


class Iteration(NamedTuple):
    """Seconds, and bytes that cross from rank to rank."""

    rollout: float
    update: float
    whole: float
    observations: float
    experience: float
    weights: float


class Costs(NamedTuple):
    """Where the parts of a recipe come from. cores: of a GPU's share of the host."""

    inputs: Inputs
    flags: dict
    cores: float
    assumed: Assumed
    simulator: Simulator = SIMULATORS[0]

    def act(self, envs: float, busy: int) -> float:
        """Seconds of one decision."""
        return cost_model.act_seconds(self.inputs, self.flags, envs, busy, self.assumed)

    def decide(self, envs: float, busy: int) -> float:
        """Seconds of one decision, with what is done to images and tokens."""
        return self.act(envs, busy) + cost_model.rest_seconds(self.inputs, self.flags, envs, busy)

    def on_a_core(self, ranks: int, cores: float) -> float:
        """Seconds of one env and decision."""
        costs = cost_model.env_costs(self.inputs, self.flags, cost_model.at_once(self.flags, ranks, cores), "cpu")
        times = self.simulator.times
        slower = replace(costs, step=times * costs.step, reset=times * costs.reset)
        return slower.decision(self.flags["chunk_size"])

    def simulate(self, envs: int, workers: int, ranks: int, cores: float) -> float:
        """Seconds of one decision of so many envs on each of so many ranks."""
        if self.simulator.call:  # it has no workers
            return self.flags["chunk_size"] * (self.simulator.call + envs * self.simulator.env)
        transport = cost_model.transport_seconds(self.inputs, self.flags, envs)
        one = self.on_a_core(ranks, cores)
        return max(-(-envs // workers) * one, envs * one / min(workers, cores)) + transport

    def to_a_partner(self, envs: int, image_bytes: int) -> float:
        """Seconds to make images small and to send them."""
        found = self.inputs.find("resize", image_size=list(self.flags["image_size"]))
        return envs * ((found["seconds"] if found else 0.0) + image_bytes / WIRE)


def rollout_seconds(costs: Costs, placement: Placement, stages: int, image_bytes: int) -> float:
    """Of all decisions, and of the value after the last one."""
    flags, simulating, on_a_gpu = costs.flags, len(placement.env), costs.simulator.call > 0
    envs, decisions = flags["num_envs"] // len(placement.rollout), flags["num_steps"] // flags["chunk_size"]
    share = GPUS / simulating  # of the cores and workers of 8 GPUs' machines
    cores, workers = costs.cores * share, max(1, min(int(flags["num_env_workers"] * share), envs))
    busy, half = len(placement.rollout), -(-envs // 2)
    last = costs.act(envs, busy)
    if placement.env == placement.rollout and stages == 1:
        return decisions * (costs.decide(envs, busy) + costs.simulate(envs, workers, simulating, cores)) + last
    acting_half, simulated = costs.decide(half, busy), costs.simulate(half, max(1, workers // 2), simulating, cores)
    if placement.env != placement.rollout:
        together, waiting = 0.0, simulated + costs.to_a_partner(half, image_bytes)
    else:  # one core or GPU does both, but no two things at once
        together, waiting = 2 * acting_half, simulated
    on_cores = 0.0 if on_a_gpu else (together + envs * costs.on_a_core(simulating, cores)) / cores
    on_gpu = together + 2 * simulated if on_a_gpu else 0.0
    return decisions * max(2 * acting_half, acting_half + waiting, on_cores, on_gpu) + last


def iteration(costs: Costs, form: Form) -> Iteration:
    """Raises UserError: this is not for the recipe's envs, or not for this simulator."""
    if costs.simulator.call and form.ranks > GPUS:
        raise UserError("a simulator on GPUs needs a machine with GPUs")
    flags, placement = costs.flags, parse_placement(form.words.split(), form.ranks)
    actors, num_envs = len(placement.actor), flags["num_envs"]
    for ranks in (len(placement.rollout), actors):
        if num_envs % (ranks * flags.get("group_size", 1)):
            raise UserError(f"{num_envs} envs in groups of {flags.get('group_size', 1)} are not for {ranks} ranks")
    policy, decisions = flops.meta_policy_of(flags), flags["num_steps"] // flags["chunk_size"]
    image_bytes = 3 * policy.image_size[0] * policy.image_size[1]
    with torch.device("meta"):
        buffer = RolloutBuffer.of(policy, decisions, num_envs)
    moved = sum(
        part.acted.stop - part.acted.start for part in placement.overlaps(num_envs) if part.rollout != part.actor
    )
    experience = sum(field.nbytes for field in buffer.fields.values()) * moved / num_envs
    observations = 0.0 if placement.env == placement.rollout else float(num_envs * decisions * image_bytes)
    weights = flops.num_bytes(policy, trained=True) if placement.sends_weights else 0.0
    stage = zero_stage(read_deepspeed_config(flags["deepspeed_config"], flags["dtype"], flags["offload"]))
    talk = cost_model.communication(costs.inputs, flags, stage, actors, costs.assumed)
    between = weights / costs.assumed.bandwidth if weights else talk["iteration"]
    rollout = rollout_seconds(costs, placement, form.stages, image_bytes)
    alone = flags | {"pipeline_stages": 1}
    update = cost_model.predict(costs.inputs, alone, actors, costs.cores, costs.assumed)["update"]
    sent = between + experience / len(placement.rollout) / WIRE
    whole = (max(rollout, update) if form.ahead else rollout + update) + sent
    return Iteration(rollout, update, whole, observations, experience, weights)


def try_iteration(costs: Costs, form: Form) -> Iteration | None:
    """None: this is not possible."""
    try:
        return iteration(costs, form)
    except UserError:
        return None


# ---------------------------------------------------------------------- tables
def relative(costs: Costs, forms: tuple[Form, ...] = FORMS) -> list[float | None]:
    """Env steps per second of each form, over those of the first."""
    found = [try_iteration(costs, form) for form in forms]
    return [None if one is None else found[0].whole / one.whole for one in found]


def matrix(corner: str, columns: dict[str, list[str]]) -> list[str]:
    """Markdown: a row for each form."""
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for number, form in enumerate(FORMS):
        lines.append(f"| {form.name} | " + " | ".join(cells[number] for cells in columns.values()) + " |")
    return lines


def shown(values: list[float | None]) -> list[str]:
    """Two digits, the largest of all bold."""
    best = max(f"{value:.2f}" for value in values if value is not None)
    texts = ["-" if value is None else f"{value:.2f}" for value in values]
    return [f"**{text}**" if text == best else text for text in texts]


def crossing(one: Iteration | None) -> str:
    """GB of images, of experience and of weights."""
    if one is None:
        return "-"
    sizes = (one.observations, one.experience, one.weights)
    return " + ".join(f"{size / 1e9:.1f}" if size else "0" for size in sizes)


def tables(recipes: dict[str, Costs], card: str) -> list[str]:
    """Speed of each form, what crosses, and which form wins with other simulators."""
    speeds = {name: shown(relative(costs)) for name, costs in recipes.items()}
    lines = matrix(f"env steps/s over the default's, {GPUS} x {card}", speeds)
    sizes = {name: [crossing(try_iteration(costs, form)) for form in FORMS] for name, costs in recipes.items()}
    lines += ["", *matrix("GB an iteration: images + experience + weights", sizes)]
    for name, costs in recipes.items():
        if name not in ("ppo_openvla", "ppo_openvlaoft"):
            continue
        slower = {s.name: shown(relative(costs._replace(simulator=s))) for s in SIMULATORS}
        lines += ["", *matrix(f"{name}, simulators", slower)]
    if "ppo_openvla" in recipes:
        speed = dict(zip([form.name for form in FORMS], relative(recipes["ppo_openvla"])))
        hybrid, apart = speed["hybrid"], speed["apart"]
        lines += ["", f"hybrid over apart, ppo_openvla: {hybrid / apart:.2f}; RLinf publishes {PUBLISHED_HYBRID}"]
    return lines
