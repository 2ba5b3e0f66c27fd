"""The assets of the scene: the pack `builtin`, made by code, or `bridge`, the published meshes and photographs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

from envs.variants import ASSET_PACKS

if TYPE_CHECKING:
    import numpy as np

    from envs.assets.catalog import Model, Table


class AssetPack(Protocol):
    """What an asset pack offers to the scene."""

    name: str
    objects: tuple[Model, ...]  # 25
    receptacles: tuple[Model, ...]  # 17
    tables: tuple[Table, ...]  # 21
    arm_shine: dict[str, float] | None  # material of the arm, None if it keeps its own
    casts_shadows: bool  # whether objects and finger tips darken the table, see `envs/shadows.py`

    @property
    def robot_urdf(self) -> str:
        """Path of the arm's URDF."""

    def table_image(self, index: int, width: int, height: int) -> np.ndarray:
        """The image behind robot and objects for table `index`, uint8 [height, width, 3], read-only."""

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """The texture that belongs to table `index`, uint8 [height, width, 3], read-only."""

    def add_stage(self, builder: Any) -> None:
        """Give the table's shapes to a builder (sapien.ActorBuilder)."""

    def add_model(self, builder: Any, model: Model) -> None:
        """Give the collision shapes and visuals of an object or receptacle to a builder."""


@functools.cache
def asset_pack(name: str, asset_dir: str | None = None) -> AssetPack:
    """The pack called `name`, one instance per process.

    asset_dir: the folder of a pack that consists of files. `builtin` has none.

    Raises:
        ValueError: there is no such pack.
        RuntimeError: files are missing, unreadable or damaged.
    """
    if name == "builtin":
        from envs.assets.builtin import BuiltinAssets  # imports sapien

        return BuiltinAssets()
    if name == "bridge":
        from envs.assets.bridge import BridgeAssets  # imports sapien

        return BridgeAssets(asset_dir)
    raise ValueError(f"unknown asset_pack {name!r}: use one of {', '.join(ASSET_PACKS)}.")
