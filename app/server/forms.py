"""Read what clients send: fields as JSON or as a form, and a picture or clip as a file."""

from __future__ import annotations

import base64
import binascii
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.datastructures import UploadFile

from packforcing.app.server.errors import ApiError, first_mistake
from packforcing.app.server.safety import Limits
from packforcing.config import Config
from packforcing.errors import VideoError
from packforcing.prompts import MAX_FILE_BYTES
from packforcing.runtime.start_clip import Fit, load_video_start

_DATA_URL = "data:"
REFERENCE = "input_reference"
_DECODING = threading.Lock()  # one upload at a time: a large picture takes hundreds of megabytes

Form = TypeVar("Form", bound=BaseModel)
Text = Annotated[str, StringConstraints(max_length=Limits.text_characters)]


class Fields(BaseModel):
    """Fields of a request; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


class ImageReference(Fields):
    """A file inside of JSON, as OpenAI's API has it."""

    image_url: str


async def read_form(request: Request, form: type[Form]) -> tuple[Form, bytes | None]:
    """Read a request's body: JSON, or a form with at most one file.

    Args:
        request: The request.
        form: Its fields. An `input_reference` among them is a file or a data URL.

    Returns:
        The fields, and the content of `input_reference`.

    Raises:
        ApiError: The body is not such a form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    values: dict[str, Any] = {}
    upload: bytes | None = None
    if kind == "multipart/form-data":
        async with request.form(
            max_files=1, max_fields=Limits.form_parts, max_part_size=MAX_FILE_BYTES
        ) as sent:
            for name, value in sent.multi_items():
                if name in values or (name == REFERENCE and upload is not None):
                    raise ApiError(f"the field '{name}' is sent twice", 400, name)
                if not isinstance(value, UploadFile):
                    values[name] = value
                elif name == REFERENCE:
                    upload = await value.read()
                else:
                    raise ApiError(f"'{name}' is no field for a file", 400, name)
        if (url := values.pop(f"{REFERENCE}[image_url]", None)) is not None:
            values[REFERENCE] = {"image_url": url}
    elif body := await request.body():
        if kind not in ("", "application/json"):
            raise ApiError(
                f"send JSON ('content-type: application/json') or multipart/form-data, not {kind}",
                415,
            )
        try:
            values = msgspec.json.decode(body, type=dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON object: {error}") from error
    try:
        fields = form.model_validate(values)
    except ValidationError as error:
        raise first_mistake(error.errors()) from error
    reference = getattr(fields, REFERENCE, None)
    if reference is not None and upload is None:
        upload = _read_data_url(getattr(reference, "image_url", reference))
    return fields, upload


def _read_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not (url.startswith(_DATA_URL) and comma and head.endswith(";base64")):
        raise ApiError(
            "upload a file, or give a data URL in base64: nothing is fetched from elsewhere",
            400,
            REFERENCE,
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"the data URL is no base64: {error}", 400, REFERENCE) from error


def decode_start(data: bytes, config: Config, fit: Fit) -> np.ndarray:
    """Decode the picture or the end of a clip that a video begins with, in whole blocks.

    Args:
        data: As uploaded.
        config: Of the model.
        fit: What becomes of another shape.

    Returns:
        uint8 RGB [T, H, W, 3].

    Raises:
        ApiError: It cannot be decoded, or is too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(data)
        try:
            with _DECODING:
                return load_video_start(path, config, fit, Limits.start_pixels).frames
        except VideoError as error:
            text = str(error).replace(f"cannot start from {path}: ", "")
            raise ApiError(f"cannot start from it: {text}", 400, REFERENCE) from error


def describe_body(form: type[Fields]) -> dict[str, Any]:
    """Describe a body that may be JSON or a form, for the documentation."""
    schema = form.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(parts[node["$ref"].rpartition("/")[2]])
        return {name: inline(value) for name, value in node.items()}

    fields = inline(schema)
    with_file = {**fields["properties"], REFERENCE: {"type": "string", "format": "binary"}}
    multipart = {**fields, "properties": with_file} if REFERENCE in fields["properties"] else fields
    content = {
        "application/json": {"schema": fields},
        "multipart/form-data": {"schema": multipart},
    }
    return {"requestBody": {"content": content}}
