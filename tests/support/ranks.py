"""A small denoiser, and processes that compute a step of it together."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

from engine.compiler.sequence import Sequence
from engine.weights import cpu_products

SIDE, TEXT = 5, 7
"""25 and 7 rows, which 2 or 3 ranks cannot share evenly."""


def denoiser():
    """A random FLUX with 6 heads, the same each time."""
    cpu_products.multiply_in_fp32_where_bf16_is_slow()  # in every process alike
    torch.manual_seed(0)
    made = FluxTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return made.to(torch.bfloat16).eval()


def arguments(batch):
    """Of a call of it."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    along = torch.arange(SIDE, dtype=torch.float32)
    return {
        "hidden_states": noise(batch, SIDE**2, 16),
        "encoder_hidden_states": noise(batch, TEXT, 32),
        "pooled_projections": noise(batch, 32),
        "timestep": torch.full((batch,), 0.5).bfloat16(),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), along, along),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def compute(rank, ranks, batches, folder):
    """One rank's life: what it is given of a step of each batch goes into `folder`. Only rank 0 has the arguments."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    mine, made = denoiser(), {}
    part = Sequence(mine, ranks, rank)
    for batch in batches:
        given = arguments(batch)
        if rank:
            given = {name: torch.empty_like(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        with torch.inference_mode():
            (made[batch],) = part.part(mine)(**given)
    torch.save(made, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
