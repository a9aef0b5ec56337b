"""What a video's file says about how it was made: JSON, in the comment that its container has.

| form | place |
|---|---|
| .mp4, .mov, standard output | the comment of the movie |
| .webm, .mkv | the tag COMMENT |
| a folder of PNG files | the text "Comment" of the first |
| .gif | none: the encoder has no place for it |

Nothing of the machine, the person or the time is in it: the same render gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from packforcing.config import Config
from packforcing.errors import VideoError
from packforcing.origins import describe_licenses
from packforcing.prompts import History, Timeline, prompt_words
from packforcing.runtime.bundle import Manifest
from packforcing.runtime.encoders import COMMENT, frame_file
from packforcing.runtime.request import VideoRequest, frames_before
from packforcing.runtime.video_filters import NO_FILTERS, VideoFilters
from packforcing.sampler import describe_steps


@dataclass(frozen=True)
class SwitchInfo:
    """A prompt, and when the video begins to follow it.

    Attributes:
        block: The first block that follows it.
        seconds: Time in the video at that block's first frame.
        prompt: Its words; empty for an embedding that does not record them.
        history: What the switch does to the history.
        over: Blocks that it is spread over.
    """

    block: int
    seconds: float
    prompt: str
    history: History
    over: int = 1


class VideoMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """How a video was made.

    Attributes:
        packforcing: The release that made it.
        model: The bundle's name of its model.
        bundle: SHA-256 that the bundle's manifest states of itself.
        license: Of its weights; empty where nothing says it.
        policy: Which history blocks read, in words.
        denoising: Sampler, timesteps and shift, in words.
        prompts: Each prompt and when the video begins to follow it.
        seed: Of the noise.
        started: Whether it begins with a picture or a clip that was not generated.
        filters: What happened to the frames after the decoder, in words; empty: nothing.
    """

    packforcing: str
    model: str
    bundle: str
    license: str = ""
    policy: str
    denoising: str
    prompts: tuple[SwitchInfo, ...]
    seed: int
    started: bool = False
    filters: str = ""


def describe_video(
    manifest: Manifest, config: Config, request: VideoRequest, filters: VideoFilters = NO_FILTERS
) -> VideoMetadata:
    """Say how a video is made.

    Args:
        manifest: Of the bundle.
        config: Of the video: the bundle's, with its policy and steps.
        request: What the video is asked to be.
        filters: What happens to its frames.
    """
    from packforcing import __version__

    return VideoMetadata(
        packforcing=__version__,
        model=config.name,
        bundle=manifest.sha256,
        license=describe_licenses(manifest.origins),
        policy=str(config.policy),
        denoising=describe_steps(config),
        prompts=tuple(switch_infos(request.timeline, config)),
        seed=request.seed,
        started=request.start is not None,
        filters=str(filters),
    )


def switch_infos(timeline: Timeline, config: Config) -> list[SwitchInfo]:
    """Return each prompt of a video and when the video begins to follow it."""
    infos = []
    for block, switch in timeline.switches.items():
        seconds = frames_before(block, timeline, config) / config.fps
        text = prompt_words(switch.prompt)
        infos.append(SwitchInfo(block, seconds, text, switch.effect, switch.over))
    return infos


def encode_metadata(metadata: VideoMetadata) -> str:
    """Return the text that is written into a file."""
    return msgspec.json.encode(metadata).decode()


def read_metadata(path: str | os.PathLike[str]) -> VideoMetadata:
    """Read how a video was made from its file, or from a folder of its frames.

    Raises:
        VideoError: The file cannot be read, or does not say it.
    """
    path = Path(path)
    entries = _png_entries(path) if path.is_dir() else _container_entries(path)
    comment = next((text for key, text in entries.items() if key.lower() == COMMENT), "")
    try:
        return msgspec.json.decode(comment, type=VideoMetadata)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise VideoError(
            f"{path} does not say how it was made: it is a .gif, or was rendered with "
            "--no-metadata, by an earlier release or by another program"
        ) from error


def _container_entries(path: Path) -> Mapping[str, str]:
    import av

    from packforcing.runtime.clips import OPEN_OPTIONS

    try:
        # absolute, as FFmpeg takes what is before a colon for a protocol
        with av.open(path.absolute(), options=OPEN_OPTIONS) as container:
            return dict(container.metadata)
    except (av.InvalidDataError, av.ArgumentError):  # a .gif, or no video
        return {}
    except (OSError, ValueError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot read {path}: {reason}") from error


def _png_entries(folder: Path) -> Mapping[str, str]:
    from PIL import Image

    path = folder / frame_file(0)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {str(key): text for key, text in image.info.items() if isinstance(text, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot read {path}: {getattr(error, 'strerror', 0) or error}") from error
