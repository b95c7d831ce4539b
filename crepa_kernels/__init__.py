"""Cross-frame Representation Alignment (CREPA, arXiv 2506.09229) for video diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .frames import frame_indices, select_frames
from .grid import resample_tokens
from .loss import CrepaOutput, available_backends, crepa_loss, relational_loss, similarity_matrix
from .projector import CrepaProjector

if TYPE_CHECKING:
    from .config.layersync import LayerSyncConfig
    from .config.schema import CrepaConfig
    from .config.urepa import UrepaConfig
    from .models.families import Family, image_to_video_mask, register_family, supported_families
    from .models.layouts import TokenLayout
    from .regularizer.crepa import CrepaRegularizer
    from .regularizer.joining import join_loss
    from .regularizer.layersync import LayerSync
    from .regularizer.schedule import CrepaSchedule
    from .regularizer.urepa import UrepaRegularizer
    from .teachers import FrozenEncoder, TeacherFeatures, register_encoder
    from .teachers.cache import TeacherCache
    from .teachers.encoding import DinoV2Teacher

__version__ = "0.1.0"

# The loss needs torch alone; these bring pydantic and, at use, the model libraries.
_LAZY = {
    "CrepaConfig": "config",
    "CrepaRegularizer": "regularizer",
    "CrepaSchedule": "regularizer.schedule",
    "DinoV2Teacher": "teachers.encoding",
    "Family": "models.families",
    "FrozenEncoder": "teachers",
    "LayerSync": "regularizer",
    "LayerSyncConfig": "config",
    "TeacherCache": "teachers.cache",
    "TeacherFeatures": "teachers",
    "TokenLayout": "models.layouts",
    "UrepaConfig": "config",
    "UrepaRegularizer": "regularizer",
    "image_to_video_mask": "models.families",
    "join_loss": "regularizer.joining",
    "register_encoder": "teachers",
    "register_family": "models.families",
    "supported_families": "models.families",
}

__all__ = [
    "CrepaConfig",
    "CrepaOutput",
    "CrepaProjector",
    "CrepaRegularizer",
    "CrepaSchedule",
    "DinoV2Teacher",
    "Family",
    "FrozenEncoder",
    "LayerSync",
    "LayerSyncConfig",
    "TeacherCache",
    "TeacherFeatures",
    "TokenLayout",
    "UrepaConfig",
    "UrepaRegularizer",
    "available_backends",
    "crepa_loss",
    "frame_indices",
    "image_to_video_mask",
    "join_loss",
    "register_encoder",
    "register_family",
    "relational_loss",
    "resample_tokens",
    "select_frames",
    "similarity_matrix",
    "supported_families",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
