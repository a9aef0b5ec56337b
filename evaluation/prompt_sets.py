"""Prompts and seeds to render, by lot or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from packforcing.config import WORD_COUNT, Config
from packforcing.embeddings import SUFFIX, load_embedding
from packforcing.errors import ConfigError, PromptError
from packforcing.evaluation.recall import SHORTEST, Visit, draw_world, schedule
from packforcing.prompts import Prompts
from packforcing.text_files import decode_text
from packforcing.words import make_prompt, random_attributes, random_tour


class Prompt(NamedTuple):
    """A prompt to render.

    Attributes:
        text: The words, for people and for the demo model's detectors.
        content: What a session takes: the words, or an embedding, float32 [T, text_dim].
        seed: Seed of the video.
        world: The visits that the video follows instead, whose recall is measured.
    """

    text: str
    content: str | np.ndarray
    seed: int
    world: tuple[Visit, ...] = ()

    def followed(self, config: Config) -> Prompts:
        """Return what a video follows: the prompt, or the schedule of its world."""
        return schedule(config, self.world) if self.world else self.content


def draw_prompts(config: Config, count: int, seed: int) -> list[Prompt]:
    """Draw prompts for the demo model, every second one a tour.

    Args:
        config: The model, which has to read words.
        count: Number of prompts.
        seed: Seed of the draws. Prompt i has the seed `seed` + i.

    Raises:
        ConfigError: The model reads embeddings.
    """
    if config.text_encoder != "words":
        raise ConfigError(
            f"prompts are made up for the demo model alone: give --prompts a file with one prompt "
            f"for {config.name} in a line"
        )
    rng = np.random.Generator(np.random.Philox(key=seed % 2**64))  # others are refused later
    words = [(random_tour if number % 2 else random_attributes)(rng) for number in range(count)]
    texts = [make_prompt(**attributes) for attributes in words]
    return [Prompt(text, text, seed + number) for number, text in enumerate(texts)]


def draw_worlds(config: Config, count: int, seed: int, seconds: float) -> list[Prompt]:
    """Draw worlds of the demo model whose recall is measured (`packforcing.evaluation.recall`).

    Args:
        config: The model, which has to know the names of places.
        count: Number of worlds.
        seed: Number of the first one, and its video's seed; from 0 on they are the judged ones.
        seconds: Length of every video.

    Raises:
        ConfigError: The model does not know the names of places, or the video is too short.
    """
    if config.text_encoder != "words" or config.text_dim < WORD_COUNT:
        older = ", exported before it knew places" * (config.text_encoder == "words")
        raise ConfigError(
            f"recall is measured with the demo model alone; this is {config.name}{older}"
        )
    blocks = config.blocks(config.frames(seconds))
    if seconds < SHORTEST:
        raise ConfigError(
            f"recall needs videos of {SHORTEST:g} s or more; --seconds is {seconds:g}"
        )
    worlds = [draw_world(number, blocks) for number in range(seed, seed + count)]
    return [
        Prompt(world[0].prompt, world[0].prompt, seed + number, tuple(world))
        for number, world in enumerate(worlds)
    ]


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """Read prompts from a text file, one per line.

    Args:
        path: The file. A line that ends in .safetensors names a file of an embedding, relative to
            the folder of this file.
        seed: Prompt i has the seed `seed` + i.

    Raises:
        PromptError: The file cannot be read or holds no prompt.
    """
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read prompts from {path}: {reason}") from error
    prompts: list[Prompt] = []
    for text in filter(None, map(str.strip, lines)):
        content: str | np.ndarray = text
        if text.endswith(SUFFIX):
            embedding = load_embedding(path.parent / text)
            text, content = embedding.prompt or text, embedding.text
        prompts.append(Prompt(text, content, seed + len(prompts)))
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one in each line")
    return prompts
