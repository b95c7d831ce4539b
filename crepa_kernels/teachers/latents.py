"""Decoding the latents of a batch by the family's VAE, which is loaded when a batch first needs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..models.families import Family
from ..models.layouts import TokenLayout
from ..models.vaes import VAES, Vae, statistics
from ..optional import require
from ..regularizer.monitor import LatentMonitor
from ..transfer import moved
from .clips import check_pixels
from .encoders import described, takes

logger = logging.getLogger(__name__)

VaeSource = nn.Module | str | os.PathLike[str] | Callable[[], nn.Module] | Callable[[torch.Tensor], torch.Tensor]


class _FreedEncoder(nn.Module):
    """Stands where a VAE's encoder was, without weights."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise ValueError(
            "this VAE's encoder was freed by crepa_drop_vae_encoder, but something still encodes with it: "
            "set crepa_drop_vae_encoder to false, or encode every clip before training"
        )


def free_vae_encoder(vae: nn.Module) -> int:
    """Replaces a VAE's encoder (and quant_conv) by one without weights that refuses to run; returns the bytes freed."""
    freed = 0
    for name in ("encoder", "quant_conv"):
        part = getattr(vae, name, None)
        if part is not None and not isinstance(part, _FreedEncoder):
            freed += sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
            setattr(vae, name, _FreedEncoder())
    logger.info("crepa_drop_vae_encoder: freed %.1f MB of the VAE's encoder", freed / 2**20)
    return freed


class LatentDecoder:
    """Decodes clean latents by the family's VAE, which is loaded at the first call.

    Args:
        source: the VAE, a folder or hub id (of the VAE, or of a pipeline with a ``vae`` folder), a callable without
            arguments that loads it, or None. Any other callable decodes: latents (B, C, T, H, W) to pixels
            (B, P, 3, H, W), floating point in [0, 1].
        family: whose VAE it is.
        drop_encoder: free the VAE's encoder at the first decoding.
        owner: whose ``vae`` it is, for messages.

    Attributes:
        frames_decoded: pixel frames decoded so far.

    Raises:
        ValueError: for a source of another type, or a VAE of another class than the family's.
    """

    def __init__(
        self, source: VaeSource | None, family: Family, *, drop_encoder: bool = False, owner: str = "CrepaRegularizer"
    ) -> None:
        if not (source is None or isinstance(source, str | os.PathLike) or callable(source)):
            raise ValueError(
                f"vae must be an {_either(family)}, a folder or hub id, or a callable that loads it, "
                f"got {type(source).__name__}"
            )
        self.frames_decoded = 0
        self._family = family
        self._owner = owner
        self._source = source
        self._drop_encoder = drop_encoder
        self._dropped = False
        self._told_place = False
        self._monitor = LatentMonitor()
        self._call = _as_call(source, family)
        if self._call is not None and drop_encoder:
            logger.warning("crepa_drop_vae_encoder does nothing: vae=%s is no VAE of a family", described(self._call))
        given = isinstance(source, nn.Module) and self._call is None
        self._vae: Any = self._checked(source) if given else None

    def decode(self, latents: torch.Tensor, layout: TokenLayout, device: torch.device) -> torch.Tensor:
        """Pixels (B, P, 3, H, W) in [0, 1], without gradient.

        Args:
            latents: (B, C, T, H, W), clean, normalised as the transformer sees them, not packed; with or without
                the frames that pad their count at the front to a multiple of the transformer's temporal patch. Of
                images T is 1.
            layout: of the transformer's last forward.
            device: where a VAE that is loaded now goes.

        Raises:
            ValueError: when there is no VAE, or the latents' shape is not the transformer's or the VAE's.
        """
        if not (isinstance(latents, torch.Tensor) and latents.is_floating_point()):
            what = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a floating-point tensor (B, C, T, H, W), got {what}")
        if self._call is not None:
            return self._called(self._call, latents, device)
        # Of a class that is in no table nobody knows how latents become tokens.
        is_known = bool(self._family.vaes)
        if latents.dim() != 5 or (
            is_known and tuple(latents.shape[2:]) != layout.of_latents(latents.shape[2]).latent_shape
        ):
            raise ValueError(self._wrong_shape(latents, layout))
        vae = self._vae if self._vae is not None else self._load(device)
        rule = _rule_of(vae, self._family)
        channels = rule.channels(vae.config)
        if latents.shape[1] != channels:
            raise ValueError(f"latents have {latents.shape[1]} channels, the VAE decodes {channels}")
        if self._drop_encoder and not self._dropped:
            # Not before: a run that never decodes, or never starts, leaves the caller's VAE whole.
            free_vae_encoder(vae)
            self._dropped = True
        place = next(vae.parameters()).device
        if place.type != device.type and not self._told_place:
            self._told_place = True
            told = (place, self._family.model, device)
            logger.warning("the VAE decodes on %s while the %s trains on %s: slow if not meant", *told)
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            here = moved(latents.detach(), place)
            pixels = rule.decode(vae, here)
            if not self._monitor.done:
                mean, std, scale = statistics(vae, place)
                self._monitor.watch(here, mean, std / scale, pixels)
        self.frames_decoded += pixels.shape[0] * pixels.shape[1]
        return pixels

    def _called(
        self, decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """What the caller's own decoder gives, checked."""
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            pixels = decode(latents.detach())
        shape = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        if not isinstance(pixels, torch.Tensor) or pixels.dim() != 5 or shape[:1] + shape[2:3] != (len(latents), 3):
            raise ValueError(
                f"vae={described(decode)} must decode latents of shape {tuple(latents.shape)} to pixels "
                f"({len(latents)}, P, 3, H, W), got {shape}"
            )
        check_pixels(pixels, len(latents), look=self.frames_decoded == 0)
        self.frames_decoded += pixels.shape[0] * pixels.shape[1]
        return pixels

    def _wrong_shape(self, latents: torch.Tensor, layout: TokenLayout) -> str:
        axes, sizes = ("C, H, W", "H, W") if self._family.images else ("C, T, H, W", "T, H, W")
        shape = tuple(latents.shape) if latents.dim() != 5 or not self._family.images else tuple(latents[:, :, 0].shape)
        return (
            f"latents must be (B, {axes}) with ({sizes}) = {layout.latent_shape[-len(sizes.split(', ')) :]} as in the "
            f"{self._family.model}'s forward, got {shape}{_other_order(latents, layout)}"
        )

    @property
    def temporal_factors(self) -> tuple[int, ...]:
        """Pixel frames of a latent frame after the first: the VAE's, where it is there, or those that it may have."""
        if self._vae is None:
            return self._family.temporal_factors
        return (_rule_of(self._vae, self._family).compression(self._vae.config)[0],)

    def unload(self) -> None:
        """Lets go of a VAE that was loaded here; the next decoding loads it again."""
        if not isinstance(self._source, nn.Module):
            self._vae, self._dropped = None, False

    def _load(self, device: torch.device) -> Any:
        if self._source is None:
            raise ValueError(
                f"latents were given but no VAE to decode them: pass {self._owner}(vae=...) "
                f"(an {_either(self._family)}, a folder, a hub id or a callable that loads it), "
                "or give loss() pixels= or features="
            )
        if isinstance(self._source, str | os.PathLike):
            vae = self._from_pretrained(os.fspath(self._source), device)
        else:
            vae = cast(Callable[[], nn.Module], self._source)()
        self._vae = self._checked(vae)
        return self._vae

    def _from_pretrained(self, source: str, device: torch.device) -> nn.Module:
        diffusers, known = require("diffusers", "decoding latents"), self._family.vaes or tuple(VAES)
        subfolder, name = _found(getattr(diffusers, known[0]), source)
        if name not in known:
            raise ValueError(f"vae = {source} holds an {name}; {self._family.name} needs an {_either(self._family)}")
        # Decoding for a teacher is most of CREPA's time, and its features do not need fp32 pixels.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        logger.info("loading the VAE from %s as %s", source, dtype)
        vae_class = getattr(diffusers, name)
        vae: nn.Module = vae_class.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype).to(device)
        return vae

    def _checked(self, vae: Any) -> nn.Module:
        _rule_of(vae, self._family)
        vae.requires_grad_(False)
        return vae.eval()


