"""Fetch published weights into a folder laid out as their repository. Free of torch.

They come from the Hugging Face hub, or from a folder with the same layout. Only the files that
`published.py` names are taken. Every checksum that is known is compared before a file gets its
name: the hub's SHA-256 (git's SHA-1 for small files), or that of an earlier run's record,
`fetched.json`. Until then a file is called NAME.CHECKSUM.partial, and a later run resumes it.

`huggingface_hub.hf_hub_download` removes what it has when a download breaks off (2.4: a file of
11 GB begins again), so its `http_get` is called, which can begin at any byte.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from filelock import FileLock, Timeout

from packforcing.checkpoints.published import (
    AUTOENCODER_PARTS,
    PARTS,
    PUBLISHED,
    Published,
    require_supported,
)
from packforcing.errors import CheckpointError, FetchError, OutputError
from packforcing.extras import optional_imports
from packforcing.files import file_sha256, require_disk_space, write_file
from packforcing.origins import UNKNOWN, UNREAD

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

RECORD, LOCK = "fetched.json", ".lock"
COPY_CHUNK = 1 << 22  # bytes copied at a time
SHA256_DIGITS = 64


class FetchedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of a file."""

    bytes: int
    sha256: str
    source: str  # the repository
    revision: str  # commit of the repository; "" where it is not known
    license: str = msgspec.field(name="licence")


Record = dict[str, FetchedFile]  # by path in the folder


@dataclass(frozen=True)
class OfferedFile:
    """A file that can be fetched."""

    bytes: int
    checksum: str  # SHA-256 or git's SHA-1, "" where none is known


@dataclass(frozen=True)
class Offer:
    """The files of a published model or part, and where they are."""

    name: str
    source: str
    revision: str
    license: str
    files: dict[str, OfferedFile]  # by path in the repository
    folder: Path | None  # None: on the hub

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


def look_up(name: str, out: Path, folder: Path | None = None) -> Offer:
    """Look up what can be fetched under a name.

    The hub is asked. Where it cannot be reached, `out` itself or the hub's cache on this machine
    serves.

    Args:
        name: A name in `PUBLISHED` or `PARTS`.
        out: The folder that the files go to.
        folder: Take the files from this folder instead of the hub.

    Raises:
        CheckpointError: The name is unknown, or the folder lacks files.
        FetchError: The hub cannot be reached or refuses.
        MissingDependency: huggingface_hub is not installed.
    """
    require_supported(name)
    row = {**PUBLISHED, **PARTS}.get(name)
    if row is None:
        names = ", ".join(name for name, row in (*PUBLISHED.items(), *PARTS.items()) if row.source)
        raise CheckpointError(f"nothing is published as '{name}'; known names: {names}")
    if not row.source:
        raise CheckpointError(f"no public place of {name} is known: ask its trainer for the file")
    if folder is not None:
        return _offer_from_folder(name, row, folder)
    try:
        with _explain_hub_errors(row.source):
            from huggingface_hub import HfApi

            info = HfApi().model_info(row.source, files_metadata=True, timeout=30)
    except _Unreachable:
        for local in (out, _hub_cache_folder(row)):
            if local is not None and all((local / path).is_file() for path in row.files):
                return _offer_from_folder(name, row, local)
        raise
    siblings = {file.rfilename: file for file in info.siblings or ()}
    if missing := [path for path in row.files if path not in siblings]:
        raise FetchError(
            f"{row.source} no longer has {', '.join(missing)}: look there for the replacement, "
            "download it and pass it to 'packforcing import-checkpoint'"
        )
    files = {}
    for path in row.files:
        sibling = siblings[path]
        checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files[path] = OfferedFile(sibling.size or 0, checksum or "")
    return Offer(name, row.source, info.sha or "main", _license(row, info), files, None)


