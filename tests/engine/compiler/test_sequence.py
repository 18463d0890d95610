"""A step that several ranks compute: by processes on a CPU, or where a group of one rank says that it has another."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.compiler import compilation, fusion, rotary, sequence
from tests.support import ranks

REWRITES = {
    rotary: ("turned_pairs", "turned_before_put_together", "pairs_in_words"),
    fusion: ("gelu_in_product", "logistic_gelu", "share"),
}


def test_ranks_compute_bit_for_bit_what_one_computes_of_rows_that_they_cannot_share_evenly(tmp_path):
    multiprocessing.spawn(ranks.compute, (3, (1, 2), str(tmp_path)), nprocs=3)
    made = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for batch in (1, 2):
        with torch.inference_mode():
            (alone,) = ranks.denoiser()(**ranks.arguments(batch))
        assert made[0][batch].equal(alone)
        assert all(others[batch].numel() == 0 for others in made[1:])


def test_rows_are_shared_evenly_and_none_is_lost():
    for length in range(1, 40):
        for count in range(1, 9):
            shares = sequence.shares(length, count)
            assert sum(shares) == length and max(shares) - min(shares) <= 1


@contextmanager
def two_ranks():
    """A group of which this is the first of two, whose exchanges exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


class _Rewritten(Exception):
    pass


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_all_rewrites_of_a_block_hold_in_a_ranks_part_of_it(blocks, monkeypatch):
    found = []
    for module, names in REWRITES.items():
        for name in names:
            plain = getattr(module, name)
            counted = lambda graph, plain=plain, name=name: found.append((name, plain(graph)))  # noqa: E731
            monkeypatch.setattr(module, name, counted)
    rewrites = fusion.Rewrites.__call__

    def rewritten(self, graph):
        rewrites(self, graph)
        raise _Rewritten  # what Inductor makes of it takes long

    monkeypatch.setattr(fusion.Rewrites, "__call__", rewritten)

    def of(denoiser, options):
        found.clear()
        width = denoiser.config.num_attention_heads * 32
        turns = torch.randn(16, 32)
        given = {
            "hidden_states": torch.randn(1, 12, width).bfloat16(),
            "encoder_hidden_states": torch.randn(1, 4, width).bfloat16(),
            "temb": torch.randn(1, width).bfloat16(),
            "image_rotary_emb": (turns, turns),
        }
        torch.compiler.reset()
        block = torch.compile(getattr(denoiser, blocks)[0], fullgraph=True, dynamic=False, options=options)
        with torch.inference_mode(), pytest.raises(Exception, match="_Rewritten"):
            block(**given)
        return list(found)

    compilation.configure()
    options = dict(fusion.options()) | {"fx_graph_cache": False}
    alone = of(ranks.denoiser(), options)
    with two_ranks() as group:
        shared = ranks.denoiser()
        part = sequence.Sequence(shared, 2, 0)
        part.group, part.rows = group, [16, 16]
        assert of(shared, options | sequence.OPTIONS) == alone
    assert sum(count for _, count in alone) > 0
