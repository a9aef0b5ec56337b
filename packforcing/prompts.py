"""Prompt schedules: which prompt a video follows when, and what a switch does to its history.

A switch takes effect with the first block that begins at or after its time, both counted in whole
frames. That block and the later ones follow the new prompt. The switch's `history` says what they
read of the past:

keep: the history as it is. Only the prompt's own keys and values (of cross-attention) are computed
again.

recompute: the keys and values of the recent blocks are computed again under the new prompt, from
clean latents at t = 0, block by block, oldest first. Each block reads the sink, the mid blocks
selected now and the recomputed blocks before it, at the positions where the next block will read
them. Sink and archive, pooled keys included, keep the prompt they were made under, and so does the
selection until the next commit. A policy without recent blocks has nothing to recompute.
    LongLive recomputes too, but in one call over its last 12 frames without a causal mask: frames
    there read later ones, and one block more than the next block will read. Here no block reads a
    later one, as when it was made, and no more than a block is computed at once. LongLive's sink,
    too, keeps the old prompt, except for a switch within the first 12 frames.

cut: nothing. Sink, recent blocks, archive, positions and the decoder's state begin as in a new
video, whose first frames are trimmed as any video's are. From the cut on, the frames are
bit-identical to those of the new prompt alone, except that random numbers, drawn for (seed, block,
step), continue to count blocks from the beginning of the video.

A switch that names no history does what the model was published with: recompute for LongLive, keep
for the others.

A switch may blend over several blocks (`over`): block i of n follows the embedding that is i/n of
the way from what was followed before to the new prompt, row by row along the great circle between
them, with lengths in proportion (spherical interpolation; rows that are zero or opposite are
interpolated linearly). The n-th block and the later ones follow the new prompt itself. The history
is kept or recomputed at each of the n blocks, as if each were a switch of its own. A later switch
ends a blend where it is, and begins from there. A cut does not blend.

A policy that restarts (CausVid's) does so before a switch takes effect, as a live switch may come
at any time: the block that both rollouts share is generated under the old prompt, and `recompute`
computes its keys and values again, as the only recent block there is. A video that ends with that
block shows it as the old rollout made it, a longer one as the next rollout begins with it.

Free of torch.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec
import numpy as np

from packforcing.config import Config
from packforcing.embeddings import (
    SUFFIX,
    Embedding,
    check_embedding,
    load_embedding,
    pad_embedding,
    save_embedding,
)
from packforcing.errors import PromptError
from packforcing.files import write_file
from packforcing.presets import switch_history
from packforcing.text_files import decode_text
from packforcing.words import encode_words

History = Literal["keep", "recompute", "cut"]
MAX_FILE_BYTES = 1 << 20  # of a schedule file
MAX_BLEND = 10_000  # blocks that a switch is spread over

Prompt: TypeAlias = str | np.ndarray | Embedding  # words, or an embedding, float [T, text_dim]


@dataclass(frozen=True)
class Switch:
    """A change to another prompt.

    Attributes:
        time: Seconds; the first switch of a schedule is at 0.
        prompt: The new prompt.
        history: What later blocks read of the past; None: what the model was published with.
        over: Blocks that the change is spread over.
        block: The block that it takes effect with, where that was recorded: `time` has to lead to
            it. None where it was not.
    """

    time: float
    prompt: Prompt
    history: History | None = None
    over: int = 1
    block: int | None = None

    @property
    def effect(self) -> History:
        """What it does to the history, in a timeline; of the first one, nothing."""
        return self.history or "keep"


@dataclass(frozen=True)
class Timeline:
    """A schedule in blocks, its prompts encoded.

    Attributes:
        blocks: Blocks of the whole video; None while it has no end.
        switches: By the block they take effect with, in order; the first is 0. All but the first
            have a history.
        embeddings: By the same block, float32 [1, text_len, text_dim].
        origins: What a switch that blends begins from, by the same block.
    """

    blocks: int | None
    switches: dict[int, Switch]
    embeddings: dict[int, np.ndarray]
    origins: dict[int, np.ndarray]

    def copy(self) -> Timeline:
        """Return one that may change on its own."""
        return Timeline(self.blocks, dict(self.switches), dict(self.embeddings), dict(self.origins))

    def follow(self, block: int, switch: Switch, embedding: np.ndarray) -> None:
        """Put a switch into effect from a block on; what was to follow later is forgotten.

        Args:
            block: The first block that it takes effect with.
            switch: The change.
            embedding: Its prompt, float32 [1, text_len, text_dim].
        """
        for later in [other for other in self.switches if other >= block]:
            for by_block in (self.switches, self.embeddings, self.origins):
                by_block.pop(later, None)  # type: ignore[attr-defined]
        if switch.over > 1:
            self.origins[block] = self.followed(block - 1)
        self.switches[block], self.embeddings[block] = switch, embedding

    def followed(self, block: int) -> np.ndarray:
        """Return the embedding that a block follows."""
        first = self._latest(block)
        share = min(1.0, (block - first + 1) / self.switches[first].over)
        target = self.embeddings[first]
        return blend(self.origins.get(first, target), target, share)

    def history(self, block: int) -> History | None:
        """Return what happens to the history before a block; None where no switch acts on it."""
        switch = self.switches[first := self._latest(block)]
        return switch.effect if 0 < first <= block < first + switch.over else None

    def forget(self, block: int) -> None:
        """Drop the embeddings that neither this block nor a later one follows."""
        latest = self._latest(block)
        for first in [other for other in self.embeddings if other < latest]:
            del self.embeddings[first]
            self.origins.pop(first, None)

    def _latest(self, block: int) -> int:
        return max(first for first in self.switches if first <= block)


def blend(before: np.ndarray, after: np.ndarray, share: float) -> np.ndarray:
    """Interpolate between two embeddings: spherically by direction, linearly by length.

    Args:
        before: float32 [..., D].
        after: The same shape.
        share: 0 gives `before`, 1 gives `after`, both exactly.

    Returns:
        float32 of the same shape.
    """
    if share in (0, 1):
        return after if share else before
    rows = before.astype(np.float64), after.astype(np.float64)
    lengths = [np.linalg.norm(part, axis=-1, keepdims=True) for part in rows]
    tiny = np.finfo(np.float32).tiny
    units = [part / np.maximum(length, tiny) for part, length in zip(rows, lengths)]
    cosine = np.clip((units[0] * units[1]).sum(-1, keepdims=True), -1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    spherical = (np.minimum(*lengths) > tiny) & (sine > 1e-6)
    sine = np.where(spherical, sine, 1)
    direction = (np.sin((1 - share) * angle) * units[0] + np.sin(share * angle) * units[1]) / sine
    length = (1 - share) * lengths[0] + share * lengths[1]
    straight = (1 - share) * rows[0] + share * rows[1]
    return np.where(spherical, direction * length, straight).astype(np.float32)


Prompts: TypeAlias = Prompt | Sequence[Switch] | Timeline


def encode_prompt(prompt: Prompt, config: Config) -> np.ndarray:
    """Encode a prompt as the model's input.

    Args:
        prompt: Words, where the model's text encoder is "words", or an embedding.
        config: The model.

    Returns:
        float32 [1, text_len, text_dim].

    Raises:
        PromptError: The model cannot read this prompt.
    """
    if isinstance(prompt, str):
        return encode_words(prompt, config)
    return pad_embedding(prompt.text if isinstance(prompt, Embedding) else prompt, config)


def as_schedule(prompts: Prompts) -> Sequence[Switch]:
    """Return the switches of a schedule; a single prompt becomes a schedule of one."""
    if isinstance(prompts, Timeline):
        return list(prompts.switches.values())
    if isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes | bytearray):
        return prompts
    return [Switch(0, prompts)]


def plan_switches(
    prompts: Prompts, config: Config, frames: int | None
) -> tuple[int | None, dict[int, Switch]]:
    """Find the block with which each switch takes effect. Needs no text encoder.

    Args:
        prompts: One prompt or a schedule. Words are not looked at.
        config: The model.
        frames: Pixel frames of the video; None: no end.

    Returns:
        Blocks of the whole video, None without an end, and the switches by block.

    Raises:
        PromptError: A switch can never be followed, or an embedding has another shape than the
            model reads. The message names the switch.
    """
    switches: dict[int, Switch] = {}
    scenes, latest_frame = 1, -1  # with which the latest switch takes effect
    for number, switch in enumerate(as_schedule(prompts), 1):
        with _naming_switch(prompts, number):
            _check_switch(switch, switches, config, frames)
            frame = config.frames(switch.time)
            if frame <= latest_frame:
                raise PromptError(
                    f"no block begins between the switch before and {switch.time:g} s, so that "
                    "the earlier prompt would never be followed: set the two further apart"
                )
            block = config.blocks(frame, scenes) if switches else 0
            if switch.block not in (None, block):
                raise PromptError(
                    f"{switch.time:g} s is block {block} of this model, block {switch.block} was "
                    "recorded: use the bundle that it was recorded with, or leave out 'block'"
                )
            if frames is not None and block >= config.blocks(frames, scenes):
                raise PromptError(
                    f"no block begins between {switch.time:g} s and the end of the video at "
                    f"{frames / config.fps:g} s: set the switch earlier, or make the video longer"
                )
        if switches and switch.history is None:
            switch = replace(switch, history=switch_history(config))
        switches[block] = switch
        trimmed = config.trimmed_frames * scenes
        latest_frame = block * config.block_pixel_frames - trimmed if block else 0
        scenes += switch.history == "cut"
    if not switches:
        raise PromptError("the schedule is empty: begin it with a prompt at time 0")
    return None if frames is None else config.blocks(frames, scenes), switches


def plan_prompts(prompts: Prompts, config: Config, frames: int | None) -> Timeline:
    """Plan a schedule in blocks and encode each of its prompts, once.

    Args:
        prompts: One prompt, a schedule, or a timeline planned before, which is checked again
            and returned.
        config: The model.
        frames: Pixel frames of the video; None: no end.

    Raises:
        PromptError: What `plan_switches` and `encode_prompt` raise. The message names the switch.
    """
    blocks, switches = plan_switches(prompts, config, frames)
    if isinstance(prompts, Timeline):
        shape = (1, config.text_len, config.text_dim)
        if (blocks, [*switches]) != (prompts.blocks, [*prompts.switches]) or any(
            rows.shape != shape for rows in prompts.embeddings.values()
        ):
            raise PromptError("the timeline was planned for another video: plan it again")
        return prompts
    timeline = Timeline(blocks, {}, {}, {})
    for number, (block, switch) in enumerate(switches.items(), 1):
        with _naming_switch(prompts, number):
            timeline.follow(block, switch, encode_prompt(switch.prompt, config))
    return timeline


@contextmanager
def _naming_switch(prompts: Prompts, number: int) -> Iterator[None]:
    """Put the number of a switch before an error's message, where the user wrote a schedule."""
    try:
        yield
    except PromptError as error:
        if as_schedule(prompts) is prompts:
            raise PromptError(f"switch {number}: {error}") from error
        raise


