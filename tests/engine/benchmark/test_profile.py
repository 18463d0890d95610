"""Kernels told apart by name, added up, and a step's work counted."""

import pytest
import torch
from torch import nn

from engine.benchmark import profile
from engine.quantization.capability import Machine, quantize_linear_modules, support


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_ovscale_bias_TNT", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "GEMM"),
        ("triton_tem_fused_addmm_3", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_poi_fused__to_copy_cat_permute_sdpa_view_6", profile.REST),
        ("triton_per_fused__scaled_mm__to_copy_abs_amax_cat_clamp_div_gelu_3", "quantize"),
        ("triton_red_fused__fused_rms_norm__to_copy_add_mul_2", "norm and rotary"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
    ],
)
def test_a_kernels_name_says_what_it_does(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_times_are_of_one_call_and_gaps_are_what_no_kernel_fills():
    events = [
        ("nvjet", 0, 10_000),
        ("triton_amax", 5_000, 20_000),
        ("other", 30_000, 40_000),
        ("nvjet", 40_000, 42_000),
    ]
    found = profile.summed(events, calls=2)
    assert (found["span_ms"], found["busy_ms"], found["gaps_ms"]) == (21, 16, 5)
    assert found["kinds"] == {"quantize": 7.5, "GEMM": 6, profile.REST: 5}
    assert [(k["name"], k["ms"], k["times"]) for k in found["kernels"][:2]] == [
        ("triton_amax", 7.5, 0.5),
        ("nvjet", 6, 1),
    ]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        heads = self.up(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return self.down(
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        )


def test_the_work_of_a_call_is_counted_and_nothing_stays_wrapped():
    denoiser, attention = Denoiser(), torch.nn.functional.scaled_dot_product_attention
    with profile.counted(denoiser) as work:
        denoiser(torch.zeros(3, 5, 8))
    assert work.products == {profile.Product(15, 8, 16, "Tensor"): 1, profile.Product(15, 16, 8, "Tensor"): 1}
    assert work.attentions == {(3, 2, 5, 5, 8): 1}
    assert (work.gemm_flops, work.attention_flops) == (2 * 2 * 15 * 8 * 16, 4 * 3 * 2 * 5 * 5 * 8)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert not denoiser.up._forward_hooks


@pytest.mark.parametrize("name", ["bf16", "mxfp8"])
def test_a_layers_product_is_found_and_made_again_alone(name):
    """Of a microscaled layer without the quantization of its activation; the native ones are rehearsed elsewhere."""
    layer = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16)).requires_grad_(False)
    if name != "bf16":
        quantize_linear_modules(layer, {"0"}, support(name, Machine(name="a CPU", kind="cpu")))
    alone = profile._alone(layer[0], 16, torch.device("cpu"))
    with profile._Products() as again:
        alone()
    (product,) = again.calls
    assert product[0].overloadpacket in (torch.ops.aten.linear, torch.ops.aten.addmm)
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in product[1])


def test_a_layer_without_a_known_product_has_none_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return x * 2

    assert profile._alone(Scaled(8, 8), 16, torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_profile_holds_the_kernels_of_the_calls_and_nothing_of_the_profilers():
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    found = profile.table(lambda: x @ x, device)
    assert found["kinds"].keys() == {"GEMM"}
    assert {kernel["times"] for kernel in found["kernels"]} == {1}
    assert 0 < found["busy_ms"] <= found["span_ms"]
