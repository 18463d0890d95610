"""Text encoders and VAE in pieces: compiled one at a time, proven, and used all or not at all."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.compiler import compilation, ends
from engine.compiler.ends import Ends
from engine.errors import CancelledRun
from engine.machine import Machine
from tests.support import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Block(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.linear = nn.Linear(wide, wide)

    def forward(self, x, kept=None):
        if kept is not None:
            kept.append(x + 1)  # as decoders of clips keep something of every frame
        return torch.relu(self.linear(x))


@pytest.fixture
def made(monkeypatch):
    """Two components of two blocks each, a call through all of them, and what was compiled of which block."""
    torch.manual_seed(0)
    monkeypatch.setattr(ends, "BLOCKS", {"Block"})
    monkeypatch.setattr(compilation, "configure", lambda: None)
    text, vae = (nn.ModuleList(Block(wide) for _ in range(2)) for wide in (4, 8))
    own = {block: block.forward for block in (*text, *vae)}
    seen = SimpleNamespace(text=text, vae=vae, how=[], calls=[], instead={}, asked=0)

    def compiled(call, **how):
        block = call.__self__
        assert call == own[block]
        seen.how.append((block, how))

        def called(*args, **kwargs):
            seen.calls.append(block)
            return seen.instead.get(block, call)(*args, **kwargs)

        return called

    monkeypatch.setattr(torch, "compile", compiled)

    def run(rows=3):
        x = torch.ones(rows, 4)
        for block in text:
            x = block(x)
        kept = []
        x = torch.cat([x, x], 1)
        for block in vae:
            x = block(x, kept=kept)
        assert len(kept) == 2  # once a block, whatever was tried besides
        return x

    seen.run = run
    seen.ends = Ends({"text_encoder": text, "vae": vae, "tokenizer": object()})
    return seen


def never():
    return False


def test_nothing_is_compiled_on_a_cpu_or_without_triton():
    hopper = Machine(name="NVIDIA H100", kind="cuda", capability=(9, 0))
    assert ends.wanted(CUDA, hopper)
    assert not ends.wanted(CUDA, Machine(name="NVIDIA H100", kind="cuda", capability=(9, 0), no_compile="no Triton"))
    assert not ends.wanted(CPU, Machine(name="a CPU", kind="cpu"))


def test_alike_blocks_are_one_piece_and_all_pieces_are_used_at_once(made):
    plain, told = made.run(), []
    made.ends.compile("small", made.run, never, lambda *piece: told.append(piece))
    assert [block for block, _ in made.how] == [*made.text, *made.vae]
    assert all(how == {"fullgraph": True, "dynamic": False} for _, how in made.how)
    assert told == [(1, 3), (2, 3), (3, 3)]  # the VAE's second block is given a list that is longer
    made.calls.clear()
    assert torch.equal(made.run(), plain) and not made.calls, "it is used before anybody said so"
    made.ends.use("small")
    assert torch.equal(made.run(), plain) and made.calls == [*made.text, *made.vae]
    assert made.ends.used == ("text_encoder", "vae")
    made.ends.use(None)
    made.calls.clear()
    assert torch.equal(made.run(), plain) and not made.calls and made.ends.used == ()
    assert not any("forward" in vars(block) for block in (*made.text, *made.vae))


def test_it_gives_way_between_two_pieces_and_goes_on_where_it_was(made):
    stops = iter([False, False, True])
    with pytest.raises(CancelledRun):
        made.ends.compile("small", made.run, lambda: next(stops))
    assert set(made.calls) == set(made.text)
    made.calls.clear()
    made.ends.use("small")
    made.run()
    assert made.ends.used == () and not made.calls
    made.ends.compile("small", made.run, never)
    assert set(made.calls) == set(made.vae)
    made.ends.use("small")
    assert made.ends.used == ("text_encoder", "vae")


def test_whoever_stops_a_call_leaves_eager_blocks(made):
    def stopped():
        made.run()
        raise CancelledRun

    with pytest.raises(CancelledRun):
        made.ends.compile("small", stopped, never)
    made.run()
    assert not made.calls and not any("forward" in vars(block) for block in (*made.text, *made.vae))


@pytest.mark.parametrize("fails", ["raises", "computes something else", "keeps something else", "makes no numbers"])
def test_a_component_with_a_piece_that_fails_stays_eager_and_says_so_once(made, fails, caplog):
    def wrong(x, kept=None):
        if fails == "raises":
            raise RuntimeError("no such kernel\nand a long story")
        right = Block.forward(made.vae[1], x, kept)
        if fails == "keeps something else":
            kept[-1] = x
        return right * {"computes something else": 1.05, "makes no numbers": float("nan")}.get(fails, 1)

    made.instead[made.vae[1]] = wrong
    plain = made.run()
    with caplog.at_level(logging.WARNING, ends.__name__):
        for size, rows in (("small", 3), ("large", 5)):
            made.ends.compile(size, partial(made.run, rows), never)
    (record,) = caplog.records
    assert record.getMessage().startswith("vae is not compiled (Block): ") and "long story" not in record.getMessage()
    made.ends.use("small")
    made.calls.clear()
    assert torch.equal(made.run(), plain)
    assert made.calls == [*made.text] and made.ends.used == ("text_encoder",)


def test_what_was_not_compiled_runs_eager_and_compiles_nothing(made):
    made.ends.compile("small", made.run, never)
    made.calls.clear()
    for size in ("large", "small"):
        made.ends.use(size)
        made.run(rows=7)
    assert not made.calls and made.ends.used == ("text_encoder", "vae")
    assert made.ends.is_ready("small") and not made.ends.is_ready("large")


@pytest.mark.parametrize("kind", ["flux.1-dev", "qwen-image", "ltx-2"])
def test_dynamo_takes_the_blocks_of_the_large_models_whole(kind, monkeypatch):
    """Graphs are traced here, but not compiled further, which takes a GPU or minutes."""
    torch.manual_seed(0)
    pipeline = tiny.KINDS[kind]()
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    vae = pipeline.vae
    if kind == "ltx-2":
        run = partial(vae.decode, torch.randn(1, 16, 2, 2, 3), None, return_dict=False)
    elif kind == "qwen-image":
        run = partial(vae.decode, torch.randn(1, 16, 1, 4, 4), return_dict=False)
    else:
        latents = torch.randn(1, 16, 4, 4)

        def run():
            texts = pipeline.encode_prompt("a cat", "a cat", max_sequence_length=16)[:2]
            return (*texts, vae.decode(latents, return_dict=False)[0])

    monkeypatch.setattr(compilation, "configure", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    held = Ends(pipeline.components)
    with torch.inference_mode():
        plain = run()
        held.compile("any", run, never)
        held.use("any")
        before = compilation.graphs_compiled()
        assert all(map(torch.equal, run(), plain)) and compilation.graphs_compiled() == before
    texts = ("text_encoder", "text_encoder_2") if kind == "flux.1-dev" else ()
    assert held.used == (*texts, "vae")
