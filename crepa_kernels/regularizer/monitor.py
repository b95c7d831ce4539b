"""Says once which side a NaN came from, and what latents do not look like, without waiting for the device."""

from __future__ import annotations

import logging
import math

import torch

from ..transfer import HostCopy
from .attach import Owner

logger = logging.getLogger(__name__)

TEACHER = "the teacher's features"
_NAMES = (TEACHER, "the projector's weights")
_REST = "the {model}'s hidden states: teacher and projector are finite"


class NonFiniteMonitor:
    """Watches the loss; when it is not finite, one warning names the side that is not finite either.

    A sum is not finite when one of its terms is not, so the projector's weights are summed, and the squares of the
    teacher's features, which are not finite either where normalizing them is not.
    The hidden states are what is left: reading them once more in every step would cost as much as their statistics.
    The numbers are read at the first call after they have arrived on the host; on a CPU at once.

    Attributes:
        source: the side that it came from; None while the loss is finite.
    """

    def __init__(self, owner: Owner) -> None:
        self.source: str | None = None
        self._owner = owner
        self._told = False
        self._under_way: list[tuple[int, HostCopy]] = []

    @torch.no_grad()
    def watch(self, step: int, loss: torch.Tensor, features: torch.Tensor, projector: torch.Tensor) -> None:
        """Queues this step's check and reports those that have arrived; ``projector`` is the sum of its weights."""
        if self._told:
            return
        size = torch.linalg.vector_norm(features, dtype=torch.float32)
        numbers = torch.stack([loss.float(), size, projector.float()])
        self._under_way.append((step, HostCopy(numbers)))
        while self._under_way and self._under_way[0][1].arrived:
            self._report(*self._under_way.pop(0))

    def flush(self) -> None:
        """Waits for the checks that are under way and reports them."""
        while self._under_way:
            self._report(*self._under_way.pop(0))

    def _report(self, step: int, numbers: HostCopy) -> None:
        loss, *sides = numbers.read()
        if math.isfinite(loss) or self._told:
            return
        self._told = True
        found = [name for name, value in zip(_NAMES, sides, strict=True) if not math.isfinite(value)]
        self.source = source = " and ".join(found) or _REST.format(model=self._owner.model)
        title = self._owner.title
        logger.warning("the %s loss at step %d is %s; it came from %s (said once)", title, step, loss, source)


class LatentMonitor:
    """Looks at the first latents that are decoded: one warning says what they do not look like.

    Noise, latents that are not normalised, and frames in the place of as many channels have the right shape and type,
    and teach from nonsense. Clean latents are of about unit variance by channel, alike from position to position, and
    more alike from frame to frame than from channel to channel; decoding them does not fill a picture with black and
    white. Nothing is refused: a clip may be extraordinary. Reported at the first call after the numbers have arrived.

    Attributes:
        done: whether it has looked.
    """

    ENOUGH = 2048  # numbers of which a correlation below `NOISE` is no chance
    NOISE, RAW, ORDER, CLIPPED = 0.1, 0.1, 2.0, 0.2
    RMS = (0.1, 4.0)

    def __init__(self) -> None:
        self._sent: HostCopy | None = None
        self.done = False

    @torch.no_grad()
    def watch(self, latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, pixels: torch.Tensor) -> None:
        """The first call sends off what is measured, and a later one reports it.

        Args:
            latents: (B, C, T, H, W), as they were given.
            mean, std: of what the VAE itself makes, which broadcast against ``latents``.
            pixels: what they were decoded to, in [0, 1].
        """
        if self.done:
            return
        if self._sent is None:
            self._sent = HostCopy(self._measured(latents.detach().float(), mean, std, pixels))
        if self._sent.arrived:
            numbers, self._sent, self.done = self._sent.read(), None, True
            self._report(*numbers)

    def _measured(self, x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        # log p(x) where they are what the VAE made, less that where they are normalised, a number of x.
        raw = (x.square() - ((x - mean) / std).square()).mean() / 2 - std.log().mean()
        inner = x - x.mean((2, 3, 4), keepdim=True)
        tells = x.numel() >= self.ENOUGH and x.shape[-1] > 1
        alike = (inner[..., 1:] * inner[..., :-1]).mean() / inner.square().mean() if tells else torch.ones_like(raw)
        order = torch.ones_like(raw)
        if x.shape[1] == x.shape[2] > 2:
            order = x.diff(dim=2).square().mean() / x.diff(dim=1).square().mean()
        clipped = torch.minimum((pixels <= 0).float().mean(), (pixels >= 1).float().mean())
        return torch.stack([x.square().mean().sqrt(), raw, alike, order, clipped.to(raw)])

    def _report(self, rms: float, raw: float, alike: float, order: float, clipped: float) -> None:
        found = []
        if order > self.ORDER:
            found.append(
                f"their frames differ {order:.2g} times as much as their channels: are they (B, T, C, H, W), and not "
                "(B, C, T, H, W)?"
            )
        if alike < self.NOISE:
            found.append(f"neighbouring positions are as unlike as in noise (correlation {alike:.2g}): are they noisy?")
        if not self.RMS[0] <= rms <= self.RMS[1]:
            found.append(f"their root mean square is {rms:.3g}, of normalised ones about 1")
        elif raw > self.RAW:
            found.append("they look like what the VAE makes: are they not normalised as the transformer sees them?")
        if clipped > self.CLIPPED:
            found.append(f"{clipped:.0%} of what they decode to is black and as much is white")
        if found and not math.isnan(rms):
            logger.warning("the latents given to loss() do not look clean: %s (said once)", "; ".join(found))
