"""Where shared anchors are, and one thread per process: two ranks share two cores."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Outputs of the published code on tiny models; not part of the repository."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip(f"no parity fixtures at {SHARED / 'fixtures'}")
    return SHARED / "fixtures"
