"""Prompt to embedding with UMT5's encoder, as in Wan: transformers, on the CPU, from a folder."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from packforcing.embeddings import Embedding
from packforcing.errors import CheckpointError, ConfigError, PromptError

LONGEST = 512  # tokens, Wan's
DECODERS = ("decoder.", "lm_head.")  # tensors of the whole model that encoding does without


def encode_umt5(
    prompt: str, folder: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
) -> Embedding:
    """The encoder's last hidden states of a prompt, one row per token with the final </s>.

    folder: UMT5 as transformers saves it with its tokenizer, or the folder of a diffusers Wan,
    which has both in `text_encoder` and `tokenizer`. Weights are safetensors. dtype: of weights
    and arithmetic.

    Raises `PromptError` for an empty prompt or one of more than 512 tokens, `CheckpointError` for
    a folder of another layout or damaged files, `ConfigError` if memory does not hold the weights.
    """
    cleaned = clean(prompt)
    if not cleaned:
        raise PromptError("the prompt is empty: say what to show")
    encoder, tokens = _parts(Path(folder))
    weights = _weights(encoder)
    tokenizer = _tokenizer(tokens)
    ids = tokenizer(cleaned, return_tensors="pt").input_ids
    if ids.shape[1] > LONGEST:
        raise PromptError(f"the prompt has {ids.shape[1]} tokens, at most {LONGEST} are read")
    _check_memory(weights, dtype.itemsize)
    # Padding is masked inside UMT5 and its rows are zeroed after it: encoding the tokens alone is
    # the same and takes a fraction of the time.
    with torch.inference_mode():
        text = _model(encoder, dtype)(input_ids=ids).last_hidden_state[0].float().numpy()
    if not np.isfinite(text).all():
        raise CheckpointError(f"the encoder in {encoder} gives values that are not finite")
    return Embedding(text, cleaned, "umt5", _sha256([*weights, *_settings(encoder, tokens)]))


def clean(prompt: str) -> str:
    """Wan's cleaning: broken Unicode and curly quotes mended, HTML entities (even those escaped
    twice) resolved, white space collapsed."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where the encoder and its tokenizer are."""
    parts = folder / "text_encoder", folder / "tokenizer"
    encoder, tokens = parts if parts[0].is_dir() else (folder, folder)
    try:
        kind = json.loads((encoder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no encoder: {encoder / 'config.json'} is missing or damaged; name the "
            "folder of UMT5 for transformers, or one with text_encoder and tokenizer in it"
        ) from error
    if kind != "umt5":
        raise CheckpointError(f"{encoder} holds a model of kind '{kind}', not umt5")
    return encoder, tokens


def _weights(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no safetensors weights, neither {whole.name} nor {index.name}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged") from error
    return [folder / shard for shard in shards]


def _settings(encoder: Path, tokens: Path) -> list[Path]:
    """What decides about an embedding beside the weights."""
    names = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
    files = [encoder / "config.json", *(tokens / name for name in names)]
    return [file for file in files if file.is_file()]


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library underneath raises bare ones
        raise CheckpointError(f"cannot read a tokenizer from {folder}: {error}") from error


def _model(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the encoder in {folder}: {error}") from error
    model, report = loaded
    if lacking := sorted(report["missing_keys"]):
        names = ", ".join(lacking[:10])
        raise CheckpointError(
            f"the weights in {folder} lack {len(lacking)} of the encoder's: {names}"
        )
    return model.eval()


def _check_memory(weights: list[Path], itemsize: int) -> None:
    needed = 0
    for path in weights:
        try:
            with safe_open(path, "np") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read weights from {path}: {error}") from error
        needed += sum(
            math.prod(shape) * itemsize
            for name, shape in shapes.items()
            if not name.startswith(DECODERS)
        )
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"the encoder needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "close other programs, or encode on another machine and copy the file"
        )


def _sha256(files: list[Path]) -> str:
    """One hash of several files, whose names and order count."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
