"""Encode prompts with UMT5's encoder, as Wan does: transformers, on the CPU, from a folder.

Weights are read tensor by tensor with `reading.py`: nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from packforcing.checkpoints.containers import check_json
from packforcing.checkpoints.names import unwrapped_name
from packforcing.checkpoints.reading import (
    WEIGHT_SUFFIXES,
    StoredTensor,
    check_dtypes,
    list_files,
    tensor_reader,
)
from packforcing.checkpoints.recognition import describe_part, survey_file
from packforcing.embeddings import (
    Embedding,
    cached_embedding_path,
    load_embedding,
    save_embedding,
)
from packforcing.errors import (
    CheckpointError,
    ConfigError,
    OutputError,
    PromptError,
    PromptWarning,
)
from packforcing.files import file_sha256
from packforcing.machine import cpu_cores, free_memory
from packforcing.model import describe_mismatch
from packforcing.units import format_memory

MAX_TOKENS = 512  # of a prompt, as in Wan
# Prefixes of tensors that encoding does not use; ComfyUI's files have the tokenizer as one
UNUSED = ("decoder.", "lm_head.", "spiece_model")
TIED = "encoder.embed_tokens.weight"  # the same tensor as this:
EMBEDDING = "shared.weight"

# Wan's own file, the folder of its tokenizer, and names to transformers': Wan's, llama.cpp's
WAN_FILE, WAN_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
TOKENIZER = "tokenizer.json"
WAN_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^token_embedding\.", "shared."),
        (r"^token_embd\.", "shared."),
        (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
        (r"^enc\.blk\.(\d+)\.", r"encoder.block.\1."),
        (r"\.attn_norm\.", ".layer.0.layer_norm."),
        (r"\.attn_rel_b\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.attn_([qkvo])\.", r".layer.0.SelfAttention.\1."),
        (r"\.ffn_norm\.", ".layer.1.layer_norm."),
        (r"\.ffn_gate\.", ".layer.1.DenseReluDense.wi_0."),
        (r"\.ffn_up\.", ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn_down\.", ".layer.1.DenseReluDense.wo."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.", r"encoder.block.\1."),
        (r"\.norm1\.", ".layer.0.layer_norm."),
        (r"\.norm2\.", ".layer.1.layer_norm."),
        (r"\.attn\.", ".layer.0.SelfAttention."),
        (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
        (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
    )
]

WeightDtype = Literal["fp32", "bf16", "int8"]  # int8: linear layers; the rest in bfloat16


@dataclass(frozen=True)
class Encoder:
    """The files of a text encoder."""

    folder: Path
    weights: list[Path]
    config: list[Path]  # empty for Wan's own weights
    tokenizer: Path


def encode_umt5(
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    weights: WeightDtype = "bf16",
    cache: Path | None = None,
    bar: Callable[..., Any] | None = None,
    *,
    strict: bool = False,
) -> list[Embedding]:
    """Encode prompts with UMT5.

    Of a prompt with more than 512 tokens, the first 511 and the final </s> are read, as in Wan,
    with a `PromptWarning` that has the rest. An empty prompt is the final </s> alone.

    Args:
        prompts: What to encode.
        folder: UMT5 with its tokenizer as transformers saves them, the folder of a diffusers Wan,
            which has both in `text_encoder` and `tokenizer`, of Wan's own files, or a file of the
            encoder alone (safetensors, torch checkpoint or GGUF) with a tokenizer.json beside it.
        weights: dtype of the weights in memory. int8 has one scale per output channel and is
            dequantized to bfloat16 for each product.
        cache: A folder of earlier embeddings, by the encoder's hash and the prompt. A damaged
            entry, or a folder that cannot be written, costs time alone.
        bar: Makes a progress bar like tqdm's for hashing the files, in bytes.
        strict: Refuse a prompt that is too long.

    Returns:
        The last hidden states of each prompt, one row per token, the final </s> included.

    Raises:
        PromptError: `strict` is set, and a prompt has more than 512 tokens.
        CheckpointError: The folder has another layout, or damaged files.
        ConfigError: The weights do not fit into memory.
    """
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    encoder = _find_encoder(Path(folder))
    tokenizer = _tokenizer(encoder.tokenizer)
    ids: dict[str, list[int]] = {}
    for prompt in dict.fromkeys(cleaned):
        ids[prompt] = _tokenize(tokenizer, prompt, strict)
    if not all(ids.values()):
        raise CheckpointError(
            f"{encoder.tokenizer} finds no token in a prompt: use another tokenizer"
        )
    encoder_kind = "umt5" if weights == "bf16" else f"umt5-{weights}"
    sha256 = _sha256([*encoder.weights, *encoder.config, encoder.tokenizer], bar)
    files = {
        prompt: cache and cached_embedding_path(cache, prompt, encoder_kind, sha256, MAX_TOKENS)
        for prompt in ids
    }
    embeddings: dict[str, Embedding] = {}
    for prompt, file in files.items():
        with suppress(PromptError):
            if file:
                cached = load_embedding(file)
                if _is_valid(cached, prompt, encoder_kind, sha256, ids[prompt]):
                    embeddings[prompt] = cached
    if missing := [prompt for prompt in ids if prompt not in embeddings]:
        model = load_umt5(
            encoder, weights, max(token for prompt in missing for token in ids[prompt])
        )
        for prompt in missing:
            text = _encode(model, ids[prompt])
            embeddings[prompt] = Embedding(text, prompt, encoder_kind, sha256)
            if not np.isfinite(text).all():
                raise CheckpointError(
                    f"the encoder in {folder} computes values that are not finite"
                )
            with suppress(OutputError, OSError):
                if file := files[prompt]:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_embedding(file, embeddings[prompt])
    return [embeddings[prompt] for prompt in cleaned]


def _is_valid(
    cached: Embedding, prompt: str, encoder_kind: str, sha256: str, ids: list[int]
) -> bool:
    """Tell whether a cached embedding is of this prompt and encoder, and whole."""
    return (
        (cached.prompt, cached.encoder, cached.encoder_sha256) == (prompt, encoder_kind, sha256)
        and cached.text.shape[:-1] == (len(ids),)
        and bool(np.isfinite(cached.text).all())
    )


def _encode(model: UMT5EncoderModel, ids: list[int]) -> np.ndarray:
    """Encode tokens without padding.

    Wan masks padding inside UMT5 and sets its rows to zero afterwards: the result is the same.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cpu_cores()))  # torch overlooks quotas
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy()


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan does.

    Fix broken Unicode and curly quotes, resolve HTML entities (also those escaped twice), collapse
    white space.
    """
    fixed = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", fixed).strip()


class Int8Linear(nn.Module):
    """A linear layer without bias: int8 weight [out, in], a scale per output channel.

    A weight's error is at most scale / 2, so an output's is at most that times the sum of |x|.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1) / 127
        quotients = weight.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("weight", quotients.round().to(torch.int8))
        self.register_buffer("scale", scale.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


# Files


def _find_encoder(folder: Path) -> Encoder:
    """Find the files of a text encoder: a file, or a folder in one of several layouts."""
    if folder.is_file():
        return _encoder_file(folder)
    if (folder / WAN_FILE).is_file():
        return Encoder(folder, [folder / WAN_FILE], [], folder / WAN_TOKENIZER / TOKENIZER)
    inside = folder / "text_encoder", folder / "tokenizer"
    place, tokens = inside if inside[0].is_dir() else (folder, folder)
    files = [file for file in place.glob("*") if file.suffix in WEIGHT_SUFFIXES]
    if len(files) == 1 and not (place / "config.json").exists():
        return _encoder_file(files[0])
    try:
        settings = json.loads((place / "config.json").read_bytes())
        kind = settings.get("model_type") or settings["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if (place / "config.json").is_file():
            check_json(place / "config.json")
        raise CheckpointError(
            f"{folder} is not a text encoder: {place / 'config.json'} is missing or damaged; name "
            "a folder of UMT5 for transformers, one with text_encoder and tokenizer in it, or one "
            f"with Wan's {WAN_FILE} and {WAN_TOKENIZER}"
        ) from error
    if kind != "umt5":
        raise CheckpointError(f"{place} holds a model of kind '{kind}', not umt5")
    whole = place / "model.safetensors"
    weights = [whole] if whole.is_file() else list_files(place)
    return Encoder(place, weights, [place / "config.json"], tokens / TOKENIZER)


def _encoder_file(file: Path) -> Encoder:
    """Describe an encoder in a file of its own, as ComfyUI has it; its tokenizer is near it."""
    beside = file.parent
    near = beside, beside / WAN_TOKENIZER, beside / "tokenizer", beside.parent / "tokenizer"
    for place in near:
        if (place / TOKENIZER).is_file():
            return Encoder(beside, [file], [], place / TOKENIZER)
    _text_tensors([file])  # raises for what is no encoder
    raise CheckpointError(
        f"{file} has no {TOKENIZER} beside it: copy that of google/umt5-xxl there, which "
        "'packforcing fetch umt5-xxl' downloads"
    )


def _tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer as the file has it; transformers' classes would rebuild parts of it."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare exceptions
        if path.is_file():
            check_json(path)  # a pointer, or a server's page
        raise CheckpointError(f"cannot read a tokenizer from {path}: {error}") from error
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


def _tokenize(tokenizer: Tokenizer, prompt: str, strict: bool) -> list[int]:
    """Return the tokens of a prompt that Wan reads; warn of what it does not read, or refuse it."""
    encoding = tokenizer.encode(prompt)
    if encoding.overflowing:
        parts = [encoding, *encoding.overflowing]
        count = sum(len(part) - sum(part.special_tokens_mask) for part in parts)
        count += sum(encoding.special_tokens_mask)
        ends = (
            end
            for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask)
            if not special
        )
        unread = prompt[max(ends) :]
        message = (
            f"the prompt '{_shorten(prompt, 40)}' has {count} tokens, of which {MAX_TOKENS} can be "
            f"read; not read: '{_shorten(unread, 600)}'"
        )
        if strict:
            raise PromptError(f"{message}; shorten it")
        warnings.warn(PromptWarning(message, prompt, unread), stacklevel=3)
    return encoding.ids


def _shorten(text: str, characters: int) -> str:
    """Return a text with its middle left out if it is longer."""
    if len(text) <= characters:
        return text
    half = (characters - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _sha256(files: list[Path], bar: Callable[..., Any] | None) -> str:
    """Hash several files, with their names and order, to one digest."""
    digest, size_bytes = hashlib.sha256(), sum(path.stat().st_size for path in files)
    options = {"total": size_bytes, "desc": "hashing the encoder", "unit": "B", "unit_scale": True}
    with bar(**options) if bar else nullcontext() as progress:
        for path in files:
            file_digest = file_sha256(path, progress.update if progress else None)
            digest.update(path.name.encode() + bytes.fromhex(file_digest))
    return digest.hexdigest()


# The model


def load_umt5(encoder: Encoder, weights: WeightDtype, max_token: int) -> UMT5EncoderModel:
    """Load the model; `max_token` is the highest token ID that it will read."""
    tensors = _text_tensors(encoder.weights)
    model = _empty_model(encoder, tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del expected[TIED]
    shapes = {name: stored.shape for name, stored in tensors.items()}
    if problems := describe_mismatch(shapes, expected):
        raise CheckpointError(
            f"the weights in {encoder.folder} are not those of its encoder {problems}"
        )
    check_dtypes(tensors.values())
    if max_token >= expected[EMBEDDING][0]:
        raise CheckpointError(
            f"{encoder.tokenizer} gives token {max_token}, and the encoder in {encoder.folder} has "
            f"{expected[EMBEDDING][0]} tokens: take both from one model"
        )
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    quantized = {f"{name}.weight" for name in linear} if weights == "int8" else set()
    _check_memory(
        sum(
            math.prod(shape) * (1 if name in quantized else dtype.itemsize)
            for name, shape in expected.items()
        ),
        weights,
    )
    for path, group in groupby(tensors.items(), key=lambda item: item[1].path):
        read = tensor_reader(path)
        for name, stored in group:
            owner, _, leaf = name.rpartition(".")
            above, _, part = owner.rpartition(".")
            if name in quantized:
                setattr(model.get_submodule(above), part, Int8Linear(read(stored), dtype))
            else:
                value = nn.Parameter(read(stored).to(dtype), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, value)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def _text_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """List the tensors of a text encoder in files, by transformers' names.

    Raises:
        CheckpointError: The files hold something else.
    """
    parts = [part for file in files for part in survey_file(file)]
    known = [part for part in parts if part.role not in ("text encoder", "other")]
    if not any(part.role == "text encoder" for part in parts) and known:
        raise CheckpointError(f"{known[0].path} holds {describe_part(known[0])}, no text encoder")
    return {
        name: stored
        for part in parts
        if part not in known
        for key, stored in part.tensors.items()
        if not (name := transformers_name(unwrapped_name(stored.name))).startswith(UNUSED)
        and not key.startswith(UNUSED)
    }


def transformers_name(name: str) -> str:
    """Translate a tensor's name from Wan's or llama.cpp's to transformers'; others stay."""
    for pattern, replacement in WAN_NAMES:
        name = pattern.sub(replacement, name)
    return EMBEDDING if name == TIED else name


def _empty_model(encoder: Encoder, tensors: dict[str, StoredTensor]) -> UMT5EncoderModel:
    """Build the model without weights, and try it on two tokens."""
    try:
        with torch.device("meta"), torch.inference_mode():
            model = UMT5EncoderModel(_config(encoder, tensors)).eval()
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # transformers accepts any setting and fails in many ways
        raise CheckpointError(f"cannot read the encoder in {encoder.folder}: {error}") from error
    return model


def _config(encoder: Encoder, tensors: dict[str, StoredTensor]) -> UMT5Config:
    """Read the config; for Wan's own file, which has none, derive it from the tensors' shapes."""
    if encoder.config:
        return UMT5Config.from_pretrained(encoder.folder, local_files_only=True)
    first = "encoder.block.0.layer"
    (vocabulary, width), (buckets, heads) = (
        tensors[name].shape
        for name in (EMBEDDING, f"{first}.0.SelfAttention.relative_attention_bias.weight")
    )
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=tensors[f"{first}.0.SelfAttention.q.weight"].shape[0] // heads,
        d_ff=tensors[f"{first}.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=len({name.split(".")[2] for name in tensors if ".block." in name}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )


def _check_memory(needed_bytes: int, weights: WeightDtype) -> None:
    free_bytes = free_memory()
    if needed_bytes > free_bytes:
        smaller = "" if weights == "int8" else "encode-prompt --int8 needs little more than half; "
        raise ConfigError(
            f"the text encoder needs {format_memory(needed_bytes)} of memory, "
            f"{format_memory(free_bytes)} are free: "
            f"{smaller}close other programs, or encode on another machine and copy the file"
        )
