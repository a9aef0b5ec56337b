"""The layouts in which models are published, with their full list of tensors, at tiny widths.

They are those of the public training and conversion code.
"""

import json
import re
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from packforcing.app.cli import main
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.fetch import RECORD, FetchedFile
from packforcing.checkpoints.published import PARTS, PUBLISHED, WEIGHTS
from packforcing.config import Precision
from packforcing.errors import CheckpointError
from packforcing.files import file_sha256

TINY = {
    "height": 64, "width": 96, "dim": 24, "heads": 2, "ffn_dim": 16, "freq_dim": 8,
    "text_len": 4, "text_dim": 24, "vae_encoder_width": 8, "vae_decoder_widths": (8, 8, 8, 8),
    "vae_strips": 1, "precision": Precision(),
}  # fmt: skip
LICENSE = "cc-by-4.0, says its model card"  # in the records made here
NARROW = {"vae_encoder_width": 2, "vae_decoder_widths": (8, 8, 4, 2), "vae_strips": 1}  # Wan's
LINEAR = [
    *(f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"), "ffn.0", "ffn.2"
]  # fmt: skip


def wan_shapes(dim=1536, ffn=8960, text=4096, freq=256, layers=30) -> dict[str, tuple[int, ...]]:
    """Wan2.1 T2V-1.3B's state dict, written down from its public definition."""
    linear = {
        "text_embedding.0": (dim, text), "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, freq), "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim), "head.head": (64, dim),
    }  # fmt: skip
    shapes = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }
    for layer in range(layers):
        block = f"blocks.{layer}"
        linear |= {f"{block}.{name}": (dim, dim) for name in LINEAR[:8]}
        linear |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for kind in ("self", "cross"):
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{kind}_attn.{norm}.weight"] = (dim,)
        shapes |= {f"{block}.norm3.{part}": (dim,) for part in ("weight", "bias")}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


TINY_SHAPES = wan_shapes(24, 16, 24, 8)


def diffusers_name(name: str) -> str:
    """Wan's names as diffusers has them: the way its conversion script goes."""
    for wan, theirs in (
        ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
        ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
        ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
        ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
        ("time_projection.1.", "condition_embedder.time_proj."),
        ("head.modulation", "scale_shift_table"),
        ("head.head.", "proj_out."),
        ("modulation", "scale_shift_table"),
        ("self_attn.o.", "attn1.to_out.0."),
        ("cross_attn.o.", "attn2.to_out.0."),
        ("norm3.", "norm2."),
        ("ffn.0.", "ffn.net.0.proj."),
        ("ffn.2.", "ffn.net.2."),
    ):
        name = name.replace(wan, theirs)
    name = re.sub(r"self_attn\.([qkv])\.", r"attn1.to_\1.", name)
    name = re.sub(r"cross_attn\.([qkv])\.", r"attn2.to_\1.", name)
    return name.replace("self_attn.", "attn1.").replace("cross_attn.", "attn2.")


def wan_vae_name(name: str) -> str:
    """diffusers' names as Wan2.1_VAE.pth has them."""
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    name = name.replace("coder.conv_in", "coder.conv1").replace("conv_out", "head.2")
    name = name.replace("norm_out", "head.0").replace("mid_block.attentions.0", "middle.1")
    name = re.sub(
        r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}", name
    ).replace("down_blocks", "downsamples")
    name = re.sub(
        r"up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)",
        lambda match: f"upsamples.{4 * int(match[1]) + int(match[2] or 3)}",
        name,
    )
    if "resample" in name or "time_conv" in name or "middle.1." in name:
        return name
    layers = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}
    return re.sub(
        r"((?:samples|middle)\.\d+)\.(norm1|conv1|norm2|conv2)",
        lambda match: f"{match[1]}.residual.{layers[match[2]]}",
        name,
    ).replace("conv_shortcut", "shortcut")


def prefixed(tensors, prefix="model."):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def other(tensors):
    """Weights that must not be the ones taken."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


def save(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def lora(rank=2, alpha=None, layers=30):
    """A LoRA on every linear layer of every block, in PEFT's names."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer in range(layers):
        for name in LINEAR:
            out, inside = TINY_SHAPES[f"blocks.{layer}.{name}.weight"]
            module = f"base_model.model.blocks.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inside, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
            if alpha is not None:
                tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def self_forcing(folder, w):
    critic = {"model.head.head.bias": w["head.head.bias"]}
    content = {"generator": other(prefixed(w)), "generator_ema": prefixed(w), "critic": critic}
    return [save(folder / "self_forcing_dmd.pt", content)]


def causvid(folder, w):
    content = {"generator": prefixed(w), "critic": other(prefixed(w)), "step": 3}
    return [save(folder / "autoregressive_checkpoint" / "model.pt", content)]


