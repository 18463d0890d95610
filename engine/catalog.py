"""What can be compared: one frozen `ModelSpec` a model, with its defaults and limits.

Knows nothing of devices or weights in memory. What differs between pipeline classes (the name of the guidance
argument, fixed arguments of the call, the tokenizer that counts) is data of the spec, so adding a model of a known
class is one entry in `MODELS`. A process may be given further ones when it starts (`give`): those of the command line's
`--lora`, and checkpoints of somebody's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import RequestError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
UNKNOWN = "unknown"
"""Family of a denoiser of a class that no recipe was written for, in a pipeline of a known kind."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model's default call settings, named as the arguments of its diffusers pipeline."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int = 7
    batch_size: int = 1
    num_frames: int = 1
    """Frames of a clip; 1 for pictures."""
    frame_rate: float = 0.0
    """Frames a second; 0 for pictures."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a user may choose; both ends of each range are allowed."""

    sizes: tuple[tuple[int, int], ...]
    """(height, width) pairs in pixels that are offered; without `size_multiple` no others are allowed."""
    num_inference_steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    batch_size: tuple[int, int]
    prompt_characters: int
    seed: tuple[int, int] = (0, 2**32 - 1)
    num_frames: tuple[int, int] = (1, 1)
    frames_step: int = 1
    """A clip has one frame more than a multiple of this: the VAE's compression in time."""
    size_multiple: int | None = None
    """Height and width may be any multiples of this within `side` and `max_pixels`."""
    side: tuple[int, int] = (0, 0)
    """Least and largest height or width in pixels, where `size_multiple` is given."""
    max_pixels: int = 0
    """Largest area of a picture or frame in pixels, where `size_multiple` is given."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a model needs, in GB of 1e9 bytes; tests/engine/test_catalog.py checks the weights against the
    configurations."""

    transformer: float
    """The denoiser's weights in bf16, but those that diffusers keeps in fp32; engine/quantization/recipes.py tells what
    a quantized one needs instead."""
    shared: float
    """Text encoders, VAE and whatever else all precisions share, in bf16, or the VAE in fp32 (`ModelSpec.vae_fp32`)."""
    run: float
    """What one run at the default settings allocates by the post's method beyond all weights: its peak at batch 1 on a
    B200, less the weights."""
    host: float
    """Host memory while loading: the largest weight on its way, the libraries, the CUDA context."""
    text_kv: float = 0.0
    """Keys and values of the text that the recorded step of one clip reads, with guidance
    (engine/compiler/text_kv.py)."""
    kept: float = 0.0
    """Of `shared` what stays on a device that streams text encoders: VAE, embeddings and all else outside of the blocks
    (engine/weights/streaming.py)."""
    footprint: float = 0.0
    """What the bf16 denoiser takes of a device that streams it: two of its largest blocks, and all outside of them."""
    stored: float = 0.0
    """What comes from the hub, where weights are stored there in another type than they run in; else 0."""

    @property
    def one_run(self) -> float:
        """What one run at the default settings allocates beyond all weights."""
        return self.run + self.text_kv

    @property
    def weights(self) -> float:
        """All of them, as they run in the reference."""
        return self.transformer + self.shared

    @property
    def download(self) -> float:
        """What comes from the hub."""
        return self.stored or self.weights


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank adapter that is fused into a model's bf16 denoiser; engine/weights/lora.py finds it."""

    name: str
    """Short, as the model's id has it."""
    scale: float
    """What its product is multiplied with, besides what its file says."""
    file: Path
    """On this machine."""
    path: str
    """The file's name, in its repository where it has one."""
    repository: str = ""
    """Its id on the hub; empty for a file that was given."""
    revision: str = ""
    """Commit on the hub."""
    digest: str
    """SHA-256 of the file."""

    @property
    def source(self) -> str:
        """Where it is from: the file's name, with its repository and revision where it has them."""
        return f"{self.repository}@{self.revision}/{self.path}" if self.repository else self.path

    @property
    def written(self) -> str:
        """In a model's id."""
        return self.name if self.scale == 1 else f"{self.name}:{self.scale:g}"

    @property
    def provenance(self) -> dict[str, Any]:
        """As a file that was made with it says."""
        return {"name": self.name, "scale": self.scale, "source": self.source, "sha256": self.digest}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model that can be compared."""

    id: str
    name: str
    summary: str
    family: str
    """Whose recipes it has, in engine/quantization/recipes.py: models of one architecture share them."""
    pipeline: str
    """Class name in diffusers."""
    modality: str
    """"image" or "video"."""
    source: str
    """Folder below assets/ for a bundled model, repository id on the hub otherwise."""
    bundled: bool
    revision: str | None = None
    """Commit on the hub; None for a bundled model."""
    gated: bool = False
    """The hub gives it only to accounts that accepted its licence, so a token is needed."""
    configs: str = ""
    """Folder below assets/configs/ with the architecture; empty for a bundled model."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    """Component -> configuration values in which it differs from that folder, for models that share one."""
    memory_gb: Memory | None = None
    """What loading it in bf16 needs; None for a bundled model, which needs little."""
    licence: str
    licence_url: str
    licence_note: str = ""
    """What its licence keeps from some or all, in a sentence or two that are shown before and beside what is made."""
    defaults: Settings
    limits: Limits
    recipes: tuple[str, ...]
    """Recipe ids a user may choose, the default first; defined in engine/quantization/recipes.py, "tuned" and
    "rebalanced" in assets/recipes/."""
    guidance_argument: str = "guidance_scale"
    """The pipeline argument that a request's guidance goes to: embedded ("guidance_scale") or two forward passes a
    step against a negative prompt ("true_cfg_scale")."""
    batch_argument: str = "num_images_per_prompt"
    """The pipeline argument that a request's batch size goes to."""
    rate_argument: str = "frame_rate"
    """The pipeline argument that a clip's frames a second go to; empty where it takes none."""
    tokenizer: str = "tokenizer"
    """The component whose tokens fill the prompt."""
    template_tokens: int = 0
    """Tokens of the pipeline's own prompt template, which do not count against `max_sequence_length`."""
    chat: Mapping[str, Any] | None = None
    """Further arguments of the tokenizer's chat template, into which the pipeline puts the prompt, with its system
    message if it has one; None without one.
    Unlike `template_tokens` its tokens count against `max_sequence_length`."""
    text_padded: bool = True
    """Prompts are padded to `max_sequence_length`; otherwise a prompt of another length is another shape."""
    recordable: bool = True
    """A step may be recorded as a CUDA graph: its denoiser does not wait for the GPU."""
    sound: bool = False
    """Its clips have a sound track."""
    vae_tiling: bool = False
    """Decode in overlapping tiles, which bounds the memory of long clips."""
    vae_fp32: bool = False
    """Its VAE runs in fp32, as its makers run it, and not in bf16."""
    call: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Further fixed keyword arguments of the pipeline call; `max_sequence_length`, in tokens, is always among them."""
    examples: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()
    """Fused into its denoiser, one after the other, before anything is quantized."""
    base: str = ""
    """Id of the model that it is with LoRAs; empty for any other."""
    like: str = ""
    """Id of the model of whose kind a checkpoint of somebody's own is (engine/weights/own.py); empty for ours."""
    place: Path | None = None
    """Folder of such a checkpoint, if it was given by that."""

    def __getstate__(self) -> dict[str, Any]:
        """For another process (engine/serving/process.py): what cannot be changed cannot be sent either."""
        return {name: dict(kept) if isinstance(kept, Mapping) else kept for name, kept in vars(self).items()}

    def with_loras(self, loras: tuple[Lora, ...]) -> ModelSpec:
        """The model with these LoRAs, as a model of its own."""
        said = " and ".join(lora.name if lora.scale == 1 else f"{lora.name} at {lora.scale:g}" for lora in loras)
        return replace(
            self,
            id="+".join([self.id, *(lora.written for lora in loras)]),
            name=f"{self.name} with {said}",
            summary=f"{self.summary} With LoRA: {said}, fused in bf16 before quantizing.",
            loras=loras,
            base=self.id,
        )

    def clip(self, num_frames: int) -> dict[str, Any]:
        """What the pipeline is told of a clip's length; nothing for pictures."""
        if self.modality == "image":
            return {}
        rate = {self.rate_argument: self.defaults.frame_rate} if self.rate_argument else {}
        return {"num_frames": num_frames, **rate}

    @property
    def retrained(self) -> bool:
        """Its weights need not be those that the recipes of its family were calibrated for."""
        return bool(self.loras or self.like)

    @property
    def stored_as(self) -> str:
        """Name of its folder among other checkpoints' folders."""
        return self.base or self.id

    @property
    def folder(self) -> Path:
        """Where a bundled model lies with its weights, and any other with its configurations alone."""
        if self.place is not None:
            return self.place
        return ASSETS / self.source if self.bundled else ASSETS / "configs" / self.configs

    @property
    def download(self) -> str:
        """What its first use fetches, in words."""
        fetched = self.memory_gb.download if self.memory_gb else 0.0
        return f"{fetched:.0f} GB from {self.url}"

    @property
    def makes(self) -> str:
        """What comes out, in words."""
        return "pictures" if self.modality == "image" else "clips"

    @property
    def url(self) -> str:
        """The model's page on the hub; for a bundled model, and one in a folder, its licence."""
        return self.licence_url if self.bundled or self.place is not None else f"https://huggingface.co/{self.source}"


