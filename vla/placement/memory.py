"""What fits on the GPUs of a placement: the plan of vla/training/memory_plan.py, role by role.

python doctor.py --config yaml/maniskill_ppo_openvla.yaml --config yaml/placement_apart.yaml
"""

from dataclasses import replace

from vla.placement.rules import ROLES, Placement
from vla.training.memory_plan import GIB, Plan, Recipe, Use, make_plan

Roles = tuple[str, ...]


def ranks_by_roles(placement: Placement) -> dict[Roles, list[int]]:
    """{roles: the ranks that have just these}."""
    found: dict[Roles, list[int]] = {}
    for rank in range(placement.ranks):
        found.setdefault(tuple(role for role in ROLES if rank in getattr(placement, role)), []).append(rank)
    return found


def role_plan(recipe: Recipe, placement: Placement, roles: Roles) -> Plan:
    """Bytes on the GPU of a rank with these roles. Host memory is not planned.

    Raises:
        UserError: the number of envs is not divisible by the ranks of a role.
    """
    acting = make_plan(replace(recipe, zero_stage=0, offload="none"), len(placement.rollout)).rollout  # whole weights
    training = make_plan(recipe, len(placement.actor))
    system = {Use.CONTEXT: acting[Use.CONTEXT]}
    plays = "rollout" in roles or placement.plays_everywhere  # evaluation, in which hybrid ranks simulate, too
    if "env" in roles or placement.plays_everywhere:
        system[Use.RENDERERS] = acting[Use.RENDERERS]
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
    return Plan(rollout, update, {})


def placed_table(recipe: Recipe, placement: Placement, gpu_memory: float) -> tuple[bool, list[str]]:
    """Whether every rank's share fits into its GPU, and a line for each set of roles."""
    lines, fits = [f"{'GiB on one GPU at the peak':28} {'rollout':>9} {'update':>9}"], True
    for roles, ranks in ranks_by_roles(placement).items():
        plan = role_plan(recipe, placement, roles)
        peaks = [plan.peak(stage) / GIB for stage in ("rollout", "update")]
        fits = fits and max(peaks) <= gpu_memory
        shown = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        lines.append(f"  {', '.join(roles):26} " + " ".join(f"{peak:9.2f}" for peak in peaks) + f"  ranks {shown}")
    verdict = "fits" if fits else "does not fit: give the larger role more ranks, or see the table without --placement"
    return fits, [*lines, f"GPU memory of {gpu_memory:g} GiB {verdict}"]
