"""What a pipeline's configs alone tell of its models: sizes of clips, latents and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

from crepa_kernels.models.families import FAMILIES
from crepa_kernels.models.layouts import TokenLayout, patch_size, raster_layout
from crepa_kernels.models.vaes import VAES

from ..terminal import several


class ClipSize(Protocol):
    """Size of a training clip in pixels and pixel frames."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def frames(self) -> int: ...


class ModelSizes:
    """Sizes of one pipeline's models and of what they take and make.

    Class attributes:
        name: the family's name, the same as in `crepa_kernels.supported_families()`.
        depth: keys of the transformer's config that say how many blocks it has.
        pixel_multiple: what the pipeline asks height and width to be a multiple of, beside VAE and patches.

    Attributes:
        configs: the parsed configs of "transformer" and "vae", with their classes' defaults under them, and of
            "scheduler", and model_index.json as "pipeline".
        row: what CREPA knows of the family.
    """

    name: ClassVar[str]
    depth: ClassVar[tuple[str, ...]] = ("num_layers",)
    pixel_multiple: ClassVar[int] = 1

    def __init__(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.configs = configs
        self.row = next(row for row in FAMILIES if row.name == self.name)

    def config(self, part: str) -> SimpleNamespace:
        """A part's config as the models have theirs."""
        return SimpleNamespace(**self.configs[part])

    @property
    def token_square(self) -> int:
        """Side of the squares in which sparse attention takes a frame's tokens; 1 where it is dense."""
        return 1

    @property
    def compression(self) -> tuple[int, int]:
        """(pixel frames, pixels) of one latent frame and of one latent's side."""
        return VAES[str(self.vae_class)].compression(self.config("vae"))

    def check_bucket(self, bucket: ClipSize) -> None:
        """ValueError for a size that VAE and patches cannot make, or a frame count that the VAE cannot make."""
        self._check_sides(bucket)
        self._check_frames(bucket, self.compression[0])
        patch, frames = patch_size(self.config("transformer"))[0], self.latent_shape(bucket)[1]
        if frames % patch:
            raise ValueError(
                f"frame count {bucket.frames}: {several(frames, 'latent frame')}, not a multiple of the transformer's "
                f"temporal patch {patch}"
            )

    def _check_sides(self, bucket: ClipSize) -> None:
        _, *patch = patch_size(self.config("transformer"))
        pixels = self.compression[1] * self.token_square
        height, width = (lcm(pixels * side, self.pixel_multiple) for side in patch)
        if bucket.height % height or bucket.width % width or bucket.height < height or bucket.width < width:
            why = "VAE and patches" if self.token_square == 1 else "VAE, patches and squares of sparse attention"
            raise ValueError(
                f"resolution {bucket.height}x{bucket.width}: height must be a multiple of {height}, "
                f"width of {width} ({why})"
            )

    def _check_frames(self, bucket: ClipSize, factor: int) -> None:
        if bucket.frames < 1 or (bucket.frames - 1) % factor:
            raise ValueError(f"frame count {bucket.frames}: the VAE makes 1 + {factor}n frames (1, {1 + factor}, ...)")

    def latent_shape(self, bucket: ClipSize) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a clip's latents, from configs alone."""
        factor, pixels = self.compression
        channels = VAES[str(self.vae_class)].channels(self.config("vae"))
        return channels, 1 + (bucket.frames - 1) // factor, bucket.height // pixels, bucket.width // pixels

    def layout(self, bucket: ClipSize) -> TokenLayout:
        """How a clip's tokens lie in the transformer, from configs alone."""
        return raster_layout(self.config("transformer"), self.latent_shape(bucket)[1:])

    @property
    def hidden_size(self) -> int:
        """Width D of a block's output."""
        return self.row.hidden_size(self.config("transformer"))

    @property
    def blocks(self) -> int:
        """Number of the transformer's blocks."""
        return sum(int(self.configs["transformer"][key]) for key in self.depth)

    @property
    def vae_class(self) -> str | None:
        """The diffusers class of the VAE."""
        name: str | None = self.configs["pipeline"]["vae"][1]
        return name
