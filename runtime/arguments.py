"""Check the types of the public API's arguments: what does not fit is one line with its name."""

from __future__ import annotations

import math
import operator
import os
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

from packforcing.errors import ConfigError, PackForcingError

SHOWN_LENGTH = 60  # characters of a wrong value in a message


def check_integer(name: str, value: Any, lowest: int, highest: int, bounds: str) -> int:
    """Return an argument as an int; NumPy's integers are ones too, and booleans are not.

    Args:
        name: Of the argument.
        value: The argument.
        lowest: The smallest that is possible.
        highest: The largest that is possible.
        bounds: The two in words, for the message.

    Raises:
        ConfigError: It is no integer, or out of bounds.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = lowest - 1
    if isinstance(value, bool) or not lowest <= number <= highest:
        raise ConfigError(f"{name} must be {bounds}; it is {show_value(value)}")
    return number


def check_number(name: str, value: Any, highest: float, bounds: str) -> float:
    """Return an argument as a float above 0; NumPy's numbers are ones too, and booleans are not.

    Args:
        name: Of the argument.
        value: The argument.
        highest: The largest that is possible.
        bounds: What is possible, in words, for the message.

    Raises:
        ConfigError: It is no number, NaN, or out of bounds.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int that no float reaches
            number = float(value)
    if not 0 < number <= highest:
        shown = show_value(value) if math.isnan(number) else f"{number:g}"
        raise ConfigError(f"{name} must be {bounds}; it is {shown}")
    return number


def check_path(what: str, value: Any, error: type[PackForcingError]) -> None:
    """Check that an argument names a file or folder.

    Args:
        what: The beginning of the message, like "cannot write".
        value: The argument.
        error: What to raise.

    Raises:
        PackForcingError: It is neither a str nor a path, is empty, or holds a null character.
    """
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not text or not isinstance(text, str):
        raise error(f"{what} {show_value(value)}: it is no path; pass a str or a pathlib.Path")
    if "\0" in text:
        raise error(f"{what} {show_value(value)}: a name cannot hold a null character")


def check_type(name: str, value: Any, kind: Any, what: str) -> None:
    """Check that an argument is None or of a type.

    Args:
        name: Of the argument.
        value: The argument.
        kind: The type, as `isinstance` takes it.
        what: The type in words, for the message.

    Raises:
        ConfigError: It is of another type.
    """
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} must be {what}; it is {show_value(value)}")


def show_value(value: Any) -> str:
    """Return a wrong value as a message shows it, in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 3]}..."
