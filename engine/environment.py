"""What surrounds a run: versions, which decide a number besides the request and the weights, and TWINFRAME_* variables.

Whatever keeps a number, keeps `versions` beside it, and does not use the number where they differ. Knows nothing of
devices, which have names of their own (engine/machine.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from engine.errors import RequestError

SPINS = 3000
"""How often a thread of PyTorch's on a CPU looks for work before it sleeps: microseconds, where libgomp's own is
milliseconds. Threads that look keep those from the cores for which they wait, once there are more threads than cores:
`python -m assets.figures.cpu_times OUT --only beside` measures what a second such process costs."""
ENGINE = "5"
"""Of whatever in this project decides a pixel or a score: the call of a pipeline, noise, quantization and emulation,
rewrites of the denoiser, recipes' rules, LPIPS and its ruler. Raise it with every change after which the same request
could give another number; what was kept before is then measured again, and evaluations begun before are not gone on
with. A change of words, files or pages is none."""
Default = TypeVar("Default", bound=float | None)
PACKAGES = ("torch", "torchao", "diffusers", "transformers", "tokenizers", "lpips", "mslk-cuda")


def versions() -> dict[str, str]:
    """Versions of all that decides a result, this engine's as `twinframe`; packages not installed are left out."""
    found = {"twinframe": ENGINE}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def positive(environment: Mapping[str, str], name: str, default: Default) -> float | Default:
    """A variable's number; `default` where it is unset or empty.

    Raises:
        RequestError: it is not a positive number.
    """
    said = environment.get(name, "").strip()
    if not said:
        return default
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RequestError(f"{name} must be a positive number, not {said!r}.")
    return value


def leave_cores_to_others(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch's threads sleep soon while they wait, unless the user has said how. Before torch is imported."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))


def lends_cards(environment: Mapping[str, str]) -> bool:
    """Whether this is a ZeroGPU Space, whose card is lent for one call at a time, as its `spaces` package tells."""
    return environment.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def local_rank(environment: Mapping[str, str]) -> int | None:
    """Which of the processes this is that a launcher (accelerate, torchrun) started on this machine, from 0 on; None
    where none did.

    Raises:
        RequestError: LOCAL_RANK is no number.
    """
    said = environment.get("LOCAL_RANK", "")
    if said and not said.isdecimal():
        raise RequestError(f"LOCAL_RANK is {said!r}: unset it, or leave it to the launcher, which counts from 0.")
    return int(said) if said else None


def switch(environment: Mapping[str, str], name: str, default: bool) -> bool:
    """A variable that is on or off; `default` where it is unset or empty.

    Raises:
        RequestError: it is neither.
    """
    said = environment.get(name, "")
    if said not in ("", "on", "off"):
        raise RequestError(f"{name} must be on or off, not {said!r}.")
    return said == "on" if said else default
