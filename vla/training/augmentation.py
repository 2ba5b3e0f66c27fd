"""Random crops and colours for supervised fine-tuning, so that the policy does not memorise a few hundred episodes.

The ranges are those of OpenVLA's fine-tuning: a crop of 90 % of the area, brightness +-0.2, contrast and saturation
times 0.8 to 1.2, hue +-0.05 of the circle. One generator draws the numbers of the whole batch, so the augmentation of a
batch does not depend on the number of ranks.

    B images   H, W height and width
"""

import math

import torch
import torch.nn.functional as F

CROP_AREA = 0.9
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.2, 0.2, 0.05
GRAY = (0.299, 0.587, 0.114)  # luma weights of red, green, blue


def draw(batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Six random numbers in [-1, 1] per image, [B, 6]: x and y of the crop, brightness, contrast, saturation, hue."""
    return 2 * torch.rand(batch_size, 6, generator=generator) - 1


def augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Augmented images, uint8 [B, H, W, 3], from images of the same shape and draws [B, 6]."""
    x, y, brightness, contrast, saturation, hue = draws.unbind(dim=1)
    pixels = crop(images.permute(0, 3, 1, 2).float() / 255.0, x, y)
    return (recolour(pixels, brightness, contrast, saturation, hue) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def crop(pixels: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cut CROP_AREA out of each image [B, 3, H, W] and enlarge it. x, y [B] in [-1, 1] give its place."""
    side = math.sqrt(CROP_AREA)
    transform = pixels.new_zeros(len(pixels), 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = side
    transform[:, 0, 2], transform[:, 1, 2] = (1 - side) * x, (1 - side) * y
    grid = F.affine_grid(transform, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recolour(
    pixels: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor, hue: torch.Tensor
) -> torch.Tensor:
    """Change the colours of pixels [B, 3, H, W] in [0, 1]. The other arguments are [B] in [-1, 1]."""

    def per_image(value: torch.Tensor) -> torch.Tensor:
        return value[:, None, None, None]

    gray = torch.tensor(GRAY, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    pixels = pixels + per_image(BRIGHTNESS * brightness)
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    pixels = mean + per_image(1 + CONTRAST * contrast) * (pixels - mean)
    luma = (pixels * gray).sum(dim=1, keepdim=True)
    pixels = luma + turned(pixels - luma, 2 * math.pi * HUE * hue) * per_image(1 + SATURATION * saturation)
    return pixels.clamp(0.0, 1.0)


def turned(colour: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate [B, 3, H, W] by angle [B] (rad) about the gray axis (1, 1, 1): Rodrigues' formula."""
    cosine, sine = angle.cos(), angle.sin()
    diagonal = cosine + (1 - cosine) / 3
    plus = (1 - cosine) / 3 + sine / math.sqrt(3)
    minus = (1 - cosine) / 3 - sine / math.sqrt(3)
    entries = ((diagonal, minus, plus), (plus, diagonal, minus), (minus, plus, diagonal))
    rotation = torch.stack([torch.stack(row, dim=1) for row in entries], dim=1)  # [B, 3, 3]
    return torch.einsum("bij,bjhw->bihw", rotation, colour)
