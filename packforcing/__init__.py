"""PackForcing: long video from a model trained on short clips, in a fixed memory budget."""

from packforcing.config import MODELS, Config, Policy, model_config
from packforcing.errors import PackForcingError

__version__ = "0.1.0"
__all__ = ["MODELS", "Config", "PackForcingError", "Policy", "model_config"]
