"""Published weights into a folder, laid out as in their repository: from the Hugging Face hub, or
from a folder with that layout. Free of torch.

Only the files that `published.py` names are taken, and every checksum that is known is
compared before a file gets its name: the hub's SHA-256 (git's SHA-1 of small files), or that of an
earlier run's record, `fetched.json`. Until then a file is called NAME.CHECKSUM.partial, and a
later run goes on with it. huggingface_hub's own downloads begin anew in every run, so its
`http_get` is called, which can begin anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from filelock import FileLock, Timeout

from packforcing.checkpoints.published import PARTS, PUBLISHED, UNREAD, Published
from packforcing.errors import CheckpointError, FetchError, OutputError
from packforcing.files import file_sha256

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

RECORD, LOCK = "fetched.json", ".lock"
PIECE = 1 << 22  # bytes copied at a time
SHA256 = 64  # digits


class Fetched(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the record says of a file."""

    bytes: int
    sha256: str
    source: str  # the repository
    revision: str  # commit of the repository; "" where it is not known
    licence: str


Record = dict[str, Fetched]  # by path in the folder


@dataclass(frozen=True)
class Offered:
    """A file that can be had."""

    bytes: int
    checksum: str  # SHA-256 or git's SHA-1, "" where none is known


@dataclass(frozen=True)
class Offer:
    """Everything that belongs to a name, and where it is."""

    name: str
    source: str
    revision: str
    licence: str
    files: dict[str, Offered]  # by path in the repository
    folder: Path | None  # None: on the hub

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def look_up(name: str, out: Path, folder: Path | None = None) -> Offer:
    """What there is of a name: on the hub or, where that cannot be reached, in `out` itself or in
    the hub's cache on this machine. From `folder` instead where one is given.

    Raises `CheckpointError` for an unknown name or a folder without its files, and `FetchError`
    if nothing can be had, with what to do.
    """
    row = {**PUBLISHED, **PARTS}.get(name)
    if row is None:
        known = ", ".join(name for name, row in (*PUBLISHED.items(), *PARTS.items()) if row.source)
        raise CheckpointError(f"nothing is published as '{name}'; known: {known}")
    if not row.source:
        raise CheckpointError(f"no public place of {name} is known: ask its trainer for the file")
    if folder is not None:
        return _in_folder(name, row, folder)
    try:
        with _hub(row.source):
            from huggingface_hub import HfApi

            info = HfApi().model_info(row.source, files_metadata=True, timeout=30)
    except _Unreachable:
        for here in (out, _cached(row)):
            if here is not None and all((here / path).is_file() for path in row.files):
                return _in_folder(name, row, here)
        raise
    there = {file.rfilename: file for file in info.siblings or ()}
    if missing := [path for path in row.files if path not in there]:
        raise FetchError(
            f"{row.source} no longer has {', '.join(missing)}: see there what took its place, "
            "download it and name it to 'packforcing import-checkpoint'"
        )
    files = {}
    for path in row.files:
        file = there[path]
        checksum = file.lfs.sha256 if file.lfs else file.blob_id
        files[path] = Offered(file.size or 0, checksum or "")
    return Offer(name, row.source, info.sha or "main", _licence(row, info), files, None)


