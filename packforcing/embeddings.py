"""Prompt embeddings as files (safetensors), and as the input of a model. Free of torch.

A file holds one tensor `text` [T, text_dim], a row per token of the prompt, in float32, float16
or bfloat16. Its metadata are `prompt`, `encoder` and `encoder_sha256`. Files of other programs may
lack the metadata.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from packforcing.config import Config
from packforcing.errors import OutputError, PromptError
from packforcing.files import write_file

SUFFIX = ".safetensors"
MAX_FILE_BYTES = 1 << 30
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16: read as bits


@dataclass(frozen=True)
class Embedding:
    """A prompt as a text encoder encoded it."""

    text: np.ndarray  # float32 [T, text_dim], without the zero rows that pad a model's input
    prompt: str  # "" where the file does not say it, as for the next two
    encoder: str  # its kind, such as "umt5"
    encoder_sha256: str  # of its weights, settings and tokenizer


def check_embedding(rows: np.ndarray, config: Config) -> None:
    """Check that a model can read an embedding of this shape and dtype.

    Args:
        rows: Expected to be of any float dtype, [T, text_dim] with T from 1 to text_len.
        config: The model.

    Raises:
        PromptError: The shape or dtype is another.
    """
    if (
        rows.ndim != 2
        or rows.shape[1] != config.text_dim
        or not 0 < len(rows) <= config.text_len
        or rows.dtype.kind != "f"
    ):
        raise PromptError(
            f"the {config.name} model reads embeddings float [T, {config.text_dim}] with T from 1 "
            f"to {config.text_len}; this one is {rows.dtype} {list(rows.shape)}"
        )


def pad_embedding(rows: np.ndarray, config: Config) -> np.ndarray:
    """Pad an embedding with zero rows to the length that a model reads.

    As in Wan, no row is masked.

    Args:
        rows: Any float dtype, [T, text_dim] with T from 1 to text_len.
        config: The model.

    Returns:
        float32 [1, text_len, text_dim].

    Raises:
        PromptError: The shape or dtype is another, or a value is not finite in float32.
    """
    check_embedding(rows, config)
    padded = np.zeros((1, config.text_len, config.text_dim), np.float32)
    with np.errstate(over="ignore"):
        padded[0, : len(rows)] = rows
    if not np.isfinite(padded).all():
        raise PromptError("the embedding has values that are not finite: encode the prompt again")
    return padded


def load_embedding(path: str | os.PathLike[str]) -> Embedding:
    """Load an embedding from a file.

    Args:
        path: A safetensors file in the format that the module describes.

    Raises:
        PromptError: The file is missing, damaged or of another format.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        if (size_bytes := Path(path).stat().st_size) > MAX_FILE_BYTES:
            raise PromptError(f"{path} is not a prompt embedding: it has {size_bytes} bytes")
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if "text" not in file.keys():  # noqa: SIM118
                raise PromptError(
                    f"{path} is not a prompt embedding: it holds no tensor 'text'; make one with "
                    "'packforcing encode-prompt'"
                )
            dtype = file.get_slice("text").get_dtype()
        if dtype not in NUMPY_DTYPES:
            raise PromptError(f"the embedding in {path} is {dtype}, not {', '.join(NUMPY_DTYPES)}")
        tensor = dict(deserialize(Path(path).read_bytes()))["text"]
    except (OSError, SafetensorError) as error:
        raise PromptError(f"cannot read an embedding from {path}: {error}") from error
    text = np.frombuffer(tensor["data"], NUMPY_DTYPES[dtype]).reshape(tensor["shape"])
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        text = (text.astype("<u4") << 16).view("<f4")
    return Embedding(
        text.astype(np.float32),
        *(metadata.get(key, "") for key in ("prompt", "encoder", "encoder_sha256")),
    )


def save_embedding(path: str | os.PathLike[str], embedding: Embedding) -> None:
    """Write an embedding to a file, in float32. The file is whole or absent.

    Args:
        path: The file, with the suffix .safetensors.
        embedding: The embedding.

    Raises:
        OutputError: The file cannot be written.
    """
    from safetensors.numpy import save

    check_embedding_path(path)
    metadata = {
        "prompt": embedding.prompt,
        "encoder": embedding.encoder,
        "encoder_sha256": embedding.encoder_sha256,
    }
    write_file(path, save({"text": np.ascontiguousarray(embedding.text, np.float32)}, metadata))


def check_embedding_path(path: str | os.PathLike[str]) -> None:
    """Check that an embedding can be written under a name, before it is computed.

    Raises:
        OutputError: It cannot.
    """
    target = Path(path)
    if target.suffix != SUFFIX:
        raise OutputError(f"an embedding must be written to NAME{SUFFIX}, not to '{path}'")
    if target.is_dir():
        raise OutputError(f"cannot write {path}: a folder has that name")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission to write to {target.parent}")


def cached_embedding_path(
    folder: Path, prompt: str, encoder: str, encoder_sha256: str, text_len: int
) -> Path:
    """Return the file that holds a prompt's embedding in a cache folder."""
    key = "\n".join((encoder, encoder_sha256, str(text_len), prompt))
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}{SUFFIX}"


def embedding_cache_folder() -> Path:
    """Return the user's cache of embeddings."""
    from platformdirs import user_cache_path

    return user_cache_path("packforcing", appauthor=False) / "embeddings"
