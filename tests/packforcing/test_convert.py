"""Published checkpoints into model folders: each layout with its full list of tensors, at tiny
widths, and what is refused. The layouts are those of the public training and conversion code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from packforcing import MODELS, model_config
from packforcing.app.cli import main
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.fetch import RECORD
from packforcing.checkpoints.published import (
    DESCRIPTION,
    PUBLISHED,
    WEIGHTS,
    published_config,
    read_model_folder,
)
from packforcing.config import Precision
from packforcing.embeddings import Embedding, save_embedding
from packforcing.errors import CheckpointError, OutputError
from packforcing.model import load_model, open_weights, random_weights, weight_shapes
from packforcing.presets import AUTOENCODERS, PAPER, policies, with_autoencoder
from packforcing.reference import rollout
from packforcing.rope import block_positions, rope_table
from packforcing.runtime.backends import open_backend
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.cache import Cache
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import draw_noise
from packforcing.transformer import patchify, unpatchify
from tests.helpers import frames_of

TINY = {
    "height": 64, "width": 96, "dim": 24, "heads": 2, "ffn_dim": 16, "freq_dim": 8,
    "text_len": 4, "text_dim": 24, "vae_encoder_width": 8, "vae_decoder_widths": (8, 8, 8, 8),
    "vae_strips": 1, "precision": Precision(),
}  # fmt: skip
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


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Every published model at tiny widths, with all of its layers."""
    for kind in PUBLISHED:
        config = msgspec.structs.replace(published_config(kind), **TINY)
        monkeypatch.setitem(MODELS, kind, config)
    tiny = {name: size for name, size in TINY.items() if name.startswith("vae_")}
    for name, sizes in (("taehv", tiny), ("lighttae", tiny), ("wan", NARROW)):
        monkeypatch.setitem(AUTOENCODERS, name, sizes)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A transformer in Wan's names."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.2 * torch.randn(shape, generator=generator) for name, shape in TINY_SHAPES.items()
    }


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory) -> Path:
    """The tiny autoencoder's weights in float16, as TAEHV publishes them."""
    config = msgspec.structs.replace(PAPER, **TINY)
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    tensors = random_weights(config)
    torch.save(
        {
            name.removeprefix("autoencoder."): tensors[name].half()
            for name in tensors
            if name.startswith("autoencoder.")
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def wan_vae() -> dict[str, torch.Tensor]:
    """Wan's autoencoder in diffusers' names."""
    config = msgspec.structs.replace(PAPER, **TINY | NARROW, vae="wan")
    tensors = random_weights(config)
    return {
        name.removeprefix("autoencoder."): tensors[name]
        for name in tensors
        if name.startswith("autoencoder.")
    }


def wan_vae_name(name: str) -> str:
    """diffusers' names as Wan2.1_VAE.pth has them."""
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    name = name.replace("coder.conv_in", "coder.conv1").replace("conv_out", "head.2")
    name = name.replace("norm_out", "head.0").replace("mid_block.attentions.0", "middle.1")
    name = re.sub(
        r"mid_block\.resnets\.(\d)", lambda found: f"middle.{2 * int(found[1])}", name
    ).replace("down_blocks", "downsamples")
    name = re.sub(
        r"up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)",
        lambda found: f"upsamples.{4 * int(found[1]) + int(found[2] or 3)}",
        name,
    )
    if "resample" in name or "time_conv" in name or "middle.1." in name:
        return name
    layers = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}
    return re.sub(
        r"((?:samples|middle)\.\d+)\.(norm1|conv1|norm2|conv2)",
        lambda found: f"{found[1]}.residual.{layers[found[2]]}",
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


LAYOUTS = {
    "self-forcing": self_forcing,
    "causvid": causvid,
    "causal-forcing": causal_forcing,
    "causal-forcing-frame": framewise("framewise/causal_forcing.pt"),
    "causal-forcing-frame-2step": framewise("causal-forcing++/framewise-2step.pt"),
    "causal-forcing-frame-1step": framewise("causal-forcing++/framewise-1step.pt"),
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


def test_the_list_of_tensors_is_wans():
    """825 tensors, 1,418,996,800 parameters; checked against our own without allocating one."""
    shapes = wan_shapes()
    assert len(shapes) == 825 and sum(map(prod, shapes.values())) == 1_418_996_800
    ours = weight_shapes(PAPER)
    assert {f"transformer.{name}": shape for name, shape in shapes.items()} == {
        name: shape for name, shape in ours.items() if name.startswith("transformer.")
    }
    added = sum(256 * sum(shapes[f"blocks.0.{name}.weight"]) for name in LINEAR) * 30
    assert added == 349_962_240  # LongLive's LoRA of rank 256


def test_names_are_those_that_diffusers_itself_has():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs == {diffusers_name(name): shape for name, shape in wan_shapes().items()}


def test_a_block_is_that_of_diffusers_own_transformer(tiny_autoencoder, tmp_path):
    """Saved by diffusers with random weights in every tensor, imported here, and asked the same:
    the flow of one block with no history is that of a clip whose frames share a timestep."""
    diffusers = pytest.importorskip("diffusers")
    kind = "wan2.1-t2v-1.3b"
    config = model_config(kind)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        num_layers=config.layers, ffn_dim=config.ffn_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(6)
    for name, tensor in theirs.state_dict().items():  # norms too, whose weights begin as ones
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    import_checkpoint([tmp_path / "theirs", tiny_autoencoder], tmp_path / "model", kind=kind)
    ours = load_model(config, tmp_path / "model" / WEIGHTS).transformer

    frames = config.block_frames, config.latent_channels, *config.latent_size
    latents = torch.randn(1, *frames, generator=generator)
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    rope = tuple(map(torch.from_numpy, rope_table(block_positions(config, 0), config.head_dim)))
    empty = torch.zeros(1, config.heads, 0, config.head_dim)
    nothing = [(empty, empty)] * config.layers, tuple(table[:0] for table in rope)
    for timestep in (torch.tensor([937.5]), torch.tensor([0.0])):
        with torch.no_grad():
            wanted = theirs(latents.transpose(1, 2), timestep, text).sample.transpose(1, 2)
            flow, *_ = ours(
                patchify(latents, config.patch), torch.zeros(()), timestep, ours.cross_kv(text),
                rope, *nothing,
            )  # fmt: skip
        assert 0.3 < wanted.std() < 30
        found = unpatchify(flow, config.grid, config.patch)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_every_published_model_has_a_layout_here():
    assert set(LAYOUTS) == set(PUBLISHED)


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[layout.__name__ for _, layout in CASES])
def test_layouts_are_recognised_and_give_the_same_weights(
    kind, layout, weights, tiny_autoencoder, tmp_path
):
    """The names alone, no option; entries that are not run are left alone."""
    files = layout(tmp_path, weights)
    done = import_checkpoint([*files, tiny_autoencoder], tmp_path / "model")

    assert done.folder.kind == kind and done.tensors == 825 + 128
    assert done.folder.config == model_config(kind)
    found = imported(tmp_path / "model")
    for name, tensor in weights.items():
        atol = 1e-5 if kind == "longlive" else 0  # W - B A + B A, in float32
        torch.testing.assert_close(found[f"transformer.{name}"], tensor, atol=atol, rtol=0)
    given = torch.load(tiny_autoencoder, weights_only=True)
    for name, tensor in given.items():
        assert tensor.dtype == torch.float16 and found[f"autoencoder.{name}"].equal(tensor)
    assert len(open_weights(done.folder.config, tmp_path / "model" / WEIGHTS)) == 825 + 128

    if PUBLISHED[kind].refused:
        with pytest.raises(CheckpointError, match=PUBLISHED[kind].refused):
            read_model_folder(tmp_path / "model")
    else:
        assert read_model_folder(tmp_path / "model") == done.folder


def test_what_tensors_cannot_tell_the_caller_must(weights, tmp_path):
    path = save(tmp_path / "mine.pt", {"generator": prefixed(weights)})
    with pytest.raises(CheckpointError, match=r"do not say which: name it with --kind.*causvid"):
        import_checkpoint([path], tmp_path / "model")
    done = import_checkpoint([path], tmp_path / "model", kind="causal-forcing")
    assert (done.folder.kind, done.folder.autoencoder) == ("causal-forcing", False)
    with pytest.raises(CheckpointError, match=r"no autoencoder: .*mine.pt taew2_1"):
        read_model_folder(tmp_path / "model")


def test_entry_chooses_another_entry_than_the_published_one(weights, tmp_path):
    [path] = self_forcing(tmp_path, weights)
    import_checkpoint([path], tmp_path / "model", entry="generator")
    found = imported(tmp_path / "model")["transformer.head.head.bias"]
    assert found.equal(weights["head.head.bias"] + 1)


def wan_vae_file(folder, tensors, naming=wan_vae_name):
    """As Wan publishes it, one torch checkpoint; or with diffusers' names in its folder."""
    if naming is wan_vae_name:
        return save(folder / "Wan2.1_VAE.pth", {naming(n): t for n, t in tensors.items()})
    (folder / "vae").mkdir()
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder / "vae"


@pytest.mark.parametrize("naming", [wan_vae_name, str], ids=["Wan's names", "diffusers' names"])
def test_wans_autoencoder_is_recognised_by_its_tensors(naming, weights, wan_vae, tmp_path):
    """Names written down from the published checkpoint, which has 194 tensors."""
    if naming is wan_vae_name:
        named = {naming(name) for name in wan_vae}
        assert len(named) == 194 and {
            "conv1.weight", "conv2.bias", "encoder.conv1.weight", "decoder.head.2.weight",
            "encoder.downsamples.3.shortcut.weight", "encoder.downsamples.5.time_conv.weight",
            "encoder.downsamples.2.resample.1.weight", "encoder.middle.1.to_qkv.weight",
            "decoder.middle.2.residual.6.weight", "decoder.upsamples.4.shortcut.bias",
            "decoder.upsamples.7.time_conv.bias", "decoder.upsamples.11.resample.1.weight",
            "decoder.upsamples.14.residual.3.gamma", "decoder.head.0.gamma",
        } <= named  # fmt: skip
    files = [*self_forcing(tmp_path, weights), wan_vae_file(tmp_path, wan_vae, naming)]
    done = import_checkpoint(files, tmp_path / "model")
    assert done.folder.config == with_autoencoder(model_config("self-forcing"), "wan")
    assert done.folder.autoencoder and done.tensors == 825 + 194
    assert "the autoencoder is wan-vae, licence of its weights: Apache-2.0" in done.said
    found = imported(tmp_path / "model")
    assert all(found[f"autoencoder.{name}"].equal(tensor) for name, tensor in wan_vae.items())
    assert len(open_weights(done.folder.config, tmp_path / "model" / WEIGHTS)) == 825 + 194


def test_a_damaged_autoencoder_is_refused_by_name(weights, wan_vae, tmp_path):
    damaged = dict(wan_vae)
    del damaged["decoder.conv_in.weight"], damaged["encoder.mid_block.resnets.0.norm1.gamma"]
    damaged |= {"decoder.up_blocks.0.upsamplers.0.time_conv.bias": torch.zeros(3)}
    files = [*self_forcing(tmp_path, weights), wan_vae_file(tmp_path, damaged)]
    refused(
        files, tmp_path,
        r"\(2 missing, 1 misshaped\): missing autoencoder.encoder.mid_block.resnets.0.norm1.gamma; "
        r"missing autoencoder.decoder.conv_in.weight; misshaped "
        r"autoencoder.decoder.up_blocks.0.upsamplers.0.time_conv.bias: \(3,\), not \(16,\)",
    )  # fmt: skip
    twice = {**wan_vae, "conv1.bias": wan_vae["quant_conv.bias"].clone()}
    path = wan_vae_file(tmp_path, twice, str)
    refused([files[0], path], tmp_path, "holds .*twice, under two names")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("taew2_1.pth", {}, "taehv"),
        ("lighttaew2_1.pth", {}, "lighttae"),
        ("mine.pth", {"vae": "lighttae"}, "lighttae"),
        ("mine.pth", {}, "do not say for latents of which scale: name it with --vae"),
        ("taew2_1.pth", {"vae": "wan"}, "is no 'wan' by its tensors, but taehv or lighttae"),
    ],
)
def test_the_tiny_autoencoders_differ_by_name_alone(
    name, options, expected, weights, tiny_autoencoder, tmp_path
):
    shutil.copy(tiny_autoencoder, tmp_path / name)
    files = [*self_forcing(tmp_path, weights), tmp_path / name]
    if " " in expected:
        refused(files, tmp_path, expected, **options)
    else:
        done = import_checkpoint(files, tmp_path / "model", **options)
        assert done.folder.config == with_autoencoder(model_config("self-forcing"), expected)


