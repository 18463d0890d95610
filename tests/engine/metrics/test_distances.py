"""LPIPS and PSNR against the same maths written here once more, in float64."""

import math
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from engine.catalog import ASSETS
from engine.errors import LoadError
from engine.metrics import distances
from engine.metrics.distances import lpips_distance, psnr

CONVOLUTIONS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
"""AlexNet's `features`: layer -> stride and padding; a ReLU follows each, max pooling before layers 3 and 6."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(3, 3, 96, 64, generator=generator) * 2 - 1
    noise = torch.randn(3, 3, 96, 64, generator=generator) * torch.tensor([0.02, 0.2, 1.0]).view(3, 1, 1, 1)
    return a, (a + noise).clamp(-1, 1)


def reference_lpips(a, b):
    """Zhang et al. 2018, equation 1, from the bundled convolutions and the authors' linear heads."""
    alexnet = {k: v.double() for k, v in load_file(ASSETS / "lpips" / "alexnet_features.safetensors").items()}
    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", weights_only=True, map_location="cpu")

    def features(x):
        x = (x.double() - torch.tensor(SHIFT).double().view(3, 1, 1)) / torch.tensor(SCALE).double().view(3, 1, 1)
        for layer, (stride, padding) in CONVOLUTIONS.items():
            if layer in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = alexnet[f"features.{layer}.weight"], alexnet[f"features.{layer}.bias"]
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            yield x / x.square().sum(1, keepdim=True).sqrt()

    total = torch.zeros(len(a), dtype=torch.float64)
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        head = heads[f"lin{i}.model.1.weight"].double().view(1, -1, 1, 1)
        total += ((x - y).square() * head).sum(1).mean((1, 2))
    return total


def test_lpips_is_the_papers_formula(pair):
    expected = reference_lpips(*pair)
    assert 0 < expected.min() < 0.01 and expected.max() > 0.03  # a range worth checking
    torch.testing.assert_close(lpips_distance(*pair).double(), expected, rtol=1e-4, atol=1e-5)


def test_lpips_grows_with_the_noise(pair):
    near, middle, far = lpips_distance(*pair).tolist()
    assert 0 < near < middle < far


def test_equal_pictures_are_at_distance_zero(pair):
    assert lpips_distance(pair[0], pair[0].clone()).tolist() == [0, 0, 0]
    assert lpips_distance(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)).tolist() == [0]


def test_lpips_is_symmetric(pair):
    torch.testing.assert_close(lpips_distance(*pair), lpips_distance(*reversed(pair)), rtol=1e-5, atol=1e-7)


def test_a_batch_gives_what_its_pictures_give_alone(pair):
    batch = lpips_distance(*pair)
    assert batch.shape == (3,) and batch.dtype == torch.float32
    alone = torch.cat([lpips_distance(a[None], b[None]) for a, b in zip(*pair, strict=True)])
    torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-7)


def test_lpips_takes_other_float_types(pair):
    rounded = [t.bfloat16() for t in pair]
    torch.testing.assert_close(lpips_distance(*rounded), lpips_distance(*(t.float() for t in rounded)))


def test_lpips_needs_no_gradient(pair):
    a = pair[0].clone().requires_grad_()
    assert not lpips_distance(a, pair[1]).requires_grad


@pytest.mark.parametrize("measure", [lpips_distance, psnr])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1, 3, 64, 64), (1, 3, 64, 32)),
        ((2, 3, 64, 64), (1, 3, 64, 64)),
        ((3, 64, 64), (3, 64, 64)),
        ((1, 64, 64, 3), (1, 64, 64, 3)),
        ((1, 1, 64, 64), (1, 1, 64, 64)),
        ((1, 1, 3, 64, 64), (1, 1, 3, 64, 64)),
    ],
)
def test_wrong_shapes_are_refused_by_name(measure, a, b):
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)") as caught:
        measure(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(caught.value) and str(b) in str(caught.value)


def test_psnr_is_the_formula(pair):
    a, b = pair
    expected = [
        10 * math.log10(4 / (x.double() - y.double()).square().mean().item()) for x, y in zip(a, b, strict=True)
    ]
    assert psnr(a, b).shape == (3,)
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_of_one_grey_level():
    """One step of 8 bits everywhere is 20 log10(255) dB."""
    a = torch.zeros(1, 3, 8, 8)
    assert psnr(a, a + 2 / 255).item() == pytest.approx(20 * math.log10(255), rel=1e-6)


def test_psnr_of_equal_pictures_is_infinite(pair):
    assert psnr(pair[0], pair[0]).tolist() == [math.inf] * 3


def test_the_map_is_the_packages_spatial_map_at_a_quarter_of_the_size(pair):
    network = distances._network(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(network, "spatial", True)
        expected = F.avg_pool2d(network(*pair), 4)[:, 0]
    scores, maps = distances.lpips_maps(*pair)
    assert maps.shape == (3, 24, 16)
    torch.testing.assert_close(maps, expected, rtol=0.1, atol=0.05 * expected.max().item())
    for found, wanted in zip(maps, expected, strict=True):
        assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.99
    torch.testing.assert_close(maps.mean((1, 2)), scores, rtol=0.05, atol=1e-6)


def test_the_map_shows_where_the_pictures_differ(pair):
    a = pair[0][:1]
    b = a.clone()
    b[:, :, 64:96, 32:64] = -b[:, :, 64:96, 32:64]
    where = distances.lpips_maps(a, b)[1][0]
    assert where.argmax() in [y * 16 + x for y in range(15, 24) for x in range(7, 16)]
    assert where[:8, :4].max() < 0.02 * where.max()


@pytest.mark.parametrize(("size", "expected"), [((64, 66), (16, 17)), ((95, 64), (24, 16))])
def test_a_map_of_an_uneven_size_is_rounded_up(size, expected):
    assert distances.lpips_maps(torch.zeros(1, 3, *size), torch.ones(1, 3, *size))[1].shape == (1, *expected)


def test_missing_alexnet_weights_are_named(monkeypatch, tmp_path, pair):
    monkeypatch.setattr(distances, "_ALEXNET", tmp_path / "gone.safetensors")
    distances._network.cache_clear()
    with pytest.raises(LoadError, match=r"gone\.safetensors is missing"):
        lpips_distance(*pair)


@pytest.mark.parametrize("pixels", [1, 2 * 96 * 64, 1 << 22])
def test_a_clip_is_measured_frame_by_frame_however_many_at_once(pair, monkeypatch, pixels):
    monkeypatch.setattr(distances, "_PIXELS_AT_ONCE", pixels)
    a, b = pair
    scores, decibels, maps = distances.clip_distance(a, b, torch.device("cpu"))
    assert scores.shape == (3,) and decibels.shape == () and maps.shape == (3, 24, 16)
    torch.testing.assert_close(maps, distances.lpips_maps(a, b)[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores, lpips_distance(a, b), rtol=1e-4, atol=1e-6)
    error = (a.double() - b.double()).square().mean().item()  # over all frames, not the mean of decibels
    assert decibels.item() == pytest.approx(10 * math.log10(4 / error), rel=1e-5)


def test_equal_clips_are_at_no_distance(pair):
    a, _ = pair
    scores, decibels, maps = distances.clip_distance(a, a.clone(), torch.device("cpu"))
    assert not maps.any()
    assert scores.tolist() == [0, 0, 0] and decibels.item() == math.inf


def test_clips_of_different_length_are_refused(pair):
    a, b = pair
    with pytest.raises(ValueError, match="one shape"):
        distances.clip_distance(a, b[:2], torch.device("cpu"))
