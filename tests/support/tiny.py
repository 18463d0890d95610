"""Random checkpoints of the real architectures, a few hundred kilobytes each, made offline in a moment.

Their pictures mean nothing; they take every path of the engine that the large models take. Layers are multiples of
32 wide where the format needs it, so that the recipe `full` quantizes most of them.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from engine import catalog
from engine.catalog import ModelSpec

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}


def checkpoint(model_id: str, folder: Path) -> Path:
    """Write a tiny checkpoint of one of `KINDS` into `folder`, laid out as on the hub."""
    torch.manual_seed(0)
    pipeline = KINDS[model_id]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.save_pretrained(folder)
    return folder


def spec(model_id: str, folder: Path) -> ModelSpec:
    """The model's catalog entry, turned into a bundled miniature that lies in `folder`."""
    large = catalog.KINDS[model_id]
    side = {"height": 64, "width": 96} if large.modality == "video" else {"height": 64, "width": 64}
    few = {"num_frames": 9} if large.modality == "video" else {}
    return replace(
        large,
        id=f"tiny-{model_id}",
        source=str(folder),
        bundled=True,
        configs=None,
        gated=False,
        memory_gb=None,
        recipes=("full",),
        defaults=replace(large.defaults, **side, **few, num_inference_steps=3),
        limits=replace(large.limits, sizes=((side["height"], side["width"]),), size_multiple=None),
        call=MappingProxyType({**large.call, "max_sequence_length": 32}),
        examples=("a cat on a red background", "a rocket", "a snowman"),
    )


def _flux() -> DiffusionPipeline:
    words = catalog.MINI_FLUX.folder
    clip, t5 = CLIPTokenizer.from_pretrained(words / "tokenizer"), T5Tokenizer.from_pretrained(words / "tokenizer_2")
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=clip.model_max_length,
        eos_token_id=clip.eos_token_id,
    )
    t5_config = T5Config(vocab_size=len(t5), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=CLIPTextModel(clip_config),
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer=clip,
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            **HEADS,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ),
    )


def _qwen() -> DiffusionPipeline:
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    tokenizer = _qwen_tokenizer(template)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start",)},
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            **HEADS, in_channels=64, out_channels=16, num_layers=2, joint_attention_dim=32, axes_dims_rope=(8, 12, 12)
        ),
        vae=AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
    )


def _qwen_tokenizer(template: str) -> Qwen2Tokenizer:
    """In which every word of the template is a token, since a pipeline drops as many as the real one has."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    bpe, qwen = Tokenizer(models.BPE()), Qwen2Tokenizer()._tokenizer
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [template] * 10,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]], extra_special_tokens=special[1:]
    )


CHAT = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""What Qwen3's chat template makes of one message."""


def _qwen3(layers: int) -> tuple[Qwen2Tokenizer, Qwen3Config]:
    tokenizer = _qwen_tokenizer("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tokenizer.chat_template = CHAT
    return tokenizer, Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )


def _small_vae(kind: type, **further: object) -> torch.nn.Module:
    return kind(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **further,
    )


def _z_image() -> DiffusionPipeline:
    tokenizer, config = _qwen3(2)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=32, axes_dims=(8, 12, 12)
        ),
        vae=_small_vae(
            AutoencoderKL,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ),
    )


def _flux2_dev() -> DiffusionPipeline:
    text, heads = _mistral_chat(), {"num_attention_heads": 2, "head_dim": 16, "hidden_size": 32}
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            **heads,
            "vocab_size": len(text),
            "intermediate_size": 64,
            "num_hidden_layers": 30,  # it reads the hidden states of layers 10, 20 and 30
            "num_key_value_heads": 1,
        },
        vision_config={"model_type": "pixtral", **heads, "intermediate_size": 32, "num_hidden_layers": 1},
        image_token_index=text.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(PixtralImageProcessor(), text, chat_template=MISTRAL_CHAT),
        transformer=_flux2_denoiser(guidance_embeds=True),
        vae=_small_vae(AutoencoderKLFlux2, latent_channels=8),
    )


MISTRAL_CHAT = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}[SYSTEM_PROMPT]\
{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]{% else %}[INST]{{ message['content'][0]['text'] }}[/INST]\
{% endif %}{% endfor %}"""
"""What Mistral's chat template makes of a system message and one of a user."""


