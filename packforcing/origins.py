"""Where weights are from, and under which license, as far as it was read and never guessed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

# In the place of a license that nobody stated or read
UNREAD = "not read here: see the source before use"
UNKNOWN = "unknown: nothing recorded says where the file is from"


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The origin of a part of a model's weights.

    Attributes:
        part: "model" for all of them, "transformer", "autoencoder", or a LoRA with its file's name.
        source: The repository on the Hugging Face hub; empty where nothing recorded says it.
        license: In the words of whoever stated it, or why it is not known.
    """

    part: str
    source: str
    license: str


def describe_licenses(origins: Sequence[Origin]) -> str:
    """Return the license of weights in a line, of each part where they differ.

    Returns:
        The line; empty where nothing is known of the weights.
    """
    licenses = [origin.license for origin in origins]
    if len(set(licenses)) <= 1:
        return "".join(licenses[:1])
    return "; ".join(f"{origin.part}: {origin.license}" for origin in origins)
