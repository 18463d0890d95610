"""Trains `mini-flux`: a small FLUX in diffusers' own classes, from nothing, on one GPU.

    python -m assets.training.fluent_emoji DATA                      # 1,505 emoji, for the VAE
    python -m assets.training.mini_flux vae      DATA RUN --seconds 150
    python -m assets.training.fluent_emoji DATA --common --duos 0    # 760 everyday emoji, for the rest
    python -m assets.training.mini_flux denoiser DATA RUN --seconds 158 --batch 256
    python -m assets.training.mini_flux export   DATA RUN --out assets/models/mini-flux
    python -m assets.training.mini_flux evaluate DATA RUN

are the calls behind the weights that ship. Every stage writes `RUN/<stage>.pt` and goes on from it when called
again; `--limit` ends a call early, so that a long stage can be cut into several. Schedules follow training time,
not steps: a faster GPU takes more steps.

The denoiser learns rectified flow (Liu et al. 2022) with logit-normal timesteps (Esser et al. 2024), caption
dropout, so that classifier-free guidance works, and an exponential moving average. The guidance input that
FLUX.1-dev was distilled on is held at 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from assets.training import fluent_emoji

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE, EMOJI_SIDE, DUO_SIDE = 256, 224, 122
TOKENS = (SIDE // 16) ** 2
HELD_PICTURES = 200


# --- models -------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(48, 96, 192, 192),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=5,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def new_text_encoders(tokenizers: tuple) -> torch.nn.ModuleDict:
    clip, t5 = tokenizers
    return torch.nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(clip),
                    hidden_size=128,
                    intermediate_size=512,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=fluent_emoji.TEXT_TOKENS,
                    bos_token_id=clip.bos_token_id,
                    eos_token_id=clip.eos_token_id,
                    pad_token_id=clip.pad_token_id,
                    attention_dropout=0.0,
                )
            ),
            "text_encoder_2": T5EncoderModel(
                T5Config(
                    vocab_size=len(t5),
                    d_model=256,
                    d_kv=64,
                    d_ff=768,
                    num_layers=4,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                    dropout_rate=0.0,
                    relative_attention_num_buckets=32,
                    is_encoder_decoder=False,
                    use_cache=False,
                )
            ),
        }
    )


# --- pictures -----------------------------------------------------------------------------------------------------


class Pictures:
    """Emoji on backgrounds, composited on the device; pictures are float (N, 3, 256, 256) in [-1, 1]."""

    def __init__(self, data: Path):
        self.single = torch.from_numpy(fluent_emoji.read_pictures(data, EMOJI_SIDE)).to(DEVICE)
        self.half = torch.from_numpy(fluent_emoji.read_pictures(data, DUO_SIDE)).to(DEVICE)
        self.colours = torch.tensor(list(fluent_emoji.COLOURS.values()), device=DEVICE, dtype=torch.float32) / 255

    def __len__(self) -> int:
        return len(self.single)

    def _paste(self, canvas: torch.Tensor, rgba: torch.Tensor, top: int, left: int) -> None:
        part = rgba.permute(0, 3, 1, 2).float() / 255  # premultiplied alpha
        side = part.shape[-1]
        window = canvas[:, :, top : top + side, left : left + side]
        window.mul_(1 - part[:, 3:]).add_(part[:, :3])

    def _canvas(self, colours: torch.Tensor) -> torch.Tensor:
        return colours[:, :, None, None].expand(-1, -1, SIDE, SIDE).clone()

    def singles(self, index: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        canvas, margin = self._canvas(colours), (SIDE - EMOJI_SIDE) // 2
        self._paste(canvas, self.single[index], margin, margin)
        return canvas * 2 - 1

    def duos(self, left: torch.Tensor, right: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        canvas, top, gap = self._canvas(colours), (SIDE - DUO_SIDE) // 2, (SIDE - 2 * DUO_SIDE) // 4
        self._paste(canvas, self.half[left], top, gap)
        self._paste(canvas, self.half[right], top, SIDE - gap - DUO_SIDE)
        return canvas * 2 - 1


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


# --- training -----------------------------------------------------------------------------------------------------


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


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of the parameters."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the update scaled to AdamW's (Liu et al. 2025), equal shapes in one batch.

    torch.optim.Muon walks the matrices one by one: on an H100 that took longer than the model's own step.
    """

    def __init__(self, params: list, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, same in shapes.items():
                state = self.state[same[0]]
                grad = torch.stack([p.grad for p in same])
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
                state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = orthogonalise(grad.lerp(state["momentum"], group["momentum"]))
                scale = 0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(update.to(grad.dtype).unbind()), alpha=-scale)


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
    """Muon (Jordan et al. 2024) for the matrices inside the networks, AdamW for embeddings, vectors and the rest."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            inner = parameter.ndim == 2 and not any(
                k in name for k in ("embed", "shared", "proj_out", "norm_out", "relative")
            )
            (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr=muon_rate),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=DEVICE == "cuda"),
    ]


def set_rate(optims: list[torch.optim.Optimizer], scale: float) -> None:
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * scale


def train_vae(data: Path, run: Path, seconds: float, limit: float | None, batch: int = 32) -> None:
    pictures, judge = Pictures(data), perceptual()
    vae = new_vae().to(DEVICE)
    average = copy.deepcopy(vae)
    optim = torch.optim.AdamW(vae.parameters(), lr=4e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=DEVICE == "cuda")
    spent = 0.0
    if (run / "vae.pt").exists():
        state = torch.load(run / "vae.pt", map_location=DEVICE)
        vae.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optim.load_state_dict(state["optim"])
        spent = state["spent"]

    def loss_of(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(DEVICE, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        with torch.autocast(DEVICE, torch.bfloat16):
            p = judge(x, y).mean()
        kl = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        l1 = (x - y).abs().mean()
        return l1 + p + 1e-4 * kl, l1, p, kl

    step_of = loss_of  # eager: compiling took as long as it saved
    clock, step = Clock(spent, seconds, limit), 0
    while clock.running:
        index = torch.randint(len(pictures), (batch,), device=DEVICE)
        known = pictures.colours[torch.randint(len(pictures.colours), (batch,), device=DEVICE)]
        colours = torch.where(torch.rand(batch, 1, device=DEVICE) < 0.6, known, torch.rand(batch, 3, device=DEVICE))
        few = batch // 8
        x = torch.cat(
            [
                pictures.singles(index[few:], colours[few:]),
                pictures.duos(index[:few], index[:few].roll(1), colours[:few]),
            ]
        )
        set_rate([optim], rate(clock.progress))
        loss, *parts = step_of(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        follow(average, vae, min(0.998, (step + 1) / (step + 20)))
        if step == 2:
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            print(f"vae: first steps after {time.time() - clock.began:.0f} s", flush=True)
            clock.start()
        step += 1
        if step % 200 == 0:
            print(
                f"vae {step} {clock.elapsed:.0f}s l1 {parts[0]:.4f} lpips {parts[1]:.4f} kl {parts[2]:.2f}", flush=True
            )
    state = {
        "model": vae.state_dict(),
        "average": average.state_dict(),
        "optim": optim.state_dict(),
        "spent": clock.elapsed,
    }
    torch.save(state, run / "vae.pt")
    print(f"vae: {step} steps, LPIPS of {HELD_PICTURES} reconstructions {reconstruction(average, pictures, judge):.4f}")


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, pictures: Pictures, judge: torch.nn.Module) -> float:
    """Mean LPIPS between 200 emoji spread over the set, each on one of the colours, and their reconstructions."""
    index = torch.linspace(0, len(pictures) - 1, HELD_PICTURES, device=DEVICE).long()
    colours = pictures.colours[torch.arange(HELD_PICTURES, device=DEVICE) % len(pictures.colours)]
    scores = []
    for part in range(0, HELD_PICTURES, 20):
        x = pictures.singles(index[part : part + 20], colours[part : part + 20])
        y = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample.float()
        scores.append(judge(x, y).flatten())
    return torch.cat(scores).mean().item()


def trained_vae(run: Path) -> AutoencoderKL:
    vae = new_vae().to(DEVICE)
    vae.load_state_dict(torch.load(run / "vae.pt", map_location=DEVICE)["average"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, batches: list) -> torch.Tensor:
    """Latent means, (N, 16, 32, 32) bfloat16, of pictures made batch by batch."""
    out = []
    with torch.autocast(DEVICE, torch.bfloat16):
        for make in batches:
            out.append(vae.encode(make()).latent_dist.mode().to(torch.bfloat16))
    return torch.cat(out) if out else torch.empty(0, 16, 32, 32, dtype=torch.bfloat16, device=DEVICE)


class Latents:
    """All training latents, packed and normalised: what the denoiser sees."""

    def __init__(self, data: Path, run: Path):
        kept = run / "latents.pt"
        if kept.exists():
            self.__dict__.update(torch.load(kept, map_location=DEVICE))
            return
        pictures, bank, vae = Pictures(data), np.load(data / "captions.npz"), trained_vae(run)
        count, colours = len(pictures), len(pictures.colours)
        every = torch.arange(count * colours, device=DEVICE).split(128)
        singles = encode(
            vae, [lambda i=i: pictures.singles(i // colours, pictures.colours[i % colours]) for i in every]
        )
        table = torch.from_numpy(bank["duos"]).to(DEVICE).long()
        pairs = table.split(128) if len(table) else ()
        duos = encode(vae, [lambda d=d: pictures.duos(d[:, 0], d[:, 1], pictures.colours[d[:, 2]]) for d in pairs])
        sample = singles[:: max(1, len(singles) // 2000)].float()
        self.shift, self.scale = sample.mean().item(), 1 / sample.std().item()
        self.singles = self.pack(singles)
        self.duos = self.pack(duos)
        self.single_ids = (
            torch.from_numpy(bank["singles"]).to(DEVICE).view(count * colours, -1, 2, fluent_emoji.TEXT_TOKENS)
        )
        self.duo_ids = torch.from_numpy(bank["duo_captions"]).to(DEVICE)
        self.empty = torch.from_numpy(bank["empty"]).to(DEVICE)
        torch.save(self.__dict__, kept)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 16, 32, 32) -> (N, 256, 64), as FluxPipeline packs them."""
        n = latents.shape[0]
        latents = (latents - self.shift) * self.scale
        return latents.view(n, 16, 16, 2, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, TOKENS, 64)

    def draw(self, batch: int, duos: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch, 256, 64) and token ids (batch, 2, 32)."""
        few = int(batch * duos) if len(self.duos) else 0
        i = torch.randint(len(self.singles), (batch - few,), device=DEVICE)
        k = torch.randint(self.single_ids.shape[1], (batch - few,), device=DEVICE)
        if not few:
            return self.singles[i], self.single_ids[i, k]
        j = torch.randint(len(self.duos), (few,), device=DEVICE)
        return torch.cat([self.singles[i], self.duos[j]]), torch.cat([self.single_ids[i, k], self.duo_ids[j]])


class Flow(torch.nn.Module):
    """The trainable whole: text encoders and transformer, called as FluxPipeline calls them."""

    def __init__(self, tokenizers: tuple):
        super().__init__()
        self.text, self.transformer = new_text_encoders(tokenizers), new_transformer()

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (N, 2, 32) -> pooled (N, 128) and sequence (N, 32, 256) embeddings."""
        pooled = self.text["text_encoder"](ids[:, 0].long()).pooler_output
        return pooled, self.text["text_encoder_2"](ids[:, 1].long())[0]

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: tuple, guidance: torch.Tensor) -> torch.Tensor:
        pooled, sequence = text
        return self.transformer(
            hidden_states=x,
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(fluent_emoji.TEXT_TOKENS, 3, device=x.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 16, 16, x.device, torch.float32),
            return_dict=False,
        )[0]


