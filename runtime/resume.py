"""A render's state on disk: it outlives its process, and goes on as if nothing had happened.

    OUT.render/                       beside OUT while it is rendered, gone once OUT is whole
      lock                            held by the process that renders
      checkpoint.json                 what was asked for, how far it is, SHA-256 of all it needs
      segment-000000.mp4              the frames of the blocks from 0 to the next segment's
      archive-000040.safetensors      what was archived between the checkpoint before and block 40
      sink-000040.safetensors         keys and values of the sink, once
      state-000040.safetensors        those of the recent blocks, and the decoder's state
      latents-000040.bin              clean latents of the blocks after 40, as they are made
      joined.mp4                      all segments as one, until it is renamed to OUT, which
                                      checkpoint.json announces

A checkpoint is made every so many blocks, at the same ones in every run, and with it the encoder
starts anew. Its files are written and on the disk before `checkpoint.json` is renamed into place,
and none of them ever changes: whatever moment a process ends at, the last checkpoint is whole.
Blocks after it are given their clean latents again instead of being denoised, so little is lost
between two checkpoints; a record of latents that is torn or damaged is as if it had not been made.
Once the video has been announced and is no longer in the folder, it is OUT, and the folder is no
more than what a process had no time to remove.

Nothing here is trusted: sizes follow from the config and are compared before a file is read, every
file is compared with its SHA-256, names are of the pattern above, links are not followed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np

from packforcing.config import Config
from packforcing.errors import BackendError, CheckpointError, OutputError
from packforcing.files import (
    FileRecord,
    Upgrade,
    VersionError,
    decode_versioned,
    file_record,
    seal_json,
    unseal_json,
)
from packforcing.runtime.buffers import IN_MEMORY, Archive, archive_rows
from packforcing.runtime.bundle import DTYPES
from packforcing.runtime.cache import Slot
from packforcing.runtime.plan import archive_bytes, memory, token_bytes
from packforcing.runtime.rollout import Rollout
from packforcing.runtime.video_files import (
    JOINED,
    Kind,
    flush,
    flush_folder,
    output_target,
    place,
    refusals,
    require_room,
    video_bytes,
)

VERSION = 2
UPGRADES: dict[int, Upgrade] = {}  # of older checkpoints; the first version's are not read
SECONDS = 20.0  # of video between two checkpoints
RECORD, LOCK = "checkpoint.json", "lock"
_OURS = re.compile(
    r"segment-\d{6}\.(mp4|mkv)|(archive|sink|state)-\d{6}\.safetensors|latents-\d{6}\.bin"
    r"|checkpoint\.json(\.partial)?|\.segment-\d{6}\.partial-[0-9a-f]{8}\.(mp4|mkv)"
    rf"|{JOINED}(\.(mp4|mkv))?"
)
_JOINED = (JOINED, f"{JOINED}.mp4", f"{JOINED}.mkv")
_LARGEST_RECORD = 1 << 26  # bytes of checkpoint.json; that of a day of video is smaller
_HEADER = 1 << 20  # bytes at most that a safetensors file spends on its own description
_DIGEST = hashlib.sha256().digest_size

Arrays = dict[str, np.ndarray]
Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a render is; all of `files` is on the disk when this is."""

    version: int
    request: dict[str, str]  # all that decides about the frames
    block: int = 0  # blocks done, their frames in segments
    scene: int = 0  # its first block; `oldest` and `mids` count from there, as the cache does
    oldest: int = 0
    mids: tuple[int, ...] = ()
    joined: bool = False  # whether the whole video was about to be renamed
    files: dict[str, FileRecord] = {}

    def named(self, kind: str) -> list[str]:
        """The files of a kind, in order."""
        return sorted(name for name in self.files if name.startswith(f"{kind}-"))


def interval(config: Config, seconds: float) -> int:
    """Blocks from one checkpoint to the next."""
    return max(1, round(seconds * config.fps / config.block_pixel_frames))


