"""Read text files that people write, in the encodings that their editors save."""

from __future__ import annotations

import codecs

# Marks at the beginning of a file. Windows' Notepad offers UTF-8 and UTF-16 with them, and
# PowerShell 5 writes UTF-16 so. UTF-32's begins as that of UTF-16 does, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(data: bytes) -> str:
    """Decode a text file: UTF-8, or what the mark at its beginning says.

    Args:
        data: The file's bytes.

    Returns:
        The text without the mark.

    Raises:
        ValueError: It is in no such encoding; the message says what to do.
    """
    mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError("it is no UTF-8 text: save it as UTF-8") from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        raise ValueError("it has NUL bytes, as UTF-16 without its mark does: save it as UTF-8")
    return text
