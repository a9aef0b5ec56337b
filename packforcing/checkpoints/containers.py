"""Tell by its first bytes what a file is: a container of weights, or what came in its place."""

from __future__ import annotations

import codecs
import zipfile
import zlib
from pathlib import Path
from typing import Literal

from packforcing.errors import CheckpointError

Container = Literal["torch", "safetensors", "gguf", "json"]

HEAD = 512  # bytes that tell
QUOTED = 100  # characters of a text that came instead
AGAIN = "download it again"
ARIA2 = ".aria2"  # of the file beside a download that aria2 has not ended
PARTIAL_SUFFIXES = (ARIA2, ".crdownload", ".part", ".partial", ".incomplete", ".download", ".!qB")

# Files that are packed, or hold something else: first bytes, what it is, what to do
_MAGIC: list[tuple[bytes, str, str]] = [
    (b"version https://git-lfs", "is a Git LFS pointer, not the file it stands for",
     "run 'git lfs pull' in its repository, or download the file itself"),
    (b"# xet version", "is a Git Xet pointer, not the file it stands for",
     "run 'git xet' in its repository, or download the file itself"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", "unpack it and name the file inside"),
    (b"Rar!", "is a RAR archive", "unpack it and name the file inside"),
    (b"\xfd7zXZ", "is packed with xz", "unpack it and name the file inside"),
    (b"\x28\xb5\x2f\xfd", "is packed with zstd", "unpack it and name the file inside"),
    (b"BZh", "is packed with bzip2", "unpack it and name the file inside"),
    (b"\x89HDF", "is an HDF5 file", "use the model's safetensors or torch file"),
    (b"\x93NUMPY", "is a NumPy array", "use the model's safetensors or torch file"),
    (b"ggml", "is a GGML file of before GGUF", "use a current GGUF, or safetensors"),
    (b"lmgg", "is a GGML file of before GGUF", "use a current GGUF, or safetensors"),
    (b"tjgg", "is a GGML file of before GGUF", "use a current GGUF, or safetensors"),
    (b"FUGG", "is a big-endian GGUF file", "use one for this machine, or safetensors"),
    (b"\x89PNG", "is a picture, not weights", "name the weights' file"),
    (b"\xff\xd8\xff", "is a picture, not weights", "name the weights' file"),
    (b"%PDF", "is a PDF, not weights", "name the weights' file"),
    (b"\x7fELF", "is a program, not weights", "name the weights' file"),
    (b"MZ", "is a program, not weights", "name the weights' file"),
]  # fmt: skip


def one_line(text: object) -> str:
    """Return a text from a file as one line without control characters, for a message."""
    line = " ".join(str(text).split())
    line = "".join(one if one.isprintable() else "?" for one in line)
    return line if len(line) <= 2 * QUOTED else f"{line[: 2 * QUOTED]}..."


def container(path: Path) -> Container:
    """Tell what holds the weights in a file. Nothing is executed, and little is read.

    Returns:
        The container; "json" for what may be the index of a sharded checkpoint.

    Raises:
        CheckpointError: The file is none, or cannot be read; the message says what it is.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    reserved = path.with_name(f"{path.name}{ARIA2}").exists()  # the whole size, not yet its bytes
    if reserved or path.suffix in PARTIAL_SUFFIXES:
        suffix = ARIA2 if reserved else path.suffix
        raise CheckpointError(f"{path} is a download that has not ended ({suffix}): resume it")
    if not head:
        raise CheckpointError(f"{path} is empty: {AGAIN}")
    if not any(head):
        raise CheckpointError(f"{path} begins with zeros, as a download that broke off: {AGAIN}")
    if _is_safetensors(head, size_bytes):
        return "safetensors"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK"):
        _check_zip(path)
        return "torch"
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic):
            raise CheckpointError(f"{path} {what}: {remedy}")
    if text := _text(head):
        if text[0] == "{" and _is_index(path):
            return "json"
        raise CheckpointError(f"{path} {_describe_text(text)}: {AGAIN}")
    raise CheckpointError(f"{path} {_describe_binary(head, path)}")


def check_json(path: Path) -> None:
    """Raise `CheckpointError` if a file that should be JSON is something else, by what it is."""
    try:
        with path.open("rb") as file:
            begins = file.read(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not begins:
        container(path)


def _is_safetensors(head: bytes, size_bytes: int) -> bool:
    """Tell whether a file begins as safetensors does: the length of the header, the header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length < max(size_bytes, 1 << 27)


def _is_index(path: Path) -> bool:
    """Tell whether a JSON file looks like the index of a sharded checkpoint."""
    with path.open("rb") as file:
        return b'"weight_map"' in file.read(1 << 24)


def _text(head: bytes) -> str:
    """Return the first bytes of a text file as text, "" for a binary one."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head).lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError:
        return ""
    return text if all(one.isprintable() or one in "\t\r\n" for one in text) else ""


def _describe_text(text: str) -> str:
    """Say what kind of text came instead of weights, and how it begins."""
    start = text[:64].lower()
    kind = "is text"
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        kind = "is a web page"
    elif start.startswith("<"):
        kind = "is XML, probably a server's error"
    elif start[0] in "{[":
        kind = "is JSON, probably a server's error"
    quote = " ".join(text.split())
    return f'{kind}, not weights ("{quote[:QUOTED]}{"..." if len(quote) > QUOTED else ""}")'


def _describe_binary(head: bytes, path: Path) -> str:
    """Say what a binary file is that holds no weights, and what to do."""
    if head[:2] == b"\x1f\x8b":
        try:
            inside = zlib.decompressobj(31).decompress(head, HEAD)
        except zlib.error:
            inside = b""
        if text := _text(inside):
            return f"is packed with gzip, and {_describe_text(text)} inside: {AGAIN}"
        return "is packed with gzip: unpack it and name the file inside"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it and name the file inside"
    if head[:1] == b"\x80":
        return (
            "is a bare pickle, which could run code and cannot be read in pieces: ask for "
            "safetensors, or save it with a current torch on a machine that trusts it"
        )
    if path.suffix in (".onnx", ".engine", ".plan", ".trt"):
        return "is a compiled or exported graph, not a checkpoint: name the weights it was made of"
    return (
        f"is damaged or none of safetensors, a torch checkpoint and GGUF (it begins with "
        f"{head[:8].hex(' ')}): {AGAIN}"
    )


def _check_zip(path: Path) -> None:
    """Raise `CheckpointError` unless a zip file is a torch checkpoint, stored without compression.

    Compressed tensors could not be mapped, and would claim any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{path} is cut off or damaged ({reason}): {AGAIN}") from error
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript program, which could run code: use the model's weights"
        )
    if not pickles:
        first = one_line(", ".join(names[:3])) or "nothing"
        raise CheckpointError(
            f"{path} is a zip archive with {first} in it: unpack it and name the weights inside"
        )
    if len(pickles) > 1 or len(set(names)) < len(names):
        raise CheckpointError(f"{path} is damaged: it holds entries twice: {AGAIN}")
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise CheckpointError(
            f"{path} was packed again with compression, as torch does not: use the original file"
        )
