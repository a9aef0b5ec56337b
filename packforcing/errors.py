"""The errors users meet. Each message says what was wrong, where, and what to do.

PackForcingError
    MissingDependency   an optional package is not installed
    ConfigError         a model, policy or command setting cannot work
    PromptError         a prompt, schedule or embedding cannot be used
    CheckpointError     weights are missing, damaged or of another model
    FetchError          published weights cannot be downloaded
    PlanError           no configuration fits into a memory budget
    ExportError         an exported graph breaks the contract with the runtime
    BundleError         a bundle is missing, damaged or of another schema version
    CalibrationError    activation statistics are missing or unusable
    BackendError        an inference library, a GPU or an engine cannot be used
    OutputError         a result cannot be written
        RenderLocked    another process renders it
    VideoError          a video or start picture cannot be read
    ResumeError         an interrupted render cannot be resumed
    RenderStopped       a render was stopped before its last block
    LiveError           the live video of a server cannot do this now

PromptWarning is no error: the end of a prompt is not read, and the work goes on.
"""

from __future__ import annotations


class PackForcingError(Exception):
    """Base of every error this project raises on purpose."""


class MissingDependency(PackForcingError, ImportError):
    """An optional package is not installed; the message has the pip command."""


class ConfigError(PackForcingError, ValueError):
    """A model, policy or command setting cannot work."""


class PromptError(PackForcingError, ValueError):
    """A prompt, schedule or embedding cannot be used."""


class CheckpointError(PackForcingError):
    """Weights are missing, damaged or of another model."""


class FetchError(PackForcingError):
    """Published weights cannot be downloaded: no network, no access, or other content."""


class PlanError(PackForcingError):
    """No configuration fits into a memory budget.

    Attributes:
        smallest: The smallest budget that would do, in bytes.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message, smallest)  # both, so that the error survives pickling
        self.smallest = smallest

    def __str__(self) -> str:
        return str(self.args[0])


class ExportError(PackForcingError):
    """An exported graph breaks the contract with the runtime."""


class BundleError(PackForcingError):
    """A bundle is missing, damaged or of another schema version."""


class CalibrationError(PackForcingError):
    """Activation statistics are missing, of another model, or not those of a sound rollout."""


class BackendError(PackForcingError):
    """An inference library, a GPU or an engine cannot be used."""


class OutputError(PackForcingError):
    """A result cannot be written."""


class RenderLocked(OutputError):
    """Another process renders this output."""


class VideoError(PackForcingError):
    """A video or start picture cannot be read."""


class ResumeError(PackForcingError):
    """An interrupted render cannot be resumed: its files are damaged or of another request."""


class RenderStopped(PackForcingError):
    """A render was stopped before its last block."""


class LiveError(PackForcingError):
    """The live video of a server cannot do this now: there is none, or it only shows a render."""


class PromptWarning(UserWarning):
    """The end of a prompt is not read.

    Attributes:
        prompt: The prompt as it was cleaned.
        unread: Its end, which is not read.
    """

    def __init__(self, message: str, prompt: str, unread: str) -> None:
        super().__init__(message, prompt, unread)  # all, so that it survives pickling
        self.prompt, self.unread = prompt, unread

    def __str__(self) -> str:
        return str(self.args[0])
