"""What a public page does not make: prompts and outputs of real models pass classifiers that others have trained.

Prompts are read by a text classifier before anything runs, pictures and frames of clips by an image classifier before
anything is written. Both come from the Hugging Face hub, under Apache-2.0, and run on the CPU outside every clock:
https://huggingface.co/eliasalbouzidi/distilbert-nsfw-text-classifier, https://huggingface.co/Falconsai/nsfw_image_detection.
The miniatures, which know emoji alone, are not filtered. No filter catches everything.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.catalog import ModelSpec
from engine.environment import switch
from engine.errors import LoadError, RefusedError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Pipeline

log = logging.getLogger(__name__)

UNSAFE = ("nsfw", "unsafe")
"""A label with one of these in it is what the filter looks for."""
PIECE = 800
"""Characters of a prompt that are read at once, each twice: such classifiers cut off what is beyond 512 tokens."""
FRAMES = 16
"""Of a clip, at equal distances."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Whether and by what real models are filtered. Classifiers are repositories with "@revision", or folders."""

    on: bool = False
    public: bool = False
    """Strangers can reach the app."""
    prompts: str = "eliasalbouzidi/distilbert-nsfw-text-classifier@5239d30a64ac026607b910571dd0a28c562e1834"
    pictures: str = "Falconsai/nsfw_image_detection@63e0a066bb08d2ae47324b540fba3adfd4536569"
    threshold: float = 0.5
    """The score from which on something is stopped."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], public: bool) -> Filter:
        """TWINFRAME_FILTER: "on", "off", or by default on where the app is public; TWINFRAME_FILTER_PROMPTS and
        TWINFRAME_FILTER_PICTURES choose other classifiers.

        Raises:
            RequestError: TWINFRAME_FILTER is neither.
        """
        chosen = cls(
            on=switch(environment, "TWINFRAME_FILTER", default=public),
            public=public,
            prompts=environment.get("TWINFRAME_FILTER_PROMPTS") or cls.prompts,
            pictures=environment.get("TWINFRAME_FILTER_PICTURES") or cls.pictures,
        )
        if public and not chosen.on:
            log.warning("the app is public and no safety filter is on")
        return chosen

    def applies(self, spec: ModelSpec) -> bool:
        """Whether this model is filtered; the bundled miniatures can draw nothing that has to be."""
        return self.on and not spec.bundled

    def about(self, spec: ModelSpec) -> str:
        """What a visitor should know of it, in a sentence; empty where there is nothing to know."""
        if self.applies(spec):
            prompts, pictures = (model.partition("@")[0] for model in (self.prompts, self.pictures))
            return f"A safety filter checks prompts (by {prompts}) and what is made (by {pictures})."
        return "There is no safety filter here." if self.public and not spec.bundled else ""


NO_FILTER = Filter()


class Guard:
    """A filter at work; its classifiers are loaded when they are first needed."""

    def __init__(self, chosen: Filter):
        self._chosen = chosen

    def prompt(self, spec: ModelSpec, prompt: str) -> None:
        """Read a prompt before it is carried out.

        Raises:
            RefusedError: the filter stops it.
            LoadError: the classifier cannot be had, so nothing may run.
        """
        if not self._chosen.applies(spec):
            return
        for begin in range(0, len(prompt), PIECE // 2):
            (found,) = self._prompts([prompt[begin : begin + PIECE]], truncation=True)
            self._refuse(found, "The safety filter stopped this prompt: please ask for something else.", "prompt")

    def outputs(self, spec: ModelSpec, pixels: Tensor) -> None:
        """Look at what was made before anybody else does.

        Args:
            pixels: pictures, float (N, 3, H, W), or clips, (N, F, 3, H, W), in [0, 1].

        Raises:
            RefusedError, LoadError: as `prompt`.
        """
        if not self._chosen.applies(spec):
            return
        from torchvision.transforms.functional import to_pil_image

        if pixels.ndim == 5:
            pixels = pixels[:, :: -(-pixels.shape[1] // FRAMES)].flatten(0, 1)
        for picture in pixels:
            (found,) = self._pictures([to_pil_image(picture.float().clamp(0, 1).cpu())])
            self._refuse(found, "The safety filter stopped what was made: please try another prompt or seed.", "output")

    def _refuse(self, found: list[dict[str, Any]], sentence: str, what: str) -> None:
        score = max((one["score"] for one in found if _unsafe(one["label"])), default=0.0)
        if score >= self._chosen.threshold:
            log.info("the safety filter stopped a %s", what, extra={"score": round(score, 3)})
            raise RefusedError(sentence)

    @cached_property
    def _prompts(self) -> Pipeline:
        return self._loaded("text-classification", self._chosen.prompts)

    @cached_property
    def _pictures(self) -> Pipeline:
        return self._loaded("image-classification", self._chosen.pictures)

    def _loaded(self, task: str, model: str) -> Pipeline:
        from transformers import pipeline

        name, _, revision = model.partition("@")
        try:
            loaded = pipeline(
                task,
                model=name,
                revision=revision or None,
                device="cpu",
                top_k=None,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError) as error:  # what transformers raises for a model that cannot be had or used
            raise LoadError(
                f"The safety filter {name} cannot be had, so nothing is made: fetch it while online, choose another "
                "with TWINFRAME_FILTER_PROMPTS or TWINFRAME_FILTER_PICTURES, or set TWINFRAME_FILTER=off."
            ) from error
        if not any(map(_unsafe, loaded.model.config.id2label.values())):
            raise LoadError(f"The safety filter {name} has no label with {' or '.join(UNSAFE)} in it: choose another.")
        return loaded


def _unsafe(label: str) -> bool:
    return any(word in label.lower() for word in UNSAFE)
