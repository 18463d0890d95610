"""Weights into memory: a bundled checkpoint becomes one bf16 pipeline, or one more denoiser for another precision.

Text encoders, tokenizers and VAE are loaded once a model and shared by all its precisions. Knows nothing of
precisions or of what else is in memory.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from engine.catalog import ModelSpec
from engine.errors import LoadError

_RESTORE = "restore it, for example with git checkout"


def load_pipeline(spec: ModelSpec, device: torch.device) -> DiffusionPipeline:
    """The model's pipeline in bf16 on `device`, ready to be called.

    Raises:
        LoadError: a file is missing or cut short; the sentence names it.
    """
    check(spec)
    pipeline = getattr(diffusers, spec.pipeline).from_pretrained(
        spec.folder, dtype=torch.bfloat16, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    # Convolutions in channels_last decode twice as fast on CPUs and no slower on GPUs; the VAE is every precision's.
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.transformer.set_attention_backend("native")
    return pipeline.to(device)


def load_transformer(spec: ModelSpec, device: torch.device) -> torch.nn.Module:
    """One more bf16 denoiser of the model on `device`, to be quantized.

    Raises:
        LoadError: a file is missing or cut short; the sentence names it.
    """
    check(spec)
    transformer = transformer_class(spec).from_pretrained(
        spec.folder, subfolder="transformer", dtype=torch.bfloat16, local_files_only=True
    )
    transformer.set_attention_backend("native")
    return transformer.eval().to(device)


def empty_transformer(spec: ModelSpec) -> torch.nn.Module:
    """The model's denoiser on the meta device: names and shapes without weights.

    Raises:
        LoadError: its configuration is missing.
    """
    kind = transformer_class(spec)
    config = _json(spec.folder / "transformer" / "config.json")
    with torch.device("meta"):
        return kind.from_config(config).to(torch.bfloat16)


def transformer_class(spec: ModelSpec) -> type:
    """The diffusers class of the model's denoiser, as its checkpoint names it.

    Raises:
        LoadError: the checkpoint's index is missing or damaged.
    """
    return getattr(diffusers, _parts(spec)["transformer"][1])


def check(spec: ModelSpec) -> None:
    """Every file the checkpoint needs is there, and the weights are whole, told from the headers alone.

    Raises:
        LoadError: names the first file that is missing, damaged or cut short.
    """
    for part, (library, kind) in _parts(spec).items():
        folder = spec.folder / part
        if "Tokenizer" in kind:
            _json(folder / "tokenizer_config.json")
            _json(folder / "tokenizer.json")
            continue
        if "Scheduler" in kind:
            _json(folder / "scheduler_config.json")
            continue
        _json(folder / "config.json")
        files = {file for index in folder.glob("*.index.json") for file in _json(index)["weight_map"].values()}
        whole = "model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors"
        for name in sorted(files or {whole}):
            _check_weights(folder / name)


def fingerprint(spec: ModelSpec) -> str:
    """Hexadecimal digest of all the model's weights: a figure kept for one checkpoint must not serve another."""
    digest = hashlib.sha256()
    for file in sorted(spec.folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _parts(spec: ModelSpec) -> dict[str, tuple[str, str]]:
    """The checkpoint's components: name -> (library, class name); those it does without are left out."""
    index = _json(spec.folder / "model_index.json")
    return {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}


def _json(file: Path) -> dict:
    if not file.is_file():
        raise LoadError(f"The file {file} is missing: {_RESTORE}.")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise LoadError(f"The file {file} is damaged: {_RESTORE}.") from error


def _check_weights(file: Path) -> None:
    """A safetensors file says in its header where its last tensor ends (its specification's "data_offsets")."""
    if not file.is_file():
        raise LoadError(f"The weights file {file} is missing: {_RESTORE}.")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise LoadError(f"The weights file {file} is damaged: {_RESTORE}.") from error
    if size < needed:
        raise LoadError(f"The weights file {file} is cut short ({size} of {needed} bytes): {_RESTORE}.")
