"""The folder of an unfinished render, beside its output, locked by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing.errors import OutputError, RenderLocked
from packforcing.files import check_name
from packforcing.runtime.render_record import LOCK, OWN_FILES, RECORD
from packforcing.runtime.video_files import output_errors
from packforcing.runtime.video_forms import output_target

if TYPE_CHECKING:
    from filelock import BaseFileLock


def render_places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the folder of a render, and the file or folder to be made."""
    target = Path(os.path.abspath(output_target(path)[1]))
    return target.with_name(f"{target.name}.render"), target


class LockedFolder:
    """A render's folder that this process has locked; `locked_folder` makes it.

    Attributes:
        path: The folder.
        target: The file or folder to be made.
    """

    def __init__(self, path: Path, target: Path, lock: BaseFileLock) -> None:
        self.path, self.target = path, target
        self._lock, self._removed = lock, False

    def remove(self) -> None:
        """Remove the folder, except files of others; once, as it may be another process's then.

        The record goes first: what an interrupt leaves is not a render.
        """
        if self._removed:
            return
        self._removed = True
        with suppress(OSError):
            (self.path / RECORD).unlink(missing_ok=True)
            for path in self.path.iterdir():
                if OWN_FILES.fullmatch(path.name):
                    with suppress(OSError):  # on Windows, open in another program
                        delete(path)
            self._remove_lock(self.path / LOCK)
            self.path.rmdir()

    def _remove_lock(self, path: Path) -> None:
        try:
            # still held: nobody locks it between the release and the removal
            path.unlink(missing_ok=True)
        except PermissionError:  # Windows removes no open file, neither ours nor another's
            self._lock.release()
            path.unlink(missing_ok=True)


@contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[LockedFolder]:
    """Make and lock the folder of a render of `path`.

    Raises:
        RenderLocked: Another process has it.
        OutputError: It cannot be written, or something else has its name.
    """
    from filelock import FileLock, Timeout

    folder, target = render_places(path)
    with output_errors(target, "choose another name or folder"):
        check_name(target)
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"cannot write {target}: {folder} is in the way; remove it")
        folder.mkdir(exist_ok=True)
        if (folder / LOCK).is_symlink():  # what it leads to would be emptied
            raise OutputError(f"cannot write {target}: {folder / LOCK} is a link; remove it")
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError) as error:  # the other removes it right now
            raise RenderLocked(
                f"cannot write {target}: it is being rendered by another process (or one that "
                f"hangs); {folder / LOCK} is locked"
            ) from error
    try:
        yield LockedFolder(folder, target, lock)
    finally:
        lock.release()


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with what is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
