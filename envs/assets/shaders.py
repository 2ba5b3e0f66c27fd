"""SAPIEN's minimal shader pack without what no scene here has use for: the first picture comes 6 s earlier.

The pack names a table for reflections of an environment map, and SAPIEN 3.0.3 integrates it before a process' first
picture. On lavapipe that takes 6 CPU seconds of the 9 that importing the simulator, make_envs and reset took together
(one env, 96 x 96). Our scenes have no environment map, so what is looked up is multiplied by black: pictures are equal
bit for bit without it, by test.
"""

import dataclasses
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import sapien
from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS, ShaderConfig, set_shader_pack

from envs.scratch import scratch_folder

DECLARATION = re.compile(r"layout\([^)]*\) uniform sampler2D samplerBRDFLUT;\n")
LOOKUP = re.compile(r"texture\(samplerBRDFLUT, [^;]*\)\.xy")


def minimal_shader_config() -> ShaderConfig:
    """ManiSkill's "minimal" with the smaller pack, selected; as it is where SAPIEN's is not the one known here."""
    config = PREBUILT_SHADER_CONFIGS["minimal"]
    folder = write_pack(Path(sapien.__file__).parent / "vulkan_shader")
    if folder is None:
        return config
    config = dataclasses.replace(config, shader_pack=str(folder))
    select(config)
    return config


def select(config: ShaderConfig) -> None:
    """Cameras that enter a scene from now on take this config of minimal_shader_config(), not another env's."""
    set_shader_pack(config)
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")  # ManiSkill sets these for the name "minimal" alone
    sapien.render.set_picture_format("ColorRaw", "r8g8b8a8unorm")
    sapien.render.set_picture_format("PositionSegmentation", "r16g16b16a16sint")


def write_pack(stock: Path) -> Path | None:
    """The stock "minimal" pack without its table, in the scratch folder; made once per machine, user and SAPIEN.

    None where the stock pack has other lines than expected, or nothing can be written. Raises RuntimeError where the
    scratch folder is not this user's alone.
    """
    try:
        place = scratch_folder() / f"shaders_{version('sapien')}"
        if (place / "minimal").is_dir():
            return place / "minimal"
        texts = {path.name: path.read_text() for path in (stock / "minimal").iterdir()}
        slim = {name: LOOKUP.sub("vec2(0)", DECLARATION.sub("", text)) for name, text in texts.items()}
        if slim == texts or any("BRDFLUT" in text for text in slim.values()):
            return None
        beside = Path(tempfile.mkdtemp(prefix=place.name, dir=place.parent))
        shutil.copytree(stock / "common", beside / "common")  # what the pack includes
        (beside / "minimal").mkdir()
        for name, text in slim.items():
            (beside / "minimal" / name).write_text(text)
        try:
            beside.rename(place)  # atomic: another process may be at it too
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError:
        return None
    return place / "minimal" if (place / "minimal").is_dir() else None
