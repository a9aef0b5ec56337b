"""The published models, their autoencoders and the policies they can be rolled out under."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from packforcing.config import WORD_COUNT, Config, Policy, Precision
from packforcing.errors import ConfigError

if TYPE_CHECKING:
    from packforcing.prompts import History

MODELS: dict[str, Config] = {
    config.name: config
    for config in (
        Config(
            name="demo",
            height=128,
            width=128,
            fps=16,
            dim=128,
            heads=4,
            layers=6,
            ffn_dim=512,
            block_frames=2,
            text_encoder="words",
            text_len=8,
            text_dim=WORD_COUNT,
            compressor_widths=(32, 64, 128, 128),
            latent_channels=8,
            vae_encoder_width=24,
            vae_decoder_widths=(64, 40, 24, 16),
            sampler="euler",
            timesteps=(1000, 875, 750, 625, 500, 375, 250, 125),
            shift=3.0,
            policy=Policy(sink=1, mid=6, recent=2),
        ),
        Config(
            name="wan-1.3b",
            height=480,
            width=832,
            fps=16,
            dim=1536,
            heads=12,
            layers=30,
            ffn_dim=8960,
            block_frames=4,
            text_encoder="umt5-xxl",
            text_len=512,
            text_dim=4096,
            compressor_widths=(32, 128, 512, 2048),
            vae_strips=6,
            policy=Policy(sink=2, mid=16, recent=1),
            precision=Precision(compute="fp16", weights="fp16", cache="fp16"),
        ),
    )
}
PAPER = MODELS["wan-1.3b"]


def _published(name: str, policy: Policy, **changes: Any) -> Config:
    """Return a model of the Self-Forcing family: 3 frames per block, no compressor."""
    sizes = {"block_frames": 3, "compressor_widths": (), **changes}
    return msgspec.structs.replace(PAPER, name=name, policy=policy, **sizes)


def _window(recent: int, sink: int = 0, restart: int = 0) -> Policy:
    return Policy(sink=sink, mid=0, recent=recent, positions="absolute", restart=restart)


# As published, except for what `packforcing.checkpoints.published` notes of each
MODELS |= {
    config.name: config
    for config in (
        _published("self-forcing", _window(6)),
        _published("self-forcing-sid", _window(6)),
        _published("self-forcing-sid-v2", _window(6)),
        _published("self-forcing-gan", _window(6)),
        _published("self-forcing-10s", _window(6)),
        _published(
            "causvid", _window(6, restart=7), timesteps=(1000, 757, 522), warp=False, shift=8.0
        ),
        _published("causvid-4step", _window(6, restart=7), shift=8.0),
        _published("causal-forcing", _window(6)),
        _published("causal-forcing-frame", _window(20), block_frames=1),
        _published(
            "causal-forcing-frame-2step", _window(20), block_frames=1,
            timesteps=(1000, 500), first_timesteps=PAPER.timesteps,
        ),
        _published(
            "causal-forcing-frame-1step", _window(20), block_frames=1,
            timesteps=(1000,), first_timesteps=PAPER.timesteps,
        ),
        _published("longlive", _window(2, sink=1)),
        _published("infinity-rope", Policy(sink=1, mid=0, recent=1)),
        _published(
            "packforcing-unofficial", Policy(sink=3, mid=16, recent=2, selection="recency")
        ),
    )
}  # fmt: skip

# What a prompt switch that names no history does to it, where that is not "keep"
SWITCH_HISTORIES: dict[str, History] = {"longlive": "recompute"}


def switch_history(config: Config) -> History:
    """Return what a prompt switch does to the history of a model as it is published."""
    return SWITCH_HISTORIES.get(config.name, "keep")


def model_config(name: str) -> Config:
    """Look up a preset by name.

    Raises:
        ConfigError: No preset has this name.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model '{name}'; known models: {', '.join(MODELS)}")
    return MODELS[name]