def fetch(offer: Offer, out: Path, bar: Callable[..., Any]) -> Record:
    """Puts the files of an offer into the folder `out` and returns the record kept there.

    What lies there intact is kept. bar: makes a tqdm for one file.

    Raises `FetchError` for a transfer that broke off (a later call goes on) or a wrong checksum
    (nothing of it is kept), and `OutputError` if the disk lacks space or refuses, or
    another process fetches into the same folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / LOCK, blocking=False):
            record = read_record(out)
            wanted = {
                path: file for path, file in offer.files.items() if not _intact(out / path, file)
            }
            _check_space(out, wanted)
            for path, file in wanted.items():
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                _get(offer, path, file, out / path, bar)
            for path, file in offer.files.items():
                digest = file_sha256(out / path) if len(file.checksum) != SHA256 else file.checksum
                record[path] = Fetched(
                    bytes=file.bytes, sha256=digest, source=offer.source, revision=offer.revision,
                    licence=offer.licence,
                )  # fmt: skip
            partial = out / f"{RECORD}.partial"
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
            partial.replace(out / RECORD)
    except Timeout as error:
        raise OutputError(f"another process is fetching into {out}: wait until it ends") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room and run the same command again: it goes on there" if full else ""
        raise OutputError(f"cannot write to {out}: {error.strerror or error}{advice}") from error
    return record


def next_steps(offer: Offer, out: Path) -> list[str]:
    """The commands that use what was fetched."""
    files = [str(out / path) for path in offer.files]
    if offer.name == "umt5-xxl":
        encode = ["packforcing", "encode-prompt", "a cat walks on the beach", "--encoder", str(out)]
        return [shlex.join([*encode, "--out", "cat.safetensors"])]
    if offer.name in PARTS:
        steps, files, name = [], ["MODEL.pt", *files], "my-model"
    else:
        tiny = out.parent / "taew2_1"
        [decoder] = PARTS["taew2_1"].files
        steps = ["packforcing fetch taew2_1"] if not (tiny / decoder).is_file() else []
        files, name = [*files, str(tiny / decoder)], offer.name
    return [*steps, shlex.join(["packforcing", "import-checkpoint", *files, "--out", name])]


# The record


def read_record(folder: Path) -> Record:
    """The record in a folder, empty if there is none; raises `CheckpointError` if damaged."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
    except OSError:
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder / RECORD} is damaged: remove it and fetch again, which downloads only what "
            "is damaged too"
        ) from error


def recorded(path: Path) -> Fetched | None:
    """What a record beside a file or above it says of the file, None where none does.

    Raises `CheckpointError` if the file is not what was fetched.
    """
    places = (Path(os.path.abspath(path)), path.resolve())  # as it is named, and what it links to
    for path, folder in ((place, folder) for place in places for folder in place.parents):
        try:
            said = read_record(folder).get(path.relative_to(folder).as_posix())
        except CheckpointError as error:
            if isinstance(error.__cause__, msgspec.ValidationError):
                continue  # another program's file of that name
            raise
        if not said:
            continue
        if path.stat().st_size != said.bytes or file_sha256(path) != said.sha256:
            raise CheckpointError(
                f"{path} is damaged or was replaced (its SHA-256 is not the one in "
                f"{folder / RECORD}): fetch it again"
            )
        return said
    return None


# Where files come from


class _Unreachable(FetchError):
    """The hub cannot be reached."""


@contextmanager
def _hub(repository: str) -> Iterator[None]:
    """What goes wrong with the hub, explained."""
    try:
        from huggingface_hub import errors
        from huggingface_hub.utils import logging
    except ModuleNotFoundError as error:
        raise FetchError(
            f"fetching needs {error.name}, which is not installed: "
            "pip install '.[fetch]' in the checkout"
        ) from error
    logging.set_verbosity_error()
    log_in = "log in with 'hf auth login', or put a token into HF_TOKEN"
    elsewhere = "fetch on another machine, copy the folder here and name it with --from"
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
        todo = log_in if code in (401, 403) else "run the same command again later"
        raise FetchError(f"the hub refuses {repository} (HTTP {code}): {todo}") from error
    except errors.OfflineModeIsEnabled as error:
        raise _Unreachable(
            f"HF_HUB_OFFLINE forbids to ask the hub: unset it, or {elsewhere}"
        ) from (error)
    except errors.HTTPError as error:
        raise _Unreachable(
            f"the hub cannot be reached ({error}): run the same command again to go on, or "
            f"{elsewhere}"
        ) from error
    except OSError as error:
        if error.errno is not None:  # the disk's
            raise
        raise FetchError(
            f"{repository} sent less or more than it announced: run the same command again"
        ) from error


