"""The published models of the family: where their weights are, and how they are stored.

How a model is rolled out (block size, schedule, sampler, policy, positions) is its `Config` in
`packforcing.presets.MODELS`, under the same name. The model folder, which `packforcing
import-checkpoint` writes, is described here as well. Free of torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from packforcing.config import Config
from packforcing.errors import CheckpointError
from packforcing.files import Upgrade, VersionError, decode_versioned
from packforcing.origins import UNKNOWN, UNREAD, Origin
from packforcing.presets import MODELS, PAPER
from packforcing.sampler import describe_steps


class Published(msgspec.Struct, frozen=True):
    """One model as it is published."""

    source: str  # repository on Hugging Face; empty where none is known
    files: tuple[str, ...]  # paths in the repository
    entry: str  # of a torch checkpoint that is run; the EMA where that is published to be run
    license: str = msgspec.field(name="licence")  # of the weights
    lora: bool = False  # whether the last file is a LoRA, without which this is another model
    refused: str = ""  # why it cannot be rendered
    note: str = ""  # how it is rolled out otherwise than published, under its own policy


_SELF_FORCING, _CAUSVID = "gdhe17/Self-Forcing", "tianweiy/CausVid"
_CAUSAL_FORCING = "zhuhz22/Causal-Forcing"
_SLIDES = "the window keeps sliding where the published code stops, after 21 latent frames"
_NO_CONFIG = "its settings are not published: those of self-forcing are used"

PUBLISHED: dict[str, Published] = {
    "self-forcing": Published(
        _SELF_FORCING, ("checkpoints/self_forcing_dmd.pt",), "generator_ema", "CC-BY-NC-SA-4.0",
        note=_SLIDES,
    ),
    "causvid": Published(_CAUSVID, ("autoregressive_checkpoint/model.pt",), "generator", UNREAD),
    "causal-forcing": Published(
        _CAUSAL_FORCING, ("chunkwise/causal_forcing.pt",), "generator", UNREAD, note=_SLIDES
    ),
    "causal-forcing-frame": Published(
        _CAUSAL_FORCING, ("framewise/causal_forcing.pt",), "generator_ema", UNREAD, note=_SLIDES
    ),
    "causal-forcing-frame-2step": Published(
        _CAUSAL_FORCING, ("causal-forcing++/framewise-2step.pt",), "generator_ema", UNREAD,
        note=_SLIDES,
    ),
    "causal-forcing-frame-1step": Published(
        _CAUSAL_FORCING, ("causal-forcing++/framewise-1step.pt",), "generator_ema", UNREAD,
        note=_SLIDES,
    ),
    "causal-forcing-long": Published(
        _CAUSAL_FORCING, ("chunkwise/longvideo.pt",), "generator_ema", UNREAD,
        refused="it is rolled out like rolling-forcing, four blocks together at four noise levels; "
        "a call here has one level: use causal-forcing",
    ),
    "longlive": Published(
        "Efficient-Large-Model/LongLive-1.3B", ("models/longlive_base.pt", "models/lora.pt"),
        "generator", "Apache-2.0 (the repository's; the weights' was not read here)", lora=True,
        note="a prompt switch recomputes block after block, where LongLive computes its last 12 "
        "latent frames in one call; its infinite mode is --policy sink-window",
    ),
    "infinity-rope": Published(
        "SOTAMak1r/Infinite-Forcing", ("checkpoints/ema_model.pt",), "generator_ema", UNREAD,
        note="a history has whole blocks: the published sink of one latent frame and the window of "
        "two are a block of three each, so that 9 frames are read where 6 are published",
    ),
    "packforcing-unofficial": Published("", (), "generator_ema", "its trainer's"),
    "self-forcing-sid": Published(
        _SELF_FORCING, ("checkpoints/self_forcing_sid.pt",), "generator_ema", "CC-BY-NC-SA-4.0",
        note=_SLIDES,
    ),
    "self-forcing-sid-v2": Published(
        _SELF_FORCING, ("checkpoints/self_forcing_sid_v2.pt",), "generator_ema", "CC-BY-NC-SA-4.0",
        note=f"{_NO_CONFIG}; {_SLIDES}",
    ),
    "self-forcing-gan": Published(
        _SELF_FORCING, ("checkpoints/self_forcing_gan.pt",), "generator_ema", "CC-BY-NC-SA-4.0",
        note=f"{_NO_CONFIG}; {_SLIDES}",
    ),
    "self-forcing-10s": Published(
        _SELF_FORCING, ("checkpoints/self_forcing_10s.pt",), "generator_ema", "CC-BY-NC-SA-4.0",
        note=f"{_NO_CONFIG}, with a sliding window of 21 latent frames",
    ),
    "causvid-4step": Published(
        _CAUSVID, ("autoregressive_checkpoint_warp_4step_cfg2/model.pt",), "generator", UNREAD
    ),
    "wan2.1-t2v-1.3b": Published(
        "Wan-AI/Wan2.1-T2V-1.3B", ("diffusion_pytorch_model.safetensors",), "", "Apache-2.0",
        refused="it denoises a whole clip at once, over many guided steps, and is not causal: use "
        "a distilled model of the family",
    ),
    "rolling-forcing": Published(
        "TencentARC/RollingForcing", ("checkpoints/rolling_forcing_dmd.pt",), "generator_ema",
        UNREAD,
        refused="it denoises five blocks together at five noise levels; a call here has one level",
    ),
}  # fmt: skip

# Files of the same repositories that are not models to run here, and what to do instead
_UNDISTILLED = "it is not distilled and needs many guided steps"
_INITIALIZATION = "it is an initialization for training"
UNSUPPORTED: dict[str, str] = {
    "causal-forcing-ar": f"{_UNDISTILLED}: use causal-forcing",
    "causal-forcing-frame-ar": f"{_UNDISTILLED}: use causal-forcing-frame",
    "causal-forcing-cd": f"{_INITIALIZATION}: use causal-forcing",
    "causal-forcing-ode": f"{_INITIALIZATION}: use causal-forcing",
    "causvid-bidirectional": "it denoises a whole clip at once and is not causal: use causvid",
    "causvid-ode": f"{_INITIALIZATION}: use causvid",
    "longlive-2.0": "it is another transformer, Wan2.2 TI2V 5B, with another autoencoder: use "
    "longlive",
    "self-forcing-ode": f"{_INITIALIZATION}: use self-forcing",
}

# Parts that models need beside their transformer
PARTS: dict[str, Published] = {
    "taew2_1": Published("lightx2v/Autoencoders", ("taew2_1.pth",), "", UNREAD),
    "lighttaew2_1": Published("lightx2v/Autoencoders", ("lighttaew2_1.safetensors",), "", UNREAD),
    "wan-vae": Published("Wan-AI/Wan2.1-T2V-1.3B", ("Wan2.1_VAE.pth",), "", "Apache-2.0"),
    "umt5-xxl": Published(
        "Wan-AI/Wan2.1-T2V-1.3B",
        (
            "models_t5_umt5-xxl-enc-bf16.pth",
            "google/umt5-xxl/tokenizer.json",
        ),
        "",
        "Apache-2.0",
    ),
}


# The autoencoders among them, by the name in a config
AUTOENCODER_PARTS = {"taehv": "taew2_1", "lighttae": "lighttaew2_1", "wan": "wan-vae"}


def published(kind: str) -> Published:
    """Look up a published model by name.

    Raises:
        CheckpointError: There is none of this name, or it is not supported.
    """
    require_supported(kind)
    if kind not in PUBLISHED:
        raise CheckpointError(f"unknown kind of model '{kind}'; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[kind]


def require_supported(kind: str) -> None:
    """Raise `CheckpointError` for a name in `UNSUPPORTED`."""
    if kind in UNSUPPORTED:
        raise CheckpointError(f"{kind} is not supported: {UNSUPPORTED[kind]}")


def published_config(kind: str) -> Config:
    """Return how a published model is rolled out.

    For a model that cannot be rendered, only the sizes of its transformer are right.
    """
    plain = msgspec.structs.replace(PAPER, name=kind, compressor_widths=())
    return MODELS.get(kind, plain)


def describe_differences(config: Config) -> list[str]:
    """Say how a model is rolled out otherwise than it was published, a line for each difference.

    Args:
        config: Of a model that may be published, with whatever was changed since.
    """
    own, row = MODELS.get(config.name), PUBLISHED.get(config.name)
    if own is None or row is None:
        return []
    lines = [row.note] if row.note and config.policy == own.policy else []
    facts = [
        {
            "denoising": describe_steps(one),
            "blocks": f"{one.block_frames} latent frames",
            "history": str(one.policy),
        }
        for one in (config, own)
    ]
    for name, value in facts[0].items():
        if value != facts[1][name]:
            lines.append(f"{name}: {value}; published with {facts[1][name]}")
    return lines


# The folder of an imported model

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
VERSION = 3  # of the description
# Version 1 had no field for it; version 2 adds `policy.commit` and `precision.attention`
UPGRADES: dict[int, Upgrade] = {
    1: lambda fields: {**fields, "version": 2},
    2: lambda fields: _with_origins(**fields),
}


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description in model.json of the weights beside it."""

    kind: str
    config: Config
    autoencoder: bool  # whether the autoencoder's weights are among them
    made_from: list[str]
    origins: tuple[Origin, ...]
    version: int = VERSION


