"""Names of tensors: what wraps them is removed, in any order and number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packforcing.checkpoints.names import split_name, split_names, wan_name
from tests.packforcing.checkpoints.layouts import TINY_SHAPES, diffusers_name

# The wrapper, and what adds it
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel, DeepSpeed",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "model": "Self-Forcing's WanDiffusionWrapper, trainers' dictionaries",
    "diffusion_model": "ComfyUI's LoRAs",
    "model.diffusion_model": "ComfyUI's checkpoints",
    "base_model.model": "PEFT",
    "state_dict": "Lightning",
    "net": "Cosmos's trainer",
    "transformer": "a diffusers pipeline's attribute",
}
INSIDE = [wrapper for wrapper in WRAPPERS if wrapper.startswith("_") or wrapper == "module"]


@given(
    st.sampled_from(sorted(TINY_SHAPES)),
    st.booleans(),
    st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=5),
    st.sampled_from(["", "generator", "generator_ema", "critic", "student.ema"]),
    st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3),
    st.data(),
)
def test_wrappers_are_removed_in_any_order_and_number(name, renamed, before, entry, after, data):
    components = (diffusers_name(name) if renamed else name).split(".")
    for wrapper in data.draw(st.lists(st.sampled_from(INSIDE), max_size=3)):
        components.insert(data.draw(st.integers(0, len(components) - 1)), wrapper)
    wrapped = ".".join(filter(None, [*before, entry, *after, *components]))
    assert split_name(wrapped) == (entry, name)


@pytest.mark.parametrize(
    ("name", "entry", "normalized"),
    [
        ("first_stage_model.decoder.conv1.weight", "first_stage_model", "decoder.conv1.weight"),
        ("text_encoders.t5.transformer.shared.weight", "text_encoders.t5", "shared.weight"),
        ("model.diffusion_model.scaled_fp8", "", "scaled_fp8"),
        ("model.diffusion_model.img_emb.proj.0.bias", "", "img_emb.proj.0.bias"),
        ("module", "", "module"),
        ("step", "", "step"),
    ],
)  # fmt: skip
def test_other_parts_are_told_apart(name, entry, normalized):
    assert split_name(name) == (entry, normalized)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", "blocks.3.self_attn.q"),
        ("transformer.blocks.3.attn2.to_out.0.lora_A.weight", "blocks.3.cross_attn.o"),
        ("base_model.model.model._fsdp_wrapped_module.blocks.3.ffn.0.lora_A.weight",
         "blocks.3.ffn.0"),
        ("blocks.3.ffn.net.0.proj.lora_A.weight", "blocks.3.ffn.0"),
    ],
)  # fmt: skip
def test_loras_have_the_same_names(name, module):
    assert wan_name(name) == f"{module}.lora_A.weight"


def test_an_unknown_name_stays_with_those_that_begin_like_it():
    names = {
        "step": ("", "step"),
        "generator_ema.model.blocks.0.ffn.0.bias": ("generator_ema", "blocks.0.ffn.0.bias"),
        "generator_ema.model.extra.gate": ("generator_ema", "extra.gate"),
        "optimizer.state.exp_avg": ("optimizer.state", "exp_avg"),
        "critic.blocks.0.ffn.0.bias": ("critic", "blocks.0.ffn.0.bias"),
    }
    assert split_names(names) == names
    kohya = {"lora_unet_blocks_0_ffn_0.alpha": ("", "lora_unet_blocks_0_ffn_0.alpha")}
    assert split_names(kohya) == kohya
