"""What decides a number besides the request and the weights: this engine's own arithmetic and the packages under it.

Whatever keeps a number, keeps this beside it, and does not use the number where it differs. Knows nothing of devices,
which have names of their own (engine/machine.py).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

ENGINE = "3"
"""Of whatever in this project decides a pixel or a score: the call of a pipeline, noise, quantization and emulation,
rewrites of the denoiser, recipes' rules, LPIPS and its ruler. Raise it with every change after which the same request
could give another number; what was kept before is then measured again, and evaluations begun before are not gone on
with. A change of words, files or pages is none."""
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
