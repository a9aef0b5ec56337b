"""Text files as editors save them: Notepad, PowerShell, editors of other systems."""

from __future__ import annotations

import codecs

import pytest

from packforcing.errors import PackForcingError
from packforcing.evaluation.prompt_sets import read_prompts
from packforcing.prompts import read_schedule
from packforcing.text_files import decode_text
from tests.helpers import assert_refused, run

SCHEDULE = """[[switch]]
time = 0
prompt = "a red star over navy stripes"
[[switch]]
time = 2.5
prompt = "ein grüner Stern, 星"
history = "cut"
"""
PROMPTS = "a red star over navy stripes\nein grüner Stern, 星\n"
SAVED = {
    "UTF-8": ("utf-8", b""),
    "UTF-8 with BOM (Notepad, PowerShell)": ("utf-8", codecs.BOM_UTF8),
    "Unicode (Notepad, PowerShell 5)": ("utf-16-le", codecs.BOM_UTF16_LE),
    "Unicode big endian (Notepad)": ("utf-16-be", codecs.BOM_UTF16_BE),
    "UTF-32": ("utf-32-le", codecs.BOM_UTF32_LE),
    "UTF-32 big endian": ("utf-32-be", codecs.BOM_UTF32_BE),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(("encoding", "mark"), SAVED.values(), ids=SAVED)
def test_text_is_read_as_editors_save_it(tmp_path, encoding, mark, line_end):
    file = tmp_path / "a.txt"
    file.write_bytes(mark + SCHEDULE.replace("\n", line_end).encode(encoding))
    switches = [(switch.time, switch.prompt, switch.history) for switch in read_schedule(file)]
    assert switches == [
        (0, "a red star over navy stripes", None), (2.5, "ein grüner Stern, 星", "cut")
    ]  # fmt: skip
    file.write_bytes(mark + PROMPTS.replace("\n", line_end).encode(encoding))
    assert [prompt.content for prompt in read_prompts(file, 0)] == PROMPTS.splitlines()


UNREADABLE = {
    "Windows-1252": (PROMPTS.replace("星", "").encode("cp1252"), "save it as UTF-8"),
    "UTF-16 without its mark": (PROMPTS.encode("utf-16-le"), "save it as UTF-8"),
    "half a character": (codecs.BOM_UTF16_LE + b"a\0b", "save it as UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "save it as UTF-8"),
}


@pytest.mark.parametrize(("data", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_other_files_are_refused_in_one_line(tmp_path, data, message):
    file = tmp_path / "a.toml"
    file.write_bytes(data)
    for read in (read_schedule, lambda path: read_prompts(path, 0)):
        with pytest.raises(PackForcingError, match=message) as refusal:
            read(file)
        assert "\n" not in str(refusal.value)
    assert_refused(run("render", "--schedule", file, "--out", tmp_path / "a.mp4"), message)


def test_a_mark_alone_is_an_empty_text():
    assert decode_text(codecs.BOM_UTF8) == decode_text(b"") == ""
