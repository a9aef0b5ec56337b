"""Errors over HTTP: a status and `{"error": {...}}`, in the form of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from packforcing.errors import BackendError, LiveError, OutputError, PackForcingError

_log = logging.getLogger(__name__)
_LONGEST = 2000  # characters of a message
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not served.

    Attributes:
        message: What was wrong and what to do, for people.
        status: HTTP's.
        param: The field of the request that is wrong.
        code: What is wrong, for programs.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def response(self) -> JSONResponse:
        """Return the error as JSON, its message in one line that can be encoded."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        param = self.param and _one_line(self.param)
        fields = {"message": _one_line(self.message), "type": kind, "param": param}
        return JSONResponse({"error": {**fields, "code": self.code}}, self.status)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST].encode("utf-8", "replace").decode()


def first_mistake(mistakes: Sequence[Any]) -> ApiError:
    """Return the error for what pydantic says of a request."""
    mistake = mistakes[0]
    parts = [str(part) for part in mistake["loc"] if part not in ("body", "query", "path")]
    name = ".".join(parts) or None
    if mistake["type"] == "extra_forbidden":
        return ApiError(f"unknown field '{name}'", 400, name, "unknown_parameter")
    text = mistake["msg"].removeprefix("Value error, ")
    return ApiError(f"{name}: {text}" if name else text, 400, name)


def as_api_error(error: PackForcingError) -> ApiError:
    """Return the error of HTTP for one of this package."""
    if isinstance(error, OutputError):
        _log.error("%s", error)
        return ApiError("the server cannot store it: its disk is full or cannot be written", 507)
    if isinstance(error, BackendError):
        return ApiError(str(error), 503)
    return ApiError(str(error), 409 if isinstance(error, LiveError) else 400)


def add_error_handlers(application: FastAPI) -> None:
    """Answer every error in one form: a mistake of the request with 4xx, a fault here with 5xx."""

    @application.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @application.exception_handler(PackForcingError)
    async def own_error(request: Request, error: PackForcingError) -> JSONResponse:
        return as_api_error(error).response()

    @application.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return first_mistake(error.errors()).response()

    @application.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(str(error.detail), error.status_code).response()
        response.headers.update(error.headers or {})
        return response

    @application.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return ApiError("an internal error; the log of the server has more", 500).response()
