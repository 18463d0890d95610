"""What the trainings of the picture miniatures share: training pictures, optimizers, clock and measures.

Knows the emoji, their layouts and LPIPS; knows no model. Everything runs on the GPU if there is one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from assets.training import fluent_emoji

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE, DUO_SIDE = 256, 122
TOKENS = (SIDE // 16) ** 2
LAYOUTS = ((224, 16, 16), (192, 16, 16), (192, 16, 48), (192, 48, 16), (192, 48, 48))
"""Where an emoji stands on its picture: side, top and left edge in pixels. The seed decides which it becomes."""
HELD_PICTURES = 200


# --- pictures -------------------------------------------------------------------------------------------------------


class Pictures:
    """Emoji on backgrounds, composited on the device; pictures are float (N, 3, 256, 256) in [-1, 1]."""

    def __init__(self, data: Path):
        sides = {DUO_SIDE, *(side for side, _, _ in LAYOUTS)}
        self.sized = {s: torch.from_numpy(fluent_emoji.read_pictures(data, s)).to(DEVICE) for s in sides}
        self.colours = torch.tensor(list(fluent_emoji.COLOURS.values()), device=DEVICE, dtype=torch.float32) / 255

    def __len__(self) -> int:
        return len(self.sized[DUO_SIDE])

    def _paste(self, canvas: torch.Tensor, rgba: torch.Tensor, top: int, left: int) -> None:
        part = rgba.permute(0, 3, 1, 2).float() / 255  # premultiplied alpha
        side = part.shape[-1]
        window = canvas[:, :, top : top + side, left : left + side]
        window.mul_(1 - part[:, 3:]).add_(part[:, :3])

    def _canvas(self, colours: torch.Tensor) -> torch.Tensor:
        return colours[:, :, None, None].expand(-1, -1, SIDE, SIDE).clone()

    def singles(self, index: torch.Tensor, colours: torch.Tensor, layout: int = 0) -> torch.Tensor:
        """Emoji `index` (N,) on `colours` (N, 3), all in the same layout."""
        canvas, (side, top, left) = self._canvas(colours), LAYOUTS[layout]
        self._paste(canvas, self.sized[side][index], top, left)
        return canvas * 2 - 1

    def duos(self, left: torch.Tensor, right: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        canvas, top, gap = self._canvas(colours), (SIDE - DUO_SIDE) // 2, (SIDE - 2 * DUO_SIDE) // 4
        self._paste(canvas, self.sized[DUO_SIDE][left], top, gap)
        self._paste(canvas, self.sized[DUO_SIDE][right], top, SIDE - gap - DUO_SIDE)
        return canvas * 2 - 1


# --- training -------------------------------------------------------------------------------------------------------


class Clock:
    """Progress of a stage through its seconds of training, over any number of calls."""

    def __init__(self, spent: float, seconds: float, limit: float | None):
        self.spent, self.seconds, self.began = spent, seconds, time.time()
        self.limit = limit or math.inf

    def start(self) -> None:
        """Compiling is over: count from here."""
        self.began = time.time()

    @property
    def elapsed(self) -> float:
        return self.spent + time.time() - self.began

    @property
    def progress(self) -> float:
        return self.elapsed / self.seconds

    @property
    def running(self) -> bool:
        return self.progress < 1 and time.time() - self.began < self.limit


def rate(progress: float, warm: float = 0.02, hold: float = 0.55, least: float = 0.02) -> float:
    """Warm up, hold, then fall linearly."""
    if progress < warm:
        return progress / warm
    return 1.0 if progress < hold else max(least, (1 - progress) / (1 - hold))


def times(batch: int) -> torch.Tensor:
    """Logit-normal times, shifted as the sampler shifts them for 256 tokens (mu = 0.5)."""
    return torch.sigmoid(torch.randn(batch, device=DEVICE) + 0.5)


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of the parameters."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the update scaled to AdamW's (Liu et al. 2025), equal shapes in one batch.

    A convolution's kernels are taken as one matrix, a row for each output channel, as its authors do.
    torch.optim.Muon walks the matrices one by one: on an H100 that took longer than the model's own step.
    """

    def __init__(self, params: list, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                if p.grad is None:  # feeds nothing, as the text half of Qwen-Image's last block
                    continue
                shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, same in shapes.items():
                state = self.state[same[0]]
                grad = torch.stack([p.grad.flatten(1) for p in same])
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
                state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = orthogonalise(grad.lerp(state["momentum"], group["momentum"])).to(grad.dtype)
                scale = 0.2 * math.sqrt(max(grad.shape[1:])) * group["lr"]
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(same, list((update * scale).unflatten(2, shape[1:]).unbind()))


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices to (B, M, N) by Jordan's quintic Newton-Schulz iteration, in bfloat16."""
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, -4.7750 * gram + 2.0315 * gram @ gram, x, beta=3.4445)
    return x.mT if tall else x


