"""The forms of video that are written: container, codec, pixels, and how a render is resumed.

| name | form |
|---|---|
| `NAME.mp4`, `NAME.mov` | H.264, for viewing |
| `NAME.webm` | VP9, for viewing in browsers |
| `NAME.gif` | an animation of 256 colors a frame |
| `NAME.mkv` | FFV1, keeps every byte |
| `FOLDER/` | numbered PNG files, keep every byte |
| `-` | standard output: fragmented MP4 of H.264, playable as it arrives |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from packforcing.errors import OutputError

STDOUT = "-"


@dataclass(frozen=True)
class Form:
    """How a video is written.

    Attributes:
        suffix: Of its name; empty for a folder, `STDOUT` for standard output.
        container: FFmpeg's name for it; empty for a folder of PNG files.
        codec: FFmpeg's name of the encoder.
        layout: FFmpeg's name of the pixel format that is encoded.
        bytes_per_pixel: Rough upper bound on disk. The lossless forms exceed raw size on noise;
            the others stay well under two bits a pixel on anything but noise.
        segment: Suffix of the segments of an unfinished render; it differs where segments are
            lossless and encoded at the end.
        options: Of the encoder.
        container_options: Of the container.
        reordered: Places at most by which a frame is decoded before it is shown.
    """

    suffix: str
    container: str
    codec: str
    layout: str
    bytes_per_pixel: float
    segment: str
    options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)
    reordered: int = 0


# what the conversion from RGB uses; untagged, players guess it from the height
_COLORS = {"colorspace": "smpte170m", "color_range": "tv"}
_H264 = {"crf": "16", "preset": "veryfast", **_COLORS}
_VP9 = {"crf": "18", "b": "0", "deadline": "good", "cpu-used": "4", **_COLORS}
# the index moves to the front, so that a browser plays while it loads
_INDEX_FIRST = {"movflags": "+faststart"}
# the header waits for the first fragment, which says by how much frames are reordered
_FRAGMENTS = {
    "movflags": "+frag_keyframe+delay_moov+default_base_moof",
    "frag_duration": "1000000",
}
FORMS = {
    form.suffix: form
    for form in (
        Form(".mp4", "mp4", "libx264", "yuv420p", 0.25, ".mp4", _H264, _INDEX_FIRST, 2),
        Form(".mov", "mov", "libx264", "yuv420p", 0.25, ".mov", _H264, _INDEX_FIRST, 2),
        Form(".webm", "webm", "libvpx-vp9", "yuv420p", 0.25, ".webm", _VP9),
        Form(".gif", "gif", "gif", "pal8", 1.1, ".mkv"),
        Form(".mkv", "matroska", "ffv1", "bgr0", 4.0, ".mkv", {"level": "3"}),
        Form("", "", "png", "rgb24", 3.1, ".mkv"),
        Form(STDOUT, "mp4", "libx264", "yuv420p", 0.0, "", _H264, _FRAGMENTS, 2),
    )
}
LOSSLESS = ".mkv"
PNG, STREAM = FORMS[""], FORMS[STDOUT]
SEGMENT_SUFFIXES = sorted({form.segment for form in FORMS.values()} - {""})
FILE_SUFFIXES = sorted(suffix for suffix in FORMS if suffix.startswith("."))
FORMS_TEXT = (
    ".mp4, .mkv (lossless), .mov, .webm, .gif, a folder for PNG files, such as 'frames/', or - for "
    "standard output"
)


def output_target(path: str | os.PathLike[str]) -> tuple[Form, Path]:
    """Return the form of video that a path names, and the file or folder.

    Raises:
        OutputError: The name is of no form.
    """
    text = os.fspath(path)
    target = Path(text)
    if text == STDOUT:
        return STREAM, target
    if text.endswith(("/", os.sep)):
        return PNG, target
    if target.name.lower() in FILE_SUFFIXES:
        raise OutputError(
            f"cannot write {target}: that is a suffix without a name; name it 'video{target.name}'"
        )
    plain = target.name.rstrip(". ")
    if plain != target.name and Path(plain).suffix.lower() in FILE_SUFFIXES:
        raise OutputError(
            f"cannot write '{target}': the name ends in a dot or space; name it '{plain}'"
        )
    if form := FORMS.get(target.suffix.lower()):
        return form, target
    if target.is_dir():
        return PNG, target
    raise OutputError(
        f"cannot write {target}: '{target.suffix}' is not a kind of video written here; use "
        f"{FORMS_TEXT}"
    )


def segment_suffix(path: str | os.PathLike[str], lossless: bool = False) -> str:
    """Return the suffix of a video's segments.

    Args:
        path: The output.
        lossless: Whether they have to keep every byte, as their frames are yet to be filtered.
    """
    form = output_target(path)[0]
    return LOSSLESS if lossless else form.segment


def encoder_options(form: Form) -> dict[str, str]:
    """Return the options of a form's encoder on this machine.

    On a CPU with AVX-512, x264's macroblock tree reads memory that it never wrote, so that the same
    frames give other bytes now and then. Its code for older CPUs gives the same bytes everywhere.
    """
    simd = (np.show_config(mode="dicts") or {}).get("SIMD Extensions", {})
    names = [*simd.get("baseline", ()), *simd.get("found", ())]
    avx512 = any(name.startswith("AVX512") or name == "X86_V4" for name in names)
    x264 = {"x264-params": "asm=AVX2"} if avx512 and form.codec == "libx264" else {}
    return {**form.options, **x264}
