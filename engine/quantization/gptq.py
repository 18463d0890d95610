"""NVFP4 weights whose rounding is calibrated on the activations of a few prompts, and the files that keep them.

A weight rounded to nearest has an error of its own in each element. GPTQ (Frantar et al. 2022) rounds column after
column and lets the columns that are still to come make up for what the product with real activations has lost. What
comes out fills the same format: no more bytes, no other kernel, no time. It depends on the exact weights, so it is kept
beside the recipe that names it, layer by layer, and checked against the weight it takes the place of.

Knows nothing of recipes and models: engine/quality/tune.py calibrates, engine/quantization/recipes.py places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4, unpack_uint4

from engine.errors import LoadError, UnsupportedError
from engine.files import write_whole
from engine.quantization import nvfp4
from engine.quantization.nvfp4 import BLOCK, E2M1_MAX, Packed, round_e2m1_

DAMPING = 0.01
"""Of the mean of the moment's diagonal, added to it: GPTQ's default, doubled until the matrix can be inverted."""
FILE_BYTES = 9_000_000
"""Of one file at most, unless a single layer is larger."""
MOMENT_BYTES = 16e9
"""Of second moments that are collected in one pass."""
OTHER_WEIGHTS = 0.5
"""Relative L2 distance from the weight beyond which a stored one cannot be its rounding, which is 0.1 to 0.2 away."""
CHANGES_BYTES = 1_000_000
"""Of one file of changes at most, unless a single layer is larger."""
SKIP = 255
"""A gap that leads to no change."""
_CHANGES = ("gaps", "changed")
_PARTS = ("codes", "block_scales", "tensor_scale")


@contextmanager
def second_moments(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Layer name -> the sum of x x^T over all inputs x that the layer sees meanwhile, fp32 (K, K)."""
    moments: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...]], None]:
        def hook(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, module.in_features).float()
            if name in moments:
                moments[name].addmm_(x.t(), x)
            else:
                moments[name] = x.t() @ x

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def portions(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """The layers in runs whose second moments together take `MOMENT_BYTES` at most, unless a single one takes more."""
    portion: dict[str, nn.Linear] = {}
    for name, layer in layers.items():
        taken = sum(4 * one.in_features**2 for one in (*portion.values(), layer))
        if portion and taken > MOMENT_BYTES:
            yield portion
            portion = {}
        portion[name] = layer
    if portion:
        yield portion


def quantize(weight: Tensor, moment: Tensor) -> Packed:
    """Round a bf16 (N, K) weight so that its product with inputs of this second moment (K, K) loses little.

    Block scales are searched as in `nvfp4.quantize`, for the block as it is when its turn comes.

    Raises:
        UnsupportedError: the moment has values that are not numbers.
    """
    rest = weight.float().clone()
    factor = _factor(moment.float().clone())
    tensor_scale = nvfp4.scale_of_tensor(rest.abs().max())
    codes, block_scales = [], []
    for begin in range(0, weight.shape[1], BLOCK):
        block, end = rest[:, begin : begin + BLOCK].unsqueeze(1), begin + BLOCK
        usual = nvfp4.scales_of_blocks(block.abs().amax(-1), tensor_scale)
        block_scales.append(nvfp4.search(block, usual, tensor_scale))
        scale = block_scales[-1].float().squeeze(1) * tensor_scale
        errors = []
        for column in range(begin, end):
            value = round_e2m1_((rest[:, column] / scale).clamp_(-E2M1_MAX, E2M1_MAX))
            codes.append(f32_to_f4_unpacked(value.clone()))
            errors.append((rest[:, column] - value * scale) / factor[column, column])
            rest[:, column:end] -= errors[-1].unsqueeze(1) * factor[column, column:end]
        rest[:, end:] -= torch.stack(errors, dim=1) @ factor[begin:end, end:]
    return pack_uint4(torch.stack(codes, dim=1)), torch.cat(block_scales, dim=1), tensor_scale


def _factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moment's inverse, fp32 (K, K).

    Raises:
        UnsupportedError: the moment has values that are not numbers, which no damping mends.
    """
    if not moment.isfinite().all():
        raise UnsupportedError(
            "A layer's inputs are not numbers, or too large to be squared, so its rounding cannot be calibrated: "
            "choose other prompts or another model."
        )
    damping = DAMPING * moment.diagonal().mean() + torch.finfo(torch.float32).tiny
    while True:
        moment.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
        damping = damping * 2


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_changes(folder: Path, stem: str, layers: Mapping[str, tuple[Packed, Packed]]) -> tuple[Path, ...]:
    """Keep what of the codes of each layer's second weight is another than in its first, in `<stem>-1.safetensors` and
    so on, each below `CHANGES_BYTES`; scales are the same.

    A layer has `gaps`, uint8: how far each changed value lies behind the one before it, by rows, where 255 is a step
    without a change; and `changed`, uint8, the new e2m1 codes, two a byte, the first in the low nibble.

    Raises:
        OSError: they cannot be written.
    """
    return _write(folder, stem, {name: _changes(*both) for name, both in layers.items()}, CHANGES_BYTES)


def _changes(before: Packed, after: Packed) -> dict[str, Tensor]:
    old, new = (unpack_uint4(packed[0]).flatten() for packed in (before, after))
    # Zeros of both signs are the same value.
    places = ((old != new) & ((old | new) & 7 != 0)).nonzero().flatten()
    steps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    empty = steps // SKIP
    gaps = torch.full((int((empty + 1).sum()),), SKIP, dtype=torch.uint8, device=places.device)
    gaps[(empty + 1).cumsum(0) - 1] = (steps % SKIP).to(torch.uint8)
    codes = F.pad(new[places], (0, len(places) % 2))
    return {"gaps": gaps, "changed": pack_uint4(codes)}


def _changed(before: Packed, gaps: Tensor, changed: Tensor) -> Packed | None:
    """The weight with its changes; None where they do not fit it."""
    codes = unpack_uint4(before[0]).flatten()
    steps = gaps.to(torch.int64)
    is_change = steps != SKIP
    places = (steps + is_change).cumsum(0)[is_change] - 1
    if (gaps.dtype, changed.dtype, gaps.dim(), changed.dim()) != (torch.uint8, torch.uint8, 1, 1):
        return None
    if (len(places) + 1) // 2 != len(changed) or (len(places) and int(places[-1]) >= len(codes)):
        return None
    codes[places] = unpack_uint4(changed)[: len(places)]
    return pack_uint4(codes.view(before[0].shape[0], -1)), before[1], before[2]


def write(folder: Path, stem: str, layers: Mapping[str, Packed]) -> tuple[Path, ...]:
    """Keep layers in `<stem>-1.safetensors` and so on, each below `FILE_BYTES`.

    Raises:
        OSError: they cannot be written.
    """
    parts = {name: dict(zip(_PARTS, packed, strict=True)) for name, packed in layers.items()}
    return _write(folder, stem, parts, FILE_BYTES)


def _write(folder: Path, stem: str, layers: Mapping[str, Mapping[str, Tensor]], most: int) -> tuple[Path, ...]:
    shards: list[dict[str, Tensor]] = [{}]
    for name, parts in layers.items():
        tensors = {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
        if shards[-1] and _bytes(shards[-1]) + _bytes(tensors) > most:
            shards.append({})
        shards[-1] |= tensors
    files = tuple(folder / f"{stem}-{number + 1}.safetensors" for number in range(len(shards)))
    for file, shard in zip(files, shards, strict=True):
        write_whole(file, save(shard))
    return files


def names(files: Sequence[Path]) -> frozenset[str]:
    """The layers in these files, whole or as changes.

    Raises:
        LoadError: one is missing or damaged.
    """
    return frozenset(name.rpartition(".")[0] for name in _places(tuple(files)) if name.endswith((".codes", ".gaps")))


def read(files: Sequence[Path], name: str, weight: Tensor) -> Packed:
    """One layer's stored weight, on the device of the bf16 weight that it takes the place of. Of a layer that is there
    as changes alone, they are changes of the weight that `nvfp4.quantize` makes with searched scales.

    Raises:
        LoadError: a file is missing or damaged, or was calibrated for another weight.
    """
    places = _places(tuple(files))
    file = places.get(f"{name}.codes")
    if file is None:
        packed, file = nvfp4.quantize(weight, searched=True), places[f"{name}.gaps"]
    else:
        packed = _tensors(file, name, _PARTS, weight)
    exact = weight.float()
    if packed[0].shape[0] != exact.shape[0] or 2 * packed[0].shape[1] != exact.shape[1]:
        raise _others(file, name)
    if (differing := places.get(f"{name}.gaps")) is not None:
        file, found = differing, _changed(packed, *_tensors(differing, name, _CHANGES, weight))
        if found is None:
            raise _others(file, name)
        packed = found
    # Written so that a distance that is NaN is refused too; a scale with a sign is none of ours.
    near = (nvfp4.dequantize(*packed) - exact).norm() <= OTHER_WEIGHTS * exact.norm()
    if not near or (packed[1].view(torch.uint8) > nvfp4.E4M3_MAX_BITS).any():
        raise _others(file, name)
    return packed


def _tensors(file: Path, name: str, parts: Sequence[str], weight: Tensor) -> tuple[Tensor, ...]:
    with _opened(file) as tensors:
        return tuple(tensors.get_tensor(f"{name}.{part}").to(weight.device) for part in parts)


@lru_cache(maxsize=8)
def _places(files: tuple[Path, ...]) -> dict[str, Path]:
    """Tensor name -> the file that has it."""
    places: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    return places


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"The calibrated weights in {file} are missing or damaged: restore them, or choose another recipe."
        ) from error


def _others(file: Path, name: str) -> LoadError:
    return LoadError(
        f"{file.name} was calibrated for another weight of {name}: choose another recipe, or run python -m engine tune."
    )


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