MINI_FLUX = ModelSpec(
    id="mini-flux",
    name="FLUX miniature",
    family="mini-flux",
    summary="A 21-million-parameter FluxTransformer2DModel trained on Fluent 3D emoji; bundled, runs on a laptop CPU.",
    pipeline="FluxPipeline",
    modality="image",
    source="models/mini-flux",
    bundled=True,
    licence="Apache-2.0 (trained on Fluent Emoji, MIT)",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    defaults=Settings(height=256, width=256, num_inference_steps=20, guidance_scale=1.0),
    limits=Limits(
        sizes=((256, 256),),
        num_inference_steps=(1, 50),
        guidance_scale=(1.0, 6.0),
        batch_size=(1, 4),
        prompt_characters=150,
    ),
    recipes=("post", "tuned", "rebalanced", "full"),
    guidance_argument="true_cfg_scale",
    tokenizer="tokenizer_2",
    call=MappingProxyType({"max_sequence_length": 32, "negative_prompt": "", "guidance_scale": 1.0}),
    examples=(
        "a rocket on a blue background",
        "a cat on a red background",
        "a snowman on a purple background",
        "an octopus on a yellow background",
    ),
)

MINI_QWEN = ModelSpec(
    id="mini-qwen",
    name="Qwen-Image miniature",
    family="mini-qwen",
    summary="A 19-million-parameter QwenImageTransformer2DModel trained on Fluent 3D emoji; bundled, with true "
    "classifier-free guidance.",
    pipeline="QwenImagePipeline",
    modality="image",
    source="models/mini-qwen",
    bundled=True,
    licence="Apache-2.0 (trained on Fluent Emoji, MIT)",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    defaults=Settings(height=256, width=256, num_inference_steps=20, guidance_scale=2.5),
    limits=Limits(
        sizes=((256, 256),),
        num_inference_steps=(2, 50),
        guidance_scale=(1.0, 6.0),
        batch_size=(1, 4),
        prompt_characters=150,
    ),
    recipes=("post", "tuned", "rebalanced", "full"),
    guidance_argument="true_cfg_scale",
    template_tokens=34,
    text_padded=False,
    call=MappingProxyType({"negative_prompt": " ", "max_sequence_length": 24}),
    examples=(
        "a cactus on an orange background",
        "a dog on a green background",
        "a violin on a sky blue background",
        "a pizza on a teal background",
    ),
)

