"""Envs that another rank simulates. `RemoteEnvs` has the interface of VectorEnv, and `Service` answers it there.

    service = Service(make_envs(...), line, pixels)     # on the rank that simulates
    envs = RemoteEnvs(line)                             # on the rank that acts in them

Both ends have a `Line`. Images are made as small as the policy reads them before they travel. One call (reset, step,
state_dict ...) at a time is answered. Besides, every half-batch has a thread and a channel of its own, so the halves of
pipeline_stages=2 do not wait for each other.

An error of the simulation is raised where the envs are used. A worker that is lost is replaced where it ran.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from envs.vector import Outcome, Turn, VectorEnv
from schemas import UserError
from schemas.pixels import Pixels, resize


class Line(Protocol):
    """Two ranks that send values to each other, in one channel for calls (half=None) and one for each half-batch."""

    def send(self, value: Any, half: int | None = None) -> None: ...

    def receive(self, half: int | None = None) -> Any:
        """The next value of the other rank. Raises RuntimeError if that rank has ended."""


# ---------------------------------------------------------------------- where they are simulated
class Service:
    """Simulates for the other end of a line.

    Args:
        envs: the envs of training. pixels: the images that the policy reads.
        open_envs: makes further envs, with keyword arguments of make_envs().
    """

    def __init__(self, envs: VectorEnv, line: Line, pixels: Pixels, open_envs: Callable[..., VectorEnv] | None = None):
        self.line, self.pixels, self.open_envs = line, pixels, open_envs
        self.opened: dict[int, VectorEnv] = {0: envs}
        self.small = {0}  # envs whose images the policy reads
        self.latest: dict | None = None  # what the last reset of envs 0 showed
        self.began = threading.Event()
        for half in range(len(envs.halves)):
            threading.Thread(target=self._steps, args=(half,), daemon=True).start()

    def calls(self) -> Any:
        """Answer calls until the other end says "end". Returns what it added."""
        while True:
            number, method, arguments = self.line.receive()
            if method == "end":
                return arguments
            self.line.send(self._answer(getattr(self, f"_{method}"), number, *arguments))

    def close(self) -> None:
        for envs in self.opened.values():
            envs.close()

    def _answer(self, method: Callable, *arguments: Any) -> Any:
        """What a method returns, or the error that it raised."""
        try:
            return method(*arguments)
        except (ValueError, RuntimeError, OSError) as error:
            return {"failure": str(error) or type(error).__name__, "wrong_input": isinstance(error, UserError)}

    def _steps(self, half: int) -> None:
        """Step one half whenever its actions come."""
        with contextlib.suppress(RuntimeError):  # the other rank has ended, which calls() finds, too
            while True:
                actions = self.line.receive(half)
                self.line.send(self._answer(self._step_half, half, actions), half)

    def _step_half(self, half: int, actions: torch.Tensor) -> dict:
        self.opened[0].step_async(actions, half)
        return self._shrunk(0, self.opened[0].step_wait(half))

    # ------------------------------------------------------------------ calls
    def _facts(self, number: int) -> dict:
        envs = self.opened[number]
        names = ("env_id", "num_envs", "num_start_states", "repeats")
        halves = [[rows.start, rows.stop] for rows in envs.halves]
        return {name: getattr(envs, name) for name in names} | {"halves": halves}

    def _open(self, number: int, small: bool, settings: dict) -> None:
        self.opened[number] = self.open_envs(**settings, pixels=self.pixels if small else None)
        self.small |= {number} if small else set()

    def _reset(self, number: int, episode_ids: list | None, env_indices: list | None) -> dict:
        return self._remembered(number, self.opened[number].reset(episode_ids, env_indices))

    def _step(self, number: int, actions: torch.Tensor) -> dict:
        return self._shrunk(number, self.opened[number].step(actions))

    def _state_dict(self, number: int) -> list[dict]:
        return self.opened[number].state_dict()

    def _load_state_dict(self, number: int, state: list[dict]) -> dict | None:
        return self._remembered(number, self.opened[number].load_state_dict(state))

    def _close(self, number: int) -> None:
        self.opened.pop(number).close()
        self.small.discard(number)

    # ------------------------------------------------------------------ images
    def _remembered(self, number: int, obs: dict | None) -> dict | None:
        obs = obs and self._seen(number, obs)
        if number == 0:
            self.latest = obs
            self.began.set()
        return obs

    def _seen(self, number: int, obs: dict) -> dict:
        """An observation with the images that travel."""
        return obs | {"image": resize(obs["image"], *self.pixels)} if number in self.small else obs

    def _shrunk(self, number: int, outcome: Outcome) -> dict:
        """An outcome with the images that travel."""
        final = self._seen(number, outcome.infos["final_observation"])
        infos = outcome.infos | {"final_observation": final}
        return outcome._replace(obs=self._seen(number, outcome.obs), infos=infos)._asdict()


class ServedEnvs:
    """Envs of a rank that does not act in them, but takes part in the run in all other ways. It has no turns.

    A thread answers the rank that acts in them.
    """

    halves: tuple[slice, ...] = ()
    workers: tuple = ()

    def __init__(self, service: Service):
        self.service = service
        envs = service.opened[0]
        self.env_id, self.num_envs, self.repeats = envs.env_id, envs.num_envs, envs.repeats
        self.num_start_states = envs.num_start_states
        self.lost: RuntimeError | None = None
        self.thread = threading.Thread(target=self._calls, daemon=True)
        self.thread.start()

    def _calls(self) -> None:
        try:
            self.service.calls()
        except RuntimeError as error:  # the other rank has ended
            self.lost = error
            self.service.began.set()

    def reset(self, *chosen: Any) -> dict:
        """What the envs show, or a moment ago showed, when the rank that acts in them resets them."""
        self.service.began.wait()
        if self.lost is not None:
            raise self.lost
        return self.service.latest

    def load_state_dict(self, state: list[dict]) -> dict | None:
        return self.reset()

    def pipeline(self, decisions: Iterable[int]) -> Iterator[Turn]:
        return iter(())

    def state_dict(self) -> list[dict]:
        return self.service.opened[0].state_dict()

    def close(self) -> None:
        """End the envs, once the other rank has said that it needs them no more."""
        self.thread.join()
        self.service.close()


class NoEnvs:
    """The envs of a rank that neither simulates nor acts."""

    halves: tuple[slice, ...] = ()
    workers: tuple = ()
    repeats = True
    env_id, num_envs, num_start_states = "", 0, 0

    def __init__(self) -> None:
        self.states: list[dict] = []  # of the envs that this rank answers for, as they came with the last rollout

    def reset(self, *chosen: Any) -> None:
        return None

    def load_state_dict(self, state: list[dict]) -> None:
        return None

    def pipeline(self, decisions: Iterable[int]) -> Iterator[Turn]:
        return iter(())

    def state_dict(self) -> list[dict]:
        return self.states

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------- where they are used
class RemoteEnvs:
    """Envs that another rank simulates, with the interface of VectorEnv. See the head of this file.

    Args:
        number: which of the other rank's envs, 0 for those of training.
        keeps_states: whether the states are saved here. Otherwise the other rank saves them.
    """

    workers: tuple = ()

    def __init__(self, line: Line, number: int = 0, keeps_states: bool = True):
        self.line, self.number, self.keeps_states = line, number, keeps_states
        facts = self._call("facts")
        self.env_id, self.num_envs, self.repeats = facts["env_id"], facts["num_envs"], facts["repeats"]
        self.num_start_states = facts["num_start_states"]
        self.halves = [slice(*bounds) for bounds in facts["halves"]]
        self._latest: list[dict] = []
        self._in_flight: set[int] = set()

    def open(self, number: int, small: bool, **settings: Any) -> RemoteEnvs:
        """Further envs at the other rank. small: whether the policy reads their images."""
        self._call("open", small, settings, number=number)
        return RemoteEnvs(self.line, number)

    def reset(self, episode_ids: Sequence[int] | None = None, env_indices: Sequence[int] | None = None) -> dict:
        chosen = (None if ids is None else [int(i) for i in ids] for ids in (episode_ids, env_indices))
        return self._remembered(self._call("reset", *chosen))

    def step(self, actions: torch.Tensor | np.ndarray) -> Outcome:
        outcome = Outcome(**self._call("step", torch.as_tensor(actions).float()))
        self._remembered(outcome.obs)
        return outcome

    def pipeline(self, decisions: Iterable[int]) -> Iterator[Turn]:
        for t in decisions:
            for half, rows in enumerate(self.halves):
                outcome = self.step_wait(half) if half in self._in_flight else None
                yield Turn(t, half, rows, self._latest[half], outcome)

    def step_async(self, actions: torch.Tensor | np.ndarray, half: int = 0) -> None:
        self.line.send(torch.as_tensor(actions).detach().to("cpu", torch.float32), half)
        self._in_flight.add(half)

    def step_wait(self, half: int = 0) -> Outcome:
        self._in_flight.remove(half)
        outcome = Outcome(**raised(self.line.receive(half)))
        self._latest[half] = outcome.obs
        return outcome

    def state_dict(self) -> list[dict]:
        return self._call("state_dict") if self.keeps_states else []

    def load_state_dict(self, state: list[dict]) -> dict | None:
        obs = self._call("load_state_dict", state)
        return None if obs is None else self._remembered(obs)

    def close(self) -> None:
        """End these envs. The other rank ends when those of training do."""
        if self.number:
            self._call("close")
        else:
            self.end()

    def end(self, code: int = 0) -> None:
        """Tell the other rank that this one needs it no more, and its exit code."""
        self.line.send([self.number, "end", code])

    def __enter__(self) -> RemoteEnvs:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any, number: int | None = None) -> Any:
        self.line.send([self.number if number is None else number, method, list(arguments)])
        return raised(self.line.receive())

    def _remembered(self, obs: dict) -> dict:
        self._latest = [{key: value[rows] for key, value in obs.items()} for rows in self.halves]
        return obs


def raised(answer: Any) -> Any:
    """The answer of the other rank.

    Raises:
        UserError, RuntimeError: the error that it reports instead.
    """
    if isinstance(answer, dict) and "failure" in answer:
        if answer["wrong_input"]:
            raise UserError(answer["failure"])
        raise RuntimeError(f"the rank that simulates reports: {answer['failure']}")
    return answer
