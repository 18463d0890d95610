"""Weights that learn: they start where they are stored, multiply as they will, and come nearer to bf16."""

import torch
from torch import nn

from engine.quality import distill
from engine.quality.distill import LearningLinear, Lesson, Student
from engine.quantization import nvfp4
from engine.quantization.emulation import nvfp4_linear, nvfp4_weight_only

WIDTH = 64


class Denoiser(nn.Module):
    """Two layers, of which the first is also asked alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH).bfloat16() for _ in range(2))

    def forward(self, x):
        return (x + self.second(torch.nn.functional.gelu(self.first(x))),)


class Bench:
    def __init__(self):
        torch.manual_seed(0)
        self.exact = Denoiser()


def calls(bench, count):
    with torch.no_grad():
        made = [torch.randn(32, WIDTH).bfloat16() for _ in range(count)]
        return [((x,), {}, bench.exact(x)) for x in made]


def packed(bench):
    return {name: nvfp4.quantize(bench.exact.get_submodule(name).weight.data) for name in ("first", "second")}


def test_weights_start_as_they_are_stored_and_no_further_from_the_exact_ones():
    bench = Bench()
    stored, exact = packed(bench)["first"], bench.exact.first.weight.data
    latent, scales = distill.start(exact, stored)
    wide = scales.repeat_interleave(nvfp4.BLOCK, 1)
    assert torch.equal(nvfp4.round_e2m1_(latent.clone()) * wide, nvfp4.dequantize(*stored))
    # Of weights that are rounded to nearest the exact one lies within the same value.
    stored_at, exact_at = nvfp4.dequantize(*stored) / wide, (exact.float() / wide).clamp(-6, 6)
    assert ((latent - exact_at).abs() <= (stored_at - exact_at).abs() + 2 * distill._INSIDE).all()


def test_a_layer_multiplies_as_its_stored_weight_will():
    bench = Bench()
    stored = packed(bench)
    student = Student(bench, stored, [], alone=["second"])
    x = torch.randn(32, WIDTH).bfloat16()
    first, second = (getattr(student.denoiser, name) for name in stored)
    assert isinstance(first, LearningLinear) and type(bench.exact.first) is nn.Linear
    with torch.no_grad():
        quantized = nvfp4_linear(x, *stored["first"], bench.exact.first.bias.data)
        alone = nvfp4_weight_only(x, *stored["second"], bench.exact.second.bias.data)
        torch.testing.assert_close(first(x), quantized, rtol=0.02, atol=0.02)
        assert torch.equal(second(x), alone)


def test_learning_brings_what_is_said_nearer_to_bf16_on_calls_that_it_has_not_seen():
    bench = Bench()
    student = Student(bench, packed(bench), [])
    some, others = calls(bench, 16), calls(bench, 4)
    before = distill.error(student.denoiser, others)
    done = distill.learn(student, some, Lesson(seconds=600, most=60, rate=0.02), lambda text: None)
    assert done == 60 and distill.error(student.denoiser, others) < 0.95 * before
    found = student.weights()
    assert torch.equal(found["first"][1].view(torch.uint8), student.packed["first"][1].view(torch.uint8))


def test_a_lesson_ends_by_the_clock_too():
    bench = Bench()
    assert distill.learn(Student(bench, packed(bench), []), calls(bench, 1), Lesson(seconds=1e-9), print) == 0
