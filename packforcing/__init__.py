"""PackForcing: long video from a model trained on short clips, in a fixed memory budget."""

import os

# Before any other import: libraries that report usage read these once, when they are imported.
# Child processes inherit them.
os.environ.update(
    ORT_DISABLE_TELEMETRY="1",  # ONNX Runtime's uploader, identifier and event store; from 1.29
    HF_HUB_DISABLE_TELEMETRY="1",  # huggingface_hub, hf_xet, diffusers and transformers
    RAY_USAGE_STATS_ENABLED="0",  # Ray, where a program imports this package before it starts Ray
)

TYPE_CHECKING = False  # without `typing`: importing the package takes no time

# In a checkout the other rooms (runtime, export, ...) lie beside this folder, not in it. Without
# this line a program started there would find this folder before the installed package, and no
# runtime.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"
__all__ = ["MODELS", "Config", "PackForcingError", "Policy", "model_config"]

if TYPE_CHECKING:
    from packforcing.config import Config, Policy
    from packforcing.errors import PackForcingError
    from packforcing.presets import MODELS, model_config
else:

    def __getattr__(name):
        from importlib import import_module

        modules = {"MODELS": "presets", "PackForcingError": "errors", "model_config": "presets"}
        modules |= {"Config": "config", "Policy": "config"}
        if name in modules:
            return getattr(import_module(f"packforcing.{modules[name]}"), name)
        if name in ("config", "errors", "presets"):
            return import_module(f"packforcing.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
