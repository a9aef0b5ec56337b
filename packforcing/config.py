"""The checked description of a model and of how it is rolled out.

Every size in the project derives from `Config`; no other file holds a shape as a literal.
The published models are in `presets.py`. Free of torch, so that the runtime can read it.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Literal

import msgspec

from packforcing.errors import ConfigError

TEMPORAL_FACTOR = 4  # pixel frames per latent frame, in Wan's VAE and in TAEHV alike
WAN_CHANNELS = 16  # latent channels of Wan's VAE
# words that the "words" text encoder knows, one channel of text_dim each; the first demo models
# knew no places, so that they have fewer channels
WORD_COUNT, FIRST_WORD_COUNT = 30, 22

# A bundle's config may come from anybody. Sizes that no model has are refused here, before any
# arithmetic or allocation uses them.
MAX_SIZE, MAX_LAYERS, MAX_TEXT_VALUES = 1 << 20, 1 << 10, 1 << 26


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which blocks of the history a block reads (PackForcing, sections 3.2 to 3.5).

    Attributes:
        sink: Blocks at the start of the video, read at full resolution.
        mid: Compressed blocks, selected from the archive.
        recent: Newest blocks, read at full resolution.
        selection: How mid blocks are selected when a block is committed. A block that follows
            another prompt selects by affinity once more, with the queries of its first step;
            under "first-step" every block does, as in the paper.
        positions: Temporal RoPE positions: counted over the blocks in context, or over the video.
        mid_span: Latent frames that a compressed block spans in packed positions, fractions
            allowed. None: as many as it stands for.
        branches: Of the compressor: the sum of both (section 3.3), or one alone.
        commit: Where the keys and values that a block leaves to the history come from: a call at
            t = 0 on the clean block, as published, or the last denoising step, which saves that
            call.
        restart: Blocks per rollout; 0 means one unbounded rollout. A longer video is a chain of
            rollouts. Each begins with the last block of the one before, as CausVid publishes it:
            the last pixel frame decoded from the block's first latent frame is encoded as the first
            frame of a video; keys, values and the decoder's state are computed from it without a
            past, and later frames are decoded from that state.
    """

    sink: int
    mid: int
    recent: int
    selection: Literal["affinity", "first-step", "likeness", "recency", "random"] = "affinity"
    positions: Literal["packed", "absolute"] = "packed"
    mid_span: float | None = None
    branches: Literal["both", "high", "low"] = "both"
    restart: int = 0
    commit: Literal["clean", "last-step"] = "clean"

    def __post_init__(self) -> None:
        for name in ("sink", "mid", "recent"):
            _require(
                0 <= getattr(self, name) <= MAX_SIZE, f"policy.{name} must be from 0 to {MAX_SIZE}"
            )
        _require(self.mid_span is None or self.mid_span > 0, "policy.mid_span must be positive")
        _require(
            self.restart == 0 or 2 <= self.restart <= MAX_SIZE,
            f"policy.restart must be 0, or from 2 to {MAX_SIZE}: a rollout shares its first block "
            "with the one before",
        )

    @property
    def capacity(self) -> int:
        """Blocks in context, beside the current one, once every partition is full."""
        return self.sink + self.mid + self.recent

    def __str__(self) -> str:
        """Describe the policy in a line."""
        selected = f"by {self.selection}, " if self.mid else ""
        restarts = f", restarted every {self.restart} blocks" if self.restart else ""
        commits = ", committed by the last step" if self.commit == "last-step" else ""
        return (
            f"{self.sink} sink, {self.mid} mid and {self.recent} recent blocks, "
            f"{selected}{self.positions} positions{restarts}{commits}"
        )

    def fit_to_video(self, blocks: int, own: Policy) -> Policy:
        """Return the policy with no more recent slots than a video can fill.

        Only full history, a policy with more recent blocks than any video has, depends on the
        length.

        Args:
            blocks: Blocks of the video.
            own: The model's own policy. At least its recent slots remain.
        """
        recent = min(self.recent, max(own.recent, blocks - 1))
        return msgspec.structs.replace(self, recent=recent)

    def full_resolution_blocks(self, block: int) -> tuple[range, range]:
        """Return the sink and the recent blocks that a block reads at full resolution.

        Args:
            block: Index of the block that is generated, in a video without cuts.
        """
        start = self.rollout_start(block)
        sink = min(start + self.sink, block)
        return range(start, sink), range(max(sink, block - self.recent), block)

    def rollout_start(self, block: int) -> int:
        """Return the first block of the rollout that generates `block`, in a video without cuts."""
        new_blocks = self.restart - 1  # per rollout, without the shared one
        return max(0, block - 1) // new_blocks * new_blocks if self.restart else 0


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The dtypes of a bundle: of activations, of the denoiser's weights, of the KV cache.

    Small tensors that the host reads or writes (tokens, flow, latents, pooled queries and keys) are
    fp32 throughout.

    Attributes:
        compute: Of activations, and of every weight that is not quantized.
        weights: Of the matrices of the denoiser's inner layers. int8 and int4 are dequantized when
            they are read. "w8a8" is int8 whose products are int8 as well; fp8 and nvfp4 (E2M1 in
            blocks of 16 with fp8 scales) multiply in their own dtype too.
        cache: Of keys and values.
        attention: Of the products of self-attention; None: as `compute`.
    """

    compute: Literal["fp32", "fp16"] = "fp32"
    weights: Literal["fp32", "fp16", "int8", "w8a8", "int4", "fp8", "nvfp4"] = "fp32"
    cache: Literal["fp32", "fp16", "int8", "fp8"] = "fp32"
    attention: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        other = {"fp32", "fp16"} - {self.compute}
        for name in ("weights", "cache"):
            _require(
                getattr(self, name) not in other,
                f"precision.{name} is {getattr(self, name)}, but precision.compute is "
                f"{self.compute}: use the same dtype, or a quantized one",
            )

    def __str__(self) -> str:
        """Describe in a line what is beside the dtype of the computation."""
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{self.weights} weights, {self.cache} cache{attention}"

    @property
    def products(self) -> str:
        """The dtype in which the quantized matrices are multiplied."""
        own = {"w8a8": "int8", "fp8": "fp8", "nvfp4": "nvfp4"}
        return own.get(self.weights, self.compute)

    @property
    def attention_products(self) -> str:
        """The dtype in which self-attention multiplies."""
        return self.attention or self.compute


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A causal Wan video transformer, its autoencoder, compressor, sampler and policy."""

    name: str
    # video: pixels, frames per second
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
    # autoencoder: the tiny one in TAEHV's layout, the same in the scale of Wan's latents, or Wan's
    # own; `presets.with_autoencoder` has the published sizes
    vae: Literal["taehv", "lighttae", "wan"] = "taehv"
    vae_patch: int = 1  # pixels folded into channels along each axis
    vae_encoder_width: int = 64  # width of the narrowest stage, for Wan's
    vae_decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    vae_strips: int = 1  # horizontal strips in which the tiny decoder's last stage works
    # few-step sampler: timesteps before the shift; "renoise" for distilled models, or "euler"
    sampler: Literal["renoise", "euler"] = "renoise"
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    first_timesteps: tuple[float, ...] = ()  # of the first block generated; empty: the same
    warp: bool = True  # whether the model's input is the shifted timestep, or the one listed
    shift: float = 5.0
    policy: Policy
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        positive = ("height", "width", "fps", "dim", "heads", "layers", "ffn_dim", "block_frames",
                    "latent_channels", "patch", "freq_dim", "eps", "text_len", "text_dim",
                    "vae_patch", "vae_encoder_width", "vae_strips", "shift")  # fmt: skip
        for name in positive:
            _require(
                0 < getattr(self, name) <= MAX_SIZE, f"{name} must be above 0, at most {MAX_SIZE}"
            )
        _require(self.layers <= MAX_LAYERS, f"layers must be at most {MAX_LAYERS}")
        _require(
            self.text_len * self.text_dim <= MAX_TEXT_VALUES, "text_len x text_dim is too large"
        )
        for width in (*self.compressor_widths, *self.vae_decoder_widths):
            _require(0 < width <= MAX_SIZE, f"every width must be above 0, at most {MAX_SIZE}")
        _require(
            self.vae == "taehv" or self.wan_latents,
            f"the autoencoder '{self.vae}' needs {WAN_CHANNELS} latent_channels and a vae_patch "
            "of 1",
        )
        *wider, narrow = self.vae_decoder_widths
        _require(
            self.vae != "wan"
            or (self.vae_strips == 1 and not any(n % narrow or n % 2 for n in wider)),
            "Wan's autoencoder needs vae_strips of 1, and vae_decoder_widths that are even "
            "multiples of the last one",
        )
        cell = self.spatial_factor * self.patch
        _require(
            self.height % cell == 0 and self.width % cell == 0,
            f"{self.width}x{self.height} pixels are not a whole number of tokens: width and height "
            f"must be multiples of {cell}; nearest: {self._nearest_sizes(cell)}",
        )
        _require(self.dim % self.heads == 0, "dim must be a multiple of heads")
        _require(
            self.head_dim % 2 == 0 and self.head_dim >= 6, "dim / heads must be even and at least 6"
        )
        _require(self.freq_dim % 2 == 0, "freq_dim must be even")
        _require(
            len(self.compressor_widths) in (0, 4),
            "compressor_widths must have four entries or none",
        )
        _require(
            self.policy.branches != "high" or len(self.compressor_widths) > 0,
            f"the high branch alone compresses nothing: {self.name} has no compressor",
        )
        _require(
            self.policy.mid == 0 or min(self.grid) >= 4,
            f"a {self.grid[0]}x{self.grid[1]} token grid is too small to compress: mid blocks need "
            f"at least 4x4, which is {4 * cell}x{4 * cell} pixels",
        )
        _require(
            self.text_encoder != "words" or self.text_dim >= FIRST_WORD_COUNT,
            f"the words encoder needs a text_dim of at least {FIRST_WORD_COUNT}",
        )
        _require(len(self.timesteps) > 0, "timesteps must not be empty")
        for steps in filter(None, (self.timesteps, self.first_timesteps)):
            _require(
                steps[0] <= 1000 and steps[-1] > 0 and all(a > b for a, b in pairwise(steps)),
                "timesteps must decrease from at most 1000 and stay above 0",
            )

    def _nearest_sizes(self, cell: int) -> str:
        """Name the sizes around this one that are whole numbers of tokens, the nearest first."""
        fewest = 4 * cell if self.policy.mid else cell
        sides = [
            {max(fewest, side // cell * cell), max(fewest, -(-side // cell) * cell)}
            for side in (self.width, self.height)
        ]
        sizes = sorted(
            product(*sides),
            key=lambda size: (abs(size[0] - self.width) + abs(size[1] - self.height), size),
        )
        return " or ".join(f"{width}x{height}" for width, height in sizes[:2])

    @property
    def wan_latents(self) -> bool:
        """Whether the latents have the shape of Wan's."""
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
        """Time steps, rows and columns of a compressed block's tokens (paper, section 3.3)."""
        return (self.block_frames + 1) // 2, self.grid[0] // 4, self.grid[1] // 4

    @property
    def compressed_tokens(self) -> int:
        """Tokens of a compressed block, N_c."""
        t, h, w = self.compressed_grid
        return t * h * w

    @property
    def context_tokens(self) -> int:
        """Context tokens once every partition is full, C."""
        full = self.policy.sink + self.policy.recent
        return full * self.block_tokens + self.policy.mid * self.compressed_tokens

    @property
    def token_dim(self) -> int:
        """Channels of one patchified token, P."""
        return self.latent_channels * self.patch**2

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, d."""
        return self.dim // self.heads

    @property
    def block_pixel_frames(self) -> int:
        """Pixel frames that the decoder yields per block, before the first block is trimmed."""
        return self.block_frames * TEMPORAL_FACTOR

    @property
    def trimmed_frames(self) -> int:
        """Pixel frames dropped at the start of a video.

        Wan's first latent frame stands for one pixel frame, of which the decoder makes four.
        """
        return TEMPORAL_FACTOR - 1

    @property
    def mid_span(self) -> float:
        """Latent frames that a compressed block spans in temporal RoPE positions."""
        span = self.policy.mid_span
        if span is None or self.policy.positions == "absolute":
            return float(self.block_frames)
        return float(span)

    @property
    def lookahead_frames(self) -> int:
        """Pixel frames past those of a latent frame that the encoder reads before it gives it.

        Latent frame i stands for pixel frames 4i - 3 to 4i. Wan's VAE is given these. taew2_1 and
        lighttaew2_1 are given 4i to 4i + 3: TAEHV pads a clip at its end, and trims what it
        decodes at the start. Autoencoders with latents of their own, like the demo's, are trained
        to return four frames where they were given them.
        """
        return self.trimmed_frames if self.vae != "wan" and self.wan_latents else 0

    def frames(self, seconds: float) -> int:
        """Return the pixel frames of a video of this length."""
        return round(seconds * self.fps)

    def blocks(self, frames: int, scenes: int = 1) -> int:
        """Return the blocks to generate for a video of this many pixel frames.

        This is also the first block that begins at or after the frame of this index.

        Args:
            frames: Pixel frames.
            scenes: Scenes of the video. The first block of each is trimmed.
        """
        return -(-(frames + self.trimmed_frames * scenes) // self.block_pixel_frames)
