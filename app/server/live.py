"""The live video over HTTP: begin it, steer it, watch it, keep it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.websockets import WebSocketDisconnect

from packforcing.app.server.forms import (
    Fields,
    ImageReference,
    Text,
    decode_start,
    describe_body,
    read_form,
)
from packforcing.app.server.stage import Stage
from packforcing.app.server.videos import (
    Service,
    VideoObject,
    queue_draft,
    toml_response,
    video_object,
)
from packforcing.errors import LiveError
from packforcing.prompts import History, Prompt
from packforcing.prompts import Switch as ScheduledSwitch
from packforcing.runtime.start_clip import Fit

STALLED_SECONDS = 60.0  # after which a viewer who takes nothing is sent away

State = dict[str, Any]


class Begin(Fields):
    """A video to begin."""

    prompt: Text
    seed: int | None = None
    policy: str | None = None
    start_fit: Fit = "fill"
    input_reference: ImageReference | str | None = None


class Switch(Fields):
    """A prompt to follow."""

    prompt: Text
    history: History | None = None
    over: int = 1


class FirstBlock(Fields):
    """When a switch takes effect."""

    block: int


class Render(Fields):
    """What to render of the live video's schedule."""

    seconds: Annotated[float, Field(gt=0)] | None = None


def watch_router(stage: Stage) -> APIRouter:
    """Return the routes with which a video is watched, paused and stopped."""
    router = APIRouter(prefix="/v1/live", tags=["live"])

    def state() -> State:
        return stage.describe(blocks=True)

    @router.get("")
    def get_state() -> State:
        """Return the bundle, the memory plan, the live video and its latest blocks."""
        return state()

    @router.post("/pause")
    def pause() -> State:
        """Begin no further block."""
        stage.pause()
        return state()

    @router.post("/proceed")
    def proceed() -> State:
        """End a pause."""
        stage.proceed()
        return state()

    @router.post("/stop")
    def stop() -> State:
        """End the video, in the middle of a block if need be."""
        stage.stop()
        return state()

    @router.get("/schedule", response_class=Response)
    def download_schedule() -> Response:
        """Return the schedule so far as TOML, for `packforcing render --schedule`."""
        if stage.show is None:
            raise LiveError("there is no live video: begin one")
        return toml_response(stage.show.schedule(), stage.show.id)

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
        if stage.show is None or not stage.show.live:
            raise LiveError("there is no live video: begin one")
        return StreamingResponse(
            _fragments(stage), media_type="video/mp4", headers={"cache-control": "no-store"}
        )

    return router


def live_router(stage: Stage, service: Service) -> APIRouter:
    """Return the routes with which a video is begun, switched, recorded and rendered."""
    router = APIRouter(prefix="/v1/live", tags=["live"])

    def encode(prompt: str) -> Prompt:
        return service.encode_words([ScheduledSwitch(0, prompt)])[0].prompt

    @router.post("", openapi_extra=describe_body(Begin))
    async def begin(request: Request) -> State:
        """Begin a live video in place of the current one."""
        fields, upload = await read_form(request, Begin)
        return await run_in_threadpool(begin_video, fields, upload)

    def begin_video(fields: Begin, upload: bytes | None) -> State:
        frames = None
        if upload is not None:
            frames = decode_start(upload, service.config, fields.start_fit)
        stage.begin(
            encode(fields.prompt),
            fields.seed,
            policy=service.find_policy(fields.policy),
            frames=frames,
            start=upload,
            start_fit=fields.start_fit,
        )
        return stage.describe(blocks=True)

    @router.post("/switch")
    def switch(change: Switch) -> FirstBlock:
        """Follow another prompt."""
        block = stage.switch(encode(change.prompt), change.history, change.over)
        return FirstBlock(block=block)

    @router.post("/record")
    def record() -> State:
        """Record the video from its next block on."""
        stage.record()
        return stage.describe(blocks=True)

    @router.post("/record/stop")
    def finish_recording() -> VideoObject:
        """End the recording; it is a video among the jobs."""
        return video_object(service, stage.finish_recording())

    @router.post("/render")
    def render(length: Render | None = None) -> VideoObject:
        """Queue a job that renders the live video from its beginning, the same frames."""
        return queue_draft(service, stage.draft(None if length is None else length.seconds))

    return router


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