def _check_switch(
    switch: Switch, earlier: dict[int, Switch], config: Config, frames: int | None
) -> None:
    """Raise `PromptError` unless a switch can follow the earlier ones, whatever the blocks are."""
    if (
        not (isinstance(switch, Switch) and isinstance(switch.time, Real))
        or isinstance(switch.time, bool)
        or switch.time > sys.float_info.max
    ):
        raise PromptError(f"a schedule lists Switch(seconds, prompt), not {switch!r:.50}")
    check_switch(switch, config)
    if not earlier and switch.time != 0:
        raise PromptError(f"the first prompt must begin at time 0, not at {switch.time:g}")
    if not earlier and switch.history not in (None, "keep"):
        raise PromptError(f"the first prompt has no history to {switch.history}")
    if not earlier and switch.over != 1:
        raise PromptError("the first prompt has no earlier one to blend with: leave out 'over'")
    end = math.inf if frames is None else frames / config.fps
    if not 0 <= switch.time < end:
        raise PromptError(f"{switch.time:g} s is outside of the video, which ends at {end:g} s")
    latest = max((other.time for other in earlier.values()), default=-1.0)
    if switch.time <= latest:
        raise PromptError(f"times must rise, but {switch.time:g} s follows {latest:g} s")


def check_switch(switch: Switch, config: Config) -> None:
    """Check all of a switch but its time. Words are not looked at.

    Raises:
        PromptError: It cannot be followed at any time.
    """
    if switch.history not in (None, *get_args(History)):
        names = ", ".join(get_args(History))
        raise PromptError(f"history must be one of {names}, not '{switch.history}'")
    if not isinstance(switch.over, int) or not 1 <= switch.over <= MAX_BLEND:
        raise PromptError(f"over must be from 1 to {MAX_BLEND} blocks; it is {switch.over!r:.20}")
    if switch.history == "cut" and switch.over != 1:
        raise PromptError(
            "a cut leaves nothing to blend with: leave out 'over', or keep the history"
        )
    rows = switch.prompt.text if isinstance(switch.prompt, Embedding) else switch.prompt
    if isinstance(rows, np.ndarray):
        check_embedding(rows, config)
    elif not isinstance(switch.prompt, str):
        raise PromptError(f"a prompt must be words or an embedding, not {rows!r:.50}")


