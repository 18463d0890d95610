"""A folder with a denoiser that is stored quantized: what is in it, by its JSON files and the headers of its weights.

Such folders are written by `python -m engine quantize`, and by diffusers with torchao (`TorchAoConfig`,
`save_pretrained`). Of torchao's layouts those are taken whose arithmetic one of the formats is; the others are refused
by name. Knows no torch; engine/quantization/stored.py makes weights of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import catalog, quantized
from engine.errors import LoadError
from engine.formats import FORMATS, FP8, INT8, MXFP8, NVFP4, QUANTIZED
from engine.quantized import Quantized
from engine.weights import checkpoint
from engine.weights.checkpoint import QUANTIZE_AGAIN, Component, Packed

PROVENANCE = "twinframe.json"
"""What `python -m engine quantize` writes beside the weights."""
BRANCHES = "twinframe.safetensors"
"""Low-rank branches, which plain diffusers does not look for."""
KINDS: Mapping[str, str] = {
    "Float8Tensor": FP8.id,
    "MXTensor": MXFP8.id,
    "NVFP4Tensor": NVFP4.id,
    "Int8Tensor": INT8.id,
}
"""torchao's class -> format."""
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?", re.ASCII)


def read(folder: Path, name: str, called: str = "") -> Quantized:
    """A folder as a checkpoint of that name: the denoiser's own, or a whole pipeline's.

    Args:
        called: what it is for people, where that is not the folder's name.

    Raises:
        LoadError: it is none, of a model that is not known, damaged on the face of it, or in a layout that no format
            here computes with.
    """
    if not folder.is_dir():
        raise LoadError(f"There is no folder {folder}: give one that python -m engine quantize wrote.")
    here = folder / "transformer" if (folder / "transformer" / "config.json").is_file() else folder
    file = here / "config.json"
    if not file.is_file():
        raise LoadError(
            f"{folder} is no quantized checkpoint, it has neither transformer/config.json nor config.json: give a "
            "folder that python -m engine quantize wrote, or diffusers with torchao."
        )
    config = checkpoint.read_json(file, QUANTIZE_AGAIN)
    if checkpoint.foreign_config(config, file) != checkpoint.TORCHAO:
        raise LoadError(
            f"{file} names no quantization by torchao: give a folder that python -m engine quantize wrote, and weights "
            "in bf16 by --weights."
        )
    models = _models(config, file)
    found = checkpoint.component(here, "diffusers", QUANTIZE_AGAIN, quantized=True)
    if not found.packed:
        raise LoadError(f"{here} names torchao, but none of its weights is quantized: {QUANTIZE_AGAIN}.")
    layers = {weight.removesuffix(".weight"): _format(weight, one, found) for weight, one in found.packed.items()}
    said = _provenance(here, layers)
    return Quantized(
        name=name,
        folder=here,
        models=models,
        format=said.get("format") or _most(layers, found),
        layers=layers,
        tuning=said.get("tuning", {}),
        summary=said.get("summary") or f"As {called or folder.name} stores it.",
        source=said.get("source", {}).get("fingerprint", ""),
    )


def give(place: str | Path, name: str | None = None, offline: bool = False) -> Quantized:
    """Have columns name a folder, or a repository on the hub as owner/name[@revision], from now on: by this name, or by
    one after its own, which for a repository ends in its commit.

    Raises:
        LoadError: as of `read`, or a repository cannot be had.
        RequestError: it may not have that name.
    """
    if name:
        quantized.check_name(name)
    there = None if Path(place).is_dir() else _REPOSITORY.fullmatch(str(place))
    if there is None:
        found = read(Path(place), name or quantized.name_for(Path(place)))
    else:
        from engine.weights import hub  # late: it imports the hub's library, which looks at once whether it is offline

        folder, commit = hub.quantized(there[1], there[2], offline)
        found = read(folder, name or quantized.check_name(quantized.name_of(there[1], commit)), there[1])
        found = replace(found, repository=there[1], revision=commit)
    quantized.give(found)
    return found