# diffusers' defaults have become those of LTX-2.3, with up to four forward passes a step; these give the guidance that
# LTX-2 had: two passes, no rescaling. audio_guidance_scale=None follows guidance_scale.
_LTX2_GUIDANCE = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": None,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
}

MINI_LTX2 = ModelSpec(
    id="mini-ltx2",
    name="LTX-2 miniature",
    family="mini-ltx2",
    summary="A 17-million-parameter LTX2VideoTransformer3DModel trained on animated Fluent emoji; bundled, makes clips "
    "of two seconds with their sound.",
    pipeline="LTX2Pipeline",
    modality="video",
    source="models/mini-ltx2",
    bundled=True,
    licence="Apache-2.0 (trained on Fluent Emoji, MIT)",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    defaults=Settings(
        height=160, width=160, num_inference_steps=20, guidance_scale=1.0, num_frames=25, frame_rate=12.0
    ),
    limits=Limits(
        sizes=((160, 160),),
        num_inference_steps=(1, 50),
        guidance_scale=(1.0, 6.0),
        batch_size=(1, 4),
        prompt_characters=150,
        num_frames=(25, 25),
        frames_step=8,
    ),
    recipes=("post", "tuned", "rebalanced", "post-corrected", "full"),
    batch_argument="num_videos_per_prompt",
    sound=True,
    call=MappingProxyType({"negative_prompt": "", "max_sequence_length": 32, **_LTX2_GUIDANCE}),
    examples=(
        "a penguin bouncing on a teal background",
        "a rocket spinning on a purple background",
        "a fire engine sliding in on a white background",
        "a butterfly on a pink background",
    ),
)

