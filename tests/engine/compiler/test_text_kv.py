"""Keys and values of LTX-2's text, made once a call: the same outputs, from buffers that stay where they are."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, LTX2VideoTransformer3DModel

from engine.compiler import text_kv
from engine.compiler.compilation import DEFAULT, EAGER, GRAPHS, Blocks

SMALL = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "num_layers": 3,
    "caption_channels": 24,
    "rope_type": "split",
    "rope_double_precision": False,
}


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(**SMALL).to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture
def computed(monkeypatch):
    """Attentions whose keys and values were computed; nothing is compiled."""
    calls = []

    def key_value(attention, text):
        calls.append(attention)
        return text_kv.key_value(attention, text)

    def compiled(self):
        self._key_value = key_value
        return [block._call_impl for block in self._blocks]

    monkeypatch.setattr(Blocks, "_compiled", compiled)
    return calls


def text(batch=2, tokens=5, seed=0, device="cpu"):
    """A prompt and its mask, as the pipeline hands them over."""
    made = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, SMALL["caption_channels"])
    words, sounds = (torch.randn(shape, generator=made, dtype=torch.bfloat16).to(device) for _ in range(2))
    mask = (torch.arange(tokens, device=device) > 0).long().expand(batch, -1).contiguous()
    return {
        "encoder_hidden_states": words,
        "audio_encoder_hidden_states": sounds,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
    }


def step(denoiser, prompt, seed=0):
    batch, _, _ = prompt["encoder_hidden_states"].shape
    device, made = prompt["encoder_hidden_states"].device, torch.Generator().manual_seed(seed)
    frames, sound = (torch.randn(batch, n, 16, generator=made, dtype=torch.bfloat16).to(device) for n in (8, 4))
    places = {
        "video_coords": denoiser.rope.prepare_video_coords(batch, 2, 2, 2, device),
        "audio_coords": denoiser.audio_rope.prepare_audio_coords(batch, 4, device),
    }
    time = torch.full((batch,), 500.0 + seed, device=device)
    return denoiser(frames, sound, **prompt, timestep=time, sigma=time, **places, return_dict=False)


def same(made, expected):
    return all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@torch.inference_mode()
def test_steps_of_one_text_compute_its_keys_and_values_once_and_make_the_same(denoiser, computed):
    prompt, blocks = text(), Blocks(denoiser)
    expected = [step(denoiser, prompt, seed) for seed in range(3)]
    blocks.use(GRAPHS)
    assert all(same(step(denoiser, prompt, seed), expected[seed]) for seed in range(3))
    assert len(computed) == len(set(computed)) == 2 * SMALL["num_layers"]  # of the clip and of its sound


@torch.inference_mode()
def test_another_text_takes_the_place_of_the_first(denoiser, computed):
    first, second, blocks = text(seed=1), text(seed=2), Blocks(denoiser)
    expected = [step(denoiser, prompt) for prompt in (first, second)]
    assert not same(*expected)
    blocks.use(GRAPHS)
    places = []
    for prompt, made in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        assert same(step(denoiser, prompt), made)
        pairs = blocks._text_kv._current.pairs
        places.append([buffer.data_ptr() for of_text in pairs for pair in of_text for buffer in pair])
    assert places[0] == places[1] == places[2]  # where a recorded step reads them
    assert len(computed) == 3 * 2 * SMALL["num_layers"]


@torch.inference_mode()
def test_texts_of_two_shapes_by_turns_are_both_kept(denoiser, computed):
    prompts, blocks = (text(batch=2), text(batch=1)), Blocks(denoiser)
    expected = [step(denoiser, prompt) for prompt in prompts]
    blocks.use(GRAPHS)
    for _ in range(3):
        assert all(same(step(denoiser, *given), made) for *given, made in zip(prompts, expected, strict=True))
    assert len(computed) == 2 * 2 * SMALL["num_layers"]


@torch.inference_mode()
def test_what_the_layers_compute_or_where_they_lie_may_change(denoiser, computed):
    prompt, blocks = text(), Blocks(denoiser)
    blocks.use(GRAPHS)
    changes = (lambda: None, lambda: blocks.vary("bf16"), lambda: blocks.vary(None), blocks.forget)
    for times, change in enumerate(changes, start=1):
        change()
        for _ in range(2):
            step(denoiser, prompt)
        assert len(computed) == times * 2 * SMALL["num_layers"]
    blocks.forget()
    assert blocks._text_kv._made == {} and blocks._text_kv._current is None


@torch.inference_mode()
def test_it_goes_with_the_step_graph_alone(denoiser, computed):
    prompt, blocks = text(), Blocks(denoiser)
    assert blocks.text_once
    for mode in (DEFAULT, EAGER):
        blocks.use(GRAPHS)
        step(denoiser, prompt)
        before, expected = len(computed), step(denoiser, prompt)
        blocks.use(mode)
        assert same(step(denoiser, text()), expected) and len(computed) == before


def test_where_the_text_changes_from_step_to_step_nothing_is_kept(denoiser):
    flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=128)
    assert text_kv.of(flux, list(flux.transformer_blocks)) is None
    modulated = LTX2VideoTransformer3DModel(**SMALL, cross_attn_mod=True, audio_cross_attn_mod=True)
    assert text_kv.of(modulated, list(modulated.transformer_blocks)) is None
    assert text_kv.of(denoiser, list(denoiser.transformer_blocks)) is not None
    assert not Blocks(flux).text_once


@torch.inference_mode()
def test_one_graph_serves_all_blocks(denoiser):
    graphs = []
    compute = torch.compile(
        text_kv.key_value, fullgraph=True, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph
    )
    words = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    for block in denoiser.transformer_blocks:
        made, expected = compute(block.attn2, words), text_kv.key_value(block.attn2, words)
        assert same(made, expected)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_recorded_step_reads_the_text_of_its_call(denoiser):
    """Compiled and recorded, three prompts one after the other, each against the eager step."""
    denoiser.to("cuda")
    blocks = Blocks(denoiser)
    for prompt in (text(seed=seed, device="cuda") for seed in range(3)):
        blocks.use(EAGER)
        expected = [step(denoiser, prompt, seed) for seed in range(5)]
        blocks.use(GRAPHS)
        for seed in range(5):
            for made, eager in zip(step(denoiser, prompt, seed), expected[seed], strict=True):
                assert (made - eager).float().norm() < 0.02 * eager.float().norm()
    assert len(blocks._step._recorded) == 1
