"""Rough pictures of what is being denoised, for whoever waits: never in a run whose timing counts.

After every step a flow-matching sampler knows where it is and where it came from, hence where it is heading: with
x_(i+1) = x_i + (s_(i+1) - s_i) v, the picture that it now expects is x_(i+1) - s_(i+1) v. UniPC, whose steps bend,
keeps that itself. It is decoded by the model's own VAE, of a batch the first, of a clip its first frame, and no more
often than leaves four fifths of the time to the denoising.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from engine.catalog import ModelSpec
from engine.request import CompareRequest
from engine.weights import schedulers

SIDE = 256
"""Pixels of the longer side at most."""
SHARE = 0.2
"""Of the time, at most."""
QUALITY = 80
"""Of the JPEG: a preview is no result."""


class Previewer:
    """Previews of one pipeline call, from the latents after each of its steps.

    Args:
        pipeline: that is running; its VAE is used beside it, past any clock that is attached to it.
        clock: seconds.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        spec: ModelSpec,
        request: CompareRequest,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._pipeline, self._request, self._clock = pipeline, request, clock
        self._decode = DECODERS[spec.pipeline]
        self._before: Tensor | None = None
        self._free_from = 0.0

    def __call__(self, latents: Tensor, index: int) -> bytes | None:
        """A JPEG of what step `index`, from 0, expects in the end; None after the first step, or if it is too early.

        Args:
            latents: as the pipeline keeps them, mostly (N, tokens, channels); only read.
        """
        now, before = latents[:1].float().clone(), self._before
        self._before = now
        began = self._clock()
        if before is None or began < self._free_from:
            return None
        scheduler = self._pipeline.scheduler
        if schedulers.keeps_goals(scheduler):
            expected = scheduler.model_outputs[-1][:1]
        else:
            noise, less = scheduler.sigmas[index : index + 2].tolist()
            expected = now - less * (now - before) / (less - noise)
        drawn = _jpeg(self._decode(self._pipeline, expected.to(latents.dtype), self._request)[0])
        ended = self._clock()
        self._free_from = ended + (ended - began) * (1 / SHARE - 1)
        return drawn


def _jpeg(picture: Tensor) -> bytes:
    """Float (3, H, W) in [-1, 1] -> a JPEG of at most SIDE pixels a side."""
    scale = min(1.0, SIDE / max(picture.shape[-2:]))
    size = [max(1, round(side * scale)) for side in picture.shape[-2:]]
    small = F.interpolate(picture[None].float(), size, mode="area")[0]
    levels = ((small.nan_to_num(0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    encoded = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).save(encoded, format="JPEG", quality=QUALITY)
    return encoded.getvalue()


def _run(vae: torch.nn.Module, latents: Tensor, *args: object) -> Tensor:
    """The VAE's decoding, by its class: the object's own may be timed (engine/runtime/timing.py)."""
    return type(vae).decode(vae, latents.to(vae.dtype), *args, return_dict=False)[0]


def _z_image(pipeline: DiffusionPipeline, latents: Tensor, request: CompareRequest) -> Tensor:
    config = pipeline.vae.config
    return _run(pipeline.vae, latents / config.scaling_factor + config.shift_factor)


def _flux(pipeline: DiffusionPipeline, latents: Tensor, request: CompareRequest) -> Tensor:
    latents = pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)
    return _z_image(pipeline, latents, request)  # whose VAE is FLUX.1's


def _flux2(pipeline: DiffusionPipeline, latents: Tensor, request: CompareRequest) -> Tensor:
    height, width = (side // (2 * pipeline.vae_scale_factor) for side in (request.height, request.width))
    latents = latents.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    norm = pipeline.vae.bn
    deviation = (norm.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    latents = latents * deviation.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
    return _run(pipeline.vae, pipeline._unpatchify_latents(latents))


def _qwen_image(pipeline: DiffusionPipeline, latents: Tensor, request: CompareRequest) -> Tensor:
    latents = pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)
    return _of_frames(pipeline.vae, latents)  # of one


def _ltx2(pipeline: DiffusionPipeline, latents: Tensor, request: CompareRequest) -> Tensor:
    vae = pipeline.vae
    frames = (request.num_frames - 1) // pipeline.vae_temporal_compression_ratio + 1
    height, width = (side // pipeline.vae_spatial_compression_ratio for side in (request.height, request.width))
    patches = (pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size)
    latents = pipeline._unpack_latents(latents, frames, height, width, *patches)[:, :, :1]
    latents = pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    timestep = latents.new_zeros(1) if vae.config.timestep_conditioning else None
    return _run(vae, latents, timestep)[:, :, 0]


def _wan(pipeline: DiffusionPipeline, latents: Tensor, request: CompareRequest) -> Tensor:
    return _of_frames(pipeline.vae, latents[:, :, :1])


def _of_frames(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    mean, deviation = (
        latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return _run(vae, latents * deviation + mean)[:, :, 0]


DECODERS: dict[str, Callable[[DiffusionPipeline, Tensor, CompareRequest], Tensor]] = {
    "FluxPipeline": _flux,
    "Flux2KleinPipeline": _flux2,
    "Flux2Pipeline": _flux2,
    "ZImagePipeline": _z_image,
    "QwenImagePipeline": _qwen_image,
    "LTX2Pipeline": _ltx2,
    "WanPipeline": _wan,
}
"""Pipeline's class -> latents as it keeps them to pictures, (N, 3, H, W) in [-1, 1], as its own last lines do it."""