SIGN = "A cat holding a sign that says hello world"
"""The post's prompt for both picture models."""

FLUX_MEMORY = Memory(transformer=23.80, shared=9.94, run=4.6, host=8, kept=0.51, footprint=1.49)
FLUX_LIMITS = Limits(
    sizes=((1024, 1024), (768, 1360), (1360, 768), (832, 1216), (1216, 832), (512, 512)),
    num_inference_steps=(1, 100),
    guidance_scale=(1.0, 10.0),
    batch_size=(1, 8),
    prompt_characters=2000,
    size_multiple=16,  # the VAE's 8, times the transformer's patches of 2
    side=(256, 2048),
    max_pixels=2048 * 1024,  # trained up to two megapixels
)

FLUX_DEV = ModelSpec(
    id="flux.1-dev",
    name="FLUX.1-dev",
    summary="A 12-billion-parameter rectified-flow transformer for pictures, guidance-distilled.",
    family="flux.1-dev",
    pipeline="FluxPipeline",
    modality="image",
    source="black-forest-labs/FLUX.1-dev",
    bundled=False,
    revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    gated=True,
    configs="flux.1-dev",
    memory_gb=FLUX_MEMORY,
    licence="FLUX.1 [dev] Non-Commercial License",
    licence_url="https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    licence_note="The model FLUX.1-dev is licensed for non-commercial use only. What it makes may be used for any "
    "purpose, commercial ones too, except as section 2(d) of its licence says: not to train, fine-tune or distill a "
    "model that competes with it.",
    defaults=Settings(height=1024, width=1024, num_inference_steps=28, guidance_scale=3.5),
    limits=FLUX_LIMITS,
    recipes=("post", "tuned", "strict", "full"),
    tokenizer="tokenizer_2",
    call=MappingProxyType({"max_sequence_length": 512}),
    examples=(
        SIGN,
        "a red bicycle leaning on a white wall, morning light",
        "macro photograph of a dew drop on a fern",
    ),
)

# A fourth model of a known class is this one entry.
FLUX_SCHNELL = replace(
    FLUX_DEV,
    id="flux.1-schnell",
    name="FLUX.1-schnell",
    summary="FLUX.1 distilled to four steps: the same 12-billion-parameter architecture without guidance.",
    source="black-forest-labs/FLUX.1-schnell",
    revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
    gated=False,
    overrides=MappingProxyType(
        {
            "transformer": {"guidance_embeds": False},
            "scheduler": {"shift": 1.0, "use_dynamic_shifting": False},
        }
    ),
    memory_gb=replace(FLUX_MEMORY, transformer=23.78, footprint=1.47),
    licence="Apache-2.0",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    licence_note="",
    defaults=Settings(height=1024, width=1024, num_inference_steps=4, guidance_scale=0.0),
    limits=replace(FLUX_LIMITS, guidance_scale=(0.0, 0.0)),
    call=MappingProxyType({"max_sequence_length": 256}),
)

