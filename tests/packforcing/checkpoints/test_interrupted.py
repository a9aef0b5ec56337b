"""An import that a signal ends leaves nothing, and one that is killed nothing that stays."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from packforcing import files
from tests.helpers import run
from tests.packforcing.checkpoints.layouts import self_forcing


def in_the_middle(monkeypatch, action) -> None:
    """Call `action` when all is written and nothing has its name."""
    monkeypatch.setattr(files, "flush", lambda path: action(Path(path)))


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_an_import_and_nothing_is_left(weights, tmp_path, monkeypatch, number):
    [file] = self_forcing(tmp_path, weights)
    sizes = []

    def end(partial: Path) -> None:
        sizes.append(sum(path.stat().st_size for path in partial.iterdir()))
        signal.raise_signal(getattr(signal, number))

    in_the_middle(monkeypatch, end)
    result = run("import-checkpoint", file, "--model", "self-forcing", "--out", tmp_path / "model")
    assert result.exit_code == 128 + getattr(signal, number), result.output
    assert result.stderr.splitlines()[-1].endswith(": no unfinished file has its final name")
    assert sizes[0] > 4 * sum(tensor.numel() for tensor in weights.values())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_next_import_removes_what_a_kill_left(weights, tmp_path, monkeypatch):
    """What lies there in the middle comes back after an interrupt: as after a kill, unlocked."""
    [file] = self_forcing(tmp_path, weights)
    command = "import-checkpoint", file, "--model", "self-forcing", "--out", tmp_path / "model"
    folders = []

    def keep(partial: Path) -> None:
        folders.append(partial.parent)
        shutil.copytree(partial.parent, tmp_path / "copy")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        in_the_middle(patch, keep)
        assert run(*command).exit_code == 130
    (tmp_path / "copy").rename(folders[0])
    assert run(*command).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "model"}
