"""Which schedulers a checkpoint may bring: those of diffusers that step by flow matching and draw no noise themselves.

Pipelines hand a scheduler their own noise levels, and some schedulers make theirs themselves; `make` gives both kinds
so that they are called alike. Knows nothing of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin

from engine.errors import LoadError

EULER = "FlowMatchEulerDiscreteScheduler"
KNOWN = (
    EULER,
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)
"""Each is tested on a bundled model. The last two step by flow matching with `use_flow_sigmas`."""


def make(kind: str, config: Mapping[str, object], where: str) -> SchedulerMixin:
    """A scheduler of this class, as configured.

    Args:
        where: the file that names it, for the sentence.

    Raises:
        LoadError: no such class, or its steps are not those that flow-matching models take.
    """
    advice = f"name one of {', '.join(KNOWN)} in {where}"
    if kind not in KNOWN:
        what = "is none of diffusers'" if getattr(diffusers, kind, None) is None else "is not known to work here"
        raise LoadError(f"The scheduler {kind} {what}: {advice}.")
    if not kind.startswith("FlowMatch") and not config.get("use_flow_sigmas"):
        raise LoadError(f"The scheduler {kind} steps by flow matching only with use_flow_sigmas: {advice}.")
    if config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type", "")):
        raise LoadError(f"The scheduler {kind} is set to draw noise of its own, so no two runs are alike: {advice}.")
    try:
        scheduler = _callable(kind).from_config(dict(config))
        scheduler.set_timesteps(2, sigmas=np.array([1.0, 0.5]), mu=1.0)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ArithmeticError) as error:
        said = " ".join(str(error).split())[:200]
        raise LoadError(f"The scheduler {kind} cannot be used as it is configured ({said}): {advice}.") from error
    return type(scheduler).from_config(scheduler.config)


def timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> int:
    """How often a pipeline calls its denoiser's step: a scheduler of second order takes two for each but the last."""
    order: int = scheduler.order
    return num_inference_steps if order == 1 else order * num_inference_steps - 1


def is_euler(scheduler: SchedulerMixin) -> bool:
    """Whether it goes on straight from each step, so that its goal is known on the way."""
    return type(scheduler).__name__ == EULER


def keeps_goals(scheduler: SchedulerMixin) -> bool:
    """Whether it keeps what each step expects in the end, as the last of its `model_outputs`."""
    return type(scheduler).__name__ == "UniPCMultistepScheduler" and bool(scheduler.config.predict_x0)


@cache
def _callable(kind: str) -> type[SchedulerMixin]:
    """diffusers' class, taking the noise levels and the shift that pipelines give, if it can use them."""
    base = getattr(diffusers, kind)
    takes = set(inspect.signature(base.set_timesteps).parameters)
    if {"sigmas", "mu"} <= takes:
        return base

    def set_timesteps(
        self: SchedulerMixin,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        given = {name: value for name, value in (("sigmas", sigmas), ("mu", mu)) if name in takes}
        count = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        base.set_timesteps(self, count, device=device, **given)

    return type(kind, (base,), {"set_timesteps": set_timesteps, "__module__": base.__module__})
