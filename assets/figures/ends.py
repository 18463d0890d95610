"""Text encoding and decoding, the two ends of a call: what memory formats, tiling and compiling gain there.

python -m assets.figures.ends OUT [--models flux.1-dev qwen-image ltx-2] [--device cuda]

Random weights, the post's sizes, one picture or clip. OUT is written anew after every measurement; a variant that fails
says why. Outputs are compared with those of the components as diffusers loads them, uncompiled.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from engine import catalog
from engine.compiler import compilation
from engine.environment import versions
from engine.quantization.capability import detect
from engine.request import CompareRequest
from engine.runtime import timing
from engine.weights import loading
from engine.weights.source import Source

CALLS = 7


class Ends:
    def __init__(self, out: Path, device: str):
        self.out, self.device = out, torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.result = {"device": detect(self.device).name, "versions": versions(), "weights": "random", "rows": []}

    def model(self, name: str) -> None:
        spec = catalog.model(name)
        request = CompareRequest.create(spec.examples[0], model=name, precisions=["bf16"])
        began = time.monotonic()
        shared = loading.load_shared(spec, self.device, Source(random=not spec.bundled))
        pipeline = loading.assemble(spec, shared, loading.empty_transformer(spec))
        print(f"{name}: loaded in {time.monotonic() - began:.0f} s", flush=True)
        self.text(spec, pipeline, request)
        self.decode(spec, pipeline, request)

    def text(self, spec: catalog.ModelSpec, pipeline: object, request: CompareRequest) -> None:
        length = spec.call["max_sequence_length"]
        encode = partial(pipeline.encode_prompt, request.prompt, device=self.device, max_sequence_length=length)
        truth = self.row(spec, "text", "eager", encode)
        encoders = [m for n, m in pipeline.components.items() if n.startswith("text_encoder") and m is not None]
        for encoder in encoders:
            encoder.compile(dynamic=False)
        self.row(spec, "text", "compiled", encode, truth)
        for encoder in encoders:
            encoder._compiled_call_impl = None

    def decode(self, spec: catalog.ModelSpec, pipeline: object, request: CompareRequest) -> None:
        vae, generator = pipeline.vae, torch.Generator("cpu").manual_seed(0)
        if spec.modality == "video":
            frames = (request.num_frames - 1) // pipeline.vae_temporal_compression_ratio + 1
            ratio = pipeline.vae_spatial_compression_ratio
            shape = (1, vae.config.latent_channels, frames, request.height // ratio, request.width // ratio)
            last = torch.channels_last_3d
        else:
            ratio = pipeline.vae_scale_factor
            channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
            deep = any(p.ndim == 5 for p in vae.parameters())
            shape = (1, channels, *([1] if deep else []), request.height // ratio, request.width // ratio)
            last = torch.channels_last_3d if deep else torch.channels_last
        latents = torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)
        more = (None,) if spec.modality == "video" else ()

        def run() -> Tensor:
            return vae.decode(latents, *more, return_dict=False)[0]

        truth = None
        tilings = (True, False) if spec.vae_tiling else (False,)
        for tiled in tilings:
            (vae.enable_tiling if tiled else vae.disable_tiling)()
            for kind, formatted in (("contiguous", torch.contiguous_format), ("channels last", last)):
                name = f"{kind}{', tiled' if tiled else ''}"
                _formatted(vae, formatted)
                made = self.row(spec, "decode", name, run, truth)
                truth = made if truth is None else truth
                if not tiled:
                    vae.decoder.compile(dynamic=False)
                    self.row(spec, "decode", f"{name}, decoder compiled", run, truth)
                    vae.decoder._compiled_call_impl = None
                torch.compiler.reset()
        if spec.modality == "video":
            self.sound(spec, pipeline, request)

    def sound(self, spec: catalog.ModelSpec, pipeline: object, request: CompareRequest) -> None:
        audio = pipeline.audio_vae
        seconds = request.num_frames / spec.defaults.frame_rate
        rate = pipeline.audio_sampling_rate / pipeline.audio_hop_length / pipeline.audio_vae_temporal_compression_ratio
        bins = audio.config.mel_bins // pipeline.audio_vae_mel_compression_ratio
        shape = (1, audio.config.latent_channels, round(seconds * rate), bins)
        latents = torch.randn(shape).to(self.device, torch.bfloat16)
        self.row(spec, "sound", "eager", lambda: pipeline.vocoder(audio.decode(latents, return_dict=False)[0]))

    def row(
        self, spec: catalog.ModelSpec, stage: str, variant: str, run: Callable[[], object], truth: Tensor | None = None
    ) -> Tensor | None:
        row = {"model": spec.id, "stage": stage, "variant": variant}
        made = None
        try:
            timing.free(self.device)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = timing.now(self.device)
            for _ in range(2):
                made = _first(run())
            row["first_calls_s"] = timing.now(self.device) - began
            if self.cuda:
                row["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / timing.GB
            found = []
            for _ in range(CALLS if self.cuda else 1):
                began = timing.now(self.device)
                run()
                found.append(1000 * (timing.now(self.device) - began))
            row |= {"ms": median(found), "calls_ms": found}
            if truth is not None:
                row["relative_l2"] = ((made.float() - truth.float()).norm() / truth.float().norm()).item()
        except Exception as error:  # noqa: BLE001 (the others shall run)
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        self.result["rows"].append(row)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "calls_ms"}, flush=True)
        return made


def _formatted(vae: nn.Module, memory_format: torch.memory_format) -> None:
    """Give the convolutions' weights this format; those with other dimensions keep theirs."""
    dims = 5 if memory_format is torch.channels_last_3d else 4
    for parameter in vae.parameters():
        if parameter.ndim == dims or memory_format is torch.contiguous_format:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _first(made: object) -> Tensor:
    while not isinstance(made, Tensor):
        made = made[0]
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["flux.1-dev", "qwen-image", "ltx-2"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    compilation.configure()
    ends = Ends(args.out, args.device)
    with torch.inference_mode():
        for name in args.models:
            torch.compiler.reset()
            timing.free(ends.device)
            try:
                ends.model(name)
            except Exception as error:  # noqa: BLE001 (the others shall run)
                traceback.print_exc()
                ends.result.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
