"""Where shared anchors are, and one thread per process: two ranks share two cores."""

import gc
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

ROOT = Path(__file__).resolve().parent.parent
HELPERS = ROOT / "tests" / "helpers"
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(HELPERS)]
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, whose children would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start scripts come first, so that two processes end at about the same time."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_runtest_teardown() -> None:
    """What imports left behind is not searched for garbage again.

    ManiSkill collects garbage whenever it builds a scene. In a process that has imported everything, that took 0.2 s
    each time.
    """
    if "mani_skill.envs" in sys.modules and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def warm_workers():
    """What starts worker processes of the simulator in this process is a fork of a warm one."""
    import warm

    from envs import processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", warm.AS_SUBPROCESS)
        yield


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Outputs of the published code on tiny models; not part of the repository."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip(f"no parity fixtures at {SHARED / 'fixtures'}")
    return SHARED / "fixtures"
