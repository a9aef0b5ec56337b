"""Show a render that is running in a browser."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import uvicorn

from packforcing.app.server.application import GRACE_SECONDS, make_application, server_config
from packforcing.app.server.broadcast import bound_unsent
from packforcing.app.server.live import watch_router
from packforcing.app.server.safety import Access, Limits
from packforcing.app.server.show import Show
from packforcing.app.server.stage import Stage
from packforcing.errors import OutputError, RenderStopped
from packforcing.runtime import Block, Session, Video

FIRST_PORT, PORTS = 8000, 100  # the first one that is free is taken

_log = logging.getLogger(__name__)


@contextmanager
def watching(
    session: Session, video: Video, on_url: Callable[[str], None]
) -> Iterator[Callable[[Block], None]]:
    """Serve the page of a render on this machine until the block ends.

    Args:
        session: Makes the video.
        video: Is rendered in the block.
        on_url: Called with the page's address.

    Yields:
        A function that takes the blocks, and never waits for a viewer or the encoder: a block that
        comes while the one before is encoded is not shown.

    Raises:
        OutputError: No port is free.
    """
    stage = Stage(session)
    with _listen() as listener:
        bound_unsent(listener)
        show = stage.present(video)
        application = make_application(watch_router(stage), access=Access(), limits=Limits())
        server = uvicorn.Server(server_config(application))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        on_url(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        error: str | None = None
        try:
            with ThreadPoolExecutor(1, "packforcing-encoder") as encoder:
                yield _Screen(show, encoder)
        except RenderStopped:
            raise
        except BaseException as failure:
            error = " ".join(str(failure).split()) or type(failure).__name__
            raise
        finally:
            show.end(error)
            stage.broadcast.end()
            server.should_exit = True
            thread.join(2 * GRACE_SECONDS)


class _Screen:
    """Adds blocks to a show in another thread."""

    def __init__(self, show: Show, encoder: ThreadPoolExecutor) -> None:
        self._show, self._encoder = show, encoder
        self._latest: Future[None] | None = None

    def __call__(self, block: Block) -> None:
        if self._latest is None or self._latest.done():
            self._latest = self._encoder.submit(self._add, block)

    def _add(self, block: Block) -> None:
        try:
            self._show.add(block)
        except Exception as error:  # the render does not need its picture
            _log.exception("a block cannot be shown")
            self._show.report(f"the picture cannot be shown: {' '.join(str(error).split())}")


def _listen() -> socket.socket:
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise OutputError(f"cannot serve a page: {error.strerror}") from error
    raise OutputError(
        f"cannot serve a page: ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are in use; "
        "leave out --watch"
    )