def causal_forcing(folder, w):
    content = {"generator": prefixed(w, "model._fsdp_wrapped_module.")}
    return [save(folder / "chunkwise" / "causal_forcing.pt", content)]


def framewise(name):
    def layout(folder, w):
        content = {"generator": other(prefixed(w)), "generator_ema": prefixed(w)}
        return [save(folder / name, content)]

    return layout


def longlive(folder, w):
    """The base holds what the LoRA is to be added to: here W - B A, so that all give `w`."""
    adapter = lora(layers=sum(name.endswith("ffn.0.bias") for name in w))
    base = dict(w)
    for name in adapter:
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            added = adapter[f"{module}.lora_B.weight"] @ adapter[name]
            weight = f"{module.removeprefix('base_model.model.')}.weight"
            base[weight] = base[weight] - added
    return [
        save(folder / "longlive_base.pt", {"generator": prefixed(base)}),
        save(folder / "lora.pt", {"critic_lora": other(adapter), "generator_lora": adapter}),
    ]


def infinity_rope(folder, w):
    return [save(folder / "checkpoints" / "ema_model.pt", {"generator_ema": prefixed(w)})]


def packforcing_unofficial(folder, w):
    pack = {
        f"pack_compressor.net.{i}.{part}": torch.zeros(2)
        for i in (0, 2, 4, 6)
        for part in ("weight", "bias")
    }
    content = {"generator": other(prefixed(w)), "generator_ema": prefixed(w | pack)}
    return [save(folder / "mine.pt", content)]


def base_original(folder, w):
    save_file(w, folder / "diffusion_pytorch_model.safetensors")
    return [folder / "diffusion_pytorch_model.safetensors"]


def base_diffusers(folder, w):
    save_file({diffusers_name(name): t for name, t in w.items()}, folder / "model.safetensors")
    return [folder]


def base_diffusers_sharded(folder, w):
    tensors = [(diffusers_name(name), tensor) for name, tensor in w.items()]
    weight_map = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00003.safetensors"
        part = dict(tensors[number::3])
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [index]


def rolling_forcing(folder, w):
    wrapped = {
        "model." + name.replace("blocks.", "_fsdp_wrapped_module.blocks."): tensor
        for name, tensor in w.items()
    }
    content = {"generator": other(prefixed(w)), "generator_ema": wrapped}
    return [save(folder / "rolling_forcing_dmd.pt", content)]


def causvid_4step(folder, w):
    content = {"generator": prefixed(w), "critic": other(prefixed(w)), "step": 3}
    return [save(folder / "autoregressive_checkpoint_warp_4step_cfg2" / "model.pt", content)]


LAYOUTS = {
    "self-forcing": self_forcing,
    "self-forcing-sid": framewise("checkpoints/self_forcing_sid.pt"),
    "self-forcing-sid-v2": framewise("checkpoints/self_forcing_sid_v2.pt"),
    "self-forcing-gan": framewise("checkpoints/self_forcing_gan.pt"),
    "self-forcing-10s": framewise("checkpoints/self_forcing_10s.pt"),
    "causvid": causvid,
    "causvid-4step": causvid_4step,
    "causal-forcing": causal_forcing,
    "causal-forcing-frame": framewise("framewise/causal_forcing.pt"),
    "causal-forcing-frame-2step": framewise("causal-forcing++/framewise-2step.pt"),
    "causal-forcing-frame-1step": framewise("causal-forcing++/framewise-1step.pt"),
    "causal-forcing-long": framewise("chunkwise/longvideo.pt"),
    "longlive": longlive,
    "infinity-rope": infinity_rope,
    "packforcing-unofficial": packforcing_unofficial,
    "wan2.1-t2v-1.3b": base_original,
    "rolling-forcing": rolling_forcing,
}
CASES = [
    *LAYOUTS.items(),
    ("wan2.1-t2v-1.3b", base_diffusers),
    ("wan2.1-t2v-1.3b", base_diffusers_sharded),
]


def imported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def record_fetched(files, name, folder: Path) -> None:
    """What `fetch NAME` leaves beside the files, which it fetched into a folder."""
    row = {**PUBLISHED, **PARTS}[name]
    record = {}
    for file in files:
        record[file.relative_to(folder).as_posix()] = FetchedFile(
            bytes=file.stat().st_size, sha256=file_sha256(file), source=row.source,
            revision="0123456789abcdef", license=LICENSE,
        )  # fmt: skip
    (folder / RECORD).write_bytes(msgspec.json.encode(record))


def run_command(*args) -> str:
    """Runs the command line, which is to succeed; its output."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def assert_refused(files, tmp_path, message, kind="self-forcing", **options):
    with pytest.raises(CheckpointError, match=message) as raised:
        import_checkpoint(files, tmp_path / "model", kind=kind, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model").exists()
