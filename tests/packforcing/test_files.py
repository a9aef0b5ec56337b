"""Files are whole or absent, sealed JSON shows damage, sizes have the units people expect."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import packforcing.files as files
from packforcing import errors
from packforcing.extras import install_command, optional_imports
from packforcing.units import format_file_size, format_gib, format_memory, parse_memory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_older_file_and_no_partial_one(tmp_path, interruption):
    (tmp_path / "a.json").write_bytes(b"old")
    expected = errors.OutputError if interruption is OSError else interruption
    with pytest.raises(expected), files.new_file(tmp_path / "a.json") as partial:
        partial.write_bytes(b"half")
        raise interruption
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"old"
    files.write_file(tmp_path / "a.json", b"new")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"new"


def test_data_is_flushed_before_the_name_and_the_name_after_it(tmp_path, monkeypatch):
    steps = []
    for name in ("flush", "flush_folder"):
        original = getattr(files, name)
        monkeypatch.setattr(
            files, name, lambda path, o=original, n=name: (steps.append((n, path)), o(path))
        )
    replace = Path.replace
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, to: (steps.append(("rename", to)), replace(self, to))[1],
    )
    files.write_file(tmp_path / "a.bin", b"data")
    assert [step for step, _ in steps] == ["flush", "rename", "flush_folder"]
    assert steps[0][1].parent.parent == tmp_path and steps[1][1] == tmp_path / "a.bin"


def test_a_name_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(errors.OutputError, match=r"cannot write .*missing/a\.json"):
        files.write_file(tmp_path / "missing" / "a.json", b"")


def test_a_folder_appears_whole_and_replaces_only_what_it_may(tmp_path):
    target = tmp_path / "out"
    with files.new_folder(target) as partial:
        (partial / "a").write_bytes(b"1")
        assert not target.exists()
    assert names(target) == ["a"] and names(tmp_path) == ["out"]
    with pytest.raises(errors.OutputError, match="not an empty folder"), files.new_folder(target):
        pass
    with pytest.raises(RuntimeError), files.new_folder(target, lambda path: True) as partial:
        (partial / "b").write_bytes(b"2")
        raise RuntimeError
    assert names(target) == ["a"] and names(tmp_path) == ["out"]
    with files.new_folder(target, lambda path: True) as partial:
        (partial / "b").write_bytes(b"2")
    assert names(target) == ["b"] and names(tmp_path) == ["out"]


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
KILLED_WRITES = {  # where a process is killed: what it runs to write the file or folder `target`
    "made": f"with files.new_folder(target): {KILL}",
    "half": f"with files.new_folder(target) as p: (p / 'a').write_bytes(b'1'); {KILL}",
    "flushed": f"files.flush = lambda path: {KILL}\nwith files.new_folder(target): pass",
    "renamed": f"files.flush_folder = lambda path: {KILL}\nfiles.write_file(target, b'1')",
    "file": f"with files.new_file(target) as p: p.write_bytes(b'1'); {KILL}",
}  # fmt: skip


def run_killed(target: Path, code: str) -> None:
    """Run code that kills its own process at a known point."""
    program = "import os, pathlib, signal, sys\nfrom packforcing import files\n"
    program += f"target = pathlib.Path(sys.argv[1])\n{code}"
    process = subprocess.run([sys.executable, "-c", program, target], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("code", KILLED_WRITES.values(), ids=KILLED_WRITES)
def test_the_next_write_removes_what_a_kill_left_of_the_same_target(tmp_path, code):
    target = tmp_path / f"{'n' * 60}1.v1"
    others = [tmp_path / f"{'n' * 60}2.v1", tmp_path / "out.v1"]  # the first begins alike
    for path in (target, *others):
        run_killed(path, code)
        path.unlink(missing_ok=True)  # killed after the rename
    assert len(names(tmp_path)) == 3
    files.write_file(target, b"whole")
    assert target.read_bytes() == b"whole"
    [first, second] = (name for name in names(tmp_path) if name != target.name)
    assert {first[:6], second[:6]} == {".nnnnn", ".out.v"}
    for path in others:
        files.write_file(path, b"")
    assert len(names(tmp_path)) == 3 and not any(name.startswith(".") for name in names(tmp_path))


def test_a_run_that_goes_on_keeps_its_partial_folder(tmp_path):
    target = tmp_path / "out"
    with files.new_folder(target) as partial:
        (partial / "a").write_bytes(b"1")
        files.sweep(target)
        code = "import sys; from packforcing import files; files.write_file(sys.argv[1], b'2')"
        subprocess.run([sys.executable, "-c", code, target], check=True)  # another run, faster
        assert names(partial) == ["a"]
        target.unlink()
    assert names(target) == ["a"] and names(tmp_path) == ["out"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_an_older_folder_that_a_killed_run_set_aside_comes_back(tmp_path):
    target = tmp_path / "out"
    with files.new_folder(target) as partial:
        (partial / "old").write_bytes(b"1")
    kill_second = f"""
