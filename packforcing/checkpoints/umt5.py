"""Prompts to embeddings with UMT5's encoder, as in Wan: transformers, on the CPU, from a folder.

Weights are read tensor by tensor, by the reader of published checkpoints: nothing is executed.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import ftfy
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import UMT5Config, UMT5EncoderModel

from packforcing.checkpoints.convert import Stored, check_formats, contents, parts, reader
from packforcing.embeddings import (
    Embedding,
    cached_embedding_path,
    load_embedding,
    save_embedding,
)
from packforcing.errors import CheckpointError, ConfigError, OutputError, PromptError
from packforcing.files import file_sha256
from packforcing.model import mismatch

LONGEST = 512  # tokens, Wan's
DECODERS = ("decoder.", "lm_head.")  # tensors of the whole model that encoding does without
TIED = "encoder.embed_tokens.weight"  # the same tensor as this:
EMBEDDING = "shared.weight"

# Wan's own file: its layout beside its tokenizer's folder, and its names to transformers'
WAN_FILE, WAN_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
TOKENIZER = "tokenizer.json"
WAN_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^token_embedding\.", "shared."),
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

Weights = Literal["fp32", "bf16", "int8"]  # int8: the linear layers', the rest in bfloat16


@dataclass(frozen=True)
class Encoder:
    """The files of an encoder."""

    folder: Path
    weights: list[Path]
    config: list[Path]  # none for Wan's own weights
    tokenizer: Path


def encode_umt5(
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    weights: Weights = "bf16",
    cache: Path | None = None,
    bar: Callable[..., Any] = tqdm,
) -> list[Embedding]:
    """The encoder's last hidden states of prompts, one row per token with the final </s>.

    folder: UMT5 as transformers saves it with its tokenizer, the folder of a diffusers Wan, which
    has both in `text_encoder` and `tokenizer`, or of Wan's own files. weights: how they are kept;
    int8 ones are rounded to 127 steps per output, and computed with in bfloat16. cache: a folder
    of embeddings made before, by the encoder's hash and the prompt; one that is damaged or cannot
    be written costs time alone. bar: makes a tqdm for hashing the files, in bytes.

    Raises `PromptError` for an empty prompt or one of more than 512 tokens, `CheckpointError` for
    a folder of another layout or damaged files, `ConfigError` if memory does not hold the weights.
    """
    cleaned = [clean(prompt) for prompt in prompts]
    if not all(cleaned):
        raise PromptError("the prompt is empty: say what to show")
    encoder = _find(Path(folder))
    tokenizer = _tokenizer(encoder.tokenizer)
    ids = {prompt: tokenizer.encode(prompt).ids for prompt in cleaned}
    if not all(ids.values()):
        raise CheckpointError(f"{encoder.tokenizer} makes no token of a prompt: take another")
    if (longest := max(map(len, ids.values()))) > LONGEST:
        raise PromptError(f"the prompt has {longest} tokens, at most {LONGEST} are read")
    made_by = "umt5" if weights == "bf16" else f"umt5-{weights}"
    sha256 = _sha256([*encoder.weights, *encoder.config, encoder.tokenizer], bar)
    files = {
        prompt: cache and cached_embedding_path(cache, prompt, made_by, sha256, LONGEST)
        for prompt in ids
    }
    done: dict[str, Embedding] = {}
    for prompt, file in files.items():
        with suppress(PromptError):
            if file and _is(known := load_embedding(file), prompt, made_by, sha256, ids[prompt]):
                done[prompt] = known
    if missing := [prompt for prompt in ids if prompt not in done]:
        model = _model(encoder, weights, max(token for prompt in missing for token in ids[prompt]))
        for prompt in missing:
            done[prompt] = Embedding(_encode(model, ids[prompt]), prompt, made_by, sha256)
            if not np.isfinite(done[prompt].text).all():
                raise CheckpointError(f"the encoder in {folder} gives values that are not finite")
            with suppress(OutputError, OSError):
                if file := files[prompt]:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_embedding(file, done[prompt])
    return [done[prompt] for prompt in cleaned]


def _is(known: Embedding, prompt: str, made_by: str, sha256: str, ids: list[int]) -> bool:
    """Whether an embedding says that it is this one, and can be."""
    return (
        (known.prompt, known.encoder, known.encoder_sha256) == (prompt, made_by, sha256)
        and known.text.shape[:-1] == (len(ids),)
        and bool(np.isfinite(known.text).all())
    )


def _encode(model: UMT5EncoderModel, ids: list[int]) -> np.ndarray:
    """Padding is masked inside UMT5 and its rows are zeroed after it: encoding the tokens alone is
    the same and takes a fraction of the time."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy()


