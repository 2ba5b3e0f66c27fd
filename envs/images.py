"""The image that a policy sees, made of what the camera renders, a table image and perhaps a texture (RL4VLA 1.4).

Each step stands here twice: for one env in numpy (`envs/put_on_plate.py`), and below that as a function of tensors for
N rows, one per env (`envs/gpu/simulation.py`). Tests show that both give the same images. Every device works.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from envs.shadows import Spot, darkened

ROWS_AT_ONCE = 32  # that get a texture together, because float32 copies of more images would fill a GPU


# ---------------------------------------------------------------------------------------------------------------------
# robot and objects over the table
# ---------------------------------------------------------------------------------------------------------------------


def compose(color: np.ndarray, foreground: np.ndarray, overlay: np.ndarray) -> np.ndarray:
    """Robot and objects over the table image: uint8 [H, W, 3].

    color and overlay are of that shape too. foreground bool [H, W].
    """
    image = overlay.copy()
    for channel in range(3):  # eight times faster than one np.where with broadcasting
        np.copyto(image[..., channel], color[..., channel], where=foreground)
    return image


def compose_rows(color: torch.Tensor, foreground: torch.Tensor, overlay: torch.Tensor) -> torch.Tensor:
    """The same of N rows: uint8 [N, H, W, 3].

    color and overlay are of that shape too. foreground bool [N, H, W].
    """
    return torch.where(foreground[..., None], color, overlay)


def shaded_rows(image: torch.Tensor, upright: torch.Tensor, spot: Spot) -> torch.Tensor:
    """Images with a shadow each, some rows at a time: uint8 [N, H, W, 3].

    upright: bool [N, H, W], where no shadow falls. The spot's numbers are tensors [N].
    """
    pieces = []
    for rows in torch.arange(len(image), device=image.device).split(ROWS_AT_ONCE):
        pieces.append(darkened(image[rows], upright[rows], Spot(*(number[rows] for number in spot))))
    return torch.cat(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# textures
# ---------------------------------------------------------------------------------------------------------------------


def bounding_box(foreground: np.ndarray) -> tuple[int, int, int, int]:
    """top, bottom, left, right of a mask bool [H, W], bottom and right excluded. The first pixel if it is empty."""
    rows = np.flatnonzero(foreground.any(axis=1))
    columns = np.flatnonzero(foreground.any(axis=0))
    if not len(rows):
        return 0, 1, 0, 1
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def bounding_box_rows(foreground: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of masks bool [N, H, W]: int64 [N] each."""
    top, bottom = _ends(foreground.any(2))
    left, right = _ends(foreground.any(1))
    return top, bottom, left, right


def _ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First True of each row and the index after its last one: int64 [N] of bool [N, L]. 0 and 1 if there is none."""
    length = line.shape[-1]
    numbers = line.to(torch.uint8)
    first = numbers.argmax(-1)
    end = length - numbers.flip(-1).argmax(-1)
    return first, torch.where(line.any(-1), end, 1)


def mixed(image: np.ndarray, texture: np.ndarray, weight: float) -> np.ndarray:
    """The weighted mean of image uint8 and texture float32, both [H, W, 3], rounded towards zero: uint8.

    weight: of the texture, 0 to 1.
    """
    weight = np.float32(weight)
    return np.clip(image * (1 - weight) + texture * weight, 0, 255).astype(np.uint8)


def mixed_rows(image: torch.Tensor, texture: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same of N rows: uint8 [N, H, W, 3].

    weight: float32 [N], of the texture.
    """
    weight = weight[:, None, None, None]
    return (image * (1 - weight) + texture * weight).clamp(0, 255).to(torch.uint8)


