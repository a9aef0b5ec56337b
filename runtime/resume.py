"""Store an unfinished render in a folder beside its output, so that another process resumes it.

    OUT.render/                       beside OUT while it is rendered, gone once OUT is whole
      lock                            locked by the process that renders
      checkpoint.json                 the record: request, progress, SHA-256 of every file below
      segment-000000.mp4              the frames of the blocks from 0 to the next segment's
      archive-000040.safetensors      what was archived between the snapshot before and block 40
      block-000031.safetensors        instead of those, a block that a limited archive holds
      sink-000040.safetensors         keys and values of the sink, once
      state-000040.safetensors        those of the recent blocks, and the decoder's state
      latents-000040.bin              clean latents of the blocks after 40, as they are made
      joined.mp4                      all segments as one, until it is renamed to OUT, which the
                                      record announces

A snapshot of the rollout is saved every so many blocks, at the same ones in every run, and the
video encoder begins a new segment there. The files of a snapshot are flushed to the disk before
the record is renamed into place, and none of them ever changes: whenever a process ends, the last
snapshot is whole. Later blocks take their clean latents from the file instead of being denoised,
so little work is lost; latents that are torn or damaged are generated again. Once the record
announces the video and the folder no longer has it, the video is OUT, and the folder is no more
than what a process had no time to remove.

Nothing here is trusted: sizes follow from the config and are compared before a file is read, every
file is compared with its SHA-256, names have to match the pattern above, links are not followed.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from packforcing.config import Config
from packforcing.errors import BackendError, OutputError, ResumeError
from packforcing.files import file_record, flush_folder, require_disk_space
from packforcing.runtime.allocations import archive_bytes, memory_by_purpose, token_bytes
from packforcing.runtime.archive import IN_MEMORY, stored_blocks
from packforcing.runtime.render_lock import (
    LockedFolder,
    delete,
    locked_folder,
    render_places,
)
from packforcing.runtime.render_record import (
    OWN_FILES,
    RECORD,
    RenderRecord,
    damage_message,
    is_plain_file,
    read_record,
    write_record,
)
from packforcing.runtime.snapshot import (
    Arrays,
    Form,
    read_part,
    restore_snapshot,
    take_snapshot,
    write_part,
)
from packforcing.runtime.video_files import JOINED, output_errors, place_video, video_bytes
from packforcing.runtime.video_filters import NO_FILTERS, VideoFilters
from packforcing.runtime.video_forms import FILE_SUFFIXES, FORMS, output_target
from packforcing.units import format_file_size

if TYPE_CHECKING:
    from packforcing.runtime.rollout import Rollout

_log = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 20.0  # of video between two snapshots
_JOINED = (JOINED, *(f"{JOINED}{suffix}" for suffix in FILE_SUFFIXES))
_MAX_HEADER_BYTES = 1 << 20  # of a safetensors file
_DIGEST_BYTES = hashlib.sha256().digest_size
_SPARE_BYTES = 1 << 20  # left free on the disk


def snapshot_interval(config: Config, seconds: float) -> int:
    """Return the blocks from one snapshot to the next.

    Args:
        config: Of the bundle.
        seconds: Of video between two snapshots.
    """
    return max(1, round(seconds * config.fps / config.block_pixel_frames))


@contextmanager
def render_folder(
    path: str | os.PathLike[str],
    config: Config,
    request: Mapping[str, str],
    frames: int,
    blocks: int,
    resume: bool,
    locked: LockedFolder | None = None,
    archive_limit: int | None = None,
    filters: VideoFilters = NO_FILTERS,
) -> Iterator[RenderFolder]:
    """Open the folder beside `path` for a render, locked and with room on its disk.

    At the end it stays as it is, unless nothing is in it. `RenderFolder.remove` is for success.

    Args:
        path: The output.
        config: Of the bundle.
        request: All that decides about the frames; "interval" is in blocks.
        frames: Frames of the video.
        blocks: Blocks of the video.
        resume: Continue a render of the same request; without it, an unfinished render is in the
            way.
        locked: The folder, where the caller has locked it.
        archive_limit: Blocks that the archive holds at most; None: all.
        filters: What happens to the frames when the segments are joined.

    Raises:
        OutputError: The folder cannot be written, is locked or has an unfinished render.
        ResumeError: The unfinished render is damaged or of another request.
    """
    form, target = output_target(path)
    if target.is_dir() and not _replaceable(target):
        raise OutputError(
            f"cannot write PNG files to {target}: it is a link, a mount point or the current "
            "folder, and finished frames take a folder's place; name a new folder in it"
        )
    with nullcontext(locked) if locked else locked_folder(path) as folder:
        render = _open(folder, config, dict(request), resume)
        try:
            size = filters.size(config.width, config.height)
            joined_bytes = video_bytes(form, filters.rate(frames), *size)
            render.check(frames, blocks, archive_limit, joined_bytes)
            yield render
        finally:
            if not (render.record.block or is_plain_file(render.latents)):
                render.remove()


def unfinished_record(path: str | os.PathLike[str]) -> RenderRecord | None:
    """Return the record of the render of `path`, or None; raise `ResumeError` if it is damaged."""
    return read_record(render_places(path)[0])


def finished(path: str | os.PathLike[str]) -> bool:
    """Tell whether a render of `path` ended right after its video took its name.

    What it left in its folder is no longer a render.

    Raises:
        ResumeError: The record is damaged.
    """
    folder, target = render_places(path)
    record = read_record(folder)
    return record is not None and _placed(folder, record) and target.exists()


def remove_leftovers(path: str | os.PathLike[str], request: Mapping[str, str]) -> bool:
    """Remove the folder of a render whose video is at `path` already.

    Returns:
        Whether the video is there and is the one that `request` is for.

    Raises:
        OutputError: The folder is locked.
        ResumeError: The record is damaged.
    """
    if not finished(path):
        return False
    with locked_folder(path) as folder:
        record = read_record(folder.path)
        if not record or record.request != request:
            return False
        folder.remove()
    return True


def _placed(folder: Path, record: RenderRecord) -> bool:
    """Tell whether an announced video is no longer in the folder."""
    return record.joined and not any(os.path.lexists(folder / name) for name in _JOINED)


def discard(path: str | os.PathLike[str]) -> None:
    """Remove what an unfinished render of `path` left.

    Raises:
        OutputError: The render is going on.
    """
    with locked_folder(path) as folder:
        folder.remove()


def _replaceable(folder: Path) -> bool:
    """Tell whether an empty folder can give way to another one of its name."""
    return not (folder.is_symlink() or os.path.ismount(folder) or folder.samefile(os.curdir))


def _open(
    locked: LockedFolder, config: Config, request: dict[str, str], resume: bool
) -> RenderFolder:
    folder, target = locked.path, locked.target
    record = read_record(folder)
    if record and _placed(folder, record):  # of a video that is finished: nothing to resume
        record = None
    if record and not resume:
        raise OutputError(
            f"an unfinished render of {target} is in {folder}: resume it (--resume), or remove "
            "that folder to start again"
        )
    if record and record.request != request:
        differences = sorted(
            f"{name} was {record.request.get(name, 'not named')}, now {request.get(name, 'none')}"
            for name in record.request.keys() | request.keys()
            if record.request.get(name) != request.get(name)
        )
        raise ResumeError(
            f"the render in {folder} has another request: {'; '.join(differences)}; resume it "
            "with the same one, or remove that folder to start again"
        )
    begun = record or RenderRecord(request=request)
    # an announced video is joined again
    render = RenderFolder(locked, config, msgspec.structs.replace(begun, joined=False))
    with output_errors(target, render.remedy):
        if render.record == record:
            render.sweep()
        else:
            render.write()
            flush_folder(folder.parent)
    return render


class RenderFolder:
    """The folder of a render, locked by this process; `render_folder` opens it.

    Attributes:
        path: The folder.
        record: How far the render is.
        interval: Blocks from one snapshot to the next.
        remedy: The end of an error's message: how to resume.
    """

    def __init__(self, locked: LockedFolder, config: Config, record: RenderRecord) -> None:
        self.path, self.config, self.record = locked.path, config, record
        self._locked = locked
        self.interval = int(record.request["interval"])
        self.remedy = f"finished blocks are in {self.path}: resume it"
        self._target, self._suffix = locked.target, record.request["output"]
        self._key = hashlib.sha256(msgspec.json.encode(record.request)).digest()

    @property
    def latents(self) -> Path:
        """Where the clean latents of the blocks after the last snapshot are."""
        return self.path / f"latents-{self.record.block:06}.bin"

    def segment(self, block: int) -> Path:
        """Return where the frames from this block to the next snapshot are written."""
        return self.path / f"segment-{block:06}{self._suffix}"

    def segments(self, blocks: int) -> list[Path]:
        """Return the segments of a finished render of so many blocks, in order.

        Compares those that the record names with their SHA-256 once more.
        """
        for name in self.record.files_of("segment"):
            self._check(name)
        return [self.segment(block) for block in range(0, blocks, self.interval)]

    def add_latents(self, block: int, latents: np.ndarray) -> None:
        """Store a block's clean latents until the next snapshot."""
        data = np.ascontiguousarray(latents, "<f4").tobytes()
        with output_errors(self._target, self.remedy), self.latents.open("ab") as file:
            file.write(data + self._digest(block, data))

    def read_latents(self) -> dict[int, np.ndarray]:
        """Return the clean latents [B_f, C, h, w] of the blocks after the last snapshot.

        Stops at the first that is torn or damaged, and cuts off the rest of the file.
        """
        config, latents = self.config, {}
        shape = (config.block_frames, config.latent_channels, *config.latent_size)
        size = math.prod(shape) * np.dtype("<f4").itemsize
        if not is_plain_file(self.latents):
            return {}
        with output_errors(self._target, self.remedy), self.latents.open("rb+") as file:
            for block in range(self.record.block, self.record.block + self.interval):
                data, digest = file.read(size), file.read(_DIGEST_BYTES)
                if digest != self._digest(block, data):
                    break
                latents[block] = np.frombuffer(data, "<f4").reshape(shape)
            file.truncate(len(latents) * (size + _DIGEST_BYTES))
        return latents

    def save(self, rollout: Rollout) -> None:
        """Save a snapshot after the block committed last, whose frames are in segments.

        Raises:
            OutputError: The disk has no room.
            BackendError: The state holds NaN or infinity; the snapshot before stays.
        """
        before = self.record
        snapshot = take_snapshot(rollout, before.counters)
        block = snapshot.counters.block
        parts = {_part_file(part, block): arrays for part, arrays in snapshot.parts.items()}
        blocks = {_part_file("block", n): arrays for n, arrays in snapshot.blocks.items()}
        parts |= {name: arrays for name, arrays in blocks.items() if name not in before.files}
        self._require_finite(parts, block)
        size = sum(array.nbytes for arrays in parts.values() for array in arrays.values())
        with output_errors(self._target, self.remedy):
            self._require_space(size, "a snapshot of the render")
            for name, arrays in parts.items():
                write_part(self.path / name, arrays)
            kinds = "segment", *snapshot.valid
            valid = {name for kind in kinds for name in before.files_of(kind)} | blocks.keys()
            files = {name: before.files[name] for name in sorted(valid - parts.keys())}
            new = self.segment(before.block), *(self.path / name for name in parts)
            files |= {path.name: file_record(path) for path in new}
            counters = snapshot.counters._asdict()
            self.record = msgspec.structs.replace(before, **counters, files=files)
            self.write()
        _log.info("checkpoint before block %d: %s", block, format_file_size(size))

    def _require_finite(self, parts: Mapping[str, Arrays], block: int) -> None:
        for name, arrays in parts.items():
            for array in arrays.values():
                # as in a rollout, by a sum: it takes no memory
                if array.dtype.kind != "i" and not math.isfinite(array.sum(dtype=np.float64)):
                    raise BackendError(
                        f"block {block - 1}: its keys, values or decoder state ({name}) hold NaN "
                        "or infinity; start again with another backend or precision, or find the "
                        "graph with 'packforcing verify'; blocks before "
                        f"{self.record.block} are in {self.path}"
                    )

    def place(self, video: Path) -> None:
        """Give the whole video, made in this folder and on the disk, its name."""
        with output_errors(self._target, self.remedy):
            self.record = msgspec.structs.replace(self.record, joined=True)
            self.write()
            place_video(video, self._target)

    def write(self) -> None:
        """Make `record` the one on the disk, and remove files it has no use for."""
        flush_folder(self.path)  # the files it names come before it
        try:
            write_record(self.path, self.record)
        except OutputError as error:
            raise OutputError(f"{error}; {self.remedy}") from error
        self.sweep()

    def sweep(self) -> None:
        """Remove files that the record has no use for.

        A link where latents should be goes too: nothing is to be written through one.
        """
        names = {*self.record.files, RECORD, *(_JOINED if self.record.joined else ())}
        names |= {self.latents.name} if is_plain_file(self.latents) else set()
        for path in self.path.iterdir():
            if OWN_FILES.fullmatch(path.name) and path.name not in names:
                try:
                    delete(path)
                except PermissionError:  # on Windows, open in another program: it goes later
                    if path.is_symlink():
                        raise

    def check(self, frames: int, blocks: int, archive_limit: int | None, joined_bytes: int) -> None:
        """Check every file of the record, and the disk's room for the rest of the render.

        Args:
            frames: Frames of the video.
            blocks: Blocks of the video.
            archive_limit: Blocks that the archive holds at most; None: all.
            joined_bytes: Of the whole video at most.

        Raises:
            ResumeError: A file is missing or damaged.
            OutputError: The disk has too little room.
        """
        config, record = self.config, self.record
        if not 0 <= record.scene <= record.block <= blocks:
            raise self._damaged(RECORD)
        names = [self.segment(block).name for block in range(0, record.block, self.interval)]
        if record.block % self.interval or names != record.files_of("segment"):
            raise self._damaged(RECORD)
        for name in record.files:
            self._check(name)
        present_bytes = sum(file.bytes for file in record.files.values())
        size = video_bytes(FORMS[self._suffix], frames, config.width, config.height)
        snapshots = checkpoint_bytes(config, blocks, archive_limit, self.interval)
        needed_bytes = size + joined_bytes + snapshots - present_bytes
        self._require_space(
            needed_bytes, f"a render of {frames} frames", "free some space or choose another folder"
        )

    def restore(self, rollout: Rollout) -> None:
        """Bring a rollout that has just begun to the last snapshot.

        Raises:
            ResumeError: A file is not what its name and the config call for.
        """
        if self.record.block:
            try:
                restore_snapshot(rollout, self.record.counters, self)
            except ValueError as error:
                raise self._damaged(RECORD) from error

    def archive_parts(self) -> list[tuple[str, int]]:
        """Return the archive's files, each with the block that it ends before."""
        names = self.record.files_of("archive")
        return [(name, int(name.split("-")[1].split(".")[0])) for name in names]

    def read_part(self, part: str, forms: Mapping[str, Form]) -> Arrays:
        """Read arrays of exactly these forms; the size of the file is compared first.

        Args:
            part: The kind of a file, or the name of one where there are several.
            forms: Shapes and dtypes by name.

        Raises:
            ResumeError: The file is missing, damaged or holds other arrays.
        """
        name = (self.record.files_of(part) or [part])[0]
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms.values())
        file = self.record.files.get(name)
        if file is None or not size <= file.bytes <= size + _MAX_HEADER_BYTES:
            raise self._damaged(name)
        self._check(name)
        try:
            return read_part(self.path / name, forms)
        except ValueError as error:
            raise self._damaged(name) from error

    def read_block(self, block: int, forms: Mapping[str, Form]) -> Arrays:
        """Read a limited archive's block of the video, as `read_part` does."""
        return self.read_part(_part_file("block", block), forms)

    def remove(self) -> None:
        """Remove the folder, except files of others."""
        self._locked.remove()

    def _check(self, name: str) -> None:
        """Raise `ResumeError` unless a file is the one that the record names."""
        path, record = self.path / name, self.record.files[name]
        try:
            if not is_plain_file(path) or path.stat().st_size != record.bytes:
                raise self._damaged(name)
            if file_record(path) != record:
                raise self._damaged(name)
        except OSError as error:
            raise self._damaged(name) from error

    def _require_space(self, size: int, what: str, remedy: str | None = None) -> None:
        require_disk_space(self.path, size + _SPARE_BYTES, what, remedy or self.remedy)

    def _damaged(self, name: str) -> ResumeError:
        return ResumeError(damage_message(self.path / name))

    def _digest(self, block: int, data: bytes) -> bytes:
        """Hash a block's latents; those of another block or render have another digest."""
        return hashlib.sha256(self._key + block.to_bytes(8, "little") + data).digest()


def _part_file(part: str, block: int) -> str:
    return f"{part}-{block:06}.safetensors"


def checkpoint_bytes(config: Config, blocks: int, limit: int | None, interval: int) -> int:
    """Return the bytes that a render has on disk at most, without frames.

    The archive, with what a limited one has evicted since the snapshot before, once more if memory
    is not to hold it, and two states, of which the older one is removed when the newer one is
    there.

    Args:
        config: Of the bundle, with the policy.
        blocks: Blocks of the video.
        limit: Blocks that the archive holds at most; None: all.
        interval: Blocks from one snapshot to the next.
    """
    policy = config.policy
    full = min(blocks, policy.sink + policy.recent) * config.block_tokens
    state = full * token_bytes(config) + memory_by_purpose(config)["autoencoder_state"]
    memory, disk = (
        archive_bytes(config, policy.sink + stored_blocks(config, blocks, most))
        for most in (limit, None if limit is None else limit + interval)
    )
    return disk + (memory if memory > IN_MEMORY else 0) + 2 * state
