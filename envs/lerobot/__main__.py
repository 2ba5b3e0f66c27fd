"""Rewrite a set of demonstrations: from ManiSkill's trajectory format to LeRobot's, or back.

python -m envs.lerobot demos/tiny demos/tiny_lerobot
python -m envs.lerobot demos/tiny demos/tiny_lerobot --images lossless
python -m envs.lerobot some_lerobot_set demos/theirs --demos_camera observation.images.top
"""

import argparse
import sys
from pathlib import Path

from envs.lerobot import is_lerobot
from envs.lerobot.layout import CAMERA_FLAG
from envs.lerobot.read import read_set
from envs.lerobot.write import write_set
from schemas import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m envs.lerobot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="Folder of a set. Its content tells the format.")
    parser.add_argument("target", type=Path, help="New folder for the set in the other format.")
    written = parser.add_argument_group("to LeRobot's format")
    written.add_argument(
        "--images",
        choices=("video", "lossless", "png"),
        help="How images are kept: in mp4 files that lose a little (video), in mp4 files that lose nothing (lossless), "
        "or as PNG files in the parquet files (png). (default: video)",
    )
    read = parser.add_argument_group("from LeRobot's format")
    read.add_argument(CAMERA_FLAG, metavar="FEATURE", help="Feature with the images, if the set has several cameras.")
    read.add_argument(
        "--gripper_closes", action="store_true", help="A high value of the gripper closes it. Without this, it opens."
    )
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    flags = parser.parse_args(argv)
    from_lerobot = is_lerobot(flags.source)
    if from_lerobot and flags.images:
        parser.error(f"--images is for sets in ManiSkill's format, and {flags.source} is in LeRobot's: leave it out")
    if not from_lerobot and (flags.demos_camera or flags.gripper_closes):
        parser.error(f"{CAMERA_FLAG} and --gripper_closes need a set in LeRobot's format, and {flags.source} is none")
    try:
        if from_lerobot:
            count = read_set(flags.source, flags.target, flags.demos_camera, flags.gripper_closes)
        else:
            count = write_set(flags.source, flags.target, flags.images or "video")["total_episodes"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{flags.target}: {count} episodes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
