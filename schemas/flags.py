"""Ranges of flags, as annotated types: `learning_rate: NonNegative = 1e-4` in a script's Args.

NaN and infinity fit none of them. The upper ends are far above what any machine holds: they refuse by arithmetic what
would end in a lack of memory minutes later.
"""

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # of things there is at least one of
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]  # 0 switches it off
Seed = Annotated[int, Field(ge=0, lt=2**31)]
