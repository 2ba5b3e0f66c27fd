"""What images cost the CPU before a model sees them, in ms of one core per 16 images: copied, resized, kept.

    python collect_demos.py --num_demos 8 --output demos/large   # any set will do
    python benchmarks/image_cost.py --demos demos/large

`resized` is what acting costs the host with --image_resize pil or on a CPU. `copied` is the host's part where a GPU
resizes. The other rows are train_sft.py's. It reads and resizes images anew, then with the file of small images in the
first pass over the set and in later ones. Crops and colours come on top.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs.demo_sets import open_demos
from schemas.pixels import Pixels, resize
from vla.training import augmentation
from vla.training.small_images import SmallImages

BATCH = 16


def milliseconds(make: Callable[[list[int]], torch.Tensor], batches: list[list[int]]) -> float:
    """CPU time of this thread per batch, in ms."""
    began = time.thread_time()
    for batch in batches:
        make(batch)
    return 1000 * (time.thread_time() - began) / len(batches)


def main(flags: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    demos = open_demos(flags.demos)
    pixels = Pixels((flags.model_size, flags.model_size), flags.image_resize)
    batches = [list(range(first, first + BATCH)) for first in range(0, len(demos) - BATCH + 1, BATCH)]
    if not batches:
        sys.exit(f"--demos {flags.demos} has {len(demos)} steps: give a set of {BATCH} or more")

    def anew(index: list[int]) -> torch.Tensor:
        return resize(torch.from_numpy(demos.images(index)), *pixels)

    large, small = torch.from_numpy(demos.images(batches[0])), anew(batches[0])
    target = torch.empty_like(large).copy_(large)
    draws = augmentation.draw(BATCH, torch.Generator().manual_seed(0))
    few = batches[:1] * 5
    print(f"ms of CPU per {BATCH} images, {list(large.shape[1:3])} to {list(pixels.size)}, {pixels.how}, one thread")
    print(f"copied                      {milliseconds(lambda _: target.copy_(large), few):8.2f}")
    print(f"resized                     {milliseconds(lambda _: resize(large, *pixels), few):8.2f}")
    print(f"read and resized            {milliseconds(anew, batches):8.2f}")
    with tempfile.TemporaryDirectory() as folder:
        kept = SmallImages(demos.images, len(demos), pixels, Path(folder) / "set.images")
        print(f"kept, first pass            {milliseconds(kept, batches):8.2f}")
        print(f"kept, later passes          {milliseconds(kept, batches):8.2f}")
    print(f"crops and colours           {milliseconds(lambda _: augmentation.augment(small, draws), few):8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", type=Path, required=True, help="A set for train_sft.py.")
    parser.add_argument("--model_size", type=int, default=224, help="Pixels of the model's image. (default: 224)")
    parser.add_argument("--image_resize", choices=("tensor", "pil"), default="tensor", help="(default: tensor)")
    main(parser.parse_args())