@contextmanager
def render_folder(
    path: str | os.PathLike[str],
    config: Config,
    request: Mapping[str, str],
    frames: int,
    blocks: int,
    resume: bool,
) -> Iterator[RenderFolder]:
    """The folder beside `path` for a render of this length, locked and with room on its disk.

    request: all that decides about the frames; "interval" is in blocks. A render that was begun
    goes on if `resume` says so and `request` is the same, and is in the way otherwise. Left as it
    is at the end, but for one that has nothing in it; `RenderFolder.remove` is for success.
    Raises `OutputError` and `CheckpointError`.
    """
    _, target = output_target(path)
    if target.is_dir() and not _replaceable(target):
        raise OutputError(
            f"cannot write PNG files to {target}: it is a link, a mount point or the current "
            "folder, and finished frames take a folder's place; name a new folder in it"
        )
    with _locked(path) as (folder, target):
        render = _open(folder, target, config, dict(request), resume)
        try:
            render.check(frames, blocks)
            yield render
        finally:
            if not (render.done.block or _is_file(render.latents)):
                render.remove()


def finished(path: str | os.PathLike[str]) -> bool:
    """Whether a render of `path` ended right after its video took its name: what it left in its
    folder is no render any more. Raises `CheckpointError` for a damaged record."""
    folder, target = _places(path)
    done = _read_record(folder)
    return done is not None and _placed(folder, done) and target.exists()


def conclude(path: str | os.PathLike[str], request: Mapping[str, str]) -> bool:
    """Whether the video at `path` is the one that `request` is for, made by a render that ended
    before it could remove its folder, which is then done. Raises as `render_folder` does."""
    if not finished(path):
        return False
    with _locked(path) as (folder, _):
        done = _read_record(folder)
        if not done or done.request != request:
            return False
        _remove(folder)
    return True


def _placed(folder: Path, done: Checkpoint) -> bool:
    """Whether the video that a record announces is no longer in the folder."""
    return done.joined and not any(os.path.lexists(folder / name) for name in _JOINED)


def discard(path: str | os.PathLike[str]) -> None:
    """Removes what an unfinished render of `path` left. Raises `OutputError` if it is going on."""
    with _locked(path) as (folder, _):
        _remove(folder)


