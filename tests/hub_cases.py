"""Pipeline folders that a run is started from, one for each way in which a family is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from crepa_trainer.families import TrainingFamily
from tiny_hub_folders import save_tiny_cogvideox, save_tiny_kandinsky, save_tiny_wan_experts, save_tiny_wan_image


@dataclass(frozen=True)
class Size:
    """Of a clip."""

    frames: int
    height: int = 32
    width: int = 48


@dataclass(frozen=True)
class HubCase:
    """A folder's maker, what is trained of it, and the size of its clips."""

    save: Callable[[Path], Path]
    size: Size
    task: str = "text2video"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def family(self, folder: Path) -> TrainingFamily:
        return TrainingFamily.of(str(folder), self.task, expert=self.settings.get("expert"))


_EXPERTS = partial(save_tiny_wan_experts)
_IMAGE = "image2video"
CASES = {
    "wan high": HubCase(_EXPERTS, Size(9), settings={"expert": "high"}),
    "wan low": HubCase(_EXPERTS, Size(9), settings={"expert": "low"}),
    "wan image high": HubCase(partial(_EXPERTS, image=True), Size(9), _IMAGE, {"expert": "high"}),
    "wan image low": HubCase(partial(_EXPERTS, image=True), Size(9), _IMAGE, {"expert": "low"}),
    "wan image encoder": HubCase(save_tiny_wan_image, Size(9), _IMAGE),
    "kandinsky5": HubCase(save_tiny_kandinsky, Size(9)),
    "kandinsky5 without conditions": HubCase(partial(save_tiny_kandinsky, cond=False), Size(9)),
    "kandinsky5 image": HubCase(partial(save_tiny_kandinsky, image=True), Size(17), _IMAGE),
    "cogvideox": HubCase(save_tiny_cogvideox, Size(9)),
    "cogvideox image": HubCase(partial(save_tiny_cogvideox, image=True), Size(9), _IMAGE),
    "cogvideox 1.5": HubCase(partial(save_tiny_cogvideox, version="1.5"), Size(17)),
    "cogvideox 1.5 image": HubCase(partial(save_tiny_cogvideox, version="1.5", image=True), Size(17), _IMAGE),
}
