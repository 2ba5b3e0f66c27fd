"""A storm: env workers, settlers and the process that starts them die, hang and get signals at random moments.

    python benchmarks/storm.py                  200 rounds. In each of them, one process is struck
    python benchmarks/storm.py --rounds 20 --seed 3

A round is a rollout, an evaluation in the same workers, or the settling of start states. SIGKILL and SIGSEGV kill,
SIGSTOP is a hang, and the other signals are those that a cluster sends to every process of a job. The program checks:

- every round ends, or says why it cannot,
- each episode of an evaluation is reported once, and has the result that it has without a storm, unless it is lost,
- the signals of a cluster change nothing,
- every env goes forward in its stream of episodes,
- in the end, no process, no open file and nothing in /dev/shm is left.

The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from envs import eval_episode_ids, make_envs, processes, variants, workers
from envs.gpu import start_states
from envs.gym_env import build
from vla.evaluation.episodes import is_lost, run_batch

MAIN = "PutOnPlateInScene25Main-v3"
WORLD = dict(image_size=(16, 16), sim_freq=100)
MARK = "SOLOVLA_STORM"  # in the environment of everything that is started here
DEADLY = (signal.SIGKILL, signal.SIGSEGV)
PATIENCE = 300.0  # seconds without an answer, where nothing is made to hang
STEPS = 3  # of a rollout, two actions each


class Shaking:
    """An actor whose actions depend on the episode and the step alone."""

    chunk_size = 2

    def begin(self, episode_ids: Sequence[int]) -> None:
        self.ids = list(episode_ids)
        self.generators = [np.random.default_rng(one) for one in self.ids]

    def restart(self, env: int) -> None:
        self.generators[env] = np.random.default_rng(self.ids[env])

    def act(self, obs: dict, envs: object) -> torch.Tensor:
        drawn = [one.uniform(-0.05, 0.05, (self.chunk_size, 7)) for one in self.generators]
        return torch.as_tensor(np.stack(drawn), dtype=torch.float32)


@contextlib.contextmanager
def struck(process: int, number: int, delay: float) -> Iterator[None]:
    """Send a signal to a process after some seconds, while the block runs or at its end."""

    def strike() -> None:
        over.wait(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    over = threading.Event()
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield
    finally:
        over.set()
        striker.join()


def left_over(mark: str) -> list[str]:
    """Titles of the processes that were started under a mark and are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            marked = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if marked and int(folder.name) != os.getpid():
                found.append((folder / "comm").read_text().strip())
    return found


def left_in_shared_memory(before: set[str]) -> set[str]:
    """Names in /dev/shm that are not in `before`, without those of other programs: what another process uses."""
    new = {}  # by device and inode: a named semaphore is mapped under an earlier name
    for name in set(os.listdir("/dev/shm")) - before:
        with contextlib.suppress(FileNotFoundError):
            new[identity(os.stat(f"/dev/shm/{name}"))] = name
    for process in Path("/proc").glob("[0-9]*"):
        if new and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended
                for line in (process / "maps").read_text().splitlines():
                    _, _, _, device, inode, *_ = line.split()
                    new.pop((device, int(inode)), None)
                for file in (process / "fd").iterdir():
                    new.pop(identity(file.stat()), None)
    return {name for name in new.values() if os.path.exists(f"/dev/shm/{name}")}


def identity(file: os.stat_result) -> tuple[str, int]:
    """Device and inode, as /proc/PID/maps shows them."""
    return f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", file.st_ino


