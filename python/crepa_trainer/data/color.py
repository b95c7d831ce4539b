"""A decoded frame to RGB as an SDR screen shows it: matrix, range, primaries, and HDR tone-mapped.

Done here and not by swscale, which versions of PyAV ask for other matrices, and which knows no tone mapping: it scales
planes, without touching what their values mean.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# Numbers of ITU-T H.273.
_MATRICES = {  # Kr, Kb
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # BT.601
    6: (0.299, 0.114),
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
    10: (0.2627, 0.0593),
}
_UNTAGGED, _BT601, _BT2020 = 2, 5, 9
_LIMITED, _FULL = 1, 2
_PQ, _HLG = 16, 18
HDR = {_PQ: "PQ", _HLG: "HLG"}

# Linear light of wider primaries to that of BT.709.
_TO_BT709 = {
    9: np.array([[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32),
    12: np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]], np.float32),  # P3
}
_SDR_WHITE = 203.0  # cd/m2 of diffuse white in HDR, BT.2408; in HLG 75 % of the signal
_PEAK = 1000.0 / _SDR_WHITE  # what is brighter is white
_KNEE = 0.8  # up to here light is kept as it is


def transfer(frame: av.VideoFrame, stream: Any) -> str | None:
    """ "PQ" or "HLG" of an HDR frame, None of any other."""
    return HDR.get(stream.codec_context.color_trc if frame.color_trc == _UNTAGGED else frame.color_trc)


def to_rgb(frame: av.VideoFrame, stream: Any, scaler: VideoReformatter, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, sRGB. ValueError for a colour matrix that is not known.

    What is not tagged is BT.601, as FFmpeg reads it, or BT.2020 in HDR.
    """
    hdr = transfer(frame, stream)
    size: dict[str, Any] = {"height": height, "width": width, "interpolation": Interpolation.BICUBIC}
    if not _is_yuv(frame) and not hdr:
        # swscale widens its filter with the scale, so shrinking does not alias.
        return np.asarray(scaler.reformat(frame, format="rgb24", **size).to_ndarray())
    primaries = frame.color_primaries
    if primaries == _UNTAGGED:
        primaries = stream.codec_context.color_primaries
    if not _is_yuv(frame):
        signal = scaler.reformat(frame, format="rgb48le", **size).to_ndarray().astype(np.float32) / 65535
    else:
        signal = _rgb_signal(frame, scaler, size, _BT2020 if hdr else _BT601)
    if hdr:
        light = _light_of_pq(signal) if hdr == "PQ" else _light_of_hlg(signal)
        wide = _TO_BT709[_BT2020 if primaries == _UNTAGGED else primaries] if primaries in (*_TO_BT709, 2) else None
        signal = _encoded(_shoulder(light if wide is None else light @ wide.T))
    elif primaries in _TO_BT709:
        signal = _encoded(_decoded(signal) @ _TO_BT709[primaries].T)
    return np.rint(signal.clip(0, 1) * 255).astype(np.uint8)


def _is_yuv(frame: av.VideoFrame) -> bool:
    pixels = frame.format
    if pixels.is_rgb or pixels.has_palette or pixels.is_bit_stream or pixels.name.startswith(("xyz", "bayer", "gbr")):
        return False
    # Grey has no matrix, and FFmpeg takes it as full range where nothing is said.
    return len(pixels.components) >= 3 or frame.color_range == _LIMITED


def _rgb_signal(frame: av.VideoFrame, scaler: VideoReformatter, size: dict[str, Any], untagged: int) -> np.ndarray:
    """(H, W, 3) float32, nominally within 0 to 1, with the transfer function of the file."""
    matrix = untagged if frame.colorspace == _UNTAGGED else frame.colorspace
    grey = len(frame.format.components) < 3
    if matrix not in _MATRICES and not grey:
        raise ValueError(f"colour matrix {matrix} of H.273 is not supported")
    full = frame.color_range == _FULL or frame.format.name.startswith("yuvj")
    bits = frame.format.components[0].bits
    # Older FFmpeg ranges come with the format.
    kind = "yuvj444p" if frame.format.name.startswith("yuvj") else "yuv444p"
    pixels = ("gray" if grey else kind) + (f"{bits}le" if bits > 8 else "")
    # The same matrix and range on both sides: planes are scaled, and nothing else.
    same = {"src_colorspace": _BT601, "dst_colorspace": _BT601}
    ranges = {"src_color_range": _FULL if full else _LIMITED, "dst_color_range": _FULL if full else _LIMITED}
    planes = [_plane(plane, bits) for plane in scaler.reformat(frame, format=pixels, **size, **same, **ranges).planes]
    unit = 1 << (bits - 8)
    most = (1 << bits) - 1
    black, luma, chroma = (0, most, most) if full else (16 * unit, 219 * unit, 224 * unit)
    y = (planes[0] - np.float32(black)) / np.float32(luma)
    if grey:
        return np.stack([y] * 3, axis=-1)
    u, v = ((plane - np.float32(128 * unit)) / np.float32(chroma) for plane in planes[1:3])
    kr, kb = _MATRICES[matrix]
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], axis=-1).astype(np.float32)


def _plane(plane: Any, bits: int) -> np.ndarray:
    kind = np.dtype("<u2" if bits > 8 else "u1")
    rows = np.frombuffer(plane, kind).reshape(-1, plane.line_size // kind.itemsize)
    return rows[: plane.height, : plane.width].astype(np.float32)


def _light_of_pq(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, in units of diffuse white."""
    root = signal.clip(0, 1) ** (1 / 78.84375)
    light = (root - 0.8359375).clip(0) / (18.8515625 - 18.6875 * root)
    return np.asarray(light ** (1 / 0.1593017578125) * (10000 / _SDR_WHITE), np.float32)


def _light_of_hlg(signal: np.ndarray) -> np.ndarray:
    """BT.2100 with its system gamma of 1.2 a channel, as zimg has it, in units of diffuse white."""
    signal = signal.clip(0, 1)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return np.asarray((scene / 0.26496256) ** 1.2, np.float32)


def _shoulder(light: np.ndarray) -> np.ndarray:
    """What is brighter than the knee is bent under 1; by one factor for the three channels, so that hues stay."""
    light = light.clip(0)
    most = light.max(axis=-1, keepdims=True).clip(1e-6)
    over, peak = (most.clip(None, _PEAK) - _KNEE).clip(0) / (1 - _KNEE), (_PEAK - _KNEE) / (1 - _KNEE)
    bent = _KNEE + (1 - _KNEE) * over * (1 + over / peak**2) / (1 + over)
    return np.asarray(light * np.where(most > _KNEE, bent / most, 1.0), np.float32)


def _encoded(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _decoded(signal: np.ndarray) -> np.ndarray:
    signal = signal.clip(0, 1)
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4).astype(np.float32)
