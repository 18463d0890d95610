"""Whose step can be a CUDA graph: a denoiser on a GPU that is not there, watched for whatever takes the host.

Its tensors are PyTorch's fake ones, which have no value to wait for, and say on which device they would be.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import catalog
from engine.weights import loading


class Host(TorchDispatchMode):
    """Refuses every operation with a tensor in host memory: a recording holds its address, and copies nothing again."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        at = {leaf.device.type for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)}
        assert at <= {"cuda"}, operator
        return made


def step(model, given):
    """One of the full width, with two blocks of each kind; shapes of what it makes."""
    empty = loading.empty_transformer(catalog.KINDS[model])
    few = {name: 2 for name in ("num_layers", "num_single_layers", "n_layers") if name in empty.config}
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast afterwards
        try:
            with torch.device("cuda:0"):
                denoiser = type(empty).from_config({**empty.config, **few}).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        inputs = given(denoiser.config, lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype).cuda())
        with Host():
            return [tuple(made.shape) for made in tree_leaves(denoiser(**inputs, return_dict=False))]


def flux2(config, tensor):
    """1024 x 1024, 512 tokens of text."""
    return {
        "hidden_states": tensor(1, 4096, config.in_channels),
        "encoder_hidden_states": tensor(1, 512, config.joint_attention_dim),
        "timestep": tensor(1),
        "guidance": tensor(1, dtype=torch.float32) if config.guidance_embeds else None,
        "img_ids": tensor(1, 4096, 4, dtype=torch.int64),
        "txt_ids": tensor(1, 512, 4, dtype=torch.int64),
    }


def z_image(config, tensor):
    return {
        "x": [tensor(16, 1, 128, 128)],
        "t": tensor(1),
        "cap_feats": [tensor(40, config.cap_feat_dim)],
    }


@pytest.mark.parametrize("model", [name for name, kind in catalog.KINDS.items() if kind.pipeline.startswith("Flux2")])
def test_a_step_of_flux2_stays_on_the_gpu(model):
    assert catalog.KINDS[model].recordable
    assert step(model, flux2) == [(1, 4096, 128)]


def wan(config, tensor):
    """A clip of 5 frames of 704 x 1280, a timestep for each of its tokens, 512 tokens of text."""
    return {
        "hidden_states": tensor(1, config.in_channels, 2, 44, 80),
        "timestep": tensor(1, 2 * 22 * 40, dtype=torch.float32),
        "encoder_hidden_states": tensor(1, 512, config.text_dim),
    }


def test_a_step_of_wan_stays_on_the_gpu():
    assert catalog.KINDS["wan-2.2-5b"].recordable
    assert step("wan-2.2-5b", wan) == [(1, 48, 2, 44, 80)]


def test_a_step_of_z_image_does_not():
    """Its first one makes the table of its rotary embeddings on the host."""
    assert not catalog.KINDS["z-image-turbo"].recordable
    with pytest.raises(AssertionError):
        step("z-image-turbo", z_image)
