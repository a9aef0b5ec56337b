"""The command that serves videos over HTTP: `serve`."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing.app.cli.options import (
    FOLDER,
    OTHER_CONTEXT,
    POLICY_HELP,
    argument_for,
    encoder_attrs,
    option,
    run_options,
)
from packforcing.app.cli.progress import print_status
from packforcing.app.cli.videos import bundle_and_policy, open_session
from packforcing.errors import ConfigError, OutputError
from packforcing.extras import optional_imports

if TYPE_CHECKING:
    from packforcing.app.jobs.store import Store
    from packforcing.config import Config
    from packforcing.prompts import Prompt


@click.command()
@option(
    "--bundle",
    type=FOLDER,
    metavar="DIR",
    help="Exported model, as BUNDLE.  [default: the demo model]",
)
@argument_for("bundle", "[BUNDLE]")
@option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Beyond this machine a token is needed.",
)
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@option(
    "--out",
    type=FOLDER,
    metavar="DIR",
    default="out/serve",
    show_default=True,
    help="Folder of the jobs and their videos.",
)
@option(
    "--encoder",
    help="Text encoder UMT5, a folder or file, for models that do not read words themselves.",
    **encoder_attrs,
)
@option(
    "--policy",
    metavar="NAME",
    help=f"For live videos and jobs that name none. {POLICY_HELP} {OTHER_CONTEXT}  [default: the "
    "bundle's]",
)
@option(
    "--token",
    metavar="TOKEN",
    help="Secret that requests need. Beyond this machine one is needed.  [default: a random one "
    "there, none on this machine]",
)
@option(
    "--allow-host",
    metavar="NAME",
    multiple=True,
    help="Further name of this server, as a proxy or DNS has it; may be repeated.",
)
@option("--open", "open_page", is_flag=True, help="Open the page in a browser.")
@run_options
def serve(
    bundle: Path | None,
    host: str,
    port: int,
    out: Path,
    encoder: Path | None,
    policy: str | None,
    token: str | None,
    allow_host: tuple[str, ...],
    open_page: bool,
    threads: int | None,
    backend: str,
) -> None:
    """Serve a page with a live video, and jobs over HTTP.

    All viewers see and steer one live video, which ends with the server.

    Jobs speak OpenAI's API for videos: POST /v1/videos creates one, /docs lists all routes. They
    are files in DIR: after a restart, also after a crash, they go on where they were and give the
    same frames.

    By default only this machine can connect. With another --host, whoever has the printed URL can.

    Ctrl-C or SIGTERM ends the server within a step of a block.

    \b
    Examples:
      packforcing serve --open
      packforcing serve my-bundle --port 9000 --out videos
    """
    with optional_imports("serving", "serve"):
        from packforcing.app.server.application import make_application
        from packforcing.app.server.broadcast import bound_unsent
        from packforcing.app.server.live import live_router, watch_router
        from packforcing.app.server.safety import Access, Limits, own_hosts
        from packforcing.app.server.stage import Stage
        from packforcing.app.server.videos import Service, videos_router

    from packforcing.app.jobs.room import Room
    from packforcing.app.jobs.store import Store
    from packforcing.app.jobs.worker import Worker

    directory, config, chosen = bundle_and_policy(bundle, policy)
    if config.width % 2 or config.height % 2:
        raise ConfigError(
            f"H.264 needs an even width and height, and the bundle has {config.width}x"
            f"{config.height}: export it at another --size"
        )
    token = token_for(host, token)
    encode = _prompt_encoder(config, encoder)
    listener = _listen(host, port)
    bound_unsent(listener)
    with (
        listener,
        open_session(directory, chosen, None, threads, backend) as session,
        Store(out, session.manifest, session.config) as store,
    ):
        room, limits = Room(session), Limits()
        worker = Worker(session, store, room)
        service = Service(session, store, room, limits, encode)
        stage = Stage(session, store, beside=worker.beside)
        application = make_application(
            videos_router(service),
            watch_router(stage),
            live_router(stage, service),
            access=Access(own_hosts(host, allow_host), token),
            limits=limits,
        )

        def stop() -> None:
            session.stop()
            worker.close()
            stage.close()

        url = page_url(listener, host, token)
        click.echo(url)
        sys.stdout.flush()
        if open_page:
            click.launch(url)
        _log_to_stderr()
        worker.start()
        number = _run(application, listener, stop)
        click.echo(_summary(store), err=True)
    raise click.exceptions.Exit(128 + number if number else 0)


def _listen(host: str, port: int) -> socket.socket:
    """Listen on an address, before anything is loaded.

    Raises:
        OutputError: It cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OutputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or "
            "--port"
        ) from error


