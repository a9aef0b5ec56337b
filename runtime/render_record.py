"""The record of an unfinished render, `checkpoint.json`: its request, progress and files.

`packforcing.runtime.resume` has the layout of the folder it lies in.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from packforcing.errors import ResumeError
from packforcing.files import (
    FileRecord,
    Upgrade,
    VersionError,
    decode_versioned,
    seal_json,
    unseal_json,
    write_file,
)
from packforcing.runtime.snapshot import Counters
from packforcing.runtime.video_files import JOINED
from packforcing.runtime.video_forms import FILE_SUFFIXES, SEGMENT_SUFFIXES

VERSION = 3
# Of older records; those of version 1 are not read. Version 3 has each block of a limited archive
# in a file of its own; what version 2 has in their place is read as it is.
UPGRADES: dict[int, Upgrade] = {2: lambda record: record}
_MAX_RECORD_BYTES = 1 << 26  # that of a day of video is smaller
RECORD, LOCK = "checkpoint.json", "lock"
_SEGMENTS = "|".join(map(re.escape, SEGMENT_SUFFIXES))
OWN_FILES = re.compile(
    rf"segment-\d{{6}}({_SEGMENTS})"
    r"|(archive|block|sink|state)-\d{6}\.safetensors|latents-\d{6}\.bin"
    r"|checkpoint\.json(\.partial)?|\.checkpoint\.partial-[0-9a-f]{8}\.json"
    r"|\.checkpoint\.json\.[0-9a-f]{8}\.partial-[0-9a-f]{8}"
    rf"|\.segment-\d{{6}}\.partial-[0-9a-f]{{8}}({_SEGMENTS})"
    rf"|{JOINED}({'|'.join(map(re.escape, FILE_SUFFIXES))})?"
)


class RenderRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a render is; all of `files` is on the disk when the record is."""

    version: int = VERSION
    request: dict[str, str]  # all that decides about the frames
    block: int = 0  # blocks whose frames are in segments
    scene: int = 0  # this and the next two as in `Counters`
    oldest: int = 0
    mids: tuple[int, ...] = ()
    joined: bool = False  # whether the whole video was about to be renamed
    files: dict[str, FileRecord] = {}

    @property
    def counters(self) -> Counters:
        return Counters(self.block, self.scene, self.oldest, self.mids)

    def files_of(self, kind: str) -> list[str]:
        """Return the names of the files of a kind, in order."""
        return sorted(name for name in self.files if name.startswith(f"{kind}-"))


def read_record(folder: Path) -> RenderRecord | None:
    """Read the record; None where no render has begun. Raise `ResumeError` if it is damaged."""
    path = folder / RECORD
    try:
        if not os.path.lexists(path):
            return None
        if not is_plain_file(path) or path.stat().st_size > _MAX_RECORD_BYTES:
            raise ResumeError(damage_message(path))
        body = unseal_json("checkpoint", path.read_bytes())
        remedy = f"finish it with the release that began it, or remove {folder} to start again"
        record = decode_versioned(body, RenderRecord, VERSION, UPGRADES, remedy)
    except VersionError as error:
        raise ResumeError(f"{path} {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ResumeError(damage_message(path)) from error
    if not all(OWN_FILES.fullmatch(name) for name in record.files):
        raise ResumeError(damage_message(path))
    return record


def write_record(folder: Path, record: RenderRecord) -> None:
    """Write the record of a render atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    write_file(folder / RECORD, seal_json("checkpoint", msgspec.json.encode(record)))


def damage_message(path: Path) -> str:
    return (
        f"{path} is damaged or missing, and the render cannot be resumed without it: put the file "
        f"back, or remove {path.parent} to start again"
    )


def is_plain_file(path: Path) -> bool:
    """Tell whether a path is a file and not a link to one."""
    return path.is_file() and not path.is_symlink()
