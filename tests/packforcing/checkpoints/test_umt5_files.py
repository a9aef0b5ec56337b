"""UMT5 in the files that ComfyUI's users have: fp8 with scales, GGUF, and what is none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from packforcing.errors import CheckpointError
from tests.packforcing.checkpoints.layouts import TINY_SHAPES, prefixed
from tests.packforcing.checkpoints.test_umt5 import encode, no_cache_of_others, saved_umt5, umt5

__all__ = ["no_cache_of_others", "saved_umt5", "umt5"]

# llama.cpp's names: gguf.constants, MODEL_ARCH.T5ENCODER
LLAMA = {
    "encoder.block.": "enc.blk.", "shared.": "token_embd.",
    "encoder.final_layer_norm.": "enc.output_norm.", "layer.0.layer_norm.": "attn_norm.",
    "layer.0.SelfAttention.relative_attention_bias.": "attn_rel_b.",
    "layer.0.SelfAttention.": "attn_", "layer.1.layer_norm.": "ffn_norm.",
    "layer.1.DenseReluDense.wi_0.": "ffn_gate.", "layer.1.DenseReluDense.wi_1.": "ffn_up.",
    "layer.1.DenseReluDense.wo.": "ffn_down.",
}  # fmt: skip


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.embed_tokens.weight", None)
    return tensors


def alone(umt5: Path) -> Path:
    """The folder without what transformers saves beside the weights."""
    for file in umt5.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    return umt5


def expected(umt5: Path, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The same weights in transformers' layout."""
    save_file(tensors, umt5 / "model.safetensors", {"format": "pt"})
    return encode("a fox", umt5, "fp32").text


@pytest.mark.parametrize("prefix", ["", "text_encoders.umt5xxl.transformer."])
def test_comfyuis_scaled_fp8_is_dequantized(prefix, umt5):
    """umt5_xxl_fp8_e4m3fn_scaled.safetensors, with its marker and its tokenizer as a tensor."""
    tensors, scaled, plain = weights_of(umt5), {}, {}
    for name, tensor in tensors.items():
        scaled[name] = plain[name] = tensor
        if tensor.ndim == 2 and ("SelfAttention" in name or "Dense" in name) and "bias" not in name:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
            plain[name] = scaled[name].float() * scale
    right = expected(umt5, plain)
    alone(umt5)
    scaled |= {"scaled_fp8": torch.zeros(0), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    file = umt5 / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(prefixed(scaled, prefix), file)
    for named in (file, umt5):
        np.testing.assert_array_equal(encode("a fox", named, "fp32").text, right)
    (umt5 / "tokenizer.json").rename(umt5 / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json beside it.*fetch umt5-xxl"):
        encode("a fox", file)


def test_gguf_is_dequantized(umt5):
    """As llama.cpp's convert_hf_to_gguf.py names it."""
    gguf = pytest.importorskip("gguf")
    q8, f32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
    writer, plain = gguf.GGUFWriter(None, "t5encoder"), {}
    for name, tensor in weights_of(umt5).items():
        kind = q8 if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else f32
        packed = gguf.quants.quantize(tensor.numpy(), kind)
        plain[name] = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind)))
        for theirs, llama in LLAMA.items():
            name = name.replace(theirs, llama)
        writer.add_tensor(name, packed, raw_dtype=kind)
    right = expected(umt5, plain)
    file = alone(umt5) / "umt5-xxl-encoder-Q8_0.gguf"
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(encode("a fox", file, "fp32").text, right)


def test_what_is_no_text_encoder_is_named(umt5, tmp_path):
    transformer = {name: torch.zeros(shape) for name, shape in TINY_SHAPES.items()}
    save_file(transformer, tmp_path / "transformer.safetensors")
    save_file({"visual.x": torch.zeros(1)}, tmp_path / "clip.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>")
    for name, message in (
        ("transformer", "holds a transformer, no text encoder"),
        ("clip", "holds an image encoder, no text encoder"),
        ("page", "is a web page"),
    ):
        with pytest.raises(CheckpointError, match=message):
            encode("a fox", tmp_path / f"{name}.safetensors")
        shutil.copy(tmp_path / f"{name}.safetensors", umt5 / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            encode("a fox", umt5)
    for name in ("tokenizer.json", "config.json"):  # a clone without Git LFS
        (umt5 / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        )
        with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
            encode("a fox", umt5)
    (umt5 / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(CheckpointError, match="of kind 'WanTransformer3DModel', not umt5"):
        encode("a fox", umt5)
