"""Renders where a file that is open cannot be deleted, renamed or replaced, as on Windows."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from packforcing.errors import OutputError, RenderStopped
from packforcing.files import new_folder
from packforcing.runtime import Session
from packforcing.runtime import archive as archive_module
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.resume import discard
from tests.helpers import PROMPT, TINY, frames_of, render, run, stop_after
from tests.windows import open_files_stay

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks open files up in /proc")


@pytest.fixture(autouse=True)
def windows():
    with open_files_stay():
        yield


def interrupt(session, path: Path | str) -> None:
    with pytest.raises(RenderStopped):
        render(session, path, resume=True, on_block=stop_after(session, 3))


def test_the_rule_holds(tmp_path):
    """The control: without it every test here would prove nothing."""
    path = tmp_path / "a"
    for call in (path.unlink, lambda: path.rename(tmp_path / "b"), lambda: path.replace(path)):
        with path.open("wb") as file, pytest.raises(PermissionError):
            file.write(bytes(5000))
            file.flush()
            call()
    mapped = np.memmap(path, mode="r")
    with pytest.raises(PermissionError):
        path.unlink()
    with pytest.raises(PermissionError):
        tmp_path.rename(f"{tmp_path}-renamed")
    del mapped
    path.unlink()


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "frames/"])
def test_a_render_leaves_its_result_alone(plain, tmp_path, name):
    interrupt(plain, f"{tmp_path}/{name}")
    render(plain, f"{tmp_path}/{name}", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name.rstrip("/")]
    assert len(frames_of(tmp_path / name)) == 120


def test_an_archive_in_a_file_is_rendered_and_resumed(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "IN_MEMORY", 0)
    interrupt(plain, tmp_path / "a.mkv")
    render(plain, tmp_path / "a.mkv", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_an_unfinished_render_is_discarded(plain, tmp_path):
    interrupt(plain, tmp_path / "a.mkv")
    discard(tmp_path / "a.mkv")
    assert not any(tmp_path.iterdir())


def test_a_file_that_another_program_reads_is_in_nobodys_way(plain, tmp_path):
    """A player or an indexer may have a segment open: it stays, everything else goes."""
    path, folder = tmp_path / "a.mkv", tmp_path / "a.mkv.render"
    interrupt(plain, path)
    stale = folder / "segment-000099.mkv"  # no record names it
    stale.write_bytes(b"x")
    with stale.open("rb"), (folder / "segment-000000.mkv").open("rb"):
        render(plain, path, resume=True)
    assert {file.name for file in folder.iterdir()} == {"segment-000000.mkv", "segment-000099.mkv"}
    assert len(frames_of(path)) == 120
    render(plain, path, resume=True, seconds=1)  # the folder is no unfinished render
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_a_video_that_is_being_played_is_replaced_later(plain, tmp_path):
    path = tmp_path / "a.mkv"
    render(plain, path, seconds=1)
    with path.open("rb"), pytest.raises(OutputError, match=r"cannot write .*resume it"):
        render(plain, path)
    assert len(frames_of(path)) == 8
    render(plain, path, resume=True)
    assert len(frames_of(path)) == 120
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_a_bundle_that_is_open_elsewhere_is_not_replaced(tiny_bundle, tmp_path):
    """A session has closed its files; a program that reads one keeps the folder."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with Session.open(bundle, threads=1) as session:
        before = read_manifest(bundle)
        with new_folder(bundle, lambda path: True) as partial:
            shutil.copytree(tiny_bundle, partial, dirs_exist_ok=True)
        assert sum(map(len, session.stream(PROMPT, 0.5))) == 4
    with (
        (bundle / "denoiser.onnx").open("rb"),
        pytest.raises(OutputError, match="cannot write"),
        new_folder(bundle, lambda path: True) as partial,
    ):
        (partial / "manifest.json").touch()
    assert read_manifest(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_batch_leaves_its_videos_alone(tiny_bundle, tmp_path):
    jobs, out = tmp_path / "jobs.txt", tmp_path / "out"
    jobs.write_text(f"{PROMPT}\na blue circle over sand dots\n")
    for _ in range(2):  # once more: all is done
        result = run("batch", jobs, "--bundle", tiny_bundle, "--out", out, "--seconds", "0.5")
        assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.mp4"))) == 2 and not list(out.glob("*.render"))


@pytest.mark.parametrize("missing", [True, False])
def test_a_mapped_archive_has_its_room_on_the_disk(tmp_path, monkeypatch, missing):
    """macOS and Windows have no `posix_fallocate`: writing to a hole of a full disk kills there."""
    files = []

    def remember(**settings):
        file = tempfile.TemporaryFile(**settings)  # noqa: SIM115
        files.append(os.dup(file.fileno()))
        return file

    temporary = SimpleNamespace(TemporaryFile=remember, gettempdir=tempfile.gettempdir)
    monkeypatch.setattr(archive_module, "tempfile", temporary)
    monkeypatch.setattr(archive_module, "IN_MEMORY", 0)
    if missing:
        monkeypatch.delattr(os, "posix_fallocate")
    archive = archive_module.Archive(TINY, 40, folder=tmp_path)
    (descriptor,) = files
    os.fsync(descriptor)
    status = os.fstat(descriptor)
    os.close(descriptor)
    assert status.st_size == archive.key_values.nbytes
    assert status.st_blocks * 512 >= status.st_size  # no holes
    assert not archive.key_values.any()
