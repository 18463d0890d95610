"""`python app.py` with tiny random models whose engine fails as the file $TWINFRAME_FAULTS/armed says, once.

The file holds a fault's name and a number: it strikes when its point is passed for the so many-th time. Whatever
starts the app this way runs this module in the child process too, which is where the faults are; nothing in the engine
knows of them. See tests/support/faults.py.
"""

import ctypes
import errno
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from engine.logs import quiet_libraries

quiet_libraries()

import av  # noqa: E402 (what is quietened has to be so before)
import diffusers  # noqa: E402
import torch  # noqa: E402

from engine import catalog  # noqa: E402
from engine.compiler import compilation  # noqa: E402
from engine.outputs import media  # noqa: E402
from engine.runtime.pipeline import Progress  # noqa: E402
from engine.runtime.studio import Studio  # noqa: E402
from engine.weights import loading  # noqa: E402
from tests.support import tiny  # noqa: E402

FOLDER = Path(os.environ["TWINFRAME_FAULTS"])
ARMED = FOLDER / "armed"
POINTS = {
    "out of memory while loading": "load",
    "out of memory while compiling": "compile",
    "out of memory while denoising": "denoise",
    "out of memory while decoding": "decode",
    "a poisoned CUDA context": "denoise",
    "a segmentation fault": "denoise",
    "a checkpoint that changes while it is read": "load",
    "a full disk": "write",
    "a failing video encoder": "encode",
}


def strike(kind: str) -> None:
    match kind:
        case "a poisoned CUDA context":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        case "a segmentation fault":
            ctypes.string_at(0)
        case "a checkpoint that changes while it is read":
            for file in (FOLDER / "tiny-flux.1-dev" / "transformer").glob("*.safetensors"):
                os.truncate(file, file.stat().st_size // 2)
        case "a full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "a failing video encoder":
            raise av.error.ExternalError(542398533, "Generic error in an external library")
        case _:
            raise torch.OutOfMemoryError("CUDA out of memory")


def armed() -> tuple[str, int]:
    try:
        kind, _, number = ARMED.read_text().rpartition(" ")
    except FileNotFoundError:
        return "", 0
    return kind, int(number)


def passed(point: str) -> None:
    """A point is passed: strike if it is the one, the so many-th time."""
    kind, number = armed()
    if POINTS.get(kind) != point:
        return
    if number > 1:
        ARMED.write_text(f"{kind} {number - 1}")
        return
    ARMED.unlink()
    strike(kind)


def arm() -> None:
    """Put the points into the engine."""

    def before(owner: object, name: str, point: str) -> None:
        original = getattr(owner, name)

        def struck(*args, **kwargs):
            passed(point)
            return original(*args, **kwargs)

        setattr(owner, name, struck)

    before(compilation.Blocks, "use", "compile")
    before(Progress, "__call__", "denoise")
    before(diffusers.AutoencoderKL, "decode", "decode")
    before(media, "_encode", "encode")
    compared, loaded, written = Studio.compare, loading.load_transformer, Path.write_bytes

    def compare_afresh(studio, request, *args):
        if POINTS.get(armed()[0]) == "load":
            for column in request.columns:
                studio.drop(catalog.model(request.model), column)
        return compared(studio, request, *args)

    def load(spec, device, source, place=None, told=None):
        def placed(name, module):
            passed("load")
            if place is not None:
                place(name, module)

        return loaded(spec, device, source, placed, told)

    def write_half(file, content):
        if file.suffix == ".part":
            try:
                passed("write")
            except OSError:
                written(file, content[: len(content) // 2])
                raise
        return written(file, content)

    Studio.compare, loading.load_transformer, Path.write_bytes = compare_afresh, load, write_half


here = {id: tiny.spec(id, FOLDER / f"tiny-{id}") for id in ("flux.1-dev", "ltx-2")}
far = replace(
    here["flux.1-dev"],
    id="far",
    bundled=False,
    source="nobody/far",
    revision="0" * 40,
    configs=here["flux.1-dev"].source,
    memory_gb=catalog.Memory(transformer=0.01, shared=0.01, run=0.0, host=0.0),
)
catalog.MODELS = MappingProxyType({spec.id: spec for spec in (*here.values(), far)})

if __name__ == "__mp_main__":
    arm()
elif __name__ == "__main__":
    import app

    app.main()
