"""A server in a thread, on a free port of this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from packforcing.app.jobs.store import Store
from packforcing.app.jobs.worker import Worker
from packforcing.app.server.application import make_application
from packforcing.app.server.live import live_router, watch_router
from packforcing.app.server.stage import Stage
from packforcing.app.server.videos import Service, videos_router
from packforcing.runtime import Session


@dataclass
class Served:
    """A server that answers.

    Attributes:
        url: Where it is.
        service: What its routers share.
        stage: Has the live video.
    """

    url: str
    service: Service
    stage: Stage


@contextmanager
def running(application, stop=lambda: None) -> Iterator[str]:
    """Serve an application in a thread; yield its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        application, log_config=None, access_log=False, lifespan="off", ws_per_message_deflate=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop()
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def serving(bundle: Path, folder: Path) -> Iterator[Served]:
    """Serve a bundle, as the command does, but make live videos as fast as possible."""
    with (
        Session.open(bundle, threads=1) as session,
        Store(folder, session.manifest, session.config) as store,
    ):
        worker, service = Worker(session, store), Service(session, store)
        stage = Stage(session, store, lead=None)

        def stop() -> None:
            store.close()
            stage.close()
            worker.join()

        worker.start()
        routers = videos_router(service), watch_router(stage), live_router(stage, service)
        with running(make_application(*routers), stop) as url:
            yield Served(url, service, stage)
