"""Equality of nested results, and what a checkpoint makes of them."""

import tempfile
from pathlib import Path

import torch


def same(left, right) -> bool:
    """Bit equality of nested results."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def as_saved(state):
    """What a checkpoint gives back of env states."""
    from vla.files.trees import load_tree, save_tree

    with tempfile.TemporaryDirectory() as folder:
        save_tree(state, Path(folder) / "state.safetensors")
        return load_tree(Path(folder) / "state.safetensors")
