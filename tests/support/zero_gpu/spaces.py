"""A stand-in for the `spaces` package, as far as a decorated generator can tell: with SPACES_ZERO_GPU it runs in a
fork, and without it is given back as it is. Put this folder on PYTHONPATH.

As in the package's version 0.51 what a generator yields is pickled, of an exception only its class comes back, closing
the generator ends it after its next value, and a fork that ends gives "GPU task aborted". No card is lent."""

import multiprocessing
import os
from functools import partial

FORKING = multiprocessing.get_context("fork")
asked = []
"""Seconds of each decorated function."""


class Error(Exception):
    """Gradio's, which the package raises."""

    def __init__(self, message):
        super().__init__(message)
        self.message = message


def GPU(task=None, *, duration=None):
    if task is None:
        return partial(GPU, duration=duration)
    asked.append(duration)
    if os.environ.get("SPACES_ZERO_GPU") != "true":
        return task

    def handler(*args):
        if os.environ.get("NO_CARD"):
            raise Error("<b>ZeroGPU quota exceeded</b>. Try again in 1:00:00")
        found, child_end = FORKING.Pipe(duplex=False)
        stop = FORKING.Event()
        fork = FORKING.Process(target=_iterate, args=(task, args, child_end, stop), daemon=True)
        fork.start()
        child_end.close()
        try:
            while True:
                try:
                    kind, value = found.recv()
                except EOFError:
                    raise Error("GPU task aborted") from None
                if kind == "end":
                    return
                if kind == "raised":
                    raise Error(value)
                yield value
        finally:
            stop.set()
            fork.join()

    return handler


def _iterate(task, args, connection, stop):
    generator = task(*args)
    while True:
        try:
            value = next(generator)
        except StopIteration:
            break
        except Exception as error:  # noqa: BLE001 - as the package does
            connection.send(("raised", type(error).__name__))
            return
        if stop.is_set():
            generator.close()
            break
        connection.send(("ok", value))
    connection.send(("end", None))
