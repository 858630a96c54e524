"""Clipping by the norm, which the optimizer does as it reads the gradients."""

import pytest
import torch

from lit_sparse.modules import CausalLM
from lit_sparse.optim import AdamW
from lit_sparse.testing import tiny_llm
from tests.methods import data, trainer


def fitted(optimizer, clip, algorithm="norm"):
    module = CausalLM(tiny_llm("llama"), lr=1e-2, optimizer=optimizer)
    trainer(3, gradient_clip_val=clip, gradient_clip_algorithm=algorithm).fit(module, datamodule=data())
    return torch.cat([parameter.detach().flatten() for parameter in module.build().parameters()])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clips_as_torch_does(algorithm):
    theirs = fitted(lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, eps=1e-2, fused=True), 0.05, algorithm)
    ours = fitted(lambda parameters, lr: AdamW(parameters, lr=lr, eps=1e-2), 0.05, algorithm)
    free = fitted(lambda parameters, lr: AdamW(parameters, lr=lr, eps=1e-2), None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, free, rtol=1e-3, atol=1e-4)
