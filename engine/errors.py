"""Every failure a user can cause or meet, each as one sentence that says what to do.

Knows nothing of where the sentence is shown; the page, the API and the command line print `str(error)` as it stands.
"""


class TwinframeError(Exception):
    """Base of all errors whose text is meant for the user."""


class RequestError(TwinframeError, ValueError):
    """The request cannot be carried out as written: unknown name, wrong type, value out of range."""


class LoadError(TwinframeError, RuntimeError):
    """A model's weights are missing, damaged or unreachable."""


class UnsupportedError(TwinframeError, RuntimeError):
    """This machine cannot run the precision that was asked for."""


class OutputError(TwinframeError, OSError):
    """Results cannot be written where they were asked for."""


class RefusedError(TwinframeError, RuntimeError):
    """Not now: the queue is full, a budget is spent, or the app is shutting down."""
