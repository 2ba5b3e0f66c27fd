"""Reward, success and images of many envs at once, as functions of tensors without a loop over rows.

The rules are those of `envs/put_on_plate.py`, which judges one env in plain numbers. This file uses its constants, and
tests show that both give the same results. There are N rows, one per env. Units are metres and newtons in the world
frame. Every device works.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from envs.put_on_plate import (
    GRASP_MIN_COSINE,
    GRASP_MIN_FORCE,
    GRASP_STREAK,
    ON_MIN_FORCE,
    ON_XY_SLACK,
    ON_Z_SLACK,
    REWARD_GRASP,
    REWARD_STREAK,
    REWARD_SUCCESS,
)
from envs.shadows import Spot, darkened

ROWS_AT_ONCE = 32  # that get a texture together, because float32 copies of more images would fill a GPU


# ---------------------------------------------------------------------------------------------------------------------
# reward and success
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Latches:
    """Flags and counters that last for an episode, [N] each."""

    grasped_once: torch.Tensor  # bool
    streak: torch.Tensor  # int64, control steps in a row with the object grasped
    streak_once: torch.Tensor  # bool
    potential: torch.Tensor  # float64

    @classmethod
    def zeros(cls, count: int, device: torch.device | str) -> Latches:
        return cls(
            grasped_once=torch.zeros(count, dtype=torch.bool, device=device),
            streak=torch.zeros(count, dtype=torch.int64, device=device),
            streak_once=torch.zeros(count, dtype=torch.bool, device=device),
            potential=torch.zeros(count, dtype=torch.float64, device=device),
        )

    def clear(self, rows: torch.Tensor) -> None:
        """Reset the rows in which an episode begins. rows: a bool mask [N] or indices."""
        for values in vars(self).values():
            values[rows] = 0

    def update(self, grasped: torch.Tensor, success: torch.Tensor) -> torch.Tensor:
        """Account for one control step with grasped and success bool [N].

        Returns the rewards, float64 [N]: the increase of the potential.
        """
        self.streak = torch.where(grasped, self.streak + 1, 0)
        self.grasped_once = self.grasped_once | grasped
        self.streak_once = self.streak_once | (self.streak >= GRASP_STREAK)
        grasp = REWARD_GRASP * self.grasped_once.double()
        streak = REWARD_STREAK * self.streak_once.double()
        succeeded = REWARD_SUCCESS * (success & self.grasped_once).double()
        potential = grasp + streak + succeeded
        rewards = potential - self.potential
        self.potential = potential
        return rewards


def privileged_state(
    tool: torch.Tensor,
    qpos: torch.Tensor,
    obj: torch.Tensor,
    receptacle: torch.Tensor,
    half_sizes: torch.Tensor,
    flags: torch.Tensor,
) -> torch.Tensor:
    """`PutOnPlateInScene.privileged_state` of N rows, float32 [N, 45].

    tool, obj and receptacle are poses [N, 7], qpos is [N, 8], half_sizes [N, 2, 3] and flags [N, 4].
    """
    from_each_other = (obj[:, :3] - tool[:, :3], receptacle[:, :3] - obj[:, :3])
    return torch.cat([tool, obj, receptacle, qpos, half_sizes.flatten(1), *from_each_other, flags], dim=1).float()


def pressed_open(opening: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
    """Whether fingers are pushed outwards hard enough: bool [N].

    opening: unit vectors [N, 3] in which the fingers open. force: of the object on each finger, [N, 3].
    """
    size = torch.linalg.vector_norm(force, dim=-1)
    outwards = (opening * force).sum(-1)
    return (size >= GRASP_MIN_FORCE) & (outwards >= GRASP_MIN_COSINE * size)


def over_receptacle(
    obj: torch.Tensor, receptacle: torch.Tensor, object_half: torch.Tensor, receptacle_half: torch.Tensor
) -> torch.Tensor:
    """Whether objects are above their receptacles and low enough: bool [N], of positions and half edges [N, 3]."""
    offset = obj - receptacle
    distance = torch.linalg.vector_norm(offset[:, :2], dim=-1)
    height = offset[:, 2]
    gap = height - receptacle_half[:, 2] - object_half[:, 2]
    near = distance <= receptacle_half.amax(-1) + ON_XY_SLACK
    return near & (height > 0) & (gap <= ON_Z_SLACK)


def touches(force: torch.Tensor) -> torch.Tensor:
    """Whether objects press on their receptacles: bool [N] of forces [N, 3]."""
    return torch.linalg.vector_norm(force, dim=-1) > ON_MIN_FORCE


# ---------------------------------------------------------------------------------------------------------------------
# images
# ---------------------------------------------------------------------------------------------------------------------


def compose(color: torch.Tensor, foreground: torch.Tensor, overlay: torch.Tensor) -> torch.Tensor:
    """Robot and objects over the table images: uint8 [N, H, W, 3].

    color and overlay are of that shape too. foreground bool [N, H, W].
    """
    return torch.where(foreground[..., None], color, overlay)


def shaded(image: torch.Tensor, upright: torch.Tensor, spot: Spot) -> torch.Tensor:
    """Images with a shadow each, some rows at a time: uint8 [N, H, W, 3].

    upright: bool [N, H, W], where no shadow falls. The spot's numbers are tensors [N].
    """
    pieces = []
    for rows in torch.arange(len(image), device=image.device).split(ROWS_AT_ONCE):
        pieces.append(darkened(image[rows], upright[rows], Spot(*(number[rows] for number in spot))))
    return torch.cat(pieces)


def bounding_box(foreground: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """top, bottom, left, right of each mask: int64 [N], bottom and right excluded. The first pixel if it is empty."""
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


def mixed(image: torch.Tensor, texture: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted mean of image uint8 and texture float32, both [N, H, W, 3], rounded towards zero: uint8.

    weight: float32 [N], of the texture.
    """
    weight = weight[:, None, None, None]
    return (image * (1 - weight) + texture * weight).clamp(0, 255).to(torch.uint8)