def test_two_autoencoders_are_one_too_many(weights, wan_vae, tiny_autoencoder, tmp_path):
    files = [*self_forcing(tmp_path, weights), tiny_autoencoder, wan_vae_file(tmp_path, wan_vae)]
    refused(files, tmp_path, "are two autoencoders: name one")


# From a checkpoint to a video


@pytest.mark.parametrize("layers", [1, pytest.param(30, marks=pytest.mark.full)])
def test_an_imported_checkpoint_exports_and_renders_training_free(
    layers, tiny_autoencoder, tmp_path, monkeypatch
):
    """Self-Forcing's file under PackForcing's policy: the runtime gives what the reference does
    on the weights in the file, and what is read has gone through the low branch. The prompts are
    the demo's: UMT5 would be larger than all else here."""
    config = msgspec.structs.replace(MODELS["self-forcing"], layers=layers, text_encoder="words")
    monkeypatch.setitem(MODELS, "self-forcing", config)
    drawn = random_weights(config, seed=5)
    weights = {
        name.removeprefix("transformer."): drawn[name]
        for name in drawn
        if name.startswith("transformer.")
    }
    files = [*self_forcing(tmp_path, weights), tiny_autoencoder]
    run("import-checkpoint", *files, "--out", tmp_path / "model")
    bundle = tmp_path / "bundle"
    stated = run("export", "--weights", tmp_path / "model", "--out", bundle)
    assert "compressed" not in stated  # its own policy keeps a window
    stated = run("render", "a red star", "--bundle", bundle, "--policy", "packforcing",
                 "--seconds", 0.5, "--out", tmp_path / "star.mp4")  # fmt: skip
    assert "no compressor: past blocks are compressed training-free" in stated

    manifest = read_manifest(bundle)
    assert manifest.config == config
    policy = msgspec.structs.replace(policies(config)["packforcing"], sink=1, mid=2, recent=1)
    config = msgspec.structs.replace(  # and CausVid's schedule, with another for the first block
        config, policy=policy, timesteps=(1000, 522), first_timesteps=(1000, 757, 522),
        warp=False, shift=8.0,
    )  # fmt: skip
    model = load_model(config, tmp_path / "model" / WEIGHTS)
    assert model.transformer.state_dict()["head.head.weight"].equal(weights["head.head.weight"])
    text = np.random.default_rng(0).standard_normal((1, 4, 24), np.float32)
    backend = open_backend("onnxruntime", bundle, manifest, config, 1)
    runtime = Rollout(config, backend)
    runtime.begin(text, 6, seed=9)
    noise = partial(draw_noise, config, 9)
    for block in rollout(model, torch.from_numpy(text), 6, noise, seed=9):
        assert sorted(runtime.cache.mids) == block.read
        runtime.next_block()
        pixels = runtime.buffers.pixels.host[0]
        np.testing.assert_allclose(pixels, block.frames.numpy(), atol=1e-3)
    assert len(block.read) == 2 and block.frames.std() > 0.01
    backend.close()


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind, row in PUBLISHED.items() if not row.refused])
def test_every_layout_exports_and_renders(kind, tiny_autoencoder, tmp_path, monkeypatch):
    """With every one of its layers; under its own policy and under PackForcing's."""
    config = msgspec.structs.replace(MODELS[kind], text_encoder="words")
    monkeypatch.setitem(MODELS, kind, config)
    shapes = wan_shapes(24, 16, 24, 8, config.layers)
    whole = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    model, bundle, out = tmp_path / "model", tmp_path / "bundle", tmp_path / "star.mkv"
    run("import-checkpoint", *LAYOUTS[kind](tmp_path, whole), tiny_autoencoder, "--out", model)
    run("export", "--weights", model, "--out", bundle)
    frames = 6 * config.block_pixel_frames
    asked = "a red star", "--bundle", bundle, "--seconds", frames / config.fps, "--out", out
    for policy in ((), ("--policy", "packforcing")):
        did = json.loads(run("render", *asked, "--json", *policy))
        assert did["frames"] == frames
        assert did["training_free"] == (bool(policy) or config.policy.mid > 0)
        pixels = frames_of(out)
        assert len(pixels) == frames and pixels.std() > 0.01 * 255


