"""What fits on the GPUs and nodes of a placement: the plan of vla/training/memory_plan.py, role by role.

python doctor.py --config yaml/maniskill_ppo_openvla.yaml --config yaml/placement_apart.yaml
"""

from dataclasses import replace

from vla.placement.rules import Placement, Roles, ranks_by_roles, shown
from vla.placement.wire import WAITING_BYTES
from vla.training.memory_plan import (
    ASSUMED_RANK,
    ASSUMED_RENDERER,
    ASSUMED_WORKER,
    GIB,
    Plan,
    Recipe,
    Use,
    buffer_bytes,
    make_plan,
    policy_of,
)

PROCESSES = "processes (assumed)"
# of a rank's host memory: what an actor has in every placement, and what only placements have
OF_ACTORS = ("Adam on the CPU", "moved out between the stages", "start of the iteration")
BUFFER, WAITING = "rollout buffer", "messages on their way, at most"


def num_workers(recipe: Recipe, placement: Placement, roles: Roles) -> int | None:
    """The processes beside a rank that simulate. None if the rank simulates nothing, 0 if it does so itself."""
    everywhere = placement.plays_everywhere
    eval_envs = max(1, recipe.num_eval_envs // len(placement.actor if everywhere else placement.rollout))
    envs = [recipe.num_envs // len(placement.env)] if "env" in roles else []
    envs += [eval_envs] if "env" in roles or everywhere else []
    return min(recipe.num_env_workers, max(envs)) if envs else None


def role_plan(recipe: Recipe, placement: Placement, roles: Roles) -> Plan:
    """Bytes of one rank with these roles, on its GPU and in the host memory of its node.

    Raises:
        UserError: the number of envs is not divisible by the ranks of a role.
    """
    acting = make_plan(replace(recipe, zero_stage=0, offload="none"), len(placement.rollout)).rollout  # whole weights
    training = make_plan(recipe, len(placement.actor), gpus_per_node=1)
    system = {Use.CONTEXT: acting[Use.CONTEXT]}
    plays = "rollout" in roles or placement.plays_everywhere  # evaluation, in which hybrid ranks simulate, too
    workers = num_workers(recipe, placement, roles)
    if workers is not None:
        system[Use.RENDERERS] = max(workers, 1) * ASSUMED_RENDERER
    rollout, update = dict(system), dict(system)
    if "actor" in roles:
        elsewhere = {Use.RENDERERS, Use.FORWARD} | ({Use.COPY} if placement.sends_weights else set())
        rollout = {use: size for use, size in training.rollout.items() if use not in elsewhere} | rollout
        update = {use: size for use, size in training.update.items() if use not in elsewhere} | update
    elif plays:
        rollout |= {use: acting[use] for use in (Use.TRAINED, Use.FROZEN)}
        update |= {use: acting[use] for use in (Use.TRAINED, Use.FROZEN)}
    if plays:
        rollout[Use.FORWARD] = acting[Use.FORWARD]
    processes = ASSUMED_RANK + (workers or 0) * ASSUMED_WORKER
    return Plan(rollout, update, host_bytes(recipe, placement, roles, training.host) | {PROCESSES: processes})


def host_bytes(recipe: Recipe, placement: Placement, roles: Roles, training: dict[str, int]) -> dict[str, int]:
    """Bytes of host memory of a rank's own process. training: those of a rank that trains in as many ranks."""
    host: dict[str, int] = {}
    acted = buffer_bytes(policy_of(recipe), recipe, len(placement.rollout))
    assigns, sends_images = placement.rollout != placement.actor, placement.env != placement.rollout
    waiting = 2 * min(WAITING_BYTES, acted) if sends_images and "env" in roles else 0  # of either half of the envs
    if "actor" in roles:
        host |= {use: training[use] for use in OF_ACTORS if use in training}
    host[BUFFER] = training[BUFFER] if "actor" in roles and assigns else 0
    if "rollout" in roles:
        host[BUFFER] += acted
        hearers = -(-len(placement.actor) // len(placement.rollout))
        waiting += min(hearers * WAITING_BYTES, acted) if assigns else 0
    return host | {WAITING: waiting}


def placed_table(
    recipe: Recipe, placement: Placement, gpu_memory: float, host_memory: float, gpus_per_node: int = 8
) -> tuple[bool, list[str]]:
    """Whether every rank's share fits into its GPU and its node, and a line for each set of roles.

    Args:
        gpu_memory: of one GPU, in GiB. host_memory: of one node, in GiB.
    """
    plans = {roles: role_plan(recipe, placement, roles) for roles in ranks_by_roles(placement)}
    own = {roles: sum(plan.host.values()) / GIB for roles, plan in plans.items()}
    lines = [f"{'GiB of one rank, at the peak':28} {'rollout':>9} {'update':>9} {'host':>9}"]
    fits = True
    for roles, ranks in ranks_by_roles(placement).items():
        peaks = [plans[roles].peak(stage) / GIB for stage in ("rollout", "update")]
        fits = fits and max(peaks) <= gpu_memory
        numbers = " ".join(f"{size:9.2f}" for size in (*peaks, own[roles]))
        lines.append(f"  {', '.join(roles):26} {numbers}  ranks {shown(ranks)}")
    lines += ["", f"{'GiB of host memory, one rank':36} " + " ".join(f"{', '.join(roles):>14}" for roles in plans)]
    for use in dict.fromkeys(use for plan in plans.values() for use in plan.host):
        sizes = (plan.host.get(use, 0) / GIB for plan in plans.values())
        lines.append(f"  {use:34} " + " ".join(f"{size:14.2f}" for size in sizes))
    of_rank = {rank: own[roles] for roles, ranks in ranks_by_roles(placement).items() for rank in ranks}
    nodes = [range(first, min(first + gpus_per_node, len(of_rank))) for first in range(0, len(of_rank), gpus_per_node)]
    needs = [sum(of_rank[rank] for rank in node) for node in nodes]
    largest = needs.index(max(needs))
    verdict = "fits" if fits else "does not fit: give the larger role more ranks, or see the table without --placement"
    lines += ["", f"GPU memory of {gpu_memory:g} GiB {verdict}"]
    node, need = f"ranks {nodes[largest][0]}-{nodes[largest][-1]}", f"{max(needs):.1f} of {host_memory:g} GiB on a node"
    if max(needs) <= host_memory:
        return fits, [*lines, f"host memory fits: {need} ({node})"]
    remedy = "use fewer --num_env_workers or --num_envs, or give a node fewer ranks of the larger role"
    return False, [*lines, f"host memory does not fit ({need}, {node}): {remedy}"]
