"""Weights into memory: a checkpoint, or random weights of the same architecture, becomes modules on a device.

Text encoders, tokenizers and VAE are loaded once a model and shared by all its precisions. A denoiser arrives layer by
layer, and each layer may be quantized before the next is read. Of a checkpoint every parameter and buffer comes from a
file, in its shape and finite, or the checkpoint is refused: engine/weights/checkpoint.py tells what the files hold.
Knows nothing of precisions or of what else is in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.catalog import KINDS, MODELS, ModelSpec
from engine.errors import LoadError
from engine.formats import REFERENCE
from engine.weights import checkpoint, cpu_products, fusing, hub, schedulers
from engine.weights.checkpoint import Checkpoint, Component
from engine.weights.fingerprint import of_folder
from engine.weights.fusing import Place
from engine.weights.source import BUNDLED_OR_HUB, Source

Told = Callable[[int, int], None]
"""Called with bytes downloaded and bytes in all."""
Read = Callable[[str, Tensor], Tensor]
"""Called with a tensor's name and an empty one of its shape and type; gives its values on the device."""
Unpack = Callable[[str, checkpoint.Packed, Mapping[str, Tensor]], Tensor]
"""Called with the name of a weight that torchao took apart, what its file says of it, and its parts on the device;
gives the weight."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
_checked: dict[Path, tuple[tuple[object, ...], str]] = {}
"""Folders that were found whole -> what their files looked like then: a folder is not looked through again until one of
them changes."""


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def load_pipeline(spec: ModelSpec, device: torch.device, source: Source = BUNDLED_OR_HUB) -> DiffusionPipeline:
    """The model's pipeline in bf16 on `device`, ready to be called. In fp32 is what its classes say, and the VAE of a
    model that says so.

    Raises:
        LoadError: the weights cannot be had, or a file of them is missing or cut short.
    """
    return assemble(spec, load_shared(spec, device, source), load_transformer(spec, device, source))


def assemble(spec: ModelSpec, shared: Mapping[str, Any], transformer: nn.Module) -> DiffusionPipeline:
    """A pipeline with a scheduler of its own around shared components and a denoiser."""
    scheduler = type(shared["scheduler"]).from_config(shared["scheduler"].config)
    parts = {**shared, "scheduler": scheduler, "transformer": transformer}
    pipeline = getattr(diffusers, spec.pipeline)(**parts, **checkpoint.switches(spec.folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_shared(
    spec: ModelSpec,
    device: torch.device,
    source: Source = BUNDLED_OR_HUB,
    told: Told | None = None,
    place: Place | None = None,
) -> dict[str, Any]:
    """All components but the denoiser, modules on `device`, in types as of `load_pipeline`; for `assemble`.

    Args:
        place: what to do with each part of the `text_parts` as soon as its weights are there.

    Raises:
        LoadError: the weights cannot be had, or a file of them is missing or cut short.
    """
    chosen = _checkpoint(spec, source, told)
    folder = chosen.folder if chosen else spec.folder
    shared: dict[str, Any] = {}
    with ExitStack() as opened:
        for part, (library, kind) in _needed(spec, folder).items():
            if part == "transformer":
                continue
            if "Scheduler" in kind:
                where = folder / part / "scheduler_config.json"
                config = checkpoint.read_json(where) | _overrides(spec, part, chosen)
                shared[part] = schedulers.make(kind, config, str(folder / "model_index.json"))
            elif checkpoint.is_tokenizer(kind):
                shared[part] = _tokenizer(kind, folder / part, source.random)
            elif chosen is None:
                hollow = _hollow(spec, part, folder)
                shared[part] = _fill(hollow, device, _random(device), _of_text(part, place))
            elif library == "transformers" and place is not None:
                shared[part] = _sent(_from_transformers(kind, chosen, part, torch.device("cpu")), device, place)
            elif library == "transformers":
                shared[part] = _from_transformers(kind, chosen, part, device)
            else:
                with _in(_dtype(spec, part)):  # buffers too, as `from_pretrained(dtype=...)` makes them
                    hollow = _hollow(spec, part, folder, chosen)
                found = checkpoint.component(folder / part, library, chosen.remedy)
                read = _reader(hollow, found, device, opened)
                shared[part] = _fill(hollow, device, read, _of_text(part, place), stored=True)
    _check_vocabularies(shared, folder)
    for module in (value for value in shared.values() if isinstance(value, nn.Module)):
        module.eval().requires_grad_(False)
    if device.type == "cpu":
        cpu_products.multiply_in_fp32_where_bf16_is_slow()
        if all(parameter.ndim <= 4 for parameter in shared["vae"].parameters()):
            # Convolutions in channels_last decode faster on CPUs; on an H200 18% slower (assets/figures/ends.json).
            shared["vae"].to(memory_format=torch.channels_last)
    if spec.vae_tiling:
        shared["vae"].enable_tiling()
    return shared


def text_parts(shared: Mapping[str, Any]) -> list[nn.Module]:
    """Of all components but the denoiser those that turn a prompt into what the denoiser is given."""
    return [module for part, module in shared.items() if _is_text(part)]


def _is_text(part: str) -> bool:
    return part.startswith("text_encoder") or part == "connectors"


def _of_text(part: str, place: Place | None) -> Place | None:
    return place if _is_text(part) else None


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
            quantized denoiser and one bf16 layer. The model's LoRAs are fused before.

    Raises:
        LoadError: the weights cannot be had, a file of them is missing or cut short, or a LoRA is not for this model.
    """
    chosen = _checkpoint(spec, source, told)
    folder = chosen.folder if chosen else spec.folder
    with ExitStack() as opened:
        hollow = _hollow(spec, "transformer", folder, chosen)
        if chosen is None:
            read = _random(device)
        else:
            found = checkpoint.component(folder / "transformer", "diffusers", chosen.remedy)
            read = _reader(hollow, found, device, opened)
        if spec.loras:
            place = fusing.before(place, spec, hollow)
        transformer = _fill(hollow, device, read, place, stored=chosen is not None)
    return _to_be_called(transformer)


