"""Windows' rule on Linux: a file that is open or mapped cannot be deleted, renamed or replaced, and
no folder that it is in can be renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

_ACCESS_DENIED = 13
_CALLS = ("unlink", "remove", "rename", "replace", "rmdir")


@contextmanager
def open_files_stay() -> Iterator[None]:
    """Let deleting or renaming a file that this process has open fail, as on Windows."""
    with mock.patch.multiple(os, **{name: _refusing(getattr(os, name)) for name in _CALLS}):
        yield


def _refusing(call: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*args: Any, **keywords: Any) -> Any:
        folder = keywords.get("dir_fd") or keywords.get("src_dir_fd")
        places = [os.readlink(f"/proc/self/fd/{folder}")] if folder else []
        paths = [str(Path(*places, os.fsdecode(path)).absolute()) for path in args[:2]]
        for path in map(_same_file, paths):
            inside = f"{path}{os.sep}"
            if any(name == path or name.startswith(inside) for name in _open_files()):
                raise PermissionError(_ACCESS_DENIED, "The process cannot access the file", path)
        return call(*args, **keywords)

    return refuse


def _same_file(path: str) -> str:
    """Follow the links of the folders, not of the name itself."""
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name)


def _open_files() -> set[str]:
    paths = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            paths.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6:
            paths.add(fields[5])
    return paths
