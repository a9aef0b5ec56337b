"""Prompt embeddings as files (safetensors), and as what a model reads. Free of torch.

A file holds one tensor `text` [T, text_dim], a row per token of the prompt, in float32, float16
or bfloat16. Its metadata are `prompt`, `encoder` and `encoder_sha256`; other programs' files may
lack them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from packforcing.config import Config
from packforcing.errors import OutputError, PromptError

SUFFIX = ".safetensors"
LARGEST = 1 << 30  # bytes of a file
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits are read


@dataclass(frozen=True)
class Embedding:
    """A prompt as an encoder read it."""

    text: np.ndarray  # float32 [T, text_dim], without the zero rows that fill up a model's input
    prompt: str  # "" where the file does not say; so below
    encoder: str  # its kind, like "umt5"
    encoder_sha256: str  # of its weights, settings and tokenizer


def pad_embedding(text: np.ndarray, config: Config) -> np.ndarray:
    """Rows [T, text_dim] of any float format as the model reads them: float32
    [1, text_len, text_dim]. As in Wan, the rows added are zero and none is masked.

    Raises `PromptError` for another shape or format, or a value that is not finite.
    """
    if (
        text.ndim != 2
        or text.shape[1] != config.text_dim
        or not 0 < len(text) <= config.text_len
        or text.dtype.kind != "f"
    ):
        raise PromptError(
            f"the {config.name} model reads embeddings float [T, {config.text_dim}] with T from 1 "
            f"to {config.text_len}; this one is {text.dtype} {list(text.shape)}"
        )
    rows = np.zeros((1, config.text_len, config.text_dim), np.float32)
    with np.errstate(over="ignore"):
        rows[0, : len(text)] = text
    if not np.isfinite(rows).all():
        raise PromptError("the embedding holds values that are not finite: encode the prompt again")
    return rows


def load_embedding(path: str | os.PathLike[str]) -> Embedding:
    """Reads a file as the module describes it.

    Raises `PromptError` if it is missing or damaged, or holds no such tensor.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        if (size := Path(path).stat().st_size) > LARGEST:
            raise PromptError(f"{path} is no prompt embedding: it has {size} bytes")
        with safe_open(path, "np") as file:
            names, said = file.keys(), file.metadata() or {}
            if "text" not in names:
                raise PromptError(
                    f"{path} is no prompt embedding: it holds no tensor 'text'; make one with "
                    "'packforcing encode-prompt'"
                )
            stored = file.get_slice("text").get_dtype()
        if stored not in STORED:
            raise PromptError(f"the embedding in {path} is {stored}, not {', '.join(STORED)}")
        tensor = dict(deserialize(Path(path).read_bytes()))["text"]
    except (OSError, SafetensorError) as error:
        raise PromptError(f"cannot read an embedding from {path}: {error}") from error
    text = np.frombuffer(tensor["data"], STORED[stored]).reshape(tensor["shape"])
    if stored == "BF16":  # the upper half of a float32
        text = (text.astype("<u4") << 16).view("<f4")
    return Embedding(
        text.astype(np.float32),
        *(said.get(key, "") for key in ("prompt", "encoder", "encoder_sha256")),
    )


def save_embedding(path: str | os.PathLike[str], embedding: Embedding) -> None:
    """Writes a file as the module describes it, in float32.

    Raises what `check_target` raises, and `OutputError` if it cannot be written; nothing stands
    under `path` then.
    """
    from safetensors.numpy import save

    check_target(path)
    said = {
        "prompt": embedding.prompt,
        "encoder": embedding.encoder,
        "encoder_sha256": embedding.encoder_sha256,
    }
    text = np.ascontiguousarray(embedding.text, np.float32)
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(save({"text": text}, said))
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:  # Ctrl-C as well
        partial.unlink(missing_ok=True)


def cache_file(folder: Path, prompt: str, encoder: str, encoder_sha256: str, text_len: int) -> Path:
    """Where a cache keeps the embedding of a prompt."""
    key = "\n".join((encoder, encoder_sha256, str(text_len), prompt))
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}{SUFFIX}"


def user_cache() -> Path:
    """The user's folder of embeddings, by the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "packforcing" / "embeddings"


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` for a name that no embedding can be written under."""
    target = Path(path)
    if target.suffix != SUFFIX:
        raise OutputError(f"an embedding is written to NAME{SUFFIX}, not to '{path}'")
    if target.is_dir():
        raise OutputError(f"cannot write {path}: a folder has that name")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: the folder {target.parent} is not yours to write")
