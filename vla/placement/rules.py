"""Which ranks simulate (env), act (rollout) and train (actor): the flag --placement and its rules.

    env,rollout,actor=all               every rank does everything (the default)
    env=0-3 rollout=4-7 actor=all       hybrid: all ranks train, half of them act, in envs of the other half
    env=0-3 rollout,actor=4-7           simulators of their own
    env,rollout=0-3 actor=4-7           an update of its own
    env=0-1 rollout=2-3 actor=4-7       apart
    hybrid, apart                       the same two forms, of as many ranks as were launched

A number is that of a launched process, which is also the number of its GPU, machine by machine. Env rank k simulates
for rollout rank k: the two have the same envs.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from schemas import UserError

ROLES = ("env", "rollout", "actor")
Roles = tuple[str, ...]
EVERYWHERE = ("env,rollout,actor=all",)
# named forms: into how many equal parts they divide the ranks, and the parts of each role
NAMED = {
    "hybrid": (2, {"env": (0, 1), "rollout": (1, 2), "actor": (0, 2)}),
    "apart": (4, {"env": (0, 1), "rollout": (1, 2), "actor": (2, 4)}),
}
WORD = re.compile(r"([a-z,]+)=(?:(all)|(\d{1,6})(?:-(\d{1,6}))?)", re.ASCII)


class Overlap(NamedTuple):
    """Envs that one rank acts in and another one trains on."""

    rollout: int  # ranks
    actor: int
    acted: slice  # where these envs are among those of the rollout rank
    trained: slice  # and among those of the actor


@dataclass(frozen=True)
class Placement:
    """The ranks of each role."""

    env: range
    rollout: range
    actor: range
    ranks: int  # number of all

    @property
    def together(self) -> bool:
        """Whether every rank does everything."""
        return self.env == self.rollout == self.actor

    def __str__(self) -> str:
        return " ".join(f"{role}={shown(getattr(self, role))}" for role in ROLES)

    @property
    def only_act(self) -> list[int]:
        """Ranks that act and do not train."""
        return [rank for rank in self.rollout if rank not in self.actor]

    @property
    def only_simulate(self) -> list[int]:
        return [rank for rank in self.env if rank not in self.actor and rank not in self.rollout]

    @property
    def only_train(self) -> list[int]:
        return [rank for rank in self.actor if rank not in self.env and rank not in self.rollout]

    @property
    def sends_weights(self) -> bool:
        """Whether weights travel, since no rank that acts trains."""
        return bool(self.only_act)

    @property
    def plays_everywhere(self) -> bool:
        """Whether all ranks train, and so share the evaluation."""
        return len(self.actor) == self.ranks

    def partner(self, rank: int) -> int:
        """The rollout rank of an env rank, or the env rank of a rollout rank."""
        if rank in self.rollout:
            return self.env[self.rollout.index(rank)]
        return self.rollout[self.env.index(rank)]

    def overlaps(self, num_envs: int) -> list[Overlap]:
        """Every env once, cut where its rollout rank or its actor changes, in the order of envs."""
        acted, trained = num_envs // len(self.rollout), num_envs // len(self.actor)
        cuts = sorted({*range(0, num_envs, acted), *range(0, num_envs, trained), num_envs})
        parts = []
        for low, high in itertools.pairwise(cuts):
            (r, a), size = (low // acted, low // trained), high - low
            inside, kept = low - r * acted, low - a * trained
            ours, theirs = slice(inside, inside + size), slice(kept, kept + size)
            parts.append(Overlap(self.rollout[r], self.actor[a], ours, theirs))
        return parts

    def keepers(self, num_envs: int) -> dict[int, int]:
        """For every rollout rank, the actor that keeps what it says once: its episodes, and the states of its envs."""
        keepers: dict[int, int] = {}
        for part in self.overlaps(num_envs):
            keepers.setdefault(part.rollout, part.actor)
        return keepers


def shown(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, as --placement names them.

    >>> shown(range(4, 8)), shown([0, 2, 3])
    ('4-7', '0, 2-3')
    """
    words = []
    for _, group in itertools.groupby(enumerate(ranks), lambda entry: entry[1] - entry[0]):
        run = [rank for _, rank in group]
        words.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(words)


