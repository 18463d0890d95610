"""Weights into memory: a checkpoint, or random weights of the same architecture, becomes modules on a device.

Text encoders, tokenizers and VAE are loaded once a model and shared by all its precisions. A denoiser arrives layer by
layer, and each layer may be quantized before the next is read. Knows nothing of precisions or of what else is in
memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from engine import hub
from engine.catalog import ModelSpec
from engine.errors import LoadError
from engine.fingerprint import of_folder
from engine.source import BUNDLED_OR_HUB, Source

Place = Callable[[str, nn.Module], None]
"""Called with each submodule's fully qualified name and itself once its weights are on the device; may change it."""
Told = Callable[[int, int], None]
"""Called with bytes downloaded and bytes in all."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """A folder with weights, and what to do when a file of it is bad."""

    folder: Path
    remedy: str


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def load_pipeline(spec: ModelSpec, device: torch.device, source: Source = BUNDLED_OR_HUB) -> DiffusionPipeline:
    """The model's pipeline in bf16 on `device`, ready to be called.

    Raises:
        LoadError: the weights cannot be had, or a file of them is missing or cut short.
    """
    return assemble(spec, load_shared(spec, device, source), load_transformer(spec, device, source))


def assemble(spec: ModelSpec, shared: Mapping[str, object], transformer: nn.Module) -> DiffusionPipeline:
    """A pipeline with a scheduler of its own around shared components and a denoiser."""
    scheduler = type(shared["scheduler"]).from_config(shared["scheduler"].config)
    pipeline = getattr(diffusers, spec.pipeline)(**(shared | {"scheduler": scheduler, "transformer": transformer}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_shared(
    spec: ModelSpec, device: torch.device, source: Source = BUNDLED_OR_HUB, told: Told | None = None
) -> dict[str, object]:
    """All components but the denoiser, modules in bf16 on `device`; for `assemble`.

    Raises:
        LoadError: the weights cannot be had, or a file of them is missing or cut short.
    """
    checkpoint = _checkpoint(spec, source, told)
    folder = checkpoint.folder if checkpoint else spec.folder
    shared: dict[str, object] = {}
    for part, (library, kind) in _parts(spec, folder).items():
        if part == "transformer":
            continue
        if "Scheduler" in kind:
            config = _json(folder / part / "scheduler_config.json")
            shared[part] = getattr(diffusers, kind).from_config(config | _overrides(spec, part, checkpoint))
        elif "Tokenizer" in kind:
            shared[part] = _tokenizer(kind, folder / part, source.random)
        elif checkpoint is None:
            shared[part] = _fill(_hollow(spec, part, folder), device, _random(device), None)
        elif library == "transformers":
            # device_map reads each weight straight to the device instead of by way of the host.
            where = {} if device.type == "cpu" else {"device_map": {"": device}}
            shared[part] = getattr(transformers, kind).from_pretrained(
                folder / part, dtype=torch.bfloat16, local_files_only=True, **where
            )
        else:
            shared[part] = (
                _class(library, kind)
                .from_pretrained(folder / part, dtype=torch.bfloat16, local_files_only=True)
                .to(device)
            )
    for module in (value for value in shared.values() if isinstance(value, nn.Module)):
        module.eval().requires_grad_(False)
    if device.type == "cpu" and all(parameter.ndim <= 4 for parameter in shared["vae"].parameters()):
        # Convolutions in channels_last decode faster on CPUs; on an H200 18% slower (assets/figures/ends.json).
        shared["vae"].to(memory_format=torch.channels_last)
    if spec.vae_tiling:
        shared["vae"].enable_tiling()
    return shared


def load_transformer(
    spec: ModelSpec,
    device: torch.device,
    source: Source = BUNDLED_OR_HUB,
    place: Place | None = None,
    told: Told | None = None,
) -> nn.Module:
    """One more bf16 denoiser of the model on `device`, each weight read straight to it.

    Args:
        place: what to do with each module as soon as its weights are there. Quantizing here keeps the peak at the
            quantized denoiser and one bf16 layer.

    Raises:
        LoadError: the weights cannot be had, or a file of them is missing or cut short.
    """
    checkpoint = _checkpoint(spec, source, told)
    folder = checkpoint.folder if checkpoint else spec.folder
    with ExitStack() as opened:
        read = _reader(folder / "transformer", device, opened) if checkpoint else _random(device)
        transformer = _fill(_hollow(spec, "transformer", folder, checkpoint), device, read, place)
    transformer.set_attention_backend("native")
    # LTX-2's pipeline may hand over latents as a transposed view, which torchao's microscaling quantizers refuse.
    transformer.register_forward_pre_hook(_contiguous, with_kwargs=True)
    return transformer.eval().requires_grad_(False)


def _contiguous(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))


def empty_transformer(spec: ModelSpec) -> nn.Module:
    """The model's denoiser on the meta device: names and shapes without weights.

    Raises:
        LoadError: its configuration is missing.
    """
    kind = transformer_class(spec)
    config = _json(spec.folder / "transformer" / "config.json") | dict(spec.overrides.get("transformer", {}))
    with torch.device("meta"):
        return kind.from_config(config).to(torch.bfloat16)


def transformer_class(spec: ModelSpec) -> type:
    """The diffusers class of the model's denoiser, as its checkpoint names it.

    Raises:
        LoadError: the checkpoint's index is missing or damaged.
    """
    return getattr(diffusers, _parts(spec, spec.folder)["transformer"][1])


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights are


def check(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> None:
    """The weights can be loaded at once: every file is here and whole, told from the headers alone. Fetches nothing.

    Raises:
        LoadError: the model is not here, or a file is missing, damaged or cut short; the sentence names it.
    """
    if source.random:
        return
    checkpoint = _here(spec, source)
    if checkpoint is None:
        raise LoadError(f"{spec.name} is not on this machine: {spec.memory_gb.download:.0f} GB from {spec.url}.")
    _check(spec, checkpoint)


def described(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> str:
    """Where the model's weights come from, in words."""
    if source.random:
        return "random, in the real architecture: what is made means nothing, its cost does"
    checkpoint = _here(spec, source)
    if spec.bundled and checkpoint.folder == spec.folder:
        return "the bundled checkpoint"
    if source.folder is not None:
        return f"the local folder {checkpoint.folder.name}"
    return f"{spec.source} at revision {spec.revision}"


