"""Trains `mini-qwen`: a small Qwen-Image in diffusers' own classes, from nothing, on one GPU.

    python -m assets.training.fluent_emoji DATA --common --duos 0    # 760 everyday emoji
    python -m assets.training.mini_qwen prepare  DATA                # tokenizer and tokenized captions; no GPU
    python -m assets.training.mini_qwen vae      DATA RUN --seconds 90
    python -m assets.training.mini_qwen denoiser DATA RUN --seconds 170 --batch 256
    python -m assets.training.mini_qwen export   DATA RUN --out assets/models/mini-qwen
    python -m assets.training.mini_qwen evaluate DATA RUN

Every stage writes `RUN/<stage>.pt` and goes on from it when called again; `--limit` ends a call early. Schedules
follow training time, not steps.

The recipe is mini-flux's (rectified flow, logit-normal timesteps, Muon, moving average). What differs is what differs
in Qwen-Image: one causal language model reads the caption inside the pipeline's own chat template, the text is as
long as the caption and masked in a batch, the VAE is made for video and sees one frame, and guidance is true
classifier-free guidance against the negative prompt " ", which caption dropout trains.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from diffusers.models.transformers import transformer_qwenimage
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from assets.training import fluent_emoji
from assets.training.common import (
    DEVICE,
    HELD_PICTURES,
    LAYOUTS,
    SHOWN,
    SIDE,
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

CHANNELS = 16
GUIDANCE, NEGATIVE = 2.5, " "
TEMPLATE_TOKENS = 34
"""Tokens of the template before the caption, which the pipeline drops (`prompt_template_encode_start_idx`)."""
TEXT_TOKENS = 24
"""Tokens that are left, a caption and the end of the template, as padded in training; 16 + 5 is the longest."""
VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PADDING = 0


# --- captions -----------------------------------------------------------------------------------------------------


def prompt_template() -> str:
    """The chat template that `QwenImagePipeline` puts around a prompt."""
    return QwenImagePipeline(None, None, None, None, None).prompt_template_encode


def train_tokenizer(captions: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of captions in which every word of the template is one token, as in Qwen's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    qwen = Qwen2Tokenizer()._tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = re.sub(r"<\|.*?\|>", "", prompt_template())
    bpe.train_from_iterator([*captions, *[words] * 1000], trainer)
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(m) for m in trained["merges"]],
        extra_special_tokens=list(SPECIAL[1:]),
        model_max_length=1024,
    )


def load_tokenizer(data: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(data / "qwen" / "tokenizer")


def tokenize(tokenizer: Qwen2Tokenizer, captions: list[str]) -> np.ndarray:
    """Token ids of captions inside the template, (N, TEMPLATE_TOKENS + TEXT_TOKENS) int16.

    Raises:
        ValueError: the template is not TEMPLATE_TOKENS long, or a caption is too long.
    """
    template, length = prompt_template(), TEMPLATE_TOKENS + TEXT_TOKENS
    before = tokenizer(template.split("{}")[0])["input_ids"]
    ids = tokenizer([template.format(c) for c in captions], padding="max_length", max_length=length)["input_ids"]
    if len(before) != TEMPLATE_TOKENS or any(len(i) != length or i[:TEMPLATE_TOKENS] != before for i in ids):
        raise ValueError(f"A caption does not come to {TEMPLATE_TOKENS} + at most {TEXT_TOKENS} tokens.")
    return np.asarray(ids, dtype=np.int16)


def prepare(data: Path, seed: int = 0) -> None:
    """Write `DATA/qwen`: the tokenizer and the tokenized captions of the emoji that `DATA/emoji.zip` holds.

    One caption in four begins with a capital: this tokenizer does not fold case.
    """
    rng, colours = random.Random(seed), list(fluent_emoji.COLOURS)
    emoji = fluent_emoji.select(*fluent_emoji.download(data), common=True)
    names = [e["name"] for e in json.loads((data / "names.json").read_text())]
    if names != [e["name"] for e in emoji]:
        raise ValueError("DATA was not prepared with --common.")
    captions = [
        fluent_emoji.caption(rng, e, c) for e in emoji for c in colours for _ in range(fluent_emoji.CAPTIONS_PER_PAIR)
    ]
    captions = [c.capitalize() if rng.random() < 0.25 else c for c in captions]
    tokenizer = train_tokenizer(rng.sample(captions, min(60_000, len(captions))))
    tokenizer.save_pretrained(data / "qwen" / "tokenizer")
    singles = tokenize(tokenizer, captions).reshape(len(emoji) * len(colours), fluent_emoji.CAPTIONS_PER_PAIR, -1)
    np.savez_compressed(data / "qwen" / "captions.npz", singles=singles, empty=tokenize(tokenizer, [NEGATIVE, ""]))
    longest = int((singles != PADDING).sum(-1).max()) - TEMPLATE_TOKENS
    print(f"{len(captions)} captions, {len(tokenizer)} tokens, at most {longest} of {TEXT_TOKENS} in a caption")


# --- models -------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKLQwenImage:
    """A VAE whose kernels begin with their last tap in time alone: the only one that a single frame meets."""
    vae = AutoencoderKLQwenImage(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                taps = module.kernel_size[0]
                module.weight[:, :, :-1] = 0
                module.weight[:, :, -1] *= taps**0.5  # drawn for a fan-in of all taps
    return vae


def new_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        axes_dims_rope=(16, 24, 24),
    )


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A language model of three layers; its eye, which the pipeline never opens, is as small as it can be."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 1280,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
                "use_cache": False,
                "bos_token_id": None,
                "eos_token_id": ids["<|endoftext|>"],
                "pad_token_id": ids["<|endoftext|>"],
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 256,
                "fullatt_block_indexes": [0],
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|image_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=True,
        )
    )


def _last_tap(conv: QwenImageCausalConv3d, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
    out = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[-1] // 2)
    return out[:, :, None]


def _rms_norm(norm: QwenImageRMS_norm, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        gamma = norm.gamma.flatten().to(x.dtype)
        return F.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-12).movedim(-1, 1)


def for_one_frame(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Make a VAE compute the same numbers for one frame several times faster, for good and in place.

    Before the first frame a causal convolution meets zeros: only its last tap in time acts, which is a convolution
    in two dimensions. The norm becomes one kernel, which wants the channels last.
    """
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = functools.partial(_last_tap, module)
        elif isinstance(module, QwenImageRMS_norm):
            module.forward = functools.partial(_rms_norm, module)
    return vae


