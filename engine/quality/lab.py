"""The bench of the quality lab: one model in bf16 beside variants of its denoiser, and the file of what was found.

engine/quality/sensitivity.py and engine/quality/tune.py work on it. Everything runs eagerly, from the same noise, at
batch 1. A score is written as soon as it is there, so that a run that is killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from engine.catalog import ModelSpec
from engine.environment import versions
from engine.errors import OutputError, RequestError, UnsupportedError, shown
from engine.files import write_whole
from engine.formats import NVFP4
from engine.metrics import distances
from engine.quality.prompts import PromptSet
from engine.quantization import capability, proof, recipes
from engine.quantization.recipes import Plan, Recipe
from engine.quantization.remedies import WeightOnlySteps
from engine.request import CompareRequest
from engine.runtime.pipeline import call, finished
from engine.weights import fingerprint, loading
from engine.weights.source import Source

FORMAT = 1
"""Of the file."""
PRECISION = NVFP4.id
"""Whose damage the lab looks into."""
Say = Callable[[str], None]


class Bench:
    """One model on one device. Use it under `engine.runtime.multi_device.driving`.

    Raises:
        UnsupportedError, LoadError: in one sentence.
    """

    def __init__(self, spec: ModelSpec, device: str, source: Source, say: Say):
        self.spec, self.source, self.say = spec, source, say
        self.device = capability.device_named(device)
        self.machine = proof.known(capability.detect(self.device))
        self.support = capability.supports(self.machine)
        self._shared = loading.load_shared(spec, self.device, source)
        self.exact = loading.load_transformer(spec, self.device, source)
        self._references: dict[str, Tensor] = {}

    def request(self, prompt: str) -> CompareRequest:
        """A prompt at the model's default settings.

        Raises:
            RequestError: the model does not take it.
        """
        return CompareRequest.create(prompt, model=self.spec.id, precisions=(PRECISION,), batch_size=1)

    def pipeline(self, transformer: nn.Module) -> DiffusionPipeline:
        """A pipeline with this denoiser around the components that all share."""
        return loading.assemble(self.spec, self._shared, transformer)

    def quantized(self, recipe: Recipe, name: str) -> tuple[nn.Module, Plan]:
        """A denoiser by any recipe, offered or not, verified.

        Raises:
            UnsupportedError: the machine cannot run the precision.
        """
        if self.support[name].execution == "unavailable":
            raise UnsupportedError(self.support[name].reason)
        plan = recipes.plan(self.exact, recipe, name)
        place = self.quantizer(plan)
        transformer = loading.load_transformer(self.spec, self.device, self.source, place=place)
        recipes.verify(transformer, plan)
        return transformer, plan

    def quantizer(self, plan: Plan) -> Callable[[str, nn.Module], None]:
        """`recipes.quantizer`, natively where that is proven."""
        self.machine = proof.prove(self.machine, self.device, plan.shapes)
        self.support = capability.supports(self.machine)
        return recipes.quantizer(plan, self.support[plan.precision])

    def make(
        self, transformer: nn.Module, prompt: str, weight_only_steps: tuple[int, int] = (0, 0), seed: int | None = None
    ) -> Tensor:
        """A picture (1, 3, H, W) or the frames of a clip (F, 3, H, W), float in [-1, 1], on the CPU; of the model's
        default seed unless another is given.

        Raises:
            UnsupportedError: its values are not numbers, so that nothing can be learnt from it.
        """
        return self.make_all(transformer, [prompt], weight_only_steps, seed)[0]

    def make_all(
        self,
        transformer: nn.Module,
        prompts: Sequence[str],
        weight_only_steps: tuple[int, int] = (0, 0),
        seed: int | None = None,
    ) -> list[Tensor]:
        """What `make` gives of each prompt, all made at once, each from the noise that it has alone.

        Raises:
            UnsupportedError: as `make`.
        """
        pipeline, request = self.pipeline(transformer), self.request(prompts[0])
        steps = WeightOnlySteps(transformer, weight_only_steps, request.num_inference_steps)
        seed = request.seed if seed is None else seed
        made = finished(pipeline, self.spec, call(pipeline, self.spec, request, seed, steps=steps, prompts=prompts))
        for index, prompt in enumerate(prompts):
            if made.is_damaged(index):
                raise self.not_numbers(prompt)
        pixels = made.pixels.cpu() * 2 - 1
        return [*(pixels.split(1) if self.spec.modality == "image" else pixels)]

    def not_numbers(self, prompt: str) -> UnsupportedError:
        """What to say where a search would go by values that are not numbers."""
        return UnsupportedError(
            f"{self.spec.name} makes values that are not numbers of {shown(prompt)}, so there is no score to search "
            "by: mend its weights, or choose another model or other prompts."
        )

    def reference(self, prompt: str) -> Tensor:
        """What bf16 makes of it, made once, while no layer of `exact` is changed."""
        if prompt not in self._references:
            self._references[prompt] = self.make(self.exact, prompt)
        return self._references[prompt]

    def lpips(self, transformer: nn.Module, prompt: str, weight_only_steps: tuple[int, int] = (0, 0)) -> float:
        """From the picture in bf16; of a clip the mean over its frames."""
        reference, made = self.reference(prompt), self.make(transformer, prompt, weight_only_steps)
        return distances.clip_distance(made, reference, self.device)[0].mean().item()


@contextmanager
def quantized_layers(transformer: nn.Module, names: Sequence[str], place: loading.Place) -> Iterator[None]:
    """The layers of these names quantized by `place`, and bf16 again afterwards."""
    layers = {name: transformer.get_submodule(name) for name in names}
    exact = {name: layer.weight for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            place(name, layer)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = exact[name]


def halves(prompts: PromptSet) -> tuple[list[str], list[str]]:
    """The prompts that choose, every other one from the first, and those that report.

    Raises:
        RequestError: there are not two.
    """
    texts = [prompt.text for prompt in prompts.prompts]
    if len(texts) < 2:
        raise RequestError(f"{prompts.name} has one prompt only: one half chooses and the other reports, so take more.")
    return texts[::2], texts[1::2]


class Quality:
    """The JSON file with what the lab knows of one model, written whole after every change.

    Raises:
        OutputError: it cannot be read or written, or holds what was found under other conditions; it stays as it is.
    """

    def __init__(self, file: Path, bench: Bench, prompts: PromptSet):
        self.file = file
        search, report = halves(prompts)
        asked = bench.request(search[0]).to_json()
        for text in (*search, *report):
            bench.request(text)
        conditions: dict[str, object] = {
            "format": FORMAT,
            "model": bench.spec.id,
            "device": bench.machine.name,
            "execution": bench.support[PRECISION].execution,
            "versions": versions(),
            "weights": loading.fingerprint(bench.spec, bench.source),
            "recipes": {
                name: fingerprint.of_recipe(recipes.recipe(bench.spec.family, name))
                for name in dict.fromkeys((bench.spec.recipes[0], "full"))
            },
            "settings": {k: v for k, v in asked.items() if k not in ("prompt", "precisions", "recipe", "model")},
            "prompts": {"source": prompts.name, "search": search, "report": report},
        }
        self.content: dict[str, Any] = conditions | {"date": _now(), "sensitivity": None, "scores": {}}
        if file.exists():
            self.content = self._held(conditions)
        file.parent.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, part: str) -> Any:
        return self.content.get(part)

    def put(self, **parts: object) -> None:
        """Replace parts of the file.

        Raises:
            OutputError: it cannot be written.
        """
        self.content |= parts | {"date": _now()}
        write_whole(self.file, (json.dumps(self.content, indent=1, ensure_ascii=False) + "\n").encode())

    def score(self, lane: str, prompts: Sequence[str], measure: Callable[[str], float], say: Say) -> list[float]:
        """The lane's LPIPS for each prompt, those measured that the file does not have."""
        known: dict[str, float] = self.content["scores"].setdefault(lane, {})
        for i, prompt in enumerate(prompts):
            if prompt not in known:
                known[prompt] = round(measure(prompt), 6)
                self.put()
                say(f"{lane}: {i + 1} of {len(prompts)}, LPIPS {known[prompt]:.4f}")
        return [known[prompt] for prompt in prompts]

    def _held(self, conditions: Mapping[str, object]) -> dict[str, Any]:
        try:
            content = json.loads(self.file.read_bytes())
            content["model"], content["scores"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{self.file} is damaged or no file of the lab: choose another; nothing was changed."
            ) from error
        # Of a file that an older version wrote, some conditions are not known: it is not gone on with either.
        for name, wanted in conditions.items():
            if (held := content.get(name)) != wanted:
                raise OutputError(
                    f"{self.file} holds what was found with other {name}{_which(name, held, wanted)}: choose another "
                    "file; nothing was changed."
                )
        return content


def _which(name: str, held: object, wanted: object) -> str:
    """What of it is another, in brackets, where that can be said in a few words."""
    if name == "weights" and isinstance(held, str) and isinstance(wanted, str):
        return f" ({fingerprint.changed(held, wanted)})"
    if name in ("versions", "settings", "recipes") and isinstance(held, dict) and isinstance(wanted, dict):
        other = [key for key in dict.fromkeys((*held, *wanted)) if held.get(key) != wanted.get(key)]
        return f" ({', '.join(other)})"
    return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