rename, renames = pathlib.Path.rename, []
def patched(self, to):
    renames.append(to)
    rename(self, to) if len(renames) == 1 else {KILL}
pathlib.Path.rename = patched
with files.new_folder(target, lambda path: True) as p: (p / "new").touch()
"""
    run_killed(target, kill_second)
    assert not target.exists()
    with (
        pytest.raises(errors.OutputError, match="not an empty folder"),
        files.new_folder(target),
    ):
        pass
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


def test_a_folder_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    with (
        pytest.raises(errors.OutputError, match="cannot write"),
        files.new_folder(tmp_path / ("a" * 300)),
    ):
        pytest.fail("the work began")


def test_sealed_json_is_read_back_and_shows_every_damage(tmp_path):
    sealed = files.seal_json("engine", b'{"a": 1}')
    assert files.unseal_json("engine", sealed) == b'{"a": 1}'
    assert json.loads(sealed)["engine"] == {"a": 1}
    for damaged in (sealed.replace(b"1}", b"2}"), b"{}", b"[", sealed.replace(b"engine", b"motor")):
        with pytest.raises(ValueError):
            files.unseal_json("engine", damaged)


def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1_500_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    files.require_disk_space(tmp_path, 1_500_000, "the bundle", "make room")
    with pytest.raises(errors.OutputError, match=r"the bundle needs 2\.9 GB .* 1\.5 MB left: make"):
        files.require_disk_space(tmp_path, 2_900_000_000, "the bundle", "make room")


def test_amounts_of_memory_are_read():
    amounts = {"512MiB": 1 << 29, "1.5 GiB": 3 << 29, "2 kb": 2000, "0.25 tB": 250 * 10**9}
    assert {text: parse_memory(text) for text in amounts} == amounts
    for text in ("512", "MiB", "-1 GiB", "1e3 kB", "1 XiB", "", "1 GiB each"):
        assert parse_memory(text) is None


def test_memory_is_in_binary_units_and_files_in_decimal_ones():
    assert (
        format_gib(3.901 * 2**30) == "3.90" and format_gib(3.901 * 2**30, round_up=True) == "3.91"
    )
    assert format_memory(3.9 * 2**30) == "3.90 GiB"
    assert format_memory(25 * 2**20) == "25.0 MiB" and format_memory(4096) == "4 KiB"
    assert format_file_size(2_900_000_000) == "2.9 GB" and format_file_size(4000) == "4.0 kB"


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(errors.MissingDependency) as caught, optional_imports("exporting", "export"):
        import no_such_package.module  # noqa: F401
    root = Path(__file__).parents[2]
    assert str(caught.value) == (
        f'exporting needs no_such_package, which is not installed: pip install "{root}[export]"'
    )
    assert install_command("cpu", "verify").endswith('[cpu,verify]"')
    ours = pytest.raises(ModuleNotFoundError, match=r"packforcing\.no_such_room")
    with ours, optional_imports("exporting", "export"):
        import packforcing.no_such_room  # noqa: F401


def test_every_error_is_drawn_in_the_tree():
    classes = {
        name for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }  # fmt: skip
    drawn = {line.split()[0] for line in errors.__doc__.splitlines()[2:] if line.strip()}
    assert drawn == classes


@pytest.mark.skipif(os.name != "posix", reason="flushes no folders elsewhere")
@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_flushes_no_folders_will_do(tmp_path, monkeypatch, refusal):
    """SMB, FUSE and 9p answer so; a disk that fails is another matter."""
    fsync = os.fsync

    def flush(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    if refusal == errno.EIO:
        with pytest.raises(errors.OutputError):
            files.write_file(tmp_path / "a", b"1")
    else:
        files.write_file(tmp_path / "a", b"1")
        assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    "name",
    ["nul", "NUL.mp4", "con.mkv", "aux", "prn.tar.gz", "com1.mp4", "LPT9.json", "com\u00b2.mp4",
     "nul .mp4", "fox:1.mp4", "frames.", "fox.mp4 "],
)  # fmt: skip
def test_names_that_windows_takes_for_something_else_are_refused_there(tmp_path, monkeypatch, name):
    """The names are of Microsoft's page "Naming Files, Paths, and Namespaces"."""
    files.check_name(tmp_path / name)  # elsewhere they are names as others are
    monkeypatch.setattr(sys, "platform", "win32")
    for write in (lambda path: files.write_file(path, b"1"), lambda path: enter(path)):
        with pytest.raises(errors.OutputError, match="is no file's name on Windows"):
            write(tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["null.mp4", "console", "com10.mp4", "com.mp4", "a.nul", ".aux", "..", "."]
)
def test_names_that_look_like_those_are_names(monkeypatch, name):
    monkeypatch.setattr(sys, "platform", "win32")
    files.check_name(Path(name))


def enter(path):
    with files.new_folder(path):
        pass
