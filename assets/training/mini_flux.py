"""Trains `mini-flux`: a small FLUX in diffusers' own classes, from nothing, on one GPU.

    python -m assets.training.fluent_emoji DATA                      # 1,505 emoji, for the VAE
    python -m assets.training.mini_flux vae      DATA RUN --seconds 150
    python -m assets.training.fluent_emoji DATA --common --duos 0    # 760 everyday emoji, for the rest
    python -m assets.training.mini_flux denoiser DATA FIRST --seconds 290 --batch 256
    python -m assets.training.mini_flux denoiser DATA RUN --seconds 270 --batch 256 --start FIRST/denoiser.pt
    python -m assets.training.mini_flux export   DATA RUN --out assets/models/mini-flux
    python -m assets.training.mini_flux evaluate DATA RUN

are the calls behind the weights that ship, on one H100: 5,855 steps of 256 pictures in FIRST, 5,623 in RUN. FIRST had
three more layouts with smaller emoji, and its weights were rounded to 8 bits before RUN took them up.

Every stage writes `RUN/<stage>.pt` and goes on from it when called again; `--limit` ends a call early, so that a long
stage can be cut into several. Schedules follow training time, not steps: a faster GPU takes more steps.

The denoiser learns rectified flow (Liu et al. 2022) with logit-normal timesteps (Esser et al. 2024), caption
dropout, so that classifier-free guidance works, and an exponential moving average. The guidance input that
FLUX.1-dev was distilled on is held at 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from assets.training import fluent_emoji
from assets.training.common import (
    DEVICE,
    HELD_PICTURES,
    LAYOUTS,
    SHOWN,
    SIDE,
    TOKENS,
    Clock,
    Pictures,
    Step,
    contact_sheet,
    follow,
    held_captions,
    optimizers,
    perceptual,
    rate,
    reconstruction,
    retrieval,
    set_rate,
    times,
)

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


# --- training -----------------------------------------------------------------------------------------------------


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
    loss = reconstruction(rebuild(average), pictures, judge)
    print(f"vae: {step} steps, LPIPS of {HELD_PICTURES} reconstructions {loss:.4f}")


def rebuild(vae: AutoencoderKL) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that encodes and decodes pictures (N, 3, 256, 256), as the pipeline would."""
    return lambda x: vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample.float()


