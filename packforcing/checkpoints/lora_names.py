"""Names of the tensors in LoRA files, as trainers give them.

A name is a module's and a suffix that says which piece of the addition it is. The module is named
as in Wan or diffusers, in whatever wrapper, with dots or kohya's underscores. So modules are
compared with dots and underscores alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from packforcing.checkpoints.names import diffusers_name, split_name

# Suffixes, and the piece that each is. The letters and words before them are of PEFT (A, B),
# kohya and LyCORIS (down, up, hada, lokr, norm), diffusers (lora.down), LightX2V (diff_m).
_PIECES = (
    (r"[._]lora(?:_linear_layer)?[._](?:A|down)", "down"),
    (r"[._]lora(?:_linear_layer)?[._](?:B|up)", "up"),
    (r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)", ""),  # named as in the file
    (r"\.(?:lora_)?alpha", "alpha"),
    (r"\.(?:lora_magnitude_vector|dora_scale|magnitude)", "magnitude"),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.diff_m", "diff_m"),
)
# PEFT puts the adapter's name, which may be any, before the parameter's
_ADAPTER = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<parameter>weight|bias))?"
_SUFFIXES = [
    (re.compile(rf"^(?P<module>.+?){pattern}{_ADAPTER}$"), kind) for pattern, kind in _PIECES
]

# Additions that are not merged, by the names that only they have
_UNMERGEABLE = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"\.(?:lora_mid|hada_t[12]|lokr_t[12])\b", "a Tucker decomposition (lora_mid, t1, t2)"),
        (r"\.(?:oft_\w+|boft_\w+|rescale)\b", "OFT or BOFT, which rotates weights"),
        (r"\.(?:a[12]|b[12])\.weight$", "GLoRA"),
        (r"\.(?:on_input|ia3_l\b.*)$", "IA3"),
        (r"\.(?:lora_E|ranknum)\b", "AdaLoRA"),
        (r"\.vera_\w+\b", "VeRA"),
        (r"\.lora_embedding_[AB]\b", "a LoRA of an embedding"),
        (r"\.(?:set_weight|reshape_weight)$", "weights to be replaced"),
    )
]

_TEXT_ENCODER = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_te\d?_|(?:text_encoders?(?:_\d)?|te\d?|text_model|clip_\w|"
    r"t5\w*|umt5\w*)\.)"
)
_UNDERSCORED = re.compile(  # kohya, OneTrainer, VideoX-Fun, LyCORIS; then wrappers
    r"^(?:lora_(?:prior_)?(?:unet|transformer|dit|model)|lycoris)[_.]+"
    r"(?:(?:diffusion_model|model|module|orig_mod|fsdp_wrapped_module)_+)*"
)

# What a file is for whose modules this model has not
_OTHER_MODELS = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"base_layer\b", "a whole model with an adapter not merged: save the adapter alone"),
        (r"[kv]_img\b|img_emb|add_[kv]_proj|image_embedder|norm_added_k",
         "an image-to-video model of Wan"),
        (r"vace_", "Wan VACE"),
        (r"control_adapter|ref_conv", "Wan Fun-Control or Fun-Camera"),
        (r"motion_encoder|face_adapter|audio", "Wan Animate or S2V"),
        (r"transformer_2[._]", "the second transformer of Wan2.2 14B"),
        (r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block",
         "Stable Diffusion (a UNet)"),
        (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX or HunyuanVideo"),
        (r"joint_blocks", "Stable Diffusion 3"),
        (r"transformer_blocks", "a diffusion transformer other than Wan (transformer_blocks)"),
        (r"layers[._]\d+[._](?:self_attn|mlp|attention|feed_forward)", "a language model"),
    )
]  # fmt: skip
_WIDTHS = {1536: "Wan 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}


class Piece(NamedTuple):
    """What a tensor's name says."""

    module: str  # as in the file
    kind: str  # down, up, up_b, alpha, magnitude, diff, diff_b, diff_m, hada_w1_a ..., lokr_w1 ...
    adapter: str  # PEFT's name of it, "" for none


def parse_piece(name: str) -> Piece | None:
    """Split a tensor's name into module and piece. None: it is no piece of an addition."""
    for pattern, kind in _SUFFIXES:
        if match := pattern.match(name):
            kind = kind or match[2]
            if match["parameter"] == "bias":
                if kind != "up":
                    return None
                kind = "up_b"  # PEFT's lora_bias
            return Piece(match["module"], kind, match["adapter"] or "")
    return None


def unmergeable(name: str) -> str:
    """Return what kind of addition a name is of that cannot be merged, "" for none."""
    return next((words for pattern, words in _UNMERGEABLE if pattern.search(name)), "")


def is_lora(names: Iterable[str]) -> bool:
    """Tell whether a file with these names holds an addition to a model."""
    return any(
        unmergeable(name) or ((piece := parse_piece(name)) and piece.kind != "alpha")
        for name in names
    )


def is_text_encoder(name: str) -> bool:
    """Tell whether a tensor is for the text encoder."""
    return bool(_TEXT_ENCODER.match(name))


class ParameterIndex:
    """Finds a model's parameter by a module's name in any form."""

    def __init__(self, parameters: Iterable[str]) -> None:
        self._by_flat_name = {}
        for name in parameters:
            for form in (diffusers_name(name), name):
                self._by_flat_name[_flat(form)] = name

    def find(self, piece: Piece) -> tuple[str, str] | None:
        """Find the parameter that a piece adds to.

        Returns:
            The entry of the file that the piece is in, "" for none, and Wan's name of the
            parameter. None: the model has no such parameter.
        """
        entry, module = split_name(_UNDERSCORED.sub("", piece.module))
        suffix = {"up_b": "bias", "diff_b": "bias", "diff_m": "modulation"}.get(
            piece.kind, "weight"
        )
        parameter = self._by_flat_name.get(_flat(f"{module}.{suffix}"))
        if parameter is None and piece.kind == "diff":  # of a parameter that is no weight
            parameter = self._by_flat_name.get(_flat(module))
        return (entry, parameter) if parameter else None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def describe_other_model(names: Iterable[str], width: int | None = None) -> str:
    """Say for which model a LoRA is that does not fit, "" if nothing tells.

    Args:
        names: Of the tensors that do not fit.
        width: The number of channels that the LoRA's attention has.
    """
    names = list(names)
    for pattern, words in _OTHER_MODELS:
        if any(pattern.search(name) for name in names):
            return words
    return f"a model {width} wide ({_WIDTHS.get(width, 'unknown')})" if width else ""
