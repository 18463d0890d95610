"""The number formats: one row each, with all that is known of a format without quantizing anything.

Names, order, defaults, bytes, speed and colours are read from here by the request, the plans, the benchmark, the
reports and the page. How a layer gets into a format is engine/quantization/capability.py's business, which layers do is
engine/quantization/recipes.py's. Imports no torch.

To add a format: a row here and in `ROWS`, how it is quantized, run and emulated in engine/quantization/capability.py,
the lines that do the same in a program of its own in engine/outputs/program.py, the post's configuration in
engine/benchmark/bench.py if the benchmark is to run it by the post's method, and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

SCALE_TILE = (128, 4)
"""Rows and columns of a tile of scales, as Blackwell's products take them (torchao's `to_blocked`)."""
NARROW = 2**-5
"""The bound of products that are accumulated in floating point. The narrowest accumulator known is Hopper's for FP8:
about 14 bits (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", 3.3.2). Simulated in float64, sums of 16,384 products
by it, the longest in the catalog, are less than half as far away, and two swapped blocks of 16 in such a sum twice as
far (tests/engine/quantization/test_proof.py)."""
OUTER_BITS = 32
"""Of the fp32 scale that a row or a tensor shares."""


@dataclass(frozen=True, kw_only=True)
class Colour:
    """In which a format is drawn, as CSS writes it."""

    light: str
    dark: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """How numbers are stored, and what follows from it."""

    id: str
    """In requests, files, links, the API and on the command line."""
    label: str
    """For people."""
    bits: int
    """Of one value."""
    element: str
    """Type of one value: "bf16", "int8", or exponent and mantissa bits as in "e4m3"."""
    block: int = 0
    """Neighbouring weights of a row that share a scale; 0 where none is shared by so few."""
    scale: str = ""
    """Type of that scale, "e8m0" for a power of two."""
    scale_bits: int = 0
    """Of that scale."""
    tiled: bool = False
    """The scales of blocks are stored in whole tiles of `SCALE_TILE`."""
    outer: str = ""
    """What shares an fp32 scale: "row" of output features, "tensor", or nothing."""
    multiple_in: int = 1
    """Input features of a layer must be a multiple of this."""
    multiple_out: int = 1
    """Output features must be a multiple of this."""
    time: float
    """Of a matrix product on a B200 as a share of bf16's, by its published peak rates; the real ones are not known
    here, and quantizing activations takes time of its own."""
    bound: float = 0.0
    """How far a native product may be from the exact emulation (`engine.quantization.proof.furthest`)."""
    hardware: str = ""
    """What multiplies it natively, for a sentence; empty for the reference."""
    default: bool
    """It takes part where nobody chose."""
    colour: Colour

    def size(self, in_features: int, out_features: int) -> int:
        """Bytes of one weight as it is stored, with its scales."""
        tiled = self.tiled and self.block
        bits = self.bits + (self.scale_bits / self.block if self.block and not tiled else 0)
        size = round(bits / 8 * in_features * out_features)
        if tiled:
            rows, columns = SCALE_TILE
            tiles = ceil(out_features / rows) * ceil(in_features / self.block / columns)
            size += tiles * rows * columns * self.scale_bits // 8
        return size + OUTER_BITS // 8 * {"": 0, "row": out_features, "tensor": 1}[self.outer]


BF16 = Format(
    id="bf16",
    label="bf16",
    bits=16,
    element="bf16",
    time=1,
    default=True,
    colour=Colour(light="#c9c9d0", dark="#4b4b53"),
)
FP8 = Format(
    id="fp8",
    label="FP8",
    bits=8,
    element="e4m3",
    outer="row",
    multiple_in=16,
    multiple_out=16,
    time=1 / 2,
    bound=NARROW,
    hardware="an Ada, Hopper or Blackwell GPU (compute capability 8.9)",
    default=False,
    colour=Colour(light="#b7791f", dark="#e0a94a"),
)
MXFP8 = Format(
    id="mxfp8",
    label="MXFP8",
    bits=8,
    element="e4m3",
    block=32,
    scale="e8m0",
    scale_bits=8,
    tiled=True,  # by torchao: 1 to 2% more bytes in the miniatures
    multiple_in=32,
    multiple_out=32,
    time=1 / 2,
    bound=NARROW,
    hardware="a Blackwell GPU (compute capability 10.0)",
    default=True,
    colour=Colour(light="#52525b", dark="#b4b4bd"),
)
NVFP4 = Format(
    id="nvfp4",
    label="NVFP4",
    bits=4,
    element="e2m1",
    block=16,
    scale="e4m3",
    scale_bits=8,
    outer="tensor",
    multiple_in=32,  # Blackwell's GEMM takes rows of 16 bytes
    multiple_out=16,
    time=1 / 4,
    bound=NARROW,
    hardware="a Blackwell GPU (compute capability 10.0)",
    default=True,
    colour=Colour(light="#0f766e", dark="#2dd4bf"),
)

INT8 = Format(
    id="int8",
    label="INT8",
    bits=8,
    element="int8",
    outer="row",
    multiple_in=8,  # of cuBLAS's product
    multiple_out=8,
    time=1 / 2,
    bound=0.0,  # sums in int32 are exact
    hardware="an NVIDIA GPU from Ampere on (compute capability 8.0), or a CPU with VNNI or AMX",
    default=False,
    colour=Colour(light="#7c3aed", dark="#a78bfa"),
)

ROWS = (BF16, FP8, MXFP8, NVFP4, INT8)
"""The reference first; everywhere else in this order."""
FORMATS: Mapping[str, Format] = MappingProxyType({row.id: row for row in ROWS})
REFERENCE = BF16.id
"""What all others are compared with."""
PRECISIONS = tuple(FORMATS)
QUANTIZED = tuple(name for name in PRECISIONS if name != REFERENCE)
DEFAULTS = tuple(row.id for row in ROWS if row.default)
"""What takes part where nobody chose, the reference included."""
LABELS: Mapping[str, str] = MappingProxyType({row.id: row.label for row in ROWS})