class _Entry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    time: float
    prompt: str | None = None
    embedding: str | None = None
    history: History | None = None
    over: int = 1
    block: int | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    switch: list[_Entry]


def read_schedule(path: str | os.PathLike[str]) -> list[Switch]:
    """Read a schedule from a TOML file.

    Args:
        path: The file. It has a table [[switch]] per prompt: `time` in seconds, `prompt`, or
            `embedding` with the name of a file beside this one, and optionally `history`, `over`
            and `block`.

    Raises:
        PromptError: The file is missing, too large or not such a list.
    """
    load = functools.cache(lambda name: load_embedding(Path(path).parent / name))
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PromptError(f"cannot read a schedule from {path}: {error.strerror}") from error
    return parse_schedule(data, str(path), load)


def parse_schedule(
    data: bytes, name: str, load: Callable[[str], Embedding] | None = None
) -> list[Switch]:
    """Parse the TOML of a schedule, which `read_schedule` describes.

    Args:
        data: The text.
        name: What messages call it.
        load: Loads the embedding of a name. None: no embedding can be named.

    Raises:
        PromptError: It is too large or not such a list.
    """
    if len(data) > MAX_FILE_BYTES:
        raise PromptError(f"{name} is not a schedule: it is larger than {MAX_FILE_BYTES} bytes")
    try:
        entries = msgspec.toml.decode(decode_text(data), type=_File).switch
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is not a schedule: {error}") from error
    switches = []
    for number, entry in enumerate(entries, 1):
        if (entry.prompt is None) == (entry.embedding is None):
            raise PromptError(f"{name}: switch {number} needs either 'prompt' or 'embedding'")
        if entry.embedding is not None and load is None:
            raise PromptError(f"{name}: switch {number} needs 'prompt': no file can be named here")
        prompt: Prompt = entry.prompt or ""
        if entry.embedding is not None and load is not None:
            prompt = load(entry.embedding)
        switches.append(Switch(entry.time, prompt, entry.history, entry.over, entry.block))
    return switches


