"""LoRA files in every form that trainers write, and their merge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from packforcing.checkpoints.lora import LoraSummary, read_lora
from packforcing.checkpoints.lora_formulas import merge_loras
from packforcing.checkpoints.quantized import StoredTensor
from packforcing.checkpoints.reading import tensor_reader
from packforcing.checkpoints.recognition import survey_file
from tests.packforcing.checkpoints.layouts import TINY_SHAPES, diffusers_name

Q = "blocks.7.self_attn.q"


def diffusers_module(module: str) -> str:
    return diffusers_name(f"{module}.weight").removesuffix(".weight")


def flat(module: str) -> str:
    return module.replace(".", "_")


@dataclass(frozen=True)
class Form:
    """How a trainer names the factors of a module: templates for Wan's or diffusers' name."""

    source: str  # who writes it, and where that can be read
    module: str
    factors: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    diffusers: bool = False
    underscored: bool = False

    def name(self, module: str) -> str:
        module = diffusers_module(module) if self.diffusers else module
        return self.module.format(flat(module) if self.underscored else module)


DOWN_UP = ("lora_down.weight", "lora_up.weight")
FORMS = {
    "diffusion_model": Form(
        "diffusion-pipe (models/wan/wan.py), ai-toolkit (wan_lora_convert.py), ComfyUI",
        "diffusion_model.{}"),
    "diffusion_model, down and up": Form(
        "LightX2V (tools/extract/lora_extractor.py), Kijai's CausVid files",
        "diffusion_model.{}", DOWN_UP),
    "transformer, diffusers": Form(
        "diffusers (WanLoraLoaderMixin.save_lora_weights), SimpleTuner",
        "transformer.{}", diffusers=True),
    "transformer, Wan": Form("musubi-tuner (convert_lora.py)", "transformer.{}"),
    "transformer, down and up": Form(
        "OneTrainer (LoRASaverMixin, legacy)", "transformer.{}", DOWN_UP, diffusers=True),
    "bare, diffusers": Form("diffusers (ModelMixin.save_lora_adapter)", "{}", diffusers=True),
    "bare, Wan": Form("OneTrainer (original)", "{}"),
    "base_model.model": Form("PEFT (save_pretrained), LongLive", "base_model.model.{}"),
    "base_model.model, wrapped": Form(
        "PEFT around FSDP", "base_model.model.model._fsdp_wrapped_module.{}"),
    "default adapter": Form(
        "DiffSynth-Studio (utils/lora/general.py)", "{}",
        ("lora_A.default.weight", "lora_B.default.weight")),
    "any adapter": Form(
        "PEFT (state_dict of the model)", "base_model.model.{}",
        ("lora_A.my_adapter.weight", "lora_B.my_adapter.weight")),
    "pipe.dit": Form(
        "DiffSynth-Studio and UniAnimate-DiT, early", "pipe.dit.{}",
        ("lora_A.default.weight", "lora_B.default.weight")),
    "lora_unet": Form(
        "musubi-tuner (networks/lora_wan.py)", "lora_unet_{}", DOWN_UP, underscored=True),
    "lora_unet, two underscores": Form(
        "VideoX-Fun; kijai/ComfyUI-WanVideoWrapper reads it", "lora_unet__{}", DOWN_UP,
        underscored=True),
    "lora_unet, dots": Form(
        "kijai/ComfyUI-WanVideoWrapper, issue 869", "lora_unet_{}", DOWN_UP),
    "lora_transformer": Form(
        "OneTrainer, ai-toolkit (toolkit/lora_special.py)", "lora_transformer_{}", DOWN_UP,
        diffusers=True, underscored=True),
    "lycoris": Form(
        "LyCORIS (wrapper.py), SimpleTuner", "lycoris_{}", DOWN_UP, diffusers=True,
        underscored=True),
    "lycoris, compiled": Form(
        "LyCORIS around torch.compile", "lycoris__orig_mod_{}", DOWN_UP, underscored=True),
    "lora.down": Form(
        "ComfyUI reads it (weight_adapter/lora.py)", "diffusion_model.{}",
        ("lora.down.weight", "lora.up.weight")),
    "lora_linear_layer": Form(
        "ComfyUI and LightX2V read it", "diffusion_model.{}",
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    "no weight": Form("Mochi's trainer; ComfyUI reads it", "{}", ("lora_A", "lora_B")),
}  # fmt: skip


def save_lora(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    config: dict | None = None,
) -> Path:
    """Save a LoRA, with PEFT's config beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


def model_tensors() -> dict[str, StoredTensor]:
    """The tensors of a model at tiny widths, which nothing reads."""
    return {
        f"transformer.{name}": StoredTensor(Path("model"), name, shape, "F32")
        for name, shape in TINY_SHAPES.items()
    }


def merge(
    path: Path,
    weights: dict[str, torch.Tensor],
    alpha: float | None = None,
    strength: float | None = None,
) -> tuple[dict[str, torch.Tensor], LoraSummary]:
    """Merge a LoRA file: the weights that it changes, and the summary."""
    [part] = survey_file(path)
    assert part.role == "LoRA"
    lora = read_lora(path, part.tensors, model_tensors(), alpha, strength)
    readers = {path: tensor_reader(path)}
    merged = {}
    for name, additions in lora.additions.items():
        plain = name.removeprefix("transformer.")
        merged[plain] = merge_loras(name, weights[plain], additions, readers)
    return merged, lora.summary
