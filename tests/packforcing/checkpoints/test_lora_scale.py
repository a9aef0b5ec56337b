"""Where the scale of a LoRA is stated: sources that disagree, configs of what is not merged."""

import json
import math

import pytest
import torch

from packforcing.errors import CheckpointError
from tests.packforcing.checkpoints.lora_files import Q, merge, save_lora
from tests.packforcing.checkpoints.test_lora_forms import (
    assert_merged,
    factors,
    formula,
    peft_config,
)

NAME = f"diffusion_model.{Q}"


def tensors(rank=4, alpha=None) -> dict[str, torch.Tensor]:
    down, up = factors(Q, rank)
    content = {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up}
    return content | ({} if alpha is None else {f"{NAME}.alpha": torch.tensor(alpha)})


def adapter_metadata(**config) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


def kohya_metadata(dim="4", alpha="8.0", **more) -> dict[str, str]:
    return {"ss_network_dim": dim, "ss_network_alpha": alpha, "ss_datasets": "[]", **more}


def scale_of(weights, path) -> float:
    merged, summary = merge(path, weights)
    [scale] = summary.scales
    assert_merged(merged, weights, {Q: (*factors(Q, 4), scale)})
    return scale


@pytest.mark.parametrize(
    ("alpha", "metadata", "config", "scale"),
    [
        (8.0, kohya_metadata(), {"r": 4, "lora_alpha": 8}, 2.0),
        (torch.tensor(0.3).bfloat16(), kohya_metadata(alpha="0.3"), None, 0.075),
        (None, adapter_metadata(r=4, lora_alpha=8), peft_config(8, 4), 2.0),
        # kohya's alphas per module, which ss_network_alpha does not know of
        (6.0, kohya_metadata(ss_network_args='{"conv_alpha": 1}'), None, 1.5),
        (16.0, kohya_metadata(ss_network_args='{"rs_lora": "True"}'), None, 4.0),
        (6.0, kohya_metadata("Dynamic", "Dynamic"), None, 1.5),  # resize_lora.py
        (6.0, kohya_metadata("None", "None"), None, 1.5),
        (None, kohya_metadata("4.0", "6"), None, 1.5),
        (
            None,
            {"ot_config": '{"lora_rank": 4, "lora_alpha": 2.0, "peft_type": "LORA"}'},
            None,
            0.5,
        ),
        (None, {"lora_config": '{"transformer": {"r": 4, "lora_alpha": 2}}'}, None, 0.5),
        (None, None, peft_config(8, 4, rank_pattern=None, alpha_pattern=None), 2.0),
        (None, None, peft_config(8, 16, rank_pattern={"self_attn.q": 4}), 2.0),
        (None, None, peft_config(8, 4, alpha_pattern={"^blocks.7.self_attn.q": 2}), 0.5),
        (None, None, peft_config(8, 4, alpha_pattern={"attn1.to_q": 2}), 0.5),  # as diffusers names
        (None, None, peft_config(8, 4, alpha_pattern={"attn2.to_q": 2}), 2.0),
        (None, None, peft_config(8, 4, alpha_pattern={"q": 2}, use_rslora=True), 1.0),
        (None, None, peft_config(8, 4, target_modules=["q", "ffn.0"]), 2.0),
        (None, None, peft_config(8, 4, target_modules=r"blocks\.\d+\.attn1.to_[qkv]"), 2.0),
        (None, None, peft_config(8, 4, target_modules="all-linear"), 2.0),
        (None, None, peft_config(8, 4, init_lora_weights="gaussian", bias="none"), 2.0),
        (None, {"training": "not JSON: {", "step": "7", "notes": "[1]"}, {"r": 4}, None),
    ],
)
def test_all_that_is_stored_is_read(alpha, metadata, config, scale, weights, tmp_path):
    path = tmp_path / "a.safetensors"
    content = tensors()
    if alpha is not None:
        content[f"{NAME}.alpha"] = torch.as_tensor(alpha)
    save_lora(path, content, metadata, config)
    _, summary = merge(path, weights)
    assert bool(summary.assumed) == (scale is None)
    assert scale_of(weights, path) == pytest.approx(1.0 if scale is None else scale, rel=0.01)