def _mistral_chat() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    bpe, qwen = Tokenizer(models.BPE()), Qwen2Tokenizer()._tokenizer
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([SYSTEM_MESSAGE] * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[4:],
        padding_side="left",
    )


def _flux2_denoiser(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        **HEADS,
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance_embeds,
    )


def _klein() -> DiffusionPipeline:
    tokenizer, config = _qwen3(28)  # it reads the hidden states of layers 9, 18 and 27
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=_flux2_denoiser(guidance_embeds=False),
        vae=_small_vae(AutoencoderKLFlux2, latent_channels=8),
        is_distilled=True,
    )


def _ltx2(gated: bool = False) -> DiffusionPipeline:
    """LTX-2, or with gates in its attention and all else that differs in LTX-2.3."""
    letters = [chr(c) for c in range(32, 127)]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer = GemmaTokenizer(vocab={t: i for i, t in enumerate([*names, *letters])}, merges=[], model_max_length=64)
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    heads = {"num_attention_heads": 2, "num_layers": 1, "num_learnable_registers": None}
    wide = {"video": 32 if gated else 16, "audio": 16}
    connectors, denoiser = {}, {}
    if gated:
        connectors = {
            "per_modality_projections": True,
            "video_hidden_dim": 64,
            "audio_hidden_dim": 32,
            "proj_bias": True,
            "video_gated_attn": True,
            "audio_gated_attn": True,
        }
        denoiser = {f"{of}{name}": True for of in ("", "audio_") for name in ("gated_attn", "cross_attn_mod")}
        denoiser |= {"use_prompt_embeddings": False, "perturbed_attn": True}
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLLTX2Video(
            latent_channels=16,
            block_out_channels=(8, 16, 32, 64),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            decoder_causal=False,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=AutoencoderKLLTX2Audio(base_channels=32, ch_mult=(1, 2, 2), num_res_blocks=1, mel_bins=16),
        text_encoder=Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=3,  # the text encoder's layers and its embedding
            **{f"{stream}_connector_{k}": v for stream in wide for k, v in heads.items()},
            **{f"{stream}_connector_attention_head_dim": width for stream, width in wide.items()},
            **connectors,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            **HEADS,
            cross_attention_dim=64,
            audio_in_channels=32,
            audio_out_channels=32,
            audio_num_attention_heads=2,
            audio_attention_head_dim=16,
            audio_cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
            rope_double_precision=False,
            rope_type="split",
            **denoiser,
        ),
        vocoder=_wide_vocoder() if gated else _vocoder(),
    )


_RESNETS = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]]}


def _vocoder() -> torch.nn.Module:
    return LTX2Vocoder(
        in_channels=32,  # two channels of 16 mel bins
        hidden_channels=32,
        upsample_kernel_sizes=[16, 15, 16],
        upsample_factors=[6, 5, 8],
        **_RESNETS,
    )


def _wide_vocoder() -> torch.nn.Module:
    return LTX2VocoderWithBWE(
        in_channels=32,
        hidden_channels=16,
        upsample_kernel_sizes=[11, 8, 8],
        upsample_factors=[5, 4, 8],
        bwe_in_channels=32,
        bwe_hidden_channels=16,
        bwe_upsample_kernel_sizes=[12, 11, 16],
        bwe_upsample_factors=[6, 5, 8],
        num_mel_channels=16,
        **_RESNETS,
        **{f"bwe_{name}": value for name, value in _RESNETS.items()},
    )


def _wan() -> DiffusionPipeline:
    tokenizer = T5Tokenizer.from_pretrained(catalog.MINI_FLUX.folder / "tokenizer_2")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        text_encoder=UMT5EncoderModel(config),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            **HEADS, in_channels=16, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=2
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            dim_mult=[1, 1, 1, 1],
            z_dim=16,
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        expand_timesteps=True,
    )


KINDS = {
    "flux.1-dev": _flux,
    "qwen-image": _qwen,
    "qwen-image-2512": _qwen,
    "ltx-2": _ltx2,
    "ltx-2.3": partial(_ltx2, gated=True),
    "z-image-turbo": _z_image,
    "flux.2-klein-4b": _klein,
    "flux.2-dev": _flux2_dev,
    "wan-2.2-5b": _wan,
}
