"""What other additions than A and B are: PEFT's own merges, and NumPy's for LyCORIS's names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from packforcing.errors import CheckpointError
from tests.packforcing.checkpoints.layouts import TINY_SHAPES
from tests.packforcing.checkpoints.lora_files import Q, merge, save_lora

# Saved by PEFT 0.21.2 (save_pretrained), with the weights of its merge_and_unload beside them
PEFT = Path(__file__).parent / "peft"
FLAT = "lycoris_blocks_7_attn1_to_q"


@pytest.mark.parametrize("adapter", sorted(path.name for path in PEFT.iterdir() if path.is_dir()))
def test_the_merge_is_that_of_peft(adapter):
    base, expected = (
        load_file(PEFT / "base.safetensors"),
        load_file(PEFT / adapter / "merged.safetensors"),
    )
    merged, summary = merge(PEFT / adapter / "adapter_model.safetensors", base)
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, rtol=1e-4, atol=1e-5), name
    assert summary.sources == ["adapter_config.json"]


def draw(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def dora(weight, added, magnitude, axis):
    total = weight + added
    return magnitude * total / np.linalg.norm(total, axis=axis, keepdims=True)


PIECES = {
    "LoHa": {"hada_w1_a": (24, 3), "hada_w1_b": (3, 24),
             "hada_w2_a": (24, 3), "hada_w2_b": (3, 24)},
    "LoKr": {"lokr_w1": (4, 6), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 4)},
    "LoKr, whole": {"lokr_w1": (4, 6), "lokr_w2": (6, 4)},
    "DoRA over inputs": {"lora_up.weight": (24, 3), "lora_down.weight": (3, 24),
                         "dora_scale": (24, 1)},
    "DoRA over outputs": {"lora_up.weight": (24, 3), "lora_down.weight": (3, 24),
                          "dora_scale": (1, 24)},
    "difference": {"diff": (24, 24)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PIECES)
def test_lycoris_kinds_are_merged_by_their_formulas(kind, weights, tmp_path):
    """Alpha 6 over rank 3. Two whole factors have an alpha, too, and a scale of 1."""
    content = {f"{FLAT}.{name}": draw(*shape) for name, shape in PIECES[kind].items()}
    p = {name: content[f"{FLAT}.{name}"].numpy().astype(np.float64) for name in PIECES[kind]}
    weight = weights[f"{Q}.weight"].numpy().astype(np.float64)
    if kind != "difference":
        content[f"{FLAT}.alpha"] = torch.tensor(6.0)
    if kind == "LoHa":
        added = 2 * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    elif kind == "LoKr":
        added = 2 * np.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"])
    elif kind == "LoKr, whole":
        added = np.kron(p["lokr_w1"], p["lokr_w2"])
    elif kind == "difference":
        added = p["diff"]
    else:
        axis = 1 if "inputs" in kind else 0
        low_rank = 2 * p["lora_up.weight"] @ p["lora_down.weight"]
        added = dora(weight, low_rank, p["dora_scale"], axis) - weight
    metadata = {"ss_network_dim": "3", "ss_network_alpha": "6"}  # of kohya's trainer
    merged, _ = merge(
        save_lora(tmp_path / "a.safetensors", content, metadata), weights, strength=0.5
    )
    np.testing.assert_allclose(merged[f"{Q}.weight"], weight + 0.5 * added, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("diffusion_model.blocks.3.norm3.diff", "blocks.3.norm3.weight"),
        ("diffusion_model.blocks.3.norm3.diff_b", "blocks.3.norm3.bias"),
        ("diffusion_model.blocks.3.cross_attn.norm_k.diff", "blocks.3.cross_attn.norm_k.weight"),
        ("diffusion_model.blocks.3.self_attn.q.diff_b", "blocks.3.self_attn.q.bias"),
        ("diffusion_model.blocks.3.diff_m", "blocks.3.modulation"),  # LightX2V
        ("diffusion_model.head.diff_m", "head.modulation"),
        ("diffusion_model.blocks.3.modulation.diff", "blocks.3.modulation"),  # ComfyUI
        ("transformer.scale_shift_table.diff", "head.modulation"),
        ("transformer.blocks.3.norm2.diff", "blocks.3.norm3.weight"),
        ("lycoris_blocks_3_norm2.w_norm", "blocks.3.norm3.weight"),
        ("lycoris_blocks_3_norm2.b_norm", "blocks.3.norm3.bias"),
        ("lora_unet_head_head.diff_b", "head.head.bias"),
        ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
    ],
)
def test_differences_are_added_at_the_strength(name, parameter, weights, tmp_path):
    """They are of CausVid's, AccVideo's and LightX2V's LoRAs, beside A and B."""
    difference = draw(*TINY_SHAPES[parameter])
    path = save_lora(tmp_path / "a.safetensors", {name: difference})
    merged, summary = merge(path, weights, strength=0.5)
    assert set(merged) == {parameter} and summary.scales == []
    expected = weights[parameter] + 0.5 * difference
    assert merged[parameter].allclose(expected, atol=1e-6)


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("lora_mid.weight", "a Tucker decomposition"),
        ("hada_t1", "a Tucker decomposition"),
        ("oft_blocks", "OFT or BOFT"),
        ("oft_diag", "OFT or BOFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("set_weight", "weights to be replaced"),
    ],
)
def test_kinds_that_are_not_merged_are_refused_by_name(ending, words, weights, tmp_path):
    name = f"lora_unet_blocks_7_self_attn_q.{ending}"
    path = save_lora(tmp_path / "a.safetensors", {name: draw(2, 2)})
    with pytest.raises(CheckpointError, match=f"cannot be merged: it has {words}.*: {name}"):
        merge(path, weights)