QWEN_MEMORY = Memory(transformer=40.86, shared=16.84, run=4.5, host=8, kept=2.53, footprint=1.44)
QWEN_IMAGE = ModelSpec(
    id="qwen-image",
    name="Qwen-Image",
    summary="A 20-billion-parameter transformer for pictures and the text in them, with true classifier-free guidance.",
    family="qwen-image",
    pipeline="QwenImagePipeline",
    modality="image",
    source="Qwen/Qwen-Image",
    bundled=False,
    revision="75e0b4be04f60ec59a75f475837eced720f823b6",
    configs="qwen-image",
    memory_gb=QWEN_MEMORY,
    licence="Apache-2.0",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    defaults=Settings(height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0),
    limits=Limits(
        # The post's size first, then those its authors recommend.
        sizes=((1024, 1024), (1328, 1328), (928, 1664), (1664, 928), (1104, 1472), (1472, 1104), (1056, 1584)),
        num_inference_steps=(2, 100),
        guidance_scale=(1.0, 10.0),
        batch_size=(1, 8),
        prompt_characters=2000,
        size_multiple=16,
        side=(256, 2048),
        max_pixels=2048 * 1024,
    ),
    recipes=("post", "tuned", "strict", "full"),
    guidance_argument="true_cfg_scale",
    template_tokens=34,
    text_padded=False,
    call=MappingProxyType({"negative_prompt": " ", "max_sequence_length": 512}),
    examples=(
        SIGN,
        "a bookshop window with a hand-painted sign that reads OPEN LATE",
        "a watercolour map of an island, every bay named",
    ),
)

LTX_2 = ModelSpec(
    id="ltx-2",
    name="LTX-2",
    summary="A 19-billion-parameter transformer that makes clips and their sound together.",
    family="ltx-2",
    pipeline="LTX2Pipeline",
    modality="video",
    source="Lightricks/LTX-2",
    bundled=False,
    revision="47da56e2ad66ce4125a9922b4a8826bf407f9d0a",
    configs="ltx-2",
    memory_gb=Memory(transformer=37.75, shared=29.90, run=5.1, host=8, text_kv=2.42, kept=6.14, footprint=2.23),
    licence="LTX-2 Community License",
    licence_url="https://huggingface.co/Lightricks/LTX-2/blob/main/LICENSE",
    licence_note="LTX-2 needs a paid licence from Lightricks where an entity with annual revenues of $10 million or "
    "more uses it commercially; its licence names further limits of use, which are for everybody.",
    defaults=Settings(
        height=512, width=768, num_inference_steps=40, guidance_scale=4.0, num_frames=121, frame_rate=24.0
    ),
    limits=Limits(
        sizes=((512, 768), (768, 512), (704, 1216), (1216, 704), (512, 512)),
        num_inference_steps=(2, 100),
        guidance_scale=(1.0, 10.0),
        batch_size=(1, 8),
        prompt_characters=4000,
        num_frames=(9, 257),
        frames_step=8,
        size_multiple=32,  # the VAE's compression in space
        side=(256, 1920),
        max_pixels=1920 * 1088,
    ),
    recipes=("post", "tuned", "post-corrected", "strict", "full"),
    batch_argument="num_videos_per_prompt",
    sound=True,
    vae_tiling=True,
    call=MappingProxyType(
        {
            "negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
            "max_sequence_length": 1024,
            **_LTX2_GUIDANCE,
        }
    ),
    examples=(
        "INT. HOME OFFICE - DAY. Soft natural daylight lights a desk with an open laptop. The camera holds a steady "
        "medium shot. A small real house cat sits naturally on all fours in front of the laptop, much smaller than the "
        "desk and computer. The cat looks at the screen curiously. Suddenly, with a soft magical sparkle effect, a "
        "pair of tiny reading glasses appears in midair and gently lands on the cat's face. A faint whimsical chime "
        "sound plays. The cat pauses for a split second, then begins pressing the keyboard clumsily with one paw, "
        "producing rapid typing sounds. The laptop screen glow reflects softly on the cat's fur while light playful "
        "music continues.",
        "Waves roll over pebbles on a grey beach, the camera is still. The stones rattle as the water draws back.",
        "A steam train crosses a viaduct in autumn, seen from afar. Its whistle echoes through the valley.",
    ),
)

