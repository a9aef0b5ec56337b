"""One stream for many viewers, fed by a thread that never waits for them.

The latest fragments are kept once, for all viewers; a viewer is a place among them. One who is too
slow finds that the fragments at its place are gone, and continues with the oldest that is left. So
memory does not depend on viewers, and what one of them misses is its own loss. The state of the
video is described when a viewer takes it: however many changes there were, the latest one arrives.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

LATEST = 4  # fragments that are kept
UNSENT_BYTES = 1 << 16  # of a connection, that the system holds


@dataclass(frozen=True)
class Header:
    """What the fragments of one video follow.

    Attributes:
        video: The video's id.
        mime: The type of the stream.
        data: ftyp and moov.
    """

    video: str
    mime: str
    data: bytes


@dataclass(frozen=True)
class Message:
    """What a viewer gets.

    Attributes:
        kind: "state", "header" or "block".
        text: It as JSON.
        data: The bytes of a header or a fragment.
    """

    kind: str
    text: str
    data: bytes = b""


class _Viewer:
    """A viewer's place, and how to wake it from another thread.

    Attributes:
        place: The number of the fragment to send next.
        lost: Fragments that were gone before they could be sent.
        version: Of the state that was sent last.
        header: The one that was sent last.
    """

    def __init__(self, place: int) -> None:
        self.place, self.lost, self.version = place, 0, -1
        self.header: Header | None = None
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._waking = False  # so that a loop that is busy collects no more than one call

    def wake(self) -> None:
        if not self._waking:
            self._waking = True
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        self._waking = False


class Broadcast:
    """Sends the current video to its viewers.

    All methods but `follow` may be called from every thread.
    """

    def __init__(
        self, describe: Callable[..., dict[str, Any]], on_audience: Callable[[], None]
    ) -> None:
        """Make a broadcast without a video.

        Args:
            describe: Returns the state, for JSON; with `blocks=True` the latest blocks as well,
                which are in a viewer's first state. Called in the event loop: it has to be quick.
            on_audience: Called after a viewer has come or gone.
        """
        self._describe, self._on_audience = describe, on_audience
        self._lock = threading.Lock()
        self._viewers: set[_Viewer] = set()
        self._header: Header | None = None
        self._fragments: deque[tuple[str, bytes]] = deque(maxlen=LATEST)  # with the block's JSON
        self._published = 0  # fragments so far, those of earlier videos included
        self._version, self._state = 0, (-1, "")  # the state of a version, as JSON
        self._ended = False

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    def begin(self, header: Header) -> None:
        """Show another video from now on."""
        with self._lock:
            self._header = header
            self._fragments.clear()
            for viewer in self._viewers:
                viewer.place = self._published
            self._version += 1
            self._wake()

    def publish(self, header: Header, block: dict[str, Any], fragment: bytes) -> None:
        """Show the next block.

        Args:
            header: Of its video; a block of an earlier one is dropped.
            block: What is known of it, for JSON.
            fragment: Its frames.
        """
        text = msgspec.json.encode({"type": "block", **block}).decode()
        with self._lock:
            if header is not self._header:
                return
            self._fragments.append((text, fragment))
            self._published += 1
            self._wake()

    def announce(self) -> None:
        """Tell viewers that the state has changed."""
        with self._lock:
            self._version += 1
            self._wake()

    def end(self) -> None:
        """End the stream of every viewer once it has all there is."""
        with self._lock:
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        for viewer in self._viewers:
            viewer.wake()

    async def follow(self) -> AsyncGenerator[Message, None]:
        """Yield what a viewer gets, from the latest fragment on, until `end` was called."""
        with self._lock:
            viewer = _Viewer(self._published - bool(self._fragments))
            self._viewers.add(viewer)
        self._on_audience()
        try:
            while (message := self._next_message(viewer)) is not None or not self._ended:
                if message is None:
                    await viewer.wait()
                else:
                    yield message
        finally:
            with self._lock:
                self._viewers.discard(viewer)
            self._on_audience()

    def _next_message(self, viewer: _Viewer) -> Message | None:
        """Return what a viewer gets next; None: nothing is new."""
        with self._lock:
            version, header = self._version, self._header
            if viewer.version == version:
                if header is None:
                    return None
                if viewer.header is not header:
                    viewer.header = header
                    return _header_message(header)
                return self._next_block(viewer)
        # without the lock, as the state has one of its own
        is_first, viewer.version = viewer.version < 0, version
        if is_first:
            return Message("state", self._encode_state(blocks=True))
        if self._state[0] != version:  # the text is made once for all viewers
            self._state = version, self._encode_state()
        return Message("state", self._state[1])

    def _encode_state(self, **parts: bool) -> str:
        return _encode({"type": "state", **self._describe(**parts)})

    def _next_block(self, viewer: _Viewer) -> Message | None:
        oldest = self._published - len(self._fragments)
        viewer.lost += max(0, oldest - viewer.place)
        viewer.place = max(oldest, viewer.place)
        if viewer.place == self._published:
            return None
        text, fragment = self._fragments[viewer.place - oldest]
        viewer.place += 1
        return Message("block", f'{text[:-1]},"lost":{viewer.lost}}}', fragment)


def bound_unsent(listener: socket.socket) -> None:
    """Have the system hold little that a viewer has not taken: its megabytes are minutes of video.

    Args:
        listener: Connections that it accepts are bounded.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # not on Windows
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def _header_message(header: Header) -> Message:
    fields = {"type": "header", "id": header.video, "mime": header.mime}
    return Message("header", _encode(fields), header.data)


def _encode(fields: dict[str, Any]) -> str:
    return msgspec.json.encode(fields).decode()
