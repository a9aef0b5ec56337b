"""LoRA files in the forms of all trainers: each gives W + strength x alpha / rank x B A."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from packforcing.errors import CheckpointError
from tests.packforcing.checkpoints.layouts import TINY_SHAPES, save
from tests.packforcing.checkpoints.lora_files import (
    FORMS,
    Q,
    diffusers_module,
    merge,
    save_lora,
)

MODULES = [
    Q, "blocks.0.cross_attn.o", "blocks.29.ffn.0", "blocks.3.ffn.2", "text_embedding.0",
    "time_embedding.2", "time_projection.1", "head.head", "patch_embedding",
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def factors(module: str, rank: int, dtype=torch.float32, seed=0) -> tuple[torch.Tensor, ...]:
    """Random A [rank, in] and B [out, rank] of a module, as convolutions where it is one."""
    out, *inside = TINY_SHAPES[f"{module}.weight"]
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *inside, generator=generator).to(dtype)
    up = torch.randn(out, rank, *[1] * (len(inside) - 1), generator=generator).to(dtype)
    return down, up


def formula(weight, down, up, scale) -> np.ndarray:
    """W + scale x B A in NumPy."""
    down, up = (one.float().numpy().reshape(len(one), -1) for one in (down, up))
    return weight.numpy() + (scale * up.astype(np.float64) @ down).reshape(weight.shape)


def assert_merged(merged, weights, expected) -> None:
    assert set(merged) == {f"{module}.weight" for module in expected}
    for module, (down, up, scale) in expected.items():
        weight = weights[f"{module}.weight"]
        assert not np.allclose(merged[f"{module}.weight"], weight)
        np.testing.assert_allclose(
            merged[f"{module}.weight"], formula(weight, down, up, scale), atol=1e-4
        )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_names_gives_the_same_merge(form, weights, tmp_path):
    tensors, expected = {}, {}
    for module in MODULES:
        down, up = factors(module, 3)
        name = form.name(module)
        tensors |= {f"{name}.{form.factors[0]}": down, f"{name}.{form.factors[1]}": up}
        expected[module] = down, up, 1.0
    merged, summary = merge(save_lora(tmp_path / "lora.safetensors", tensors), weights)
    assert_merged(merged, weights, expected)
    assert summary.assumed == len(MODULES) and "assumed" in summary.line


def peft_config(alpha: float, rank: int, **more) -> dict:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": False, **more}


# How alpha is stored: with whom this can be read, then what is stored of a module
SOURCES = {
    "tensors": "kohya, musubi-tuner (networks/lora.py), OneTrainer (LoRAModule.py)",
    "adapter_config.json": "PEFT (PeftConfigMixin.save_pretrained), diffusion-pipe",
    "rank-stabilized": "PEFT (LoraConfig.use_rslora)",
    "alpha_pattern": "PEFT (utils/other.py, get_pattern_key)",
    "lora_adapter_metadata": "diffusers (loaders/lora_base.py), prefixed with the component",
    "lora_adapter_metadata, bare": "diffusers (loaders/peft.py, save_lora_adapter)",
    "metadata, prefixed": "SimpleTuner; ComfyUI, pull request 15830",
    "metadata": "sglang, pull request 36082 reads it",
    "ss_network_alpha": "kohya and musubi-tuner (trainer_base.py)",
}


def store_alpha(source, names, alpha, rank):
    """What a source adds: tensors, metadata, the config beside; and the scale."""
    scale, config = alpha / rank, peft_config(alpha, rank)
    if source == "tensors":
        return {f"{name}.alpha": torch.tensor(alpha) for name in names}, None, None, scale
    if source == "adapter_config.json":
        return {}, None, config, scale
    if source == "rank-stabilized":
        return {}, None, config | {"use_rslora": True}, alpha / math.sqrt(rank)
    if source == "alpha_pattern":
        patterns = {"alpha_pattern": {"blocks.*": alpha, "(text|time).*|patch.*": alpha}}
        patterns["alpha_pattern"][r"head.*|.*proj_out|condition.*"] = alpha
        patterns["rank_pattern"] = {".*": rank}
        return {}, None, config | patterns | {"r": 512, "lora_alpha": 777.0}, scale
    if source.startswith("lora_adapter_metadata"):
        prefix = "" if "bare" in source else "transformer."
        content = {f"{prefix}{name}": value for name, value in config.items()}
        return {}, {"lora_adapter_metadata": json.dumps(content)}, None, scale
    if source == "metadata":
        return {}, {"lora_alpha": str(alpha), "rank": str(rank)}, None, scale
    if source == "metadata, prefixed":
        return {}, {"transformer.lora_alpha": str(alpha), "transformer.r": str(rank)}, None, scale
    assert source == "ss_network_alpha"
    module = {"ss_network_module": "networks.lora_wan"}
    return {}, module | {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}, None, scale


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(sorted(SOURCES)),
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.sampled_from([0.25, 1.0, 8.0, 17.0]),
    st.sampled_from([None, 1.0, 0.8, -0.5]),
    st.lists(st.sampled_from(MODULES), min_size=1, unique=True),
)
def test_any_names_alpha_dtype_and_rank_give_the_formula(
    weights, form, source, dtype, rank, alpha, strength, modules
):
    tensors, expected, names = {}, {}, []
    for module in modules:
        down, up = factors(module, rank, dtype)
        names.append(FORMS[form].name(module))
        tensors |= {f"{names[-1]}.{end}": t for end, t in zip(FORMS[form].factors, (down, up))}
        expected[module] = down, up
    alphas, metadata, config, scale = store_alpha(source, names, alpha, rank)
    scale *= 1 if strength is None else strength
    with tempfile.TemporaryDirectory() as folder:
        path = save_lora(Path(folder) / "a.safetensors", tensors | alphas, metadata, config)
        merged, summary = merge(path, weights, strength=strength)
    assert_merged(merged, weights, {m: (*pair, scale) for m, pair in expected.items()})
    assert not summary.assumed and len(summary.sources) == 1


def test_each_module_has_its_own_rank_and_alpha(weights, tmp_path):
    tensors, expected = {}, {}
    for rank, module in enumerate(MODULES, 1):
        down, up = factors(module, rank)
        names = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{names}.lora_down.weight": down, f"{names}.lora_up.weight": up}
        tensors[f"{names}.alpha"] = torch.tensor(rank + 2)  # an integer, as torch makes of one
        expected[module] = down, up, (rank + 2) / rank
    merged, summary = merge(save_lora(tmp_path / "lora.safetensors", tensors), weights)
    assert_merged(merged, weights, expected)
    assert "scale 1.22222 to 3; alpha is from its .alpha tensors" in summary.line


@pytest.mark.parametrize(
    "content",
    [
        lambda tensors: {"state_dict": tensors, "lora_alpha": 8, "lora_rank": 4},
        lambda tensors: {"generator_lora": tensors, "config": {"adapter": {"rank": 4, "alpha": 8}}},
        lambda tensors: tensors | {"network_alpha": 8.0},
    ],
    ids=["state_dict", "LongLive's training", "flat"],
)
def test_a_torch_checkpoint_states_alpha_beside_the_tensors(content, weights, tmp_path):
    down, up = factors(Q, 4)
    names = {f"base_model.model.{Q}.lora_A.weight": down, f"base_model.model.{Q}.lora_B.weight": up}
    merged, summary = merge(save(tmp_path / "lora.pt", content(names)), weights)
    assert_merged(merged, weights, {Q: (down, up, 2.0)})
    assert not summary.assumed


def test_the_merge_is_that_of_diffusers_converters(weights, tmp_path):
    """diffusers folds alpha into the factors, so that its scale is 1."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_musubi_wan_lora_to_diffusers,
        _convert_non_diffusers_wan_lora_to_diffusers,
    )

    layers = [name.removesuffix(".weight") for name in TINY_SHAPES if name.startswith("blocks.0.")]
    modules = [m for m in layers if f"{m}.weight" in TINY_SHAPES and "norm" not in m]
    for prefix, convert in (
        ("lora_unet_", _convert_musubi_wan_lora_to_diffusers),
        ("diffusion_model.", _convert_non_diffusers_wan_lora_to_diffusers),
    ):
        tensors = {}
        for seed, module in enumerate(modules):
            down, up = factors(module, 4, seed=seed)
            name = prefix + (module.replace(".", "_") if "unet" in prefix else module)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(1.0 + seed)
        theirs = convert({name: tensor.clone() for name, tensor in tensors.items()})
        merged, _ = merge(save_lora(tmp_path / "lora.safetensors", tensors), weights)
        assert len(merged) == len(modules) == len(theirs) / 2 == 10
        for module in modules:
            name = f"transformer.{diffusers_module(module)}"
            added = theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
            expected = weights[f"{module}.weight"] + added
            assert merged[f"{module}.weight"].allclose(expected, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["diffusion_model.blocks.0.cross_attn.k_img", "transformer.blocks.0.attn2.add_v_proj"],
         "it is for an image-to-video model of Wan: 2 of its 4 tensors"),
        (["lora_unet_blocks_35_self_attn_q"], "2 of its 4 tensors have no place in it: lora_unet_"),
        (["diffusion_model.vace_blocks.0.self_attn.q"], "it is for Wan VACE"),
        (["transformer_2.single_transformer_blocks.0.attn.to_q"], "second transformer of Wan2.2"),
        (["transformer.single_transformer_blocks.0.attn.to_q"], "it is for FLUX or HunyuanVideo"),
        (["lora_unet_double_blocks_0_img_attn_qkv"], "it is for FLUX or HunyuanVideo"),
        (["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"],
         "it is for Stable Diffusion"),
        (["lycoris_transformer_blocks_0_attn1_to_q"], "a diffusion transformer other than Wan"),
        (["base_model.model.model.layers.0.self_attn.q_proj"], "it is for a language model"),
        (["base_model.model.blocks.0.self_attn.q.base_layer"], "an adapter not merged"),
    ],
)  # fmt: skip
def test_a_lora_of_another_model_is_refused_as_what_it_is(names, words, weights, tmp_path):
    down, up = factors(Q, 2)
    tensors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    for name in names:
        ends = ("lora_down.weight", "lora_up.weight")
        tensors |= {f"{name}.{ends[0]}": down.clone(), f"{name}.{ends[1]}": up.clone()}
        if len(names) > 1:
            del tensors[f"{name}.{ends[0]}"]
    with pytest.raises(CheckpointError, match=words) as raised:
        merge(save_lora(tmp_path / "lora.safetensors", tensors), weights)
    assert all(name in str(raised.value) for name in names)


