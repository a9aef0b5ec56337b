"""Jobs over HTTP, as OpenAI's API for videos has them, with schedules, seeds and policies."""

from __future__ import annotations

import functools
import io
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response
from pydantic import Field, TypeAdapter, ValidationError

from packforcing.app.jobs.execute import begin_video
from packforcing.app.jobs.records import ID, Draft, read_draft
from packforcing.app.jobs.room import Room
from packforcing.app.jobs.store import Job, Store
from packforcing.app.server.errors import ApiError, first_mistake
from packforcing.app.server.forms import (
    Fields,
    ImageReference,
    Text,
    decode_start,
    describe_body,
    read_form,
)
from packforcing.app.server.safety import Limits
from packforcing.config import Config, Policy
from packforcing.errors import PromptError
from packforcing.presets import policies
from packforcing.prompts import History, Prompt, Switch, format_schedule, parse_schedule
from packforcing.runtime.session import Session
from packforcing.runtime.start_clip import Fit
from packforcing.runtime.video_files import check_output

DEFAULT_SECONDS = "4"  # as OpenAI has it
_RANGES = re.compile(r"bytes=(\d+-\d*|-\d+)(\s*,\s*(\d+-\d*|-\d+))*")


@dataclass(frozen=True)
class Service:
    """What the routers of a server share.

    Attributes:
        session: Makes videos.
        store: Has the jobs.
        room: Has the memory for videos.
        limits: What clients may ask for.
        encode: Encodes words for a model that reads embeddings; None for one that reads words.
    """

    session: Session
    store: Store
    room: Room
    limits: Limits
    encode: Callable[[str], Prompt] | None = None

    @property
    def config(self) -> Config:
        return self.session.config

    def policies(self) -> dict[str, Policy]:
        """Return the policies that videos may be made under, by name."""
        own = self.config.policy
        if not self.session.backend.any_policy:
            return {self.policy_name(own): own}
        named = policies(self.session.manifest.config)
        return named if own in named.values() else {"bundle": own, **named}

    def policy_name(self, policy: Policy) -> str:
        """Return the name of a policy."""
        named = {"bundle": self.config.policy, **policies(self.session.manifest.config)}
        return next((name for name in reversed(named) if named[name] == policy), "bundle")

    def find_policy(self, name: str | None) -> Policy | None:
        """Return the policy of a name; None: the session's.

        Raises:
            ApiError: There is none, or the engines do not fit it.
        """
        named = self.policies()
        if name is not None and name not in named:
            reason = "" if self.session.backend.any_policy else ": the engines fit no other"
            raise ApiError(f"policy must be one of {', '.join(named)}{reason}", 400, "policy")
        return named[name] if name is not None else None

    def encode_words(self, switches: list[Switch]) -> list[Switch]:
        """Encode the words of a schedule, each once, where the model reads embeddings."""
        if self.encode is None:
            return switches
        encode = functools.cache(self.encode)
        return [
            replace(switch, prompt=encode(switch.prompt))
            if isinstance(switch.prompt, str)
            else switch
            for switch in switches
        ]


class ScheduleEntry(Fields):
    """A prompt, and when it takes effect."""

    time: float
    prompt: Text
    history: History | None = None
    over: int = 1
    block: int | None = None


Schedule = Annotated[list[ScheduleEntry], Field(max_length=Limits.switches)]


class CreateVideo(Fields):
    """What a video is to be."""

    prompt: Text | None = None
    model: str | None = None
    seconds: float | str = DEFAULT_SECONDS
    size: str | None = None
    input_reference: ImageReference | str | None = None
    seed: int | None = None
    schedule: Schedule | str | None = None
    policy: str | None = None
    start_fit: Fit = "fill"
    archive_limit: int | None = None
    user: Any = None  # this and the next: known to OpenAI's clients, and not used
    metadata: Any = None


class RemixVideo(Fields):
    """What is to be different."""

    prompt: Text | None = None


class Failure(Fields):
    code: str
    message: str


