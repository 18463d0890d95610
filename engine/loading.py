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
    config = spec.folder / "transformer" / "config.json"
    if not config.is_file():
        raise LoadError(_gone(config))
    with torch.device("meta"):
        return kind.from_config(kind.load_config(config)).to(torch.bfloat16)


def transformer_class(spec: ModelSpec) -> type:
    """The diffusers class of the model's denoiser, as its checkpoint names it.

    Raises:
        LoadError: the checkpoint's index is missing.
    """
    index = spec.folder / "model_index.json"
    if not index.is_file():
        raise LoadError(_gone(index))
    return getattr(diffusers, json.loads(index.read_text())["transformer"][1])


def check(spec: ModelSpec) -> None:
    """Every weight file the checkpoint names is there and whole, told from the headers without reading the weights.

    Raises:
        LoadError: names the first file that is missing or cut short.
    """
    if not (spec.folder / "model_index.json").is_file():
        raise LoadError(_gone(spec.folder / "model_index.json"))
    for part, (library, _) in _parts(spec).items():
        folder = spec.folder / part
        if library is None or not (folder / "config.json").is_file():
            continue
        files = {
            f for index in folder.glob("*.index.json") for f in json.loads(index.read_text())["weight_map"].values()
        }
        for name in sorted(
            files or {"model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors"}
        ):
            _check_file(folder / name)


def fingerprint(spec: ModelSpec) -> str:
    """Hexadecimal digest of the denoiser's weights: a figure kept for one checkpoint must not serve another."""
    digest = hashlib.sha256()
    for file in sorted((spec.folder / "transformer").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _parts(spec: ModelSpec) -> dict[str, tuple]:
    index = json.loads((spec.folder / "model_index.json").read_text())
    return {name: tuple(value) for name, value in index.items() if isinstance(value, list)}


def _check_file(file: Path) -> None:
    """A safetensors file says in its header where its last tensor ends (its specification's "data_offsets")."""
    if not file.is_file():
        raise LoadError(_gone(file))
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            header = json.loads(stream.read(length)) if length < size else None
        except ValueError:
            header = None
    if header is None:
        raise LoadError(f"The weights file {file} is damaged: restore it, for example with git checkout.")
    needed = 8 + length + max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
    if size < needed:
        raise LoadError(
            f"The weights file {file} is cut short ({size} of {needed} bytes): restore it, for example with git "
            "checkout."
        )


def _gone(file: Path) -> str:
    return f"The file {file} is missing: restore it, for example with git checkout."
