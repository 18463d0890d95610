"""A checkpoint's folder as its JSON files and the headers of its weights describe it: what is there, and what is wrong.

People bring folders that look like checkpoints and are not quite: half copied, saved with an adapter inside, quantized
by another tool, or of a sibling model. What can be told without reading weights is told here, in one sentence that
names the file, the tensor and what to do. Knows no torch; which tensors a model needs is engine/weights/loading.py's.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine import catalog
from engine.catalog import ModelSpec
from engine.errors import LoadError

RESTORE = "restore it, for example with git checkout"
"""What to do about a bundled file that is bad."""
SAVE_AGAIN = "save the model again with diffusers' save_pretrained"
QUANTIZE_AGAIN = "copy the folder again, or write it anew with python -m engine quantize"
"""What to do about a quantized checkpoint's file that is bad."""
FLOATS: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of stored weights that are read as they are: safetensors' name -> torch's."""
FP8: Mapping[str, str] = {"F8_E4M3": "fp8 (e4m3)", "F8_E5M2": "fp8 (e5m2)"}
"""Types that are read too, times their scales where they have some."""
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Of an element; of every other type there is one a byte, or more than one."""
SCALES = (".weight_scale", ".weight_scale_inv", ".scale_weight")
"""What a scale is called in place of ".weight": by LTX and vLLM, by DeepSeek and transformers, by ComfyUI. All three
multiply the codes."""
_UNUSED_SCALES = re.compile(r"(^|\.)(input_scale|scale_input|scaled_fp8)$")
"""Scales of activations, and ComfyUI's marker: they do not change weights."""
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|hada_\w+|lokr_\w+|modules_to_save|ia3_\w+|oft_\w+)(\.|$)")
_QUANTIZED = re.compile(
    r"(weight_scale(_2|_inv)?|scale_weight|weight_zero_point|weight_qdata|weight_packed|input_scale|scale_input|scaled_fp8"
    r"|\.(qweight|qzeros|scales|g_idx|wscales|smooth_factor|proj_down|proj_up|SCB|absmax|quant_map|nested_absmax))$"
    r"|\.(quant_state|weight_format)(\.|$)"
)
"""Names of what other tools store beside quantized weights."""
TORCHAO = "torchao"
"""How diffusers names torchao as a method of quantization."""
_METHODS: Mapping[str, str] = {
    "modelopt": "NVIDIA ModelOpt",
    "bitsandbytes": "bitsandbytes",
    "gguf": "GGUF",
    "quanto": "Quanto",
    "nunchaku_lite": "Nunchaku",
    "compressed-tensors": "compressed-tensors (vLLM)",
    "auto-round": "AutoRound",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "sdnq": "SDNQ",
}
"""Other methods of quantization, as configurations name them and as people do."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANTS = ("", "bf16", "fp32", "fp16")
"""The nearer to what is computed with, the earlier it is taken."""
_OTHER_LAYOUTS: Mapping[str, str] = {
    ".gguf": "GGUF, another quantization: use the model as its makers publish it, in safetensors",
    ".bin": f"PyTorch's pickles, which may run code when they are read: {SAVE_AGAIN}, which writes safetensors",
    ".pt": f"PyTorch's pickles, which may run code when they are read: {SAVE_AGAIN}, which writes safetensors",
    ".pth": f"PyTorch's pickles, which may run code when they are read: {SAVE_AGAIN}, which writes safetensors",
    ".ckpt": f"PyTorch's pickles, which may run code when they are read: {SAVE_AGAIN}, which writes safetensors",
    ".msgpack": f"Flax's layout: {SAVE_AGAIN}, which writes safetensors",
    ".onnx": f"ONNX: {SAVE_AGAIN}, which writes safetensors",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with weights, and what to do when a file of it is bad."""

    folder: Path
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a safetensors file, as its header says."""

    file: Path
    dtype: str
    """As safetensors names it, such as "BF16"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight as torchao takes it apart for safetensors (`flatten_tensor_state_dict`): plain tensors, and in the
    file's metadata what they are."""

    kind: str
    """Class of the tensor, such as "NVFP4Tensor"."""
    attributes: Mapping[str, Any]
    """What is no tensor of it, as JSON says it."""
    parts: Mapping[str, str]
    """Name of a part, such as "qdata" -> name of the tensor in the files."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """The weights of one part of a pipeline."""

    folder: Path
    variant: str | None
    """As in the argument of `from_pretrained`; None for files without one."""
    tensors: Mapping[str, Stored]
    """By name, those that hold no weights left out."""
    scales: Mapping[str, str]
    """Name of an fp8 weight -> name of the tensor that it is multiplied with."""
    packed: Mapping[str, Packed] = field(default_factory=lambda: MappingProxyType({}))
    """Name of a weight that torchao quantized -> what is in the files in its place. `tensors` has it in its logical
    shape, its kind in the place of a type; its parts are in `parts`."""
    parts: Mapping[str, Stored] = field(default_factory=lambda: MappingProxyType({}))
    """What the packed weights are made of, by its name in the files."""

    @property
    def stored_as(self) -> tuple[str, ...]:
        """Types of the floating-point weights, in words, the widest first."""
        found = {stored.dtype for name, stored in self.tensors.items() if name not in self.scales.values()}
        said = [words for name, words in FLOATS.items() if name in found]
        return (*said, *(f"{FP8[n]} with scales" if self.scales else FP8[n] for n in FP8 if n in found))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def read_json(file: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LoadError: the file is missing or holds anything else.
    """
    if not file.is_file():
        raise LoadError(f"The file {file} is missing: {remedy}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoadError(f"The file {file} is damaged: {remedy}.") from error
    if not isinstance(found, dict):
        raise LoadError(f"The file {file} is damaged, it holds no JSON object: {remedy}.")
    return found


def parts(folder: Path, remedy: str = RESTORE) -> dict[str, tuple[str, str]]:
    """A checkpoint's components: name -> (library, class name); those it does without are left out.

    Raises:
        LoadError: its model_index.json is missing or damaged.
    """
    found = {}
    for name, value in read_json(folder / "model_index.json", remedy).items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
            found[name] = (value[0], value[1])
    return found


def is_tokenizer(kind: str) -> bool:
    """Whether a component's class is a tokenizer, or what holds one beside what prepares pictures."""
    return "Tokenizer" in kind or kind.endswith("Processor")


def is_module(kind: str) -> bool:
    """Whether a component's class has weights."""
    return "Scheduler" not in kind and not is_tokenizer(kind)


def in_fp32(cls: type, name: str) -> bool:
    """Whether a diffusers class keeps its parameter of this name in fp32 when it is loaded in bf16 (diffusers 0.42,
    models/model_loading_utils.py)."""
    return not set(name.split(".")).isdisjoint(getattr(cls, "_keep_in_fp32_modules", None) or ())


def require_no_cache(folder: Path, option: str = "") -> None:
    """See that a folder without a checkpoint of its own is none of the hub's cache, in which checkpoints lie deeper.

    Args:
        option: which was given the folder; empty where it stands for a model.

    Raises:
        LoadError: it is one; the sentence names the checkpoint in it.
    """
    for index in sorted(folder.glob("snapshots/*/model_index.json")):
        give = f"give {option} the checkpoint" if option else "give the checkpoint"
        raise LoadError(f"{folder} is a folder of the hub's cache: {give} in it, {index.parent}.")


def switches(folder: Path, remedy: str = RESTORE) -> dict[str, bool]:
    """What a checkpoint's pipeline is told besides its components, such as that it is distilled.

    Raises:
        LoadError: its model_index.json is missing or damaged.
    """
    index = read_json(folder / "model_index.json", remedy)
    return {name: value for name, value in index.items() if isinstance(value, bool) and not name.startswith("_")}


def denoiser_config(spec: ModelSpec) -> dict[str, Any]:
    """The model's own configuration of its denoiser.

    Raises:
        LoadError: it is missing or damaged.
    """
    return read_json(spec.folder / "transformer" / "config.json") | dict(spec.overrides.get("transformer", {}))


def misfit(spec: ModelSpec, folder: Path, remedy: str) -> str:
    """Why a folder is no checkpoint of this model, in words; empty if its classes and its denoiser's sizes are the
    model's.

    Raises:
        LoadError: a configuration is missing or damaged.
    """
    index = read_json(folder / "model_index.json", remedy)
    made = index.get("_class_name")
    if made != spec.pipeline:
        return f"it is a {made or 'pipeline without a name'}, and {spec.name} is a {spec.pipeline}"
    its = parts(folder, remedy)
    for name, (library, kind) in parts(spec.folder).items():
        if name not in its:
            return f"its model_index.json has no {name}"
        if is_module(kind) and its[name] != (library, kind):
            return f"its {name} is a {'.'.join(its[name])}, and that of {spec.name} a {library}.{kind}"
    return differing(denoiser_config(spec), read_json(folder / "transformer" / "config.json", remedy))


def differing(mine: Mapping[str, object], its: Mapping[str, object]) -> str:
    """The values in which a denoiser's configuration differs from a model's own, in words; empty if in none."""
    keys = [key for key in mine if not key.startswith("_") and key in its and _plain(its[key]) != _plain(mine[key])]
    said = [f"{key} is {its[key]} instead of {mine[key]}" for key in keys[:3]]
    others = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"in its transformer/config.json {', '.join(said)}{others}" if said else ""


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value


def fitting(folder: Path, remedy: str) -> tuple[str, ...]:
    """Ids of the catalog's models of which a folder is a checkpoint.

    Raises:
        LoadError: a configuration is missing or damaged.
    """
    return tuple(spec.id for spec in catalog.MODELS.values() if not misfit(spec, folder, remedy))


def require_fit(folder: Path, remedy: str, *specs: ModelSpec) -> None:
    """Refuse a checkpoint of none of these models.

    Raises:
        LoadError: the sentence says what it is and what it would fit.
    """
    why = [misfit(spec, folder, remedy) for spec in specs]
    if not all(why):
        return
    made = read_json(folder / "model_index.json", remedy).get("_class_name")
    nearest = next((reason for spec, reason in zip(specs, why, strict=True) if spec.pipeline == made), why[0])
    others, names = fitting(folder, remedy), " or ".join(spec.name for spec in specs)
    instead = f"ask for {' or '.join(others)}" if others else "give a checkpoint of a model that is asked for"
    raise LoadError(f"{folder} is a checkpoint, but not of {names}: {nearest}; {instead}.")


def foreign_config(config: Mapping[str, object], file: Path) -> str | None:
    """The quantization that a configuration names, "fp8" or "torchao"; None without any.

    Raises:
        LoadError: it is one that is not understood here.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    found = found if isinstance(found, dict) else {}
    method = found.get("quant_method")
    if method in ("fp8", TORCHAO):
        return method
    method = "modelopt" if method is None and isinstance(found.get("producer"), dict) else method
    said = _METHODS.get(method, method) if isinstance(method, str) else "a method without a name"
    kind = next((found[key] for key in ("quant_algo", "quant_type") if isinstance(found.get(key), str)), "")
    raise LoadError(
        f"{file} says that the weights are quantized by {said}{kind and f' ({kind})'}: give the model in bf16, float16 "
        "or float32, which Twinframe quantizes itself, or a denoiser that diffusers saved with torchao."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def component(folder: Path, library: str, remedy: str, quantized: bool = False) -> Component:
    """What the weights' files of a component hold.

    A component may be one file or several with an index, each also as a variant (`.fp16`), as diffusers and
    transformers save them. Where a whole file and an index lie side by side, diffusers takes the index and transformers
    the file; an index without its files is left over.

    Args:
        quantized: it is one that torchao quantized, as diffusers saves it.

    Raises:
        LoadError: a file is missing, damaged or in a layout that is not read here, or the index names other tensors
            than the files hold.
    """
    config = read_json(folder / "config.json", remedy)
    method = foreign_config(config, folder / "config.json")
    if method == TORCHAO and not quantized:
        raise LoadError(
            f"{folder} holds weights that are quantized already, by torchao: give the model in bf16, and compare the "
            f"folder with it as a column of its format, such as nvfp4@{folder}."
        )
    if (folder / "adapter_config.json").is_file():
        raise LoadError(f"{folder} holds an adapter (adapter_config.json): fuse or unload it, and {SAVE_AGAIN}.")
    variant, index, files = _files(folder, library, remedy)
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in header(file, remedy).items():
            if name in tensors:
                raise LoadError(f"{name} is in {tensors[name].file} and in {file}: {SAVE_AGAIN}.")
            tensors[name] = stored
    if index is not None:
        _check_index(index, tensors, remedy)
    packed = _packed(files, tensors, remedy) if quantized else {}
    parts = {part: tensors.pop(part) for one in packed.values() for part in one.parts.values()}
    _check_names(tensors)
    tensors = {name: stored for name, stored in tensors.items() if not _UNUSED_SCALES.search(name)}
    scales = _scales(tensors)
    if method == "fp8" and not scales:
        raise LoadError(f"{folder / 'config.json'} names fp8 scales, but no weight has one: {SAVE_AGAIN} in bf16.")
    tensors |= {name: _logical(one, parts) for name, one in packed.items()}
    return Component(folder=folder, variant=variant, tensors=tensors, scales=scales, packed=packed, parts=parts)


def _packed(files: Sequence[Path], tensors: Mapping[str, Stored], remedy: str) -> dict[str, Packed]:
    """The weights that torchao took apart, as the files' metadata describe them.

    `tensor_names` lists the weights, and under the name of each its kind, its attributes and its parts are told. The
    parts of `a.weight` are called `a._weight_qdata` and so on.

    Raises:
        LoadError: the metadata is damaged, or a part is missing.
    """
    packed: dict[str, Packed] = {}
    for file in files:
        said = metadata(file, remedy)
        try:
            for name in json.loads(said.get("tensor_names", "[]")):
                told = json.loads(said[name])
                if told["_type"] == "Tensor":
                    continue
                module, _, weight = name.rpartition(".")
                names = {part: f"{module}._{weight}_{part}" for part in map(str, told["_tensor_data_names"])}
                packed[name] = Packed(kind=str(told["_type"]), attributes=dict(told["_data"]), parts=names)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LoadError(f"The metadata of {file} is not torchao's: {remedy}.") from error
    for name, one in packed.items():
        if "qdata" not in one.parts or len(set(one.parts.values())) < len(one.parts):
            raise LoadError(f"The metadata of {files[0]} names no codes of {name}: {remedy}.")
        for part in one.parts.values():
            if part not in tensors:
                raise LoadError(f"{files[0].parent} lacks {part}, a part of {name}: {remedy}.")
    return packed


def _logical(packed: Packed, parts: Mapping[str, Stored]) -> Stored:
    """A packed weight in the shape that its model knows: two codes of four bits lie in a byte."""
    codes = parts[packed.parts["qdata"]]
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if codes.dtype == "U8" and codes.shape else codes.shape
    return Stored(file=codes.file, dtype=packed.kind, shape=shape)


def metadata(file: Path, remedy: str) -> dict[str, str]:
    """What a safetensors file says besides its tensors.

    Raises:
        LoadError: it is missing or damaged.
    """
    header(file, remedy)  # so that its length is one
    with file.open("rb") as stream:
        found = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]).decode()).get("__metadata__")
    if not isinstance(found, dict | None) or not all(isinstance(value, str) for value in (found or {}).values()):
        raise LoadError(f"The weights file {file} is damaged: {remedy}.")
    return found or {}


def header(file: Path, remedy: str) -> dict[str, Stored]:
    """The tensors of a safetensors file, after its specification: eight bytes with the length of a JSON object, which
    gives each tensor's type, shape and place ("data_offsets") in what follows, without gaps.

    Raises:
        LoadError: it is missing, cut short or no such file.
    """
    if not file.is_file():
        raise LoadError(f"The weights file {file} is missing: {remedy}.")
    size, found, ends = file.stat().st_size, {}, []
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            entries = json.loads(stream.read(min(length, size)).decode())
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            stored = Stored(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
            if stored.dtype in _BYTES and end - begin != _BYTES[stored.dtype] * math.prod(stored.shape):
                raise ValueError(f"{name} has another size")
            found[name] = stored
            ends.append((begin, end))
        reached = 0
        for begin, end in sorted(ends):
            if begin != reached or end < begin:
                raise ValueError("a gap, or two tensors in one place")
            reached = end
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error) as error:
        raise LoadError(f"The weights file {file} is damaged: {remedy}.") from error
    except OSError as error:
        raise LoadError(f"The weights file {file} cannot be read: {error.strerror or error}.") from error
    needed = 8 + length + reached
    if size < needed:
        raise LoadError(f"The weights file {file} is cut short ({size} of {needed} bytes): {remedy}.")
    if size > needed:
        raise LoadError(f"The weights file {file} is damaged ({size} bytes instead of {needed}): {remedy}.")
    return found


def require_shapes(found: Component, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """See that a component's tensors are just those that its model has.

    Args:
        wanted: names, as the files have them, and shapes.

    Raises:
        LoadError: one is missing, too many, or of another shape.
    """
    missing = sorted(wanted.keys() - found.tensors.keys())
    if missing:
        raise LoadError(f"{_where(found)} lacks {missing[0]}{more(missing)}: copy the folder again, or {SAVE_AGAIN}.")
    extra = sorted(found.tensors.keys() - wanted.keys() - set(found.scales.values()))
    if extra:
        file = found.tensors[extra[0]].file
        raise LoadError(f"{file} holds {extra[0]}{more(extra)}, which the model has not: {SAVE_AGAIN}.")
    for name, shape in wanted.items():
        require_shape(name, found.tensors[name], shape)


def require_shape(name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    """Raises LoadError: the tensor is of another shape than the model's."""
    if stored.shape != tuple(shape):
        raise LoadError(
            f"{name} in {stored.file} is of shape {list(stored.shape)}, and the model's of {list(shape)}: give the "
            "weights that belong to the configuration beside them."
        )


def _where(found: Component) -> str:
    files = sorted({stored.file for stored in found.tensors.values()})
    return str(files[0]) if len(files) == 1 else str(found.folder)


def more(names: list[str]) -> str:
    """How many tensors there are besides the first, in words."""
    more = len(names) - 1
    return f" and {more} more {'tensor' if more == 1 else 'tensors'}" if more else ""


def _files(folder: Path, library: str, remedy: str) -> tuple[str | None, Path | None, list[Path]]:
    """The variant that is read, its index if it has one, and its files."""
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    for variant in _variants(folder, stem):
        dotted = f".{variant}" if variant else ""
        whole = folder / f"{stem}{dotted}.safetensors"
        index = _index(folder, stem, variant)
        if index is not None and not (library == "transformers" and whole.is_file()):
            files = [folder / name for name in sorted(set(weight_map(index, remedy).values()))]
            lost = [file for file in files if not file.is_file()]
            if not lost:
                return variant or None, index, files
            if not whole.is_file():
                raise LoadError(f"The weights file {lost[0]} is missing: {remedy}.")
        if whole.is_file():
            return variant or None, None, [whole]
    for suffix, words in _OTHER_LAYOUTS.items():
        for file in sorted(folder.glob(f"*{suffix}")):
            raise LoadError(f"{file} is in {words}.")
    for file in sorted(folder.glob("*.safetensors")):
        raise LoadError(f"{file} is not named as diffusers names weights ({stem}.safetensors): {SAVE_AGAIN}.")
    raise LoadError(f"The weights file {folder / stem}.safetensors is missing: {remedy}.")


def _variants(folder: Path, stem: str) -> list[str]:
    """Variants that a folder has files of, "" for none, the one to be read first."""
    found = set()
    for file in folder.glob(f"{stem}*.safetensors"):
        if not _SHARD.search(file.name):
            found.add(file.name.removeprefix(stem).removesuffix(".safetensors").removeprefix("."))
    for file in folder.glob(f"{stem}.safetensors*.json"):
        words = file.name.removeprefix(f"{stem}.safetensors").removesuffix(".json").split(".")
        if "index" in words:
            found.add(".".join(word for word in words if word not in ("", "index")))
    order = {variant: place for place, variant in enumerate(_VARIANTS)}
    return sorted(found, key=lambda variant: (order.get(variant, len(order)), variant))


def _index(folder: Path, stem: str, variant: str) -> Path | None:
    """The index of weights in several files; None without one. Diffusers has named those of variants in two ways."""
    names = (f".index.{variant}.json", f".{variant}.index.json") if variant else (".index.json",)
    return next((f for f in (folder / f"{stem}.safetensors{name}" for name in names) if f.is_file()), None)


def weight_map(index: Path, remedy: str) -> dict[str, str]:
    """Tensor name -> file name, of an index.

    Raises:
        LoadError: it is none, or names files elsewhere.
    """
    found = read_json(index, remedy).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise LoadError(f"The file {index} is damaged, it has no weight_map: {remedy}.")
    for file in found.values():
        if Path(file).name != file or "\\" in file:
            raise LoadError(f"{index} names {file}, and only files beside it are read: {SAVE_AGAIN}.")
    return found


def _check_index(index: Path, tensors: Mapping[str, Stored], remedy: str) -> None:
    named = weight_map(index, remedy)
    for name, file in named.items():
        if name not in tensors:
            raise LoadError(f"The weights file {index.parent / file} lacks {name}, which {index.name} names: {remedy}.")
        if tensors[name].file.name != file:
            raise LoadError(f"{index} names {file} for {name}, which is in {tensors[name].file.name}: {remedy}.")
    for name, stored in tensors.items():
        if name not in named:
            raise LoadError(f"{index} does not name {name}, which is in {stored.file.name}: {remedy}.")


def _check_names(tensors: Mapping[str, Stored]) -> None:
    """Refuse what other tools leave in a file."""
    for name, stored in tensors.items():
        if _ADAPTER.search(name):
            raise LoadError(f"{stored.file} holds an adapter ({name}): fuse or unload it, and {SAVE_AGAIN}.")
    for name, stored in tensors.items():
        scale = name.endswith(SCALES) or _UNUSED_SCALES.search(name)
        if _QUANTIZED.search(name) and not (scale and stored.dtype in FLOATS):
            raise _quantized(name, stored)
        if stored.dtype not in FLOATS and stored.dtype not in FP8 and not _is_count(name):
            raise _quantized(name, stored)


def _quantized(name: str, stored: Stored) -> LoadError:
    return LoadError(
        f"{stored.file} is quantized in a layout that is not read here ({name} of type {stored.dtype}): give the model "
        "in bf16, float16 or float32, which Twinframe quantizes itself."
    )


def _is_count(name: str) -> bool:
    """Whether a tensor holds whole numbers by nature: old text encoders keep the places of tokens."""
    return name.endswith(("position_ids", "num_batches_tracked", "relative_position_index"))


def _scales(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Name of an fp8 weight -> name of its scale.

    Raises:
        LoadError: only some fp8 weights have a scale, or a scale is not beside an fp8 weight or does not fit it.
    """
    scales = {}
    for name, stored in tensors.items():
        suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        weight = f"{name.removesuffix(suffix)}.weight"
        if weight in scales:
            raise LoadError(f"{stored.file} has two scales for {weight}: {SAVE_AGAIN} in bf16.")
        if weight not in tensors or tensors[weight].dtype not in FP8:
            raise LoadError(f"{stored.file} holds {name} without an fp8 weight that it scales: {SAVE_AGAIN} in bf16.")
        if scale_blocks(stored.shape, tensors[weight].shape) is None:
            raise LoadError(
                f"{name} in {stored.file} is of shape {list(stored.shape)}, which scales neither the whole of {weight} "
                f"{list(tensors[weight].shape)} nor its rows nor blocks of 128: {SAVE_AGAIN} in bf16."
            )
        scales[weight] = name
    bare = [name for name, stored in tensors.items() if stored.dtype in FP8 and name not in scales]
    if scales and bare:
        raise LoadError(f"{tensors[bare[0]].file} has scales, but none for {bare[0]}: {SAVE_AGAIN} in bf16.")
    return scales


def scale_blocks(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """How many elements of a weight, along each dimension, share an element of its scale; None if it does not fit."""
    if math.prod(scale) == 1:
        return tuple(max(1, side) for side in weight)
    if scale in ((weight[0],), (weight[0], *(1 for _ in weight[1:]))):
        return (1, *weight[1:])
    if len(weight) == 2 and scale == (math.ceil(weight[0] / 128), math.ceil(weight[1] / 128)):
        return (128, 128)
    return None