def optimizers(modules: list[torch.nn.Module], muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the networks, AdamW for embeddings, vectors and the rest.

    Learning rates are tensors, so that a captured step follows the schedule.
    """
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            inner = parameter.ndim == 2 and not any(
                k in name for k in ("embed", "shared", "proj_out", "norm_out", "relative")
            )
            (matrices if inner else rest).append(parameter)
    gpu = DEVICE == "cuda"
    muon_rate, adam_rate = (torch.tensor(rate, device=DEVICE) for rate in (muon_rate, adam_rate))
    return [
        Muon(matrices, lr=muon_rate),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=gpu, capturable=gpu),
    ]


def set_rate(optims: list[torch.optim.Optimizer], scale: float) -> None:
    for optim in optims:
        for group in optim.param_groups:
            base = group.setdefault("base_lr", float(group["lr"]))
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(base * scale)
            else:
                group["lr"] = base * scale


class Step:
    """A training step that is captured into a CUDA graph after a few calls and then replayed.

    At these sizes launching the kernels takes longer than running them. `step` must draw its own batch on the device,
    and must leave nothing to the host: no synchronisation, no copies from it.
    """

    def __init__(self, step: Callable[[], torch.Tensor], optims: list[torch.optim.Optimizer]):
        self._step, self._optims = step, optims
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, warm: int = 4) -> None:
        """Run `warm` steps, which compiles what is to be compiled, then capture one (on a GPU)."""
        if DEVICE != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                self._forget()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._step()

    def __call__(self) -> torch.Tensor:
        """One step; its loss, a scalar that the next call overwrites."""
        if self._graph is None:
            self._forget()
            return self._step()
        self._graph.replay()
        torch.cuda.synchronize()  # or the host runs far ahead of the clock
        return self._loss

    def _forget(self) -> None:
        for optim in self._optims:
            optim.zero_grad(set_to_none=True)


# --- measures -------------------------------------------------------------------------------------------------------


def perceptual() -> torch.nn.Module:
    """LPIPS with AlexNet (Zhang et al. 2018), weights from assets/lpips."""
    import lpips
    from safetensors.torch import load_file

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = load_file(Path(__file__).parent.parent / "lpips" / "alexnet_features.safetensors")
    slices = {int(k.split(".")[1]): k.rsplit(".", 1)[0] for k in weights}
    for name, module in model.net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            layer = slices[int(name.rsplit(".", 1)[1])]
            module.weight.data.copy_(weights[f"{layer}.weight"])
            module.bias.data.copy_(weights[f"{layer}.bias"])
    return model.eval().requires_grad_(False).to(DEVICE)


def lpips_features(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Features whose squared Euclidean distance is LPIPS: (N, D) for pictures (N, 3, H, W) in [-1, 1]."""
    out = []
    for level, raw in enumerate(model.net.forward(model.scaling_layer(pictures))):
        unit = raw / (raw.square().sum(1, keepdim=True).sqrt() + 1e-10)
        weight = model.lins[level].model[-1].weight.clamp(min=0).sqrt()
        out.append((unit * weight / math.sqrt(raw.shape[-1] * raw.shape[-2])).flatten(1))
    return torch.cat(out, 1)


@torch.no_grad()
def reconstruction(
    rebuild: Callable[[torch.Tensor], torch.Tensor], pictures: Pictures, judge: torch.nn.Module
) -> float:
    """Mean LPIPS between 200 pictures, spread over emoji, colours and layouts, and what `rebuild` makes of them."""
    index = torch.linspace(0, len(pictures) - 1, HELD_PICTURES, device=DEVICE).long()
    colours = pictures.colours[torch.arange(HELD_PICTURES, device=DEVICE) % len(pictures.colours)]
    scores = []
    for layout in range(len(LAYOUTS)):
        rows = torch.arange(layout, HELD_PICTURES, len(LAYOUTS), device=DEVICE)
        x = pictures.singles(index[rows], colours[rows], layout)
        scores.append(judge(x, rebuild(x)).flatten())
    return torch.cat(scores).mean().item()


def held_captions(names: list[dict]) -> list[tuple[int, int, str]]:
    """200 fixed training captions: (emoji, colour, caption), spread over emoji and colours."""
    colours = list(fluent_emoji.COLOURS)
    picks = np.linspace(0, len(names) - 1, HELD_PICTURES).astype(int)
    return [
        (int(i), k % len(colours), fluent_emoji.canonical(names[i]["name"], colours[k % len(colours)]))
        for k, i in enumerate(picks)
    ]


@torch.no_grad()
def retrieval(made: torch.Tensor, held: list[tuple[int, int, str]], pictures: Pictures, judge: torch.nn.Module) -> dict:
    """How well pictures (N, 3, 256, 256) in [-1, 1] show what `held` asked for.

    Retrieval: the nearest neighbour, by LPIPS, of each generated picture among all training emoji, in every layout,
    composited on the same background; right if it is the emoji that was asked for, in whatever layout.
    Background: the palette colour nearest to the mean of the four 16x16 corners.

    Raises:
        ValueError: a picture is not finite; it would count as right, as no distance is smaller than NaN.
    """
    if not made.isfinite().all():
        raise ValueError("A picture holds NaN or infinity.")
    corners = torch.cat(
        [made[..., a, b] for a in (slice(0, 16), slice(-16, None)) for b in (slice(0, 16), slice(-16, None))], -1
    )
    seen = corners.mean((-1, -2)) / 2 + 0.5
    wanted = torch.tensor([c for _, c, _ in held], device=DEVICE)
    background = (torch.cdist(seen, pictures.colours).argmin(1) == wanted).float().mean().item()
    right = torch.tensor([i for i, _, _ in held], device=DEVICE)
    ranks = torch.empty(len(held), dtype=torch.long, device=DEVICE)
    for c in range(len(pictures.colours)):
        rows = (wanted == c).nonzero().flatten()
        mine = lpips_features(judge, made[rows])
        nearest = torch.full((len(rows), len(pictures)), math.inf, device=DEVICE)
        for index in torch.arange(len(pictures), device=DEVICE).split(100):
            for layout in range(len(LAYOUTS)):
                colour = pictures.colours[c].expand(len(index), -1)
                theirs = lpips_features(judge, pictures.singles(index, colour, layout))
                distance = mine.square().sum(1)[:, None] + theirs.square().sum(1)[None] - 2 * mine @ theirs.T
                nearest[:, index] = torch.minimum(nearest[:, index], distance)
        ranks[rows] = (nearest < nearest.gather(1, right[rows, None])).sum(1)
    return {
        "captions": len(held),
        "top1": (ranks < 1).float().mean().item(),
        "top5": (ranks < 5).float().mean().item(),
        "background": background,
        "missed": [held[i][2] for i in (ranks > 0).nonzero().flatten().tolist()],
    }


def contact_sheet(pictures: list[Image.Image], file: Path, columns: int = 8) -> None:
    rows = math.ceil(len(pictures) / columns)
    board = Image.new("RGB", (columns * SIDE, rows * SIDE), "white")
    for k, picture in enumerate(pictures):
        board.paste(picture, (k % columns * SIDE, k // columns * SIDE))
    board.save(file)


SHOWN = [
    "a rocket on a blue background",
    "a cat on a red background",
    "an octopus on a yellow background",
    "a pizza on a teal background",
    "a grinning face on a navy background",
    "a red heart",
    "a bicycle on a pink background",
    "a dog on a green background",
    "a woman firefighter on a grey background",
    "a cactus on an orange background",
    "a violin on a sky blue background",
    "a snowman on a purple background",
    "a cat next to a pizza on a blue background",
    "a rocket next to a banana on a black background",
    "a dog and a bicycle on a yellow background",
    "an apple beside a violin",
]