def fetch(offer: Offer, out: Path, bar: Callable[..., Any]) -> Record:
    """Fetch the files of an offer into a folder. Files that are there and intact stay.

    Args:
        offer: Of `look_up`.
        out: The folder; made if missing.
        bar: Makes a tqdm for one file.

    Returns:
        The record of all files in the folder.

    Raises:
        FetchError: A transfer broke off (a later call resumes it), or a checksum is wrong (nothing
            of the file stays).
        OutputError: The disk has no room or refuses, or another process fetches into `out`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / LOCK, blocking=False):
            record = read_record(out)
            missing = {
                path: file for path, file in offer.files.items() if not _is_intact(out / path, file)
            }
            _check_disk_space(out, missing)
            for path, file in missing.items():
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                _fetch_file(offer, path, file, out / path, bar)
            for path, file in offer.files.items():
                is_sha256 = len(file.checksum) == SHA256_DIGITS
                sha256 = file.checksum if is_sha256 else file_sha256(out / path)
                record[path] = FetchedFile(
                    bytes=file.bytes, sha256=sha256, source=offer.source, revision=offer.revision,
                    license=offer.license,
                )  # fmt: skip
            encoded = msgspec.json.format(msgspec.json.encode(record), indent=1)
            write_file(out / RECORD, encoded + b"\n")
    except Timeout as error:
        raise OutputError(f"another process is fetching into {out}: wait until it ends") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room and run the same command again to resume" if full else ""
        raise OutputError(f"cannot write to {out}: {error.strerror or error}{advice}") from error
    return record


def next_commands(offer: Offer, out: Path) -> list[str]:
    """Return the commands that use what was fetched.

    A copy of a folder that nothing is known of is no evidence of which model it is: there, the
    command says so itself.
    """
    files, options = [str(out / path) for path in offer.files], []
    if offer.name == "umt5-xxl":
        encode = ["packforcing", "encode-prompt", "a cat walks on the beach", "--encoder", str(out)]
        return [shlex.join([*encode, "--out", "cat.safetensors"])]
    if offer.name in PARTS:
        commands, files, name = [], ["MODEL.pt", *files], "my-model"
        options = ["--model", "NAME"]
        vae = next((vae for vae, part in AUTOENCODER_PARTS.items() if part == offer.name), "wan")
        if vae != "wan" and not offer.revision:
            options += ["--vae", vae]
    else:
        tiny = out.parent / "taew2_1"
        [decoder] = PARTS["taew2_1"].files
        commands = ["packforcing fetch taew2_1"] if not (tiny / decoder).is_file() else []
        files, name = [*files, str(tiny / decoder)], offer.name
        options = [] if offer.revision else ["--model", name]
    command = ["packforcing", "import-checkpoint", *files, *options, "--out", name]
    return [*commands, shlex.join(command)]


# The record


def read_record(folder: Path) -> Record:
    """Read the record in a folder; it is empty if there is none.

    Raises:
        CheckpointError: The record is damaged.
    """
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
    except OSError:
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder / RECORD} is damaged: remove it and fetch again, which downloads only what "
            "is damaged too"
        ) from error


def recorded_file(path: Path) -> tuple[str, FetchedFile] | None:
    """Find the record of a file, in its folder or one above, and compare the file with it.

    Returns:
        The file's path in its repository and its record, or None if there is none.

    Raises:
        CheckpointError: The file is not what was fetched.
    """
    names = (Path(os.path.abspath(path)), path.resolve())  # the path itself, and a link's target
    for file, folder in ((name, folder) for name in names for folder in name.parents):
        repository_path = file.relative_to(folder).as_posix()
        try:
            fetched = read_record(folder).get(repository_path)
        except CheckpointError as error:
            if isinstance(error.__cause__, msgspec.ValidationError):
                continue  # another program's file of that name
            raise
        if not fetched:
            continue
        if file.stat().st_size != fetched.bytes or file_sha256(file) != fetched.sha256:
            raise CheckpointError(
                f"{file} is damaged or was replaced (its SHA-256 is not the one in "
                f"{folder / RECORD}): fetch it again"
            )
        return repository_path, fetched
    return None


# Where files come from


class _Unreachable(FetchError):
    """The hub cannot be reached."""


@contextmanager
def _explain_hub_errors(repository: str) -> Iterator[None]:
    """Turn the hub's errors into one line each, and keep its library quiet inside the block."""
    with optional_imports("fetching", "fetch"):
        from huggingface_hub import errors
        from huggingface_hub.utils import logging
    log_in = "log in with 'hf auth login', or put a token into HF_TOKEN"
    elsewhere = "fetch on another machine, copy the folder here and name it with --from"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError as error:
        raise FetchError(
            f"{repository} is gated: accept its conditions at https://huggingface.co/{repository}, "
            f"{log_in}, and run this again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(f"{repository} is not on the hub, or is private: {log_in}") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        remedy = log_in if code in (401, 403) else "run the same command again later"
        raise FetchError(f"the hub refuses {repository} (HTTP {code}): {remedy}") from error
    except errors.OfflineModeIsEnabled as error:
        raise _Unreachable(
            f"HF_HUB_OFFLINE forbids access to the hub: unset it, or {elsewhere}"
        ) from error
    except errors.HTTPError as error:
        raise _Unreachable(
            f"the hub cannot be reached ({error}): run the same command again to resume, or "
            f"{elsewhere}"
        ) from error
    except OSError as error:
        if error.errno is not None:  # the disk's
            raise
        raise FetchError(
            f"{repository} sent less or more than it announced: run the same command again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _license(row: Published, info: ModelInfo) -> str:
    """Say what the model card states now and, where it differs, what was read of it before."""
    card: Any = info.card_data or {}
    stated = card.get("license_name") or card.get("license")
    if not stated:
        return row.license
    stated = " ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    differs = row.license not in (UNREAD, "") and row.license.lower() != stated.lower()
    return f"{stated}, says its model card" + (f"; known here: {row.license}" if differs else "")


def _hub_cache_folder(row: Published) -> Path | None:
    """Find the folder of a repository in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(row.source, row.files[0])
    depth = len(Path(row.files[0]).parts)
    return Path(cached).parents[depth - 1] if isinstance(cached, str) else None


def _offer_from_folder(name: str, row: Published, folder: Path) -> Offer:
    """Offer a folder's files, with the checksums of its record or of the hub's cache."""
    if missing := [path for path in row.files if not (folder / path).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: it must be laid out as {row.source} is"
        )
    record = read_record(folder)
    files, licenses, revisions = {}, [], []
    for path in row.files:
        fetched, file = record.get(path), (folder / path).resolve()
        blob = file.name if file.parent.name == "blobs" else ""
        files[path] = OfferedFile(file.stat().st_size, fetched.sha256 if fetched else blob)
        licenses.append(fetched.license if fetched else row.license if blob else UNKNOWN)
        revisions.append(fetched.revision if fetched else folder.name if blob else "")
    return Offer(name, row.source, revisions[0], licenses[0], files, folder)


# One file


def _fetch_file(
    offer: Offer, path: str, file: OfferedFile, target: Path, bar: Callable[..., Any]
) -> None:
    partial = _partial_path(target, file)
    if not file.checksum or (partial.is_file() and partial.stat().st_size > file.bytes):
        partial.unlink(missing_ok=True)
    try:
        with partial.open("ab") as out:
            _transfer(offer, path, out, file.bytes, bar)
    except BaseException:
        if partial.is_file() and not partial.stat().st_size:
            partial.unlink()
        raise
    whole = partial.stat().st_size == file.bytes
    if not whole or not _matches(partial, file.checksum):
        partial.unlink()
        raise FetchError(
            f"{path} of {offer.source} came with a wrong {'checksum' if whole else 'size'} and was "
            "removed: run the same command again"
        )
    partial.replace(target)


def _transfer(offer: Offer, path: str, out: Any, size_bytes: int, bar: Callable[..., Any]) -> None:
    """Append the rest of a file to `out`."""
    done = out.tell()
    if offer.folder is not None:
        with (
            (offer.folder / path).open("rb") as file,
            bar(total=size_bytes, initial=done, desc=path, unit="B", unit_scale=True) as progress,
        ):
            file.seek(done)
            while chunk := file.read(COPY_CHUNK):
                out.write(chunk)
                progress.update(len(chunk))
        return
    with _explain_hub_errors(offer.source):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        uncompressed = {"Accept-Encoding": "identity"}  # a compressed file cannot be resumed
        http_get(
            hf_hub_url(offer.source, path, revision=offer.revision),
            out,
            resume_size=done,
            headers=build_hf_headers(library_name="packforcing", headers=uncompressed),
            expected_size=size_bytes,
            displayed_filename=path,
            tqdm_class=bar,  # type: ignore[arg-type]  # any callable will do
        )


def _partial_path(target: Path, file: OfferedFile) -> Path:
    """Name an incomplete file by its checksum, so that another revision's is not resumed."""
    return target.with_name(f"{target.name}.{file.checksum[:12] or file.bytes}.partial")


def _is_intact(path: Path, file: OfferedFile) -> bool:
    """Tell whether a file is the offered one; without a known checksum it is fetched again."""
    size_bytes = path.stat().st_size if path.is_file() else None
    return size_bytes == file.bytes and file.checksum != "" and _matches(path, file.checksum)


def _matches(path: Path, checksum: str) -> bool:
    if len(checksum) == SHA256_DIGITS:
        return file_sha256(path) == checksum
    if not checksum:
        return True
    content = path.read_bytes()  # the hub has a SHA-1 for files of a few MB alone
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == checksum


def _check_disk_space(out: Path, files: dict[str, OfferedFile]) -> None:
    """Raise `OutputError` unless the disk has room for the rest of the files."""
    needed_bytes = 0
    for path, file in files.items():
        partial = _partial_path(out / path, file)
        needed_bytes += file.bytes - (partial.stat().st_size if partial.is_file() else 0)
    remedy = "make room, or choose another folder with --out"
    require_disk_space(out, needed_bytes, "the download", remedy)