def load_quantized(
    spec: ModelSpec, folder: Path, device: torch.device, unpack: Unpack, place: Place | None = None
) -> nn.Module:
    """A denoiser of the model that is stored quantized, on `device`; no bf16 weight of a quantized layer is made.

    Args:
        folder: the denoiser's own.
        place: as of `load_transformer`.

    Raises:
        LoadError: it is another model's, or a file of it is missing, damaged or cut short.
    """
    remedy = checkpoint.QUANTIZE_AGAIN
    with ExitStack() as opened:
        hollow = _of_config(transformer_class(spec), folder / "config.json", remedy)
        _require_config(spec, hollow)
        found = checkpoint.component(folder, "diffusers", remedy, quantized=True)
        checkpoint.require_shapes(found, _wanted(hollow, found))
        transformer = _fill(hollow, device, _reader(hollow, found, device, opened, unpack), place, stored=True)
    return _to_be_called(transformer)


def _to_be_called(transformer: nn.Module) -> nn.Module:
    transformer.set_attention_backend("native")
    # LTX-2's pipeline may hand over latents as a transposed view, which torchao's microscaling quantizers refuse.
    transformer.register_forward_pre_hook(_contiguous, with_kwargs=True)
    return transformer.eval().requires_grad_(False)


def _contiguous(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
    return args, kwargs


def empty_transformer(spec: ModelSpec) -> nn.Module:
    """The model's denoiser on the meta device: names and shapes without weights.

    Raises:
        LoadError: its configuration is missing.
    """
    return _empty(transformer_class(spec), checkpoint.denoiser_config(spec))


def blueprint(spec: ModelSpec) -> nn.Module:
    """As `empty_transformer`, one for all who only read it: building it takes up to a second.

    Raises:
        LoadError: its configuration is missing.
    """
    return _kept_empty(transformer_class(spec).__name__, json.dumps(checkpoint.denoiser_config(spec), sort_keys=True))


@lru_cache(maxsize=16)
def _kept_empty(kind: str, config: str) -> nn.Module:
    return _empty(getattr(diffusers, kind), json.loads(config))


def _empty(kind: type[ModelMixin], config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return _typed(kind.from_config(config))


def transformer_class(spec: ModelSpec) -> type[ModelMixin]:
    """The diffusers class of the model's denoiser, as its checkpoint names it.

    Raises:
        LoadError: the checkpoint's index is missing or damaged, or diffusers has no such class.
    """
    kind = checkpoint.parts(spec.folder)["transformer"][1]
    if not hasattr(diffusers, kind):
        raise LoadError(
            f"diffusers {diffusers.__version__} has no class {kind}, which {spec.name} needs: update diffusers."
        )
    return getattr(diffusers, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights are


def check(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> None:
    """The weights can be loaded at once: every file is here and whole, told from the headers alone. Fetches nothing.

    Raises:
        LoadError: the model is not here, or a file is missing, damaged or cut short; the sentence names it.
    """
    if source.random:
        return
    chosen = _here(spec, source)
    if chosen is None:
        raise LoadError(f"{spec.name} is not on this machine: {spec.download}.")
    _check(spec, chosen)


def described(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> str:
    """Where the model's weights come from and, if not in bf16, what they are stored in, in words."""
    if source.random:
        return "random, in the real architecture: what is made means nothing, its cost does"
    chosen = _here(spec, source)
    fused = "".join(f", with the LoRA {lora.source} at {lora.scale:g} fused in bf16" for lora in spec.loras)
    if chosen is not None and spec.bundled and chosen.folder == spec.folder:
        return f"the bundled checkpoint{fused}"
    stored = stored_as(spec, source)
    run = f"{REFERENCE}, the VAE in fp32" if spec.vae_fp32 else REFERENCE
    stored = f", stored in {stored} and run in {run}" if stored else ""
    if chosen is not None and (source.folder is not None or spec.place is not None):
        return f"the local folder {chosen.folder.name}{stored}{fused}"
    return f"{spec.source} at revision {spec.revision}{stored}{fused}"


def folder(spec: ModelSpec, source: Source = BUNDLED_OR_HUB, told: Told | None = None) -> Path:
    """The model's checked folder on this machine, fetched if need be.

    Raises:
        LoadError: it cannot be had, or a file of it is bad; or its weights are random.
    """
    chosen = _checkpoint(spec, source, told)
    if chosen is None:
        raise LoadError("Random weights lie in no folder: leave out --random-weights.")
    return chosen.folder


def stored_as(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> str:
    """What the weights on this machine are stored in, in words: empty for bf16 alone, for random weights and for none.

    Raises:
        LoadError: they are damaged.
    """
    chosen = None if source.random else _here(spec, source)
    if chosen is None:
        return ""
    return _check(spec, chosen)


def fingerprint(spec: ModelSpec, source: Source = BUNDLED_OR_HUB) -> str:
    """What tells these weights from others: a figure kept for one checkpoint must not serve another.

    Of a folder what `fingerprint.of_folder` says, configurations included; the revision on the hub; or "random". LoRAs
    that are fused into them follow.
    """
    fused = "".join(f", lora-{lora.written} {lora.digest[:8]}" for lora in spec.loras)
    if source.random:
        return f"random{fused}"
    chosen = _here(spec, source)
    if chosen is None or (not spec.bundled and spec.place is None and source.folder is None):
        return f"{spec.source}@{spec.revision}{fused}"
    return f"{of_folder(chosen.folder)}{fused}"


def _checkpoint(spec: ModelSpec, source: Source, told: Told | None) -> Checkpoint | None:
    """The model's checked folder, fetched if need be; None for random weights.

    Raises:
        LoadError: it cannot be had, or a file of it is bad.
    """
    if source.random:
        return None
    chosen = _here(spec, source)
    if chosen is None and (source.offline or constants.HF_HUB_OFFLINE):
        raise LoadError(hub.no_copy(spec))
    if chosen is None:
        chosen = _fetched(hub.download(spec, _patterns(spec), told or (lambda done, total: None)))
    _check(spec, chosen)
    return chosen


def _here(spec: ModelSpec, source: Source) -> Checkpoint | None:
    """The model's folder on this machine, whole or not; None if it would have to be fetched."""
    if source.folder is not None:
        own = source.folder / spec.stored_as
        if own.is_dir():
            return Checkpoint(folder=own, remedy=source.remedy)
        if _is_meant(spec, source, source.folder):
            return Checkpoint(folder=source.folder, remedy=source.remedy)
    if spec.place is not None:
        return Checkpoint(folder=spec.place, remedy=f"copy it into {spec.place} again")
    if spec.bundled:
        return Checkpoint(folder=spec.folder, remedy=checkpoint.RESTORE)
    folder = hub.cached(spec, _patterns(spec))
    if folder is None:
        return None
    try:  # somebody else may have fetched a part of it
        _check(spec, _fetched(folder))
    except LoadError:
        return None
    return _fetched(folder)


def _is_meant(spec: ModelSpec, source: Source, folder: Path) -> bool:
    """Whether a given folder, which has none for this model alone, is to be read for it: not if another of the models
    that were asked for is what it holds, nor for a miniature if it is a folder of other models' folders."""
    if not (folder / "model_index.json").is_file():
        return not spec.bundled
    others = [MODELS[name] for name in source.asked if name != spec.id]
    if not any(not checkpoint.misfit(other, folder, source.remedy) for other in others):
        return True
    return not checkpoint.misfit(spec, folder, source.remedy)


def _fetched(folder: Path) -> Checkpoint:
    return Checkpoint(folder=folder, remedy="delete the folder and start again with a connection to the hub")


def _patterns(spec: ModelSpec) -> list[str]:
    """Globs of the files that diffusers reads: a repository may hold the same weights in other layouts as well."""
    patterns = ["model_index.json"]
    for part, (_, kind) in _needed(spec, spec.folder).items():
        patterns += [f"{part}/*"] if checkpoint.is_tokenizer(kind) else [f"{part}/*.json", f"{part}/*.safetensors"]
    return patterns


def _check(spec: ModelSpec, chosen: Checkpoint) -> str:
    """See that a folder holds the model whole, as far as that can be told without reading weights.

    Returns:
        What its weights are stored in, in words; empty for bf16 alone.

    Raises:
        LoadError: it does not.
    """
    folder, remedy = chosen.folder, chosen.remedy
    state = (spec, _state(folder))
    if folder in _checked and _checked[folder][0] == state:
        return _checked[folder][1]
    if folder != spec.folder and not (folder / "model_index.json").is_file():
        raise LoadError(f"{folder} is not a checkpoint of {spec.name}: it has no model_index.json.")
    checkpoint.require_fit(folder, remedy, spec)
    stored: dict[str, list[str]] = {}
    for part, (library, kind) in _needed(spec, folder, remedy).items():
        here = folder / part
        if checkpoint.is_tokenizer(kind):
            _check_tokenizer(here, remedy)
        elif "Scheduler" in kind:
            config = checkpoint.read_json(here / "scheduler_config.json", remedy)
            schedulers.make(kind, config, str(folder / "model_index.json"))
        else:
            found = checkpoint.component(here, library, remedy)
            if library == "transformers":
                _require_read(kind, found)
            else:
                hollow = _hollow(spec, part, folder, chosen)
                checkpoint.require_shapes(found, _wanted(hollow, found))
            if part == "transformer":
                _require_config(spec, hollow)
            stored.setdefault(" and ".join(found.stored_as), []).append(part)
    stored.pop("bfloat16", None)
    said = "; ".join(f"{words} ({', '.join(where)})" for words, where in stored.items())
    _checked[folder] = (state, said)
    return said


def _state(folder: Path) -> tuple[object, ...]:
    """What changes when a file of a folder does."""
    found = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        stat = file.stat()
        found.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(found)


def _needed(spec: ModelSpec, folder: Path, remedy: str = checkpoint.RESTORE) -> dict[str, tuple[str, str]]:
    """The components that the model uses: name -> (library, class name). What a pipeline may have besides, such as the
    encoder of a picture that is given with the prompt, nothing here calls."""
    its, used = checkpoint.parts(folder, remedy), KINDS[spec.like].folder if spec.like else spec.folder
    return {name: its[name] for name in checkpoint.parts(used)}


def _check_tokenizer(folder: Path, remedy: str) -> None:
    checkpoint.read_json(folder / "tokenizer_config.json", remedy)
    found = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise LoadError(f"The file {folder / _TOKENIZER_FILES[0]} is missing: {remedy}.")
    if found[0] == "vocab.json" and not (folder / "merges.txt").is_file():
        raise LoadError(f"The file {folder / 'merges.txt'} is missing, without which vocab.json is no use: {remedy}.")
    if found[0].endswith(".json"):
        checkpoint.read_json(folder / found[0], remedy)


def _overrides(spec: ModelSpec, part: str, chosen: Checkpoint | None) -> dict[str, object]:
    """What the spec changes in shared configurations; a checkpoint has its own."""
    return {} if chosen else dict(spec.overrides.get(part, {}))


# ---------------------------------------------------------------------------------------------------------------------
# Modules


def _class(library: str, kind: str) -> type[ModelMixin] | type[PreTrainedModel]:
    """A component's class, by the two names in model_index.json."""
    if library in ("diffusers", "transformers"):
        return getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    return getattr(getattr(diffusers.pipelines, library), kind)


def _hollow(spec: ModelSpec, part: str, folder: Path, chosen: Checkpoint | None = None) -> nn.Module:
    """A component with its parameters on the meta device and its buffers real: rotary frequencies are computed.

    Raises:
        LoadError: its configuration is missing, or its class cannot be made of it.
    """
    library, kind = checkpoint.parts(folder)[part]
    cls, file = _class(library, kind), folder / part / "config.json"
    remedy = chosen.remedy if chosen else checkpoint.RESTORE
    if library != "transformers":
        return _of_config(cls, file, remedy, _overrides(spec, part, chosen), _dtype(spec, part))
    checkpoint.read_json(file, remedy)
    with init_empty_weights(include_buffers=False):
        module = cls(cls.config_class.from_pretrained(folder / part))
    module.tie_weights()  # making parameters empty made two of each tied one
    return _typed(module)


def _of_config(
    cls: type[ModelMixin],
    file: Path,
    remedy: str,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """A diffusers class made of its configuration, hollow as of `_hollow`."""
    config = {key: value for key, value in checkpoint.read_json(file, remedy).items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False), _made_of(file):
        return _typed(cls.from_config({**config, **(overrides or {})}), dtype)


def _dtype(spec: ModelSpec, part: str) -> torch.dtype:
    return torch.float32 if part == "vae" and spec.vae_fp32 else torch.bfloat16


def _typed(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """An empty module with the types in which `from_pretrained(dtype=...)` loads it; the same module. Transformers
    keeps something in fp32 where the rest is fp16 alone."""
    for name, tensor in _stored_tensors(module).items():
        if tensor.is_floating_point():
            kept = isinstance(module, ModelMixin) and checkpoint.in_fp32(type(module), name)
            tensor.data = tensor.data.to(torch.float32 if kept else dtype)
    return module


@contextmanager
def _made_of(file: Path) -> Iterator[None]:
    """Turns whatever a library raises over a user's file into one sentence that names it."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # a constructor or a parser raises whatever it stumbles over
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise LoadError(f"{file} cannot be used ({said}): {checkpoint.SAVE_AGAIN}.") from error


def _require_config(spec: ModelSpec, denoiser: nn.Module) -> None:
    """Refuse a denoiser whose configuration means something else than the model's, defaults of its class included."""
    with init_empty_weights(include_buffers=False):
        mine = type(denoiser).from_config(checkpoint.denoiser_config(spec))
    if why := checkpoint.differing(dict(mine.config), dict(denoiser.config)):
        raise LoadError(f"This is not a checkpoint of {spec.name}: {why}; give one of {spec.name}.")


def _wanted(module: nn.Module, found: Component) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a module has to be given, by the names in its files."""
    names = _names(module, found)
    return {names[name]: tuple(tensor.shape) for name, tensor in _stored_tensors(module).items()}


def _stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that belong into a file."""
    return module.state_dict(keep_vars=True)


def _names(module: nn.Module, found: Component) -> dict[str, str]:
    """A tensor's name in a diffusers module -> its name in the files: old VAEs name attention's parts otherwise."""
    in_files = {name: name for name in found.tensors}
    module._fix_state_dict_keys_on_load(in_files)
    return {name: in_files.get(name, name) for name in _stored_tensors(module)}


def _fill(module: nn.Module, device: torch.device, read: Read, place: Place | None, stored: bool = False) -> nn.Module:
    """Give a hollow module its weights in its types, one submodule after the other; returns the same module.

    Args:
        stored: buffers that belong into a file are read as well; otherwise they stay as they were made.
    """
    times = Counter(id(p) for child in module.modules() for p in child._parameters.values() if p is not None)
    tied: dict[int, nn.Parameter] = {}  # the others are not held here, so that their bf16 values go once quantized
    for name, child in list(module.named_modules()):
        prefix = f"{name}." if name else ""
        for key, empty in list(child._parameters.items()):
            if empty is None:
                continue
            made = tied.get(id(empty))
            if made is None:
                made = read(f"{prefix}{key}", empty)
                made = made if made.dtype == empty.dtype else made.to(empty.dtype)  # not asked of a packed one
                made = nn.Parameter(made, requires_grad=False)
            if times[id(empty)] > 1:
                tied[id(empty)] = made
            child._parameters[key] = made
        for key, buffer in child._buffers.items():
            if buffer is None:
                continue
            kept = stored and key not in child._non_persistent_buffers_set
            child._buffers[key] = read(f"{prefix}{key}", buffer) if kept else buffer.to(device)
        if place is not None:
            place(name, child)
    return module


def _sent(module: nn.Module, device: torch.device, place: Place) -> nn.Module:
    """Move what was read into host memory to the device, one submodule after the other; returns the same module."""
    times = Counter(id(p) for child in module.modules() for p in child._parameters.values() if p is not None)
    tied: dict[int, nn.Parameter] = {}
    for name, child in list(module.named_modules()):
        for key, held in list(child._parameters.items()):
            if held is None:
                continue
            moved = tied.get(id(held))
            if moved is None:
                moved = nn.Parameter(held.to(device), requires_grad=False)
            if times[id(held)] > 1:
                tied[id(held)] = moved
            child._parameters[key] = moved
        for key, buffer in child._buffers.items():
            child._buffers[key] = None if buffer is None else buffer.to(device)
        place(name, child)
    return module


def _reader(
    module: nn.Module, found: Component, device: torch.device, opened: ExitStack, unpack: Unpack | None = None
) -> Read:
    """Reads a component's tensors by name from its files, straight to the device, in the types of the empty ones.

    An fp8 weight is multiplied by its scale in fp32. What is not finite in its type is refused, as it would spread to
    every pixel, and to the quantizers' tables.
    """
    handles: dict[Path, safe_open] = {}
    names = _names(module, found)

    def get(name: str) -> Tensor:
        file = (found.parts if name in found.parts else found.tensors)[name].file
        try:
            if file not in handles:
                handles[file] = opened.enter_context(safe_open(file, framework="pt", device=str(device)))
            return handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:  # it was whole when it was checked
            raise LoadError(f"The weights file {file} lacks {name} or is being changed: retry.") from error

    def read(name: str, empty: Tensor) -> Tensor:
        name = names[name]
        if name not in found.tensors:
            raise LoadError(f"{found.folder} lacks {name}: copy the folder again, or {checkpoint.SAVE_AGAIN}.")
        checkpoint.require_shape(name, found.tensors[name], empty.shape)
        if name in found.packed and unpack is not None:
            return unpack(name, found.packed[name], {part: get(at) for part, at in found.packed[name].parts.items()})
        value = get(name)
        if name in found.scales:
            value = _scaled(value, get(found.scales[name]), found, name)
        value = value.to(empty.dtype)
        _require_finite(value, name, found.tensors[name].file)
        return value

    return read


def _scaled(codes: Tensor, scale: Tensor, found: Component, name: str) -> Tensor:
    scale_name = found.scales[name]
    blocks = checkpoint.scale_blocks(tuple(scale.shape), tuple(codes.shape))
    if blocks is None:  # refused when the file's headers were read
        raise LoadError(f"{scale_name} does not fit {name}: {checkpoint.SAVE_AGAIN} in bf16.")
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise LoadError(
            f"{scale_name} in {found.tensors[scale_name].file} has values that are not positive, and so no scales: "
            f"{checkpoint.SAVE_AGAIN} in bf16."
        )
    spread = scale.float().reshape(*scale.shape, *(1 for _ in range(codes.ndim - scale.ndim)))
    if scale.numel() == 1:
        return codes.float() * scale.float().reshape(())
    for dimension, (block, side) in enumerate(zip(blocks, codes.shape, strict=True)):
        if spread.shape[dimension] not in (1, side) or (block > 1 and spread.shape[dimension] > 1):
            spread = spread.repeat_interleave(block, dimension).narrow(dimension, 0, side)
    return codes.float() * spread


def _require_finite(value: Tensor, name: str, file: Path) -> None:
    # Least and greatest are NaN where any value is, and take a fortieth of `isfinite` on a CPU.
    if value.numel() and not all(bool(end.isfinite()) for end in value.aminmax()):
        raise LoadError(
            f"{name} in {file} has values that are not finite in "
            f"{REFERENCE if value.dtype == torch.bfloat16 else 'fp32'} (NaN or infinite): copy the file again, or give "
            "a checkpoint whose weights are numbers."
        )


def _from_transformers(kind: str, chosen: Checkpoint, part: str, device: torch.device) -> nn.Module:
    """A text encoder, read by transformers, which knows under which names its older versions stored one."""
    folder = chosen.folder / part
    found = checkpoint.component(folder, "transformers", chosen.remedy)
    # device_map reads each weight straight to the device instead of by way of the host.
    where = {} if device.type == "cpu" else {"device_map": {"": device}}
    with _made_of(folder):
        module, read = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=torch.bfloat16,
            local_files_only=True,
            variant=found.variant,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    _require_all_read(found, read)
    for name, tensor in _stored_tensors(module).items():
        if tensor.is_floating_point():
            at = next((s.file for key, s in found.tensors.items() if key.endswith(name) or name.endswith(key)), folder)
            _require_finite(tensor.to(torch.bfloat16), name, at)
    for parameter in module.parameters():  # not the buffers: rotary frequencies are computed, and stay in fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    return module


def _require_read(kind: str, found: Component) -> None:
    """See by names and shapes alone that transformers finds all of a text encoder in its files."""
    if found.scales:
        raise LoadError(
            f"{found.folder} holds scaled fp8 weights, which are read for denoisers alone: give it in bf16."
        )
    cls = getattr(transformers, kind)
    with _made_of(found.folder / "config.json"):
        empty = {
            name: torch.empty(stored.shape, dtype=torch.bfloat16, device="meta")
            for name, stored in found.tensors.items()
        }
        _, read = cls.from_pretrained(
            None,
            config=cls.config_class.from_pretrained(found.folder),
            state_dict=empty,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _require_all_read(found, read)


def _require_all_read(found: Component, read: Mapping[str, Any]) -> None:
    """Refuse what transformers would make up, leave out or cut.

    Args:
        read: what `from_pretrained` found, with `output_loading_info`.
    """
    file = sorted({stored.file for stored in found.tensors.values()})[0]
    if missing := sorted(read["missing_keys"]):
        raise LoadError(
            f"{file} lacks {missing[0]}{checkpoint.more(missing)}: copy it again, or {checkpoint.SAVE_AGAIN}."
        )
    if mismatched := sorted(read["mismatched_keys"], key=str):
        name, its, wanted = mismatched[0]
        raise LoadError(
            f"{name} in {file} is of shape {list(its)}, and the model's of {list(wanted)}: give the weights that "
            "belong to the configuration beside them."
        )
    if extra := sorted(read["unexpected_keys"]):
        raise LoadError(
            f"{file} holds {extra[0]}{checkpoint.more(extra)}, which the model has not: {checkpoint.SAVE_AGAIN}."
        )


def _check_vocabularies(shared: Mapping[str, Any], folder: Path) -> None:
    """Refuse a tokenizer with more tokens than its text encoder has embeddings: an index beyond them ends a GPU's
    process."""
    for part, encoder in shared.items():
        if not part.startswith("text_encoder"):
            continue
        tokenizer = shared[part.replace("text_encoder", "tokenizer")]
        rows = encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise LoadError(
                f"The tokenizer of {folder / part} has {len(tokenizer)} tokens and the encoder embeddings for {rows}: "
                "give the tokenizer that belongs to it."
            )


@contextmanager
def _in(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _random(device: torch.device, seed: int = 0) -> Callable[[str, Tensor], Tensor]:
    """Makes tensors on the device: ones for the scales of norms, zeros for biases, and for the rest normal values of
    variance 1/fan-in, which neither grow nor shrink from layer to layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(name: str, empty: Tensor) -> Tensor:
        value = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        if name.endswith("bias"):
            return value.zero_()
        if empty.ndim <= 1:
            return value.fill_(1)
        return value.normal_(std=(empty.shape[0] / empty.numel()) ** 0.5, generator=generator)

    return make


def _tokenizer(kind: str, folder: Path, random: bool) -> PreTrainedTokenizerBase:
    # assets/configs has no vocabularies; its stand-ins, which split at words, need no class of their own.
    # Of a processor only the tokenizer is called: no picture is given with a prompt.
    own = kind if "Tokenizer" in kind else "AutoTokenizer"
    cls = getattr(transformers, "PreTrainedTokenizerFast" if random else own, None)
    if cls is None:
        raise LoadError(f"{folder} needs the tokenizer {kind}, which transformers has not: {checkpoint.SAVE_AGAIN}.")
    with _made_of(folder):
        return cls.from_pretrained(folder, local_files_only=True)