def ranks_by_roles(placement: Placement) -> dict[Roles, list[int]]:
    """{roles: the ranks that have just these}."""
    found: dict[Roles, list[int]] = {}
    for rank in range(placement.ranks):
        found.setdefault(tuple(role for role in ROLES if rank in getattr(placement, role)), []).append(rank)
    return found


def parse_placement(words: Sequence[str], ranks: int) -> Placement:
    """The placement that the words of --placement give to so many ranks.

    Raises:
        UserError: a word cannot be read, a role or a rank is left out, or the roles do not fit together.
    """
    if len(words) == 1 and words[0] in NAMED:
        return named_placement(words[0], ranks)
    places: dict[str, range] = {}
    for word in words:
        roles, given = read_word(word, ranks)
        for role in roles:
            if role not in ROLES:
                raise UserError(f"--placement {word}: {role!r} is no role: name env, rollout or actor")
            if role in places:
                raise UserError(f"--placement names {role} twice: give each role once")
            places[role] = given
    if missing := [role for role in ROLES if role not in places]:
        raise UserError(f"--placement has no ranks for {' and '.join(missing)}: give each role once")
    placement = Placement(**places, ranks=ranks)
    check_placement(placement)
    return placement


def named_placement(name: str, ranks: int) -> Placement:
    """The placement with this name on so many ranks. Raises UserError if these cannot be divided.

    >>> str(named_placement("apart", 16))
    'env=0-3 rollout=4-7 actor=8-15'
    """
    parts, roles = NAMED[name]
    if ranks % parts:
        raise UserError(
            f"--placement {name} divides the ranks into {parts} equal parts, but {ranks} were launched: launch a "
            f"multiple of {parts} (--num_gpus), or write out the ranks of each role"
        )
    size = ranks // parts
    return Placement(**{role: range(low * size, high * size) for role, (low, high) in roles.items()}, ranks=ranks)


def read_word(word: str, ranks: int) -> tuple[list[str], range]:
    """The roles and ranks of one word, such as env=0-3 or rollout,actor=all. Raises UserError."""
    found = WORD.fullmatch(word)
    if found is None:
        raise UserError(
            f"--placement {word!r} is not ROLES=RANKS: write for example env=0-3 rollout=4-7 actor=all, or one of the "
            f"names {' and '.join(NAMED)} alone"
        )
    roles, everywhere, first, last = found.groups()
    if everywhere:
        return roles.split(","), range(ranks)
    low, high = int(first), int(last or first)
    if low > high:
        raise UserError(f"--placement {word} counts down: write {low if last is None else high}-{low}")
    if high >= ranks:
        raise UserError(
            f"--placement {word} names rank {high}, but {ranks} were launched: launch at least {high + 1} (--num_gpus)"
        )
    return roles.split(","), range(low, high + 1)


def check_placement(placement: Placement) -> None:
    """Raise UserError for roles that do not fit together."""
    env, rollout, actor = ({*ranks} for ranks in (placement.env, placement.rollout, placement.actor))
    if idle := sorted({*range(placement.ranks)} - env - rollout - actor):
        raise UserError(f"--placement gives rank {idle[0]} nothing to do: name it, or launch with fewer ranks")
    if env != rollout and env & rollout:
        raise UserError("--placement: ranks of env and rollout overlap: give both the same ranks, or none in common")
    if len(env) != len(rollout):
        raise UserError(
            f"--placement has {len(env)} env and {len(rollout)} rollout ranks, which work in pairs: give both as many"
        )
    for role, ranks in (("env", env), ("rollout", rollout)):
        if actor & ranks and not ranks <= actor:
            raise UserError(
                f"--placement: some ranks of {role} train and others do not: let all of them train, or none"
            )
    if env <= actor and not rollout <= actor:
        raise UserError(
            "--placement: ranks of env train, but those of rollout do not: let the ranks of rollout train, too"
        )
    if rollout < actor and not env <= actor:
        raise UserError(
            "--placement: where ranks of env do not train, those of rollout train alone or not at all: give actor "
            "the ranks of rollout, or others"
        )
