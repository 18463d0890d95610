"""One denoising step computed by several ranks: each takes a part of the sequence, with all of the weights.

Linear layers, norms and rotary embeddings work row by row, so they need nothing of other ranks. Attention needs all
rows: before it ranks exchange rows for heads, so that each has all rows of its share of the heads, and afterwards they
exchange back ("Ulysses", Jacobs et al. 2023, arXiv 2309.14509). Queries, keys and values travel in one exchange.

The exchanges are PyTorch's functional collectives over the default process group, which blocks compile without a graph
break and a step records in its CUDA graph. Knows nothing of processes, nor of what the ranks are but that the first,
rank 0, has the arguments and is given the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention, apply_rotary_emb
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

SPLIT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"FluxTransformer2DModel": {"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": 0, "txt_ids": 0}}
)
"""Class of a denoiser -> its arguments that are as long as a sequence, each with the dimension that is. What it makes
is as long as the first of them, in the same dimension."""

OPTIONS: Mapping[str, object] = MappingProxyType(
    {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": ["sink_waits"]}
)
"""Inductor settings besides those of engine/compiler/fusion.py: what does not need an exchange is computed before it is
waited for, as the wide layer beside FLUX's attention is."""


class Shared(Protocol):
    """What `compilation.Blocks` asks of a denoiser whose steps several ranks compute."""

    def part(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's `call` as this rank's part of it."""

    def lead(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A `call` of this rank that every other rank makes too."""

    def tell(self, name: str, *args: object) -> None:
        """Have every other rank's `Blocks` do the same."""

    def settle(self) -> None:
        """Wait until every other rank has done what it was told.

        Raises:
            FaultError: one of them was lost, so that what was made is not to be used.
        """


def heads(denoiser: nn.Module) -> int | None:
    """The heads that ranks can share; None where it is not known how to split a denoiser of this class."""
    return denoiser.config.num_attention_heads if type(denoiser).__name__ in SPLIT else None


def shares(length: int, ranks: int) -> list[int]:
    """How many of so many rows each rank takes: what is over goes to the first ones."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


class Sequence:
    """One rank's part of a denoiser, whose attentions it has exchange rows from now on.

    Args:
        denoiser: of a class in `SPLIT`, on this rank's device.
        ranks: how many there are; they divide its heads.
        rank: which of them this is.

    Attributes:
        group: the name of the process group.
        rows: how many rows each rank has of all sequences together.
    """

    def __init__(self, denoiser: nn.Module, ranks: int, rank: int):
        self.group, self.rows = "", [0] * ranks
        self._ranks, self._rank = ranks, rank
        self._split = SPLIT[type(denoiser).__name__]
        self._signature = inspect.signature(denoiser.forward)
        self._processors = []
        for attention in [module for module in denoiser.modules() if isinstance(module, FluxAttention)]:
            self._processors.append(_Attention(self, attention.processor._attention_backend))
            attention.set_processor(self._processors[-1])

    @property
    def backend(self) -> str | None:
        """diffusers' name of the attention's kernel."""
        return self._processors[0]._attention_backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        for processor in self._processors:
            processor._attention_backend = name

    def part(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's `call` with the arguments of rank 0, of which this rank computes its part. Every rank calls
        with tensors of the same shapes, contiguous and on its own device, which rank 0's overwrite; rank 0 is given all
        rows of what is made, the others none."""

        def computed(*args: object, **kwargs: object) -> object:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
            given = self._signature.bind(*args, **kwargs)
            lengths = [given.arguments[name].shape[dimension] for name, dimension in self._split.items()]
            parts = [shares(length, self._ranks) for length in lengths]
            for (name, dimension), each in zip(self._split.items(), parts, strict=True):
                whole = given.arguments[name]
                given.arguments[name] = whole.split(each, dimension)[self._rank].contiguous()
            own = [each for each, dimension in zip(parts, self._split.values(), strict=True) if dimension == 1]
            self.group, self.rows = dist.group.WORLD.group_name, [sum(rows) for rows in zip(*own, strict=True)]
            made = call(*given.args, **given.kwargs)
            return tree_map_only(Tensor, lambda rows: self._gathered(rows, parts[0]), made)

        return computed

    def _gathered(self, rows: Tensor, each: list[int]) -> Tensor:
        """Of (batch, rows, features): those of every rank on rank 0, of none on the others."""
        none = [0] * self._ranks
        send, receive = [each[self._rank], *none[1:]], each if self._rank == 0 else none
        first = rows.transpose(0, 1).contiguous()
        whole = first.new_empty(sum(receive), *first.shape[1:])
        dist.all_to_all_single(whole, first, receive, send)
        return whole.transpose(0, 1).contiguous()


class _Attention:
    """FluxAttnProcessor (diffusers 0.42) for one rank's rows."""

    _parallel_config = None

    def __init__(self, sequence: Sequence, backend: str | None):
        self._sequence, self._attention_backend = sequence, backend

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, rows, features) each, of this rank's rows."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [layer(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in layers]
            query = torch.cat([attn.norm_added_q(text[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(text[1]), key], dim=1)
            value = torch.cat([text[2], value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        attended = attend(query, key, value, self._sequence.rows, self._sequence.group, self._attention_backend)
        if encoder_hidden_states is None:
            return attended
        text_rows = encoder_hidden_states.shape[1]
        text_attended, attended = attended.split([text_rows, attended.shape[1] - text_rows], dim=1)
        for layer in attn.to_out:
            attended = layer(attended.contiguous())
        return attended, attn.to_add_out(text_attended.contiguous())


def attend(query: Tensor, key: Tensor, value: Tensor, rows: list[int], group: str, backend: str | None) -> Tensor:
    """Attention of this rank's rows to those of all ranks.

    Args:
        query, key, value: (batch, rows of this rank, heads, features of a head).
        rows: of each rank.

    Returns:
        (batch, rows of this rank, heads * features of a head).
    """
    ranks, batch, own = len(rows), query.shape[0], query.shape[1]
    # By the rank that is to have the heads, then by rows: what goes to a rank lies together.
    sent = [states.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4) for states in (query, key, value)]
    whole = exchanged(torch.stack(sent, dim=3).flatten(0, 1), [own] * ranks, rows, group)
    total = whole.shape[0]
    # Of one picture a plain view, whose strides say so too: cuDNN asks for that.
    whole = whole.view(1, total, *whole.shape[2:]) if batch == 1 else whole.transpose(0, 1).contiguous()
    attended = dispatch_attention_fn(*whole.unbind(2), backend=backend)
    back = exchanged(attended.transpose(0, 1).reshape(total, batch, -1), rows, [own] * ranks, group)
    return back.view(ranks, own, batch, -1).permute(2, 1, 0, 3).reshape(batch, own, -1)


def exchanged(rows: Tensor, send: list[int], receive: list[int], group: str) -> Tensor:
    """The first `send[0]` rows to rank 0, the next `send[1]` to rank 1, and so on; gives what all ranks sent here, in
    their order."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(rows.contiguous(), receive, send, group))
