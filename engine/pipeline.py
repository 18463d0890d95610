"""The real pipeline call: what it is given, how it is watched and stopped, and what it makes.

Nothing here is timed, and nothing is known of devices, precisions or where a pipeline comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from engine import events
from engine.catalog import ModelSpec
from engine.errors import CancelledRun
from engine.previews import Previewer
from engine.remedies import WeightOnlySteps
from engine.request import CompareRequest


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one pipeline call made."""

    pixels: Tensor
    """Pictures, float (N, 3, H, W), or clips, (N, F, 3, H, W), in [0, 1]; clips on the CPU."""
    audio: Tensor | None = None
    """Float (N, channels, samples) in [-1, 1], on the CPU; None without sound."""
    audio_rate: int = 0
    """Samples a second."""
    not_numbers: int = 0
    """Values that the model made NaN; they are 0 here, hence black."""


class Progress:
    """The pipeline's `callback_on_step_end`: tells each step, with a preview if there is one, and stops the run when
    asked to."""

    def __init__(
        self,
        name: str,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
        preview: Previewer | None = None,
    ):
        self._name, self._tell, self._stop, self._preview = name, tell, stop, preview
        self._first: datetime | None = None

    def check(self) -> None:
        if self._stop():
            raise CancelledRun

    def __call__(self, pipeline: DiffusionPipeline, index: int, timestep: Tensor, kwargs: dict) -> dict:
        self.check()
        now, done, total = datetime.now(UTC), index + 1, pipeline.num_timesteps
        if self._first is None:
            self._first = now
        spent = (now - self._first).total_seconds()
        left = spent / index * (total - done) if index else None
        preview = self._preview(kwargs["latents"], index) if self._preview and done < total else None
        self._tell(events.Step(self._name, done, total, left, preview))
        return {}


def seed_of(seed: int, i: int) -> int:
    """The seed of picture or clip i of a batch; beyond the largest allowed seed it begins again at 0."""
    return (seed + i) % 2**32


def call(
    pipeline: DiffusionPipeline,
    spec: ModelSpec,
    request: CompareRequest,
    seed: int,
    progress: Progress | None = None,
    steps: WeightOnlySteps | None = None,
) -> object:
    """The real pipeline call, and what it returns.

    Item i of a batch has the noise of seed + i, from a CPU generator, so that it can be made again alone and on any
    device.

    Args:
        steps: what leaves activations in bf16 in some of them.

    Raises:
        CancelledRun: `progress` said so.
    """
    if progress is not None:
        progress.check()
    clip = {"num_frames": request.num_frames, "frame_rate": spec.defaults.frame_rate}

    def ended(pipeline: DiffusionPipeline, index: int, timestep: Tensor, kwargs: dict) -> dict:
        if steps is not None:
            steps.ended(index + 1)
        return {} if progress is None else progress(pipeline, index, timestep, kwargs)

    with steps or nullcontext():
        return pipeline(
            request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(seed_of(seed, i)) for i in range(request.batch_size)],
            output_type="pt",
            callback_on_step_end=None if progress is steps is None else ended,
            **{
                **spec.call,
                **(clip if spec.modality == "video" else {}),
                spec.guidance_argument: request.guidance_scale,
                spec.batch_argument: request.batch_size,
            },
        )


def finished(pipeline: DiffusionPipeline, spec: ModelSpec, output: object) -> Made:
    """A pipeline's output as pictures or clips, with every value a number."""
    if spec.modality == "image":
        pixels, audio, audio_rate = output.images.float(), None, 0
    else:
        # bf16 clips stay bf16 and leave the device: a batch of them in fp32 takes gigabytes.
        pixels, audio = output.frames.cpu(), output.audio.float().cpu()
        audio_rate = pipeline.vocoder.config.output_sampling_rate
    not_numbers = int(pixels.isnan().sum()) + (0 if audio is None else int(audio.isnan().sum()))
    return Made(
        pixels=pixels.nan_to_num(0),
        audio=None if audio is None else audio.nan_to_num(0),
        audio_rate=audio_rate,
        not_numbers=not_numbers,
    )


def tokens(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> int:
    """How many tokens the prompt fills."""
    if spec.template_tokens:
        prompt = pipeline.prompt_template_encode.format(prompt)
    return len(getattr(pipeline, spec.tokenizer)(prompt).input_ids) - spec.template_tokens


def read(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> str:
    """How much of the prompt the text encoder reads: pipelines cut what is too long without a word."""
    filled, limit = tokens(pipeline, spec, prompt), spec.call["max_sequence_length"]
    cut = f"; the last {filled - limit} were cut off" if filled > limit else ""
    return f"{filled} tokens, of at most {limit}{cut}"