@pytest.mark.parametrize(
    ("alpha", "metadata", "config", "words"),
    [
        (4.0, None, {"r": 4, "lora_alpha": 8},
         f"{NAME}.lora_A.weight in .* a scale of 1 by its .alpha tensors and of 2 by adapter_"),
        (4.0, kohya_metadata(), None, "of 1 by its .alpha tensors and of 2 by its metadata"),
        (None, kohya_metadata(), {"r": 4, "lora_alpha": 4}, "of 2 by its metadata and of 1 by "),
        (None, adapter_metadata(r=4, lora_alpha=4), {"r": 4, "lora_alpha": 4, "use_rslora": True},
         "of 1 by its metadata lora_adapter_metadata and of 2 by adapter_config.json"),
        (4.0, kohya_metadata(dim="8"), None, f"rank 8 for '{NAME}', whose tensors have 4"),
        (None, None, {"r": 8, "lora_alpha": 8}, "adapter_config.json is not of the LoRA .* rank 8"),
        (None, None, peft_config(8, 4, rank_pattern={"q": 2}), "it has rank 2"),
        (None, None, peft_config(8, 4, target_modules=["k"]),
         f"not of the LoRA .*: its target_modules leave out '{NAME}'"),
        (None, None, peft_config(8, 4, target_modules=".*ffn.*"), "target_modules leave out"),
        (None, {"lora_alpha": "8", "alpha": "4"}, None, "two values of lora_alpha: 4 and 8"),
        (None, kohya_metadata(ss_network_args='{"block_alphas": "1,2"}'), None,
         f"no .alpha for {NAME}.lora_A.weight, and its metadata set alpha per module"),
    ],
)  # fmt: skip
def test_sources_that_disagree_are_refused(alpha, metadata, config, words, weights, tmp_path):
    path = save_lora(tmp_path / "a.safetensors", tensors(alpha=alpha), metadata, config)
    with pytest.raises(CheckpointError, match=words):
        merge(path, weights)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"peft_type": "IA3"}, "has peft_type IA3"),
        ({"bias": "lora_only"}, "has bias 'lora_only', which replaces the model's biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4', which is"),
        ({"init_lora_weights": "loftq"}, "has init_lora_weights 'loftq'"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out True"),
        ({"modules_to_save": ["head"]}, r"has modules_to_save \['head'\]"),
        ({"layer_replication": [[0, 4]]}, "has layer_replication"),
        ({"target_parameters": ["a.weight"]}, "has target_parameters"),
        ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
        ({"use_dora": True}, f"says DoRA, and no magnitude is beside {NAME}.lora_A.weight"),
        ({"r": "four"}, "adapter_config.json of the LoRA .* is damaged"),
        ({"alpha_pattern": {"(": 2}}, "a pattern that is no regular expression"),
    ],
)
def test_a_config_of_what_is_not_merged_is_refused(setting, words, weights, tmp_path):
    config = peft_config(8, 4) | setting
    path = save_lora(tmp_path / "a.safetensors", tensors(), config=config)
    with pytest.raises(CheckpointError, match=words):
        merge(path, weights)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufeff{}"])
def test_a_damaged_config_is_refused(text, weights, tmp_path):
    path = save_lora(tmp_path / "a.safetensors", tensors())
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    if text.startswith("\ufeff"):  # a mark that editors on Windows write
        assert merge(path, weights)[1].assumed
        return
    with pytest.raises(CheckpointError, match="adapter_config"):
        merge(path, weights)


def test_a_config_belongs_to_the_file_that_peft_saved_with_it(weights, tmp_path):
    other = save_lora(tmp_path / "adapter_model.safetensors", tensors(), config=peft_config(8, 4))
    path = save_lora(tmp_path / "style.safetensors", tensors())
    assert scale_of(weights, other) == 2
    assert scale_of(weights, path) == 1
    assert merge(path, weights)[1].assumed


def test_peft_loras_add_biases_at_the_same_scale(weights, tmp_path):
    content = tensors() | {f"{NAME}.lora_B.bias": torch.arange(24.0)}
    path = save_lora(tmp_path / "a.safetensors", content, config=peft_config(8, 4, lora_bias=True))
    merged, _ = merge(path, weights, strength=0.5)
    assert merged[f"{Q}.weight"].numpy() == pytest.approx(
        formula(weights[f"{Q}.weight"], *factors(Q, 4), 1.0), abs=1e-4
    )
    expected = weights[f"{Q}.bias"] + torch.arange(24.0)
    assert merged[f"{Q}.bias"].allclose(expected)


def test_rank_stabilized_is_over_the_square_root_of_each_rank(weights, tmp_path):
    modules = {"blocks.0.self_attn.q": 4, "blocks.1.self_attn.k": 9}
    content, expected = {}, {}
    for module, rank in modules.items():
        down, up = factors(module, rank)
        content |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        expected[module] = down, up, 6 / math.sqrt(rank)
    config = peft_config(6, 4, use_rslora=True, rank_pattern={"self_attn.k": 9})
    merged, summary = merge(save_lora(tmp_path / "a.safetensors", content, config=config), weights)
    assert_merged(merged, weights, expected)
    assert summary.scales == [2.0, 3.0]
