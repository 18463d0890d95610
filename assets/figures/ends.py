"""Text encoding and decoding, the two ends of a call: what compiling gains there, and memory formats and tiling.

python -m assets.figures.ends OUT [--models flux.1-dev qwen-image ltx-2] [--further] [--device cuda]

Random weights, the post's sizes, one picture or clip. Eager and by blocks, as the engine compiles them
(engine/compiler/ends.py), with the seconds that each piece takes; with `--further` also whole components, channels last
and without tiles. OUT is written anew after every measurement; a variant that fails says why. Outputs are compared with
those of the components as diffusers loads them, uncompiled.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from engine import catalog
from engine.compiler import compilation, ends
from engine.environment import versions
from engine.quantization.capability import detect
from engine.request import CompareRequest
from engine.runtime import timing
from engine.weights import loading
from engine.weights.source import Source

CALLS = 7
Call = Callable[[], object]


class Measured:
    def __init__(self, out: Path, device: str, further: bool):
        self.out, self.device, self.further = out, torch.device(device), further
        self.cuda = self.device.type == "cuda"
        self.result = {"device": detect(self.device).name, "versions": versions(), "weights": "random", "rows": []}

    def model(self, name: str) -> None:
        spec = catalog.model(name)
        request = CompareRequest.create(spec.examples[0], model=name, precisions=["bf16"])
        began = time.monotonic()
        shared = loading.load_shared(spec, self.device, Source(random=not spec.bundled))
        pipeline = loading.assemble(spec, shared, loading.empty_transformer(spec))
        print(f"{name}: loaded in {time.monotonic() - began:.0f} s", flush=True)
        encode, decode = self.encoding(spec, pipeline, request), self.decoding(spec, pipeline, request)
        truth = {"text": self.row(spec, "text", "eager", encode), "decode": self.row(spec, "decode", "eager", decode)}
        self.blocks(spec, pipeline, {"text": encode, "decode": decode}, truth)
        if self.further:
            self.whole_text(spec, pipeline, encode, truth["text"])
            self.whole_vae(spec, pipeline, decode, truth["decode"])
        if spec.sound:
            self.sound(spec, pipeline, request)

    def encoding(self, spec: catalog.ModelSpec, pipeline: object, request: CompareRequest) -> Call:
        """Encodes the prompt as the pipeline does, with what connects text encoders to the denoiser."""
        length = spec.call["max_sequence_length"]
        encode = partial(pipeline.encode_prompt, request.prompt, device=self.device, max_sequence_length=length)
        if getattr(pipeline, "connectors", None) is None:
            return encode

        def connected() -> object:
            positive, mask, negative, negative_mask = encode()
            both = torch.cat([negative, positive]), torch.cat([negative_mask, mask])
            return pipeline.connectors(*both, padding_side=pipeline.tokenizer.padding_side)

        return connected

    def decoding(self, spec: catalog.ModelSpec, pipeline: object, request: CompareRequest) -> Call:
        """Decodes random latents."""
        vae, generator = pipeline.vae, torch.Generator("cpu").manual_seed(0)
        if spec.modality == "video":
            frames = (request.num_frames - 1) // pipeline.vae_temporal_compression_ratio + 1
            ratio = pipeline.vae_spatial_compression_ratio
            shape = (1, vae.config.latent_channels, frames, request.height // ratio, request.width // ratio)
        else:
            ratio = pipeline.vae_scale_factor
            channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
            shape = (1, channels, *([1] if _deep(vae) else []), request.height // ratio, request.width // ratio)
        latents = torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)
        more = (None,) if spec.modality == "video" else ()
        return lambda: vae.decode(latents, *more, return_dict=False)[0]

    def blocks(
        self, spec: catalog.ModelSpec, pipeline: object, calls: dict[str, Call], truth: dict[str, Tensor | None]
    ) -> None:
        """As the engine compiles them."""
        held, pieces = ends.Ends(pipeline.components), [timing.now(self.device)]
        try:
            held.compile(
                "",
                lambda: [call() for call in calls.values()],
                lambda: False,
                lambda *_: pieces.append(timing.now(self.device)),
            )
        except Exception as error:  # noqa: BLE001 (the others shall run)
            traceback.print_exc()
            self.result.setdefault("errors", {})[f"{spec.id} by blocks"] = f"{type(error).__name__}: {error}"[:500]
            return
        seconds = [after - before for before, after in pairwise([*pieces[1:], timing.now(self.device)])]
        held.use("")
        compiled = {"model": spec.id, "ends": held.used, "compile_s": sum(seconds), "pieces_s": seconds}
        self.result.setdefault("compiled", []).append(compiled)
        print(compiled, flush=True)
        for stage, call in calls.items():
            self.row(spec, stage, "by blocks", call, truth[stage])
        held.use(None)

    def whole_text(self, spec: catalog.ModelSpec, pipeline: object, encode: Call, truth: Tensor | None) -> None:
        encoders = [m for n, m in pipeline.components.items() if n.startswith("text_encoder") and m is not None]
        for encoder in encoders:
            encoder.compile(dynamic=False)
        self.row(spec, "text", "compiled", encode, truth)
        for encoder in encoders:
            encoder._compiled_call_impl = None

    def whole_vae(self, spec: catalog.ModelSpec, pipeline: object, decode: Call, truth: Tensor | None) -> None:
        vae = pipeline.vae
        last = torch.channels_last_3d if _deep(vae) else torch.channels_last
        for tiled in (True, False) if spec.vae_tiling else (False,):
            (vae.enable_tiling if tiled else vae.disable_tiling)()
            for kind, formatted in (("contiguous", torch.contiguous_format), ("channels last", last)):
                name = f"{kind}{', tiled' if tiled else ''}"
                _formatted(vae, formatted)
                self.row(spec, "decode", name, decode, truth)
                if not tiled:
                    vae.decoder.compile(dynamic=False)
                    self.row(spec, "decode", f"{name}, decoder compiled", decode, truth)
                    vae.decoder._compiled_call_impl = None
                torch.compiler.reset()

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


def _deep(vae: nn.Module) -> bool:
    return any(parameter.ndim == 5 for parameter in vae.parameters())


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
    parser.add_argument("--further", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    compilation.configure()
    measured = Measured(args.out, args.device, args.further)
    with torch.inference_mode():
        for name in args.models:
            torch.compiler.reset()
            timing.free(measured.device)
            try:
                measured.model(name)
            except Exception as error:  # noqa: BLE001 (the others shall run)
                traceback.print_exc()
                measured.result.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
