"""Keys and values of the text, computed once a call where they are the same in every step.

LTX-2's blocks attend to keys and values of the text that depend on nothing else: not on the noise, not on the step.
Here they are computed when the text changes and wait where a recorded step reads them as it reads weights. FLUX's and
Qwen-Image's blocks change the text itself, so theirs differ in every block and step.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn


@dataclass(frozen=True)
class _Names:
    """One of the denoiser's texts."""

    text: str
    """The argument, of the denoiser and of its blocks."""
    attention: str
    """What attends to it, in every block."""
    projection: str
    """What the denoiser puts between its own argument and the blocks'."""


TEXTS: Mapping[str, Sequence[_Names]] = MappingProxyType(
    {
        "LTX2VideoTransformer3DModel": (
            _Names("encoder_hidden_states", "attn2", "caption_projection"),
            _Names("audio_encoder_hidden_states", "audio_attn2", "audio_caption_projection"),
        )
    }
)
"""Class of a denoiser -> its texts."""


def of(denoiser: nn.Module, blocks: Sequence[nn.Module]) -> TextKV | None:
    """None where nothing is known of the denoiser's class, or where a step modulates the text (as in LTX-2.3)."""
    names = TEXTS.get(type(denoiser).__name__, ())
    attentions = [getattr(block, name.attention) for block in blocks for name in names]
    if not attentions or any(block.cross_attn_adaln for block in blocks):
        return None
    if any(attention.to_gate_logits is not None for attention in attentions):
        return None
    return TextKV(denoiser, blocks, names)


class TextKV:
    """The text's keys and values of one denoiser, in buffers that never move while texts have one shape.

    A text counts as new when another tensor is given, as pipelines make one for each call and leave it as it is.

    Attributes:
        variant: hashable, set by whoever changes what the layers compute: the same text is new to them.
    """

    def __init__(self, denoiser: nn.Module, blocks: Sequence[nn.Module], names: Sequence[_Names]):
        self.variant: object = None
        self._names = names
        self._signature = inspect.signature(denoiser.forward)
        self._projections = [getattr(denoiser, name.projection, None) for name in names]
        self._attentions = [[getattr(block, name.attention) for block in blocks] for name in names]
        self._plain = [[attention.processor for attention in those] for those in self._attentions]
        self._made: dict[tuple[Any, ...], _Made] = {}
        """By the shapes of the texts."""
        self._current: _Made | None = None

    def install(self, ready: bool) -> None:
        """Have the attentions take keys and values, or the text again."""
        for those, plain in zip(self._attentions, self._plain, strict=True):
            for attention, processor in zip(those, plain, strict=True):
                attention.set_processor(_Ready(processor) if ready else processor)

    def before(self, call: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's `call`, with keys and values made by `compute` (see `key_value`) beforehand if need be."""

        def called(*args: object, **kwargs: object) -> object:
            given = self._signature.bind(*args, **kwargs).arguments
            self._make([given[name.text] for name in self._names], compute)
            return call(*args, **kwargs)

        return called

    def instead(self, call: Callable[..., Any], block: int) -> Callable[..., Any]:
        """The `call` of the block with that number, with its keys and values in place of the texts."""

        def called(*args: object, **kwargs: object) -> object:
            pairs = self._current.pairs if self._current is not None else []
            ready = {name.text: made[block] for name, made in zip(self._names, pairs, strict=True)}
            return call(*args, **kwargs | ready)

        return called

    def forget(self) -> None:
        """Give the buffers up."""
        self._made.clear()
        self._current = None

    def _make(self, texts: list[Tensor], compute: Callable[..., Any]) -> None:
        shapes = tuple((tuple(text.shape), text.dtype, text.device) for text in texts)
        made = self._current = self._made.setdefault(shapes, _Made(pairs=[[] for _ in texts]))
        if made.of is not None and made.variant == self.variant and all(map(operator.is_, made.of, texts)):
            return
        made.of = None  # were this to end halfway, the buffers would be of two texts
        for text, projection, attentions, pairs in zip(
            texts, self._projections, self._attentions, made.pairs, strict=True
        ):
            text = text.contiguous() if projection is None else projection(text)
            for block, attention in enumerate(attentions):
                pair = compute(attention, text)
                if block == len(pairs):
                    pairs.append(pair)
                for buffer, new in zip(pairs[block], pair, strict=True):
                    if buffer is not new:
                        buffer.copy_(new)
        made.of, made.variant = texts, self.variant


@dataclass
class _Made:
    """What was made of texts of one shape, where recorded steps read it."""

    pairs: list[list[tuple[Tensor, Tensor]]]
    """By text, by block: key and value, (batch, tokens, features)."""
    of: list[Tensor] | None = None
    """The texts; kept, so that no other tensor takes their identity."""
    variant: object = None


class _Ready:
    """An LTX-2 attention's processor, for keys and values that are there already instead of a text."""

    def __init__(self, plain: Any):
        self._plain = plain

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        query_rotary_emb: None = None,
        key_rotary_emb: None = None,
    ) -> Tensor:
        """Of (batch, tokens, features) queries' states; text is not rotated."""
        key, value = encoder_hidden_states
        batch, tokens, _ = key.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query = attn.norm_q(attn.to_q(hidden_states))
        query, key, value = (states.unflatten(2, (attn.heads, -1)) for states in (query, key, value))
        backend = self._plain._attention_backend
        attended = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=backend)
        attended = attended.flatten(2, 3)
        for layer in attn.to_out:
            attended = layer(attended)
        return attended


def key_value(attention: nn.Module, text: Tensor) -> tuple[Tensor, Tensor]:
    """Of an LTX-2 attention: (batch, tokens, features) each, for a text of (batch, tokens, features)."""
    return attention.norm_k(attention.to_k(text)), attention.to_v(text)
