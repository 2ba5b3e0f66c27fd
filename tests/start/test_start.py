"""A start never hangs in silence: locks of compilers that died, ports, errors of one rank, Makefile and Slurm."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_slurm
import pytest
import torch
import warm
from conftest import ROOT
from launching import launcher_command, one_rank_environment, python, run_ranks
from torch.utils.file_baton import FileBaton

from vla.distributed import UserError
from vla.start import extensions
from vla.start.extensions import Lock
from vla.start.launch import job_cores, launched

HOLD = """
import sys
from vla.start.extensions import Lock
from vla.start.launch import launched
from torch.utils.file_baton import FileBaton
lock = {"ours": Lock, "torch": FileBaton}[sys.argv[1]](sys.argv[2])
assert lock.try_acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""
NASTY = ["two words", "$(touch owned)", "`touch owned`", "a;touch owned", "it's", "a\nb", "50%_%t", "ppo[1]", "-n *"]


def started(program: str, *words: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, words)]
    return warm.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@contextlib.contextmanager
def held(kind: str, lock: Path) -> Iterator[subprocess.Popen]:
    """A process that has the lock until its standard input is closed."""
    with started(HOLD, kind, lock, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        yield process
        process.kill()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of an op that is compiled already."""
    made = tmp_path / "some_op"
    made.mkdir()
    (made / "some_op.so").touch()
    return made


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != extensions.CLAIM)


class Said(list):
    """Lines that a lock says. What is put into `calls` is called, last first, when there is something to wait for."""

    def __init__(self):
        self.calls = []

    def say(self, words: str) -> None:
        self.append(words)
        if words.startswith("this start waits"):
            self.calls.pop()()


@pytest.fixture
def said(monkeypatch) -> Said:
    lines = Said()
    monkeypatch.setattr(extensions, "say", lines.say)
    return lines


def acquire(folder: Path) -> None:
    lock = Lock(str(folder / "lock"))
    assert lock.try_acquire() and (folder / "lock").exists()
    lock.release()
    assert left_in(folder) == ["some_op.so"]


# ---------------------------------------------------------------------- locks
def test_a_lock_that_nobody_holds_is_removed_and_said(folder, said):
    (folder / "lock").touch()
    acquire(folder)
    assert said == [f"the lock {folder / 'lock'} was removed, since no process held it"]
    acquire(folder)
    assert len(said) == 1


@pytest.mark.parametrize("make", [lambda lock: lock.symlink_to("nowhere"), os.mkfifo], ids=["link", "pipe"])
def test_a_lock_of_another_kind_is_no_hang(folder, said, make):
    make(folder / "lock")
    acquire(folder)
    assert said == [f"the lock {folder / 'lock'} was removed, since no process held it"]


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_held_lock_is_waited_for_by_name(folder, said, kind):
    with held(kind, folder / "lock") as other:
        said.calls.append(other.stdin.close)
        acquire(folder)
        assert other.wait(timeout=600) == 0, other.stderr.read()  # nobody took its lock away
    (line,) = said
    assert line.startswith(f"this start waits for process {other.pid} ({sys.executable} -c import sys from")
    assert line.endswith(f"which compiles in {folder}")


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_holder_that_is_killed_is_not_waited_for(folder, said, kind):
    with held(kind, folder / "lock") as other:
        said.calls.append(other.kill)
        acquire(folder)
    assert [" ".join(line.split()[:2]) for line in said] == ["this start", "the lock"]


@pytest.mark.parametrize("claim", ["", "of a dead process"])
def test_a_start_behind_one_that_waits_names_whom_that_one_waits_for(folder, claim):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    with held("torch", folder / "lock") as other:
        waits = Lock(folder / "lock")
        assert waits.look().words.startswith(f"process {other.pid} (")
        (folder / extensions.CLAIM).write_text(claim and f"{socket.gethostname()} {dead.pid}")
        assert Lock(folder / "lock").look().words.startswith(f"process {other.pid} (")
        waits.leave()


def test_torch_waits_for_our_lock(folder):
    with held("ours", folder / "lock"):
        assert not FileBaton(str(folder / "lock")).try_acquire()


def test_a_compiler_that_outlived_its_rank_is_waited_for(folder, said, tmp_path):
    (folder / "lock").touch()
    compiler = Path(shutil.copy(shutil.which("sleep"), tmp_path / "ninja"))
    with (
        subprocess.Popen([compiler, "600"], cwd=folder) as process,
        subprocess.Popen(["sleep", "600"], cwd=folder) as other,  # who only looks around there is no compiler
    ):
        said.calls.append(process.kill)
        acquire(folder)
        assert other.poll() is None
        other.kill()
    shown = f"{compiler} 600"[:80]
    assert said[0].startswith(f"this start waits for process {process.pid} ({shown})")
    assert said[-1].endswith("was removed, since no process held it")


ONE_OF_MANY = """
import sys, time
from vla.start.extensions import Lock
from vla.start.launch import launched
lock = Lock(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
lock.try_acquire()
began = time.monotonic()
time.sleep(0.2)
print(began, time.monotonic())
lock.release()
"""


def test_of_many_starts_one_removes_the_lock_and_one_at_a_time_compiles(folder):
    (folder / "lock").touch()
    many = [started(ONE_OF_MANY, folder / "lock", stdin=subprocess.PIPE) for _ in range(4)]
    for one in many:
        assert one.stdout.readline() == "ready\n"
    for one in many:
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = [one.communicate(timeout=600) for one in many]
    assert not any(one.returncode for one in many), answers
    times = sorted(tuple(map(float, out.split())) for out, _ in answers)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    assert "".join(err for _, err in answers).count("was removed") == 1
    assert left_in(folder) == ["some_op.so"]


@pytest.mark.parametrize(
    "claim, words", [("node7 4711\n", "process 4711 on node7"), ("", "a process of another machine")]
)
def test_a_lock_of_another_machine_is_left_alone(folder, monkeypatch, capsys, claim, words):
    (folder / "lock").touch()
    (folder / extensions.CLAIM).write_text(claim)
    monkeypatch.setattr(extensions, "file_system_of", lambda folder: "nfs4")
    monkeypatch.setattr(extensions, "UNCERTAIN_SECONDS", 0.3)
    with pytest.raises(UserError, match=f"{folder / 'lock'} is still held by {words}: .* run `rm {folder / 'lock'}`"):
        Lock(str(folder / "lock")).try_acquire()
    assert capsys.readouterr().err == f"this start waits for {words}, which compiles in {folder}\n"
    assert (folder / "lock").exists()
    (folder / extensions.CLAIM).write_text(f"{socket.gethostname()} 4711\n")  # by a start of this machine, which died
    acquire(folder)


def test_a_lock_of_another_user_is_left_alone(folder, monkeypatch):
    (folder / "lock").touch()
    monkeypatch.setattr(os, "getuid", lambda: os.stat(folder).st_uid + 1000)
    monkeypatch.setattr(extensions, "UNCERTAIN_SECONDS", 0.3)
    with pytest.raises(UserError, match=f"held by a process of user {os.stat(folder).st_uid}"):
        Lock(str(folder / "lock")).try_acquire()
    assert (folder / "lock").exists()


def test_file_systems_have_a_name():
    assert extensions.file_system_of(Path("/proc/self")) == "proc"
    assert extensions.file_system_of(Path("/dev/shm")) in extensions.OF_THIS_MACHINE


ENDED_WHILE_IT_COMPILES = """
import subprocess, sys, time
from vla.start.extensions import Lock
from vla.start.launch import launched
lock = Lock(sys.argv[1] + "/lock")
lock.try_acquire()
compiler = subprocess.Popen([sys.argv[2], "600"], cwd=sys.argv[1])
print(compiler.pid, flush=True)
while compiler.poll() is None:  # compiler.wait() would sleep through a signal that comes just before it
    time.sleep(0.1)
"""


def test_sigterm_takes_the_lock_and_the_compiler_along(folder, tmp_path):
    compiler = shutil.copy(shutil.which("sleep"), tmp_path / "ninja")
    process = started(ENDED_WHILE_IT_COMPILES, folder, compiler)
    number = int(process.stdout.readline())
    process.terminate()
    assert process.wait(timeout=600) == -signal.SIGTERM
    assert left_in(folder) == ["some_op.so"]
    deadline = time.monotonic() + 600
    while Path(f"/proc/{number}").exists() and "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=f"compiled ops in {tmp_path / 'none'} .*TORCH_EXTENSIONS_DIR"):
        Lock(str(tmp_path / "none" / "lock")).try_acquire()


# ---------------------------------------------------------------------- where ops are kept
COMPILE_SMALL = """
import sys
from vla.start.extensions import keep_ops
keep_ops()
from torch.utils.cpp_extension import load
load("small", [sys.argv[1]], is_python_module=False)
"""


def test_torch_compiles_under_our_lock(tmp_path):
    """What torch itself does with a lock that nobody holds is to wait for ever."""
    (tmp_path / "small.cpp").write_text("int one() { return 1; }")
    (tmp_path / "ops" / "small").mkdir(parents=True)
    (tmp_path / "ops" / "small" / "lock").touch()
    process = started(
        COMPILE_SMALL, tmp_path / "small.cpp", env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    )
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    first, second = [line for line in said.splitlines() if str(tmp_path / "ops" / "small") in line]
    assert first.endswith(" was removed, since no process held it") and second.startswith(
        "DeepSpeed compiles small into"
    )
    assert (tmp_path / "ops" / "small" / "small.so").exists() and not (tmp_path / "ops" / "small" / "lock").exists()


def test_ops_are_kept_with_the_environment(monkeypatch, tmp_path):
    """What is compiled names the environment's path: by another path it would be compiled again, at every change."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    folders = {}
    (tmp_path / "clone").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "clone")
    for prefix in (tmp_path / "clone", tmp_path / "other"):
        monkeypatch.setattr(sys, "prefix", str(prefix))
        folders[prefix] = extensions.ops_folder()
        assert folders[prefix].is_relative_to(prefix) and folders[prefix] == extensions.ops_folder()
    assert len({folder.resolve() for folder in folders.values()}) == 2
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # torch would take the working directory
    assert extensions.ops_folder() == folders[tmp_path / "other"]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert extensions.ops_folder() == Path("/somewhere")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "file"))
    assert extensions.ops_folder() is None  # nothing can be written there: torch's own folder it is


