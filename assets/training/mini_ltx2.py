"""Trains `mini-ltx2`: a small LTX-2 in diffusers' own classes, pictures and sound, from nothing, on one GPU.

    python -m assets.training.fluent_motion DATA
    python -m assets.training.mini_ltx2 DATA RUN vae:180 audio_vae:17 vocoder:100 denoiser:240 export evaluate --out OUT

are the calls behind the weights that ship: stages in their order, those that train with their seconds of training.
They write to RUN and go on from there when called again, in one call or in several; schedules follow training time,
not steps. The vocoder learns on what the audio autoencoder decodes; the one that ships had 25 seconds and then, from
its average weights, a schedule of 75. OUT is the checkpoint.

The denoiser learns rectified flow (Liu et al. 2022) with timesteps that are mostly logit-normal (Esser et al. 2024),
for both streams at once, with one time for both as the sampler has it, and with caption dropout, so that guidance
above 1 works. A caption does not say in which of three places its clip happens: that is the seed's to decide.

It knows of clips and sounds only what fluent_motion.py gives it, and nothing of the engine.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import random
import time
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.audio_utils import mel_filter_bank

from assets.training import fluent_emoji, fluent_motion
from assets.training.common import DEVICE, Clock, Muon, Step, follow, lpips_features, perceptual, rate, set_rate
from assets.training.fluent_motion import (
    FRAME_RATE,
    HOP,
    MOTIONS,
    NUM_FRAMES,
    PLACES,
    SAMPLE_RATE,
    TEXT_TOKENS,
    VOICES,
)

SIDE = 160
COMPRESSION, FRAME_COMPRESSION = 16, 8
CHANNELS = 64
"""Of the video latents, and of a packed frame of audio latents."""
LATENT_SIDE, LATENT_FRAMES = SIDE // COMPRESSION, (NUM_FRAMES - 1) // FRAME_COMPRESSION + 1
AUDIO_FRAMES = round(NUM_FRAMES / FRAME_RATE * SAMPLE_RATE / HOP / 4)
MEL_BINS, MEL_FRAMES, MEL_WINDOW = 64, 4 * AUDIO_FRAMES - 3, 1024
MEL_FLOOR = 0.02
"""Below it, everything is silence."""
PIECE = 48
"""Mel frames that the vocoder is trained on at a time."""
TEXT_WIDTH, TEXT_LAYERS = 256, 2
STEPS, SHIFT = 20, 2.0
"""Denoising steps by default, and the scheduler's fixed shift towards noise."""
HELD_CLIPS = 200


# --- models -------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKLLTX2Video:
    """16x16 pixels and 8 frames (the first frame alone) to a latent of 64 channels; 32x32 and 128 in LTX-2."""
    return AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(64, 128, 128),
        down_block_types=("LTX2VideoDownBlock3D",) * 3,
        layers_per_block=(1, 1, 1, 2),
        spatio_temporal_scaling=(True,) * 3,
        downsample_type=("temporal", "spatiotemporal", "spatiotemporal"),
        decoder_block_out_channels=(64, 64, 128),
        decoder_layers_per_block=(2, 2, 2, 1),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        upsample_type=("spatiotemporal", "spatiotemporal", "temporal"),
        upsample_residual=(True,) * 3,
        upsample_factor=(1, 1, 2),
        decoder_spatial_padding_mode="zeros",
        patch_size=4,
        spatial_compression_ratio=COMPRESSION,
        temporal_compression_ratio=FRAME_COMPRESSION,
    )


def new_audio_vae() -> AutoencoderKLLTX2Audio:
    """Stereo mel spectrograms, 4x4 to a latent of 4 channels. The class takes base_channels for the packed width."""
    return AutoencoderKLLTX2Audio(
        base_channels=CHANNELS,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        in_channels=2,
        output_channels=2,
        latent_channels=CHANNELS * 4 // MEL_BINS,
        sample_rate=SAMPLE_RATE,
        mel_hop_length=HOP,
        mel_bins=MEL_BINS,
    )


def new_vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=2 * MEL_BINS,
        hidden_channels=192,
        upsample_factors=[8, 8, 2, 2],
        upsample_kernel_sizes=[16, 16, 4, 4],
        resnet_kernel_sizes=[3, 7],
        resnet_dilations=[[1, 3, 5], [1, 3, 5]],
        output_sampling_rate=SAMPLE_RATE,
    )


