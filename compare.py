"""Learning curves of several runs side by side, with the mean and the spread over seeds.

    # two runs, also while they go on
    python compare.py runs/one runs/other
    # seeds of one setting are one group, whatever their folders are called
    python compare.py results/make_train/seed_* results/ppo_openvla/seed_* --output runs/two_models

Runs of train_ppo.py, train_grpo.py and train_sft.py can be mixed. Those whose flags differ only in the seed are one
group, and a group has the name of the flags by which it differs from the others.

--output gets report.html (all in one file), comparison.png, comparison.md and comparison.json. For two evaluations of
evaluate.py, pair by pair, use `python evaluate.py --compare`.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from schemas import UserError, is_taken


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN [RUN ...] [--output FOLDER]",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Folder of a run, finished or not.")
    parser.add_argument("--output", metavar="FOLDER", help="New folder. Without it, runs/compare_<time> is made.")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    from vla.evaluation.statistics import markdown_table  # after --help, since these imports take seconds
    from vla.reports.comparison_page import write_comparison
    from vla.reports.run_groups import group_runs, groups_table, read_runs
    from vla.text import without_keys, without_machine

    folder = Path(args.output or f"runs/compare_{time.strftime('%Y%m%d_%H%M%S')}")
    try:
        if is_taken(folder):
            raise UserError(f"--output {folder} exists already: give another one")
        groups = group_runs(read_runs(args.runs))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            command = without_machine(without_keys(shlex.join(["python", "compare.py", *argv])))
            write_comparison(folder, groups, command)
        except OSError as failure:
            raise UserError(f"--output {folder} cannot be written ({failure.strerror}): give another one") from failure
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{markdown_table(groups_table(groups))}\n")
    print(f"page        {folder}/report.html\nplot        {folder}/comparison.png\ntable       {folder}/comparison.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