# ---------------------------------------------------------------------- a start
ONE_RANK = """
import json, sys
import psutil, torch
from vla.distributed import all_reduce_sum, rank, setup_distributed
setup_distributed(0)
ports = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == "LISTEN"]
print("answer", json.dumps([all_reduce_sum(torch.tensor(rank() + 1.0)).item(), ports]), flush=True)
torch.distributed.destroy_process_group()
"""


def answer(output: str) -> list:
    return json.loads(next(line for line in output.splitlines() if line.startswith("answer")).removeprefix("answer"))


@pytest.mark.slow
def test_a_start_behind_a_dead_lock_says_so_and_starts(tmp_path):
    """The op is compiled at most once, for all that this machine tests."""
    assert python("-c", ONE_RANK).returncode == 0
    ops = Path(shutil.copytree(extensions.ops_folder(), tmp_path / "ops"))
    lock, library = (ops / "deepspeed_shm_comm" / name for name in ("lock", "deepspeed_shm_comm.so"))
    lock.touch()
    made = library.stat().st_mtime_ns
    environment = one_rank_environment() | {"TORCH_EXTENSIONS_DIR": str(ops)}
    run = subprocess.run(
        [sys.executable, "-c", ONE_RANK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert f"the lock {lock} was removed, since no process held it" in run.stderr and "compiles" not in run.stderr
    assert library.stat().st_mtime_ns == made and not lock.exists()
    total, ports = answer(run.stdout)
    assert total == 1 and ports and set(ports) == {"127.0.0.1"}


@pytest.mark.parametrize(
    "address, url",
    [
        ("127.0.0.1", "loopback://"),
        ("::1", "loopback://"),
        ("localhost", "loopback://"),
        ("10.0.0.1", None),
        ("node1", None),
    ],
)
def test_ranks_of_one_machine_meet_on_the_loopback(monkeypatch, address, url):
    from vla.distributed import where_ranks_meet

    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert where_ranks_meet() == url
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"  # told otherwise
    assert os.environ.get("NCCL_SOCKET_IFNAME") == ("lo" if url else None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert where_ranks_meet() is None


# ---------------------------------------------------------------------- errors in one sentence
def a_wrong_flag():
    raise UserError("--flag is wrong")


def a_refusal():
    from envs.spec import check_module

    check_module("no_such_module:Task-v1")


def a_missing_file():
    Path("/nowhere/file").read_text()


def a_wrong_shape():
    torch.nn.functional.linear(torch.zeros(2, 3), torch.zeros(4, 5))


def a_wrong_product():
    torch.zeros(2, 3) @ torch.zeros(4, 5)


@pytest.mark.parametrize(
    "fail, is_expected",
    [(a_wrong_flag, True), (a_refusal, True), (a_missing_file, True), (a_wrong_shape, False), (a_wrong_product, False)],
)
def test_an_unexpected_error_names_the_variable_that_shows_its_traceback(fail, is_expected, capsys, monkeypatch):
    from vla import distributed

    def main(_: None) -> None:
        with distributed.user_errors():
            fail()

    def printed() -> str:
        with pytest.raises(SystemExit) as stop:
            distributed.run_main(main, lambda: None)
        assert stop.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(distributed, "steady_streams", lambda: None)  # it would take pytest's place at the streams
    monkeypatch.delenv("SOLOVLA_DEBUG", raising=False)
    sentence = printed()
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    assert ("SOLOVLA_DEBUG=1" in sentence) == (not is_expected)
    assert ("RuntimeError" in sentence) == (not is_expected)
    monkeypatch.setenv("SOLOVLA_DEBUG", "1")
    trace = printed()
    assert "Traceback" in trace and f"in {fail.__name__}" in trace and trace.endswith(sentence)


# ---------------------------------------------------------------------- errors of ranks
RANKS_THAT_FAIL = """
import os, sys, time
sys.path.insert(0, os.environ["ROOT"])
from schemas import CommonError, UserError
from vla.distributed import run_main, setup_distributed, barrier, user_errors
kind, rank = sys.argv[-1], int(os.environ["RANK"])

def main(_):
    if kind == "all":
        time.sleep(4 * (rank == 0))  # the others are through before the first one speaks
        raise CommonError("--flag is wrong") from (OSError("cut") if rank == 1 else None)  # rank 1 did the work
    setup_distributed(0)
    with user_errors():
        if rank == 1 and kind == "file":
            open("/nowhere/file")
        if rank == 1 and kind == "flag":
            raise UserError("this rank has no GPU left")
        if rank == 1:
            1 / 0
    barrier()
    time.sleep(600)

run_main(main, lambda: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, code, sentence",
    [
        ("all", 2, "error: --flag is wrong"),
        ("file", 2, "error (rank 1): [Errno 2] No such file or directory: '/nowhere/file'"),
        ("flag", 2, "error (rank 1): this rank has no GPU left"),
        ("bug", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_ends_all_ranks_with_its_code(tmp_path, kind, code, sentence):
    (tmp_path / "program.py").write_text(RANKS_THAT_FAIL)
    words, place = [str(tmp_path / "program.py"), kind], {"ROOT": str(ROOT)}
    if kind == "file":  # the real launcher once: what it ends, `run_ranks` ends too
        environment = one_rank_environment() | place
        command = [*launcher_command(2), *words]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    else:
        run = run_ranks(2, *words, env=place)
    assert run.returncode == code, run.stderr
    assert sum(line.endswith(sentence) for line in run.stderr.splitlines()) == 1
    assert "Traceback" not in run.stderr or kind == "bug"


# ---------------------------------------------------------------------- Makefile
@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A clone that is set up, whose `deepspeed` writes its words to `words.json`."""
    root = tmp_path / "a clone"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "setup.sh"):
        shutil.copy(ROOT / name, root / name)
    (root / ".venv" / ".ready").touch()
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    tool = root / ".venv" / "bin" / "deepspeed"
    tool.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('words.json', 'w'))\n")
    tool.chmod(0o755)
    for name in ("PRESET", "RANKS", "ARGS", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return root


def make(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    # a make above, as `make test` is one, would change what this one prints
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "train", *words], cwd=root, env=kept | environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("by", ["command line", "environment"])
@pytest.mark.parametrize("name", [*NASTY, "$(shell touch owned)", "# x"])
def test_a_preset_is_a_file_name_and_nothing_else(clone, name, by):
    (clone / name).write_text("# ranks: 3\nseed: 1\n")
    before = set(clone.iterdir())
    run = make(clone, f"PRESET={name}") if by == "command line" else make(clone, PRESET=name)
    assert run.returncode == 0, run.stderr
    words = json.loads((clone / "words.json").read_text())
    assert words[0] == "--quiet" and words[3:] == ["--num_gpus", "3", "train_ppo.py", "--config", name]
    assert set(clone.iterdir()) == before | {clone / "words.json"}


def test_make_starts_a_launcher_that_speaks_only_of_errors(clone):
    (clone / "a.yaml").write_text("# ranks: 2\n")
    run = make(clone, "PRESET=a.yaml")
    assert json.loads((clone / "words.json").read_text())[0] == "--quiet" and "the launcher starts" in run.stdout
    make(clone, "PRESET=a.yaml", SOLOVLA_DEBUG="1")
    assert json.loads((clone / "words.json").read_text())[0] == "--master_port"


def test_the_presets_own_name_says_which_script(clone):
    for name in ("grpo_runs/ppo.yaml", "ppo_runs/grpo.yaml"):
        (clone / name).parent.mkdir()
        (clone / name).write_text("# ranks: 2\n")
        assert make(clone, f"PRESET={name}", "ARGS=--seed 3").returncode == 0
        script = f"train_{Path(name).stem}.py"
        assert json.loads((clone / "words.json").read_text())[5:] == [script, "--config", name, "--seed", "3"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "error: the preset a.yaml is not a file: use one from yaml/"),
        ("seed: 1\n", "error: a.yaml has no line like '# ranks: 2': run make train RANKS=2"),
        ("# ranks: many\n", "error: a.yaml has no line like '# ranks: 2': run make train RANKS=2"),
        ("# ranks: 0\n", "error: a.yaml has no line like '# ranks: 2': run make train RANKS=2"),
    ],
)
def test_a_preset_that_make_can_not_use(clone, content, sentence):
    if content is not None:
        (clone / "a.yaml").write_text(content)
    run = make(clone, "PRESET=a.yaml")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines()[0] == sentence and not (clone / "words.json").exists()
    if content is not None:
        assert make(clone, "PRESET=a.yaml", "RANKS=5").returncode == 0
        assert json.loads((clone / "words.json").read_text())[4] == "5"