def blend_foreground(
    image: torch.Tensor, foreground: torch.Tensor, textures: torch.Tensor, which: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Stretch textures over the box around the foreground, and mix them into the foreground: uint8 [N, H, W, 3].

    Args:
        image: uint8 [N, H, W, 3].
        foreground: bool [N, H, W].
        textures: uint8 [K, H, W, 3].
        which: int64 [N], the index of each row's texture.
        weight: float32 [N].
    """
    height, width = foreground.shape[1:]
    top, bottom, left, right = bounding_box(foreground)
    x = _place_in_box(left, right, width)[:, None, :].expand(-1, height, -1)
    y = _place_in_box(top, bottom, height)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], -1)  # [N, H, W, 2]
    texture = textures[which].permute(0, 3, 1, 2).float()
    stretched = F.grid_sample(texture, grid, mode="bilinear", padding_mode="border", align_corners=False)
    blended = mixed(image, stretched.permute(0, 2, 3, 1), weight)
    return torch.where(foreground[..., None], blended, image)


def _place_in_box(first: torch.Tensor, end: torch.Tensor, length: int) -> torch.Tensor:
    """Position of each pixel in the box from `first` to `end` [N], -1 to 1: float32 [N, length]."""
    pixel = torch.arange(length, device=first.device) + 0.5
    return 2 * (pixel - first[:, None]) / (end - first)[:, None] - 1


def blend_whole(
    image: torch.Tensor, foreground: torch.Tensor, textures: torch.Tensor, which: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Cut pieces from textures of twice the size, their corners at the middle of the box, and mix them in everywhere.

    The arguments are those of `blend_foreground`, but textures are uint8 [K, 2 H, 2 W, 3].
    """
    height, width = foreground.shape[1:]
    top, bottom, left, right = bounding_box(foreground)
    y = ((top + bottom - 1) // 2).clamp(1, height - 1)
    x = ((left + right - 1) // 2).clamp(1, width - 1)
    rows = y[:, None] + torch.arange(height, device=foreground.device)
    columns = x[:, None] + torch.arange(width, device=foreground.device)
    piece = textures[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return mixed(image, piece.float(), weight)


def textured(
    image: torch.Tensor,
    foreground: torch.Tensor,
    textures: torch.Tensor,
    which: torch.Tensor,
    weight: torch.Tensor,
    texture_on: str,
) -> torch.Tensor:
    """Images with their textures where the weight is not 0, some rows at a time.

    texture_on: "whole" for `blend_whole`, else `blend_foreground`, which explains the other arguments.
    """
    blend = blend_whole if texture_on == "whole" else blend_foreground
    image = image.clone()
    for rows in torch.nonzero(weight)[:, 0].split(ROWS_AT_ONCE):
        image[rows] = blend(image[rows], foreground[rows], textures, which[rows], weight[rows])
    return image
