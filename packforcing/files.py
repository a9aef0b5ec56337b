"""Write files and folders that are whole or absent, seal JSON and upgrade it, hash files.

Whatever is written gets its final name last: first it lies in a hidden folder beside its target,
then the data is flushed to the disk, then a rename, then the folder's entry flushed. A power cut
leaves the older file or the new one.

    .NAME.DIGEST.partial-TOKEN/   of one run that writes NAME; the digest is that of the whole name
      .packforcing-lock           locked by the run; where it is free, a kill left the folder
      NAME                        what is written
      .packforcing-replaced       the older folder, between two renames
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from packforcing.errors import OutputError
from packforcing.units import format_file_size

if TYPE_CHECKING:
    from filelock import FileLock

_LOCK, _RETIRED = ".packforcing-lock", ".packforcing-replaced"  # beside what is written

HASH_CHUNK = 1 << 18  # bytes read at a time

_DEVICES = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[1-9\u00b9\u00b2\u00b3])", re.IGNORECASE)

T = TypeVar("T")
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]  # of the next version, from those of one


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What identifies a file's content."""

    sha256: str
    bytes: int


def file_record(path: Path) -> FileRecord:
    """Return the SHA-256 and size of a file."""
    return FileRecord(file_sha256(path), path.stat().st_size)