# ---------------------------------------------------------------------- Slurm
@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder to submit jobs from; the interpreter only writes its words and some variables to `words.json`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    interpreter = tools / "python"
    interpreter.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "json.dump([sys.argv[1:], os.environ['MASTER_ADDR']], open('words.json', 'w'))\n"
        "sys.exit(int(os.environ.get('CODE', '0')))\n"
    )
    interpreter.chmod(0o755)
    variables = fake_slurm.install(tools) | {"PYTHON": str(interpreter), "FAKE_JOB": "4711"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(ROOT / "slurm", home / "slurm")
    return home


def submit(home: Path, *words: str, nodes: int = 1) -> subprocess.CompletedProcess:
    size = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    file = "slurm/train.sbatch" if nodes == 1 else "slurm/train_multinode.sbatch"
    return subprocess.run(["sbatch", *size, file, *words], cwd=home, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", [*NASTY, "plain"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_job_goes_on_where_its_run_dir_has_checkpoints(cluster, name, slash):
    run_dir = cluster / "runs" / name
    (run_dir / "checkpoints" / "iteration_000003").mkdir(parents=True)
    run = submit(cluster, "train_ppo.py", "--run_dir", f"runs/{name}{slash}")
    assert run.returncode == 0, run.stderr
    words, address = json.loads((cluster / "words.json").read_text())
    assert words == ["train_ppo.py", "--run_dir", f"runs/{name}{slash}", "--resume", f"runs/{name}"]
    assert address == "127.0.0.1"
    assert {path.name for path in (cluster / "runs").iterdir()} == {name, f"{name}.logs"}
    assert (cluster / "runs" / f"{name}.logs" / "rank_0.log").exists()
    assert {path.name for path in cluster.iterdir()} == {"runs", "slurm", "words.json"}


@pytest.mark.parametrize("flag", ["--run_dir", "--run-dir", "--run_dir=", "--run-dir="])
@pytest.mark.parametrize("name, slash", [("plain", ""), ("ppo[1]", "/"), ("two words", "//")])
def test_a_job_that_was_killed_before_its_first_checkpoint_comes_back(cluster, flag, name, slash):
    run_dir = cluster / "runs" / name
    for partial in ("iteration_000001.partial", "iteration_best"):  # neither is a checkpoint
        (run_dir / "checkpoints" / partial).mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("kept")
    place = f"runs/{name}{slash}"
    flags = [flag + place] if flag.endswith("=") else [flag, place]
    for lost in (f"{name}.lost.4711.0", f"{name}.lost.4711.0.again"):  # the second job has the first one's number
        assert submit(cluster, "train_ppo.py", *flags).returncode == 0
        assert json.loads((cluster / "words.json").read_text())[0] == ["train_ppo.py", *flags]
        assert (cluster / "runs" / lost / "metrics.jsonl").read_text() == "kept" and not run_dir.exists()
        shutil.copytree(cluster / "runs" / lost, run_dir)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock (util-linux)")
def test_a_job_leaves_a_run_alone_that_another_process_writes(cluster):
    run_dir = cluster / "runs" / "x"
    run_dir.mkdir(parents=True)
    with open(run_dir / "lock", "w") as lock:  # as schemas/lock.py does it
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = submit(cluster, "train_ppo.py", "--run_dir", "runs/x")
    assert run.returncode == 2 and run.stderr.startswith("error: another process is writing to runs/x: ")
    assert run_dir.exists() and not (cluster / "words.json").exists()
    assert submit(cluster, "train_ppo.py", "--run_dir", "runs/x").returncode == 0  # it has ended meanwhile
    assert (cluster / "runs" / "x.lost.4711.0" / "lock").exists()


def test_a_job_does_not_start_over_what_it_can_not_move(cluster, monkeypatch):
    (cluster / "runs" / "x").mkdir(parents=True)
    Path(os.environ["FAKE_SLURM"], "bin", "mv").write_text("#!/bin/sh\nexit 1\n")
    Path(os.environ["FAKE_SLURM"], "bin", "mv").chmod(0o755)
    run = submit(cluster, "train_ppo.py", "--run_dir", "runs/x")
    assert run.returncode == 2 and run.stderr.startswith("error: runs/x has no checkpoint and cannot be renamed")
    assert not (cluster / "words.json").exists()


def test_ranks_of_several_nodes_meet_on_the_first_one(cluster):
    Path(os.environ["FAKE_SLURM"], "bin", "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    assert submit(cluster, "train_ppo.py", "--run_dir", "runs/x", nodes=2).returncode == 0
    assert json.loads((cluster / "words.json").read_text())[1] == "node1"


# ---------------------------------------------------------------------- what an environment leaves to a start
@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK is '', but it must be a whole number from 0"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1, but it must be below WORLD_SIZE, which is 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0', but it must be a whole number from 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', but it must be a whole number from 1 to 65535"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes without ranks"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes without ranks"),
    ],
)
def test_variables_that_no_launcher_sets_are_refused(environment, sentence):
    with pytest.raises(UserError) as refusal:
        launched(environment)
    assert sentence in str(refusal.value)