@pytest.mark.full
def test_the_lines_for_an_8_gb_card_lead_to_a_video(tiny_autoencoder, tmp_path, monkeypatch):
    """Those of docs/checkpoints.md, in order, with two layers in fp16. What the hub and UMT5 would
    give is here already, ONNX Runtime stands for the card, and engines are not built: the builder
    takes no matrices as narrow as these, and the real ones are `test_engines`'s."""
    precision = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(MODELS["self-forcing"], layers=2, precision=precision)
    monkeypatch.setitem(MODELS, "self-forcing", config)
    monkeypatch.chdir(tmp_path)
    whole = {name: 0.2 * torch.randn(shape) for name, shape in wan_shapes(24, 16, 24, 8, 2).items()}
    self_forcing(tmp_path, whole)
    (tmp_path / "downloads" / "taew2_1").mkdir(parents=True)
    shutil.copy(tiny_autoencoder, "downloads/taew2_1")
    text = np.random.default_rng(0).standard_normal((3, config.text_dim), np.float32)
    save_embedding("cat.safetensors", Embedding(text, "a cat walks on the beach", "umt5", "0" * 64))
    Path("prompts.txt").write_text("cat.safetensors\n")

    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    section = page.partition("on an 8 GB GPU\n")[2].partition("\n## ")[0]
    (lines,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    commands = [shlex.split(line)[1:] for line in lines.replace("\\\n", "").splitlines()
                if line.startswith("packforcing ")]  # fmt: skip
    assert len(commands) == 11
    for name, *args in commands:
        if name in ("fetch", "encode-prompt", "build"):
            main.get_command(None, name).make_context(name, args)  # parses, does not run
        else:
            here = {"tensorrt-rtx": "onnxruntime", "320x192": "80x112", "60": "4"}
            run(name, *(here.get(arg, arg) for arg in args))
    bundle = read_manifest("eight")
    assert bundle.config.precision == msgspec.structs.replace(precision, cache="int8")
    assert bundle.config.policy == policies(config)["packforcing"]
    assert len(frames_of(Path("cat.mp4"))) == 4 * config.fps


def run(*args) -> str:
    """Runs the command line, which is to succeed; its output."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_says_what_it_found(weights, tmp_path):
    files = longlive(tmp_path, weights)
    said = run("import-checkpoint", *files, "--out", tmp_path / "model")
    for part in (
        "longlive_base.pt: transformer, 825 tensors of 'generator', torch checkpoint",
        "lora.pt: LoRA, 600 tensors of 'generator_lora' (not critic_lora), torch checkpoint",
        "LoRA merged into 300 weights at scale 1",
        "longlive (its LoRA is a 'generator_lora'), 825 tensors",
        "license of the weights: Apache-2.0",
        "no autoencoder in it",
    ):
        assert part in said
    asked = CliRunner().invoke(
        main, ["export", "--weights", str(tmp_path / "model"), "--out", str(tmp_path / "b")]
    )
    assert (asked.exit_code, asked.stdout) == (2, "") and "no autoencoder" in asked.stderr
    said = run("import-checkpoint", *base_original(tmp_path, weights), "--out", tmp_path / "base")
    assert "weights only, wan2.1-t2v-1.3b cannot be rendered" in said
    table = json.loads(run("models", "--json"))
    assert set(table) == set(PUBLISHED) and table["longlive"]["config"]["shift"] == 5
    assert all(kind in run("models") for kind in PUBLISHED)


# The published windows


def read(kind: str, block: int) -> tuple[list[int], list[float], float]:
    """The frames a block has in context, where they are put, and where its own first frame is."""
    cache = Cache(model_config(kind))
    for _ in range(block):
        cache.commit()
    layout, size = cache.layout(), cache.config.block_frames
    slots = sorted(layout.slots)
    frames = [slot.block * size + frame for slot in slots for frame in range(size)]
    places = [slot.start + frame for slot in slots for frame in range(size)]
    return frames, places, layout.start


def test_published_windows():
    """Self-Forcing rolls 21 frames with the current 3; LongLive keeps 12, the first 3 for ever;
    a frame-wise model 21 with the current one. All at their true positions."""
    frames, places, start = read("self-forcing", 10)  # frames 30, 31, 32
    assert frames == places == list(range(12, 30)) and start == 30
    frames, places, start = read("self-forcing", 6)  # nothing has left: CausVid's whole clip
    assert frames == places == list(range(18)) and start == 18
    frames, places, start = read("longlive", 10)
    assert frames == places == [0, 1, 2, 24, 25, 26, 27, 28, 29] and start == 30
    frames, places, start = read("causal-forcing-frame", 50)
    assert frames == places == list(range(30, 50)) and start == 50


def test_infinity_rope_counts_positions_within_its_window():
    """A block of sink and one of window, where it publishes 1 and 2 frames; then the new block."""
    frames, places, start = read("infinity-rope", 10)
    assert frames == [0, 1, 2, 27, 28, 29] and places == [0, 1, 2, 3, 4, 5] and start == 6


@pytest.mark.parametrize("kind", [kind for kind, row in PUBLISHED.items() if not row.refused])
def test_every_model_runs_under_the_other_policies(kind):
    """StreamingLLM's keeps first and last, at positions within the cache; the engines of a bundle
    are made for a policy, so exporting and planning take its name as well."""
    policy = policies(model_config(kind))["sink-window"]
    assert policy.sink and not policy.mid and policy.recent and policy.positions == "packed"
    planned = run("plan", "--model", kind, "--policy", "packforcing", "--size", "832x480")
    assert re.search(r" [1-9] sink, 16 mid and [1-9] recent blocks", planned)


# LoRAs


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (None, None, 6.0),  # as LongLive's: alpha is its rank, the scale is 1
        (None, 4.0, 12.0),  # 4 / 2
        (1.0, 4.0, 3.0),  # its own alpha goes first: 1 / 2
    ],
)
def test_a_lora_adds_alpha_over_rank_times_b_a(own, given, expected, weights, tmp_path):
    """Rank 2; A has a 2 at [0, 1] and B a 3 at [0, 0], so that B A has a 6 at [0, 1] alone."""
    down, up = torch.zeros(2, 24), torch.zeros(24, 2)
    down[0, 1], up[0, 0] = 2, 3
    module = "blocks.7.self_attn.q"
    adapter = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    if own is not None:
        adapter[f"{module}.alpha"] = torch.tensor(own)
    save_file(adapter, tmp_path / "style.safetensors")
    files = [*self_forcing(tmp_path, weights), tmp_path / "style.safetensors"]
    import_checkpoint(files, tmp_path / "model", lora_alpha=given)

    found = imported(tmp_path / "model")
    changed = found[f"transformer.{module}.weight"] - weights[f"{module}.weight"]
    assert changed[0, 1].item() == pytest.approx(expected, abs=1e-6)
    changed[0, 1] = 0
    assert not changed.any()
    rest = set(weights) - {f"{module}.weight"}
    assert all(found[f"transformer.{name}"].equal(weights[name]) for name in rest)


def test_a_lora_that_does_not_fit_is_refused_by_name(weights, tmp_path):
    adapter = lora(layers=2)
    adapter["base_model.model.blocks.0.ffn.0.lora_A.weight"] = torch.zeros(2, 7)
    adapter["base_model.model.blocks.99.ffn.0.lora_A.weight"] = torch.zeros(2, 24)
    adapter["base_model.model.blocks.0.ffn.2.alpha"] = torch.zeros(2)
    del adapter["base_model.model.blocks.1.ffn.2.lora_B.weight"]
    files = [*self_forcing(tmp_path, weights), save(tmp_path / "lora.pt", adapter)]
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(files, tmp_path / "model", kind="self-forcing")
    for part in (
        "1 missing, 1 unexpected, 2 misshaped",
        "missing blocks.1.ffn.2.B",
        "unexpected blocks.99.ffn.0.A",
        "misshaped blocks.0.ffn.0.A: (2, 7)",
        "misshaped blocks.0.ffn.2.alpha",
    ):
        assert part in str(caught.value)


def one_lora(path, down, up, **more) -> Path:
    """On one of the weights [24, 24], of rank 1."""
    names = {"lora_A.weight": down, "lora_B.weight": up, **more}
    save_file({f"blocks.7.self_attn.q.{name}": tensor for name, tensor in names.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_lora_in_a_format_that_cannot_be_merged_is_refused(dtype, weights, tmp_path):
    adapter = torch.ones(1, 24).to(dtype), torch.ones(24, 1).to(dtype)
    files = [*self_forcing(tmp_path, weights), one_lora(tmp_path / "lora.safetensors", *adapter)]
    refused(files, tmp_path, "lora.safetensors holds .* and F32, F16, BF16 can be read")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(alpha, weights, tmp_path):
    adapter, path = (torch.ones(1, 24), torch.ones(24, 1)), tmp_path / "lora.safetensors"
    files = [*self_forcing(tmp_path, weights), one_lora(path, *adapter)]
    refused(files, tmp_path, f"alpha of blocks.7.self_attn.q in .* is {alpha}", lora_alpha=alpha)
    one_lora(path, *adapter, alpha=torch.tensor(alpha))
    refused(files, tmp_path, f"alpha of blocks.7.self_attn.q in .* is {alpha}")


def test_a_lora_that_overflows_the_weights_format_is_refused(weights, tmp_path):
    """float16 ends at 65504."""
    halves = {name: tensor.half() for name, tensor in weights.items()}
    adapter = one_lora(tmp_path / "lora.safetensors", torch.ones(1, 24), torch.ones(24, 1))
    files = [*self_forcing(tmp_path, halves), adapter]
    refused(files, tmp_path, "transformer.blocks.7.self_attn.q.weight holds .* finite in F16",
            lora_alpha=65600.0)  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    import_checkpoint(files, tmp_path / "model", lora_alpha=65000.0)


# What is refused


class Code:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(files, tmp_path, message, **options):
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(files, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_missing_extra_and_misshaped_tensors_are_named_ten_of_them(weights, tmp_path):
    damaged = dict(weights)
    for layer in range(8):
        del damaged[f"blocks.{layer}.norm3.bias"]
    damaged["blocks.0.img_emb.weight"] = torch.zeros(2)
    damaged |= {f"blocks.{layer}.ffn.0.weight": torch.zeros(3, 24) for layer in range(4)}
    path = save(tmp_path / "self_forcing_dmd.pt", {"generator_ema": prefixed(damaged)})
    refused(
        [path], tmp_path,
        r"8 missing, 1 unexpected, 4 misshaped.*missing transformer.blocks.0.norm3.bias.*"
        r"unexpected transformer.blocks.0.img_emb.weight; misshaped transformer.blocks.0.ffn.0"
        r".weight: \(3, 24\), not \(16, 24\) and 3 more$",
    )  # fmt: skip


@pytest.mark.parametrize("layout", [self_forcing, base_original])
def test_a_truncated_file_is_refused(layout, weights, tmp_path):
    [path] = layout(tmp_path, weights)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, 100, 3, 0):
        path.write_bytes(whole[:kept])
        refused([path], tmp_path, f"cannot read .*{path.name}, which is damaged")


def test_a_pickle_with_code_in_it_is_refused_and_not_run(weights, tmp_path):
    marker = tmp_path / "was-run"
    content = {"generator_ema": prefixed(weights), "config": Code(marker)}
    path = save(tmp_path / "self_forcing_dmd.pt", content)
    refused([path], tmp_path, r"would run code when loaded \((posix|nt).mkdir\)")
    path.write_bytes(pickle.dumps(content))
    refused([path], tmp_path, "is a bare pickle")
    torch.save(content, path, _use_new_zipfile_serialization=False)
    refused([path], tmp_path, "is a bare pickle")
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"R.",  # calls, with nothing to call
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.",
        b"ctorch._utils\n_rebuild_parameter\n(K\x01K\x02K\x03tR.",
        b"ccollections\nOrderedDict\n(K\x01tR.",
        b"ctorch\nSize\n(X\x01\x00\x00\x00atR.",
        b"K\x01Q.",  # a storage whose name is a number
        b"}(]K\x01u.",  # a list as a key
    ],
)
def test_a_pickle_that_is_no_checkpoints_is_refused(pickled, tmp_path):
    """Within what torch may call, with arguments that it does not take."""
    whole, path = save(tmp_path / "whole.pt", {"a": torch.zeros(2)}), tmp_path / "odd.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            content = b"\x80\x02" + pickled if name.endswith("data.pkl") else source.read(name)
            copy.writestr(name, content)
    refused([path], tmp_path, "cannot read .*odd.pt, which is damaged or no torch checkpoint")


def test_names_and_indices_of_no_model_are_refused(tmp_path):
    save_file({"decoder.upsamples.foo.x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    refused([tmp_path / "odd.safetensors"], tmp_path, "none of what is read here.*upsamples.foo")
    index = tmp_path / "deep.safetensors.index.json"
    index.write_text("[" * 100_000)
    refused([index], tmp_path, "is not the index of a sharded checkpoint")


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[layout.__name__ for _, layout in CASES])
def test_every_damage_to_every_layout_is_refused_by_name(kind, layout, tmp_path, monkeypatch):
    """With two layers, as two have every kind of tensor."""
    config = msgspec.structs.replace(model_config(kind), layers=2)
    monkeypatch.setitem(MODELS, kind, config)
    whole = {name: torch.ones(shape) for name, shape in wan_shapes(24, 16, 24, 8, 2).items()}
    lacking = {name: tensor for name, tensor in whole.items() if name != "blocks.1.norm3.bias"}
    misshaped = whole | {"blocks.1.modulation": torch.ones(1, 5, 24)}
    images = whole | {"blocks.1.cross_attn.k_img.weight": torch.ones(24, 24)}  # image to video
    for number, (weights, message) in enumerate((
        (lacking, r"\(1 missing\): missing transformer.blocks.1.norm3.bias"),
        (misshaped, r"\(1 misshaped\): misshaped transformer.blocks.1.modulation: \(1, 5, 24\)"),
        (images, r"\(1 unexpected\): unexpected transformer.blocks.1.cross_attn.k_img.weight"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        refused(layout(folder, weights), tmp_path, message, kind=kind)

    (tmp_path / "whole").mkdir()
    files = layout(tmp_path / "whole", whole)
    pack, wrong = "packforcing-unofficial", r"has no entry 'generator_ema'|8 missing.*pack_compr"
    if kind == pack:  # without an entry of a name, which is the base model's
        pack, wrong = "wan2.1-t2v-1.3b", "is divided into 'generator', 'generator_ema'"
    monkeypatch.setitem(MODELS, pack, msgspec.structs.replace(model_config(pack), layers=2))
    refused(files, tmp_path, wrong, kind=pack)
    for path in (tmp_path / "whole").rglob("*.*"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        refused(files, tmp_path, rf"{path.name}.*(which is damaged|is not the index)", kind=kind)
        marker = tmp_path / "was-run"
        if path.suffix != ".json":
            torch.save({"generator": {"model.head": torch.ones(2)}, "step": Code(marker)}, path)
            refused(files, tmp_path, rf"{path.name} would run code when loaded", kind=kind)
        assert not marker.exists()
        path.write_bytes(content)
    import_checkpoint(files, tmp_path / "model", kind=kind)


def test_a_header_as_long_as_a_pickle_begins_is_safetensors(weights, tmp_path):
    """safetensors begins with its header's length, whose first byte may be a pickle's."""
    path = tmp_path / "model.safetensors"
    for padding in range(0, 256, 8):
        save_file(weights, path, {"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    done = import_checkpoint([path], tmp_path / "model", kind="wan2.1-t2v-1.3b")
    assert path.read_bytes()[:1] == b"\x80" and done.tensors == 825


def test_a_shard_that_is_not_there_is_named(weights, tmp_path):
    [index] = base_diffusers_sharded(tmp_path, weights)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    refused([index], tmp_path, "not beside it: diffusion_pytorch_model-00002-of-00003")
    refused([tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors"], tmp_path,
            "550 missing")  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (self_forcing, {"kind": "sora"}, "unknown kind of model 'sora'; known: self-forcing, "),
        (self_forcing, {"kind": "wan2.1-t2v-1.3b"}, "is divided into 'generator', "),
        (self_forcing, {"kind": "packforcing-unofficial"}, "8 missing.*pack_compressor.net.0"),
        (packforcing_unofficial, {"kind": "self-forcing"}, "8 unexpected.*pack_compressor.net.0"),
        (self_forcing, {"kind": "longlive"}, "longlive_base.pt with models/lora.pt merged"),
        (causvid, {"kind": "self-forcing"}, "no entry 'generator_ema', .* 'generator', 'critic'"),
        (self_forcing, {"entry": "ema"}, "no entry 'ema'"),
        (base_original, {"kind": "causvid", "entry": "generator"}, "no entry 'generator'"),
    ],
)
def test_a_wrong_kind_or_entry_is_refused(layout, options, message, weights, tmp_path):
    refused(layout(tmp_path, weights), tmp_path, message, **options)


def test_files_that_hold_no_model_or_the_same_twice_are_refused(
    weights, tiny_autoencoder, tmp_path
):
    refused([tmp_path / "none.pt"], tmp_path, "there is no file")
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "empty"], tmp_path, "holds no .safetensors file")
    refused([tiny_autoencoder], tmp_path, "no file here holds a model")
    [path] = self_forcing(tmp_path, weights)
    refused([path, path], tmp_path, "both .* hold ")
    text = save(tmp_path / "t5.pt", {"token_embedding.weight": torch.zeros(2)})
    refused([path, text], tmp_path, "none of what is read here.*token_embedding.weight")
    for content in ([1, 2], {"state": {0: torch.zeros(2)}}):
        refused([save(tmp_path / "odd.pt", content)], tmp_path, "holds no tensors")
    eighth = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    save_file(eighth, tmp_path / "fp8.safetensors")
    refused([tmp_path / "fp8.safetensors"], tmp_path, "as F8_E4M3, and F32, F16, BF16 can be read")


def test_a_folder_with_something_in_it_is_left_alone(weights, tmp_path):
    [path] = self_forcing(tmp_path, weights)
    (tmp_path / "model").mkdir()
    import_checkpoint([path], tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    with pytest.raises(OutputError, match="null"):
        import_checkpoint([path], f"{tmp_path}/a\0b")
    with pytest.raises(OutputError, match="choose a new or an empty folder"):
        import_checkpoint([path], tmp_path / "model")
    assert {entry.name for entry in tmp_path.iterdir()} == {"self_forcing_dmd.pt", "model"}


def test_number_formats_stay_as_they_are_mixed_as_well(weights, tiny_autoencoder, tmp_path):
    """The autoencoder's three 2-byte biases do not put 4-byte values off their alignment."""
    mixed = {name: t.bfloat16() if t.ndim == 1 else t for name, t in weights.items()}
    shutil.copy(tiny_autoencoder, tmp_path / "a-taew2_1.pth")
    save_file(mixed, tmp_path / "b.safetensors")
    import_checkpoint([tmp_path / "a-taew2_1.pth", tmp_path / "b.safetensors"], tmp_path / "model")
    found = imported(tmp_path / "model")
    assert all(found[f"transformer.{name}"].equal(tensor) for name, tensor in mixed.items())
    with (tmp_path / "model" / WEIGHTS).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    del header["__metadata__"]
    for entry in header.values():
        assert 8 * (8 + length + entry["data_offsets"][0]) % int(entry["dtype"][-2:]) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak from there")
def test_memory_stays_below_the_largest_shard_and_a_third(tmp_path):
    """Four shards of 70 MB: a copy of the whole, or all of them mapped, would take 280 MB."""
    kind, layers, widths = "wan2.1-t2v-1.3b", 4, {"small": (24, 16), "large": (512, 14000)}
    for folder, (dim, ffn) in widths.items():
        (tmp_path / folder).mkdir()
        shapes = wan_shapes(dim, ffn, 24, 8, layers)
        for shard in range(layers):
            part = {
                name: torch.zeros(shape)
                for name, shape in shapes.items()
                if f"blocks.{shard}." in name or (shard == 0 and "blocks." not in name)
            }
            save_file(part, tmp_path / folder / f"{shard}.safetensors")
    program = f"""
import re
from pathlib import Path
import msgspec
from packforcing import MODELS
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.published import published_config
peaks = []
for folder, (dim, ffn) in {widths}.items():  # the small one first: what all imports have in common
    sizes = {TINY} | dict(dim=dim, ffn_dim=ffn, layers={layers})
    MODELS[{kind!r}] = msgspec.structs.replace(published_config({kind!r}), **sizes)
    import_checkpoint([folder], folder + "-model", kind={kind!r})
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
print(1024 * (peaks[1] - peaks[0]))
"""
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    largest = max(file.stat().st_size for file in (tmp_path / "large").iterdir())
    assert largest > 60e6 and int(result.stdout) < 1.3 * largest
    assert len(imported(tmp_path / "large-model")) == len(shapes)


def test_a_fetched_file_is_compared_with_its_record(weights, tmp_path):
    """One bit of a weight, which nothing else would notice; and the licence that was shown."""
    [path] = self_forcing(tmp_path, weights)
    licence = "cc-by-nc-sa-4.0, says its model card"
    said = {"source": "team/model", "revision": "", "licence": licence}
    content = path.read_bytes()
    said |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / RECORD).write_text(json.dumps({path.name: said}))
    import_checkpoint([path], tmp_path / "first")
    folder = json.loads((tmp_path / "first" / DESCRIPTION).read_text())
    assert folder["licence"] == licence
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 1]))
    refused([path], tmp_path, "damaged or was replaced")