def _licence(row: Published, info: ModelInfo) -> str:
    """What the model card says now, and what was read of it before."""
    card: Any = info.card_data or {}
    said = card.get("license_name") or card.get("license")
    if not said:
        return row.licence
    said = " ".join(map(str, said)) if isinstance(said, list) else str(said)
    known = (
        "" if row.licence in (UNREAD, "") or row.licence.lower() == said.lower() else row.licence
    )
    return f"{said}, says its model card" + (f"; known here: {known}" if known else "")


def _cached(row: Published) -> Path | None:
    """The folder of a repository in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(row.source, row.files[0])
    depth = len(Path(row.files[0]).parts)
    return Path(found).parents[depth - 1] if isinstance(found, str) else None


def _in_folder(name: str, row: Published, folder: Path) -> Offer:
    """What a folder has; the checksums are those of its record, or the hub's cache's."""
    if missing := [path for path in row.files if not (folder / path).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: it must be laid out as {row.source} is"
        )
    record = read_record(folder)
    files, licences, revisions = {}, [], []
    for path in row.files:
        said, file = record.get(path), (folder / path).resolve()
        blob = file.name if file.parent.name == "blobs" else ""
        files[path] = Offered(file.stat().st_size, said.sha256 if said else blob)
        licences.append(said.licence if said else row.licence)
        revisions.append(said.revision if said else folder.name if blob else "")
    return Offer(name, row.source, revisions[0], licences[0], files, folder)


# One file


def _get(offer: Offer, path: str, file: Offered, target: Path, bar: Callable[..., Any]) -> None:
    partial = _partial(target, file)
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
            f"{path} of {offer.source} came with a wrong {'checksum' if whole else 'size'} and is "
            "not kept: run the same command again"
        )
    partial.replace(target)


def _transfer(offer: Offer, path: str, out: Any, size: int, bar: Callable[..., Any]) -> None:
    """Appends what is still lacking of a file."""
    done = out.tell()
    if offer.folder is not None:
        with (
            (offer.folder / path).open("rb") as file,
            bar(total=size, initial=done, desc=path, unit="B", unit_scale=True) as progress,
        ):
            file.seek(done)
            while piece := file.read(PIECE):
                out.write(piece)
                progress.update(len(piece))
        return
    with _hub(offer.source):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        plain = {"Accept-Encoding": "identity"}  # a packed file cannot be gone on with
        http_get(
            hf_hub_url(offer.source, path, revision=offer.revision),
            out,
            resume_size=done,
            headers=build_hf_headers(library_name="packforcing", headers=plain),
            expected_size=size,
            displayed_filename=path,
            tqdm_class=bar,  # type: ignore[arg-type]  # any callable will do
        )


def _partial(target: Path, file: Offered) -> Path:
    """The name of a file that is not whole yet: what another revision left is not gone on with."""
    return target.with_name(f"{target.name}.{file.checksum[:12] or file.bytes}.partial")


def _intact(path: Path, file: Offered) -> bool:
    """Whether a file is what is offered; without a known checksum it is taken again."""
    size = path.stat().st_size if path.is_file() else None
    return size == file.bytes and file.checksum != "" and _matches(path, file.checksum)


def _matches(path: Path, checksum: str) -> bool:
    if len(checksum) == SHA256:
        return file_sha256(path) == checksum
    if not checksum:
        return True
    content = path.read_bytes()  # the hub keeps no more than a few MB so
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == checksum


def _check_space(out: Path, files: dict[str, Offered]) -> None:
    """Raises `OutputError` unless the disk has room for what is still to come."""
    needed = 0
    for path, file in files.items():
        partial = _partial(out / path, file)
        needed += file.bytes - (partial.stat().st_size if partial.is_file() else 0)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(
            f"{needed / 1e9:.1f} GB are to be written to {os.fspath(out)}, where {free / 1e9:.1f} "
            "GB are free: make room, or choose another folder with --out"
        )