def blend_foreground(image: np.ndarray, foreground: np.ndarray, texture: np.ndarray, weight: float) -> np.ndarray:
    """Stretch the texture over the box around the foreground, and mix it into the foreground.

    Args:
        image: uint8 [H, W, 3], which is changed and returned.
        foreground: bool [H, W].
        texture: float32 [H, W, 3].
        weight: of the texture, 0 to 1.
    """
    top, bottom, left, right = bounding_box(foreground)
    channels_first = torch.from_numpy(texture).permute(2, 0, 1)[None]
    stretched = F.interpolate(channels_first, size=(bottom - top, right - left), mode="bilinear")
    box = np.s_[top:bottom, left:right]
    blended = mixed(image[box], stretched[0].permute(1, 2, 0).numpy(), weight)
    image[box] = np.where(foreground[box][..., None], blended, image[box])
    return image


def blend_foreground_rows(
    image: torch.Tensor, foreground: torch.Tensor, textures: torch.Tensor, which: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The same of N rows: uint8 [N, H, W, 3].

    Args:
        image: uint8 [N, H, W, 3].
        foreground: bool [N, H, W].
        textures: uint8 [K, H, W, 3].
        which: int64 [N], the index of each row's texture.
        weight: float32 [N].
    """
    height, width = foreground.shape[1:]
    top, bottom, left, right = bounding_box_rows(foreground)
    x = _place_in_box(left, right, width)[:, None, :].expand(-1, height, -1)
    y = _place_in_box(top, bottom, height)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], -1)  # [N, H, W, 2]
    texture = textures[which].permute(0, 3, 1, 2).float()
    stretched = F.grid_sample(texture, grid, mode="bilinear", padding_mode="border", align_corners=False)
    blended = mixed_rows(image, stretched.permute(0, 2, 3, 1), weight)
    return torch.where(foreground[..., None], blended, image)


def _place_in_box(first: torch.Tensor, end: torch.Tensor, length: int) -> torch.Tensor:
    """Position of each pixel in the box from `first` to `end` [N], -1 to 1: float32 [N, length]."""
    pixel = torch.arange(length, device=first.device) + 0.5
    return 2 * (pixel - first[:, None]) / (end - first)[:, None] - 1


def blend_whole(image: np.ndarray, foreground: np.ndarray, texture: np.ndarray, weight: float) -> np.ndarray:
    """Mix in a piece of the texture, float32 [2 H, 2 W, 3]. Its corner is at the middle of the box."""
    height, width, _ = image.shape
    top, bottom, left, right = bounding_box(foreground)
    y = np.clip((top + bottom - 1) // 2, 1, height - 1)
    x = np.clip((left + right - 1) // 2, 1, width - 1)
    return mixed(image, texture[y : y + height, x : x + width], weight)


def blend_whole_rows(
    image: torch.Tensor, foreground: torch.Tensor, textures: torch.Tensor, which: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The same of N rows: uint8 [N, H, W, 3].

    The arguments are those of `blend_foreground_rows`, but textures are uint8 [K, 2 H, 2 W, 3].
    """
    height, width = foreground.shape[1:]
    top, bottom, left, right = bounding_box_rows(foreground)
    y = ((top + bottom - 1) // 2).clamp(1, height - 1)
    x = ((left + right - 1) // 2).clamp(1, width - 1)
    rows = y[:, None] + torch.arange(height, device=foreground.device)
    columns = x[:, None] + torch.arange(width, device=foreground.device)
    piece = textures[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return mixed_rows(image, piece.float(), weight)


def textured_rows(
    image: torch.Tensor,
    foreground: torch.Tensor,
    textures: torch.Tensor,
    which: torch.Tensor,
    weight: torch.Tensor,
    texture_on: str,
) -> torch.Tensor:
    """Images with their textures where the weight is not 0, some rows at a time.

    texture_on: "whole" for `blend_whole_rows`, else `blend_foreground_rows`, which explains the other arguments.
    """
    blend = blend_whole_rows if texture_on == "whole" else blend_foreground_rows
    image = image.clone()
    for rows in torch.nonzero(weight)[:, 0].split(ROWS_AT_ONCE):
        image[rows] = blend(image[rows], foreground[rows], textures, which[rows], weight[rows])
    return image