def test_a_lora_of_another_width_is_refused_as_what_it_is(weights, tmp_path):
    name = f"diffusion_model.{Q}"
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(4, 5120),
        f"{name}.lora_B.weight": torch.zeros(5120, 4),
    }
    words = rf"a model 5120 wide \(Wan 14B\): {name}.lora_A.weight \(4, 5120\) and {name}.lora_B"
    with pytest.raises(CheckpointError, match=words):
        merge(save_lora(tmp_path / "lora.safetensors", tensors), weights)


@pytest.mark.parametrize(
    "prefix", ["text_encoder.", "lora_te_", "lora_te1_", "text_encoder_2.", "te1."]
)
def test_a_text_encoder_is_said_not_to_be_applied(prefix, weights, tmp_path):
    down, up = factors(Q, 2)
    name = f"{prefix}encoder.block.0.layer.0.SelfAttention.q"
    text = {f"{name}.lora_A.weight": torch.ones(2, 9), f"{name}.lora_B.weight": torch.ones(9, 2)}
    own = {f"transformer.{Q}.lora_A.weight": down, f"transformer.{Q}.lora_B.weight": up}
    merged, summary = merge(save_lora(tmp_path / "lora.safetensors", own | text), weights)
    assert_merged(merged, weights, {Q: (down, up, 1.0)})
    assert summary.unused == sorted(text)
    assert f"not applied: 2 tensors like {name}.lora_A.weight" in summary.line
    with pytest.raises(CheckpointError, match="is for a text encoder alone"):
        merge(save_lora(tmp_path / "lora.safetensors", text), weights)


