"""Learnt weights kept as changes: read back bit for bit, and refused where they do not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import LoadError
from engine.quantization import gptq, nvfp4

NAME = "block.layer"


@pytest.fixture
def weight():
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()


def changed(packed, share):
    """The same with some codes moved to the next one, which for zero is its negative's side."""
    codes = packed[0].clone()
    some = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < share
    codes[some] = codes[some] ^ 0x11
    return codes, *packed[1:]


@pytest.mark.parametrize("share", [0, 0.0005, 0.05, 1])
@pytest.mark.parametrize("calibrated", [False, True])
def test_changes_of_searched_or_calibrated_weights_are_read_back(weight, share, calibrated, tmp_path):
    before = gptq.quantize(weight, torch.eye(96)) if calibrated else nvfp4.quantize(weight, searched=True)
    after = changed(before, share)
    files = gptq.write(tmp_path, "whole", {NAME: before}) if calibrated else ()
    files += gptq.write_changes(tmp_path, "changes", {NAME: (before, after)})
    assert gptq.names(files) == {NAME}
    found = gptq.read(files, NAME, weight)
    assert torch.equal(nvfp4.dequantize(*found), nvfp4.dequantize(*after))


def test_no_byte_is_kept_for_a_zero_that_changes_its_sign(weight, tmp_path):
    before = nvfp4.quantize(torch.zeros_like(weight), searched=True)
    (file,) = gptq.write_changes(tmp_path, "changes", {NAME: (before, (before[0] ^ 0x88, *before[1:]))})
    assert {name: len(part) for name, part in load_file(file).items()} == {f"{NAME}.gaps": 0, f"{NAME}.changed": 0}


@pytest.mark.parametrize(
    "damage",
    [
        {"gaps": torch.full((9000,), 200, dtype=torch.uint8)},
        {"changed": torch.zeros(1, dtype=torch.uint8)},
        {"changed": torch.zeros(2, 2, dtype=torch.uint8)},
        {"gaps": torch.zeros(3, dtype=torch.int32)},
    ],
)
def test_changes_that_do_not_fit_are_refused_in_one_sentence(weight, damage, tmp_path):
    before = nvfp4.quantize(weight, searched=True)
    (file,) = gptq.write_changes(tmp_path, "changes", {NAME: (before, changed(before, 0.5))})
    save_file(load_file(file) | {f"{NAME}.{part}": tensor for part, tensor in damage.items()}, file)
    with pytest.raises(LoadError, match=r"changes-1\.safetensors was calibrated for another weight of block\.layer"):
        gptq.read((file,), NAME, weight)