def fingerprint(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> str:
    """What tells these weights from others: a figure kept for one checkpoint must not serve another.

    Of a folder what `fingerprint.of_folder` says, configurations included; the revision on the hub; or "random".
    """
    if source.random:
        return "random"
    checkpoint = _here(spec, source)
    if checkpoint is None or (not spec.bundled and source.folder is None):
        return f"{spec.source}@{spec.revision}"
    return of_folder(checkpoint.folder)


def _checkpoint(spec: ModelSpec, source: Source, told: Told | None) -> _Checkpoint | None:
    """The model's checked folder, fetched if need be; None for random weights.

    Raises:
        LoadError: it cannot be had, or a file of it is bad.
    """
    if source.random:
        return None
    checkpoint = _here(spec, source)
    if checkpoint is None and (source.offline or constants.HF_HUB_OFFLINE):
        raise LoadError(hub.no_copy(spec))
    if checkpoint is None:
        checkpoint = _fetched(hub.download(spec, _patterns(spec), told or (lambda done, total: None)))
    _check(spec, checkpoint)
    return checkpoint


def _here(spec: ModelSpec, source: Source) -> _Checkpoint | None:
    if source.folder is not None:
        again = f"copy it into {source.folder} again"
        own = source.folder / spec.id
        if own.is_dir():
            return _Checkpoint(folder=own, remedy=again)
        # What is bundled has weights of its own, so the folder may be meant for another model.
        if not spec.bundled or ((source.folder / "model_index.json").is_file() and _is_for(spec, source.folder)):
            return _Checkpoint(folder=source.folder, remedy=again)
    if spec.bundled:
        return _Checkpoint(folder=spec.folder, remedy="restore it, for example with git checkout")
    folder = hub.cached(spec, _patterns(spec))
    if folder is None:
        return None
    try:  # somebody else may have fetched a part of it
        _check(spec, _fetched(folder))
    except LoadError:
        return None
    return _fetched(folder)


def _fetched(folder: Path) -> _Checkpoint:
    return _Checkpoint(folder=folder, remedy="delete the folder and start again with a connection to the hub")


def _patterns(spec: ModelSpec) -> list[str]:
    """Globs of the files that diffusers reads: a repository may hold the same weights in other layouts as well."""
    patterns = ["model_index.json"]
    for part, (_, kind) in _parts(spec, spec.folder).items():
        patterns += [f"{part}/*"] if "Tokenizer" in kind else [f"{part}/*.json", f"{part}/*.safetensors"]
    return patterns


def _is_for(spec: ModelSpec, folder: Path) -> bool:
    """Whether a checkpoint is of this model's pipeline and of its denoiser's size."""
    if _json(folder / "model_index.json").get("_class_name") != spec.pipeline:
        return False
    mine = _json(spec.folder / "transformer" / "config.json") | dict(spec.overrides.get("transformer", {}))
    its = _json(folder / "transformer" / "config.json")
    return all(its[key] == mine[key] for key in mine.keys() & its.keys() if not key.startswith("_"))


def _check(spec: ModelSpec, checkpoint: _Checkpoint) -> None:
    folder, remedy = checkpoint.folder, checkpoint.remedy
    index = folder / "model_index.json"
    if folder != spec.folder and not index.is_file():
        raise LoadError(f"{folder} is not a checkpoint of {spec.name}: it has no model_index.json.")
    for part, (library, kind) in _parts(spec, folder, remedy).items():
        here = folder / part
        if "Tokenizer" in kind:
            _json(here / "tokenizer_config.json", remedy)
            found = [name for name in _TOKENIZER_FILES if (here / name).is_file()]
            if not found:
                raise LoadError(f"The file {here / _TOKENIZER_FILES[0]} is missing: {remedy}.")
            if found[0].endswith(".json"):
                _json(here / found[0], remedy)
            continue
        if "Scheduler" in kind:
            _json(here / "scheduler_config.json", remedy)
            continue
        _json(here / "config.json", remedy)
        for name in sorted(set(_weight_map(here, remedy).values()) or {_whole(library)}):
            _check_weights(here / name, remedy)
    if not _is_for(spec, folder):
        raise LoadError(f"{folder} is a checkpoint, but not of {spec.name}: its classes or sizes differ.")


def _parts(spec: ModelSpec, folder: Path, remedy: str = "") -> dict[str, tuple[str, str]]:
    """The checkpoint's components: name -> (library, class name); those it does without are left out."""
    index = _json(folder / "model_index.json", remedy or "restore it, for example with git checkout")
    return {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}


def _overrides(spec: ModelSpec, part: str, checkpoint: _Checkpoint | None) -> dict[str, object]:
    """What the spec changes in shared configurations; a checkpoint has its own."""
    return {} if checkpoint else dict(spec.overrides.get(part, {}))


def _whole(library: str) -> str:
    return "model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors"


def _weight_map(folder: Path, remedy: str) -> dict[str, str]:
    """Tensor name -> file, of a sharded component; empty for one in a single file."""
    return {n: file for index in folder.glob("*.index.json") for n, file in _json(index, remedy)["weight_map"].items()}


def _json(file: Path, remedy: str = "restore it, for example with git checkout") -> dict:
    if not file.is_file():
        raise LoadError(f"The file {file} is missing: {remedy}.")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise LoadError(f"The file {file} is damaged: {remedy}.") from error


def _check_weights(file: Path, remedy: str) -> None:
    """A safetensors file says in its header where its last tensor ends (its specification's "data_offsets")."""
    if not file.is_file():
        raise LoadError(f"The weights file {file} is missing: {remedy}.")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise LoadError(f"The weights file {file} is damaged: {remedy}.") from error
    if size < needed:
        raise LoadError(f"The weights file {file} is cut short ({size} of {needed} bytes): {remedy}.")


# ---------------------------------------------------------------------------------------------------------------------
# Modules


def _class(library: str, kind: str) -> type:
    """A component's class, by the two names in model_index.json."""
    if library in ("diffusers", "transformers"):
        return getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    return getattr(getattr(diffusers.pipelines, library), kind)


def _hollow(spec: ModelSpec, part: str, folder: Path, checkpoint: _Checkpoint | None = None) -> nn.Module:
    """A component with its parameters on the meta device and its buffers real: rotary frequencies are computed."""
    library, kind = _parts(spec, folder)[part]
    cls = _class(library, kind)
    with init_empty_weights(include_buffers=False):
        if library != "transformers":
            return cls.from_config(_json(folder / part / "config.json") | _overrides(spec, part, checkpoint))
        module = cls(cls.config_class.from_pretrained(folder / part))
    module.tie_weights()  # making parameters empty made two of each tied one
    return module


def _fill(
    module: nn.Module, device: torch.device, read: Callable[[str, Tensor], Tensor], place: Place | None
) -> nn.Module:
    """Give a hollow module its weights in bf16, one submodule after the other; returns the same module."""
    made: dict[int, nn.Parameter] = {}
    for name, child in list(module.named_modules()):
        for key, empty in list(child._parameters.items()):
            if empty is None:
                continue
            if id(empty) not in made:
                value = read(f"{name}.{key}" if name else key, empty).to(torch.bfloat16)
                made[id(empty)] = nn.Parameter(value, requires_grad=False)
            child._parameters[key] = made[id(empty)]
        for key, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[key] = buffer.to(device)
        if place is not None:
            place(name, child)
    return module


def _reader(folder: Path, device: torch.device, opened: ExitStack) -> Callable[[str, Tensor], Tensor]:
    """Reads a component's tensors by name from its safetensors files, straight to the device."""
    files = {}
    weight_map = _weight_map(folder, "")

    def read(name: str, empty: Tensor) -> Tensor:
        file = weight_map.get(name, _whole("diffusers"))
        try:
            if file not in files:
                files[file] = opened.enter_context(safe_open(folder / file, framework="pt", device=str(device)))
            value = files[file].get_tensor(name)
        except SafetensorError as error:  # it was whole when it was checked
            raise LoadError(f"The weights file {folder / file} lacks {name} or is being changed: retry.") from error
        if value.shape != empty.shape:
            raise LoadError(f"{name} in {folder / file} is {tuple(value.shape)} instead of {tuple(empty.shape)}.")
        return value

    return read


def _random(device: torch.device, seed: int = 0) -> Callable[[str, Tensor], Tensor]:
    """Makes tensors on the device: ones for the scales of norms, zeros for biases, and for the rest normal values of
    variance 1/fan-in, which neither grow nor shrink from layer to layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(name: str, empty: Tensor) -> Tensor:
        value = torch.empty(empty.shape, dtype=torch.bfloat16, device=device)
        if name.endswith("bias"):
            return value.zero_()
        if empty.ndim <= 1:
            return value.fill_(1)
        return value.normal_(std=(empty.shape[0] / empty.numel()) ** 0.5, generator=generator)

    return make


def _tokenizer(kind: str, folder: Path, random: bool) -> object:
    # assets/configs has no vocabularies; its stand-ins, which split at words, need no class of their own.
    return getattr(transformers, "PreTrainedTokenizerFast" if random else kind).from_pretrained(
        folder, local_files_only=True
    )
