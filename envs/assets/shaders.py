"""SAPIEN's minimal shader pack without a table that no scene here needs, so that the first image comes 6 s earlier.

The pack names a table for reflections of an environment map, and SAPIEN 3.0.3 computes it before a process's first
image. On lavapipe this takes 6 CPU seconds. Importing the simulator, make_envs and reset take 9 together (one env,
96 x 96). Our scenes have no environment map, so values from the table are multiplied by black. A test shows that images
without the table have the same bits.
"""

import dataclasses
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import sapien
from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS, ShaderConfig, set_shader_pack

from envs.scratch import scratch_folder

DECLARATION = re.compile(r"layout\([^)]*\) uniform sampler2D samplerBRDFLUT;\n")
LOOKUP = re.compile(r"texture\(samplerBRDFLUT, [^;]*\)\.xy")


def minimal_shader_config() -> ShaderConfig:
    """Select ManiSkill's "minimal" config with the smaller pack. Without a smaller pack, return the config as it is."""
    config = PREBUILT_SHADER_CONFIGS["minimal"]
    folder = write_pack(Path(sapien.__file__).parent / "vulkan_shader")
    if folder is None:
        return config
    config = dataclasses.replace(config, shader_pack=str(folder))
    select(config)
    return config


def select(config: ShaderConfig) -> None:
    """Use this config of minimal_shader_config() for all cameras that enter a scene from now on."""
    set_shader_pack(config)
    # ManiSkill only sets these formats for the name "minimal"
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
    sapien.render.set_picture_format("ColorRaw", "r8g8b8a8unorm")
    sapien.render.set_picture_format("PositionSegmentation", "r16g16b16a16sint")


def write_pack(stock: Path) -> Path | None:
    """Write SAPIEN's "minimal" pack without its table into the scratch folder. Files that are there stay as they are.

    Returns the folder of the pack, or None where SAPIEN's has unexpected lines or nothing can be written.

    Raises:
        RuntimeError: the scratch folder does not belong to this user only.
    """
    try:
        scratch = scratch_folder()
        texts = {path.name: path.read_text() for path in (stock / "minimal").iterdir()}
        slim = {name: LOOKUP.sub("vec2(0)", DECLARATION.sub("", text)) for name, text in texts.items()}
        if slim == texts or any("BRDFLUT" in text for text in slim.values()):
            return None
        files = {Path("minimal") / name: text.encode() for name, text in slim.items()}
        for path in (stock / "common").iterdir():  # the pack includes these
            files[Path("common") / path.name] = path.read_bytes()
        place = scratch / f"shaders_{version('sapien')}"
        # one by one, since what cleans temporary folders removes old files and leaves their folder
        for path, content in files.items():
            if not (place / path).is_file() or (place / path).read_bytes() != content:
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as partial:
                    partial.write(content)
                os.replace(partial.name, place / path)  # atomic, because another process may do the same
    except OSError:
        return None
    return place / "minimal"