def test_incomplete_and_doubled_pieces_are_refused_by_their_names(weights, tmp_path):
    path, name = tmp_path / "lora.safetensors", f"diffusion_model.{Q}"
    down, up = factors(Q, 2)
    for tensors, words in (
        ({f"{name}.lora_A.weight": down}, f"incomplete: {name}.lora_A.weight needs its other"),
        ({f"{name}.lora_up.weight": up}, f"incomplete: {name}.lora_up.weight needs its other"),
        ({f"{name}.lokr_w1": up, f"{name}.lokr_w2_a": up.clone()}, "incomplete: .*lokr_w1 needs"),
        ({f"{name}.lora_A.a.weight": down, f"{name}.lora_A.b.weight": down.clone()},
         f"holds both {name}.lora_A.a.weight and {name}.lora_A.b.weight"),
        ({f"{name}.lora_A.weight": down, f"{Q}.lora_A.weight": down.clone()}, "holds both"),
        ({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[:, :1].contiguous()},
         r"lora_A.weight \(2, 24\) and .*lora_B.weight \(24, 1\) do not make \(24, 24\)"),
        ({f"{name}.lora_A.weight": down[:0], f"{name}.lora_B.weight": up[:, :0]},
         r"\(0, 24\) and .* do not make"),
        ({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up,
          f"{name}.alpha": torch.ones(2)}, "alpha in .* is not one number"),
    ):  # fmt: skip
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=words):
            merge(path, weights)