def _replaceable(folder: Path) -> bool:
    """Whether an empty folder can give way to another one of its name."""
    return not (folder.is_symlink() or os.path.ismount(folder) or folder.samefile(os.curdir))


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The folder of a render, and the file or folder to be made."""
    target = Path(os.path.abspath(output_target(path)[1]))
    return target.with_name(f"{target.name}.render"), target


@contextmanager
def _locked(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """The folder of a render, made if need be and locked, and the file or folder to be made."""
    from filelock import FileLock, Timeout

    folder, target = _places(path)
    with refusals(target, "choose another name or folder"):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"cannot write {target}: {folder} is in the way; remove it")
        folder.mkdir(exist_ok=True)
        if (folder / LOCK).is_symlink():  # what it leads to would be emptied
            raise OutputError(f"cannot write {target}: {folder / LOCK} is a link; remove it")
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"cannot write {target}: it is being rendered by another process (or one that "
                f"hangs); {folder / LOCK} is locked"
            ) from error
    try:
        yield folder, target
    finally:
        lock.release()


def _open(
    folder: Path, target: Path, config: Config, request: dict[str, str], resume: bool
) -> RenderFolder:
    done = _read_record(folder)
    if done and _placed(folder, done):  # of a video that is finished: nothing to go on with
        done = None
    if done and not resume:
        raise OutputError(
            f"an unfinished render of {target} is in {folder}: resume it (--resume), or remove "
            "that folder to begin anew"
        )
    if done and done.request != request:
        differs = sorted(
            f"{name} was {done.request.get(name, 'not named')}, now {request.get(name, 'none')}"
            for name in done.request.keys() | request.keys()
            if done.request.get(name) != request.get(name)
        )
        raise CheckpointError(
            f"the render in {folder} is another one: {'; '.join(differs)}; resume it as it was "
            "begun, or remove that folder to begin anew"
        )
    begun = done or Checkpoint(version=VERSION, request=request)
    # what was announced is joined anew
    render = RenderFolder(folder, target, config, msgspec.structs.replace(begun, joined=False))
    with refusals(target, render.then):
        if render.done == done:
            render.sweep()
        else:
            render.write()
            flush_folder(folder.parent)
    return render


class RenderFolder:
    """The folder of a render, locked by this process; `render_folder` opens it."""

    def __init__(self, path: Path, target: Path, config: Config, done: Checkpoint) -> None:
        self.path, self.config, self.done = path, config, done
        self._removed = False
        self.every = int(done.request["interval"])
        self.then = f"what was done is in {path}: resume it"
        self._target, self._suffix = target, done.request["output"]
        self._key = hashlib.sha256(msgspec.json.encode(done.request)).digest()

    @property
    def latents(self) -> Path:
        """Where clean latents are kept from the last checkpoint on."""
        return self.path / f"latents-{self.done.block:06}.bin"

    def segment(self, block: int) -> Path:
        """Where the frames from this block to the next checkpoint are written."""
        return self.path / f"segment-{block:06}{self._suffix}"

    def segments(self, blocks: int) -> list[Path]:
        """The segments of a render of so many blocks that is done, in order; those of the last
        checkpoint are compared with their SHA-256 once more."""
        for name in self.done.named("segment"):
            self._check(name)
        return [self.segment(block) for block in range(0, blocks, self.every)]

    def note(self, block: int, latents: np.ndarray) -> None:
        """Keeps a block's clean latents until the next checkpoint."""
        data = np.ascontiguousarray(latents, "<f4").tobytes()
        with refusals(self._target, self.then), self.latents.open("ab") as file:
            file.write(data + self._digest(block, data))

    def noted(self) -> dict[int, np.ndarray]:
        """Clean latents [B_f, C, h, w] of the blocks after the last checkpoint, as far as they are
        whole; the rest of the file is cut off."""
        config, found = self.config, {}
        shape = (config.block_frames, config.latent_channels, *config.latent_size)
        size = math.prod(shape) * np.dtype("<f4").itemsize
        if not _is_file(self.latents):
            return {}
        with refusals(self._target, self.then), self.latents.open("rb+") as file:
            for block in range(self.done.block, self.done.block + self.every):
                data, digest = file.read(size), file.read(_DIGEST)
                if digest != self._digest(block, data):
                    break
                found[block] = np.frombuffer(data, "<f4").reshape(shape)
            file.truncate(len(found) * (size + _DIGEST))
        return found

    def save(self, rollout: Rollout) -> None:
        """Makes the checkpoint after the block committed last, its frames being in segments.

        Raises `OutputError`, and `BackendError` for a state that holds NaN; the checkpoint before
        is good then.
        """
        before, cache, policy = self.done, rollout.cache, self.config.policy
        block = rollout.scene + cache.committed
        full = [slot for slot in cache.layout().slots if not slot.compressed]
        sink = [slot for slot in full if slot.block < policy.sink]
        decoder = {
            name: rollout.device.read(array) for name, array in rollout.decoder_state.items()
        }
        tokens = _read_tokens(rollout, full[len(sink) :])
        arrays = {
            "state": {"key_values": tokens, "recent": _recent(rollout), **decoder},
            "sink": {"key_values": _read_tokens(rollout, sink)},
        }
        known = before.block - before.scene if before.scene == rollout.scene else 0
        kept = before.named("segment")
        if known:
            kept += before.named("archive")
        if sink and len(sink) == min(known, policy.sink):  # they never change
            kept += before.named("sink")
            del arrays["sink"]
        rows = slice(archive_rows(self.config, known), archive_rows(self.config, cache.committed))
        if rows.start < rows.stop:
            arrays["archive"] = {
                "key_values": rollout.archive.key_values[rows],
                "pooled_keys": rollout.archive.pooled_keys[rows],
            }
        for kind, part in arrays.items():
            for array in part.values():
                # as in a rollout, by a sum: it takes no memory
                if array.dtype.kind != "i" and not math.isfinite(array.sum(dtype=np.float64)):
                    raise BackendError(
                        f"block {block - 1}: its keys, values or decoder state ({kind}) hold NaN "
                        "or infinity; begin anew with another backend or precision, or look for "
                        f"the graph with 'packforcing verify'; blocks before {before.block} are in "
                        f"{self.path}"
                    )
        size = sum(array.nbytes for part in arrays.values() for array in part.values())
        with refusals(self._target, self.then):
            require_room(self._target, self.path, "a checkpoint", size, self.then)
            new = [self.segment(before.block)]
            for kind, part in arrays.items():
                new.append(self.path / f"{kind}-{block:06}.safetensors")
                _write_tensors(new[-1], part)
            files = {name: before.files[name] for name in kept}
            files |= {path.name: file_record(path) for path in new}
            self.done = msgspec.structs.replace(
                before,
                block=block,
                scene=rollout.scene,
                oldest=cache.oldest,
                mids=tuple(cache.mids),
                files=files,
            )
            self.write()

    def place(self, video: Path) -> None:
        """Gives the whole video, made in this folder and on the disk, its name."""
        with refusals(self._target, self.then):
            self.done = msgspec.structs.replace(self.done, joined=True)
            self.write()
            place(video, self._target)

    def write(self) -> None:
        """Makes `done` the last checkpoint, and removes what it has no use for."""
        partial = self.path / f"{RECORD}.partial"
        partial.write_bytes(seal_json("checkpoint", msgspec.json.encode(self.done)))
        flush(partial)
        flush_folder(self.path)  # what it names comes before it
        partial.replace(self.path / RECORD)
        flush_folder(self.path)
        self.sweep()

    def sweep(self) -> None:
        """Removes what the last checkpoint has no use for, and a link where latents should be:
        nothing is to be written through one."""
        kept = {*self.done.files, RECORD, self.latents.name if _is_file(self.latents) else RECORD}
        kept |= set(_JOINED) if self.done.joined else set()
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in kept:
                _delete(path)

    def check(self, frames: int, blocks: int) -> None:
        """Compares every file of the last checkpoint with its SHA-256, and asks for room on the
        disk for the rest of a render of this length."""
        config, done = self.config, self.done
        if not 0 <= done.scene <= done.block <= blocks:
            raise self._damaged(RECORD)
        names = [self.segment(block).name for block in range(0, done.block, self.every)]
        if done.block % self.every or names != done.named("segment"):
            raise self._damaged(RECORD)
        for name in self.done.files:
            self._check(name)
        present = sum(record.bytes for record in self.done.files.values())
        # segments and what they are joined to; PNG files and lossless segments take about the same
        kind: Kind = "mp4" if self._suffix == ".mp4" else "mkv"
        size = video_bytes(kind, frames, config.width, config.height)
        needed = 2 * size + _checkpoint_bytes(config, blocks) - present
        then = "free some space or choose another folder"
        require_room(self._target, self.path, f"{frames} frames", needed, then)

    def restore(self, rollout: Rollout) -> None:
        """Brings a rollout that has just begun to the last checkpoint.

        Raises `CheckpointError` for a file that is not what its name and the config call for.
        """
        done, policy = self.done, self.config.policy
        if not done.block:
            return
        committed = done.block - done.scene
        if not policy.sink <= done.oldest <= max(policy.sink, committed):
            raise self._damaged(RECORD)
        rollout.go_on(done.scene, committed, done.oldest, done.mids)
        mids = set(done.mids) & set(rollout.cache.candidates())
        if not len(mids) == len(done.mids) <= policy.mid:
            raise self._damaged(RECORD)
        self._restore_archive(rollout.archive)
        slots = rollout.cache.layout().slots
        sink = [slot for slot in slots if slot.block < policy.sink]
        recent = [slot for slot in slots if slot not in sink and not slot.compressed]
        decoder = {name: (a.shape, a.dtype) for name, a in rollout.decoder_state.items()}
        tokens = _recent(rollout)
        form = {"key_values": _tokens_form(rollout, recent), "recent": (tokens.shape, tokens.dtype)}
        state = self._load("state", {**form, **decoder})
        tokens[...] = state["recent"]
        values = {
            slot.block: rollout.archive.get(slot.block)[:, :, 0]
            for slot in slots
            if slot.compressed
        }
        values |= _by_block(recent, state["key_values"])
        if sink:
            first = self._load("sink", {"key_values": _tokens_form(rollout, sink)})
            values |= _by_block(sink, first["key_values"])
        context = rollout.buffers.context
        for layer, kind in np.ndindex(context.shape[:2]):
            tokens = np.zeros(context.shape[2:], context.dtype)
            for slot in slots:
                part = values[slot.block][layer, kind]
                tokens[0, :, slot.first : slot.first + part.shape[-2]] = part
            rollout.device.write(context[layer, kind], tokens)
        for name, array in rollout.decoder_state.items():
            rollout.device.write(array, state[name])

    def remove(self) -> None:
        """Removes the folder, but for files that are not ours; once, for it may be another
        process's from then on."""
        if not self._removed:
            _remove(self.path)
        self._removed = True

    def _restore_archive(self, archive: Archive) -> None:
        row, arrays = 0, (archive.key_values, archive.pooled_keys)
        for name in self.done.named("archive"):
            stop = archive_rows(self.config, _block(name) - self.done.scene)
            rows = slice(row, min(stop, len(archive.key_values)))
            parts = {"key_values": arrays[0][rows], "pooled_keys": arrays[1][rows]}
            loaded = self._load(name, {key: (a.shape, a.dtype) for key, a in parts.items()})
            for key, part in parts.items():
                part[...] = loaded[key]
            row = rows.stop
        if row != archive_rows(self.config, self.done.block - self.done.scene):
            raise self._damaged(RECORD)

    def _load(self, kind: str, wanted: Mapping[str, Form]) -> Arrays:
        """Arrays of exactly these forms; the size of the file is looked at first.

        kind: of a file, or the name of one where there are several.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        name = (self.done.named(kind) or [kind])[0]
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
        record = self.done.files.get(name)
        if record is None or not size <= record.bytes <= size + _HEADER:
            raise self._damaged(name)
        self._check(name)
        try:
            loaded = load_file(self.path / name)
            for key, (_, dtype) in wanted.items():
                if dtype == DTYPES["fp8"]:
                    loaded[key] = loaded[key].view(dtype)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise self._damaged(name) from error
        if {key: (array.shape, array.dtype) for key, array in loaded.items()} != dict(wanted):
            raise self._damaged(name)
        return loaded

    def _check(self, name: str) -> None:
        """Raises `CheckpointError` unless a file is the one that the checkpoint names."""
        path, record = self.path / name, self.done.files[name]
        try:
            if not _is_file(path) or path.stat().st_size != record.bytes:
                raise self._damaged(name)
            if file_record(path) != record:
                raise self._damaged(name)
        except OSError as error:
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> CheckpointError:
        return CheckpointError(_damage(self.path / name))

    def _digest(self, block: int, data: bytes) -> bytes:
        """Of a block's latents; those of another block or render have another."""
        return hashlib.sha256(self._key + block.to_bytes(8, "little") + data).digest()


