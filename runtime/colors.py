"""Convert colors to those of an SDR display: BT.709 primaries, as players do.

HDR is tone-mapped by ITU-R BT.2446-1, method A (1000 to 100 cd/m2). PQ is decoded by SMPTE
ST 2084, HLG by ITU-R BT.2100 for a display of 1000 cd/m2. Primaries and transfers are numbered as
in ITU-T H.273, as files store them.
"""

from __future__ import annotations

import numpy as np

SRGB, PQ, HLG = 13, 16, 18  # transfer characteristics
BT709, BT2020, DCI_P3, DISPLAY_P3 = 1, 9, 11, 12  # primaries
HDR_NAMES = {PQ: "PQ", HLG: "HLG"}
_WHITE = (0.3127, 0.3290)  # D65
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_CHROMATICITIES = {  # x, y of red, green and blue
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    DCI_P3: _P3,
    DISPLAY_P3: _P3,
}
_GAMMA = 2.4  # of an SDR display, ITU-R BT.1886
_PEAK, _SDR_PEAK = 1000.0, 100.0  # cd/m2
_LUMA = np.array((0.2627, 0.6780, 0.0593), np.float32)  # BT.2020


def needs_conversion(primaries: int, transfer: int) -> bool:
    """Tell whether `to_sdr` changes colors with these tags.

    The primaries of SD video differ from those of BT.709 too little to be converted by players.
    """
    return transfer in HDR_NAMES or (primaries in _CHROMATICITIES and primaries != BT709)


def to_sdr(pixels: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """Convert pixels to 8-bit RGB for an SDR display.

    Args:
        pixels: uint8 or uint16 RGB [H, W, 3], full range.
        primaries: H.273 color primaries; unknown ones count as BT.2020 in HDR, else as BT.709.
        transfer: H.273 transfer characteristics. sRGB's is decoded by IEC 61966-2-1; all others
            but PQ and HLG count as those of an SDR display.

    Returns:
        uint8 RGB [H, W, 3].
    """
    signal = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if transfer in HDR_NAMES:
        light = _decode_pq(signal) if transfer == PQ else _decode_hlg(signal)
        signal = _tone_map((np.clip(light / _PEAK, 0, 1)) ** (1 / _GAMMA))
        primaries = primaries if primaries in _CHROMATICITIES else BT2020
    if primaries in _CHROMATICITIES and primaries != BT709:
        matrix = np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)
        light = _decode_sdr(np.clip(signal, 0, 1), transfer) @ matrix.T.astype(np.float32)
        signal = _encode_sdr(np.clip(light, 0, 1), transfer)
    return (np.clip(signal, 0, 1) * 255 + 0.5).astype(np.uint8)


def _decode_sdr(signal: np.ndarray, transfer: int) -> np.ndarray:
    """Return light from 0 to 1."""
    if transfer != SRGB:
        return signal**_GAMMA
    return np.where(signal > 0.04045, ((signal + 0.055) / 1.055) ** 2.4, signal / 12.92)


def _encode_sdr(light: np.ndarray, transfer: int) -> np.ndarray:
    """Undo `_decode_sdr`."""
    if transfer != SRGB:
        return light ** (1 / _GAMMA)
    return np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, light * 12.92)


def _decode_pq(signal: np.ndarray) -> np.ndarray:
    """Return light in cd/m2: the EOTF of SMPTE ST 2084."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _decode_hlg(signal: np.ndarray) -> np.ndarray:
    """Return light in cd/m2: inverse OETF and OOTF of ITU-R BT.2100, system gamma 1.2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ _LUMA
    return _PEAK * luminance[..., None] ** 0.2 * scene


def _tone_map(signal: np.ndarray) -> np.ndarray:
    """Map gamma-coded HDR to gamma-coded SDR: BT.2446-1, method A."""
    rho_hdr, rho_sdr = (1 + 32 * (peak / 10_000) ** (1 / 2.4) for peak in (_PEAK, _SDR_PEAK))
    luma = signal @ _LUMA
    perceived = np.log1p((rho_hdr - 1) * luma) / np.log(rho_hdr)
    knee = -1.1510 * perceived**2 + 2.7811 * perceived - 0.6302
    compressed = np.where(
        perceived <= 0.7399,
        1.0770 * perceived,
        np.where(perceived < 0.9909, knee, 0.5 * perceived + 0.5),
    )
    sdr_luma = (rho_sdr**compressed - 1) / (rho_sdr - 1)
    ratio = sdr_luma / np.maximum(1.1 * luma, 1e-6)
    red, blue = ratio * (signal[..., 0] - luma), ratio * (signal[..., 2] - luma)
    sdr_luma = sdr_luma - np.maximum(0.1 * red / 1.4746, 0)
    red, blue = red + sdr_luma, blue + sdr_luma
    green = (sdr_luma - _LUMA[0] * red - _LUMA[2] * blue) / _LUMA[1]
    return np.stack((red, green, blue), axis=-1)


def _to_xyz(primaries: int) -> np.ndarray:
    """Return the matrix from linear RGB of these primaries to XYZ, white D65."""
    columns = np.array([(x, y, 1 - x - y) for x, y in _CHROMATICITIES[primaries]]).T
    x, y = _WHITE
    white = np.array((x / y, 1, (1 - x - y) / y))
    return columns * np.linalg.solve(columns, white)