def write_schedule(path: str | os.PathLike[str], switches: Sequence[Switch]) -> None:
    """Write a schedule that `read_schedule` reads.

    Args:
        path: The TOML file. Embeddings are written beside it, under its name and their number.
        switches: The schedule.

    Raises:
        OutputError: A file cannot be written.
    """
    path = Path(path)
    names = {}
    for number, switch in enumerate(switches, 1):
        if not isinstance(prompt := switch.prompt, str):
            names[number] = f"{path.stem}-{number}{SUFFIX}"
            rows = prompt if isinstance(prompt, Embedding) else Embedding(prompt, "", "", "")
            save_embedding(path.with_name(names[number]), rows)
    write_file(path, format_schedule(switches, names))


def format_schedule(switches: Sequence[Switch], names: Mapping[int, str] | None = None) -> bytes:
    """Return a schedule as TOML.

    Args:
        switches: The schedule.
        names: Files of embeddings, by the number of their switch from 1 on. Another embedding is
            named by the words that it was encoded from.
    """
    entries = []
    for number, switch in enumerate(switches, 1):
        entry = _Entry(switch.time, history=switch.history, over=switch.over, block=switch.block)
        if names and number in names:
            entry.embedding = names[number]
        else:
            entry.prompt = prompt_words(switch.prompt)
        entries.append(entry)
    return msgspec.toml.encode(_File(entries))


def prompt_words(prompt: Prompt) -> str:
    """Return the words of a prompt as any file can hold them: a lone surrogate is "?".

    Of an embedding they are those that it records, or none.
    """
    words = prompt if isinstance(prompt, str) else getattr(prompt, "prompt", "")
    return words.encode("utf-8", "replace").decode()