def _with_origins(source: str, licence: str, **fields: Any) -> dict[str, Any]:
    """Turn a description of version 2, which omits the autoencoder's license, into version 3."""
    origins = [{"part": "transformer", "source": source, "license": licence}]
    if fields["autoencoder"]:
        origins.append({"part": "autoencoder", "source": "", "license": UNKNOWN})
    return {**fields, "origins": origins}


def read_model_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Read the description of a model folder. Older versions are upgraded where `UPGRADES` can.

    Raises:
        CheckpointError: The folder is not one, is damaged, or its model cannot be exported.
    """
    file = Path(path) / DESCRIPTION
    try:
        folder = decode_versioned(
            file.read_bytes(), ModelFolder, VERSION, UPGRADES, "import the checkpoint again"
        )
    except VersionError as error:
        raise CheckpointError(f"{file} {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a model folder: cannot read {DESCRIPTION} ({error.strerror}); "
            "make one with 'packforcing import-checkpoint'"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; import the checkpoint again") from error
    if refused := published(folder.kind).refused:
        raise CheckpointError(f"{path} holds {folder.kind}, which cannot be rendered: {refused}")
    if not folder.autoencoder:
        raise CheckpointError(
            f"{path} has no autoencoder: import the checkpoint again together with one's weights "
            f"({' '.join(folder.made_from)} taew2_1.pth, or Wan2.1_VAE.pth)"
        )
    return folder
