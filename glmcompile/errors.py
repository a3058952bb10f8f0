"""The errors a user can cause or meet; each message names the thing, what was expected, what to do.

The command line prints the message of any of these and exits with code 2.
"""


class GlmcompileError(Exception):
    """Base of every error meant for the user's eyes."""


class CheckpointError(GlmcompileError):
    """The checkpoint directory is missing something, damaged or of an unsafe format."""


class UnsupportedArchitectureError(GlmcompileError):
    """The checkpoint's architecture cannot be compiled."""


class ExportError(GlmcompileError):
    """A component could not be exported to ONNX."""


class ParityError(GlmcompileError):
    """An exported component differs from its torch module by more than the tolerance."""


class CalibrationError(GlmcompileError):
    """The calibration data is missing, damaged or of the wrong kind for the model."""


class ArtifactError(GlmcompileError):
    """The engine directory is missing, incomplete, altered, too new, or not for this CPU."""


class NativeLibraryError(GlmcompileError):
    """The custom-op library is missing or cannot be loaded."""


class InputError(GlmcompileError):
    """A request cannot be served as given: image, prompt length or sampling option."""


class OverloadedError(GlmcompileError):
    """The engine's queue is full. retry_after: seconds after which to try again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(GlmcompileError):
    """The engine is closed, or is finishing what it has before it closes."""


class DeadlineError(GlmcompileError):
    """A request did not finish within its time-out."""


class ComputeError(GlmcompileError):
    """A component failed on a request, twice, or gave it logits that are not numbers."""


def brief(error: BaseException) -> str:
    """Another library's error on one line: its type, and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
