"""Bundle to frames to file. No torch, and nothing heavy before a session is opened."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packforcing.prompts import Switch
    from packforcing.runtime.blocks import Block, BlockInfo, StepInfo
    from packforcing.runtime.render import RenderSummary
    from packforcing.runtime.session import Session
    from packforcing.runtime.video import Video

__all__ = [
    "Block",
    "BlockInfo",
    "RenderSummary",
    "Session",
    "StepInfo",
    "Switch",
    "Video",
    "demo_bundle",
]


def demo_bundle() -> Path:
    """Return the demo model's bundle, which is inside the package."""
    import packforcing

    return Path(packforcing.__file__).parent / "demo" / "bundle"


if not TYPE_CHECKING:  # a type checker would take every name for one of this module's
    _MODULES = {
        "RenderSummary": "runtime.render",
        "Session": "runtime.session",
        "Switch": "prompts",
        "Video": "runtime.video",
    }

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _MODULES.get(name, "runtime.blocks")
        return getattr(import_module(f"packforcing.{module}"), name)
