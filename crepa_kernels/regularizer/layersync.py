"""`LayerSync`: a deeper block of a stock diffusers transformer teaches an earlier one, in the same forward."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config.layersync import LayerSyncConfig
from ..grid import num_tokens
from ..loss import crepa_loss
from ..models.families import family_of
from ..transfer import in_touched_frames, index_into, touched_frames
from .attach import LAYERSYNC, check_attachable, check_reach
from .capture import Capture

logger = logging.getLogger(__name__)

Logs = dict[str, torch.Tensor]


class LayerSync:
    """Aligns one block's hidden states with another block's of the same forward (arXiv 2510.12581).

    ``loss = -lambda * mean cosine(h_student, stopgrad(h_teacher))`` over all video (or image) tokens. There is no
    projector, no weights of its own, no schedule, and nothing to save. Attaches forward hooks to the transformer,
    after adapters and before prepare/DDP/fully_shard, before or after a ``CrepaRegularizer``, whose hooks it shares. A
    disabled configuration attaches nothing.

    In a training step: main loss, CREPA's ``loss``, this ``loss``, then ``release`` of both.

    Args:
        config: ``LayerSyncConfig`` or a mapping of its keys.
        transformer: a supported diffusers transformer (``supported_families()``), not wrapped.
        context_group: as ``CrepaRegularizer`` takes it; the loss is a rank's share there, too.

    Attributes:
        config, transformer: as given.

    Raises:
        ValueError: for a wrong configuration, an unsupported or wrapped transformer, or a block index out of range.
    """

    def __init__(
        self,
        config: LayerSyncConfig | Mapping[str, Any],
        transformer: nn.Module,
        *,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config if isinstance(config, LayerSyncConfig) else LayerSyncConfig.from_dict(config)
        self.transformer = transformer
        self._capture: Capture | None = None
        self._removed = False
        if not self.config.layersync_enabled:
            if self.config.idle is not None:
                logger.warning("LayerSync is %s", self.config.idle)
            return
        check_attachable(transformer, LAYERSYNC)
        self._family = family_of(transformer)
        self._blocks: list[int] = []
        indices: dict[str, int] = {}
        for key in ("layersync_student_block", "layersync_teacher_block"):
            indices[key] = getattr(self.config, key)
            self._blocks.append(indices[key])
        self._capture = Capture(transformer, self._family, indices, owner=LAYERSYNC, context_group=context_group)
        self._looked_at_adapters = False
        self._capture.attach()

    def loss(self, *, frame_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, Logs]:
        """The weighted loss of the transformer's last forward, to be added to the main loss, and its logs.

        Args:
            frame_mask: (B, T) bool, token frames that are in the loss; all if not given. The mean is then over each
                clip's frames, and over the clips that have any.

        Returns:
            A scalar with gradient to the student block's output alone, and as detached scalars on the device
            ``layersync_loss`` (the weighted value) and ``layersync_similarity`` (the mean cosine). Disabled: 0 and {}.

        Raises:
            ValueError: when forward was not called before, captured nothing, or the mask does not fit.
        """
        if self._removed:
            raise ValueError("this LayerSync was removed from its transformer")
        if self._capture is None:
            return torch.zeros(()), {}
        student, teacher = (self._capture.states(block) for block in self._blocks)
        if torch.is_grad_enabled() and not self._looked_at_adapters:
            check_reach(self.transformer, self._family, self._blocks[0], student.hidden_states, LAYERSYNC)
            self._looked_at_adapters = True
        features, shard = teacher.hidden_states.detach(), student.layout.shard
        options: dict[str, Any] = {}
        if shard is not None:
            frames, per_frame = student.layout.frames, num_tokens(student.layout.grid)
            features = in_touched_frames(features, shard.token_range, per_frame)
            own = index_into(touched_frames(shard.token_range, per_frame), frames)
            options = {"token_range": shard.token_range, "frame_index": own}
        output = crepa_loss(
            student.hidden_states,
            features,
            None,
            student_grid=student.layout.grid,
            teacher_grid=teacher.layout.grid,
            distance=0,
            frame_mask=frame_mask,
            **options,
        )
        aux = self.config.layersync_lambda * output.loss
        logs = {"layersync_loss": aux.detach(), "layersync_similarity": output.similarity}
        return aux, logs if shard is None else shard.summed(logs)

    def release(self) -> None:
        """Lets go of the captured hidden states, which otherwise stay until the next forward."""
        if self._capture is not None:
            self._capture.release()

    def remove(self) -> None:
        """Takes its hooks off the transformer, but those that others need; ``loss`` raises after this."""
        if self._capture is not None and not self._removed:
            self._capture.remove()
        self._removed = True
