"""What modules without weights would take in their types, in GB of 1e9 bytes."""

from engine.weights import host_memory, loading


def gigabytes(module):
    return sum(p.nbytes for p in module.parameters()) / 1e9


def streamed(denoiser, others):
    """What stays of the other components on a device that streams text encoders, and of the denoiser where that is
    streamed too: all outside of blocks, and its two largest."""
    text = [block for module in loading.text_parts(others) for block in host_memory.blocks(module).values()]
    of = sorted(map(gigabytes, host_memory.blocks(denoiser).values()))
    kept = sum(map(gigabytes, others.values())) - sum(map(gigabytes, text))
    return kept, gigabytes(denoiser) - sum(of) + sum(of[-2:])
