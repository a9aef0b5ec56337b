"""The forms in which people have checkpoints, and what comes in their place.

Each is written here as the tools named beside it write it; `WEIGHTS_OF` says what has to be read.
"""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tests.packforcing.checkpoints.layouts import diffusers_name, other, prefixed
from tests.packforcing.checkpoints.layouts import save as save_torch

Weights = dict[str, Tensor]

# Other parts of an all-in-one checkpoint, as few tensors as tell what they are
TEXT_ENCODER = {
    "shared.weight": torch.zeros(8, 4),
    "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
    "encoder.final_layer_norm.weight": torch.zeros(4),
}


def linear(name: str, tensor: Tensor) -> bool:
    """Whether ComfyUI quantizes a tensor: the weights of linear layers in blocks."""
    return tensor.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight")


def fp8(tensor: Tensor, scale: Tensor, dtype=torch.float8_e4m3fn) -> Tensor:
    return (tensor / scale).to(dtype)


def scaled_fp8(folder: Path, w: Weights, scales: str, per: str, marker=None, prefix="") -> Path:
    """Weights of linear layers in fp8, with a scale per tensor, channel or block beside each."""
    tensors = {}
    for name, tensor in w.items():
        if not linear(name, tensor):
            tensors[prefix + name] = tensor
            continue
        blocks = {
            "tensor": tensor.reshape(1, 1, *tensor.shape),
            "channel": tensor[:, None, None, :],
            "block": tensor.unflatten(1, (2, -1)).unflatten(0, (2, -1)).transpose(1, 2),
        }[per]  # fmt: skip
        scale = blocks.abs().amax((-2, -1)) / 448
        wide = scale.repeat_interleave(tensor.shape[0] // scale.shape[0], 0)
        wide = wide.repeat_interleave(tensor.shape[1] // scale.shape[1], 1)
        layer = prefix + name.removesuffix(".weight")
        tensors[prefix + name] = fp8(tensor, wide)
        tensors[f"{layer}.{scales}"] = scale.reshape(()) if per == "tensor" else scale
    if marker:
        tensors[prefix + marker] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, folder / "fp8.safetensors")
    return folder / "fp8.safetensors"


def dequantized(w: Weights, path: Path) -> Weights:
    """What a file of `scaled_fp8` stands for, by the products written down naively."""
    stored, result = load_file(path), {}
    for name in w:
        key = next(key for key in stored if key.endswith(name))
        layer = key.removesuffix(".weight")
        scale = next((stored[f"{layer}.{s}"] for s in ("scale_weight", "weight_scale",
                      "weight_scale_inv") if f"{layer}.{s}" in stored), None)  # fmt: skip
        value = stored[key]
        if scale is not None and key.endswith(".weight"):
            value = value.float()
            if scale.ndim == 2:
                scale = torch.kron(
                    scale, torch.ones(value.shape[0] // scale.shape[0],
                                      value.shape[1] // scale.shape[1])
                )  # fmt: skip
            value = value * scale
        result[name] = value.float()
    return result


# Readable forms: a function that writes one and returns what to name, and the weights expected


def compiled(folder, w):
    """torch.compile inside FSDP inside DistributedDataParallel, saved by Lightning."""
    wrapped = {f"module.model._fsdp_wrapped_module._orig_mod.{name}": t for name, t in w.items()}
    return save_torch(folder / "a.ckpt", {"state_dict": wrapped, "epoch": 3, "lr": 1e-4}), w


def compiled_blocks(folder, w):
    """torch.compile and activation checkpointing of every block."""
    w2 = {
        name.replace("blocks.", "blocks.", 1) if not name.startswith("blocks.")
        else ".".join([*name.split(".")[:2], "_checkpoint_wrapped_module._orig_mod",
                       *name.split(".")[2:]]): t
        for name, t in w.items()
    }  # fmt: skip
    save_file(w2, folder / "a.safetensors")
    return folder / "a.safetensors", w


def deepspeed(folder, w):
    """DeepSpeed's mp_rank_00_model_states.pt."""
    content = {"module": prefixed(w), "optimizer": None, "global_steps": 10, "ds_version": "0.14"}
    return save_torch(folder / "mp_rank_00_model_states.pt", content), w


def averaged(folder, w):
    """torch.optim.swa_utils.AveragedModel's state_dict, with its counter."""
    tensors = {"n_averaged": torch.tensor(100)} | prefixed(w, "module.")
    return save_torch(folder / "a.pt", tensors), w


def nested(folder, w):
    """A trainer's dictionaries in dictionaries, the weights beside an optimizer's."""
    state = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"app": {"model": prefixed(w, "net.")}, "optimizer": state, "step": torch.tensor(3)}
    return save_torch(folder / "a.pt", content), w


def comfyui(folder, w):
    """ComfyUI: ModelSave, and the files for models/checkpoints."""
    save_file(prefixed(w, "model.diffusion_model."), folder / "a.safetensors")
    return folder / "a.safetensors", w


def comfyui_all_in_one(folder, w):
    """ComfyUI: CheckpointSave, with a text encoder inside."""
    tensors = prefixed(w, "model.diffusion_model.")
    tensors |= prefixed(TEXT_ENCODER, "text_encoders.umt5xxl.transformer.")
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors", w


def critic_beside(folder, w):
    """A flat file with a critic: the weights without a prefix's name are the model's."""
    tensors = prefixed(w, "generator_ema.model.") | prefixed(other(w), "critic.model.")
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors", w


def pipeline_root(folder, w):
    """diffusers: WanPipeline.save_pretrained."""
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "pipe" / "transformer").mkdir(parents=True)
    (folder / "pipe" / "vae").mkdir()
    (folder / "pipe" / "model_index.json").write_text(json.dumps(index))
    (folder / "pipe" / "transformer" / "config.json").write_text("{}")
    tensors = {diffusers_name(name): t for name, t in w.items()}
    path = folder / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    save_file({"x": torch.zeros(1)}, folder / "pipe" / "vae" / path.name)
    return folder / "pipe", w


