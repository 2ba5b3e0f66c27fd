"""Statistics of features as LeRobot keeps them: per episode and of the whole set, all as nested lists."""

from __future__ import annotations

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def of_numbers(values: np.ndarray) -> dict[str, list]:
    """Statistics of each dimension of values [T] or [T, D]: lists of D numbers. `count` is [T]."""
    columns = values.reshape(len(values), -1).astype(np.float64)
    found = {"min": columns.min(0), "max": columns.max(0), "mean": columns.mean(0), "std": columns.std(0)}
    found |= {name: np.quantile(columns, share, axis=0) for name, share in QUANTILES.items()}
    return {name: each.tolist() for name, each in found.items()} | {"count": [len(values)]}


def levels(image: np.ndarray) -> np.ndarray:
    """How often each level occurs in each channel, int64 [3, 256], of an image uint8 [H, W, 3]."""
    return np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])


def of_levels(counts: np.ndarray, num_images: int) -> dict[str, list]:
    """Statistics of each channel in [0, 1], lists of shape [3, 1, 1], from the sum of levels(), int64 [3, 256].

    Example, with one pixel each of levels 0, 51, 204 and 255 in a channel: the mean is 0.5, q50 is 0.2.
    """
    scale = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)  # [3, 256]
    mean = shares @ scale  # [3]
    variance = (shares * (scale - mean[:, None]) ** 2).sum(axis=1)
    cumulative = shares.cumsum(axis=1)
    found = {
        "min": [scale[row.nonzero()[0][0]] for row in counts],
        "max": [scale[row.nonzero()[0][-1]] for row in counts],
        "mean": mean,
        "std": np.sqrt(variance),
    }
    # the first level that this share of the pixels does not exceed
    found |= {
        name: [scale[np.searchsorted(row, share - 1e-9)] for row in cumulative] for name, share in QUANTILES.items()
    }
    nested = {name: [[[float(number)]] for number in numbers] for name, numbers in found.items()}
    return nested | {"count": [num_images]}
