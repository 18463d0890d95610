"""FP8 attention: the option `+fp8-attention` of a column (engine/columns.py), whose denoiser then attends with a loss.

Text encoders and VAE, which all columns share, keep theirs. What is computed is what FlashAttention-3's kernel does in
FP8 (Shah et al. 2024, arXiv 2407.08608; hopper/softmax.h) with what torchao 0.18 gives it (torchao.prototype.attention:
a scale for each batch item and head). cuDNN's `sdpa_fp8` has a scale for a whole tensor, and gives e4m3.

It is emulated on every device, so it has no speed. torchao's runs on Hopper alone, with a FlashAttention-3 that is
built from source, takes no masks, which LTX-2's attention to text has, and replaces PyTorch's attention for the whole
process. Nobody has measured it here.

Knows nothing of models: whatever calls PyTorch's `scaled_dot_product_attention` in a denoiser gets this.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.machine import Support

WORDS = "FP8 attention, emulated: queries, keys, values and probabilities in e4m3, softmax and sums in fp32"
"""What computes attention."""
EMULATED = "Its FP8 attention is emulated: no kernel of it has been measured here."
"""Why such a column has no speed, whatever its layers run in."""
IMPORTS = (
    "import math",
    "from functools import wraps",
    "from typing import Any",
    "import torch.nn.functional as F",
    "from torch import Tensor, nn",
    "from torch.overrides import TorchFunctionMode",
)
"""Of `source`, besides torch."""


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3 with a scale for each batch item and head, and what undoes the scale: (..., tokens, features)."""
    largest = x.abs().amax((-2, -1), keepdim=True).float()
    scale = torch.where(largest > 1e-12, 448 / largest, 1.0)
    return (x.float() * scale).to(torch.float8_e4m3fn), torch.where(largest > 1e-12, largest / 448, 1.0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    at_once: int = 2**24,
) -> Tensor:
    """`scaled_dot_product_attention` as FlashAttention-3 computes it in FP8, (batch, heads, tokens, features).

    With x8 = e4m3(x * 448 / max|x|) and x_s = max|x| / 448 of each batch item and head, in fp32 where not said:

        S = q8 k8^T * (q_s * k_s * scale) + mask    P = 256 exp(S - max S)    O = e4m3(P) v8 * v_s / sum P

    256 uses more of e4m3's range. A row that is masked whole gives 0. The kernel takes the greatest of the keys that
    it has seen so far where this takes that of all, sums in another order and, on Hopper, in a reduced width.

    Args:
        at_once: values of S that are there at the same time.
    """
    if dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("FP8 attention has no dropout, causal mask or grouped heads.")
    (q, q_s), (k, k_s), (v, v_s) = map(to_e4m3, (query, key, value))
    factor = q_s * k_s * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    shape = (*query.shape[:-1], key.shape[-2])
    mask = None if attn_mask is None else attn_mask.expand(shape)
    keys, values = k.float().mT, v.float()
    made, rows = query.new_empty((*query.shape[:-1], value.shape[-1])), max(1, at_once * shape[-2] // math.prod(shape))
    for some in (slice(begin, begin + rows) for begin in range(0, shape[-2], rows)):
        scores = (q[..., some, :].float() @ keys).mul_(factor)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask[..., some, :], -math.inf)
        elif mask is not None:
            scores += mask[..., some, :]
        greatest = scores.amax(-1, keepdim=True)
        shares = scores.sub_(greatest.masked_fill_(greatest == -math.inf, 0)).exp_().mul_(256)
        total = shares.sum(-1, keepdim=True)
        attended = shares.to(torch.float8_e4m3fn).float() @ values
        made[..., some, :] = attended.mul_(v_s).div_(total.masked_fill_(total == 0, 1))
    return made


class Fp8Attention(TorchFunctionMode):
    """A context in which PyTorch's attention, called in this thread, is `attend`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def use_in(denoiser: nn.Module) -> None:
    """Have a denoiser, and no other module, attend in FP8 from now on. Its blocks are to run eager."""
    forward = denoiser.forward

    @wraps(forward)
    def attending(*args: object, **kwargs: object) -> object:
        with Fp8Attention():
            return forward(*args, **kwargs)

    denoiser.forward = attending


def supported(layers: Support) -> Support:
    """How a denoiser runs whose Linear layers run so."""
    return replace(layers, execution="emulated", reason=f"{layers.reason} {EMULATED}")


def source() -> str:
    """All of this as a part of a program, which calls `use_in`."""
    return "\n\n\n".join(inspect.getsource(part).rstrip() for part in (to_e4m3, attend, Fp8Attention, use_in))