def _models(config: Mapping[str, object], file: Path) -> tuple[str, ...]:
    why = {}
    for spec in catalog.MODELS.values():
        kind, its = checkpoint.parts(spec.folder)["transformer"][1], config.get("_class_name")
        if kind != its:
            why[spec.id] = f"it is a {its or 'class without a name'}, and that of {spec.name} a {kind}"
        else:
            why[spec.id] = checkpoint.differing(checkpoint.denoiser_config(spec), config)
    models = tuple(model for model, reason in why.items() if not reason)
    if not models:
        nearest = next((r for r in why.values() if not r.startswith("it is")), next(iter(why.values())))
        raise LoadError(
            f"{file.parent} is the denoiser of no model here: {nearest}; give one of {', '.join(catalog.MODELS)}."
        )
    return models


def _provenance(folder: Path, layers: Mapping[str, str]) -> dict[str, Any]:
    """What the folder's maker says, "format", "tuning", "summary" and "source" among it; nothing where it was another
    tool.

    Raises:
        LoadError: it is not what `python -m engine quantize` writes, or of other weights.
    """
    file = next((f for f in (folder / PROVENANCE, folder.parent / PROVENANCE) if f.is_file()), None)
    if file is None or (file.parent != folder and folder.name != "transformer"):
        return {}
    said = checkpoint.read_json(file, QUANTIZE_AGAIN)
    kinds = {"format": str, "tuning": dict, "summary": str, "source": dict, "layers": dict}
    if not all(isinstance(said.get(key), kind) for key, kind in kinds.items()) or said["format"] not in QUANTIZED:
        raise LoadError(f"The file {file} is damaged: {QUANTIZE_AGAIN}.")
    if said["layers"] != dict(layers):
        raise LoadError(f"{file} tells of other layers than {folder} holds quantized: {QUANTIZE_AGAIN}.")
    return said


def _most(layers: Mapping[str, str], found: Component) -> str:
    """The format that most quantized weights are in."""
    weights: Counter[str] = Counter()
    for layer, name in layers.items():
        rows, width = found.tensors[f"{layer}.weight"].shape
        weights[name] += rows * width
    return weights.most_common(1)[0][0]


# ---------------------------------------------------------------------------------------------------------------------
# torchao's layouts


def _format(name: str, packed: Packed, found: Component) -> str:
    """The format of a weight whose layout is one that it computes with.

    Raises:
        LoadError: it is another layout; the sentence names it.
    """
    stored = found.tensors[name]
    if packed.kind not in KINDS:
        raise _refused(name, packed, found, "which is none of its formats")
    if len(stored.shape) != 2 or not name.endswith(".weight"):
        raise _refused(name, packed, found, "which is no weight of a Linear layer")
    form = KINDS[packed.kind]
    if packed.attributes.get("orig_dtype", packed.attributes.get("dtype")) != _dtype("bfloat16"):
        raise _refused(name, packed, found, "for other activations than bf16")
    activations = packed.attributes.get("act_quant_kwargs")
    if not isinstance(activations, dict) or not isinstance(activations.get("_data"), dict):
        raise _refused(name, packed, found, "with weights alone quantized")
    if why := _LAYOUTS[form](packed, activations["_data"], stored.shape):
        raise _refused(name, packed, found, why)
    _check_parts(name, packed, found)
    rows, width = stored.shape
    if rows % FORMATS[form].multiple_out or width % FORMATS[form].multiple_in:
        raise _refused(name, packed, found, f"of {width} x {rows}, which {FORMATS[form].label} does not take")
    return form


def _fp8(packed: Packed, activations: Mapping[str, Any], shape: tuple[int, int]) -> str:
    if packed.attributes.get("block_size") != [1, shape[1]] or _type(activations.get("granularity")) != "PerRow":
        return "with scales that are not one a row"
    if activations.get("float8_dtype") != _dtype("float8_e4m3fn") or activations.get("hp_value_ub") is not None:
        return "with activations in another type than e4m3, or cut off"
    return ""


