"""What a frozen encoder is: a record as users give one."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.rules import ENCODER_ALIASES, ENCODER_PATCH_SIZES

FramesCall = Callable[[torch.Tensor], torch.Tensor]
_REGISTERED: dict[str, FrozenEncoder] = {}
PIECE = 1 << 24  # elements hashed at a time
RULE = "a module or callable that maps frames (n, 3, H, W) in [0, 1] to features (n, h, w, E)"


@dataclass(frozen=True)
class FrozenEncoder:
    """Any frozen network as the teacher, as ``CrepaRegularizer(encoder=...)`` takes it.

    It is frozen here: a module's parameters need no gradient from now on and it is in eval mode; it runs without
    gradient and outside autocast. It stays where it is and in its type.

    Attributes:
        encode: a module or callable, frames (n, 3, H, W), fp32 in [0, 1], to features (n, h, w, E), floating point, h
            rows of w patches. Frames come on the module's device, or on the student's where it is no module.
            Normalizing them is its own business.
        name: what it is called in messages and in the trainer's settings; else that of its class or function.
        key: another one for other features, by which a cache knows them. A module's weights are their own key (their
            bytes, types and names; code is not seen). A callable without a key is not cached.
        feature_size: E; else it is asked once with a blank frame.
        patch_size: side of a patch in pixels: frames come in whole patches, and a frame of H x W pixels has H / patch x
            W / patch features. None: frames are squares of the image size, and it may answer any grid.

    Raises:
        ValueError: for an ``encode`` that takes no frames or whose weights are not loaded, or sizes that are no
            positive integers.
    """

    encode: nn.Module | FramesCall
    name: str = ""
    key: str | None = None
    feature_size: int | None = None
    patch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.encode, nn.Module) and not takes_frames(self.encode):
            raise ValueError(f"FrozenEncoder(encode=...) must be {RULE}, got {described(self.encode)}")
        for name in ("name", "key"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"FrozenEncoder({name}=...) must be text, got {getattr(self, name)!r}")
        for name in ("feature_size", "patch_size"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"FrozenEncoder({name}=...) must be an integer of at least 1, got {size!r}")
        if isinstance(self.encode, nn.Module):
            check_loaded(self.encode)
            self.encode.requires_grad_(False).eval()
        if not self.name:
            object.__setattr__(self, "name", getattr(self.encode, "__name__", type(self.encode).__name__))

    @property
    def weights(self) -> None:
        """No folder or hub id: ``content_key`` says them."""

    def load(self, device: torch.device) -> FrozenEncoder:
        """Itself: there is nothing to load."""
        return self

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type of its weights, fp32 where it has none."""
        weights = (each.dtype for each in self._tensors() if each.is_floating_point())
        return next(weights, torch.float32)

    def parameters(self) -> int:
        """How many a module has, 0 of any other callable."""
        return sum(each.numel() for each in self.encode.parameters()) if isinstance(self.encode, nn.Module) else 0

    def content_key(self) -> str | None:
        """``key``, or a digest of a module's parameters and buffers; None where neither is there."""
        return weights_key(self.encode) if self.key is None and self._tensors() else self.key

    def place(self, device: torch.device) -> torch.device:
        """Where it takes its frames: a module where it is, any other callable on ``device``."""
        return next((each.device for each in self._tensors()), device)

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.encode.parameters(), *self.encode.buffers()] if isinstance(self.encode, nn.Module) else []


def check_loaded(module: nn.Module) -> None:
    """ValueError for a module whose weights are all on the meta device."""
    weights = list(module.parameters())
    if weights and all(each.is_meta for each in weights):
        raise ValueError(f"the encoder {described(module)} has no weights yet (meta device): load them first")


def register_encoder(encoder: FrozenEncoder) -> None:
    """Makes ``encoder.name`` a value of ``crepa_encoder`` in this process: the trainer then plans, caches and trains
    with it as with any other. A second one of the name takes the place of the first.

    Raises:
        ValueError: for what is no ``FrozenEncoder``, a name that is another encoder's, or an encoder that does not say
            its ``feature_size``.
    """
    if not isinstance(encoder, FrozenEncoder):
        raise ValueError(f"register_encoder takes a FrozenEncoder, got {described(encoder)}")
    if encoder.name in ENCODER_PATCH_SIZES or encoder.name in ENCODER_ALIASES:
        raise ValueError(f"an encoder cannot be called {encoder.name!r}: that is the name of another one")
    if encoder.feature_size is None:
        raise ValueError(f"the encoder {encoder.name} must say its feature_size to be registered")
    _REGISTERED[encoder.name] = encoder


def registered_encoder(name: str) -> FrozenEncoder | None:
    """What ``register_encoder`` was given under this name."""
    return _REGISTERED.get(name)


def weights_key(module: Any) -> str:
    """Digest of a module's parameters and buffers, names, types and shapes included, piece by piece."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.detach().reshape(-1).split(PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def takes_frames(call: Any) -> bool:
    """Whether ``call`` is a callable of one argument, by its signature; a class is none."""
    return not isinstance(call, type) and takes(call, torch.Tensor)


def takes(call: Any, *arguments: Any) -> bool:
    """Whether ``call`` can be called with these, by its signature."""
    try:
        inspect.signature(call).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def described(value: Any) -> str:
    """What ``value`` is, for an error: its type, of a function also its signature."""
    try:
        return f"{value.__name__}{inspect.signature(value)}"
    except (AttributeError, TypeError, ValueError):
        return type(value).__name__
