"""The demo model's text encoder: a one-hot row per word.

It replaces UMT5 at the scale of the demo world. The rows are zero-padded and none is masked, as in
Wan, so that a prompt may leave words out: the model then chooses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import numpy as np

from packforcing.config import Config
from packforcing.errors import PromptError

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
GROUNDS = ("navy", "forest", "sand", "gray", "maroon", "teal")
PATTERNS = ("plain", "stripes", "checks", "dots")
PLACES = ("harbor", "tower", "garden", "cave", "market", "bridge", "island", "station")
KINDS = {
    "color": COLORS,
    "shape": SHAPES,
    "ground": GROUNDS,
    "pattern": PATTERNS,
    "place": PLACES,
}
VOCABULARY = tuple(word for words in KINDS.values() for word in words)  # new words at the end
LONGEST = 10_000  # characters of a prompt
FILLERS = frozenset(("a", "an", "the", "on", "over", "with", "of", "and", "at"))


def encode_words(prompt: str, config: Config) -> np.ndarray:
    """Encode a prompt of the demo's words.

    Args:
        prompt: Words of `known_words` in any order; case and fillers like "a" do not matter.
        config: A model with the text encoder "words".

    Returns:
        float32 [1, text_len, text_dim].

    Raises:
        PromptError: A word is unknown, the prompt is empty or too long, or the model reads
            another encoder's embeddings.
    """
    if config.text_encoder != "words":
        raise PromptError(
            f"the {config.name} model reads {config.text_encoder} embeddings: encode the prompt "
            "first with 'packforcing encode-prompt', then render from that file with --embedding, "
            "or name it as 'embedding' in a schedule"
        )
    if len(prompt) > LONGEST:
        raise PromptError(f"the prompt has {len(prompt)} characters; at most {LONGEST} can be read")
    words = [word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in FILLERS]
    known = known_words(config)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise PromptError(
            f"the {config.name} model does not know {_suggest(unknown, known)}; {_grammar(known)}"
        )
    if not words:
        raise PromptError(f"the prompt names nothing to draw; {_grammar(known)}")
    if len(words) > config.text_len:
        raise PromptError(
            f"the prompt has {len(words)} words; at most {config.text_len} can be read"
        )
    rows = np.zeros((1, config.text_len, config.text_dim), np.float32)
    rows[0, np.arange(len(words)), [known.index(word) for word in words]] = 1.0
    return rows


def known_words(config: Config) -> tuple[str, ...]:
    """Return the words that a model knows: those of `VOCABULARY` that it has channels for."""
    return VOCABULARY[: config.text_dim]


def _suggest(unknown: Sequence[str], known: Sequence[str]) -> str:
    hints = []
    for word in dict.fromkeys(unknown):
        near = difflib.get_close_matches(word, known, n=1)
        hints.append(f"'{word}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return ", ".join(hints)


def _grammar(known: Sequence[str]) -> str:
    kinds = ", ".join(
        f"{kind} ({', '.join(words)})" for kind, words in KINDS.items() if words[-1] in known
    )
    return f"say a subject over a ground, such as 'a red star over navy stripes': {kinds}"


def make_prompt(
    color: str,
    shape: str,
    ground: str | None = None,
    pattern: str = "plain",
    beyond: str | None = None,
    place: str | None = None,
) -> str:
    """Return the sentence that names the words: "a red star over navy stripes".

    Of a tour, whose other ground is `beyond`, "a red star over plain navy and teal"; at a place, "a
    red star at the harbor over navy stripes", or without its ground, "a red star at the harbor".
    """
    parts = [f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"]
    if place:
        parts.append(f"at the {place}")
    if ground:
        over = f"plain {ground}" if pattern == "plain" else f"{ground} {pattern}"
        parts.append(f"over {over}" + (f" and {beyond}" if beyond else ""))
    return " ".join(parts)


def random_attributes(rng: np.random.Generator) -> dict[str, str]:
    """One word of each kind, all equally likely."""
    pools = {"color": COLORS, "shape": SHAPES, "ground": GROUNDS, "pattern": PATTERNS}
    return {name: str(pool[rng.integers(len(pool))]) for name, pool in pools.items()}


def random_tour(rng: np.random.Generator) -> dict[str, str]:
    """The words of a tour: plain, and `beyond`, another ground."""
    words = {**random_attributes(rng), "pattern": "plain"}
    others = [ground for ground in GROUNDS if ground != words["ground"]]
    return {**words, "beyond": str(rng.choice(others))}