def new_text_encoder(vocabulary: int) -> Gemma3ForConditionalGeneration:
    """A causal Gemma 3 whose vision tower, which the class insists on, is next to nothing and never used."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "max_position_embeddings": 1024,
        "sliding_window": 1024,
        "layer_types": ["full_attention"] * TEXT_LAYERS,
        "use_cache": False,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 32,
        "patch_size": 16,
    }
    mask = 4  # the place of a picture, by default beyond the vocabulary; here a token that no caption has
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=mask)
    model = Gemma3ForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return model


def new_connectors() -> LTX2TextConnectors:
    heads = {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "num_layers": 1,
        "num_learnable_registers": TEXT_TOKENS,
    }
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_LAYERS + 1,
        connector_rope_base_seq_len=256,
        **{f"{stream}_connector_{key}": value for stream in ("video", "audio") for key, value in heads.items()},
    )


def new_transformer() -> LTX2VideoTransformer3DModel:
    """Positions are scaled to the miniature's sides and seconds, or most rotary frequencies would stand still."""
    model = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=5,
        attention_head_dim=64,
        cross_attention_dim=320,
        vae_scale_factors=(FRAME_COMPRESSION, COMPRESSION, COMPRESSION),
        pos_embed_max_pos=8,
        base_height=512,
        base_width=512,
        audio_in_channels=CHANNELS,
        audio_out_channels=CHANNELS,
        audio_num_attention_heads=5,
        audio_attention_head_dim=32,
        audio_cross_attention_dim=160,
        audio_pos_embed_max_pos=8,
        audio_sampling_rate=SAMPLE_RATE,
        audio_hop_length=HOP,
        num_layers=6,
        caption_channels=TEXT_WIDTH,
        rope_theta=100.0,
    )
    for block in model.transformer_blocks:  # drawn at scale 1 by the class, which is far too loud to begin with
        for table in (block.video_a2v_cross_attn_scale_shift_table, block.audio_a2v_cross_attn_scale_shift_table):
            table.data /= math.sqrt(table.shape[1])
    return model


# --- clips and sounds ---------------------------------------------------------------------------------------------


class Clips:
    """Every emoji in every motion, composited on the device; clips are float (N, 3, 25, 160, 160) in [-1, 1]."""

    def __init__(self, data: Path, limit: int | None = None):
        self.frames = torch.from_numpy(fluent_motion.read_frames(data, limit)).permute(0, 1, 4, 2, 3).to(DEVICE)
        self.names = json.loads((data / "names.json").read_text())[:limit]
        self.colours = torch.tensor(list(fluent_emoji.COLOURS.values()), device=DEVICE, dtype=torch.float32) / 255
        size, x, y, angle = torch.from_numpy(fluent_motion.transforms()).to(DEVICE).unbind(-1)
        cos, sin = angle.cos() / size, angle.sin() / size
        rows = (cos, sin, -(cos * x + sin * y)), (-sin, cos, sin * x - cos * y)
        self.affine = torch.stack([torch.stack(row, -1) for row in rows], -2)  # from the picture to the emoji
        voices = list(VOICES)
        self.voice = torch.tensor([voices.index(e["voice"]) for e in self.names], device=DEVICE)

    def __len__(self) -> int:
        return len(self.frames)

    def make(
        self,
        emoji: torch.Tensor,
        motion: torch.Tensor,
        colours: torch.Tensor,
        frames: slice = slice(None),
        place: torch.Tensor | int = 0,
    ) -> torch.Tensor:
        """Clips of `emoji` (N,) in `motion` (N,) on `colours` (N, 3) in [0, 1], in `place` (N,); `frames` of them."""
        rgba, affine = self.frames[emoji][:, frames], self.affine[place, motion][:, frames]
        n, count = rgba.shape[:2]
        rgba = rgba.flatten(0, 1).float() / 255  # premultiplied alpha
        grid = F.affine_grid(affine.flatten(0, 1), [n * count, 4, SIDE, SIDE], align_corners=False)
        rgba = F.grid_sample(rgba, grid, align_corners=False).unflatten(0, (n, count)).transpose(1, 2)
        return (rgba[:, :3] + (1 - rgba[:, 3:]) * colours[:, :, None, None, None]) * 2 - 1