QWEN_IMAGE_2512 = replace(
    QWEN_IMAGE,
    id="qwen-image-2512",
    name="Qwen-Image-2512",
    summary="Qwen-Image of December 2025: the same 20-billion-parameter architecture, trained on.",
    source="Qwen/Qwen-Image-2512",
    revision=None,
    memory_gb=replace(QWEN_MEMORY, run=7.6),  # Qwen-Image's 4.5 GB by the area of a picture
    # Size, steps, guidance and negative prompt are those of its card's example.
    defaults=Settings(height=1328, width=1328, num_inference_steps=50, guidance_scale=4.0),
    limits=replace(QWEN_IMAGE.limits, sizes=(*QWEN_IMAGE.limits.sizes[1:], (1584, 1056), (1024, 1024))),
    recipes=("post", "strict", "full"),
    call=MappingProxyType(
        {
            "negative_prompt": "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，"
            "过度光滑，画面具有AI感。构图混乱。文字模糊，扭曲。",
            "max_sequence_length": 512,
        }
    ),
)

LTX_2_3 = replace(
    LTX_2,
    id="ltx-2.3",
    name="LTX-2.3",
    summary="LTX-2's successor: 22 billion parameters with what reads its text, attention with gates, and guidance by "
    "four passes a step.",
    family="ltx-2.3",
    source="diffusers/LTX-2.3-Diffusers",
    revision=None,
    configs="ltx-2.3",
    # What a run allocates is LTX-2's: as many tokens, decoded in tiles as large.
    memory_gb=Memory(transformer=37.98, shared=32.54, run=5.1, host=8, kept=6.16, footprint=2.40),
    licence="LTX-2.x Community License",
    licence_url="https://github.com/Lightricks/LTX-2/blob/main/LICENSE",
    licence_note="LTX-2.3 needs a paid licence from Lightricks where an entity with annual revenues of $10 million or "
    "more uses it commercially; its licence names further limits of use, which are for everybody.",
    defaults=replace(LTX_2.defaults, num_inference_steps=30, guidance_scale=3.0),
    recipes=("post", "strict", "full"),
    # As diffusers' documentation recommends for LTX-2.3. Two passes are for the prompts, one with the attention of a
    # block left out, one without attention between clip and sound.
    call=MappingProxyType(
        {
            "negative_prompt": "blurry, out of focus, overexposed, underexposed, low contrast, washed out colors, "
            "excessive noise, grainy texture, poor lighting, flickering, motion blur, distorted proportions, unnatural "
            "skin tones, deformed facial features, asymmetrical face, missing facial features, extra limbs, disfigured "
            "hands, wrong hand count, artifacts around text, inconsistent perspective, camera shake, incorrect depth "
            "of field, background too sharp, background clutter, distracting reflections, harsh shadows, inconsistent "
            "lighting direction, color banding, cartoonish rendering, 3D CGI look, unrealistic materials, uncanny "
            "valley effect, incorrect ethnicity, wrong gender, exaggerated expressions, wrong gaze direction, "
            "mismatched lip sync, silent or muted audio, distorted voice, robotic voice, echo, background noise, "
            "off-sync audio, incorrect dialogue, added dialogue, repetitive speech, jittery movement, awkward pauses, "
            "incorrect timing, unnatural transitions, inconsistent framing, tilted camera, flat lighting, inconsistent "
            "tone, cinematic oversaturation, stylized filters, or AI artifacts.",
            "max_sequence_length": 1024,
            "stg_scale": 1.0,
            "modality_scale": 3.0,
            "guidance_rescale": 0.7,
            "audio_guidance_scale": 7.0,
            "audio_stg_scale": 1.0,
            "audio_modality_scale": 3.0,
            "audio_guidance_rescale": 0.7,
            "spatio_temporal_guidance_blocks": (28,),
            "use_cross_timestep": True,
        }
    ),
)

