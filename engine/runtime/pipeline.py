"""The real pipeline call: what it is given, how it is watched and stopped, and what it makes.

Nothing here is timed, and nothing is known of devices, precisions or where a pipeline comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine import events
from engine.catalog import ModelSpec
from engine.errors import CancelledRun
from engine.events import Stop, Tell
from engine.quantization.remedies import WeightOnlySteps
from engine.request import CompareRequest
from engine.runtime.previews import Previewer


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one pipeline call made."""

    pixels: Tensor
    """Pictures, float (N, 3, H, W), or clips, (N, F, 3, H, W), in [0, 1]; clips on the CPU."""
    audio: Tensor | None = None
    """Float (N, channels, samples) in [-1, 1], on the CPU; None without sound."""
    audio_rate: int = 0
    """Samples a second."""
    not_numbers: tuple[int, ...] = ()
    """For each picture or clip, how many of its values the model made NaN or infinite; they are 0 here, hence black.
    Empty stands for none anywhere."""

    def is_damaged(self, index: int) -> bool:
        """Whether picture or clip `index` has values that are not numbers, so that no distance to it means anything."""
        return bool(self.not_numbers) and self.not_numbers[index] > 0


class Progress:
    """The pipeline's `callback_on_step_end`: tells each step, with a preview if there is one, and stops the run when
    asked to."""

    def __init__(
        self,
        name: str,
        tell: Tell,
        stop: Stop,
        preview: Previewer | None = None,
    ):
        self._name, self._tell, self._stop, self._preview = name, tell, stop, preview
        self._first: datetime | None = None

    def check(self) -> None:
        """Raises CancelledRun if nobody wants the run any more."""
        if self._stop():
            raise CancelledRun

    def __call__(
        self, pipeline: DiffusionPipeline, index: int, timestep: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
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
    prompts: Sequence[str] = (),
) -> BaseOutput:
    """The real pipeline call, and what it returns.

    Item i of a batch has the noise of seed + i, from a CPU generator, so that it can be made again alone and on any
    device.

    Args:
        steps: what leaves activations in bf16 in some of them.
        prompts: in place of the request's, one of each at once, all from the noise of `seed`.

    Raises:
        CancelledRun: `progress` said so.
    """
    if progress is not None:
        progress.check()

    def ended(pipeline: DiffusionPipeline, index: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if steps is not None:
            steps.ended(index + 1)
        return {} if progress is None else progress(pipeline, index, timestep, kwargs)

    count = len(prompts) or request.batch_size
    several = {name: [value] * count for name, value in spec.call.items() if prompts and name == "negative_prompt"}
    with steps or nullcontext():
        return pipeline(
            prompt=list(prompts) or request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(seed_of(seed, 0 if prompts else i)) for i in range(count)],
            output_type="pt",
            callback_on_step_end=None if progress is None and steps is None else ended,
            **{
                **spec.call,
                **several,
                **spec.clip(request.num_frames),
                spec.guidance_argument: request.guidance_scale,
                spec.batch_argument: 1 if prompts else request.batch_size,
            },
        )


def finished(pipeline: DiffusionPipeline, spec: ModelSpec, output: BaseOutput) -> Made:
    """A pipeline's output as pictures or clips, with every value a number, and how many were none."""
    # Clips leave the device, and those in bf16 stay in it: a batch of them in fp32 takes gigabytes.
    pixels = output.images.float() if spec.modality == "image" else output.frames.cpu()
    audio, audio_rate = None, 0
    if spec.sound:
        audio, audio_rate = output.audio.float().cpu(), pipeline.vocoder.config.output_sampling_rate
    lost = _lost(pixels)
    if audio is not None:
        lost = [seen + heard for seen, heard in zip(lost, _lost(audio), strict=True)]
    return Made(
        pixels=_numbers(pixels),
        audio=None if audio is None else _numbers(audio),
        audio_rate=audio_rate,
        not_numbers=tuple(lost),
    )


def _lost(values: Tensor) -> list[int]:
    """How many values of each item are NaN or infinite."""
    return (~values.isfinite()).flatten(1).sum(1).tolist()


def _numbers(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def token_ids(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> tuple[tuple[int, ...], ...]:
    """All that the pipeline's text encoders are given of a prompt: the ids of each of its tokenizers, cut where the
    pipeline cuts. Prompts of the same ids are the same prompt to the model.

    The model's own length is that of `spec.tokenizer`; another, as CLIP's beside T5 in FLUX, reads as far as it can. A
    template around the prompt is read in full and does not count (diffusers' `_get_qwen_prompt_embeds`).
    """
    found = []
    for name in sorted(name for name, part in pipeline.components.items() if isinstance(part, PreTrainedTokenizerBase)):
        tokenizer, text, length = getattr(pipeline, name), prompt, None
        if name == spec.tokenizer:
            length = spec.call["max_sequence_length"] + spec.template_tokens
            text = _templated(pipeline, spec, prompt)
        marked = spec.chat is None  # a chat's template has the marks of beginning and end itself
        found.append(tuple(tokenizer(text, truncation=True, max_length=length, add_special_tokens=marked).input_ids))
    return tuple(found)


def tokens(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> int:
    """How many tokens the prompt fills."""
    text = _templated(pipeline, spec, prompt)
    ids = getattr(pipeline, spec.tokenizer)(text, add_special_tokens=spec.chat is None).input_ids
    return len(ids) - spec.template_tokens


def _templated(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> str:
    """The prompt as the pipeline puts it to its tokenizer."""
    if spec.chat is not None:
        system = getattr(pipeline, "system_message", None)
        said = [{"role": "user", "content": prompt}]
        if system is not None:
            # Imported where it is used, as below: whole pipelines come with it, which most models do without.
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            said = format_input([prompt], system_message=system)[0]
        arguments = {"add_generation_prompt": True, **spec.chat}
        text: str = getattr(pipeline, spec.tokenizer).apply_chat_template(said, tokenize=False, **arguments)
        return text
    if spec.pipeline == "WanPipeline":
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        cleaned: str = prompt_clean(prompt)
        return cleaned
    return pipeline.prompt_template_encode.format(prompt) if spec.template_tokens else prompt


def read(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> str:
    """How much of the prompt the text encoder reads: pipelines cut what is too long without a word."""
    filled, limit = tokens(pipeline, spec, prompt), spec.call["max_sequence_length"]
    cut = f"; the last {filled - limit} were cut off" if filled > limit else ""
    return f"{filled} tokens, of at most {limit}{cut}"
