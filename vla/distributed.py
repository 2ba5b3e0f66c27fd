"""Ranks: starting and ending them, printing once, and reductions. There is one process per GPU. CPUs use gloo.

The scripts run under `deepspeed`, under torchrun, and as plain `python` (one rank).
"""

import contextlib
import errno
import faulthandler
import functools
import io
import ipaddress
import linecache
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from schemas import CommonError, UserError
from vla import ROOT
from vla.start.extensions import keep_ops
from vla.start.launch import LAUNCHER, Launch, command_of, job_cores, launched, parent_of
from vla.start.terminal import DEBUG, debugging, say_last

LAUNCHER_ENV = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


Engine = deepspeed.DeepSpeedEngine  # other modules use this name
REQUEUE = 75  # exit code of a run that was asked to end and saved itself (EX_TEMPFAIL of sysexits.h)
POLL_SECONDS = 1.0
HEARD_SECONDS = 10.0  # a launcher checks every second whether a rank has ended
TURN_SECONDS = 3.0  # for the first rank, which says what other ranks would repeat
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in errors of gloo and of a store
ORPHAN_SECONDS = 600.0  # time of an orphan to save itself, since it may hang in a collective with a dead rank


_watchers: list[Callable[[BaseException], None]] = []


def at_end(watcher: Callable[[BaseException], None]) -> None:
    """Call watcher(cause) when an error or Ctrl-C ends main(), before anything else is done."""
    _watchers.append(watcher)


def run_watched(main: Callable, parse: Callable) -> None:
    """Run main(parse()), and tell those that asked with at_end() how it ended if it did not end by itself."""
    try:
        main(parse())
    except BaseException as cause:
        for watcher in _watchers:
            watcher(cause)
        raise


def run_main(main: Callable, parse: Callable) -> None:
    """Run main(parse()). Wrong input ends with one sentence and exit code 2, any other error with its traceback and 1.

    An error is the last thing on the screen. Errors that all ranks have in common (flags) are printed once per node.
    Errors that one rank may have alone (files, devices) are printed by that rank. A launcher ends all ranks when the
    first one ends with an error, and exits with its code. So a rank whose error is only a consequence waits, so that
    another rank can print the cause.
    """
    steady_streams()
    try:
        launch = launched()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    try:
        end_with_launcher()  # flags may name a model that takes an hour to fetch
        run_watched(main, parse)
    except SystemExit as stop:
        if stop.code == REQUEUE:  # everything is saved, so the grace period is not spent on drivers' clean-up
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(REQUEUE)
        raise
    except KeyboardInterrupt:  # a terminal's Ctrl-C reaches all ranks, launchers and helpers
        if launch.rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    except UserError as error:
        print_user_error(error, launch)
        raise SystemExit(2) from error
    except Exception as error:
        if lost_rank(error):
            let_others_speak()
        elif launch.local_rank > 0:
            let_others_speak(TURN_SECONDS)
        say_last(traceback.format_exc().rstrip(), stream=2)
        raise SystemExit(1) from error
    leave_group()  # not after an exception, because it would wait for other ranks


def leave_group() -> None:
    """Leave the process group, if there is one. Afterwards this rank counts as the only one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print_user_error(error: UserError, launch: Launch) -> None:
    """Print the sentence, and with SOLOVLA_DEBUG=1 the traceback. See run_main() for the rank that prints."""
    is_first = launch.local_rank == 0
    is_common = isinstance(error, CommonError) or error.__cause__ is None
    if lost_rank(error) or (not is_first and is_common):
        let_others_speak()
    if debugging():
        traceback.print_exception(error)
    who = "error" if is_first else f"error (rank {launch.rank})"
    say_last(f"{who}: {error}", stream=2)


class SteadyStream(io.TextIOWrapper):
    """A stream whose reader may end: `| head`, a `tee` that was killed, a terminal that was closed.

    Later output is dropped, and the run continues. Its folder has the same lines.
    """

    def write(self, text: str) -> int:
        with self.until_the_reader_goes():
            super().write(text)
        if self.write_through:  # the launcher starts `python -u`
            self.flush()
        return len(text)

    def flush(self) -> None:
        with self.until_the_reader_goes():
            super().flush()

    @contextlib.contextmanager
    def until_the_reader_goes(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for the output of libraries and the rest of the buffer, too
            os.close(nowhere)


def steady_streams() -> None:
    """Replace stdout and stderr by streams that accept every character and outlast their readers.

    A closed stream is opened on os.devnull. Otherwise the next file that is opened would get its number, and the output
    of libraries would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        old, target = getattr(sys, name), os.fdopen(number, "wb", closefd=False)
        if old is None:  # it was closed
            setattr(sys, name, SteadyStream(target, "utf-8", "backslashreplace", write_through=True))
            continue
        old.flush()
        buffering = dict(line_buffering=old.line_buffering, write_through=old.write_through)
        setattr(sys, name, SteadyStream(target, old.encoding, "backslashreplace", **buffering))


