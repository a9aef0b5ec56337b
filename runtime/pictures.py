"""Read a picture, or an animated one, as viewers show it."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from packforcing.errors import VideoError
from packforcing.runtime.colors import HDR_NAMES, needs_conversion

if TYPE_CHECKING:
    from PIL import Image

# that Pillow may try; no other decoder runs. JPEG opens MPO as well
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF")
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")  # further pictures in other formats are not shown
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEADER_BYTES = 1 << 16  # where AVIF has its color tags
_SHORTEST = 0.011  # seconds; browsers show a picture of an animation with less for 0.1 s


class Shown(NamedTuple):
    """A picture or frame, upright.

    Attributes:
        pixels: RGB [H, W, 3], uint8, or uint16 for HDR.
        pixel_aspect: Width of a pixel over its height.
        primaries: H.273 color primaries.
        transfer: H.273 transfer characteristics.
    """

    pixels: np.ndarray
    pixel_aspect: Fraction = Fraction(1)
    primaries: int = 2
    transfer: int = 2


def read_picture(path: Path, notes: list[str]) -> Iterator[tuple[float, float, Shown]] | None:
    """Read the pictures of a file that is no clip.

    The EXIF orientation is applied, an ICC profile converted to sRGB, transparency shown over
    black, 16 bits per channel scaled to 8.

    Args:
        path: The file; its contents decide about the format.
        notes: Gets a line for what a user may not expect.

    Returns:
        Start and duration in seconds and the picture: one, or those of an animation, each decoded
        when it is its turn; None for a file of another format.

    Raises:
        VideoError: A picture of a kind that is not read.
        OSError, ValueError, SyntaxError, EOFError, struct.error: Pillow cannot read it.
    """
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS and b"avif" not in head[8:64]:
        raise VideoError("HEIC pictures are not read; save it as JPEG, PNG or AVIF")
    with warnings.catch_warnings():
        # for less than what is refused as a bomb
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=_FORMATS)
        except UnidentifiedImageError:
            return None
    return _shown_pictures(image, head, notes)


def _shown_pictures(
    image: Image.Image, head: bytes, notes: list[str]
) -> Iterator[tuple[float, float, Shown]]:
    with image:
        primaries, transfer = _coded_colors(head, image.format or "")
        for start, seconds, pixels in _pictures(image, notes, (primaries, transfer)):
            yield start, seconds, Shown(pixels, Fraction(1), primaries, transfer)
    if transfer in HDR_NAMES:
        notes.append(f"HDR ({HDR_NAMES[transfer]}) tone-mapped to SDR by BT.2446 method A")


def _pictures(
    image: Image.Image, notes: list[str], coded: tuple[int, int]
) -> Iterator[tuple[float, float, np.ndarray]]:
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format not in _ANIMATED:
        if count > 1:
            notes.append(f"the first of {count} pictures in the file")
        yield 0.0, 0.0, _pixels(image, coded)
        return
    start = 0.0
    for number in range(count):
        image.seek(number)
        image.load()
        if number == 0 and image.info.get("default_image"):  # shown where nothing animates it
            continue
        seconds = float(image.info.get("duration", 0)) / 1000
        seconds = seconds if seconds >= _SHORTEST else 0.1
        yield start, seconds, _pixels(image, coded)
        start += seconds
    notes.append("an animation, played once")


def _pixels(image: Image.Image, coded: tuple[int, int]) -> np.ndarray:
    """Return the current picture of a file as uint8 RGB [H, W, 3]."""
    from PIL import Image, ImageOps

    profile = image.info.get("icc_profile")  # before the orientation: some readers drop it there
    if image.mode in ("F", "I") and image.format == "TIFF":
        raise VideoError("TIFF with floating point or 32 bits has no white; save it with 16 or 8")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # gray, 16 bits; a level of it may be the transparent one
        gray = np.asarray(turned).astype(np.uint32)
        levels = Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))
        transparent = turned.info.get("transparency")
        if isinstance(transparent, int):
            levels.putalpha(Image.fromarray(np.where(gray == transparent, 0, 255).astype(np.uint8)))
        turned = levels
    alpha = None
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        alpha = turned.getchannel("A")
    if profile and not needs_conversion(*coded):
        turned = _to_srgb(turned, profile)
    turned = turned.convert("RGB")
    if alpha is not None:
        turned = Image.composite(turned, Image.new("RGB", turned.size), alpha)
    return np.asarray(turned)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an ICC profile to sRGB; one that does not fit is ignored."""
    from PIL import Image, ImageCms

    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            image.mode,
            "RGB",
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    if image.mode == "RGB":
        # rounding alone, where the profile is one of sRGB
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        lattice = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(lattice), transform))
        if np.abs(converted.astype(int) - lattice).max() <= 2:
            return image
    converted_image = ImageCms.applyTransform(image, transform)
    assert converted_image is not None
    return converted_image


def _coded_colors(head: bytes, format_name: str) -> tuple[int, int]:
    """Return primaries and transfer that a PNG (cICP) or AVIF (nclx) names; 2 is unspecified."""
    name, form, skipped = {"PNG": (b"cICP", "BB", 4), "AVIF": (b"colrnclx", ">HH", 8)}.get(
        format_name, (b"", "", 0)
    )
    at = head.find(name) if name else -1
    if at < 0 or (format_name == "PNG" and at > head.find(b"IDAT") >= 0):
        return 2, 2
    try:
        primaries, transfer = struct.unpack_from(form, head, at + skipped)
    except struct.error:
        return 2, 2
    return primaries, transfer
