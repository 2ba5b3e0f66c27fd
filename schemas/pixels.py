"""The images that a policy reads. Its own preprocessing and the workers of envs make them with the same function."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


class Pixels(NamedTuple):
    """Size and resampling of a policy's images. It is plain data, so it can be sent to a worker."""

    size: tuple[int, int]  # height, width
    how: str  # see resize()


def resize(images: Tensor, size: tuple[int, int], how: str = "tensor") -> Tensor:
    """uint8 [N, H, W, 3] -> uint8 [N, h, w, 3], bicubic with antialias, aspect not kept ("resize-naive").

    Args:
        how: "tensor" resizes floats and rounds back to uint8, as RLinf does. "pil" is Pillow's fixed-point arithmetic
            on the CPU, as in OpenVLA's own code. They differ in 14 % of the values, by at most 2 of 255.
    """
    if tuple(images.shape[1:3]) == tuple(size):
        return images
    if how == "pil":
        resized = [
            Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC) for image in images.cpu().numpy()
        ]
        return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).to(images.device)
    pixels = images.permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
