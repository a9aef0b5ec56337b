"""Prompt embeddings: their files, and what a model reads of them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from packforcing import Config
from packforcing.embeddings import Embedding, load_embedding, pad_embedding, save_embedding
from packforcing.errors import OutputError, PromptError
from packforcing.presets import model_config
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.request import check_request
from packforcing.words import encode_words
from tests.helpers import PROMPT, assert_refused, run, umt5_bundle


def words(config: Config) -> np.ndarray:
    """The rows that the words encoder makes of PROMPT, without the zero ones."""
    rows = encode_words(PROMPT, config)[0]
    return rows[: np.flatnonzero(rows.any(1))[-1] + 1]


# The file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_read_as_torch_reads_it(tmp_path, dtype):
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"text": rows}, tmp_path / "a.safetensors", {"prompt": "ein Füchslein"})
    read = load_embedding(tmp_path / "a.safetensors")
    assert read.text.dtype == np.float32
    np.testing.assert_array_equal(read.text, rows.float().numpy())
    assert (read.prompt, read.encoder) == ("ein Füchslein", "")


def test_an_embedding_survives_a_file(tmp_path):
    saved = Embedding(np.eye(3, 5, dtype=np.float32), "a fox 🦊", "umt5", "ab" * 32)
    save_embedding(tmp_path / "a.safetensors", saved)
    read = load_embedding(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read.text, saved.text)
    assert (read.prompt, read.encoder, read.encoder_sha256) == ("a fox 🦊", "umt5", "ab" * 32)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_without_an_embedding_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(PromptError, match=r"cannot read an embedding from .*a\.safetensors"):
        load_embedding(path)
    save_file({"image": torch.zeros(2, 2)}, path)
    with pytest.raises(PromptError, match=r"no tensor 'text'.*encode-prompt"):
        load_embedding(path)
    save_file({"text": torch.zeros(2, 2, dtype=torch.int32)}, path)
    with pytest.raises(PromptError, match="is I32, not F32, F16, BF16"):
        load_embedding(path)
    save_file({"text": torch.zeros(20, 20)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PromptError, match="cannot read an embedding"):
        load_embedding(path)
    path.write_bytes(b"\x80\x04}." * 9)  # a pickle, say
    with pytest.raises(PromptError, match="cannot read an embedding"):
        load_embedding(path)


def test_an_interrupt_leaves_no_embedding(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_embedding(
            tmp_path / "a.safetensors", Embedding(np.ones((1, 2), np.float32), "", "", "")
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.bin", "missing/a.safetensors", "taken.safetensors"])
def test_an_embedding_needs_a_file_name_that_can_be_written(tmp_path, name):
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OutputError):
        save_embedding(tmp_path / name, Embedding(np.ones((1, 2), np.float32), "", "", ""))
    assert [file.name for file in tmp_path.rglob("*")] == ["taken.safetensors"]


# What a model reads


def test_rows_beyond_the_prompt_are_zero(tiny_config):
    rows = np.arange(1, 45, dtype=np.float16).reshape(2, 22)
    padded = pad_embedding(rows, tiny_config)
    assert padded.shape == (1, tiny_config.text_len, 22) and padded.dtype == np.float32
    np.testing.assert_array_equal(padded[0, :2], rows)
    assert not padded[0, 2:].any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 21), np.float32), r"float \[T, 22\] with T from 1 to 6; .* \[2, 21\]"),
        (np.zeros((7, 22), np.float32), r"\[7, 22\]"),
        (np.zeros((0, 22), np.float32), r"\[0, 22\]"),
        (np.zeros((1, 2, 22), np.float32), r"\[1, 2, 22\]"),
        (np.zeros((2, 22), np.int64), "int64"),
        (np.full((2, 22), np.nan, np.float32), "not finite"),
        (np.full((2, 22), 1e300), "not finite"),  # beyond float32
    ],
)
def test_rows_that_a_model_cannot_read_are_refused(tiny_config, rows, message):
    with pytest.raises(PromptError, match=message):
        check_request(tiny_config, rows, 1.0, 0)


def test_words_for_a_umt5_model_are_refused():
    with pytest.raises(PromptError, match=r"umt5-xxl.*'packforcing encode-prompt'.*--embedding"):
        check_request(model_config("wan-1.3b"), PROMPT, 1.0, 0)


def test_an_embedding_renders_the_video_of_its_prompt():
    with Session.open(demo_bundle()) as session:
        rows = words(session.config)
        videos = [
            np.concatenate(list(islice(session.stream(prompt, 4.0, 3), 2)))
            for prompt in (PROMPT, rows, rows[:1])
        ]
    np.testing.assert_array_equal(videos[0], videos[1])
    assert (videos[0] != videos[2]).any()


def test_a_bundle_of_a_umt5_model_renders_from_a_file(tmp_path):
    bundle, file = umt5_bundle(tmp_path), tmp_path / "a.safetensors"
    config = model_config("demo")
    save_embedding(file, Embedding(words(config), PROMPT, "umt5", ""))
    options = "--bundle", bundle, "--seconds", 1, "--out", tmp_path / "a.mkv"
    assert_refused(run("render", PROMPT, *options), "encode-prompt")
    assert_refused(run("render", PROMPT, "--embedding", file, *options), "choose one of PROMPT")
    assert_refused(run("render", *options), "Missing argument 'PROMPT', --embedding FILE or --sch")
    assert_refused(run("render", "--embedding", "no.safetensors", *options), "cannot read")
    assert not (tmp_path / "a.mkv").exists()
    result = run("render", "--embedding", file, "--json", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == config.fps and (tmp_path / "a.mkv").is_file()


def test_reading_an_embedding_does_not_import_torch(tmp_path):
    save_file({"text": torch.ones(2, 3).bfloat16()}, tmp_path / "a.safetensors")
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from packforcing.embeddings import load_embedding
print(load_embedding({str(tmp_path / "a.safetensors")!r}).text.sum())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "6.0\n", result.stderr
