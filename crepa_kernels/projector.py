"""The trained half of CREPA: from the transformer's width to the teacher's, token by token or by a convolution."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import nn
from torch.nn import functional

from .grid import Grid
from .ops.resample import LARGEST

Result = TypeVar("Result")


class Projector(nn.Sequential):
    """A regularizer's projector, h (..., D) -> p (..., E), whose slices are plain.

    Attributes:
        LAYERS: the classes of its layers, and KEYS: what they are called in a state dict.
        hidden_size, feature_size: D, the width of the transformer's blocks, and E, that of the teacher's features.
    """

    LAYERS: ClassVar[tuple[type[nn.Module], ...]]
    KEYS: ClassVar[str]

    def __init__(self, hidden_size: int, feature_size: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.hidden_size = hidden_size
        self.feature_size = feature_size

    @classmethod
    def sizes_in(cls, weights: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        """The sizes that a state dict of this class was made with, by its constructor's order; None for any other."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[int, ...]:
        """What ``sizes_in`` gives for this projector's weights."""
        return self.hidden_size, self.feature_size

    def __getitem__(self, index: int | slice) -> nn.Module:
        # A part is no projector, and nn.Sequential would make it by this class's own constructor.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, hidden_states: torch.Tensor, within: Callable[[], Result] | None = None) -> torch.Tensor | Result:
        """Projects ``hidden_states``, or calls ``within()`` while this module's weights are in place.

        Sharding wrappers (FSDP2, ZeRO-3) gather a module's weights around its ``forward``. ``crepa_loss`` reads the
        weights itself, so it runs inside this call.
        """
        if within is not None:
            return within()
        return super().forward(hidden_states)


class CrepaProjector(Projector):
    """``LayerNorm(hidden_size)`` then ``Linear(hidden_size, feature_size)``: h (..., D) -> p (..., E).

    Its state-dict keys are ``0.*`` and ``1.*``, those of the plain ``nn.Sequential`` of the two. Its slices are plain.

    Args:
        hidden_size: D, the width of the transformer's blocks.
        feature_size: E, the width of the teacher's patch features.

    Raises:
        ValueError: if a size is not a positive integer, or they are too large for 64 bits.
    """

    LAYERS = (nn.LayerNorm, nn.Linear)
    KEYS = "LayerNorm '0.*', Linear '1.*'"

    def __init__(self, hidden_size: int, feature_size: int) -> None:
        _check_sizes(hidden_size, feature_size)
        super().__init__(hidden_size, feature_size, nn.LayerNorm(hidden_size), nn.Linear(hidden_size, feature_size))

    @classmethod
    def sizes_in(cls, weights: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        matrix = _shapes(weights).get("1.weight", ())
        if len(matrix) != 2:
            return None
        features, hidden = matrix
        wanted = {"0.weight": (hidden,), "0.bias": (hidden,), "1.weight": matrix, "1.bias": (features,)}
        return (hidden, features) if _shapes(weights) == wanted else None


class ConvolutionProjector(Projector):
    """iREPA's projector (arXiv 2512.10794): one k x k convolution over each frame's grid of tokens, without a norm.

    h (B, T, P, D) -> p (B, T, P, E), padded with zeros to the same grid. Its state-dict keys are ``0.weight``
    (E, D, k, k) and ``0.bias`` (E), those of a plain ``nn.Sequential`` of the ``nn.Conv2d``.

    Args:
        hidden_size: D, the width of the transformer's blocks.
        feature_size: E, the width of the teacher's patch features.
        kernel_size: k, tokens, odd.

    Raises:
        ValueError: if a size is not a positive integer, they are too large for 64 bits, or k is even.
    """

    LAYERS = (nn.Conv2d,)
    KEYS = "Conv2d '0.*', iREPA's"

    def __init__(self, hidden_size: int, feature_size: int, kernel_size: int = 3) -> None:
        _check_sizes(hidden_size, feature_size, kernel_size)
        if not kernel_size % 2:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        convolution = nn.Conv2d(hidden_size, feature_size, kernel_size, padding=kernel_size // 2)
        # From 0, where the smallest step of an optimizer shows (``TrainingWatch``).
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        super().__init__(hidden_size, feature_size, convolution)
        self.kernel_size = kernel_size

    @classmethod
    def sizes_in(cls, weights: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        kernel = _shapes(weights).get("0.weight", ())
        if len(kernel) != 4 or kernel[2] != kernel[3] or _shapes(weights) != {"0.weight": kernel, "0.bias": kernel[:1]}:
            return None
        return kernel[1], kernel[0], kernel[2]

    @property
    def sizes(self) -> tuple[int, ...]:
        return *super().sizes, self.kernel_size

    def forward(self, hidden_states: torch.Tensor, within: Callable[[], Result] | None = None) -> torch.Tensor | Result:
        """Images (n, D, height, width) -> (n, E, height, width), or what ``within()`` gives.

        The product is in the images' type (inside autocast in autocast's, where they are fp32), whatever the weights'
        is, and so is what it gives.
        """
        if within is not None:
            return within()
        convolution = self._modules["0"]
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        weight, bias = (parameter.to(hidden_states.dtype) for parameter in (convolution.weight, convolution.bias))
        return functional.conv2d(hidden_states, weight, bias, padding=convolution.padding)

    def of_tokens(self, hidden_states: torch.Tensor, grid: Grid) -> torch.Tensor:
        """p (B, T, P, E) of ``hidden_states`` (B, T, P, D) on ``grid`` (height, width).

        Raises:
            ValueError: where ``grid`` does not have P tokens.
        """
        batch, frames, tokens, _ = hidden_states.shape
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"grid {grid} does not have the {tokens} tokens of a frame that were given")
        # Views: tokens with their channels last are images in the channels-last layout. Outside of the call, whose
        # result FSDP2 wants to be no view.
        images = hidden_states.reshape(batch * frames, *grid, -1).permute(0, 3, 1, 2)
        return self(images).permute(0, 2, 3, 1).reshape(batch, frames, tokens, -1)


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _check_sizes(hidden_size: int, feature_size: int, kernel_size: int = 1) -> None:
    sizes = {"hidden_size": hidden_size, "feature_size": feature_size}
    sizes |= {"kernel_size": kernel_size} if kernel_size != 1 else {}
    names = " and ".join(sizes)
    found = " and ".join(map(repr, sizes.values()))
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes.values()):
        raise ValueError(f"{names} must be positive integers, got {found}")
    if hidden_size * feature_size * kernel_size**2 > LARGEST:
        raise ValueError(f"{names} are too large for 64 bits, got {found}")
