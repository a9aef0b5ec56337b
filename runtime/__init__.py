"""Bundle to video. No torch, and nothing heavy until a session is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packforcing.runtime.session import BlockInfo, RenderSummary, Session, Switch

__all__ = ["BlockInfo", "RenderSummary", "Session", "Switch", "demo_bundle"]


def demo_bundle() -> Path:
    """The demo model's bundle, shipped inside the package."""
    import packforcing

    return Path(packforcing.__file__).parent / "demo" / "bundle"


def __getattr__(name: str) -> object:
    if name in __all__:
        from packforcing.runtime import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
