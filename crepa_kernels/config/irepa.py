"""iREPA's keys, which modify CREPA and U-REPA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field

from .base import Integer, flag, number
from .rules import describe


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


class IrepaKeys(BaseModel):
    """The keys of iREPA, beside those of what it modifies."""

    irepa_enabled: bool = flag(
        False, "whether the projector is a convolution and the teacher is normalized over the patches of each frame"
    )
    irepa_spatial_norm_alpha: float = number(
        0.6, "share of their mean over a frame that the teacher's patches are without", ge=0
    )
    irepa_projector_kernel_size: Annotated[Integer, AfterValidator(_odd)] = Field(
        3, ge=1, description="side of the projector's convolution in tokens; must be an integer >= 1 and odd"
    )

    def irepa_problems(self, switch: str) -> Iterator[tuple[set[str], str]]:
        """Rules over several keys, ``switch`` being that of what it modifies: the keys involved and what is wrong."""
        if self.irepa_enabled and not getattr(self, switch):
            rule = f"it modifies CREPA or U-REPA, so it needs {switch} = true"
            yield {"irepa_enabled", switch}, describe("irepa_enabled", True, rule)