# Sizes of the published autoencoders for Wan2.1's latents: taew2_1, lighttaew2_1, Wan2.1_VAE
_TINY = {"vae_encoder_width": 64, "vae_decoder_widths": (256, 128, 64, 64), "vae_strips": 6}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "taehv": _TINY,
    "lighttae": _TINY,
    "wan": {
        "vae_encoder_width": 96, "vae_decoder_widths": (384, 384, 192, 96), "vae_strips": 1,
    },
}  # fmt: skip
# Those in TAEHV's layout: names and shapes of their tensors are equal
TINY_AUTOENCODERS = [name for name, sizes in AUTOENCODERS.items() if sizes is _TINY]


def with_autoencoder(config: Config, name: str) -> Config:
    """Return the config with an autoencoder at its published size.

    A config that has this autoencoder already stays as it is.

    Args:
        config: A model with Wan's latents.
        name: One of `AUTOENCODERS`.

    Raises:
        ConfigError: The model's latents are not Wan's.
    """
    if name == config.vae:
        return config
    if not config.wan_latents:
        raise ConfigError(
            f"the autoencoder '{name}' decodes Wan's latents, and {config.name} has its own"
        )
    return msgspec.structs.replace(config, vae=name, **AUTOENCODERS[name])


# What a planner may choose for `Policy.commit` without being told to. Under "last-step" the demo's
# videos lose almost half of their motion in two minutes (docs/results/2026-11-policies.md).
PLANNED_COMMITS: tuple[Literal["clean", "last-step"], ...] = ("clean",)


def trained_timesteps(config: Config, count: int) -> tuple[float, ...]:
    """Return the timesteps of so many steps that a model's weights were trained for.

    Args:
        config: The model.
        count: Steps of a block.

    Raises:
        ConfigError: They were trained for another number. Names models of the same sizes whose
            published weights were trained for this one.
    """
    if len(config.timesteps) == count:
        return config.timesteps

    def sizes(model: Config) -> tuple[int, ...]:
        return model.dim, model.layers, model.ffn_dim, model.latent_channels, model.block_frames

    others = [
        name
        for name, model in MODELS.items()
        if len(model.timesteps) == count and sizes(model) == sizes(config)
    ]
    remedy = "no published weights of these sizes were trained for that many"
    if others:
        remedy = f"published weights that were: {', '.join(others)} (packforcing fetch NAME)"
    raise ConfigError(
        f"{config.name} takes {len(config.timesteps)} steps, and its weights were trained for "
        f"these alone, not for {count}: {remedy}. A list of steps is followed untrained, like "
        "--steps 1000,500"
    )


def policies(config: Config) -> dict[str, Policy]:
    """Return the policies that a model can be rolled out under, by name.

    "packforcing" is the model's own policy if that compresses, else the paper's: the same number
    of sink and recent frames, in whole blocks, and of compressed blocks. The windows hold as many
    full blocks as the model's own context, so that they compare at equal memory: "sliding-window"
    as in Self-Forcing and CausVid (within a window, packed and absolute positions differ by a
    constant), "sink-window" as in StreamingLLM and, with absolute positions, in LongLive.
    """
    own = config.policy
    sink = own.sink or 1
    window = max(sink + 1, config.context_tokens // config.block_tokens)
    sink_frames, recent_frames = (
        blocks * PAPER.block_frames for blocks in (PAPER.policy.sink, PAPER.policy.recent)
    )
    paper = Policy(
        sink=-(-sink_frames // config.block_frames),
        mid=PAPER.policy.mid,
        recent=-(-recent_frames // config.block_frames),
    )
    return {
        "packforcing": own if own.mid else paper,
        "sliding-window": Policy(sink=0, mid=0, recent=window),
        "sink-window": Policy(sink=sink, mid=0, recent=window - sink),
        "full-history": Policy(sink=0, mid=0, recent=1_000_000),
    }