def clean(prompt: str) -> str:
    """Wan's cleaning: broken Unicode and curly quotes mended, HTML entities (even those escaped
    twice) resolved, white space collapsed."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight [out, in] is kept as int8, with a scale per output.

    Weights are off by half a step, scale / 2, at most, so an output is off by at most that times
    the sum of |x|.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1) / 127
        steps = weight.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("weight", steps.round().to(torch.int8))
        self.register_buffer("scale", scale.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


# Files


def _find(folder: Path) -> Encoder:
    if (folder / WAN_FILE).is_file():
        return Encoder(folder, [folder / WAN_FILE], [], folder / WAN_TOKENIZER / TOKENIZER)
    inside = folder / "text_encoder", folder / "tokenizer"
    place, tokens = inside if inside[0].is_dir() else (folder, folder)
    try:
        kind = json.loads((place / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no encoder: {place / 'config.json'} is missing or damaged; name the "
            "folder of UMT5 for transformers, one with text_encoder and tokenizer in it, or one "
            f"with Wan's {WAN_FILE} and {WAN_TOKENIZER}"
        ) from error
    if kind != "umt5":
        raise CheckpointError(f"{place} holds a model of kind '{kind}', not umt5")
    whole = place / "model.safetensors"
    weights = [whole] if whole.is_file() else parts(place)
    return Encoder(place, weights, [place / "config.json"], tokens / TOKENIZER)


def _tokenizer(path: Path) -> Tokenizer:
    """As the file has it: transformers' classes would build some of its parts anew."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare ones
        raise CheckpointError(f"cannot read a tokenizer from {path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _sha256(files: list[Path], bar: Callable[..., Any]) -> str:
    """One hash of several files, whose names and order count."""
    digest, size = hashlib.sha256(), sum(path.stat().st_size for path in files)
    with bar(total=size, desc="which encoder", unit="B", unit_scale=True) as progress:
        for path in files:
            one = file_sha256(path, progress.update)
            digest.update(path.name.encode() + bytes.fromhex(one))
    return digest.hexdigest()


# The model


def _model(encoder: Encoder, weights: Weights, last: int) -> UMT5EncoderModel:
    """last: the highest token that it is to read."""
    tensors = {
        name: stored
        for path in encoder.weights
        for stored in contents(path)
        if not (name := _name(stored.name)).startswith(DECODERS)
    }
    model = _empty(encoder, tensors)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del wanted[TIED]
    found = {name: stored.shape for name, stored in tensors.items()}
    if problems := mismatch(found, wanted):
        raise CheckpointError(f"the weights in {encoder.folder} are not its encoder's {problems}")
    check_formats(tensors)
    if last >= wanted[EMBEDDING][0]:
        raise CheckpointError(
            f"{encoder.tokenizer} gives token {last}, and the encoder in {encoder.folder} reads "
            f"{wanted[EMBEDDING][0]}: take both from one model"
        )
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    rounded = {f"{name}.weight" for name in linear} if weights == "int8" else set()
    _check_memory(
        sum(
            math.prod(shape) * (1 if name in rounded else dtype.itemsize)
            for name, shape in wanted.items()
        ),
        weights,
    )
    for path, group in groupby(tensors.items(), key=lambda item: item[1].path):
        read = reader(path)
        for name, stored in group:
            owner, _, leaf = name.rpartition(".")
            above, _, part = owner.rpartition(".")
            if name in rounded:
                setattr(model.get_submodule(above), part, Int8Linear(read(stored), dtype))
            else:
                value = nn.Parameter(read(stored).to(dtype), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, value)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def _name(name: str) -> str:
    """A tensor's name as transformers has it."""
    for pattern, theirs in WAN_NAMES:
        name = pattern.sub(theirs, name)
    return EMBEDDING if name == TIED else name


def _empty(encoder: Encoder, tensors: dict[str, Stored]) -> UMT5EncoderModel:
    """The model without its weights, tried on two tokens."""
    try:
        with torch.device("meta"), torch.inference_mode():
            model = UMT5EncoderModel(_config(encoder, tensors)).eval()
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # transformers takes any setting, and fails over it in its own ways
        raise CheckpointError(f"cannot read the encoder in {encoder.folder}: {error}") from error
    return model


def _config(encoder: Encoder, tensors: dict[str, Stored]) -> UMT5Config:
    """As the folder says; of Wan's own file, which comes without, from the tensors' shapes."""
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


def _check_memory(needed: int, weights: Weights) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        smaller = "" if weights == "int8" else "encode-prompt --int8 takes little more than half; "
        raise ConfigError(
            f"the encoder needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"{smaller}close other programs, or encode on another machine and copy the file"
        )
