"""What workers report while they render."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Began:
    """A worker has claimed a job."""

    id: str
    frames: int  # of the whole video


@dataclass(frozen=True)
class Made:
    """A block is finished."""

    id: str
    frames: int  # of the video until now
    recovered: bool  # whether an earlier process had generated it


@dataclass(frozen=True)
class Ended:
    """A job has a result, of this worker or of another one."""

    id: str
    status: str
    error: str = ""


@dataclass(frozen=True)
class Retired:
    """A worker cannot work, like one whose GPU is gone; others may."""

    error: str


Event = Began | Made | Ended | Retired
