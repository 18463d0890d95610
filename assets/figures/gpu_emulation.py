"""Does emulation on a GPU give what it gives on a CPU? `mini-flux` in bf16, MXFP8 and NVFP4 on both, in one process.

python -m assets.figures.gpu_emulation > assets/figures/gpu-emulation.json

Layers: every quantized layer gets, on the GPU, the input that it had on the CPU in one denoising step; outputs that
differ are counted. Pictures: LPIPS between the two devices' pictures of the same prompt and noise, eager and, on the
GPU, compiled as the page runs it. bf16 stands beside them: its own difference is what two devices always have.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from engine import catalog
from engine.columns import Column
from engine.compiler import compilation
from engine.environment import versions
from engine.metrics import distances
from engine.request import CompareRequest
from engine.runtime.pipeline import call, finished
from engine.runtime.residents import Rendition
from engine.runtime.studio import Studio

PROMPTS = (
    *("a rocket on a blue background", "a cat on a red background", "a snowman on a purple background"),
    *("an octopus on a yellow background", "a pizza on a teal background", "a cactus on an orange background"),
    *("a dog on a green background", "a violin on a sky blue background"),
)
PRECISIONS = ("bf16", "mxfp8", "nvfp4")


def layers(cpu: Rendition, gpu: Rendition, request: CompareRequest) -> dict:
    """Outputs of all quantized layers that differ between the devices on equal inputs."""
    seen: list[tuple[str, Tensor, Tensor]] = []
    quantized = {
        name: module
        for name, module in cpu.pipeline.transformer.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor
    }
    hooks = [
        module.register_forward_hook(lambda _, given, made, name=name: seen.append((name, given[0], made)))
        for name, module in quantized.items()
    ]
    call(cpu.pipeline, catalog.MINI_FLUX, replace(request, num_inference_steps=1), request.seed)
    for hook in hooks:
        hook.remove()
    outputs = differing = 0
    furthest = 0.0
    for name, given, made in seen:
        other = gpu.pipeline.transformer.get_submodule(name)(given.cuda()).cpu()
        outputs += made.numel()
        differing += int((made != other).sum())
        furthest = max(furthest, ((made.float() - other.float()).abs().max() / made.float().abs().max()).item())
    return {
        "layers": len(seen),
        "outputs": outputs,
        "differing": differing,
        "largest_difference_of_largest_output": furthest,
    }


def measure() -> dict:
    spec = catalog.MINI_FLUX
    cpu, gpu = Studio("cpu"), Studio("cuda")
    result: dict = {
        "devices": [cpu.machine.name, gpu.machine.name],
        "versions": versions(),
        "prompts": list(PROMPTS),
        "precisions": {},
    }
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for name in PRECISIONS:
            requests = [CompareRequest.create(prompt, model=spec.id, precisions=[name]) for prompt in PROMPTS]
            here = cpu.rendition(spec, Column.of(name, requests[0].recipe), lambda _: None)
            there = gpu.rendition(spec, Column.of(name, requests[0].recipe), lambda _: None)
            entry: dict = {"execution": {"cpu": here.support.execution, "gpu": there.support.execution}}
            if name != "bf16":
                entry["layers"] = layers(here, there, requests[0])
            scores: dict[str, list[float]] = {"eager": [], "compiled": []}
            for request in requests:
                pictures = []
                for rendition in (here, there):
                    rendition.blocks.use(compilation.EAGER)
                    output = call(rendition.pipeline, spec, request, request.seed)
                    pictures.append(finished(rendition.pipeline, spec, output).pixels.cpu() * 2 - 1)
                _, made = gpu.generate(there, spec, request, Path(folder), lambda _: None, lambda: False)
                for how, other in (("eager", pictures[1]), ("compiled", made.pixels.cpu() * 2 - 1)):
                    scores[how].append(distances.lpips_distance(pictures[0], other).item())
            entry["lpips"] = {how: {"mean": fmean(values), "each": values} for how, values in scores.items()}
            result["precisions"][name] = entry
    return result


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
