"""One checked description of a model and of how it is rolled out.

Every size in the project derives from `Config`; nothing else holds a shape as a literal.
Free of torch, so that the runtime can read it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import msgspec

from packforcing.errors import ConfigError
from packforcing.words import VOCABULARY

TEMPORAL_FACTOR = 4  # pixel frames per latent frame, in Wan's VAE and in TAEHV alike
WAN_CHANNELS = 16  # of the latents of Wan's VAE


# A config comes with a bundle, from anybody: what cannot be meant is refused before it is counted
# with. Sizes beyond these are no model's.
LARGEST, MOST_LAYERS, LARGEST_TEXT = 1 << 20, 1 << 10, 1 << 26


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which blocks of the history are read, in blocks (PackForcing, sections 3.2 to 3.5).

    `selection` of the mid blocks is made when a block is committed; "first-step" is affinity that
    is asked again with the queries of the next block's first step, as the paper does.
    `mid_span` is how many latent frames a compressed block takes up in packed positions
    (fractions allowed); None means as many as it stands for. `branches`: what a compressed block
    is made of, the sum of both branches of the compressor or one alone (section 3.3).

    `restart`: of how many blocks one rollout is; 0 for a single one without end. A longer video is
    rollouts in a row, each of which begins with the last block of the one before, as CausVid
    publishes it: the block's first latent frame is encoded anew, from the last pixel frame that it
    was decoded to, as the first frame of a video is; keys, values and the decoder's state are made
    again without a past, and the frames from that one on are those that are decoded then.
    """

    sink: int
    mid: int
    recent: int
    selection: Literal["affinity", "first-step", "likeness", "recency", "random"] = "affinity"
    positions: Literal["packed", "absolute"] = "packed"
    mid_span: float | None = None
    branches: Literal["both", "high", "low"] = "both"
    restart: int = 0

    def __post_init__(self) -> None:
        for name in ("sink", "mid", "recent"):
            _require(
                0 <= getattr(self, name) <= LARGEST, f"policy.{name} must be from 0 to {LARGEST}"
            )
        _require(self.mid_span is None or self.mid_span > 0, "policy.mid_span must be positive")
        _require(
            self.restart == 0 or 2 <= self.restart <= LARGEST,
            f"policy.restart must be 0, or from 2 to {LARGEST}: a rollout's first block is the "
            "last one's end",
        )

    @property
    def capacity(self) -> int:
        """Blocks in context, beside the current one, once every partition is full."""
        return self.sink + self.mid + self.recent

    def __str__(self) -> str:
        """What is read, in words."""
        selected = f"by {self.selection}, " if self.mid else ""
        again = f", begun anew every {self.restart} blocks" if self.restart else ""
        return (
            f"{self.sink} sink, {self.mid} mid and {self.recent} recent blocks, "
            f"{selected}{self.positions} positions{again}"
        )

    def rollout_start(self, block: int) -> int:
        """The first block of the rollout that makes `block`, of a video without cuts."""
        fresh = self.restart - 1  # blocks that a rollout adds
        return max(0, block - 1) // fresh * fresh if self.restart else 0


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Number formats of a bundle: of what is computed, of the denoiser's weights, of the cache.

    int8 and int4 weights are dequantised where they are read; whatever the host reads or writes
    in small amounts (tokens, flow, latents, pooled queries and keys) is fp32 throughout.
    """

    compute: Literal["fp32", "fp16"] = "fp32"
    weights: Literal["fp32", "fp16", "int8", "int4", "fp8"] = "fp32"
    cache: Literal["fp32", "fp16", "int8", "fp8"] = "fp32"

    def __post_init__(self) -> None:
        other = {"fp32", "fp16"} - {self.compute}
        for name in ("weights", "cache"):
            _require(
                getattr(self, name) not in other,
                f"precision.{name} is {getattr(self, name)} where {self.compute} is computed",
            )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A causal Wan video transformer, its autoencoder, compressor, sampler and policy."""

    name: str
    # video, in pixels
    height: int
    width: int
    fps: int
    # causal transformer
    dim: int
    heads: int
    layers: int
    ffn_dim: int
    block_frames: int  # latent frames generated together, B_f
    latent_channels: int = 16
    patch: int = 2  # latent cells per token, along height and width
    freq_dim: int = 256
    eps: float = 1e-6
    # text
    text_encoder: Literal["words", "umt5-xxl"]
    text_len: int
    text_dim: int
    # compressor: channels after each strided convolution; empty for the low branch alone
    compressor_widths: tuple[int, ...] = ()
    # autoencoder: the tiny one in TAEHV's layout, one like it that computes in the scale of Wan's
    # latents, or Wan's own; `with_autoencoder` has the published sizes
    vae: Literal["taehv", "lighttae", "wan"] = "taehv"
    vae_patch: int = 1  # pixels folded into channels before the first convolution
    vae_encoder_width: int = 64  # the narrowest, in Wan's
    vae_decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    vae_strips: int = 1  # parts of a frame that the decoder's last stage does one after the other
    # few-step sampler: timesteps before the shift; "renoise" for distilled models, or "euler"
    sampler: Literal["renoise", "euler"] = "renoise"
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    first_timesteps: tuple[float, ...] = ()  # of the first block, where it takes others
    warp: bool = True  # whether the model is told shifted timesteps, or these
    shift: float = 5.0
    policy: Policy
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        positive = ("height", "width", "fps", "dim", "heads", "layers", "ffn_dim", "block_frames",
                    "latent_channels", "patch", "freq_dim", "eps", "text_len", "text_dim",
                    "vae_patch", "vae_encoder_width", "vae_strips", "shift")  # fmt: skip
        for name in positive:
            _require(0 < getattr(self, name) <= LARGEST, f"{name} must be above 0, to {LARGEST}")
        _require(self.layers <= MOST_LAYERS, f"layers must be at most {MOST_LAYERS}")
        _require(self.text_len * self.text_dim <= LARGEST_TEXT, "text_len x text_dim is too large")
        for width in (*self.compressor_widths, *self.vae_decoder_widths):
            _require(0 < width <= LARGEST, f"every width must be above 0, to {LARGEST}")
        _require(
            self.vae == "taehv" or self.wan_latents,
            f"the autoencoder '{self.vae}' is for {WAN_CHANNELS} latent_channels and a vae_patch "
            "of 1",
        )
        *wider, narrow = self.vae_decoder_widths
        _require(
            self.vae != "wan"
            or (self.vae_strips == 1 and not any(n % narrow or n % 2 for n in wider)),
            "Wan's autoencoder has no vae_strips, and its vae_decoder_widths are even multiples "
            "of the last",
        )
        cell = self.spatial_factor * self.patch
        _require(
            self.height % cell == 0 and self.width % cell == 0,
            f"{self.width}x{self.height} is not a whole number of {cell}x{cell} pixel tokens",
        )
        _require(self.dim % self.heads == 0, "dim must be a multiple of heads")
        _require(self.head_dim % 2 == 0 and self.head_dim >= 6, "head size must be even, 6 or more")
        _require(self.freq_dim % 2 == 0, "freq_dim must be even")
        _require(len(self.compressor_widths) in (0, 4), "compressor_widths takes four numbers")
        _require(
            self.policy.branches != "high" or len(self.compressor_widths) > 0,
            f"the high branch alone compresses nothing: {self.name} has no compressor",
        )
        _require(
            self.policy.mid == 0 or min(self.grid) >= 4,
            f"a {self.grid[0]}x{self.grid[1]} token grid is too small to compress: 4x4 at least",
        )
        _require(
            self.text_encoder != "words" or self.text_dim >= len(VOCABULARY),
            f"the words encoder needs a text_dim of {len(VOCABULARY)} or more",
        )
        _require(len(self.timesteps) > 0, "timesteps must name one step or more")
        for steps in filter(None, (self.timesteps, self.first_timesteps)):
            _require(
                steps[0] <= 1000 and steps[-1] > 0 and all(a > b for a, b in pairwise(steps)),
                "timesteps must fall from 1000 or less and stay above 0",
            )

    @property
    def wan_latents(self) -> bool:
        """Whether the latents have the shape of those of Wan's VAE."""
        return self.latent_channels == WAN_CHANNELS and self.vae_patch == 1

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along one axis."""
        return 8 * self.vae_patch

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width."""
        return self.height // self.spatial_factor, self.width // self.spatial_factor

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of one latent frame, (h, w)."""
        return self.latent_size[0] // self.patch, self.latent_size[1] // self.patch

    @property
    def block_tokens(self) -> int:
        """Tokens of a full-resolution block, N."""
        return self.block_frames * self.grid[0] * self.grid[1]

    @property
    def compressed_grid(self) -> tuple[int, int, int]:
        """Time steps, rows and columns of a compressed block (paper, section 3.3)."""
        return (self.block_frames + 1) // 2, self.grid[0] // 4, self.grid[1] // 4

    @property
    def compressed_tokens(self) -> int:
        """Tokens of a compressed block, N_c."""
        t, h, w = self.compressed_grid
        return t * h * w

    @property
    def context_tokens(self) -> int:
        """Tokens of context once every partition is full, C."""
        full = self.policy.sink + self.policy.recent
        return full * self.block_tokens + self.policy.mid * self.compressed_tokens

    @property
    def token_dim(self) -> int:
        """Channels of one patchified token, P."""
        return self.latent_channels * self.patch**2

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def block_pixel_frames(self) -> int:
        """Frames the decoder yields per block, before the first block is trimmed."""
        return self.block_frames * TEMPORAL_FACTOR

    @property
    def trimmed_frames(self) -> int:
        """Frames at the very start that stand for time before the video: Wan's first latent
        is one frame long, the tiny decoder makes four of it."""
        return TEMPORAL_FACTOR - 1

    @property
    def mid_span(self) -> float:
        """Latent frames a compressed block takes up: absolute positions know only its own."""
        span = self.policy.mid_span
        if span is None or self.policy.positions == "absolute":
            return float(self.block_frames)
        return float(span)

    def frames(self, seconds: float) -> int:
        """Pixel frames of a video of this length."""
        return round(seconds * self.fps)

    def blocks(self, frames: int, scenes: int = 1) -> int:
        """Blocks to generate for this many pixel frames of a video in scenes, each of them
        trimmed at its start; also the first block that begins at or after this frame."""
        return -(-(frames + self.trimmed_frames * scenes) // self.block_pixel_frames)


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
            text_dim=len(VOCABULARY),
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
    """A model of the Self-Forcing family: no compressor, absolute positions unless said."""
    given = {"block_frames": 3, "compressor_widths": (), **changes}
    return msgspec.structs.replace(PAPER, name=name, policy=policy, **given)


def _window(recent: int, sink: int = 0, restart: int = 0) -> Policy:
    return Policy(sink=sink, mid=0, recent=recent, positions="absolute", restart=restart)


# As published, except that windows go on sliding where Self-Forcing and Causal-Forcing stop after
# 21 frames, the current ones included, and that a history has whole blocks: Infinity-RoPE's sink
# of one frame and window of two are a block each.
MODELS |= {
    config.name: config
    for config in (
        _published("self-forcing", _window(6)),
        _published(
            "causvid", _window(6, restart=7), timesteps=(1000, 757, 522), warp=False, shift=8.0
        ),
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


def model_config(name: str) -> Config:
    """The preset of this name; raises `ConfigError` naming the known ones."""
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
# Those in TAEHV's layout, which their tensors cannot tell apart
TINY_AUTOENCODERS = [name for name, sizes in AUTOENCODERS.items() if sizes is _TINY]


def with_autoencoder(config: Config, name: str) -> Config:
    """The config with one of `AUTOENCODERS` at its published size, unless it has that already.

    Raises `ConfigError` for a model of other latents than Wan's.
    """
    if name == config.vae:
        return config
    _require(config.wan_latents, f"{config.name} has latents of its own, that '{name}' is not for")
    return msgspec.structs.replace(config, vae=name, **AUTOENCODERS[name])


def policies(config: Config) -> dict[str, Policy]:
    """What a model can be rolled out under, beside what it was published with.

    "packforcing" is the model's own policy if it compresses, else the paper's: as many sink and
    recent frames, in whole blocks, and as many compressed blocks. The windows hold as many full
    blocks as the model's own context has room for, so that they compare at equal memory:
    "sliding-window" as in Self-Forcing and CausVid (packed or absolute, positions within a window
    differ by the same), "sink-window" as in StreamingLLM, and in LongLive but for its absolute
    positions. The other names change one thing in "packforcing": how mid blocks are selected, how
    many sink blocks there are, the positions a mid block spans (a half or a quarter of its own
    latent frames), and, where the model has a compressor, the branch that stands for both.
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
    packed = own if own.mid else paper
    changes: dict[str, dict[str, Any]] = {
        "first-step": {"selection": "first-step"},
        "likeness": {"selection": "likeness"},
        "recency": {"selection": "recency"},
        "random": {"selection": "random"},
        **{f"sink-{blocks}": {"sink": blocks} for blocks in range(3)},
        "half-span": {"mid_span": config.block_frames / 2},
        "quarter-span": {"mid_span": config.block_frames / 4},
    }
    if config.compressor_widths:
        changes |= {f"{branch}-branch": {"branches": branch} for branch in ("high", "low")}
    return {
        "packforcing": packed,
        "sliding-window": Policy(sink=0, mid=0, recent=window),
        "sink-window": Policy(sink=sink, mid=0, recent=window - sink),
        "full-history": Policy(sink=0, mid=0, recent=1_000_000),
        **{
            f"packforcing-{name}": msgspec.structs.replace(packed, **change)
            for name, change in changes.items()
        },
    }
