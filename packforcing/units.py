"""Print byte counts, GiB for device and host memory, MB and GB for files; read such amounts."""

from __future__ import annotations

import math
import re

GIB = 1 << 30
_FACTORS = {
    f"{prefix}{suffix}b": base ** (power + 1)
    for suffix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt")
}


def parse_memory(text: str) -> int | None:
    """Return the bytes of an amount like "512 MiB" or "1.5GB"; None where it is none."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]i?b)\s*", text.lower())
    return int(float(match[1]) * _FACTORS[match[2]]) if match else None


def format_gib(size_bytes: float, *, round_up: bool = False) -> str:
    """Format an amount of memory as a number of GiB with two decimals, without the unit.

    Args:
        size_bytes: Amount in bytes.
        round_up: Round to the next larger hundredth, for a budget that has to suffice.
    """
    hundredths = size_bytes * 100 / GIB
    return f"{(math.ceil if round_up else round)(hundredths) / 100:.2f}"


def format_memory(size_bytes: float) -> str:
    """Format an amount of device or host memory, as in "3.90 GiB" or, below 10 MiB, "812 KiB"."""
    if size_bytes < 10 << 20:
        return f"{size_bytes / 1024:,.0f} KiB"
    if size_bytes < GIB // 10:
        return f"{size_bytes / (1 << 20):,.1f} MiB"
    return f"{format_gib(size_bytes)} GiB"


def format_file_size(size_bytes: float) -> str:
    """Format the size of a file or of disk space, as in "2.9 GB", "61.3 MB" or "4.0 kB"."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= divisor:
            return f"{size_bytes / divisor:,.1f} {unit}"
    return f"{size_bytes / 1e3:,.1f} kB"