def times(batch: int) -> torch.Tensor:
    """Logit-normal times, shifted as the sampler shifts them for 256 tokens (mu = 0.5)."""
    return torch.sigmoid(torch.randn(batch, device=DEVICE) + 0.5)


def train_denoiser(data: Path, run: Path, seconds: float, limit: float | None, batch: int) -> None:
    latents = Latents(data, run)
    flow = Flow(fluent_emoji.load_tokenizers(data)).to(DEVICE)
    average = copy.deepcopy(flow).requires_grad_(False)
    optims = optimizers([flow.transformer, flow.text], 1.2e-3, 1.5e-3)
    spent, step = 0.0, 0
    if (run / "denoiser.pt").exists():
        state = torch.load(run / "denoiser.pt", map_location=DEVICE)
        flow.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        spent, step = state["spent"], state["step"]
    if DEVICE == "cuda":
        flow.transformer.compile_repeated_blocks(dynamic=False)
    clock, first, loss_sum = Clock(spent, seconds, limit), step, 0.0
    while clock.running:
        x, ids = latents.draw(batch)
        ids = torch.where(torch.rand(batch, 1, 1, device=DEVICE) < 0.1, latents.empty, ids)
        t, noise = times(batch), torch.randn(x.shape, device=DEVICE)
        noisy = (1 - t)[:, None, None] * x + t[:, None, None] * noise
        set_rate(optims, rate(clock.progress))
        with torch.autocast(DEVICE, torch.bfloat16):
            out = flow(noisy, t, flow.encode(ids), torch.ones(batch, device=DEVICE))
        loss = F.mse_loss(out.float(), noise - x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        follow(average, flow, min(0.9985, (step + 1) / (step + 20)))
        if step == first + 3:
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            print(f"denoiser: first steps after {time.time() - clock.began:.0f} s", flush=True)
            clock.start()
        step += 1
        loss_sum += loss.detach()
        if step % 250 == 0:
            print(f"denoiser {step} {clock.elapsed:.0f}s loss {loss_sum / 250:.4f}", flush=True)
            loss_sum = 0.0
    state = {
        "model": flow.state_dict(),
        "average": average.state_dict(),
        "optims": [o.state_dict() for o in optims],
        "spent": clock.elapsed,
        "step": step,
        "shift": latents.shift,
        "scale": latents.scale,
    }
    torch.save({k.replace("._orig_mod", ""): v for k, v in state.items()}, run / "denoiser.pt")
    print(f"denoiser: {step} steps of {batch} in {clock.elapsed:.0f} s")


# --- the pipeline -------------------------------------------------------------------------------------------------


def build_pipeline(data: Path, run: Path, dtype: torch.dtype = torch.bfloat16) -> FluxPipeline:
    """The trained pipeline, in evaluation mode."""
    tokenizers = fluent_emoji.load_tokenizers(data)
    saved = torch.load(run / "denoiser.pt", map_location="cpu")
    flow = Flow(tokenizers)
    flow.load_state_dict(saved["average"])
    vae = trained_vae(run)
    vae.register_to_config(shift_factor=saved["shift"], scaling_factor=saved["scale"])
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
        vae=vae.to(dtype).eval(),
        transformer=flow.transformer.to(dtype).eval(),
        text_encoder=flow.text["text_encoder"].to(dtype).eval(),
        text_encoder_2=flow.text["text_encoder_2"].to(dtype).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
    ).to(DEVICE)