def _as_call(source: VaeSource | None, family: Family) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A source that decodes by being called, which is neither a VAE of the tables nor a loader of one."""
    if isinstance(source, nn.Module):
        names = {base.__name__ for base in type(source).__mro__}
        if family.vaes or names & VAES.keys():
            return None
        return source.eval().requires_grad_(False)
    call: Any = source
    return call if callable(call) and takes(call, torch.Tensor) and not takes(call) else None


def _other_order(latents: torch.Tensor, layout: TokenLayout) -> str:
    """A hint where the axes of the latents are those of another order."""
    orders = {"(B, T, C, H, W)": ((1, 3, 4), ".transpose(1, 2)"), "(B, T, H, W, C)": ((1, 2, 3), ".movedim(-1, 1)")}
    for name, (axes, cure) in orders.items():
        if latents.dim() == 5 and tuple(latents.shape[axis] for axis in axes) == layout.latent_shape:
            return f", which looks like {name}: give latents{cure}"
    return ""


def _either(family: Family) -> str:
    return " or ".join(family.vaes or VAES)


def _rule_of(vae: Any, family: Family) -> Vae:
    """How ``vae`` is decoded; ValueError where it is none of the family's, or of any where that is not known."""
    names = {base.__name__ for base in type(vae).__mro__}
    for name in family.vaes or VAES:
        if name in names:
            return VAES[name]
    raise ValueError(f"vae must be an {_either(family)} for {family.name}, got {type(vae).__name__}")


def _found(vae_class: Any, source: str) -> tuple[str | None, str]:
    """The subfolder of a VAE and its class: ``"vae"`` in a pipeline's folder or hub id, None where it is its own."""
    subfolder = _vae_subfolder(vae_class, source)
    config = vae_class.load_config(source, subfolder=subfolder)
    return subfolder, str(config.get("_class_name"))


def _vae_subfolder(vae_class: Any, source: str) -> str | None:
    """``"vae"`` where ``source`` is a pipeline's folder or hub id, None where it is the VAE's own."""
    if Path(source).is_dir():
        if (Path(source) / "config.json").is_file():
            return None
        if (Path(source) / "vae" / "config.json").is_file():
            return "vae"
        raise ValueError(f"vae = {source}: neither config.json nor vae/config.json is in that folder")
    try:
        vae_class.load_config(source, subfolder="vae")
    except OSError as error:
        logger.info("no vae/config.json in %s (%s): taking it for the VAE itself", source, error)
        return None
    return "vae"
