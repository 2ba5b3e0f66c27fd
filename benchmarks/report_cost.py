"""What the page and the plot of a run cost: seconds of one writing, and their share of the run's time.

    python benchmarks/report_cost.py runs/my_run results/make_train/seed_0

The share is that of a run whose every writing takes as long as these. The first result is shown at once, and each
further writing waits. The rule is that of vla/reports/writer.py. The folder itself is not changed.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vla.reports.plots import plot_progress  # noqa: E402
from vla.reports.run_page import write_run_page  # noqa: E402
from vla.reports.run_record import read_run  # noqa: E402
from vla.reports.writer import PATIENCE  # noqa: E402

REPEATS = 5


def seconds_of(function, *values) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*values)
    return time.perf_counter() - start


def measure(folder: Path) -> tuple[float, float, float]:
    """Median seconds of the page and of the plot, and the page's MiB."""
    record = read_run(folder)
    write_run_page(record, time.time())  # imports plotly and reads the templates
    page = [seconds_of(lambda: write_run_page(read_run(folder), time.time())) for _ in range(REPEATS)]
    plot = [seconds_of(plot_progress, record) for _ in range(REPEATS)]
    size = (folder / "report.html").stat().st_size / 2**20
    return statistics.median(page), statistics.median(plot), size


def writings(iterations: list[float], cost: float) -> int:
    """How often a run writes while it goes on, if each writing takes `cost` seconds."""
    now = due = 0.0
    count = 0
    for seconds in iterations:
        now += seconds
        if now >= due:
            count, now = count + 1, now + cost
            due = now + PATIENCE * cost
    return count


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print one line per run folder.

    Args:
        runs: run folders.
    """
    for folder in runs:
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(folder, Path(place) / "run", ignore=shutil.ignore_patterns("checkpoints"))
            page, plot, size = measure(Path(place) / "run")
        iterations = [line["time/iteration"] for line in read_run(folder).lines if "time/iteration" in line]
        cost, whole = page + plot, sum(iterations)
        further = writings(iterations, cost) - 1  # the first one does not wait
        mean = whole / len(iterations)
        print(f"{folder}: page {page:.2f} s ({size:.1f} MiB), plot {plot:.2f} s, iteration {mean:.1f} s")
        print(f"    the first result, and {further} further writings: {100 * further * cost / whole:.2f} % of the time")


if __name__ == "__main__":
    tyro.cli(main)