class Storm:
    """Training envs, evaluation beside them, and settlers."""

    def __init__(self, seed: int, hang: float):
        """hang: seconds after which a process without an answer counts as lost, or 0 if none is stopped."""
        self.choose, self.hang = random.Random(seed), hang or PATIENCE
        self.signals = [*DEADLY, *processes.IGNORED, *([signal.SIGSTOP] if hang else [])]
        self.ids = eval_episode_ids(MAIN, "train", 8)
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.world = build(MAIN, render_backend="none", **WORLD)
        self.files = set(os.listdir("/proc/self/fd"))  # before any process is started
        self.starts = [variants.decode(MAIN, "train", i) for i in range(0, 4000, 100)]
        self.open()
        began = time.monotonic()
        self.expected = {one["episode_id"]: one for batch in self.cut() for one in self.evaluate(batch)}
        self.seconds = (time.monotonic() - began) / 2  # of an evaluation

    def open(self) -> None:
        self.envs = make_envs(MAIN, 4, num_env_workers=2, auto_reset=True, max_episode_steps=5, **self.settings())
        self.beside = make_envs(MAIN, 4, self.envs, num_env_workers=2, max_episode_steps=8, **self.settings())
        self.settlers = start_states.Settlers(MAIN, 2, sim_freq=100)
        self.settled = set()
        self.envs.reset()
        self.counters = [0] * 4
        self.unaware = set()  # what happens in rounds and has not happened since a process was struck

    def settings(self) -> dict:
        return WORLD | {"worker_timeout": self.hang}

    def close(self) -> None:
        for one in (self.envs, self.beside, self.settlers, self.world):
            one.close()

    def cut(self) -> list[list[int]]:
        return [self.ids[:4], self.ids[4:]]

    def evaluate(self, ids: list[int]) -> list[dict]:
        return run_batch(Shaking(), self.beside, ids)

    # ------------------------------------------------------------------ rounds
    def round(self, number: int) -> None:
        """Strike one process, while something happens that needs it."""
        kind = self.choose.choices(("worker", "settler", "server"), (6, 3, 1))[0]
        sent = self.choose.choice(self.signals)
        happens = self.settle if kind == "settler" else self.choose.choice((self.rollout, self.evaluation))
        victims = {
            "worker": [worker.process.pid for worker in self.envs.workers],
            "settler": self.settlers.pids,
            "server": [processes.server_now().pid],
        }
        restarts = self.restarts()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with struck(self.choose.choice(victims[kind]), sent, self.choose.uniform(0, 1.5 * self.seconds)):
                    happens()
            except RuntimeError as error:
                self.counts["ended with its reason"] += 1
                print(f"round {number}: {kind}, {sent.name}: {str(error).splitlines()[0]}", flush=True)
                self.close()
                self.world = build(MAIN, render_backend="none", **WORLD)
                self.open()
                restarts = None
        self.counts[f"{kind} {sent.name}"] += 1
        self.counts["losses"] += sum(issubclass(one.category, RuntimeWarning) for one in said)
        noticed = restarts is not None and self.restarts() != restarts
        if noticed and sent in processes.IGNORED and happens not in self.unaware:
            self.problems.append(f"round {number}: {sent.name} ended a {kind}")
        self.unaware.discard(happens)
        if sent not in processes.IGNORED:
            self.unaware = {self.rollout, self.evaluation}

    def restarts(self) -> int:
        return self.envs.num_restarts + self.beside.num_restarts

    def rollout(self) -> None:
        actions = Shaking()
        actions.begin(range(4))
        for _ in range(STEPS):
            _, rewards, terminations, truncations, infos = self.envs.step(actions.act({}, None))
            dropped, valid = infos["dropped"], infos["valid"]
            if (valid.any(dim=1) & dropped).any() or rewards[dropped].any() or infos["lost"].any():
                self.problems.append("a lost episode counts")
            if infos["ended"].tolist() != (terminations | truncations).nonzero()[:, 0].tolist():
                self.problems.append("episodes ended that were not reported")
        counters = [state["counter"] for state in self.envs.state_dict()]
        if any(now < before for now, before in zip(counters, self.counters)):
            self.problems.append(f"streams went back from {self.counters} to {counters}")
        self.counters = counters

    def evaluation(self) -> None:
        ids = self.choose.choice(self.cut())
        found = self.evaluate(ids)
        if [one["episode_id"] for one in found] != ids:
            self.problems.append(f"episodes {ids} were evaluated as {[one['episode_id'] for one in found]}")
        for one in found:
            expected = self.expected[one["episode_id"]]
            if is_lost(one):
                self.counts["lost episodes"] += 1
            elif not np.array_equal(one["actions"], expected["actions"]) or any(
                one[name] != expected[name] for name in one if name != "actions"
            ):
                self.problems.append(f"episode {one['episode_id']} has another result")

    def settle(self) -> None:
        chosen = self.choose.sample(self.starts, 6)
        for start in chosen:
            self.settlers.ask(start)
        for start in chosen:
            got = self.settlers.get(start)
            if start not in self.settled:
                self.settled.add(start)
                expected = start_states.settled_state(self.world, start)
                if any(not np.array_equal(getattr(got, name), value) for name, value in vars(expected).items()):
                    self.problems.append(f"start state {start.episode_id} was settled in another way")


def storm(rounds: int, seed: int, hang: float, say: Callable[[str], None] = print) -> list[str]:
    """Run so many rounds. Returns what was wrong."""
    mark = os.environ[MARK] = uuid.uuid4().hex
    patience = hang or PATIENCE
    processes.START_SECONDS = workers.START_SECONDS = start_states.START_SECONDS = 10 * patience
    processes.SERVER_SECONDS = start_states.SECONDS = patience
    shared_memory = set(os.listdir("/dev/shm"))
    one = Storm(seed, hang)
    try:
        for number in range(1, rounds + 1):
            one.round(number)
            if number % 10 == 0 or number == rounds:
                say(f"{number} rounds: {dict(one.counts)}")
    finally:
        one.close()
    problems = one.problems
    if left := left_over(mark):
        problems.append(f"processes are left: {left}")
    if more := set(os.listdir("/proc/self/fd")) - one.files:
        problems.append(f"open files are left: {more}")
    if more := left_in_shared_memory(shared_memory):
        problems.append(f"/dev/shm holds {more}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="Number of strikes. (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the strikes. (default: %(default)s)")
    parser.add_argument(
        "--hang", type=float, default=20.0, help="Seconds after which a hang is one, 0 for no hangs. (default: 20)"
    )
    given = parser.parse_args()
    problems = storm(given.rounds, given.seed, given.hang)
    print("\n".join(problems) or "nothing was wrong, and nothing is left behind")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
