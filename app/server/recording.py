"""Record the fragments of a live video, which are encoded already, to a file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from packforcing.errors import LiveError, OutputError
from packforcing.runtime.fragments import join_fragments
from packforcing.runtime.video_files import output_errors

_REMEDY = "free some space; a render of the schedule gives the same frames"


class Recording:
    """A recording in the making, which may begin with any block.

    Attributes:
        first_frame: How many frames of the video come before it.
        frames: That it has.
    """

    def __init__(self, path: Path, header: bytes, first_frame: int) -> None:
        """Begin a file.

        Args:
            path: A new file. The finished recording is beside it first.
            header: What the fragments follow.
            first_frame: How many frames of the video come before it.

        Raises:
            OutputError: The file cannot be written.
        """
        self.first_frame, self.frames = first_frame, 0
        self._path = path
        with output_errors("a recording", _REMEDY):
            self._file = path.open("wb")
            self._file.write(header)

    def add(self, fragment: bytes, frames: int) -> None:
        """Append a block of so many frames.

        Raises:
            OutputError: The disk refuses it; nothing is left of the recording.
        """
        try:
            with output_errors("a recording", _REMEDY):
                self._file.write(fragment)
                self._file.flush()
        except OutputError:
            with suppress(OSError):
                self._file.close()
            self._path.unlink(missing_ok=True)
            raise
        self.frames += frames

    def finish(self, target: Path) -> None:
        """Make a plain MP4 of the recording; nothing else is left of it.

        Raises:
            LiveError: No block was recorded.
            OutputError: The disk refuses it.
        """
        try:
            with output_errors("a recording", _REMEDY):
                self._file.close()
                if not self.frames:
                    raise LiveError("nothing was recorded: no block was made meanwhile")
                join_fragments(self._path, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            self._path.unlink(missing_ok=True)
