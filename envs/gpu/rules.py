"""Reward, success and picture of many envs at once, as functions of tensors: nothing here loops over rows.

The rules are those of `envs/put_on_plate.py`, which judges one env in plain numbers; its constants are used here, and
tests hold both to the same results. N rows, one per env; metres, newtons, world frame; any device.
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

ROWS_AT_ONCE = 32  # of a picture with a texture: float32 copies of more would fill a GPU


# ---------------------------------------------------------------------------------------------------------------------
# reward and success
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Latches:
    """What an episode remembers; [N] each."""

    grasped_once: torch.Tensor  # bool
    streak: torch.Tensor  # int64, control steps in a row with the object grasped
    streak_once: torch.Tensor  # bool
    potential: torch.Tensor  # float64

    @classmethod
    def zeros(cls, count: int, device: torch.device | str) -> Latches:
        flags = [torch.zeros(count, dtype=torch.bool, device=device) for _ in range(2)]
        streak = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(flags[0], streak, flags[1], torch.zeros(count, dtype=torch.float64, device=device))

    def clear(self, rows: torch.Tensor) -> None:
        """Episodes begin in `rows`, a bool mask [N] or indices."""
        for values in vars(self).values():
            values[rows] = 0

    def update(self, grasped: torch.Tensor, success: torch.Tensor) -> torch.Tensor:
        """One control step: bool [N] each. Returns the rewards, float64 [N], the increase of the potential."""
        self.streak = torch.where(grasped, self.streak + 1, 0)
        self.grasped_once = self.grasped_once | grasped
        self.streak_once = self.streak_once | (self.streak >= GRASP_STREAK)
        potential = REWARD_GRASP * self.grasped_once.double() + REWARD_STREAK * self.streak_once.double()
        potential = potential + REWARD_SUCCESS * (success & self.grasped_once).double()
        rewards, self.potential = potential - self.potential, potential
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

    tool, obj, receptacle: poses [N, 7]; qpos [N, 8]; half_sizes [N, 2, 3]; flags [N, 4].
    """
    from_each_other = (obj[:, :3] - tool[:, :3], receptacle[:, :3] - obj[:, :3])
    return torch.cat([tool, obj, receptacle, qpos, half_sizes.flatten(1), *from_each_other, flags], dim=1).float()


def pressed_open(opening: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
    """Whether fingers are pushed outwards hard enough: bool [N].

    opening: unit vector [N, 3] in which each finger opens; force: what the object does to it, [N, 3].
    """
    size = torch.linalg.vector_norm(force, dim=-1)
    return (size >= GRASP_MIN_FORCE) & ((opening * force).sum(-1) >= GRASP_MIN_COSINE * size)


def over_receptacle(
    obj: torch.Tensor, receptacle: torch.Tensor, object_half: torch.Tensor, receptacle_half: torch.Tensor
) -> torch.Tensor:
    """Whether objects are above their receptacles and low enough: bool [N]; positions and half edges [N, 3]."""
    offset = obj - receptacle
    near = torch.linalg.vector_norm(offset[:, :2], dim=-1) <= receptacle_half.amax(-1) + ON_XY_SLACK
    low = offset[:, 2] - receptacle_half[:, 2] - object_half[:, 2] <= ON_Z_SLACK
    return near & (offset[:, 2] > 0) & low


def touches(force: torch.Tensor) -> torch.Tensor:
    """Whether objects press on their receptacles: bool [N] of forces [N, 3]."""
    return torch.linalg.vector_norm(force, dim=-1) > ON_MIN_FORCE


# ---------------------------------------------------------------------------------------------------------------------
# picture
# ---------------------------------------------------------------------------------------------------------------------


def compose(color: torch.Tensor, seen: torch.Tensor, overlay: torch.Tensor) -> torch.Tensor:
    """Robot and objects over the table pictures: uint8 [N, H, W, 3] of color and overlay alike, seen bool [N, H, W]."""
    return torch.where(seen[..., None], color, overlay)


def seen_box(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """top, bottom, left, right of all that is seen: int64 [N], bottom and right excluded; the first pixel for none."""

    def ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # bool [N, L]
        numbers = line.to(torch.uint8)
        first, last = numbers.argmax(-1), line.shape[-1] - numbers.flip(-1).argmax(-1)
        return first, torch.where(line.any(-1), last, 1)

    return (*ends(seen.any(2)), *ends(seen.any(1)))


def mixed(picture: torch.Tensor, texture: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """picture uint8, texture float32, both [N, H, W, 3], weight float32 [N] -> uint8; rounds towards zero."""
    weight = weight[:, None, None, None]
    return (picture * (1 - weight) + texture * weight).clamp(0, 255).to(torch.uint8)


def blend_foreground(picture, seen, textures, which, weight) -> torch.Tensor:
    """Textures stretched over the box of all that is seen, on what is seen: uint8 [N, H, W, 3].

    picture uint8 [N, H, W, 3]; seen bool [N, H, W]; textures uint8 [K, H, W, 3]; which int64 [N]; weight float32 [N].
    """
    height, width = seen.shape[1:]
    top, bottom, left, right = seen_box(seen)

    def across(first: torch.Tensor, last: torch.Tensor, length: int) -> torch.Tensor:
        """Where pixels lie in the box, -1 to 1: float32 [N, length]."""
        pixel = torch.arange(length, device=seen.device) + 0.5
        return 2 * (pixel - first[:, None]) / (last - first)[:, None] - 1

    x, y = across(left, right, width), across(top, bottom, height)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    texture = textures[which].permute(0, 3, 1, 2).float()
    stretched = F.grid_sample(texture, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(seen[..., None], mixed(picture, stretched.permute(0, 2, 3, 1), weight), picture)


def blend_whole(picture, seen, textures, which, weight) -> torch.Tensor:
    """Cuts from textures of twice the size on everything, their corners at the middle of that box.

    As `blend_foreground`, but textures uint8 [K, 2 H, 2 W, 3].
    """
    height, width = seen.shape[1:]
    top, bottom, left, right = seen_box(seen)
    y = ((top + bottom - 1) // 2).clamp(1, height - 1)
    x = ((left + right - 1) // 2).clamp(1, width - 1)
    rows = y[:, None] + torch.arange(height, device=seen.device)
    columns = x[:, None] + torch.arange(width, device=seen.device)
    cut = textures[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return mixed(picture, cut.float(), weight)


def textured(picture, seen, textures, which, weight, texture_on: str) -> torch.Tensor:
    """Textures on pictures (`blend_foreground`, `blend_whole`) where the weight is not 0, some rows at a time."""
    blend = blend_whole if texture_on == "whole" else blend_foreground
    picture = picture.clone()
    for rows in torch.nonzero(weight)[:, 0].split(ROWS_AT_ONCE):
        picture[rows] = blend(picture[rows], seen[rows], textures, which[rows], weight[rows])
    return picture
