"""PackForcing: long video from a model trained on short clips, in a fixed memory budget."""

import os

# Before any import below: libraries that report usage read these once, when they are imported.
# Child processes inherit them.
os.environ.update(
    ORT_DISABLE_TELEMETRY="1",  # ONNX Runtime's uploader, identifier and event store; from 1.29
    HF_HUB_DISABLE_TELEMETRY="1",  # huggingface_hub, hf_xet, diffusers and transformers
    RAY_USAGE_STATS_ENABLED="0",  # Ray, where a program imports this package before it starts Ray
)

# In a checkout the other rooms (runtime, export, ...) lie beside this folder, not in it. Without
# this line a program started there would find this folder before the installed package, and no
# runtime.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

from packforcing.config import Config, Policy  # noqa: E402
from packforcing.errors import PackForcingError  # noqa: E402
from packforcing.presets import MODELS, model_config  # noqa: E402

__version__ = "0.1.0"
__all__ = ["MODELS", "Config", "PackForcingError", "Policy", "model_config"]
