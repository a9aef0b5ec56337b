"""Which prompt a video follows when, and what a switch does to its history. Free of torch.

A switch takes effect with the first block that begins at or after its time, both counted in whole
frames; that block and those after it follow the new prompt. What they read of the past is the
switch's `history`:

keep: all of it, as it is. Only the prompt's own keys and values are computed anew.

recompute: the recent blocks' keys and values are computed anew under the new prompt, from clean
latents at t = 0, block by block, oldest first. Each block reads the sink, the mids selected now
and the recomputed blocks before it, and stands where the next block will read it. Sink and
archive, pooled keys included, keep the prompt they were made under, and so does the selection
until the next commit. A policy without recent blocks has nothing to recompute.
    LongLive recomputes too, but in one call over its last 12 frames without a causal mask: frames
    there read later ones, and one block more than the next block will read. Here no block reads a
    later one, as when it was made, and no more than a block is computed at once. Its sink, too,
    keeps the old prompt, but for a switch within the first 12 frames.

cut: nothing. Sink, recent blocks, archive, positions and the decoder's state begin as in a new
video, whose first frames are trimmed like any video's. From the cut on, a video is the one that
would be made of the new prompt alone, bit for bit, but that its random numbers, drawn for (seed,
block, step), go on counting blocks from the beginning.

A policy that restarts (CausVid's) does so before a switch of the other two kinds takes effect: the
block that both rollouts share is made under the old prompt, and `recompute` makes its keys and
values anew as the only recent block there is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import msgspec
import numpy as np

from packforcing.config import Config
from packforcing.embeddings import Embedding, load_embedding, pad_embedding
from packforcing.errors import PromptError
from packforcing.words import encode_words

History = Literal["keep", "recompute", "cut"]
LARGEST = 1 << 20  # bytes of a schedule file


Prompt: TypeAlias = str | np.ndarray | Embedding  # words, or an embedding, float [T, text_dim]


@dataclass(frozen=True)
class Switch:
    """Another prompt from `time` on, in seconds; the first of a schedule begins the video."""

    time: float
    prompt: Prompt
    history: History = "keep"


Prompts: TypeAlias = Prompt | Sequence[Switch]


class Timeline(NamedTuple):
    """A schedule in blocks."""

    blocks: int  # of the whole video
    switches: dict[int, Switch]  # by the block they take effect with, from 0 on, in order


def encode(prompt: Prompt, config: Config) -> np.ndarray:
    """What the model reads of one prompt, float32 [1, text_len, text_dim].

    Raises `PromptError`.
    """
    if isinstance(prompt, str):
        return encode_words(prompt, config)
    rows = prompt.text if isinstance(prompt, Embedding) else prompt
    if not isinstance(rows, np.ndarray):
        raise PromptError(f"a prompt is words or an embedding, not {rows!r:.50}")
    return pad_embedding(rows, config)


def as_schedule(prompt: Prompts) -> Sequence[Switch]:
    """A schedule as it is, and one of a single prompt."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return prompt
    return [Switch(0, prompt)]


def plan_prompts(prompt: Prompts, config: Config, frames: int) -> Timeline:
    """When a video of this many frames follows which prompt; all of them are checked.

    Raises `PromptError` naming the switch that is wrong.
    """
    switches: dict[int, Switch] = {}
    scenes, begun = 1, -1  # the frame with which the latest switch takes effect
    schedule = as_schedule(prompt)
    for number, switch in enumerate(schedule, 1):
        try:
            _check(switch, switches, frames / config.fps)
            encode(switch.prompt, config)
            frame = config.frames(switch.time)
            if frame <= begun:
                raise PromptError(
                    f"no block begins between the one before and {switch.time:g} s, so that one "
                    "would never be followed: set them further apart"
                )
            block = config.blocks(frame, scenes) if switches else 0
            if block >= config.blocks(frames, scenes):
                raise PromptError(
                    f"no block begins between {switch.time:g} s and the end of the video at "
                    f"{frames / config.fps:g} s: make it earlier, or the video longer"
                )
        except PromptError as error:
            raise PromptError(
                str(error) if schedule is not prompt else f"switch {number}: {error}"
            ) from error
        switches[block] = deepcopy(switch)  # an array may change before the video gets there
        begun = block * config.block_pixel_frames - config.trimmed_frames * scenes if block else 0
        scenes += switch.history == "cut"
    if not switches:
        raise PromptError("the schedule is empty: begin it with a prompt at time 0")
    return Timeline(config.blocks(frames, scenes), switches)


def _check(switch: Switch, before: dict[int, Switch], end: float) -> None:
    """Raises `PromptError` unless `switch` can follow the ones before it, whatever the blocks."""
    if not isinstance(switch, Switch) or not isinstance(switch.time, Real):
        raise PromptError(f"a schedule lists Switch(seconds, prompt), not {switch!r:.50}")
    if switch.history not in get_args(History):
        known = ", ".join(get_args(History))
        raise PromptError(f"history is one of {known}, not '{switch.history}'")
    if not before and switch.time != 0:
        raise PromptError(f"the first prompt begins the video, at time 0, not {switch.time:g}")
    if not before and switch.history != "keep":
        raise PromptError(f"the first prompt has no history to {switch.history}")
    if not 0 <= switch.time < end:
        raise PromptError(f"the video lasts from 0 to {end:g} s, {switch.time:g} is not in it")
    latest = max((other.time for other in before.values()), default=-1.0)
    if switch.time <= latest:
        raise PromptError(f"times must rise, but {switch.time:g} s follows {latest:g} s")


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    time: float
    prompt: str | None = None
    embedding: str | None = None
    history: History = "keep"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    switch: list[_Entry]


def read_schedule(path: str | os.PathLike[str]) -> list[Switch]:
    """Reads a schedule from a TOML file, a table [[switch]] per prompt: `time` in seconds,
    `prompt`, or `embedding` with the name of a file beside it, and `history`.

    Raises `PromptError` for a file that is missing, too large or no such list.
    """
    load = functools.cache(lambda name: load_embedding(Path(path).parent / name))
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise PromptError(f"{path} is no schedule: it is larger than {LARGEST} bytes")
        entries = msgspec.toml.decode(text, type=_File).switch
    except OSError as error:
        raise PromptError(f"cannot read a schedule from {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is no schedule: {error}") from error
    switches = []
    for number, entry in enumerate(entries, 1):
        if (entry.prompt is None) == (entry.embedding is None):
            raise PromptError(f"{path}: switch {number} takes one of 'prompt' and 'embedding'")
        prompt = load(entry.embedding) if entry.prompt is None else entry.prompt
        switches.append(Switch(entry.time, prompt, entry.history))
    return switches
