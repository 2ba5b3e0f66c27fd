"""What stands in the scene: the pack `builtin`, made by code, or the pack `bridge` of published meshes and photographs.

A pack offers `objects`, `receptacles`, `tables`, `robot_urdf`, `arm_shine`, `add_model()`, `add_stage()`, `picture()`
and `texture()`.
"""

import functools

from envs.variants import ASSET_PACKS


@functools.cache
def asset_pack(name: str, asset_dir: str | None = None):
    """The pack called `name`; one instance per process. `asset_dir` is where a pack of files lies; `builtin` has none.

    Raises: ValueError for an unknown name, RuntimeError for missing, unreadable or damaged files.
    """
    if name == "builtin":
        from envs.assets.builtin import BuiltinAssets  # imports sapien

        return BuiltinAssets()
    if name == "bridge":
        from envs.assets.bridge import BridgeAssets

        return BridgeAssets(asset_dir)
    raise ValueError(f"unknown asset_pack {name!r}: use one of {', '.join(ASSET_PACKS)}.")