def file_sha256(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hash a file.

    Args:
        path: The file.
        on_bytes: Called after each chunk with its size in bytes.

    Returns:
        The SHA-256 in hexadecimal.
    """
    digest, chunk = hashlib.sha256(), memoryview(bytearray(HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            if on_bytes:
                on_bytes(size)
    return digest.hexdigest()


def partial_path(target: Path) -> Path:
    """Return a hidden name beside `target` that no other run uses, with the same suffix."""
    return target.with_name(f".{target.stem[:40]}.partial-{secrets.token_hex(4)}{target.suffix}")


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a partial name to write to; the file gets its name when the block ends.

    The data is on the disk before the name is. An exception, an interrupt included, removes the
    partial file and leaves what stood under `path`. What a killed run left of the same file goes.

    Raises:
        OutputError: The file cannot be written.
    """
    target = Path(path)
    check_name(target)
    try:
        sweep(target)
        with _workplace(target) as folder:
            partial = folder / target.name
            yield partial
            flush(partial)
            partial.replace(target)
            flush_folder(target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically, as `new_file` does.

    Raises:
        OutputError: The file cannot be written.
    """
    with new_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def new_folder(
    path: str | os.PathLike[str], replaceable: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its place when the block ends.

    Parent folders are made. An exception, an interrupt included, removes the partial folder and
    leaves what stood under `path`. What a killed run left of the same folder goes.

    Args:
        path: The folder to write; a link is followed.
        replaceable: Tells whether an existing folder that is not empty may be replaced.
            None: an existing folder has to be empty.

    Raises:
        OutputError: The path is in use, or cannot be written.
    """
    target = _free_folder(path, replaceable or _never)
    try:
        with _workplace(target) as folder:
            partial = folder / target.name
            partial.mkdir()
            yield partial
            flush(partial)
            _replace_folder(target, partial)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}") from error


def check_name(path: Path) -> None:
    """Refuse a name under which Windows would write to something else, with nothing said.

    Raises:
        OutputError: On Windows, the name of a device, as in "nul.mp4"; with a colon, a hidden
            stream of another file; with a dot or a space at the end, which is dropped.
    """
    name = path.name
    device = _DEVICES.fullmatch(name.partition(".")[0].rstrip(" "))
    if sys.platform == "win32" and (device or ":" in name or name.rstrip(". ") not in (name, "")):
        raise OutputError(
            f"cannot write {path}: '{name}' is no file's name on Windows: choose another name"
        )


def _free_folder(path: str | os.PathLike[str], replaceable: Callable[[Path], bool]) -> Path:
    """Return the folder that a path means, once it may be written; make its parents."""
    try:
        check_name(Path(path))
        target = Path(path).resolve()  # so that '.' has a name and a link stays a link
        with suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # raises for a name that is too long, before the work and not after it
        sweep(target)
        if target.exists() and not (is_empty_folder(target) or replaceable(target)):
            raise OutputError(
                f"{target} exists and is not an empty folder; choose a new or an empty one"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # pathlib reports a loop of links so
        raise OutputError(f"cannot write {path}: {error}") from error
    return target


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `target` to write in, locked while this run goes on."""
    from filelock import FileLock, Timeout

    folder, lock = target, None
    try:
        while True:
            folder = target.with_name(f"{_workplace_prefix(target)}{secrets.token_hex(4)}")
            lock = FileLock(folder / _LOCK)
            folder.mkdir()
            # without the lock yet, the folder looks like one that a killed run left
            with suppress(Timeout, FileNotFoundError):
                with suppress(NotImplementedError):  # a disk without locks
                    lock.acquire(blocking=False)
                if (folder / _LOCK).exists():
                    break
        yield folder
    finally:
        if lock is not None:
            _remove_workplace(folder, lock)


def sweep(target: Path) -> None:
    """Remove what killed runs left of `target`, and nothing of a run that goes on.

    The lock in a run's folder tells them apart, so a process ID in use again misleads nobody. An
    older folder that a killed run had set aside comes back.
    """
    from filelock import FileLock

    folders: list[Path] = []
    with suppress(OSError):  # no such folder, or one that cannot be listed
        folders += target.parent.iterdir()
    prefix = _workplace_prefix(target)
    for folder in folders:
        if not folder.name.startswith(prefix) or folder.is_symlink():
            continue
        lock = FileLock(folder / _LOCK)
        with suppress(OSError, NotImplementedError):  # locked, another user's, or gone meanwhile
            lock.acquire(blocking=False)
            if (folder / _RETIRED).exists() and not target.exists():
                (folder / _RETIRED).rename(target)
            _remove_workplace(folder, lock)


def _workplace_prefix(target: Path) -> str:
    """Begin the name of a folder to write `target` in; no other target's begins so."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return f".{target.name[:40]}.{digest}.partial-"


def _remove_workplace(folder: Path, lock: FileLock) -> None:
    """Remove a locked folder; the lock goes last, as Windows removes no file that is open."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
    with suppress(OSError):
        lock.release()
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _replace_folder(target: Path, new: Path) -> None:
    """Rename the folder `new` to `target`; on an error the older folder stays or comes back."""
    if not target.exists():
        new.rename(target)
    else:
        retired = new.with_name(_RETIRED)
        target.rename(retired)
        try:
            new.rename(target)
        except OSError:
            retired.rename(target)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    flush_folder(target.parent)


def is_empty_folder(path: Path) -> bool:
    """Tell whether a path is a folder without entries."""
    return path.is_dir() and next(path.iterdir(), None) is None


def _never(path: Path) -> bool:
    return False


def flush(path: Path) -> None:
    """Wait until a file, or a folder with the files in it, is on the disk."""
    for file in path.iterdir() if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    if path.is_dir():
        flush_folder(path)


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system has that."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network disk without that
                raise
        finally:
            os.close(descriptor)


def require_disk_space(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Check that a disk has room before anything is written.

    Args:
        folder: An existing folder on the disk.
        needed_bytes: Bytes that will be written.
        what: The subject of the message, like "the bundle".
        remedy: The end of the message: what to do where there is no room.

    Raises:
        OutputError: The disk has less room.
    """
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"{what} needs {format_file_size(needed_bytes)} and the disk of {folder} has "
            f"{format_file_size(free_bytes)} left: {remedy}"
        )


def seal_json(name: str, body: bytes) -> bytes:
    """Wrap JSON with its checksum: `{"sha256": ..., name: body}`.

    Args:
        name: The field that holds the body.
        body: Encoded JSON.
    """
    digest = hashlib.sha256(body).hexdigest()
    return msgspec.json.encode({"sha256": digest, name: msgspec.Raw(body)}) + b"\n"


def unseal_json(name: str, sealed: bytes) -> bytes:
    """Return the body of what `seal_json` wrote, as encoded JSON.

    Raises:
        ValueError: Not sealed JSON with this field, or the checksum differs.
    """
    fields = msgspec.json.decode(sealed, type=dict[str, msgspec.Raw])
    if fields.keys() != {"sha256", name}:
        raise ValueError(f"not JSON with the fields 'sha256' and '{name}'")
    body = bytes(fields[name])
    if hashlib.sha256(body).hexdigest() != msgspec.json.decode(fields["sha256"], type=str):
        raise ValueError("its SHA-256 differs")
    return body


class VersionError(Exception):
    """JSON of a version that this release cannot read; the message follows the file's path."""


def decode_versioned(
    body: bytes,
    struct: type[T],
    version: int,
    upgrades: Mapping[int, Upgrade],
    remedy: str,
    field: str = "version",
) -> T:
    """Decode JSON of a format's current version, or of an older one that can be upgraded.

    Args:
        body: Encoded JSON, an object.
        struct: What the current version holds.
        version: The current version.
        upgrades: For each older version that is still read, a pure function that turns the
            object of that version into one of the next. The version itself is raised here; where
            a format has no such field yet, its first upgrade adds the field.
        remedy: The end of the message: what to do about a version that is not read.
        field: The object's field with its version. An object without it is of version 1.

    Raises:
        VersionError: A newer version, or an older one that is not upgraded any more.
        msgspec.DecodeError: Malformed JSON, or not what its version holds.
    """
    fields = msgspec.json.decode(body, type=dict[str, Any])
    file_version = msgspec.convert(fields.get(field, 1), int)
    what = f"has {field.replace('_', ' ')} {file_version}, this release reads {version}"
    if file_version > version:
        raise VersionError(f"{what}: update packforcing, or {remedy}")
    for older in range(file_version, version):
        if older not in upgrades:
            raise VersionError(f"{what}: {remedy}")
        try:
            fields = upgrades[older](fields)
        except (LookupError, TypeError, AttributeError) as error:  # nothing was checked yet
            raise msgspec.ValidationError(f"not what version {older} holds ({error!r})") from error
        if field in fields:
            fields = {**fields, field: older + 1}
    return msgspec.convert(fields, struct)