def _remove(folder: Path) -> None:
    """First the record: what is left if this is interrupted is no render."""
    with suppress(OSError):
        (folder / RECORD).unlink(missing_ok=True)
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) or path.name == LOCK:
                _delete(path)
        folder.rmdir()


def _delete(path: Path) -> None:
    """A file, a link or a folder of frames that was being joined."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _read_record(folder: Path) -> Checkpoint | None:
    """The last checkpoint, or None where no render has begun. Raises `CheckpointError`."""
    path = folder / RECORD
    try:
        if not os.path.lexists(path):
            return None
        if not _is_file(path) or path.stat().st_size > _LARGEST_RECORD:
            raise CheckpointError(_damage(path))
        body = unseal_json("checkpoint", path.read_bytes())
        remedy = f"finish it with the release that began it, or remove {folder} to begin anew"
        done = decode_versioned(body, Checkpoint, VERSION, UPGRADES, remedy)
    except VersionError as error:
        raise CheckpointError(f"{path} {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(_damage(path)) from error
    if not all(_OURS.fullmatch(name) for name in done.files):
        raise CheckpointError(_damage(path))
    return done


def _damage(path: Path) -> str:
    return (
        f"{path} is damaged or missing, and the render cannot go on without it: put the file back, "
        f"or remove {path.parent} to begin anew"
    )


def _is_file(path: Path) -> bool:
    """Whether it is a file and no link to one."""
    return path.is_file() and not path.is_symlink()


def _block(name: str) -> int:
    return int(name.split("-")[1].split(".")[0])


def _checkpoint_bytes(config: Config, blocks: int) -> int:
    """Bytes that a render has on disk at most, frames left out: the archive, once more if memory is
    not to hold it, and two states, of which the older goes when the newer is there."""
    full = min(blocks, config.policy.sink + config.policy.recent) * config.block_tokens
    state = full * token_bytes(config) + memory(config)["autoencoder_state"]
    archive = archive_bytes(config, blocks)
    return archive + (archive if archive > IN_MEMORY else 0) + 2 * state


def _read_tokens(rollout: Rollout, slots: Sequence[Slot]) -> np.ndarray:
    """Keys and values of full blocks in the context, [L, 2, H, slots x N, d]."""
    context, size = rollout.buffers.context, rollout.config.block_tokens
    found = np.empty(*_tokens_form(rollout, slots))
    for layer, kind in np.ndindex(found.shape[:2]) if slots else ():
        tokens = rollout.device.read(context[layer, kind])[0]
        for i, slot in enumerate(slots):
            found[layer, kind, :, i * size : (i + 1) * size] = tokens[:, slot.first :][:, :size]
    return found


def _recent(rollout: Rollout) -> np.ndarray:
    """Clean tokens of the recent blocks, but for rows that no block has written yet."""
    return rollout.buffers.recent[: rollout.cache.committed]


def _tokens_form(rollout: Rollout, slots: Sequence[Slot]) -> Form:
    layers, kinds, _, heads, _, width = rollout.buffers.context.shape
    tokens = len(slots) * rollout.config.block_tokens
    return (layers, kinds, heads, tokens, width), rollout.buffers.context.dtype


def _by_block(slots: Sequence[Slot], tokens: np.ndarray) -> dict[int, np.ndarray]:
    """What `_read_tokens` gave, for each block [L, 2, H, N, d]."""
    parts = np.split(tokens, len(slots), axis=3) if slots else []
    return {slot.block: part for slot, part in zip(slots, parts)}


def _write_tensors(path: Path, arrays: Arrays) -> None:
    """fp8, which safetensors has no NumPy type for, as its bytes."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {
        name: array.view(np.uint8) if array.dtype == DTYPES["fp8"] else array
        for name, array in arrays.items()
    }
    try:
        save_file(arrays, path)
    except SafetensorError as error:  # what the system says is in its text
        raise OSError(str(error)) from error
    flush(path)