def test_what_launchers_set_is_taken():
    assert launched({}) == (0, 1, 1, 0)
    assert launched({"SLURM_STEP_NUM_TASKS": "1", "MASTER_PORT": "29500"}) == (0, 1, 1, 0)
    of_deepspeed = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_PORT": "29500"}
    assert launched(of_deepspeed | {"SLURM_STEP_NUM_TASKS": "2"}) == (3, 4, 2, 1)


@pytest.mark.parametrize("environment", [{"RANK": "3"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"LOCAL_RANK": ""}])
def test_a_script_says_so_before_it_waits(environment):
    code = "from vla.distributed import run_main; run_main(print, lambda: 'parsed')"
    run = python("-c", code, env=environment)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert "parsed" not in run.stdout


STREAMS = """
import os, select, stat, sys
from vla.distributed import run_main

def main(path):
    if os.environ.get("READER_LEAVES"):  # what follows finds nobody
        print("a line", flush=True)
        readers = select.poll()
        readers.register(1, 0)
        while stat.S_ISFIFO(os.fstat(1).st_mode) and not readers.poll(10):
            pass
    for _ in range(3):
        print("a line", flush=True)
    os.write(1, b"of a library")
    with open(path, "w") as file:
        file.write(str(file.fileno()))

run_main(main, lambda: sys.argv[1])
"""


