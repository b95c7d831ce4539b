"""`LayerSyncConfig`: the settings of LayerSync."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, Field

from .base import Integer, Settings, flag, number
from .rules import describe


class LayerSyncKeys(BaseModel):
    """LayerSync's keys, for settings that have others beside them too."""

    layersync_enabled: bool = flag(False, "whether LayerSync is on")
    layersync_student_block: Integer | None = Field(
        None,
        ge=0,
        description="zero-based block that learns from another one; must be an integer >= 0, required when "
        "layersync_enabled is true",
    )
    layersync_teacher_block: Integer | None = Field(
        None,
        ge=0,
        description="zero-based block that teaches it, of the same forward; must be an integer >= 0, another one than "
        "layersync_student_block, required when layersync_enabled is true",
    )
    layersync_lambda: float = number(0.2, "weight of the loss", gt=0)

    def layersync_problems(self) -> Iterator[tuple[set[str], str]]:
        """Rules over several keys: the keys involved and what is wrong."""
        student, teacher = "layersync_student_block", "layersync_teacher_block"
        for key in (student, teacher):
            if self.layersync_enabled and getattr(self, key) is None:
                yield {"layersync_enabled", key}, describe(key, None, "required when layersync_enabled is true")
        if self.layersync_teacher_block is not None and self.layersync_teacher_block == self.layersync_student_block:
            rule = "must be another block than layersync_student_block"
            yield {student, teacher}, describe(teacher, self.layersync_teacher_block, rule)


class LayerSyncConfig(LayerSyncKeys, Settings):
    """Settings of LayerSync; see `Settings`."""

    TITLE = "LayerSync"
    PREFIXES = ("layersync_",)

    def _joint_problems(self) -> Iterator[tuple[set[str], str]]:
        return self.layersync_problems()