def lost_rank(error: BaseException | None) -> bool:
    """Whether an error is only a consequence of another rank's end."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def let_others_speak(seconds: float = HEARD_SECONDS) -> None:
    """Wait for the rank that knows the cause. The launcher then ends this rank, and exits with the other one's code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ValueErrors, OSErrors and RuntimeErrors of set-up code into UserErrors, which run_main() prints.

    A `raise` of this repository and the operating system give a sentence that a user can act on. Any other error is
    unexpected, such as a wrong shape inside a library. Its sentence names the variable that shows the traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) or raised_here(error):
            raise UserError(str(error)) from error
        raise UserError(
            f"{type(error).__name__}: {error} (this is unexpected: set {DEBUG}=1 to see the traceback)"
        ) from error


def raised_here(error: Exception) -> bool:
    """Whether a `raise` statement of this repository made the error, not a library and not Python itself."""
    *_, (frame, line_number) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename).resolve()
    is_ours = path.parent == ROOT or any(path.is_relative_to(ROOT / name) for name in ("vla", "envs", "schemas"))
    return is_ours and linecache.getline(str(path), line_number).lstrip().startswith("raise ")


@functools.cache
def end_with_launcher() -> None:
    """Start one thread that sends this rank SIGTERM when its launcher ends.

    `deepspeed` (0.19.8) ends at once on SIGTERM and leaves its ranks running. Its helper does so after kill -9. Ranks
    under torchrun are watched, too. Ranks without a launcher are not, and srun ends its ranks itself.

    Raises:
        UserError: the launcher has already ended, while this rank was importing.
    """
    parent = os.getppid()
    between = LAUNCHER in command_of(parent)
    if not between and not {"CROSS_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys():  # set by the two launchers
        return
    grandparent = parent_of(parent) if between else None
    if 1 in (parent, grandparent) and not any(name in command_of(1) for name in (b"deepspeed", b"torch")):
        raise UserError("the launcher of this rank has already ended: start it again")

    def watch() -> None:
        while os.getppid() == parent and (grandparent is None or parent_of(parent) == grandparent):
            time.sleep(POLL_SECONDS)
        shared_memory().unlink(missing_ok=True)  # the rank may have ended its start before it removed this
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def setup_distributed(
    seed: int, meet: Callable[[], str | None] | None = None, shares_memory: bool = True
) -> torch.device:
    """Join the process group and seed all generators with the same seed on every rank. Returns this rank's device.

    Ranks take different slices (of envs, of noise) of quantities that are the same on all ranks. So a run does not
    depend on the number of ranks.

    Args:
        meet: returns the init_method of init_process_group(). Without it, all ranks meet in one group.
        shares_memory: whether DeepSpeed makes shared memory for ranks without GPUs. One group of a launch may do so.
    """
    end_with_launcher()
    for name, value in LAUNCHER_ENV.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:  # one rank without a launcher takes any free port, because others may run
        with socket.socket() as sock:
            sock.bind((os.environ["MASTER_ADDR"], 0))
            os.environ["MASTER_PORT"] = str(sock.getsockname()[1])
    # DeepSpeed calls `ninja`, which is in python's folder and would not be found if .venv/bin is not on PATH
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if not debugging():
        silence_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*")
    keep_ops()
    if "OMP_NUM_THREADS" not in os.environ:  # launchers do not set it, and ranks would compete for the cores
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
        torch.set_num_threads(max(1, min(job_cores(), (os.cpu_count() or 1) // int(ranks_here))))
    try:
        deepspeed.init_distributed(verbose=False, init_method=(meet or where_ranks_meet)())
    except (dist.DistNetworkError, OSError) as error:
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise
        port = os.environ["MASTER_PORT"]
        remedy = f"put --master_port {int(port) + 1} between `deepspeed` and the script's name"
        if "SLURM_JOB_ID" in os.environ:  # slurm/run.sh derives the port from the number of the job
            remedy = "submit the job again, since another job has another port"
        raise UserError(f"port {port} is in use, perhaps by another run: {remedy}") from error
    if shares_memory:
        unlink_shared_memory()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if get_accelerator().device_name() == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= get_accelerator().device_count():
        raise UserError(
            f"this machine has {get_accelerator().device_count()} GPUs, so there is none for its rank {local_rank}: "
            "launch with a smaller --num_gpus"
        )
    get_accelerator().set_device(local_rank)
    return torch.device(get_accelerator().current_device_name())


def silence_libraries() -> None:
    """Switch off what libraries say at every start and no user can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.modules["deepspeed.comm.torch"].print = lambda *words: None  # every rank says that it has built its operation


def where_ranks_meet() -> str | None:
    """The init_method of init_process_group(). Ranks of one machine meet on the loopback, out of other machines' reach.

    MASTER_ADDR is the loopback for `python SCRIPT`, `deepspeed --num_gpus N SCRIPT`, and one node of Slurm. torch's own
    rendezvous (env://) listens on every network, whatever the address. torchrun opens the port itself.

    Returns:
        None for torch's default, env://.
    """
    address = os.environ["MASTER_ADDR"]
    with contextlib.suppress(ValueError):  # a name
        if not ipaddress.ip_address(address).is_loopback:
            return None
        address = "localhost"
    if address != "localhost" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if "lo" in (name for _, name in socket.if_nameindex()):
        for backend in ("GLOO", "NCCL"):  # otherwise they use the network of the machine's name
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    with contextlib.suppress(RuntimeError):  # it is registered already
        dist.register_rendezvous_handler("loopback", meet_on_loopback)
    return "loopback://"


def meet_on_loopback(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    """A rendezvous handler of torch. It yields store, rank, number of ranks. The store listens only on MASTER_ADDR.

    Raises:
        OSError: the port is in use.
    """
    number, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port, listener = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None
    if number == 0:
        listener = socket.create_server((address, port), family=socket.getaddrinfo(address, port)[0][0]).detach()
    yield dist.TCPStore(address, port, ranks, number == 0, timeout, master_listen_fd=listener), number, ranks


def shared_memory() -> Path:
    """DeepSpeed's file for this CPU rank's all-reduce buffer of 64 MB (0.19.8, ops/csrc/cpu/comm/shm.cpp)."""
    address, port, number = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    return Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{number}")


def unlink_shared_memory() -> None:
    """Remove the name of DeepSpeed's shared memory. All ranks have opened it, and DeepSpeed never removes it.

    Without a name, the memory is freed with the last rank, also if ranks are killed. Old names belong to ranks that
    were killed before they came here, and are removed, too.
    """
    if get_accelerator().device_name() == "cpu":  # also with one rank, which has a buffer under the launcher
        barrier()
        shared_memory().unlink(missing_ok=True)
        for stale in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
            with contextlib.suppress(OSError):  # another rank was faster
                if time.time() - stale.stat().st_mtime > ORPHAN_SECONDS:
                    stale.unlink()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*values: object) -> None:
    """print() on rank 0."""
    if rank() == 0:
        print(*values, flush=True)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def to_group_device(values: torch.Tensor) -> torch.Tensor:
    """A float64 copy on the device where collectives work. NCCL cannot reduce CPU memory."""
    return values.detach().to(get_accelerator().current_device_name(), torch.float64, copy=True)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, on the CPU, in float64. values: any shape."""
    values = to_group_device(values)
    if world_size() > 1:
        dist.all_reduce(values)
    return values.cpu()


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over ranks, on the CPU, in float64. values: any shape."""
    values = to_group_device(values)
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.cpu()


def all_gather_lists(items: Iterable) -> list:
    """Concatenate every rank's picklable items, in the order of ranks, on every rank."""
    items = list(items)
    if world_size() == 1:
        return items
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, items)
    return [item for of_rank in gathered for item in of_rank]


def agree(error: str | None) -> str | None:
    """The first error message of any rank, on every rank. None if no rank has one. All ranks together."""
    errors = [(number, text) for number, text in enumerate(all_gather_lists([error])) if text is not None]
    if not errors:
        return None
    number, text = errors[0]
    return text if world_size() == 1 else f"rank {number}: {text}"


def masked_mean_var(values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Mean and unbiased variance of the entries under a bool mask of the same shape, over all ranks."""
    picked = values[mask].double()
    count, total = all_reduce_sum(torch.stack([picked.new_tensor(float(picked.numel())), picked.sum()])).tolist()
    mean = total / max(count, 1.0)
    squares = float(all_reduce_sum(((picked - mean) ** 2).sum()))
    return mean, squares / max(count - 1.0, 1.0)


def normalize(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values, shifted and scaled to mean 0 and variance 1 under a bool mask of the same shape, over all ranks."""
    mean, variance = masked_mean_var(values, mask)
    return (values - mean) / (variance**0.5 + 1e-5)


def masked_min_max(values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest entry under a bool mask of the same shape, over all ranks."""
    picked = values[mask].double()
    lowest = picked.new_tensor([-torch.inf])  # this rank may have no entries
    extremes = torch.stack([torch.cat([-picked, lowest]).max(), torch.cat([picked, lowest]).max()])
    low, high = all_reduce_max(extremes).tolist()
    return -low, high