Z_IMAGE = ModelSpec(
    id="z-image-turbo",
    name="Z-Image-Turbo",
    summary="A 6-billion-parameter single-stream transformer for pictures, distilled to eight steps without guidance.",
    family="z-image",
    pipeline="ZImagePipeline",
    modality="image",
    source="Tongyi-MAI/Z-Image-Turbo",
    bundled=False,
    configs="z-image-turbo",
    # What a run allocates is FLUX.1's: the same VAE decodes a picture of the same size.
    memory_gb=Memory(transformer=12.31, shared=8.21, run=4.6, host=8, kept=0.95, footprint=0.75),
    licence="Apache-2.0",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    # As the example of diffusers' pipeline has it.
    defaults=Settings(height=1024, width=1024, num_inference_steps=8, guidance_scale=0.0),
    limits=replace(FLUX_LIMITS, guidance_scale=(0.0, 10.0)),  # by two passes above 1, for checkpoints before distilling
    recipes=("post", "strict", "full"),
    chat=MappingProxyType({"enable_thinking": True}),
    text_padded=False,
    recordable=False,  # its first step makes the table of its rotary embeddings on the host
    call=MappingProxyType({"negative_prompt": "", "max_sequence_length": 512}),
    examples=(SIGN, *FLUX_DEV.examples[1:]),
)

FLUX2_KLEIN = ModelSpec(
    id="flux.2-klein-4b",
    name="FLUX.2 [klein] 4B",
    summary="A 4-billion-parameter rectified-flow transformer for pictures, distilled to four steps without guidance.",
    family="flux.2-klein",
    pipeline="Flux2KleinPipeline",
    modality="image",
    source="black-forest-labs/FLUX.2-klein-4B",
    bundled=False,
    configs="flux.2-klein-4b",
    memory_gb=Memory(transformer=7.75, shared=8.21, run=4.6, host=8, kept=0.95, footprint=1.37),
    licence="Apache-2.0",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    defaults=Settings(height=1024, width=1024, num_inference_steps=4, guidance_scale=1.0),
    limits=replace(FLUX_LIMITS, guidance_scale=(1.0, 1.0)),
    recipes=("post", "strict", "full"),
    chat=MappingProxyType({"enable_thinking": False}),
    call=MappingProxyType({"max_sequence_length": 512}),
    examples=(SIGN, *FLUX_DEV.examples[1:]),
)

FLUX2_DEV = replace(
    FLUX2_KLEIN,
    id="flux.2-dev",
    name="FLUX.2-dev",
    summary="A 32-billion-parameter rectified-flow transformer for pictures, guidance-distilled, whose text a "
    "24-billion-parameter Mistral reads.",
    family="flux.2-dev",
    pipeline="Flux2Pipeline",
    source="black-forest-labs/FLUX.2-dev",
    gated=True,
    configs="flux.2-dev",
    memory_gb=Memory(transformer=64.45, shared=48.19, run=4.6, host=8, kept=2.92, footprint=5.56),
    licence="FLUX [dev] Non-Commercial License v2.0",
    licence_url="https://github.com/black-forest-labs/flux2/blob/main/model_licenses/LICENSE-FLUX-DEV",
    licence_note="The model FLUX.2-dev is licensed for non-commercial use only, and its output has to be filtered or "
    "reviewed before it is distributed. What it makes may be used for any purpose, commercial ones too, except as "
    "section 2(d) of its licence says: not to train, fine-tune or distill a model that competes with it.",
    defaults=Settings(height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0),  # as its card has them
    limits=FLUX_LIMITS,
    chat=MappingProxyType({"add_generation_prompt": False}),
)

