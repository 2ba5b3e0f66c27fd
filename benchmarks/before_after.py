"""The moving image at the top of README: what a run did before and after training, as a GIF.

    python benchmarks/before_after.py runs/my_run --output docs/before_after.gif

It is composed from the videos in the run folder. Nothing is simulated. The episodes are chosen as for the run's own
before_after.mp4, and the last line of the image says how.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from schemas import UserError
from vla.evaluation.montage import choose_pairs, paired_frames, read_side, recorded_iterations
from vla.evaluation.video import VideoWriter

# one palette for all frames. Without dithering, what does not move costs nothing
FILTERS = "scale={width}:-1:flags=lanczos,split[a][b];[a]palettegen=max_colors=160[p];[b][p]paletteuse=dither=none"


def write_gif(run_dir: Path, output: Path, pairs: int, width: int) -> str:
    """Write the GIF. Returns the sentence that says how its episodes were chosen.

    Raises:
        UserError: the run has no two recorded evaluations of the same episodes.
    """
    iterations = recorded_iterations(run_dir)
    if len(iterations) < 2:
        raise UserError(f"{run_dir} has {len(iterations)} recorded evaluations, but two are needed: train on")
    before, after = read_side(run_dir, iterations[0]), read_side(run_dir, iterations[-1])
    chosen, how = choose_pairs(before, after, pairs)
    if not chosen:
        raise UserError(f"the first and the last evaluation of {run_dir} recorded no episode in common")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.mp4"
        with VideoWriter(path) as video:
            for frame in paired_frames(before, after, chosen, how):
                video.add(frame)
        program, filters = imageio_ffmpeg.get_ffmpeg_exe(), FILTERS.format(width=width)
        command = [program, "-y", "-v", "error", "-i", str(path), "-vf", filters, "-loop", "0", str(output)]
        subprocess.run(command, check=True)
    return how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder with at least two recorded evaluations")
    parser.add_argument("--output", type=Path, default=Path("docs/before_after.gif"), help="the GIF")
    parser.add_argument("--pairs", type=int, default=3, help="episodes side by side")
    parser.add_argument("--width", type=int, default=960, help="width in pixels")
    args = parser.parse_args()
    try:
        how = write_gif(args.run_dir, args.output, args.pairs, args.width)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB. {how}")


if __name__ == "__main__":
    main()
