"""Memory of training by forward passes: inference's of the same batch, and the state that a method keeps."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.zeroth_order import Peaks, peaks
from lit_sparse import loss
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import HELENE, PEFT, MeZO, UpdateStrategy
from lit_sparse.zeroth_order import directions, perturbed
from lit_sparse_kernels import philox

LORA = {"r": 8, "target_modules": "all-linear"}


def of(*updates: UpdateStrategy) -> Peaks:
    """Of a step on a model of 2.1 million weights, 8 MiB, half of them in the embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, tie_word_embeddings=True, **sizes))
    ids = torch.randint(3, 8192, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return peaks(CausalLM(model, list(updates)), batch)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A chunk is to this model what 2^20 elements are to the demo's 135 million weights."""
    for chunk in (perturbed.CHUNK, directions.CHUNK, loss.HEAD_WEIGHTS):
        monkeypatch.setitem(chunk, "cpu", 2**13)
    monkeypatch.setattr(philox, "CHUNK", 2**13)
    monkeypatch.setattr(philox, "PART", 2**10)


@pytest.mark.parametrize(
    "updates",
    [
        [MeZO()],
        [MeZO(direction="low_rank")],
        [PEFT(LoraConfig(**LORA)), MeZO()],
        [PEFT(LoraConfig(**LORA)), HELENE(refresh_every=1)],
    ],
    ids=["all weights", "low rank", "LoRA", "HELENE on LoRA"],
)
def test_a_step_has_the_memory_of_inference(updates):
    assert of(*updates).ratio <= 1.05


@pytest.mark.parametrize(
    ("options", "each"),
    [({"h": "scalar"}, 4), ({"h": "tensor"}, 8), ({"h": "tensor", "floors": "quantile", "refresh_every": 1}, 8)],
)
def test_helene_has_its_formulas_memory(options, each):
    """P + 4 d for a scalar curvature, P + 8 d for a tensor, beside inference."""
    found = of(HELENE(**options))
    formula = found.weights + found.inference + each * found.trained
    assert found.state == each * found.trained
    assert formula <= found.weights + found.state + found.step <= 1.05 * formula
