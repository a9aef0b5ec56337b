"""Put routers, page, errors and documentation together into one application."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import uvicorn
from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from packforcing import __version__
from packforcing.app.server.errors import add_error_handlers
from packforcing.app.server.safety import Access, Guard, Limits

GRACE_SECONDS = 2  # for what is being sent when a server ends
PAGE = Path(str(resources.files("packforcing.app.server") / "page"))


def make_application(*routers: APIRouter, access: Access, limits: Limits) -> ASGIApp:
    """Make the application of a server.

    Args:
        routers: Its routes, beside `/health`, the page, `/docs` and `/openapi.json`.
        access: Who may use it.
        limits: What clients may ask for at most.
    """
    application = FastAPIOffline(title="PackForcing", version=__version__, redoc_url=None)
    add_error_handlers(application)
    for router in routers:
        application.include_router(router)

    @application.get("/health")
    async def health() -> dict[str, str]:
        """Tell that the server answers; needs no token."""
        return {"status": "ok"}

    @application.get("/", include_in_schema=False)
    async def show_page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    application.mount("/page", StaticFiles(directory=PAGE), name="page")
    return Guard(application, access, limits)


def server_config(application: ASGIApp) -> uvicorn.Config:
    """Return how every server here runs: it logs no requests and compresses no video."""
    return uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
