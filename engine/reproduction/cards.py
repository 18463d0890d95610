"""What cards can do at most, by their makers' data sheets: nothing that was measured may be better.

Rates are dense, without structured sparsity, and where a data sheet has several for one format, by the width of the
accumulator, the largest. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.formats import BF16, FP8, INT8, MXFP8, NVFP4


@dataclass(frozen=True, kw_only=True)
class Card:
    """One kind of GPU."""

    name: str
    """A regular expression that its driver's name for it holds."""
    bf16: float
    """TFLOP/s of matrix products; so are the others. 0 where it has none."""
    eight: float
    """Of FP8 and MXFP8."""
    four: float
    """Of NVFP4."""
    int8: float
    """TOP/s."""
    bandwidth: float
    """Of its memory, TB/s of 1e12 bytes."""
    memory: float
    """GB of 1e9 bytes: its data sheet's, read as GiB."""

    def peak(self, precision: str) -> float:
        """TFLOP/s of a format's products; where the card has none in it, those of the bf16 that emulates it."""
        rates: Mapping[str, float] = {
            BF16.id: self.bf16,
            FP8.id: self.eight,
            MXFP8.id: self.eight,
            NVFP4.id: self.four,
            INT8.id: self.int8,
        }
        return rates[precision] or self.bf16


B200 = Card(name=r"\bG?B200\b", bf16=2500, eight=5000, four=10000, int8=5000, bandwidth=8.0, memory=206)
"""A GB200's rates, of which a B200 alone has nine tenths."""
CARDS = (
    Card(name=r"\bG?B300\b", bf16=2500, eight=5000, four=15000, int8=330, bandwidth=8.0, memory=309),
    B200,
    Card(name=r"\bH100 PCIe\b", bf16=756, eight=1513, four=0, int8=1513, bandwidth=2.04, memory=86),
    Card(name=r"\bH100 NVL\b", bf16=835, eight=1671, four=0, int8=1671, bandwidth=3.94, memory=101),
    Card(name=r"\b(H200|GH200)\b", bf16=989.5, eight=1979, four=0, int8=1979, bandwidth=4.9, memory=155),
    Card(name=r"\b(H100|H800)\b", bf16=989.5, eight=1979, four=0, int8=1979, bandwidth=3.36, memory=86),
    Card(name=r"\bRTX PRO 6000 Blackwell\b", bf16=504, eight=1008, four=2016, int8=1008, bandwidth=1.8, memory=104),
    Card(name=r"\bRTX 5090\b", bf16=419, eight=838, four=1676, int8=838, bandwidth=1.8, memory=34.4),
    Card(name=r"\bRTX 4090\b", bf16=330, eight=661, four=0, int8=661, bandwidth=1.01, memory=25.8),
    Card(name=r"\bL40S\b", bf16=362, eight=733, four=0, int8=733, bandwidth=0.865, memory=51.6),
    Card(name=r"\bA100\b", bf16=312, eight=0, four=0, int8=624, bandwidth=2.04, memory=86),
    Card(name=r"\bRTX 3090\b", bf16=142, eight=0, four=0, int8=284, bandwidth=0.937, memory=25.8),
)
"""The first whose name fits counts."""


def card(device: str) -> Card | None:
    """The kind of a device, by its driver's name for it; None for what is not in `CARDS`. Several that make one picture
    together (`Machine.label`) are one of so many times the rates."""
    kind = next((kind for kind in CARDS if re.search(kind.name, device)), None)
    together = re.match(r"(\d+) cards, ", device)
    if kind is None or together is None:
        return kind
    rates = {name: int(together[1]) * getattr(kind, name) for name in ("bf16", "eight", "four", "int8", "bandwidth")}
    return replace(kind, **rates)
