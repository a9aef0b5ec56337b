"""Arguments of the public API: what does not fit is one typed line, NumPy's numbers fit."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from packforcing import PackForcingError
from packforcing.embeddings import Embedding
from packforcing.errors import BundleError, ConfigError, OutputError, PromptError
from packforcing.runtime import Session, Switch, demo_bundle
from tests.helpers import PROMPT

NO_NUMBERS = (
    None,
    "1",
    b"1",
    True,
    np.True_,
    [1],
    (),
    {},
    np.array([1]),
    1 + 0j,
    math.nan,
    object(),
)
WRONG = {  # argument: the error, and values
    "seed": (ConfigError, (*NO_NUMBERS, 1.5, np.float64(3), -1, np.int64(-1), 2**64, 10**400)),
    "seconds": (ConfigError, (*NO_NUMBERS, math.inf, 0, -1, -math.inf, 1e-9, 1e300, 10**400)),
    "prompt": (
        PromptError,
        (
            None, 7, True, b"a red star", bytearray(b"a"), "", [], (), {}, {PROMPT}, [None],
            [PROMPT], Path(PROMPT), object(), np.array(PROMPT), np.zeros((2, 2)),
            np.zeros((1, 22), complex), np.full((1, 22), np.nan), Embedding(PROMPT, "", "", ""),
            [Switch(0, None)], [Switch(None, PROMPT)], [Switch("0", PROMPT)],
            [Switch(False, PROMPT)], [Switch(0, b"a red star")], [Switch(0, PROMPT, "forget")],
            [Switch(0, PROMPT, ["keep"])], [Switch(0, PROMPT), Switch(math.nan, PROMPT)],
            [Switch(0, PROMPT), Switch(10**400, PROMPT)],
        ),
    ),
    "start": (
        ConfigError,
        (
            "start.png", Path("start.png"), b"", 7, True, [[1]], np.array(None), np.zeros(3),
            np.zeros((48, 64, 3)), np.zeros((0, 48, 64, 3), np.uint8), np.zeros((1, 1), "U1"),
        ),
    ),
    "on_block": (ConfigError, (7, "print", [], True)),
    "checkpoint_seconds": (ConfigError, (*NO_NUMBERS, 0, -1, math.inf, 10**400)),
    "path": (OutputError, (None, 7, 1.5, True, b"a.mp4", [], object(), "", "a\0b.mp4", ".mp4")),
}  # fmt: skip
OPENED = {
    "bundle": (BundleError, (None, 7, b"bundle", [], "", "a\0b", Path("missing"), os.devnull)),
    "policy": (ConfigError, (7, "packforcing", {}, True)),
    "threads": (ConfigError, (*NO_NUMBERS[1:], 0, -1, 1.5, 10**10)),
}


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        yield session


def cases(table):
    return [
        pytest.param(name, kind, value, id=f"{name}-{number}")
        for name, (kind, values) in table.items()
        for number, value in enumerate(values)
    ]


def assert_one_line(error: PackForcingError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 400, text


@pytest.mark.parametrize(("name", "kind", "value"), cases(WRONG))
def test_a_wrong_argument_is_refused_in_one_line(plain, tmp_path, monkeypatch, name, kind, value):
    monkeypatch.chdir(tmp_path)
    arguments = {"prompt": PROMPT, "seconds": 1, "path": "a.mkv", name: value}
    with pytest.raises(kind) as caught:
        plain.render(**arguments)
    assert_one_line(caught.value)
    assert not any(tmp_path.iterdir())
    if name not in ("path", "checkpoint_seconds"):
        del arguments["path"]
        with pytest.raises(kind):
            plain.stream(**arguments)


@pytest.mark.parametrize(("name", "kind", "value"), cases(OPENED))
def test_a_session_of_a_wrong_argument_is_refused_in_one_line(name, kind, value):
    with pytest.raises(kind) as caught:
        Session.open(**{"bundle": demo_bundle(), name: value})
    assert_one_line(caught.value)


def test_a_session_of_no_manifest_or_no_backend_is_refused_in_one_line(plain):
    manifest, backend = plain.manifest, plain.backend
    wrong = (
        (None, backend),
        (demo_bundle(), backend),
        (manifest, "onnxruntime"),
        (backend, manifest),
    )
    for arguments in wrong:
        with pytest.raises(ConfigError, match="must be") as caught:
            Session(*arguments)
        assert_one_line(caught.value)


@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_integers_of_numpy_are_seeds(plain, seed):
    expected = np.concatenate(list(plain.stream(PROMPT, 1, 3)))
    np.testing.assert_array_equal(np.concatenate(list(plain.stream(PROMPT, 1, seed))), expected)


@pytest.mark.parametrize("seconds", [1.5, np.float32(1.5), np.array(1.5), Fraction(3, 2)])
def test_real_numbers_are_lengths(plain, seconds):
    assert sum(map(len, plain.stream(np.str_(PROMPT), seconds, 2**64 - 1))) == 12


def test_a_path_is_a_str_or_a_path(plain, tmp_path):
    for path in (str(tmp_path / "a.mp4"), tmp_path / "b.mp4", np.str_(tmp_path / "c.mp4")):
        plain.render(PROMPT, np.int64(1), path)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