@pytest.mark.parametrize("redirected", [">&-", "<&-", ">&- 2>&-", "| true", "2>&1 | head -c 1"])
def test_a_run_outlasts_its_streams(tmp_path, redirected):
    """Nobody reads any more, or there never was a stream: the work is done, and no file takes a stream's number."""
    (tmp_path / "program.py").write_text(STREAMS)
    command = f'set -o pipefail; "{sys.executable}" "{tmp_path}/program.py" "{tmp_path}/number" {redirected}'
    environment = one_rank_environment() | {"PYTHONPATH": str(ROOT)}
    environment |= {"READER_LEAVES": "1"} if "|" in redirected else {}
    run = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr and "Broken" not in run.stderr, run.stderr
    assert int((tmp_path / "number").read_text()) > 2


# ---------------------------------------------------------------------- the cores of a job
BOTH = "cpu,cpuacct/a/cpu.cfs_"  # version 1


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("4:cpu,cpuacct:/a\n0::/\n", {f"{BOTH}quota_us": "400000", f"{BOTH}period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/a\n", {f"{BOTH}quota_us": "-1", f"{BOTH}period_us": "100000"}, 64),
        (None, {}, 64),
    ],
)
def test_the_cores_of_a_job_are_those_that_it_may_use(tmp_path, monkeypatch, groups, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    listed = tmp_path / "listed"
    if groups is not None:
        listed.write_text(groups)
    assert job_cores(listed, tmp_path) == cores
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert job_cores(listed, tmp_path) == min(cores, 3)
