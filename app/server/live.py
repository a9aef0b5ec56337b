"""The live video over HTTP: begin it, steer it, watch it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.websockets import WebSocketDisconnect

from packforcing.app.server.stage import Stage
from packforcing.config import Policy
from packforcing.errors import ConfigError, LiveError
from packforcing.presets import policies
from packforcing.prompts import MAX_BLEND, History
from packforcing.runtime.start_clip import Fit

STALLED_SECONDS = 60.0  # after which a viewer who takes nothing is sent away


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Begin(_Body):
    """A video to begin."""

    prompt: str
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    policy: str | None = None
    start_fit: Fit = "fill"


class Switch(_Body):
    """A prompt to follow."""

    prompt: str
    history: History | None = None
    over: Annotated[int, Field(ge=1, le=MAX_BLEND)] = 1


@dataclass(frozen=True)
class _Beginning:
    """What `POST /v1/live` asks for, and the upload with it."""

    fields: Begin
    start: bytes | None


async def _read_beginning(request: Request) -> _Beginning:
    """Read JSON or a form."""
    start: bytes | None = None
    try:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with request.form(max_files=1, max_fields=10) as form:
                fields: dict[str, Any] = dict(form)
                upload = fields.pop("input_reference", None)
                if isinstance(upload, UploadFile):
                    start = await upload.read()
                return _Beginning(Begin.model_validate(fields), start)
        return _Beginning(Begin.model_validate_json(await request.body()), None)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


_BEGIN_SCHEMA = Begin.model_json_schema()
_BEGIN_DOCUMENTATION = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _BEGIN_SCHEMA},
            "multipart/form-data": {
                "schema": {
                    **_BEGIN_SCHEMA,
                    "properties": {
                        **_BEGIN_SCHEMA["properties"],
                        "input_reference": {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}


def make_router(stage: Stage) -> APIRouter:
    """Return the routes of a stage's live video."""
    router = APIRouter(prefix="/v1/live", tags=["live"])

    def full_state() -> dict[str, Any]:
        return stage.describe(blocks=True)

    @router.get("")
    def get_state() -> dict[str, Any]:
        """Return the bundle, the memory plan, the live video and its latest blocks."""
        return full_state()

    @router.post("", openapi_extra=_BEGIN_DOCUMENTATION)
    def begin(beginning: Annotated[_Beginning, Depends(_read_beginning)]) -> dict[str, Any]:
        """Begin a live video in place of the current one."""
        fields = beginning.fields
        with _conflicts():
            stage.begin(
                fields.prompt,
                fields.seed,
                policy=None if fields.policy is None else _policy(stage, fields.policy),
                start=beginning.start,
                start_fit=fields.start_fit,
            )
        return full_state()

    @router.post("/switch")
    def switch(change: Switch) -> dict[str, int]:
        """Follow another prompt; return the first block that does."""
        with _conflicts():
            return {"block": stage.switch(change.prompt, change.history, change.over)}

    @router.post("/pause")
    def pause() -> dict[str, Any]:
        """Begin no further block."""
        with _conflicts():
            stage.pause()
        return full_state()

    @router.post("/proceed")
    def proceed() -> dict[str, Any]:
        """End a pause."""
        with _conflicts():
            stage.proceed()
        return full_state()

    @router.post("/stop")
    def stop() -> dict[str, Any]:
        """End the video, in the middle of a block if need be."""
        with _conflicts():
            stage.stop()
        return full_state()

    @router.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        """Send states, headers and blocks, each as JSON, the latter two with bytes after it."""
        await socket.accept()
        tasks = {asyncio.create_task(work) for work in (_send(socket, stage), _ignore(socket))}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @router.get("/video", response_class=StreamingResponse)
    async def video() -> StreamingResponse:
        """Return the live video as fragmented MP4, from its latest block to its end."""
        if stage.show is None:
            raise HTTPException(404, "there is no live video: begin one")
        return StreamingResponse(
            _fragments(stage), media_type="video/mp4", headers={"cache-control": "no-store"}
        )

    return router


@contextmanager
def _conflicts() -> Iterator[None]:
    """Answer 409 to what the live video cannot do now."""
    try:
        yield
    except LiveError as error:
        raise HTTPException(409, str(error)) from None


def _policy(stage: Stage, name: str) -> Policy:
    named = policies(stage.session.manifest.config)
    if name not in named:
        raise ConfigError(f"unknown policy '{name}'; known policies: {', '.join(named)}")
    return named[name]


async def _send(socket: WebSocket, stage: Stage) -> None:
    """Send all messages until the viewer leaves, stalls, or the server ends."""
    with suppress(WebSocketDisconnect, TimeoutError):
        async with aclosing(stage.broadcast.follow()) as messages:
            async for message in messages:
                # what the socket has not taken yet is a message at most: `send` waits for the rest
                async with asyncio.timeout(STALLED_SECONDS):
                    await socket.send_text(message.text)
                    if message.data:
                        await socket.send_bytes(message.data)
        await socket.close(1001)


async def _ignore(socket: WebSocket) -> None:
    """Read what a viewer sends, until it leaves."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


async def _fragments(stage: Stage) -> AsyncGenerator[bytes, None]:
    """Yield the header and the fragments of the current video."""
    headers = 0
    async with aclosing(stage.broadcast.follow()) as messages:
        async for message in messages:
            headers += message.kind == "header"
            if headers > 1 or (message.kind == "state" and stage.show and not stage.show.live):
                return
            if message.data:
                yield message.data