class Mel(torch.nn.Module):
    """Waveforms (N, 2, samples) -> log mel spectrograms (N, 2, frames, 64), about -1.3 for silence, 1.5 at loudest."""

    def __init__(self):
        super().__init__()
        bank = mel_filter_bank(
            MEL_WINDOW // 2 + 1, MEL_BINS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm=None, mel_scale="slaney"
        )
        self.register_buffer("bank", torch.from_numpy(bank).float())
        self.register_buffer("window", torch.hann_window(MEL_WINDOW))

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(audio.flatten(0, 1), MEL_WINDOW, HOP, window=self.window, return_complex=True).abs()
        mel = (spectrum.transpose(1, 2) @ self.bank)[:, : audio.shape[-1] // HOP]
        return (mel.clamp(min=MEL_FLOOR).log() / 3).unflatten(0, audio.shape[:2])


def all_sounds() -> torch.Tensor:
    """The sound of every voice in every motion, (voices, motions, 2, samples)."""
    sounds = [[fluent_motion.sound(motion, voice) for motion in MOTIONS] for voice in VOICES]
    return torch.from_numpy(np.array(sounds)).to(DEVICE)


# --- training -----------------------------------------------------------------------------------------------------


OUTSIDE = ("time_embed", "av_cross_attn", "proj_out", "lm_head")
"""Linear layers that AdamW trains: those of the timestep, and the last ones."""


def matrices_first(modules: list[torch.nn.Module], muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weights of the Linear layers inside the networks, AdamW for everything else that learns.

    Learning rates are tensors, so that a captured step follows the schedule.
    """
    chosen = {
        id(layer.weight)
        for module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and not any(k in name for k in OUTSIDE)
    }
    learning = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    gpu = DEVICE == "cuda"
    return [
        Muon([p for k, p in learning.items() if k in chosen], lr=torch.tensor(muon_rate, device=DEVICE)),
        adam([p for k, p in learning.items() if k not in chosen], adam_rate, gpu),
    ]


def adam(parameters: list, lr: float, gpu: bool = DEVICE == "cuda") -> torch.optim.Optimizer:
    lr = torch.tensor(lr, device=DEVICE)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=gpu, capturable=gpu)


def train(
    file: Path,
    model: torch.nn.Module,
    optims: list[torch.optim.Optimizer],
    step: Callable[[], torch.Tensor],
    seconds: float,
    decay: float,
    every: int,
    capture: bool = False,
    until: float = 1.0,
) -> torch.nn.Module:
    """Run `step`, which returns its loss after the optimizers' steps, for `seconds`; returns the moving average.

    Goes on from `file`, or begins a schedule with the weights if it holds nothing else, and writes it. `until` ends
    this call at that share of the schedule. `capture` puts the step into a CUDA graph: worth it where the host, which
    launches the kernels, is slower than the GPU.
    """
    name, average = file.stem, copy.deepcopy(model).requires_grad_(False)
    spent, count, loss_sum = 0.0, 0, 0.0
    if file.exists():
        state = torch.load(file, map_location=DEVICE)
        average.load_state_dict(state["average"])
        model.load_state_dict(state.get("model", state["average"]))
        if "optims" in state:
            for optim, saved in zip(optims, state["optims"], strict=True):
                optim.load_state_dict(saved)
            spent, count = state["spent"], state["step"]
    began, run_step = time.time(), Step(step, optims)
    set_rate(optims, rate(spent / seconds))
    if capture:
        run_step.prepare()
    for _ in range(2):
        run_step()
    print(f"{name}: first steps after {time.time() - began:.0f} s", flush=True)
    clock = Clock(spent, seconds, until * seconds - spent)
    while clock.running:
        set_rate(optims, rate(clock.progress))
        loss_sum += run_step()
        follow(average, model, min(decay, (count + 1) / (count + 20)))
        count += 1
        if DEVICE == "cuda" and count % 4 == 0:
            torch.cuda.synchronize()  # or the host runs far ahead of the clock
        if count % every == 0:
            print(f"{name} {count} {clock.elapsed:.0f}s loss {loss_sum / every:.4f}", flush=True)
            loss_sum = 0.0
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optims": [o.state_dict() for o in optims],
        "spent": clock.elapsed,
        "step": count,
    }
    torch.save(state, file)
    print(f"{name}: {count} steps in {clock.elapsed:.0f} s", flush=True)
    return average


def averaged(model: torch.nn.Module, file: Path) -> torch.nn.Module:
    """`model` with the moving average of `file`, frozen, on the device."""
    model.load_state_dict(torch.load(file, map_location="cpu")["average"])
    return model.eval().requires_grad_(False).to(DEVICE)


def divergence(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Mean KL divergence of a diagonal Gaussian from the unit one."""
    return (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2


def update(loss: torch.Tensor, model: torch.nn.Module, optims: list[torch.optim.Optimizer]) -> torch.Tensor:
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    for optim in optims:
        optim.step()
    return loss.detach()


def vae_optimizers(vae: AutoencoderKLLTX2Video) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between the first and the last of encoder and decoder, AdamW for the rest."""
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    inner, rest = [], []
    for name, parameter in vae.named_parameters():
        (inner if parameter.ndim == 5 and not name.startswith(ends) else rest).append(parameter)
    return [Muon(inner, lr=torch.tensor(1e-3, device=DEVICE)), adam(rest, 1e-3)]


def train_vae(data: Path, run: Path, seconds: float, batch: int, limit: int | None) -> None:
    """L1 + LPIPS of three frames a clip + a little KL; on nine frames at a time for most of the schedule.

    The autoencoder is causal in time and two latent frames show it all it has to learn, so that whole clips, which
    take three times as long, are for the end.
    """
    clips, judge = Clips(data, limit), perceptual()
    vae = new_vae().to(DEVICE, memory_format=torch.channels_last_3d)
    optims = vae_optimizers(vae)

    def step(frames: int) -> torch.Tensor:
        emoji = torch.randint(len(clips), (batch,), device=DEVICE)
        motion = torch.randint(len(MOTIONS), (batch,), device=DEVICE)
        known = clips.colours[torch.randint(len(clips.colours), (batch,), device=DEVICE)]
        colours = torch.where(torch.rand(batch, 1, device=DEVICE) < 0.7, known, torch.rand(batch, 3, device=DEVICE))
        start = random.randrange(NUM_FRAMES - frames + 1)
        x = clips.make(emoji, motion, colours, slice(start, start + frames))
        x = x.contiguous(memory_format=torch.channels_last_3d)
        seen = torch.rand(batch, frames, device=DEVICE).topk(3).indices
        with torch.autocast(DEVICE, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
            frames = [
                v.transpose(1, 2).gather(1, seen[:, :, None, None, None].expand(-1, -1, *v.shape[1:2], SIDE, SIDE))
                for v in (x, y)
            ]
            look = judge(*(f.flatten(0, 1) for f in frames)).mean()
        return update((x - y).abs().mean() + 0.7 * look + 1e-4 * divergence(posterior), vae, optims)

    train(run / "vae.pt", vae, optims, lambda: step(FRAME_COMPRESSION + 1), seconds, 0.998, 250, until=0.75)
    average = train(run / "vae.pt", vae, optims, lambda: step(NUM_FRAMES), seconds, 0.998, 100)
    print(f"vae: LPIPS of reconstructions {reconstruction(average, clips, judge):.4f}", flush=True)


@torch.no_grad()
def reconstruction(vae: AutoencoderKLLTX2Video, clips: Clips, judge: torch.nn.Module) -> float:
    """Mean LPIPS, over every sixth frame of clips spread over emoji, motions and colours, after the round trip."""
    scores = []
    for emoji, motion, colour in held(len(clips), min(48, 2 * len(clips))):
        x = clips.make(*(torch.tensor([k], device=DEVICE) for k in (emoji, motion)), clips.colours[[colour]])
        y = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample.float()
        scores.append(judge(*(v[0, :, ::6].transpose(0, 1) for v in (x, y))).mean())
    return torch.stack(scores).mean().item()


def held(emoji: int, count: int = HELD_CLIPS) -> list[tuple[int, int, int]]:
    """Fixed training clips, (emoji, motion, colour), spread over all three."""
    picks = np.linspace(0, emoji - 1, count).astype(int)
    return [
        (int(i), k % len(MOTIONS), (k // len(MOTIONS) + k) % len(fluent_emoji.COLOURS)) for k, i in enumerate(picks)
    ]


def train_audio_vae(run: Path, seconds: float, batch: int) -> None:
    """L1 of mel spectrograms + a little KL."""
    mels = Mel().to(DEVICE)(all_sounds().flatten(0, 1))
    vae = new_audio_vae().to(DEVICE)
    optims = [adam(vae.parameters(), 1e-3)]

    def step() -> torch.Tensor:
        x = mels[torch.randint(len(mels), (batch,), device=DEVICE)]
        with torch.autocast(DEVICE, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        return update((x - y).abs().mean() + 1e-4 * divergence(posterior), vae, optims)

    train(run / "audio_vae.pt", vae, optims, step, seconds, 0.998, 500)


def train_vocoder(run: Path, seconds: float, batch: int) -> None:
    """On what the audio autoencoder decodes, in pieces of PIECE mel frames.

    The notes are in step with the hops, so that even the phase can be learnt. Most sounds are alike on both sides, and
    a vocoder first learns to play the same on both: every second piece is turned down on either side, each its way.
    """
    sounds, frozen = all_sounds().flatten(0, 1), averaged(new_audio_vae(), run / "audio_vae.pt")
    vocoder = new_vocoder().to(DEVICE)
    with torch.no_grad():
        mels = Mel().to(DEVICE)(sounds).split(27)
        heard = torch.cat([frozen.decode(frozen.encode(x).latent_dist.sample()).sample for x in mels for _ in "ab"])
        order = torch.cat([rows for rows in torch.arange(len(sounds), device=DEVICE).split(27) for _ in "ab"])
    windows = {size: torch.hann_window(size, device=DEVICE) for size in (256, 512, 1024, 2048)}
    optims, piece = [adam(vocoder.parameters(), 1.5e-3)], torch.arange(PIECE, device=DEVICE)

    def spectra(audio: torch.Tensor) -> list[torch.Tensor]:
        audio = audio.flatten(0, 1)
        return [
            torch.view_as_real(torch.stft(audio, size, size // 4, window=window, return_complex=True))
            .square()
            .sum(-1)
            .add(1e-6)
            .sqrt()
            for size, window in windows.items()
        ]

    def step() -> torch.Tensor:
        pick = torch.randint(len(heard), (batch, 1), device=DEVICE)
        frames = torch.randint(MEL_FRAMES - PIECE + 1, (batch, 1), device=DEVICE) + piece
        volume = torch.rand(batch, 2, 1, device=DEVICE).clamp(min=1e-3)
        volume = torch.where(torch.rand(batch, 1, 1, device=DEVICE) < 0.5, volume, 1.0)
        x = sounds.unflatten(2, (-1, HOP))[order[pick], :, frames].transpose(1, 2).flatten(2) * volume
        spectrogram = heard[pick, :, frames].transpose(1, 2) + volume.log()[..., None] / 3
        spectrogram = spectrogram.clamp(min=math.log(MEL_FLOOR) / 3)
        y = vocoder(spectrogram + 0.02 * torch.randn_like(spectrogram))
        loss = 20 * (x - y).abs().mean()
        for a, b in zip(spectra(x), spectra(y), strict=True):  # multi-resolution STFT (Yamamoto et al. 2020)
            loss = loss + (a.clamp(min=0.02).log() - b.clamp(min=0.02).log()).abs().mean() + (a - b).abs().mean()
        return update(loss, vocoder, optims)

    average = train(run / "vocoder.pt", vocoder, optims, step, seconds, 0.998, 250)
    print("sound:", json.dumps(fidelity(frozen, average)), flush=True)


@torch.no_grad()
def fidelity(vae: AutoencoderKLLTX2Audio, vocoder: LTX2Vocoder) -> dict:
    """Every sound through autoencoder and vocoder: signal to noise ratio, mean error of the log mel spectrogram."""
    sounds, mel = all_sounds().flatten(0, 1), Mel().to(DEVICE)
    x = mel(sounds)
    y = vocoder(vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample).float()
    noise = (sounds - y).square().mean((1, 2))
    return {
        "sound_snr_db": (10 * (sounds.square().mean((1, 2)) / noise).log10()).mean().item(),
        "sound_mel_error_db": (x - mel(y)).abs().mean().item() * 3 * 20 / math.log(10),
    }


class Latents:
    """All training latents, packed and normalised as LTX2Pipeline has them, with their captions."""

    @torch.no_grad()
    def __init__(self, data: Path, run: Path, places: int, limit: int | None):
        clips, bank = Clips(data, limit), np.load(data / "captions.npz")
        vae = averaged(new_vae(), run / "vae.pt").to(torch.bfloat16, memory_format=torch.channels_last_3d)
        audio_vae = averaged(new_audio_vae(), run / "audio_vae.pt")
        shape = (places, len(clips), len(MOTIONS), len(clips.colours))
        parts = []
        for rows in torch.arange(math.prod(shape), device=DEVICE).split(32):
            place, emoji, motion, colour = torch.unravel_index(rows, shape)
            x = clips.make(emoji, motion, clips.colours[colour], place=place).to(torch.bfloat16)
            parts.append(vae.encode(x.contiguous(memory_format=torch.channels_last_3d)).latent_dist.mode().contiguous())
        video = torch.cat(parts)
        heard = audio_vae.encode(Mel().to(DEVICE)(all_sounds().flatten(0, 1))).latent_dist.mode()
        audio = LTX2Pipeline._pack_audio_latents(heard)
        sample = video[:: max(1, len(video) // 1000)].float().transpose(0, 1).flatten(1).T
        self.statistics = {"vae": _statistics(sample), "audio_vae": _statistics(audio.flatten(0, 1))}
        packed = [
            LTX2Pipeline._pack_latents(LTX2Pipeline._normalize_latents(part, *self.statistics["vae"]))
            for part in video.split(256)
        ]
        self.video = torch.cat(packed)
        self.audio = LTX2Pipeline._normalize_audio_latents(audio, *self.statistics["audio_vae"])
        _, emoji, motion, _ = torch.unravel_index(torch.arange(len(self.video), device=DEVICE), shape)
        self.sound = clips.voice[emoji] * len(MOTIONS) + motion
        captions = torch.from_numpy(bank["captions"][:limit]).to(DEVICE)
        self.captions, self.empty = captions.flatten(0, 2), torch.from_numpy(bank["empty"]).to(DEVICE)

    def draw(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Video (batch, 400, 64), audio (batch, 33, 64) and token ids (batch, 32)."""
        i = torch.randint(len(self.video), (batch,), device=DEVICE)
        k = torch.randint(self.captions.shape[1], (batch,), device=DEVICE)
        return self.video[i].float(), self.audio[self.sound[i]].float(), self.captions[i % len(self.captions), k]


def _statistics(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation by channel of (N, channels). Channels that hardly vary are not blown up to unit variance."""
    deviation = sample.std(0)
    return sample.mean(0), deviation.maximum(0.5 * deviation.square().mean().sqrt())


def modulation(table: torch.Tensor, embedding: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """The block's `get_mod_params` in the embedding's type, as in the bfloat16 pipeline.

    Under autocast the tables are float32, and would make the whole residual stream so.
    """
    return (table.to(embedding.dtype)[None, None] + embedding.unflatten(-1, (len(table), -1))).unbind(2)


class Flow(torch.nn.Module):
    """The trainable whole: text encoder, connectors and transformer, called as LTX2Pipeline calls them."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder, self.connectors = new_text_encoder(vocabulary), new_connectors()
        self.transformer = new_transformer()

    def coordinates(self) -> dict:
        """Positions of both streams, once for a whole batch, which a captured step must not compute anew."""
        rope, audio_rope = self.transformer.rope, self.transformer.audio_rope
        grid = (LATENT_FRAMES, LATENT_SIDE, LATENT_SIDE)
        return {
            "video_coords": rope.prepare_video_coords(1, *grid, DEVICE, fps=FRAME_RATE),
            "audio_coords": audio_rope.prepare_audio_coords(1, AUDIO_FRAMES, DEVICE),
        }

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (N, 32), 0 for padding -> embeddings for the video and the audio stream, (N, 32, 256) each."""
        ids = ids.long()
        mask = (ids != 0).long()
        states = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        video, audio, _ = self.connectors(torch.stack(states, dim=-1).flatten(2, 3), mask, padding_side="left")
        return video, audio

    def forward(
        self, video: torch.Tensor, audio: torch.Tensor, t: torch.Tensor, text: tuple, coordinates: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transformer(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=text[0],
            audio_encoder_hidden_states=text[1],
            timestep=1000 * t,
            return_dict=False,
            **coordinates,
        )


def train_denoiser(
    data: Path, run: Path, seconds: float, batch: int, places: int, limit: int | None, eager: bool
) -> None:
    began = time.time()
    latents = Latents(data, run, places, limit)
    torch.save(latents.statistics, run / "statistics.pt")
    print(f"denoiser: {len(latents.video)} clips encoded in {time.time() - began:.0f} s", flush=True)
    flow = Flow(len(fluent_motion.load_tokenizer(data))).to(DEVICE)
    optims = matrices_first([flow], 1.2e-3, 1.5e-3)
    coordinates = flow.coordinates()

    def step() -> torch.Tensor:
        video, audio, ids = latents.draw(batch)
        ids = torch.where(torch.rand(batch, 1, device=DEVICE) < 0.1, latents.empty, ids)
        t = torch.sigmoid(torch.randn(batch, device=DEVICE) + math.log(SHIFT))
        t = torch.where(torch.rand(batch, device=DEVICE) < 0.1, torch.rand(batch, device=DEVICE), t)
        time_of = t[:, None, None]
        noise, audio_noise = torch.randn_like(video), torch.randn_like(audio)
        with torch.autocast(DEVICE, torch.bfloat16):
            out, audio_out = flow(
                video.lerp(noise, time_of), audio.lerp(audio_noise, time_of), t, flow.encode(ids), coordinates
            )
        loss = F.mse_loss(out.float(), noise - video)
        return update(loss + 0.3 * F.mse_loss(audio_out.float(), audio_noise - audio), flow, optims)

    LTX2VideoTransformerBlock.get_mod_params = staticmethod(modulation)
    if DEVICE == "cuda":
        flow.transformer.compile_repeated_blocks(dynamic=False)
    train(run / "denoiser.pt", flow, optims, step, seconds, 0.9985, 250, capture=not eager)


# --- the pipeline -------------------------------------------------------------------------------------------------


def build_pipeline(data: Path, run: Path) -> LTX2Pipeline:
    """The trained pipeline in bfloat16, in evaluation mode, on the CPU."""
    tokenizer = fluent_motion.load_tokenizer(data)
    flow = Flow(len(tokenizer))
    saved = torch.load(run / "denoiser.pt", map_location="cpu")["average"]
    flow.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in saved.items()})
    vae, audio_vae = averaged(new_vae(), run / "vae.pt"), averaged(new_audio_vae(), run / "audio_vae.pt")
    statistics = torch.load(run / "statistics.pt", map_location=DEVICE)
    for model, name in ((vae, "vae"), (audio_vae, "audio_vae")):
        model.latents_mean.copy_(statistics[name][0])
        model.latents_std.copy_(statistics[name][1])
    models = {
        "vae": vae,
        "audio_vae": audio_vae,
        "text_encoder": flow.text_encoder,
        "connectors": flow.connectors,
        "transformer": flow.transformer,
        "vocoder": averaged(new_vocoder(), run / "vocoder.pt"),
    }
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        tokenizer=tokenizer,
        **{
            name: model.to("cpu", torch.bfloat16, memory_format=torch.contiguous_format)
            for name, model in models.items()
        },
    )


def settings(guidance: float = 1.0, steps: int = STEPS) -> dict:
    """A call of the pipeline as LTX-2 means it: of LTX-2.3's guidance, which diffusers has by default, nothing."""
    return {
        "height": SIDE,
        "width": SIDE,
        "num_frames": NUM_FRAMES,
        "frame_rate": FRAME_RATE,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "audio_guidance_scale": guidance,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "audio_guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": None,
        "use_cross_timestep": False,
        "max_sequence_length": TEXT_TOKENS,
        "return_dict": False,
    }


def generate(pipe: LTX2Pipeline, captions: list[str], guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (N, 3, frames, side, side) in [-1, 1] and sounds (N, 2, samples), each from its place's seed."""
    generators = [torch.Generator().manual_seed(k) for k in range(len(captions))]
    video, audio = pipe(captions, generator=generators, output_type="pt", **settings(guidance))
    return video.float().transpose(1, 2) * 2 - 1, audio.float()


@torch.no_grad()
def evaluate(data: Path, pipe: LTX2Pipeline, guidance: float, count: int, limit: int | None, batch: int = 25) -> dict:
    """What assets/models/README.md states, on clips that were trained on, from other noise.

    - top1, top5: the rank of the right clip, in whatever place, when the generated middle frame is compared, by LPIPS,
      with the middle frames of all emoji in all motions and places on the same background; emoji_top1: the nearest one
      shows the right emoji.
    - moving: the share of clips that are nearer, by mean LPIPS over the frames, to the right clip, in the place where
      its middle frame is nearest, than to that clip frozen in its middle frame. The frozen clip has the middle frame
      right, so only motion tells them apart.
    - background: the palette colour nearest to the mean of the four 8x8 corners of all frames is the right one.
    - sound_top1: the nearest of all training sounds, by distance of mel spectrograms, is the right one.

    Raises:
        ValueError: a clip is not finite.
    """
    clips, judge, mel = Clips(data, limit), perceptual(), Mel().to(DEVICE)
    mine = held(len(clips), count)
    emoji, motion, colour = torch.tensor(mine, device=DEVICE).unbind(1)
    colours, names = list(fluent_emoji.COLOURS), clips.names
    captions = [fluent_motion.canonical(names[i]["name"], MOTIONS[m], colours[c]) for i, m, c in mine]
    began = time.time()
    made = [generate(pipe, captions[k : k + batch], guidance) for k in range(0, count, batch)]
    seconds = (time.time() - began) / count
    video, audio = (torch.cat(part) for part in zip(*made, strict=True))
    if not (video.isfinite().all() and audio.isfinite().all()):
        raise ValueError("A clip holds NaN or infinity.")  # which would count as right: nothing is smaller than NaN
    edges = slice(0, 8), slice(-8, None)
    corners = torch.cat([video[..., a, b].flatten(3) for a in edges for b in edges], -1).mean((2, 3)) / 2 + 0.5
    background = torch.cdist(corners, clips.colours).argmin(1) == colour
    known = mel(all_sounds().flatten(0, 1)).flatten(1)
    right_sound = clips.voice[emoji] * len(MOTIONS) + motion
    sound = torch.cdist(mel(audio[..., : fluent_motion.SAMPLES]).flatten(1), known).argmin(1) == right_sound
    ranks, nearest, places = (torch.empty_like(emoji) for _ in range(3))
    middle, shape = slice(NUM_FRAMES // 2, NUM_FRAMES // 2 + 1), (len(clips), len(MOTIONS), len(PLACES))
    for c in colour.unique().tolist():
        rows = (colour == c).nonzero().flatten()
        features, parts = lpips_features(judge, video[rows, :, NUM_FRAMES // 2]), []
        for index in torch.arange(math.prod(shape), device=DEVICE).split(72):
            which, how, where = torch.unravel_index(index, shape)
            frames = clips.make(which, how, clips.colours[c].expand(len(index), -1), middle, where)
            theirs = lpips_features(judge, frames[:, :, 0])
            parts.append(theirs.square().sum(1)[None] - 2 * features @ theirs.T)
        distance, at = torch.cat(parts, 1).unflatten(1, (-1, len(PLACES))).min(2)
        right = (emoji[rows] * len(MOTIONS) + motion[rows])[:, None]
        ranks[rows], nearest[rows] = (distance < distance.gather(1, right)).sum(1), distance.argmin(1) // len(MOTIONS)
        places[rows] = at.gather(1, right)[:, 0]
    moving = torch.stack([_moves(judge, clips, *row) for row in zip(video, emoji, motion, colour, places, strict=True)])

    def share(hits: torch.Tensor) -> float:
        return hits.float().mean().item()

    return {
        "captions": count,
        "steps": STEPS,
        "guidance_scale": guidance,
        "top1": share(ranks < 1),
        "top5": share(ranks < 5),
        "emoji_top1": share(nearest == emoji),
        "places": [share(places == k) for k in range(len(PLACES))],
        "top1_by_motion": {name: share(ranks[motion == k] < 1) for k, name in enumerate(MOTIONS)},
        "moving": share(moving),
        "moving_by_motion": {name: share(moving[motion == k]) for k, name in enumerate(MOTIONS)},
        "background": share(background),
        "sound_top1": share(sound),
        "reconstruction_lpips": reconstruction(pipe.vae, clips, judge),
        **fidelity(pipe.audio_vae, pipe.vocoder),
        "seconds_per_clip": seconds,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "missed": [captions[k] for k in (ranks > 0).nonzero().flatten().tolist()],
    }


def _moves(judge: torch.nn.Module, clips: Clips, made: torch.Tensor, *row: torch.Tensor) -> torch.Tensor:
    """Whether one clip (3, frames, side, side) is nearer to the right clip than to that clip frozen in the middle."""
    emoji, motion, colour, place = (k[None] for k in row)
    right = clips.make(emoji, motion, clips.colours[colour], place=place)[0].transpose(0, 1)
    frozen = right[NUM_FRAMES // 2].expand_as(right)
    made = made.transpose(0, 1)
    return judge(made, right).mean() < judge(made, frozen).mean()


def sheet(pipe: LTX2Pipeline, captions: list[str], folder: Path, guidance: float) -> None:
    """`frames.png`, every fourth frame of a clip a row, and a WAV file of each clip's sound."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    video, audio = generate(pipe, captions, guidance)
    rows = (video[:, :, ::4].permute(0, 3, 2, 4, 1) / 2 + 0.5).flatten(2, 3).flatten(0, 1)
    Image.fromarray((rows.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(folder / "frames.png")
    for k, sound in enumerate(audio):
        with wave.open(str(folder / f"{k:02d}.wav"), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((sound.clamp(-1, 1) * 32767).short().T.contiguous().cpu().numpy().tobytes())


SHOWN = [
    "a bouncing penguin on a blue background",
    "a spinning rocket on a purple background",
    "a ghost growing on a black background",
    "a fire engine sliding in on a white background",
    "a clown swinging on a teal background",
    "a butterfly on a pink background",
    "a panda bouncing on an orange background",
    "a star spinning on a navy background",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "stages",
        nargs="+",
        metavar="STAGE[:SECONDS]",
        help="vae, audio_vae, vocoder, denoiser (60 seconds of training each unless told); export, evaluate, sheet",
    )
    parser.add_argument("--out", type=Path, help="the checkpoint's folder, which evaluate and sheet load")
    parser.add_argument("--sheet", type=Path, help="the folder that sheet writes to")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batches", type=int, nargs=3, default=(12, 16, 128), help="of vae, sound and denoiser")
    parser.add_argument("--places", type=int, choices=(1, 2, 3), default=len(PLACES), help="that denoiser learns")
    parser.add_argument("--captions", type=int, default=HELD_CLIPS, help="clips that evaluate generates")
    parser.add_argument("--emoji", type=int, help="only the first so many emoji, for a quick look at the code")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph of the denoiser's step")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # crashed in training at such shapes on an H100 with torch 2.11
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    for stage in args.stages:
        name, _, seconds = stage.partition(":")
        began = time.time()
        run_stage(name, float(seconds or 60), args)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name}: {time.time() - began:.0f} s in all", flush=True)


def run_stage(name: str, seconds: float, args: argparse.Namespace) -> None:
    if name == "vae":
        train_vae(args.data, args.run, seconds, args.batches[0], args.emoji)
    elif name == "audio_vae":
        train_audio_vae(args.run, seconds, args.batches[1])
    elif name == "vocoder":
        train_vocoder(args.run, seconds, args.batches[1])
    elif name == "denoiser":
        train_denoiser(args.data, args.run, seconds, args.batches[2], args.places, args.emoji, args.eager)
    elif name == "export":
        build_pipeline(args.data, args.run).save_pretrained(args.out, max_shard_size="9MB")
    elif name in ("evaluate", "sheet"):
        pipe = LTX2Pipeline.from_pretrained(args.out, dtype=torch.bfloat16).to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        if name == "sheet":
            sheet(pipe, SHOWN, args.sheet, args.guidance)
        else:
            figures = evaluate(args.data, pipe, args.guidance, args.captions, args.emoji)
            print(json.dumps(figures, indent=1), flush=True)
    else:
        raise SystemExit(f"{name} is no stage: vae, audio_vae, vocoder, denoiser, export, evaluate, sheet")


if __name__ == "__main__":
    main()
