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


class NoRoomError(UnsupportedError):
    """This machine has not the memory for it."""


class OutputError(TwinframeError, OSError):
    """Results cannot be written where they were asked for."""


UNWRITABLE = "What is made cannot be kept here, as the disk is full or broken: please tell who runs this app."
"""An `OutputError` as a visitor is told it, who chose no folder and need not know which it is."""


class RefusedError(TwinframeError, RuntimeError):
    """Not now: the queue is full, a budget is spent, or the app is shutting down."""


class FaultError(TwinframeError, RuntimeError):
    """Something failed by no mistake of the user's.

    Args:
        sentence: for the user.
        kind: what failed, in a word, to count it by.
        trace: where it failed, for the log.
        lost: the device's process is of no more use: a fresh one is being started.
    """

    def __init__(self, sentence: str, *, kind: str = "", trace: str = "", lost: bool = False):
        super().__init__(sentence)
        self.kind, self.trace, self.lost = kind, trace, lost


def fault(error: Exception, trace: str = "", lost: bool = False) -> FaultError:
    """What to tell of an exception that nobody expected; named without torch, whose memory errors have names of their
    own."""
    kind = type(error).__name__
    if kind in ("OutOfMemoryError", "MemoryError"):
        sentence = "The device ran out of memory: choose a smaller batch or size and retry."
        return FaultError(sentence, kind="OutOfMemoryError", trace=trace)
    if lost:
        sentence = f"The device failed ({kind}) and is being started again: please retry in a minute."
    else:
        sentence = f"The engine failed ({kind}): its log says more; please retry."
    return FaultError(sentence, kind=kind, trace=trace, lost=lost)


class CancelledRun(Exception):
    """No failure: whoever asked for a run does not want it any more. Raised out of the pipeline's call."""


def shown(value: object) -> str:
    """`value` as a sentence may quote it: on one line, and not longer than a line."""
    if isinstance(value, int) and value.bit_length() > 100:
        return "a number of that size"  # Python refuses to print the largest ones
    try:
        text = repr(value)
    except ValueError:  # such a number inside a list
        text = f"that {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