def guided(scale: float, batch: int) -> dict:
    """Classifier-free guidance against the empty caption."""
    return {"guidance_scale": 1.0, "true_cfg_scale": scale, "negative_prompt": [""] * batch}


def export(data: Path, run: Path, out: Path, shard: str = "9MB") -> None:
    build_pipeline(data, run).save_pretrained(out, max_shard_size=shard)


def held_captions(names: list[dict]) -> list[tuple[int, int, str]]:
    """200 fixed training captions: (emoji, colour, caption), spread over emoji and colours."""
    colours = list(fluent_emoji.COLOURS)
    picks = np.linspace(0, len(names) - 1, HELD_PICTURES).astype(int)
    return [
        (int(i), k % len(colours), fluent_emoji.canonical(names[i]["name"], colours[k % len(colours)]))
        for k, i in enumerate(picks)
    ]


@torch.no_grad()
def evaluate(data: Path, pipe: FluxPipeline, steps: int = 20, guidance: float = 1.0, batch: int = 25) -> dict:
    """Retrieval, background and reconstruction, as the README states them.

    Retrieval: the nearest neighbour, by LPIPS, of each generated picture among all training emoji composited on the
    same background. Background: the palette colour nearest to the mean of the four 16x16 corners.
    """
    pictures, judge = Pictures(data), perceptual()
    held = held_captions(json.loads((data / "names.json").read_text()))
    made, began = [], time.time()
    for part in range(0, len(held), batch):
        group = held[part : part + batch]
        noise = torch.cat([torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(i)) for i, _, _ in group])
        packed = FluxPipeline._pack_latents(noise, len(group), 16, 32, 32).to(DEVICE, pipe.dtype)
        result = pipe(
            [text for _, _, text in group],
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            **guided(guidance, len(group)),
            max_sequence_length=fluent_emoji.TEXT_TOKENS,
            latents=packed,
            output_type="pt",
        )
        made.append(result.images.float() * 2 - 1)
    made, seconds = torch.cat(made), time.time() - began
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
        distances = []
        for index in torch.arange(len(pictures), device=DEVICE).split(100):
            theirs = lpips_features(judge, pictures.singles(index, pictures.colours[c].expand(len(index), -1)))
            distances.append(mine.square().sum(1)[:, None] + theirs.square().sum(1)[None] - 2 * mine @ theirs.T)
        distance = torch.cat(distances, 1)
        ranks[rows] = (distance < distance.gather(1, right[rows, None])).sum(1)
    return {
        "captions": len(held),
        "steps": steps,
        "true_cfg_scale": guidance,
        "top1": (ranks < 1).float().mean().item(),
        "top5": (ranks < 5).float().mean().item(),
        "background": background,
        "reconstruction_lpips": reconstruction(pipe.vae, pictures, judge),
        "seconds_per_picture": seconds / len(held),
        "missed": [held[i][2] for i in (ranks > 0).nonzero().flatten().tolist()],
    }