def _prompt_encoder(config: Config, folder: Path | None) -> Callable[[str], Prompt] | None:
    """Return what encodes a prompt, for a model that reads embeddings.

    Raises:
        ConfigError: The model needs an encoder and there is none, or the other way around.
        CheckpointError: The folder is no encoder.
        MissingDependency: A package is not installed.
    """
    import functools
    import threading

    from packforcing.embeddings import embedding_cache_folder

    if config.text_encoder == "words":
        if folder is not None:
            raise ConfigError(
                f"the {config.name} model reads its prompt itself: leave out --encoder"
            )
        return None
    if folder is None:
        raise ConfigError(
            f"the {config.name} model reads embeddings of {config.text_encoder}: name that encoder "
            "with --encoder DIR ('packforcing encode-prompt --help' says which folders do)"
        )
    print_status("loading PyTorch and checking the text encoder ...", False)
    with optional_imports("encoding", "text"):
        from transformers.utils import logging as transformers_logging

        from packforcing.checkpoints.umt5 import encode_umt5
    transformers_logging.set_verbosity_error()
    lock = threading.Lock()  # the encoder takes gigabytes

    @functools.lru_cache(maxsize=16)
    def encode(prompt: str) -> Prompt:
        with lock:
            cache = embedding_cache_folder()
            return encode_umt5([prompt], folder, cache=cache, strict=True)[0]

    encode_umt5([], folder)
    return encode


def _is_local(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str, token: str | None) -> str | None:
    """Return the token that requests need, a random one where one is needed and none is set.

    Raises:
        ConfigError: It is short enough to be guessed.
    """
    import secrets

    from packforcing.app.server.safety import MIN_TOKEN

    if token is None:
        return None if _is_local(host) else secrets.token_urlsafe(24)
    if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"a token has {MIN_TOKEN} or more letters, digits or signs, in ASCII")
    return token


def page_url(listener: socket.socket, host: str, token: str | None) -> str:
    """Return the URL of the page, as a person opens it."""
    from urllib.parse import quote

    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    query = f"?token={quote(token, safe='')}" if token else ""
    return f"http://{name}:{listener.getsockname()[1]}/{query}"


def _run(application: Any, listener: socket.socket, stop: Callable[[], None]) -> int:
    """Serve until a signal ends it; return the signal's number.

    Args:
        application: The ASGI application.
        listener: Listens already.
        stop: Ends what makes videos; called while connections are still open.
    """
    import asyncio
    from contextlib import contextmanager

    import uvicorn

    from packforcing.app.cli.process import handle_signals
    from packforcing.app.server.application import server_config

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Any:  # ours are handled below
            yield

        async def shutdown(self, sockets: Any = None) -> None:
            await asyncio.to_thread(stop)
            await super().shutdown(sockets)

    received: list[int] = []

    def end(number: int, frame: object) -> None:
        server.force_exit = bool(received)  # the second signal: do not wait for connections
        server.should_exit = True
        received.append(number)

    server = Server(server_config(application))
    with handle_signals(end):
        asyncio.run(server.serve([listener]))
    return received[0] if received else 0


def _log_to_stderr() -> None:
    """Print what the server does, without prompts and paths, which only debug lines have."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("packforcing")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _summary(store: Store) -> str:
    if not store.queued:
        return "stopped; no job is left"
    jobs = "1 job goes" if store.queued == 1 else f"{store.queued} jobs go"
    return f"stopped; {jobs} on at the next start with --out {store.folder}"