def encode_frame(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance, each (N, 16, 1, 32, 32), of pictures (N, 3, 256, 256) in [-1, 1]."""
    x = x.contiguous(memory_format=torch.channels_last)[:, :, None]
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode_frame(vae: AutoencoderKLQwenImage, z: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, 256, 256) of latents (N, 16, 1, 32, 32); unlike `vae.decode` not clamped, so that all learn."""
    return vae.decoder(vae.post_quant_conv(z))[:, :, 0]


# --- the autoencoder ----------------------------------------------------------------------------------------------


def train_vae(data: Path, run: Path, seconds: float, limit: float | None, batch: int = 32) -> None:
    pictures, judge = Pictures(data), perceptual()
    vae = new_vae().to(DEVICE)
    average = copy.deepcopy(vae)
    for_one_frame(vae)
    optim = torch.optim.AdamW(vae.parameters(), lr=6e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=DEVICE == "cuda")
    spent, step = 0.0, 0
    if (run / "vae.pt").exists():
        state = torch.load(run / "vae.pt", map_location=DEVICE)
        vae.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optim.load_state_dict(state["optim"])
        spent, step = state["spent"], state["step"]

    def draw() -> torch.Tensor:
        index = torch.randint(len(pictures), (batch,), device=DEVICE)
        known = pictures.colours[torch.randint(len(pictures.colours), (batch,), device=DEVICE)]
        colours = torch.where(torch.rand(batch, 1, device=DEVICE) < 0.6, known, torch.rand(batch, 3, device=DEVICE))
        groups = zip(index.split(batch // 4), colours.split(batch // 4), strict=True)
        return torch.cat([pictures.singles(i, c, random.randrange(len(LAYOUTS))) for i, c in groups])

    clock, first = Clock(spent, seconds, limit), step
    while clock.running:
        x = draw()
        with torch.autocast(DEVICE, torch.bfloat16):
            mean, log_variance = encode_frame(vae, x)
            y = decode_frame(vae, mean + torch.exp(log_variance / 2) * torch.randn_like(mean)).float()
            seen = judge(x, y).mean()
        mean, log_variance = mean.float(), log_variance.float()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        l1 = (x - y).abs().mean()
        (l1 + seen + 1e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        set_rate([optim], rate(clock.progress))
        optim.step()
        optim.zero_grad(set_to_none=True)
        follow(average, vae, min(0.998, (step + 1) / (step + 20)))
        if step == first + 2:
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            print(f"vae: first steps after {time.time() - clock.began:.0f} s", flush=True)
            clock.start()
        step += 1
        if step % 200 == 0:
            print(f"vae {step} {clock.elapsed:.0f}s l1 {l1:.4f} lpips {seen:.4f} kl {kl:.2f}", flush=True)
    state = {"model": vae.state_dict(), "average": average.state_dict(), "optim": optim.state_dict()}
    torch.save(state | {"spent": clock.elapsed, "step": step}, run / "vae.pt")
    loss = reconstruction(rebuild(average), pictures, judge)
    print(f"vae: {step} steps of {batch}, LPIPS of {HELD_PICTURES} reconstructions {loss:.4f}", flush=True)


def rebuild(vae: AutoencoderKLQwenImage) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that encodes and decodes pictures (N, 3, 256, 256), as the pipeline would."""
    return lambda x: vae.decode(vae.encode(x.to(vae.dtype)[:, :, None]).latent_dist.mode()).sample[:, :, 0].float()


def trained_vae(run: Path) -> AutoencoderKLQwenImage:
    vae = new_vae().to(DEVICE)
    vae.load_state_dict(torch.load(run / "vae.pt", map_location=DEVICE)["average"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Latent means, (N, 16, 32, 32) bfloat16, of pictures given batch by batch."""
    vae = for_one_frame(copy.deepcopy(vae).to(torch.bfloat16))
    return torch.cat([encode_frame(vae, x.bfloat16())[0][:, :, 0] for x in batches])


# --- the denoiser -------------------------------------------------------------------------------------------------


class Latents:
    """All training latents, packed and normalised by channel: what the denoiser sees.

    Row (emoji * colours + colour) * layouts + layout.
    """

    def __init__(self, data: Path, vae: AutoencoderKLQwenImage, layouts: int):
        pictures, bank = Pictures(data), np.load(data / "qwen" / "captions.npz")
        count, colours, self.layouts = len(pictures), len(pictures.colours), layouts
        pairs = torch.arange(count * colours, device=DEVICE).split(128)
        by_layout = [
            encode(vae, (pictures.singles(i // colours, pictures.colours[i % colours], k) for i in pairs))
            for k in range(layouts)
        ]
        latents = torch.stack(by_layout, 1).flatten(0, 1)
        sample = latents[:: max(1, len(latents) // 2000)].float()
        self.mean, self.std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
        shape = (1, CHANNELS, 1, 1)
        latents.sub_(self.mean.view(shape)).div_(self.std.view(shape))
        self.packed = QwenImagePipeline._pack_latents(latents, len(latents), CHANNELS, 32, 32)
        self.ids = torch.from_numpy(bank["singles"]).to(DEVICE)[: count * colours]
        self.empty = torch.from_numpy(bank["empty"]).to(DEVICE)

    def draw(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch, 256, 64) and token ids (batch, 58); one caption in ten is empty."""
        i = torch.randint(len(self.packed), (batch,), device=DEVICE)
        k = torch.randint(self.ids.shape[1], (batch,), device=DEVICE)
        empty = self.empty[torch.randint(len(self.empty), (batch,), device=DEVICE)]
        dropped = torch.rand(batch, 1, device=DEVICE) < 0.1
        return self.packed[i], torch.where(dropped, empty, self.ids[i // self.layouts, k])


def rotate(x: torch.Tensor, turns: torch.Tensor, use_real: bool = False) -> torch.Tensor:
    """diffusers' `apply_rotary_emb_qwen` without complex numbers, which the compiler cannot fuse.

    `x` is (B, S, H, D); `turns` (S, D / 2, 2), cosines and sines.
    """
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns[:, None].unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


class Flow(torch.nn.Module):
    """The trainable whole: language model and transformer, computing what the pipeline computes."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        super().__init__()
        self.text, self.transformer = new_text_encoder(tokenizer), new_transformer()
        turns = self.transformer.pos_embed([[(1, SIDE // 16, SIDE // 16)]], torch.device("cpu"), TEXT_TOKENS)
        for name, turn in zip(("image_turns", "text_turns"), turns, strict=True):
            self.register_buffer(name, torch.view_as_real(turn).clone(), persistent=False)

    @property
    def trainable(self) -> list[torch.nn.Module]:
        return [self.transformer, self.text.model.language_model]

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (N, 58) -> embeddings (N, 24, 256) and which of them are real (N, 24).

        No mask is needed here: padding follows the text, and a causal model does not look ahead.
        """
        masks = {"full_attention": None}
        hidden = self.text.model.language_model(ids.long(), attention_mask=masks).last_hidden_state
        return hidden[:, TEMPLATE_TOKENS:], ids[:, TEMPLATE_TOKENS:] != PADDING

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The transformer's own forward less what copies from the host, which a CUDA graph cannot; see `rotate`."""
        net, (words, real) = self.transformer, text
        image, words = net.img_in(x), net.txt_in(net.txt_norm(words))
        time_embedding = net.time_text_embed(t.to(image.dtype), image)
        for block in net.transformer_blocks:
            words, image = block(
                hidden_states=image,
                encoder_hidden_states=words,
                encoder_hidden_states_mask=real,
                temb=time_embedding,
                image_rotary_emb=(self.image_turns, self.text_turns),
            )
        return net.proj_out(net.norm_out(image, time_embedding))


def train_denoiser(data: Path, run: Path, seconds: float, limit: float | None, batch: int, layouts: int) -> None:
    transformer_qwenimage.apply_rotary_emb_qwen = rotate
    flow = Flow(load_tokenizer(data)).to(DEVICE)
    average = copy.deepcopy(flow).requires_grad_(False)
    optims = optimizers(flow.trainable, 1.2e-3, 1.5e-3)
    spent, count = 0.0, 0
    if (run / "denoiser.pt").exists():
        state = torch.load(run / "denoiser.pt", map_location=DEVICE)
        flow.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        spent, count = state["spent"], state["step"]
    began = time.time()
    latents = Latents(data, trained_vae(run), layouts)
    print(f"denoiser: {len(latents.packed)} pictures encoded in {time.time() - began:.0f} s", flush=True)
    if DEVICE == "cuda":
        flow.transformer.compile_repeated_blocks(dynamic=False)

    def step() -> torch.Tensor:
        x, ids = latents.draw(batch)
        t, noise = times(batch), torch.randn(x.shape, device=DEVICE)
        noisy = (1 - t)[:, None, None] * x + t[:, None, None] * noise
        with torch.autocast(DEVICE, torch.bfloat16):
            out = flow(noisy, t, flow.encode(ids))
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
        loss_sum += run_step()
        follow(average, flow, min(0.9985, (count + 1) / (count + 20)))
        count += 1
        if count % 250 == 0:
            print(f"denoiser {count} {clock.elapsed:.0f}s loss {loss_sum / 250:.4f}", flush=True)
            loss_sum = 0.0
    state = {
        "model": flow.state_dict(),
        "average": average.state_dict(),
        "optims": [o.state_dict() for o in optims],
        "spent": clock.elapsed,
        "step": count,
        "mean": latents.mean.tolist(),
        "std": latents.std.tolist(),
    }
    torch.save(state, run / "denoiser.pt")
    print(f"denoiser: {count} steps of {batch} in {clock.elapsed:.0f} s", flush=True)


# --- the pipeline -------------------------------------------------------------------------------------------------


def build_pipeline(data: Path, run: Path, dtype: torch.dtype = torch.bfloat16) -> QwenImagePipeline:
    """The trained pipeline, in evaluation mode.

    The schedule is Qwen-Image's less `shift_terminal`, with which a single step divides zero by zero.
    """
    tokenizer = load_tokenizer(data)
    saved = torch.load(run / "denoiser.pt", map_location="cpu")
    flow = Flow(tokenizer)
    flow.load_state_dict(saved["average"])
    vae = trained_vae(run)
    vae.register_to_config(latents_mean=saved["mean"], latents_std=saved["std"])
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
        ),
        vae=vae.to(dtype).eval(),
        text_encoder=flow.text.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=flow.transformer.to(dtype).eval(),
    ).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: QwenImagePipeline, captions: list[str], seeds: Iterable[int], steps: int, guidance: float
) -> torch.Tensor:
    """Pictures (N, 3, 256, 256) in [-1, 1] on the device, one a caption and seed."""
    noise = [torch.randn(1, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    packed = QwenImagePipeline._pack_latents(torch.cat(noise), len(captions), CHANNELS, 32, 32)
    result = pipe(
        captions,
        negative_prompt=[NEGATIVE] * len(captions) if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        latents=packed.to(DEVICE, pipe.dtype),
        output_type="pt",
    )
    return result.images.float() * 2 - 1


@torch.no_grad()
def evaluate(data: Path, pipe: QwenImagePipeline, guidance: float, captions: int, steps: int = 20) -> dict:
    """Retrieval, background and reconstruction, measured as mini-flux's are."""
    pictures, judge = Pictures(data), perceptual()
    held = held_captions(json.loads((data / "names.json").read_text()))[:captions]
    began = time.time()
    made = []
    for part in range(0, len(held), 25):
        group = held[part : part + 25]
        made.append(draw(pipe, [text for _, _, text in group], [i for i, _, _ in group], steps, guidance))
    made, seconds = torch.cat(made), time.time() - began
    return {
        "steps": steps,
        "true_cfg_scale": guidance,
        "seconds_per_picture": seconds / len(held),
        "reconstruction_lpips": reconstruction(rebuild(pipe.vae), pictures, judge),
        **retrieval(made, held, pictures, judge),
    }


@torch.no_grad()
def sheet(pipe: QwenImagePipeline, captions: list[str], file: Path, guidance: float) -> None:
    """A contact sheet: one picture a caption, then the first caption with as many other seeds."""
    again = [captions[0]] * len(captions)
    seeds = [*[7] * len(captions), *range(len(captions))]
    pictures = draw(pipe, [*captions, *again], seeds, 20, guidance)
    contact_sheet(pipe.image_processor.postprocess(pictures, output_type="pil"), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "vae", "denoiser", "export", "evaluate", "sheet"))
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path, nargs="?", help="every stage but prepare needs it")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of the whole stage")
    parser.add_argument("--limit", type=float, help="end this call after so many seconds of training")
    parser.add_argument("--batch", type=int, default=256, help="batch of the denoiser stage")
    parser.add_argument(
        "--layouts", type=int, choices=range(1, len(LAYOUTS) + 1), default=len(LAYOUTS), help="layouts to learn"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shard", default="9MB")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--captions", type=int, default=HELD_PICTURES, help="captions that `evaluate` draws")
    args = parser.parse_args()
    if args.stage == "prepare":
        prepare(args.data)
        return
    if args.run is None:
        parser.error(f"{args.stage} needs RUN")
    args.run.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # crashed in training at these shapes on an H100 with torch 2.11
    torch.set_float32_matmul_precision("high")
    if args.stage == "vae":
        train_vae(args.data, args.run, args.seconds, args.limit)
    elif args.stage == "denoiser":
        train_denoiser(args.data, args.run, args.seconds, args.limit, args.batch, args.layouts)
    elif args.stage == "export":
        build_pipeline(args.data, args.run).save_pretrained(args.out, max_shard_size=args.shard)
    elif args.stage == "sheet":
        sheet(build_pipeline(args.data, args.run), SHOWN, args.out, args.guidance)
    else:
        print(
            json.dumps(evaluate(args.data, build_pipeline(args.data, args.run), args.guidance, args.captions), indent=1)
        )


if __name__ == "__main__":
    main()
