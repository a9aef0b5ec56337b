"""HTML pages from templates: one file each, which loads nothing but the videos beside it."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packforcing.config import Policy
from packforcing.extras import installed_version
from packforcing.files import write_file

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

RUNTIME = ("packforcing", "onnxruntime", "onnxruntime-gpu", "numpy", "av")


def save_page(path: Path, template: str, **values: Any) -> None:
    """Render a template and write the page, whole or not at all.

    Args:
        path: The page.
        template: Name of a file in `templates`.
        values: Variables of the template; text is escaped.

    Raises:
        OutputError: The page cannot be written.
    """
    text = fill_template(template, **values)
    write_file(path, text.encode("utf-8", errors="replace"))  # a prompt may hold lone surrogates


def fill_template(template: str, **values: Any) -> str:
    """Return the text of a template, with values escaped for HTML; the filter `cell` for Markdown.

    Args:
        template: Name of a file in `templates`.
        values: Variables of the template.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _table_cell
    return environment


def _table_cell(text: str) -> str:
    """Return a text that stays in its cell of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def sample_frames(
    video: Path, frames: int, samples: int, width: int
) -> Iterator[tuple[int, Image]]:
    """Yield frames spread over a video, first and last included, with their numbers.

    Args:
        video: The video.
        frames: Number of frames in it.
        samples: Number of frames to yield.
        width: Largest width of a picture in pixels; larger frames are made smaller.
    """
    import av
    from PIL.Image import Resampling

    numbers = set(np.linspace(0, frames - 1, samples).round().astype(int).tolist())
    with av.open(video) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in numbers:
                scale = min(1.0, width / frame.width)
                size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
                yield index, frame.to_image().resize(size, Resampling.BOX)


def picture_url(picture: Image, kind: str) -> str:
    """Encode a picture into a data URL; `kind` is "png" or "jpeg"."""
    stream = io.BytesIO()
    picture.save(stream, kind)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def read_paths(
    reads: Sequence[Sequence[int]], policy: Policy, first_block: int = 0
) -> dict[str, str]:
    """Draw the blocks in context as SVG paths, one per partition.

    Args:
        reads: The archived blocks that each block read.
        policy: The policy of the video.
        first_block: Number of the block that `reads` begins with.

    Returns:
        Squares by partition: across, the block that was generated; down, the block it read.
    """
    paths = {"sink": "", "mid": "", "recent": ""}
    for block, archived in enumerate(reads, first_block):
        sink, recent = policy.full_resolution_blocks(block)
        for partition, blocks in ("sink", sink), ("mid", archived), ("recent", recent):
            paths[partition] += "".join(f"M{block} {old}h.9v.9h-.9z" for old in blocks)
    return paths


def runtime_versions() -> str:
    """Name the versions of the packages that render, of Python and of the system."""
    parts = [f"{name} {version}" for name in RUNTIME if (version := installed_version(name))]
    parts.append(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    return ", ".join(parts)