def _mxfp8(packed: Packed, activations: Mapping[str, Any], shape: tuple[int, int]) -> str:
    element = _dtype("float8_e4m3fn")
    if packed.attributes.get("elem_dtype") != element or activations.get("elem_dtype") != element:
        return "in another element than e4m3"
    blocks = (packed.attributes.get("block_size"), activations.get("block_size"))
    return "" if blocks == (32, 32) else "in other blocks than of 32"


def _nvfp4(packed: Packed, activations: Mapping[str, Any], shape: tuple[int, int]) -> str:
    if "per_tensor_scale" not in packed.parts or activations.get("use_dynamic_per_tensor_scale") is not True:
        return "without a scale a tensor that is found anew for activations"
    if "act_per_tensor_scale" in packed.parts:
        return "with a scale for activations that was found once"
    return "" if packed.attributes.get("block_size") == 16 else "in other blocks than of 16"


def _int8(packed: Packed, activations: Mapping[str, Any], shape: tuple[int, int]) -> str:
    if packed.attributes.get("block_size") != [1, shape[1]] or _type(activations.get("granularity")) != "PerRow":
        return "with scales that are not one a row"
    if activations.get("mapping_type") != {"_type": "MappingType", "_data": "SYMMETRIC"}:
        return "with activations that are not symmetric about zero"
    if {"act_quant_scale", "act_quant_zero_point", "act_pre_scale"} & packed.parts.keys():
        return "with scales for activations that were found once"
    if packed.attributes.get("reduce_range") or activations.get("reduce_range"):
        return "in a reduced range"
    return ""


_LAYOUTS: Mapping[str, Callable[[Packed, Mapping[str, Any], tuple[int, int]], str]] = {
    FP8.id: _fp8,
    MXFP8.id: _mxfp8,
    NVFP4.id: _nvfp4,
    INT8.id: _int8,
}


def _check_parts(name: str, packed: Packed, found: Component) -> None:
    """See that the parts of a weight are of the types and shapes that its kind has."""
    rows, width = found.tensors[name].shape
    form, swizzled = KINDS[packed.kind], packed.attributes.get("is_swizzled_scales") is True
    codes = (rows, width // 2) if form == NVFP4.id else (rows, width)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "qdata": ({FP8.id: "F8_E4M3", MXFP8.id: "F8_E4M3", NVFP4.id: "U8", INT8.id: "I8"}[form], codes)
    }
    if form in (FP8.id, INT8.id):
        wanted["scale"] = ("F32", (rows, 1))
    else:
        block = FORMATS[form].block
        # Tiles of 128 rows by 4 scales, as Blackwell's products take them: 32 x 16 bytes each.
        tiles = (-(-rows // 128), -(-width // block // 4))
        shape = (tiles[0] * 32, tiles[1] * 16) if swizzled else (rows, width // block)
        wanted["scale"] = ("F8_E4M3" if form == NVFP4.id else "F8_E8M0", shape)
    if form == NVFP4.id:
        wanted["per_tensor_scale"] = ("F32", ())
    if "zero_point" in packed.parts:
        wanted["zero_point"] = ("I8", (rows, 1))
    if wanted.keys() != packed.parts.keys():
        raise LoadError(f"{name} in {found.folder} has parts that a {packed.kind} has not: {QUANTIZE_AGAIN}.")
    for part, (dtype, sides) in wanted.items():
        its = found.parts[packed.parts[part]]
        if (its.dtype, its.shape) != (dtype, sides):
            raise LoadError(
                f"{packed.parts[part]} in {its.file} is {its.dtype} of shape {list(its.shape)}, and a {packed.kind} of "
                f"{rows} x {width} has {dtype} of {list(sides)}: {QUANTIZE_AGAIN}."
            )


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _type(value: object) -> object:
    return value.get("_type") if isinstance(value, dict) else value


def _refused(name: str, packed: Packed, found: Component, why: str) -> LoadError:
    return LoadError(
        f"{found.folder} holds {name} as torchao's {packed.kind} {why}, with which Twinframe does not compute: "
        "quantize the model with python -m engine quantize, or give another folder."
    )
