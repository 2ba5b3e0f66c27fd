"""A training script that gets SIGTERM in the middle of an evaluation: tests/training/test_preemption.py runs it.

    python tests/helpers/stops.py SCRIPT EVALUATION RANK [flags of the script]

The signal comes within the second step of that evaluation (counted from 0) on that rank. Every rank prints how many
steps its evaluations make after it.
"""

import importlib
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vla.cli import parse_args
from vla.distributed import rank, run_main
from vla.evaluation import episodes

STEP = 2


def main() -> None:
    script, number, victim = importlib.import_module(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    seen = {"evaluations": 0, "steps": 0, "after": 0}
    act, evaluate = episodes.PolicyActor.act, episodes.evaluate

    def counted_act(self, obs, envs):
        seen["steps"] += 1
        if seen["evaluations"] == number + 1:
            seen["after"] += seen["steps"] > STEP
            if seen["steps"] == STEP and rank() == victim:
                signal.raise_signal(signal.SIGTERM)
        return act(self, obs, envs)

    def counted_evaluate(*arguments):
        seen["evaluations"] += 1
        seen["steps"] = 0
        means = evaluate(*arguments)
        if seen["evaluations"] == number + 1:
            print(f"rank {rank()}: {seen['after']} steps after the signal, {means}", flush=True)
        return means

    episodes.PolicyActor.act, script.evaluate = counted_act, counted_evaluate
    run_main(script.main, lambda: parse_args(script.Args, sys.argv[4:], description=""))


if __name__ == "__main__":
    main()