WAN = ModelSpec(
    id="wan-2.2-5b",
    name="Wan2.2-TI2V-5B",
    summary="A 5-billion-parameter transformer that makes clips without sound, with true classifier-free guidance; of "
    "text alone here.",
    family="wan-2.2",
    pipeline="WanPipeline",
    modality="video",
    source="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    bundled=False,
    configs="wan-2.2-5b",
    # A run's allocation is added up from the shapes of a tiled decode; a step in fp32 norms allocates 5.5 GB.
    memory_gb=Memory(transformer=10.02, shared=14.18, run=6.1, host=8, kept=4.92, footprint=0.86, stored=34.18),
    licence="Apache-2.0",
    licence_url="https://github.com/Wan-Video/Wan2.2/blob/main/LICENSE.txt",
    # All of its makers' configuration, wan/configs/wan_ti2v_5B.py.
    defaults=Settings(
        height=704, width=1280, num_inference_steps=50, guidance_scale=5.0, num_frames=121, frame_rate=24.0
    ),
    limits=Limits(
        sizes=((704, 1280), (1280, 704)),
        num_inference_steps=(2, 100),
        guidance_scale=(1.0, 10.0),
        batch_size=(1, 4),
        prompt_characters=2000,
        num_frames=(5, 121),
        frames_step=4,
        size_multiple=32,  # the VAE's compression in space, and patches of 2 x 2
        side=(256, 1280),
        max_pixels=704 * 1280,
    ),
    recipes=("post", "strict", "full"),
    batch_argument="num_videos_per_prompt",
    rate_argument="",
    vae_tiling=True,  # its makers move the denoiser away instead: a whole clip of this size allocates 22 GB in fp32
    vae_fp32=True,
    call=MappingProxyType(
        {
            "negative_prompt": "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
            "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
            "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走",
            "max_sequence_length": 512,
        }
    ),
    examples=(
        "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.",
        "Waves roll over pebbles on a grey beach, the camera is still.",
        "A steam train crosses a viaduct in autumn, seen from afar.",
    ),
)

_models = {spec.id: spec for spec in (MINI_FLUX, MINI_QWEN, MINI_LTX2, FLUX_DEV, FLUX_SCHNELL, QWEN_IMAGE, LTX_2)}
MODELS: Mapping[str, ModelSpec] = MappingProxyType(_models)
"""What there is, and what this process was given."""
DEFAULT = MINI_FLUX.id
"""What is asked for where no model is named: bundled, and small enough for any machine."""
BUNDLED = tuple(spec.id for spec in MODELS.values() if spec.bundled)
KINDS: Mapping[str, ModelSpec] = MappingProxyType(
    {spec.id: spec for spec in (*_models.values(), QWEN_IMAGE_2512, LTX_2_3, Z_IMAGE, FLUX2_KLEIN, FLUX2_DEV, WAN)}
)
"""What a checkpoint of somebody's own may be like. Those that are not among `MODELS` have no pinned commit: they are
there once they are asked for by their id or repository, which is pinned to its commit then (engine/weights/own.py)."""
_given: dict[str, ModelSpec] = {}


def give(spec: ModelSpec) -> None:
    """Have a further model from now on; one of the same id gives way."""
    _given[spec.id] = _models[spec.id] = spec


def given() -> tuple[ModelSpec, ...]:
    """The further ones."""
    return tuple(_given.values())


def model(model_id: object) -> ModelSpec:
    """The spec with this id.

    Raises:
        RequestError: no such model; the sentence lists those there are.
    """
    if isinstance(model_id, str) and model_id in MODELS:
        return MODELS[model_id]
    hint = "; one with a LoRA is there where it was started with --lora" if "+" in str(model_id) else ""
    raise RequestError(f"There is no model {model_id!r}: choose one of {', '.join(MODELS)}{hint}.")
