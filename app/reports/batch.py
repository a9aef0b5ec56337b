"""The page of a batch: all its videos, and why some are missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packforcing.app.jobs.records import JobRecord, video_path
from packforcing.app.reports.page import picture_url, sample_frames, save_page
from packforcing.errors import PackForcingError

PAGE = "index.html"
_POSTER_WIDTH = 320  # pixels


def write_page(folder: Path, name: str, jobs: Sequence[JobRecord | str]) -> None:
    """Write index.html.

    Args:
        folder: Has the videos.
        name: Of the batch.
        jobs: In order; an ID where there is no record yet.

    Raises:
        OutputError: The page cannot be written.
    """
    videos, failed, waiting = [], [], []
    for job in jobs:
        if isinstance(job, str) or job.result is None:
            waiting.append(job if isinstance(job, str) else job.id)
        elif job.result.status == "completed":
            videos.append(_video(folder, job))
        else:
            failed.append({"id": job.id, "error": job.result.error})
    save_page(
        folder / PAGE,
        "batch.html.j2",
        name=name,
        videos=videos,
        failed=failed,
        waiting=waiting,
        count=len(jobs),
    )


def _video(folder: Path, record: JobRecord) -> dict[str, object]:
    video, poster, size = video_path(folder, record.id), "", (16, 9)
    try:
        for _, picture in sample_frames(video, record.frames, 1, _POSTER_WIDTH):
            poster, size = picture_url(picture, "jpeg"), picture.size
            break
    except (OSError, PackForcingError):  # gone, or another program has it
        pass
    prompts = [switch.prompt or "an embedding" for switch in record.switches]
    return {
        "id": record.id,
        "url": video.name,
        "poster": poster,
        "width": size[0],
        "height": size[1],
        "prompt": ", then ".join(prompts),
        "about": f"{record.seconds:g} s, seed {record.seed}",
    }