@torch.no_grad()
def sheet(pipe: FluxPipeline, captions: list[str], file: Path, guidance: float, columns: int = 8) -> None:
    """A contact sheet of one picture a caption."""
    from PIL import Image

    pictures = pipe(
        captions,
        height=SIDE,
        width=SIDE,
        num_inference_steps=20,
        **guided(guidance, len(captions)),
        max_sequence_length=fluent_emoji.TEXT_TOKENS,
        generator=torch.Generator().manual_seed(7),
    ).images
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "denoiser", "export", "evaluate", "sheet"))
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of the whole stage")
    parser.add_argument("--limit", type=float, help="end this call after so many seconds of training")
    parser.add_argument("--batch", type=int, default=384, help="batch of the denoiser stage")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shard", default="9MB")
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # crashed in training at these shapes on an H100 with torch 2.11
    torch.set_float32_matmul_precision("high")
    if args.stage == "vae":
        train_vae(args.data, args.run, args.seconds, args.limit)
    elif args.stage == "denoiser":
        train_denoiser(args.data, args.run, args.seconds, args.limit, args.batch)
    elif args.stage == "export":
        export(args.data, args.run, args.out, args.shard)
    elif args.stage == "sheet":
        sheet(build_pipeline(args.data, args.run), SHOWN, args.out, args.guidance)
    else:
        print(json.dumps(evaluate(args.data, build_pipeline(args.data, args.run), guidance=args.guidance), indent=1))


if __name__ == "__main__":
    main()