class VideoObject(Fields):
    """A job, as clients see it."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None = None
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: str | None
    error: Failure | None
    seed: int
    policy: str
    schedule: list[ScheduleEntry]
    recorded: bool
    frames: int
    frames_total: int
    queue_position: int | None


class VideoList(Fields):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Fields):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def video_object(service: Service, job: Job) -> VideoObject:
    """Return a job as clients see it."""
    record, result = job.record, job.record.result
    seconds = record.frames / service.config.fps if record.recorded else record.seconds
    error = None
    if result and result.status == "cancelled":
        error = Failure(code="cancelled", message="the job was cancelled")
    elif result and result.status == "failed":
        error = Failure(code="render_failed", message=result.error)
    return VideoObject(
        id=record.id,
        model=record.model,
        status="failed" if job.status == "cancelled" else job.status,
        progress=100 if job.status == "completed" else min(99, 100 * job.frames // record.frames),
        created_at=int(record.created),
        started_at=None if job.began is None else int(job.began),
        completed_at=int(result.ended) if result and result.status == "completed" else None,
        size=_size(service.config),
        seconds=f"{seconds:.3f}".rstrip("0").rstrip("."),
        prompt=record.switches[0].prompt,
        remixed_from_video_id=record.remixed_from,
        error=error,
        seed=record.seed,
        policy=service.policy_name(record.policy),
        schedule=[
            ScheduleEntry(
                time=switch.time,
                prompt=switch.prompt,
                history=switch.history,
                over=switch.over,
                block=switch.block,
            )
            for switch in record.switches
        ],
        recorded=record.recorded,
        frames=job.frames,
        frames_total=record.frames,
        queue_position=job.position,
    )


def _size(config: Config) -> str:
    return f"{config.width}x{config.height}"


def make_draft(service: Service, fields: CreateVideo, upload: bytes | None) -> Draft:
    """Check a request and make a draft of it.

    Raises:
        ApiError: A field is impossible.
        PackForcingError: What `begin_video` raises.
    """
    config = service.config
    if fields.model not in (None, config.name):
        raise ApiError(f"this server has the model '{config.name}'", 400, "model")
    if fields.size not in (None, _size(config)):
        raise ApiError(f"size must be {_size(config)}, the model's", 400, "size")
    try:
        seconds = float(fields.seconds)
    except ValueError:
        raise ApiError(f"seconds must be a number: '{fields.seconds}'", 400, "seconds") from None
    return Draft(
        prompts=_read_prompts(fields),
        seconds=seconds,
        seed=secrets.randbits(32) if fields.seed is None else fields.seed,
        policy=service.find_policy(fields.policy),
        start=upload,
        start_fit=fields.start_fit,
        archive_limit=fields.archive_limit,
    )


def _read_prompts(fields: CreateVideo) -> list[Switch]:
    """Return the schedule of a request; its words are not looked at."""
    if (fields.prompt is None) == (fields.schedule is None):
        raise ApiError("give either 'prompt' or 'schedule'", 400, "prompt")
    if fields.prompt is not None:
        return [Switch(0, fields.prompt)]
    entries = fields.schedule
    if isinstance(entries, str):  # of a form: JSON, or TOML as in a file
        try:
            decoded = msgspec.json.decode(entries)
        except (ValueError, RecursionError):
            switches = parse_schedule(entries.encode(), "schedule")
            if len(switches) > Limits.switches:
                raise ApiError(
                    f"a schedule has at most {Limits.switches} switches", 400, "schedule"
                ) from None
            return switches
        try:
            entries = TypeAdapter(Schedule).validate_python(decoded)
        except ValidationError as error:
            raise first_mistake(error.errors()) from error
    assert entries is not None
    return [
        Switch(entry.time, entry.prompt, entry.history, entry.over, entry.block)
        for entry in entries
    ]


def queue_draft(service: Service, draft: Draft) -> VideoObject:
    """Check what a graph is not needed for, encode the prompts and queue a job.

    Raises:
        ApiError: A field is impossible.
        PackForcingError: What `begin_video` and `Store.add` raise.
    """
    config, store = service.config, service.store
    if store.queued >= service.limits.queued_jobs:
        raise ApiError(f"{store.queued} jobs wait already: try again later", 429, code="queue_full")
    start = None
    if draft.start is not None:
        start = decode_start(draft.start, config, draft.start_fit)
    draft = replace(draft, prompts=service.encode_words(draft.prompts))
    try:
        service.room.check(begin_video(service.session, draft, start))
    except PromptError as error:
        raise ApiError(str(error), 400, "prompt") from error
    frames = config.frames(draft.seconds)
    check_output(store.folder / "new.mp4", frames, config.width, config.height)
    return video_object(service, store.add(draft))


def videos_router(service: Service) -> APIRouter:
    """Return the routes of jobs and of the model."""
    router, store = APIRouter(prefix="/v1"), service.store

    def find(video_id: str) -> Job:
        job = store.get(video_id) if ID.fullmatch(video_id) else None
        if job is None:
            raise ApiError("there is no video of this ID", 404, "video_id", "video_not_found")
        return job

    @router.post("/videos", openapi_extra=describe_body(CreateVideo))
    async def create_video(request: Request) -> VideoObject:
        """Queue a video."""
        fields, upload = await read_form(request, CreateVideo)
        draft = make_draft(service, fields, upload)
        return await run_in_threadpool(queue_draft, service, draft)

    @router.get("/videos")
    def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """List videos by the time of their creation."""
        if after is not None and not ID.fullmatch(after):
            raise ApiError("after must be the ID of a video", 400, "after")
        jobs = store.list(limit + 1, after, newest_first=order == "desc")
        data = [video_object(service, job) for job in jobs[:limit]]
        return VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(jobs) > limit,
        )

    @router.get("/videos/{video_id}")
    def retrieve_video(video_id: str) -> VideoObject:
        """Return a video's state."""
        return video_object(service, find(video_id))

    @router.delete("/videos/{video_id}")
    def delete_video(video_id: str) -> Deleted:
        """Remove a video and all that belongs to it; one in the making is stopped."""
        store.delete(find(video_id).record.id)
        return Deleted(id=video_id)

    @router.post("/videos/{video_id}/cancel")
    def cancel_video(video_id: str) -> VideoObject:
        """End a job without a video; one that has ended stays as it is."""
        job = store.cancel(find(video_id).record.id)
        return video_object(service, job or find(video_id))

    @router.post("/videos/{video_id}/remix", openapi_extra=describe_body(RemixVideo))
    async def remix_video(video_id: str, request: Request) -> VideoObject:
        """Queue a video like another one: the same again, or with another prompt."""
        fields, _ = await read_form(request, RemixVideo)
        return await run_in_threadpool(remix, find(video_id), fields.prompt)

    def remix(job: Job, prompt: str | None) -> VideoObject:
        draft = replace(read_draft(store.folder, job.record), remixed_from=job.record.id)
        if prompt is not None:
            draft = replace(draft, prompts=[Switch(0, prompt)])
        return queue_draft(service, draft)

    @router.get("/videos/{video_id}/content", response_class=Response)
    def download_video(
        request: Request, video_id: str, variant: Literal["video", "thumbnail"] = "video"
    ) -> Response:
        """Return the video (MP4, also in ranges), or its first frame (JPEG)."""
        job = find(video_id)
        if job.status != "completed":
            raise ApiError(f"the video is {job.status}", 400, "video_id", "video_not_ready")
        if variant == "thumbnail":
            return Response(_first_frame(job), media_type="image/jpeg")
        if not _RANGES.fullmatch(request.headers.get("range", "")):  # as if there were none
            request.scope["headers"] = [
                field for field in request.scope["headers"] if field[0] != b"range"
            ]
        return FileResponse(
            job.video, media_type="video/mp4", filename=f"{video_id}.mp4",
            content_disposition_type="inline",
        )  # fmt: skip

    @router.get("/videos/{video_id}/schedule", response_class=Response)
    def download_schedule(video_id: str) -> Response:
        """Return the schedule as TOML, for `packforcing render --schedule`."""
        switches = [
            Switch(entry.time, entry.prompt, entry.history, entry.over, entry.block)
            for entry in find(video_id).record.switches
        ]
        return toml_response(switches, video_id)

    @router.get("/models")
    def list_models() -> dict[str, Any]:
        """List the one model that this server has."""
        return {"object": "list", "data": [model_object()]}

    @router.get("/models/{model}")
    def retrieve_model(model: str) -> dict[str, Any]:
        """Return the model."""
        if model != service.config.name:
            raise ApiError(f"this server has the model '{service.config.name}'", 404, "model")
        return model_object()

    def model_object() -> dict[str, Any]:
        name = service.config.name
        return {"id": name, "object": "model", "created": 0, "owned_by": "packforcing"}

    return router


def toml_response(switches: list[Switch], name: str) -> Response:
    """Return a schedule as a file to save."""
    headers = {"content-disposition": f'attachment; filename="{name}.toml"'}
    return Response(format_schedule(switches), media_type="application/toml", headers=headers)


def _first_frame(job: Job) -> bytes:
    import av

    output = io.BytesIO()
    with av.open(job.video.absolute()) as container:
        next(container.decode(video=0)).to_image().save(output, "JPEG", quality=90)
    return output.getvalue()