def numbered_shards(folder, w):
    """Shards without their index."""
    for number in (1, 2):
        part = dict(list(w.items())[number - 1 :: 2])
        save_file(part, folder / f"model-{number:05}-of-00002.safetensors")
    return folder, w


def torch_shards(folder, w):
    """diffusers before safetensors: shards as torch checkpoints, with an index."""
    weight_map = {}
    for number in (1, 2):
        part, name = dict(list(w.items())[number - 1 :: 2]), f"model-{number:05}-of-00002.bin"
        save_torch(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder, w


def plain_fp8(folder, w):
    """Weights cast to fp8 without scales, as Kijai publishes them; norms and biases wider."""
    cast = {n: t.to(torch.float8_e4m3fn) if linear(n, t) else t.half() for n, t in w.items()}
    save_file(cast, folder / "a.safetensors")
    return folder / "a.safetensors", {name: tensor.float() for name, tensor in cast.items()}


def plain_fp8_e5m2(folder, w):
    cast = {n: t.to(torch.float8_e5m2) if linear(n, t) else t.bfloat16() for n, t in w.items()}
    save_file(prefixed(cast, "model."), folder / "a.safetensors")
    return folder / "a.safetensors", {name: tensor.float() for name, tensor in cast.items()}


def comfyui_scaled_fp8(folder, w):
    """ComfyUI before its quantization metadata: `scaled_fp8` and a `scale_weight` per layer."""
    path = scaled_fp8(folder, w, "scale_weight", "tensor", "scaled_fp8", "model.diffusion_model.")
    return path, dequantized(w, path)


def comfyui_quantized(folder, w):
    """ComfyUI today: `comfy_quant` markers, with a scale of the inputs."""
    path = scaled_fp8(folder, w, "weight_scale", "tensor")
    expected, tensors = dequantized(w, path), load_file(path)
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        tensors[f"{layer}.comfy_quant"] = marker.clone()
        tensors[f"{layer}.input_scale"] = torch.tensor(0.5)
    save_file(tensors, path)
    return path, expected


def comfyui_metadata(folder, w):
    """ComfyUI today, as its guide describes files: `_quantization_metadata`, names unprefixed."""
    path = scaled_fp8(folder, w, "weight_scale", "tensor", prefix="model.diffusion_model.")
    expected, tensors = dequantized(w, path), load_file(path)
    layers = {n.removesuffix(".weight"): {"format": "float8_e4m3fn"} for n in w if linear(n, w[n])}
    settings = {"format_version": "1.0", "layers": layers}
    save_file(tensors, path, {"_quantization_metadata": json.dumps(settings)})
    return path, expected


def cast_beside_scaled(folder, w):
    """An all-in-one checkpoint: the transformer cast to fp8, the text encoder scaled."""
    path, expected = plain_fp8(folder, w)
    tensors = prefixed(load_file(path), "model.diffusion_model.")
    prefix = "text_encoders.umt5xxl.transformer."
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    encoder = TEXT_ENCODER | {f"{layer}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    encoder |= {f"{layer}.scale_weight": torch.ones(()), "scaled_fp8": torch.zeros(0)}
    save_file(tensors | prefixed(encoder, prefix), path)
    return path, expected


def lightx2v_fp8(folder, w):
    """lightx2v and compressed-tensors: a scale per output channel."""
    path = scaled_fp8(folder, w, "weight_scale", "channel")
    return path, dequantized(w, path)


def deepseek_fp8(folder, w):
    """DeepSeek's way: a scale per block, whose name says inverse and which is multiplied."""
    path = scaled_fp8(folder, w, "weight_scale_inv", "block")
    return path, dequantized(w, path)


def gguf_file(folder, w, kind="Q8_0"):
    """As ComfyUI-GGUF's tools do: tools/convert.py, llama-quantize, tools/fix_5d_tensors.py."""
    import gguf

    path, writer, expected = folder / "a.gguf", gguf.GGUFWriter(None, "wan"), {}
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array("tokenizer.none", ["a", "b"])
    for name, tensor in w.items():
        values, quantization = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        if linear(name, tensor) and tensor.shape[-1] % block == 0:
            quantization = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(values, quantization)
        writer.add_tensor(name, packed, raw_dtype=quantization)
        plain = gguf.quants.dequantize(packed, quantization).reshape(values.shape)
        expected[name] = torch.from_numpy(np.array(plain, np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def gguf_half(folder, w):
    """tools/convert.py alone: float16 and bfloat16."""
    path, expected = gguf_file(folder, w, "BF16")
    return path, expected


READ = [
    compiled, compiled_blocks, deepspeed, averaged, nested, comfyui,
    comfyui_all_in_one, critic_beside, pipeline_root, numbered_shards, torch_shards, plain_fp8,
    plain_fp8_e5m2, comfyui_scaled_fp8, comfyui_quantized, comfyui_metadata, lightx2v_fp8,
    deepseek_fp8, cast_beside_scaled, gguf_file, gguf_half,
]  # fmt: skip


# What comes in place of a checkpoint: content, and what the message says it is


def zipped(name: str, content: bytes, method=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def recompressed(w: Weights) -> bytes:
    """A torch checkpoint that was unpacked and packed again."""
    buffer = io.BytesIO()
    torch.save(w, buffer)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    return packed.getvalue()


SMALL = {"blocks.0.ffn.0.bias": torch.zeros(4)}
LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5676070424\n"
)
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Just a moment...</title></head></html>"
S3 = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
IN_PLACE = {
    "a Git LFS pointer": (LFS, "is a Git LFS pointer.*git lfs pull"),
    "a Xet pointer": (b'# xet version 0\nfilesize = 1\nhash = "ab"\n', "is a Git Xet pointer"),
    "a web page": (HTML, "is a web page, not weights .*Just a moment.*download it again"),
    "a web page with a BOM": (b"\xef\xbb\xbf<HTML lang=en>", "is a web page"),
    "a web page in UTF-16": ("<html>".encode("utf-16"), "is a web page"),
    "a web page, gzip": (gzip.compress(HTML), "packed with gzip, and is a web page"),
    "a server's XML": (S3, "is XML, probably a server's error, not weights .*AccessDenied"),
    "a server's JSON": (b'{"error":"Repository not found"}', "is JSON.*Repository not found"),
    "a server's words": (b"Invalid username or password.", "is text, not weights .*Invalid user"),
    "a Chinese error": ("访问被拒绝".encode(), "is text, not weights"),
    "nothing": (b"", "is empty: download it again"),
    "zeros": (bytes(4096), "begins with zeros"),
    "gzip": (gzip.compress(save(SMALL)), "is packed with gzip: unpack it"),
    "tar": (tarred("model.safetensors", save(SMALL)), "is a tar archive: unpack it"),
    "zip": (zipped("model.safetensors", save(SMALL)), "zip archive with model.safetensors in it"),
    "zip, empty": (b"PK\x05\x06" + bytes(18), "zip archive with nothing in it"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "is a 7-Zip archive: unpack it"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "is a picture, not weights"),
    "torch, packed again": (recompressed(SMALL), "was packed again with compression"),
    "TorchScript": (zipped("m/constants.pkl", b"x"), "is a TorchScript program"),
    "GGML": (b"tjgg" + bytes(64), "is a GGML file of before GGUF"),
    "GGUF of version 1": (b"GGUF\x01" + bytes(64), "is GGUF of version 1"),
    "GGUF, big-endian": (b"FUGG" + bytes(64), "is a big-endian GGUF"),
    "random bytes": (bytes(range(255, 0, -1)), "none of safetensors, a torch checkpoint and GGUF"),
}  # fmt: skip


def quantization(name: str, dtype=torch.uint8, shape=(4,), **settings):
    """A file with one layer whose tensors have the names that a tool gives them."""
    weight = torch.zeros(4, 4, dtype=settings.pop("weight", torch.uint8))
    return {"blocks.0.ffn.0.weight": weight, f"blocks.0.ffn.0.{name}": torch.zeros(shape).to(dtype)}


def comfy_marker(settings: dict) -> Weights:
    marker = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return {
        "blocks.0.ffn.0.weight": torch.zeros(4, 4, dtype=torch.int8),
        "blocks.0.ffn.0.weight_scale": torch.ones(4, 1),
        "blocks.0.ffn.0.comfy_quant": marker,
    }


E4M3 = torch.float8_e4m3fn
QUANTIZED = {
    "bitsandbytes nf4": (quantization("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes nf4"),
    "bitsandbytes 4-bit": (quantization("weight.absmax"), "bitsandbytes 4-bit"),
    "bitsandbytes int8": (quantization("SCB", weight=torch.int8), "bitsandbytes int8"),
    "quanto": ({"blocks.0.ffn.0.weight._data": torch.zeros(4, 4, dtype=torch.int8),
                "blocks.0.ffn.0.weight._scale": torch.ones(4, 1)}, "optimum-quanto"),
    "GPTQ": (quantization("g_idx"), "GPTQ or AWQ"),
    "Nunchaku": (quantization("wscales"), "SVDQuant"),
    "HQQ": (quantization("W_q"), "HQQ"),
    "NVFP4": (quantization("weight_scale_2", torch.float32), "NVFP4"),
    "int8 with scales": (quantization("weight_scale", torch.float32, weight=torch.int8), "int8"),
    "ComfyUI's int8": (comfy_marker({"format": "int8_tensorwise", "convrot": True}),
                       "ComfyUI's int8_tensorwise"),
    "ComfyUI's next": (comfy_marker({"format": "mxfp8"}), "ComfyUI's mxfp8"),
    "fp8, a scale missing": ({
        "blocks.0.ffn.0.weight": torch.zeros(4, 4, dtype=E4M3),
        "blocks.0.ffn.2.weight": torch.zeros(4, 4, dtype=E4M3),
        "blocks.0.ffn.2.weight_scale": torch.ones(()),
    }, "in fp8 without its scale"),
    "fp8, all scales missing": ({
        "blocks.0.ffn.0.weight": torch.zeros(4, 4, dtype=E4M3), "scaled_fp8": torch.zeros(2),
    }, "in fp8 without its scale"),
    "fp8, two scales": (quantization("weight_scale", torch.float32, (), weight=E4M3)
                        | quantization("scale_weight", torch.float32, (), weight=E4M3),
                        "holds two scales of"),
    "fp8, an odd scale": (quantization("weight_scale", torch.float32, (3,), weight=E4M3),
                          "none per tensor, channel or block"),
    "fp8, an integer scale": (quantization("weight_scale", torch.uint8, (4, 1), weight=E4M3),
                              "none per tensor, channel or block"),
}  # fmt: skip
