"""Published assets: the three model_db.json files, and the header of a .glb file."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from schemas import Schema, flags

Finite = Annotated[float, Field(allow_inf_nan=False)]
Place = Annotated[int, Field(ge=0, le=2**40)]  # a number of bytes, or an offset


# ---------------------------------------------------------------------- model_db.json
class Box(Schema):
    """A bounding box in the model's own frame (m)."""

    min: tuple[Finite, Finite, Finite]
    max: tuple[Finite, Finite, Finite]

    @field_validator("max")
    @classmethod
    def above_min(cls, upper: tuple[float, ...], others: ValidationInfo) -> tuple[float, ...]:
        if any(low >= high for low, high in zip(others.data.get("min", ()), upper)):
            raise ValueError("above min along every axis")
        return upper


class BodyEntry(Schema):
    """An object or receptacle."""

    name: Annotated[str, StringConstraints(min_length=1)]
    bbox: Box
    density: flags.Positive  # kg/m^3


class TableEntry(Schema):
    name: Annotated[str, StringConstraints(min_length=1)]
    mix: flags.Fraction  # weight of the texture in the whole image


# ---------------------------------------------------------------------- glTF 2.0
class Inside(Schema):
    """A buffer or image whose bytes are in the file itself."""

    uri: None = None


class Image(Inside):
    bufferView: Place


class View(Schema):
    byteOffset: Place = 0
    byteLength: Annotated[Place, Field(ge=1)]
    byteStride: Annotated[int, Field(ge=1, le=252)] | None = None


class Accessor(Schema):
    bufferView: Place
    byteOffset: Place = 0
    componentType: Literal[5120, 5121, 5122, 5123, 5125, 5126]
    count: Annotated[Place, Field(ge=1)]
    type: Literal["SCALAR", "VEC2", "VEC3", "VEC4", "MAT4"]


class Gltf(Schema):
    """The part of glTF that the published files use."""

    meshes: Annotated[list[dict], Field(min_length=1)]
    buffers: Annotated[list[Inside], Field(min_length=1)]
    bufferViews: Annotated[list[View], Field(min_length=1)]
    accessors: Annotated[list[Accessor], Field(min_length=1)]
    images: list[Image] = Field(default_factory=list)
