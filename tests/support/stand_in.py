"""A device without torch for the child process, whose fate the prompt decides; see
tests/engine/serving/test_process.py."""

import os
import signal
import time
from pathlib import Path

from engine import events
from engine.errors import CancelledRun, FaultError, LoadError, UnsupportedError
from engine.files import write_whole
from engine.formats import PRECISIONS
from engine.machine import FINE, Finding, Machine, Support
from engine.results import Comparison

STEP_SECONDS = 0.02


class StandIn:
    """`engine.runtime.device.Device`, as far as a process can tell."""

    def __init__(self, name, source, filtered):
        if name == "banana":
            raise UnsupportedError("There is no device 'banana': choose cpu or cuda.")
        if name == "stillborn":
            os._exit(3)
        self.machine = Machine(name=f"stand-in {os.getpid()}", kind="cpu")
        self.support = {
            p: Support(precision=p, execution="native", reason="", gemm="", machine=self.machine) for p in PRECISIONS
        }
        self._prepared = []

    def compare(self, request, out, tell, stop):
        for index in range(1, request.num_inference_steps + 1):
            time.sleep(STEP_SECONDS)
            if stop():
                raise CancelledRun
            tell(events.Step("bf16", index, request.num_inference_steps, None))
            if index == 2:
                self._fate(request.prompt, out)
        write_whole(out / "bf16.png", b"whole")
        return Comparison(
            request=request, device=self.machine.name, versions={}, results=(), ruler=None, created=str(self._prepared)
        )

    def _fate(self, prompt, out):
        match prompt:
            case "killed":
                (out / ".bf16.png.1.part").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "spoilt":
                raise FaultError("The device failed (AcceleratorError).", kind="AcceleratorError", lost=True)
            case "bug":
                raise ZeroDivisionError("that nobody foresaw")
            case "fault":
                raise FaultError("Out of memory.", kind="OutOfMemoryError")
            case "mistake":
                raise LoadError("The file x is missing.")
            case "hang":
                time.sleep(3600)

    def prove(self, tell, stop):
        pass

    def examine(self):
        return (Finding(topic="Device", severity=FINE, said="It is a stand-in."),)

    def prepare(self, model_id, tell, stop):
        self._prepared.append(model_id)

    def recipes(self, model_id):
        time.sleep(0.05)
        return {"post": f"{model_id} in {os.getpid()}"}

    def about_weights(self, model_id):
        if model_id == "die":
            os._exit(4)
        return str(os.getpid())

    def gauges(self):
        return {"twinframe_device_memory_allocated_bytes": 17}


def make(*args):
    return StandIn(*args)


def born_once(name, *further):
    """Starts a first time, and then no more until the file that `name` is appears."""
    mark, repaired = Path(f"{name}.born"), Path(name)
    if mark.exists() and not repaired.exists():
        os._exit(5)
    mark.touch()
    return StandIn("cpu", *further)


def spoilt(*args):
    """A real GPU, whose context the prompt "spoil it" really spoils: a kernel indexes out of bounds."""
    import torch

    from engine.runtime.device import Device

    def read(where):
        return torch.ones(4, device="cuda")[torch.tensor([where], device="cuda")].sum().item()

    class Spoilt(Device):
        def compare(self, request, out, tell, stop):
            found = self._carry_out(read, 99 if request.prompt == "spoil it" else 1)
            return Comparison(request=request, device="", versions={}, results=(), ruler=None, created=str(found))

    return Spoilt(*args)
