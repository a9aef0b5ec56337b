"""Random weights of a model: names and shapes of the checkpoints, numbers from a seed.

Names and shapes are those of the published Wan and TAEHV checkpoints and of the paper's compressor,
written out here so that nothing is imported from the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Shapes = dict[str, tuple[int, ...]]


def draw_weights(model: dict[str, Any], seed: int, sharpness: float = 1.0) -> dict[str, Array]:
    """Draw all weights of a model such that every part of it matters.

    The numbers are normal ones from Philox, a counter-based generator, one array after the other in
    the order of `weight_shapes`. A matrix or kernel is scaled to variance 1 over its number of
    inputs. A vector varies by 0.1 around 1.

    Args:
        model: Sizes in the words of the package's config.
        seed: Key of the generator.
        sharpness: Factor of the norms of queries and keys.

    Returns:
        float32 arrays by checkpoint name.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    weights = {}
    for name, shape in weight_shapes(model).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            values = values * np.float32(np.prod(shape[1:]) ** -0.5)
        else:
            values = values * np.float32(0.1) + np.float32(1)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            values = values * np.float32(sharpness)
        weights[name] = values
    return weights


def weight_shapes(model: dict[str, Any]) -> Shapes:
    """List the shape of every weight by checkpoint name, in the checkpoint's order."""
    parts = {
        "transformer": transformer_shapes(model),
        "autoencoder": autoencoder_shapes(model),
        "compressor": compressor_shapes(model),
    }
    return {
        f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()
    }


def transformer_shapes(model: dict[str, Any]) -> Shapes:
    """List those of Wan's transformer."""
    width, ffn_width, channels = model["dim"], model["ffn_dim"], model["latent_channels"]
    patch = model["patch"]
    shapes: Shapes = {
        "patch_embedding.weight": (width, channels, 1, patch, patch),
        "patch_embedding.bias": (width,),
        **linear("text_embedding.0", model["text_dim"], width),
        **linear("text_embedding.2", width, width),
        **linear("time_embedding.0", model["freq_dim"], width),
        **linear("time_embedding.2", width, width),
        **linear("time_projection.1", width, 6 * width),
    }
    for layer in range(model["layers"]):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, width)
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for projection in "qkvo":
                shapes |= linear(f"{attention}.{projection}", width, width)
            shapes[f"{attention}.norm_q.weight"] = (width,)
            shapes[f"{attention}.norm_k.weight"] = (width,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (width,)
        shapes |= linear(f"{block}.ffn.0", width, ffn_width)
        shapes |= linear(f"{block}.ffn.2", ffn_width, width)
    shapes["head.modulation"] = (1, 2, width)
    return shapes | linear("head.head", width, channels * patch * patch)


def autoencoder_shapes(model: dict[str, Any]) -> Shapes:
    """List those of the tiny autoencoder in TAEHV's layout."""
    channels, width = model["latent_channels"], model["vae_encoder_width"]
    shapes = convolution("encoder.0", 3, width)
    for first, frames in ((2, 2), (7, 2), (12, 1)):
        shapes[f"encoder.{first}.conv.weight"] = (width, frames * width, 1, 1)
        shapes |= convolution(f"encoder.{first + 1}", width, width, bias=False)
        for layer in range(first + 2, first + 5):
            shapes |= memory_block(f"encoder.{layer}", width)
    shapes |= convolution("encoder.17", width, channels)

    widths = model["vae_decoder_widths"]
    shapes |= convolution("decoder.1", channels, widths[0])
    for stage, (first, frames) in enumerate(((3, 1), (9, 2), (15, 2))):
        width, next_width = widths[stage : stage + 2]
        for layer in range(first, first + 3):
            shapes |= memory_block(f"decoder.{layer}", width)
        shapes[f"decoder.{first + 4}.conv.weight"] = (frames * width, width, 1, 1)
        shapes |= convolution(f"decoder.{first + 5}", width, next_width, bias=False)
    return shapes | convolution("decoder.22", widths[3], 3)


def compressor_shapes(model: dict[str, Any]) -> Shapes:
    """List those of the high branch of the paper's compressor."""
    channels = (model["latent_channels"], *model["compressor_widths"], model["dim"])
    kernels = (2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (1, 1, 1)
    shapes: Shapes = {}
    for layer, kernel in enumerate(kernels):
        inputs, outputs = channels[layer : layer + 2]
        shapes[f"high.{2 * layer}.weight"] = (outputs, inputs, *kernel)
        shapes[f"high.{2 * layer}.bias"] = (outputs,)
    return shapes


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """List a matrix and its bias."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def convolution(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    """List a 3 x 3 kernel, and its bias where it has one."""
    shapes: Shapes = {f"{name}.weight": (outputs, inputs, 3, 3)}
    return shapes | {f"{name}.bias": (outputs,)} if bias else shapes


def memory_block(name: str, width: int) -> Shapes:
    """List three convolutions; the first one reads two frames."""
    return {
        **convolution(f"{name}.conv.0", 2 * width, width),
        **convolution(f"{name}.conv.2", width, width),
        **convolution(f"{name}.conv.4", width, width),
    }
