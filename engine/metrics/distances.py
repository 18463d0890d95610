"""How far a picture or clip is from the reference: LPIPS with AlexNet, and PSNR, on tensors and never on files.

LPIPS is the `lpips` package's network and linear heads; AlexNet's convolution weights come from assets/lpips, so
that nothing is downloaded.
"""

from __future__ import annotations

import functools
import math

import lpips
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from engine.catalog import ASSETS
from engine.errors import LoadError

_ALEXNET = ASSETS / "lpips" / "alexnet_features.safetensors"
MAP_STRIDE = 4
"""Pixels of a picture for one of its LPIPS map: the stride of AlexNet's first layer, finer than which it sees none."""
_PIXELS_AT_ONCE = 1 << 22
"""Pixels of each side that the network sees at once, which bounds the memory of long clips."""


def lpips_distance(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018, version 0.1, AlexNet) at full resolution.

    Args:
        a, b: float tensors (N, 3, H, W) in [-1, 1] on one device.

    Returns:
        (N,) float32; 0 for equal pictures.

    Raises:
        ValueError: the shapes differ or are not (N, 3, H, W).
        LoadError: the bundled AlexNet weights are missing.
    """
    return lpips_maps(a, b)[0]


def lpips_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """LPIPS, and where in the picture it comes from.

    What the lpips package calls `spatial=True`: the layers' maps, of which LPIPS sums the means, are brought to one
    size bilinearly and summed. Here that size is a quarter of the picture's instead of its own. A map's mean is the
    distance, but for what the interpolation does at the edges.

    Args:
        a, b: float tensors (N, 3, H, W) in [-1, 1] on one device.

    Returns:
        Distances, (N,), and maps, (N, ceil(H / 4), ceil(W / 4)), both float32.

    Raises:
        ValueError, LoadError: as `lpips_distance`.
    """
    _same_shape(a, b)
    network = _network(a.device)
    size = [math.ceil(side / MAP_STRIDE) for side in a.shape[-2:]]
    with torch.inference_mode():
        features = [network.net(network.scaling_layer(side.float())) for side in (a, b)]
        layers = [
            head((lpips.normalize_tensor(one) - lpips.normalize_tensor(other)).square())
            for head, one, other in zip(network.lins, *features, strict=True)
        ]
        distances = sum(layer.mean((1, 2, 3)) for layer in layers)
        maps = sum(F.interpolate(layer, size, mode="bilinear") for layer in layers)
    return distances, maps[:, 0]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: 10 log10(range^2 / mean squared error).

    Args:
        a, b: float tensors (N, 3, H, W) in [-1, 1], a range of 2.

    Returns:
        (N,) float32; infinite for equal pictures.

    Raises:
        ValueError: the shapes differ or are not (N, 3, H, W).
    """
    _same_shape(a, b)
    return _decibels((a.float() - b.float()).square().mean((1, 2, 3)))


def clip_distance(a: Tensor, b: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """LPIPS of every frame, with its map, and PSNR of the whole clip, a few frames at a time.

    Args:
        a, b: float tensors (F, 3, H, W) in [-1, 1], wherever they are.
        device: where to compute.

    Returns:
        LPIPS, (F,); PSNR in dB over all frames, (); maps as of `lpips_maps`, (F, h, w). All float32 on the CPU.

    Raises:
        ValueError, LoadError: as `lpips_distance`.
    """
    _same_shape(a, b)
    frames = max(1, _PIXELS_AT_ONCE // (a.shape[-2] * a.shape[-1]))
    distances, maps, errors = [], [], []
    for one, other in zip(a.split(frames), b.split(frames), strict=True):
        one, other = one.to(device).float(), other.to(device).float()
        scores, where = lpips_maps(one, other)
        distances.append(scores.cpu())
        maps.append(where.cpu())
        errors.append((one - other).square().mean((1, 2, 3)).cpu())
    return torch.cat(distances), _decibels(torch.cat(errors).mean()), torch.cat(maps)


def temporal_distance(a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    """How differently two clips change from frame to frame: LPIPS between their frame differences.

    The mean over t of LPIPS(d(a, t), d(b, t)) with d(x, t) = (x[t + 1] - x[t]) / 2, which lies in [-1, 1] as a picture
    does. What is wrong alike in every frame, such as a changed colour, cancels; flicker does not. It is not tLP (Chu
    et al. 2020), the difference between two clips' own frame-to-frame LPIPS, to which any flicker that changes a
    frame as much as the true motion does is invisible.

    Args:
        a, b: float tensors (F, 3, H, W) in [-1, 1] with at least two frames, wherever they are.
        device: where to compute.

    Returns:
        () float32 on the CPU; 0 for equal clips.

    Raises:
        ValueError: the shapes differ, are not (F, 3, H, W), or there is one frame.
        LoadError: as `lpips_distance`.
    """
    _same_shape(a, b)
    if len(a) < 2:
        raise ValueError("One frame does not change: at least two are needed.")
    frames = max(1, _PIXELS_AT_ONCE // (a.shape[-2] * a.shape[-1]))
    distances = []
    for begin in range(0, len(a) - 1, frames):
        one, other = (clip[begin : begin + frames + 1].to(device).float().diff(dim=0) / 2 for clip in (a, b))
        distances.append(lpips_distance(one, other).cpu())
    return torch.cat(distances).mean()


def _decibels(error: Tensor) -> Tensor:
    return 10 * torch.log10(4 / error)


def require() -> None:
    """For whoever compares pictures only after they took long to make.

    Raises:
        LoadError: the bundled AlexNet weights are missing.
    """
    if not _ALEXNET.is_file():
        raise LoadError(f"The file {_ALEXNET} is missing: restore it, for example with git checkout.")


@functools.cache
def _network(device: torch.device) -> torch.nn.Module:
    """lpips' network without its download: random AlexNet first, then the bundled convolutions under it."""
    require()
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    bundled = load_file(_ALEXNET)
    # lpips cuts torchvision's `features` into slices but keeps each layer's number as its name.
    features = {name.rsplit(".", 2)[-2]: name for name in network.net.state_dict() if name.endswith(".weight")}
    for number, name in features.items():
        layer = network.net.get_submodule(name.removesuffix(".weight"))
        layer.weight.data.copy_(bundled[f"features.{number}.weight"])
        layer.bias.data.copy_(bundled[f"features.{number}.bias"])
    return network.eval().requires_grad_(False).to(device)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(
            f"Two tensors (N, 3, H, W) of one shape are needed, not {tuple(a.shape)} and {tuple(b.shape)}."
        )
