"""SAPIEN's minimal shader pack without two things that no scene here needs.

Without the table of reflections the first image comes 6 s earlier. The pack names it for environment maps, and SAPIEN
3.0.3 computes it before a process's first image. On lavapipe this takes 6 CPU seconds. Our scenes have no environment
map, so values from the table are multiplied by black.

Without the last pass an image takes 0.36 instead of 0.51 ms at 96 x 96, and 2.7 instead of 7.1 ms at 640 x 480. The
pass copies all pixels, and puts the environment map behind those where nothing is. Here a table image is put there.

A test shows that images have the same bits as with SAPIEN's own pack.
"""

import dataclasses
import hashlib
import os
import re
import tempfile
from pathlib import Path

import sapien
from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS, ShaderConfig, set_shader_pack

from envs.scratch import scratch_folder

DECLARATION = re.compile(r"layout\([^)]*\) uniform sampler2D samplerBRDFLUT;\n")
LOOKUP = re.compile(r"texture\(samplerBRDFLUT, [^;]*\)\.xy")
LAST_PASS = ("composite.vert", "composite0.frag")  # reads ColorRaw, writes Color
DRAWN = re.compile(r"outColorRaw = vec4\((clamp\(.*\)), albedo\.a\);")


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
    """Write the smaller pack into the scratch folder. Files that are there stay as they are.

    Returns the folder of the pack, or None where SAPIEN's has unexpected lines or nothing can be written.

    Raises:
        RuntimeError: the scratch folder does not belong to this user only.
    """
    try:
        scratch = scratch_folder()
        texts = {path.name: path.read_text() for path in (stock / "minimal").iterdir()}
        files = {Path("minimal") / name: text.encode() for name, text in _smaller(texts).items()}
        if not files:
            return None
        for path in (stock / "common").iterdir():  # the pack includes these
            files[Path("common") / path.name] = path.read_bytes()
        # named after the content, because programs of different versions share the folder
        digest = hashlib.sha256(b"".join(bytes(path) + files[path] for path in sorted(files))).hexdigest()[:16]
        place = scratch / f"shaders_{digest}"
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


def _smaller(texts: dict[str, str]) -> dict[str, str]:
    """The shaders by name, without table and last pass. None at all where they are not as expected."""
    kept = {name: LOOKUP.sub("vec2(0)", DECLARATION.sub("", text)) for name, text in texts.items()}
    is_complete = all(kept.pop(name, None) for name in LAST_PASS) and "gbuffer.frag" in kept
    if not is_complete or kept == {name: text for name, text in texts.items() if name in kept}:
        return {}
    # over black, as the last pass would put it
    drawn, count = DRAWN.subn(r"outColor = vec4(\1 * albedo.a, albedo.a);", kept["gbuffer.frag"])
    kept["gbuffer.frag"] = drawn.replace("out vec4 outColorRaw;", "out vec4 outColor;")
    is_strange = count != 1 or any(word in text for text in kept.values() for word in ("BRDFLUT", "ColorRaw"))
    return {} if is_strange else kept
