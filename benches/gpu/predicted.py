"""What forward + backward in bf16 was predicted to take before anything had run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Shares of the honest floor, lowest and highest, from the compiled kernels; ms of the plan they were built to."""

    fraction: tuple[float, float]
    planned_ms: float | None = None

    def __str__(self) -> str:
        low, high = (f"{100 * share:.0f}" for share in self.fraction)
        share = f"{low} %" if low == high else f"{low}-{high} %"
        return share if self.planned_ms is None else f"{share}, plan {self.planned_ms:.3f} ms"


PREDICTED = {
    "H100": {
        "wan-14b-480p": Prediction((0.83, 0.87)),
        "wan-1.3b-480p": Prediction((0.80, 0.80)),
        "ltx-2b": Prediction((0.70, 0.75)),
    },
    "H200": {
        "wan-14b-480p": Prediction((0.84, 0.88), 2.466),
        "wan-1.3b-480p": Prediction((0.80, 0.80), 0.876),
        "ltx-2b": Prediction((0.70, 0.75), 0.247),
    },
}


def prediction(device: str, shape: str) -> Prediction | None:
    """For a device by its full name and a shape on equal grids by its name; None where nothing was predicted."""
    return next((shapes.get(shape) for card, shapes in PREDICTED.items() if card in device), None)
