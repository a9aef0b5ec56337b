"""The errors users meet. Each message says what was wrong, where, and what to do."""


class PackForcingError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(PackForcingError, ValueError):
    """A model or policy setting that cannot work."""


class PromptError(PackForcingError, ValueError):
    """A prompt the model's text encoder cannot read."""


class CheckpointError(PackForcingError):
    """A weights file that is missing, damaged or of another model."""


class FetchError(PackForcingError):
    """Published weights that cannot be had: no network, no access, or not what was published."""


class PlanError(PackForcingError):
    """A memory budget that nothing fits into; `smallest` is the one in bytes that would do."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class ExportError(PackForcingError):
    """A graph that breaks the contract between export and runtime."""


class BundleError(PackForcingError):
    """A bundle that is missing, damaged or of another schema version."""


class CalibrationError(PackForcingError):
    """Statistics that are missing, of another model, or that a sound rollout cannot give."""


class BackendError(PackForcingError):
    """The inference library is missing or refuses a graph."""


class OutputError(PackForcingError):
    """A result that cannot be written where it was asked for."""


class VideoError(PackForcingError):
    """A video that cannot be read or measured."""


class RenderStopped(PackForcingError):
    """A video that was asked to end before its last block."""