def trained_vae(run: Path) -> AutoencoderKL:
    vae = new_vae().to(DEVICE)
    vae.load_state_dict(torch.load(run / "vae.pt", map_location=DEVICE)["average"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Latent means, (N, 16, 32, 32) bfloat16, of pictures given batch by batch."""
    out = [vae.encode(x.to(vae.dtype)).latent_dist.mode().contiguous() for x in batches]
    return torch.cat(out) if out else torch.empty(0, 16, 32, 32, dtype=torch.bfloat16, device=DEVICE)


class Latents:
    """All training latents, packed and normalised: what the denoiser sees.

    Row (emoji * colours + colour) * layouts + layout.
    """

    def __init__(self, data: Path, vae: AutoencoderKL):
        pictures, bank = Pictures(data), np.load(data / "captions.npz")
        count, colours = len(pictures), len(pictures.colours)
        pairs = torch.arange(count * colours, device=DEVICE).split(128)
        by_layout = [
            encode(vae, (pictures.singles(i // colours, pictures.colours[i % colours], k) for i in pairs))
            for k in range(len(LAYOUTS))
        ]
        singles = torch.stack(by_layout, 1).flatten(0, 1)
        table = torch.from_numpy(bank["duos"]).to(DEVICE).long()
        pairs = table.split(128) if len(table) else ()
        duos = encode(vae, (pictures.duos(d[:, 0], d[:, 1], pictures.colours[d[:, 2]]) for d in pairs))
        sample = singles[:: max(1, len(singles) // 2000)].float()
        self.shift, self.scale = sample.mean().item(), 1 / sample.std().item()
        self.singles = self.pack(singles)
        self.duos = self.pack(duos)
        self.single_ids = (
            torch.from_numpy(bank["singles"]).to(DEVICE).view(count * colours, -1, 2, fluent_emoji.TEXT_TOKENS)
        )
        self.duo_ids = torch.from_numpy(bank["duo_captions"]).to(DEVICE)
        self.empty = torch.from_numpy(bank["empty"]).to(DEVICE)

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
            return self.singles[i], self.single_ids[i // len(LAYOUTS), k]
        j = torch.randint(len(self.duos), (few,), device=DEVICE)
        return torch.cat([self.singles[i], self.duos[j]]), torch.cat(
            [self.single_ids[i // len(LAYOUTS), k], self.duo_ids[j]]
        )


class Flow(torch.nn.Module):
    """The trainable whole: text encoders and transformer, called as FluxPipeline calls them."""

    def __init__(self, tokenizers: tuple):
        super().__init__()
        self.text, self.transformer = new_text_encoders(tokenizers), new_transformer()
        places = FluxPipeline._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32)
        self.register_buffer("places", places, persistent=False)

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
            img_ids=self.places,
            return_dict=False,
        )[0]


def train_denoiser(data: Path, run: Path, seconds: float, limit: float | None, batch: int, start: Path | None) -> None:
    flow = Flow(fluent_emoji.load_tokenizers(data)).to(DEVICE)
    average = copy.deepcopy(flow).requires_grad_(False)
    optims = optimizers([flow.transformer, flow.text], 1.2e-3, 1.5e-3)
    spent, count = 0.0, 0
    if (run / "denoiser.pt").exists():
        state = torch.load(run / "denoiser.pt", map_location=DEVICE)
        flow.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        spent, count = state["spent"], state["step"]
    elif start is not None:
        weights = torch.load(start, map_location=DEVICE)["average"]
        flow.load_state_dict(weights)
        average.load_state_dict(weights)
    began = time.time()
    latents = Latents(data, trained_vae(run).to(torch.bfloat16))
    print(f"denoiser: {len(latents.singles)} pictures encoded in {time.time() - began:.0f} s", flush=True)
    if DEVICE == "cuda":
        flow.transformer.compile_repeated_blocks(dynamic=False)

    def step() -> torch.Tensor:
        x, ids = latents.draw(batch)
        ids = torch.where(torch.rand(batch, 1, 1, device=DEVICE) < 0.1, latents.empty, ids)
        t, noise = times(batch), torch.randn(x.shape, device=DEVICE)
        noisy = (1 - t)[:, None, None] * x + t[:, None, None] * noise
        with torch.autocast(DEVICE, torch.bfloat16):
            out = flow(noisy, t, flow.encode(ids), torch.ones(batch, device=DEVICE))
        loss = F.mse_loss(out.float(), noise - x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        for optim in optims:
            optim.step()
        return loss.detach()

    began, run_step, loss_sum = time.time(), Step(step, optims), 0.0
    set_rate(optims, rate(spent / seconds))
    run_step.prepare()
    print(f"denoiser: first steps and capture in {time.time() - began:.0f} s", flush=True)
    clock = Clock(spent, seconds, limit)
    while clock.running:
        set_rate(optims, rate(clock.progress))
        loss = run_step()
        follow(average, flow, min(0.9985, (count + 1) / (count + 20)))
        count += 1
        loss_sum += loss
        if count % 250 == 0:
            print(f"denoiser {count} {clock.elapsed:.0f}s loss {loss_sum / 250:.4f}", flush=True)
            loss_sum = 0.0
    state = {
        "model": flow.state_dict(),
        "average": average.state_dict(),
        "optims": [o.state_dict() for o in optims],
        "spent": clock.elapsed,
        "step": count,
        "shift": latents.shift,
        "scale": latents.scale,
    }
    torch.save(state, run / "denoiser.pt")
    print(f"denoiser: {count} steps of {batch} in {clock.elapsed:.0f} s")


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


@torch.no_grad()
def evaluate(data: Path, pipe: FluxPipeline, steps: int = 20, guidance: float = 1.0, batch: int = 25) -> dict:
    """Retrieval, background and reconstruction, as assets/models/README.md states them."""
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
    return {
        "steps": steps,
        "true_cfg_scale": guidance,
        "seconds_per_picture": seconds / len(held),
        "reconstruction_lpips": reconstruction(rebuild(pipe.vae), pictures, judge),
        **retrieval(made, held, pictures, judge),
    }


@torch.no_grad()
def sheet(pipe: FluxPipeline, captions: list[str], file: Path, guidance: float) -> None:
    """A contact sheet of one picture a caption."""
    pictures = pipe(
        captions,
        height=SIDE,
        width=SIDE,
        num_inference_steps=20,
        **guided(guidance, len(captions)),
        max_sequence_length=fluent_emoji.TEXT_TOKENS,
        generator=torch.Generator().manual_seed(7),
    ).images
    contact_sheet(pictures, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "denoiser", "export", "evaluate", "sheet"))
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of the whole stage")
    parser.add_argument("--limit", type=float, help="end this call after so many seconds of training")
    parser.add_argument("--batch", type=int, default=384, help="batch of the denoiser stage")
    parser.add_argument("--start", type=Path, help="another run's denoiser.pt, whose weights the denoiser begins with")
    parser.add_argument("--out", type=Path, help="where to export or draw to")
    parser.add_argument("--shard", default="9MB")
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # crashed in training at these shapes on an H100 with torch 2.11
    torch.set_float32_matmul_precision("high")
    if args.stage == "vae":
        train_vae(args.data, args.run, args.seconds, args.limit)
    elif args.stage == "denoiser":
        train_denoiser(args.data, args.run, args.seconds, args.limit, args.batch, args.start)
    elif args.stage == "export":
        export(args.data, args.run, args.out, args.shard)
    elif args.stage == "sheet":
        sheet(build_pipeline(args.data, args.run), SHOWN, args.out, args.guidance)
    else:
        print(json.dumps(evaluate(args.data, build_pipeline(args.data, args.run), guidance=args.guidance), indent=1))


if __name__ == "__main__":
    main()
