"""A server in a thread, on a free port of this machine."""

from __future__ import annotations

import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import msgspec
import numpy as np
import uvicorn
from websockets.sync.client import connect

from packforcing.app.jobs.room import Room
from packforcing.app.jobs.store import Store
from packforcing.app.jobs.worker import Worker
from packforcing.app.server.application import make_application, server_config
from packforcing.app.server.broadcast import bound_unsent
from packforcing.app.server.live import live_router, watch_router
from packforcing.app.server.safety import Access, Limits
from packforcing.app.server.stage import Stage
from packforcing.app.server.videos import Service, videos_router
from packforcing.runtime import Session

OPEN = Access()
UNHURRIED = replace(Limits(), requests_per_second=1e6, burst=1_000_000)


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
    bound_unsent(listener)
    server = uvicorn.Server(server_config(application))
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
def serving(
    bundle: Path, folder: Path, access: Access = OPEN, limits: Limits = UNHURRIED
) -> Iterator[Served]:
    """Serve a bundle, as the command does, but make live videos as fast as possible."""
    with (
        Session.open(bundle, threads=1) as session,
        Store(folder, session.manifest, session.config) as store,
    ):
        room = Room(session)
        worker, service = Worker(session, store, room), Service(session, store, room, limits)
        stage = Stage(session, store, lead=None, beside=worker.beside)
        routers = videos_router(service), watch_router(stage), live_router(stage, service)

        def stop() -> None:
            session.stop()
            worker.close()
            stage.close()

        worker.start()
        with running(make_application(*routers, access=access, limits=limits), stop) as url:
            yield Served(url, service, stage)


def call_route(url, path, method="POST", body=b"", kind="application/json", **fields):
    """Call a route with fields as JSON; return what comes back, of a refusal status and message."""
    body = msgspec.json.encode(fields) if fields else body
    headers = {"content-type": kind}
    address = url.rstrip("/") + path
    request = urllib.request.Request(address, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            data = response.read()
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]
    return json.loads(data) if data[:1] == b"{" else data


class Viewer:
    """A client of the stream.

    Attributes:
        state: The latest.
        header: The latest, with its data.
        blocks: Those since the header, with their data.
    """

    def __init__(self, socket):
        self.socket, self.state, self.header, self.blocks = socket, None, None, []

    def receive(self, kind):
        """Receive messages up to the next one of a kind, and return it."""
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message["type"] == "state":
                self.state = message
            else:
                message["data"] = self.socket.recv(timeout=60)
                if message["type"] == "header":
                    self.header, self.blocks = message, []
                else:
                    self.blocks.append(message)
            if message["type"] == kind:
                return message

    def receive_state(self, state):
        while (
            self.state is None or not self.state["video"] or self.state["video"]["state"] != state
        ):
            self.receive("state")

    @property
    def frames(self):
        data = self.header["data"] + b"".join(block["data"] for block in self.blocks)
        with av.open(io.BytesIO(data)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@contextmanager
def viewing(url: str, **options) -> Iterator[Viewer]:
    """Watch the live video of a server."""
    address = url.rstrip("/").replace("http", "ws") + "/v1/live/stream"
    options = {"max_size": None, "compression": None, "close_timeout": 0.2, **options}
    with connect(address, **options) as socket:
        yield Viewer(socket)
