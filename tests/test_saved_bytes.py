"""Bytes that a decoder layer saves for backward, against closed forms, for each way to train a Llama.

A token's elements in a layer, with H hidden, K key/value width, I MLP width, h heads, as transformers computes it: what
every gradient of an input needs is 4 H + 2 K + 3 I + h + 2 (both residuals, q and the attention's output; k and v;
gate, its activation and up; the attention's log-sums and both norms' reciprocals). With fused norms and SwiGLU it would
be 4 H + 2 K + 2 I. Training all weights adds the inputs of both norms' weights and of the linear layers, 4 H + I; LoRA
of rank r on all seven the linear layers' inputs that nothing else keeps, 2 H + I, and its own 7 r.
"""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_sparse.blocks.linear import BlockLinear
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import PEFT, SMT
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse_profiling.counted import Counter

TOKENS = (2, 24)
RANK = 4
SHAPES = [
    {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 3},
]


def task(layers: int, shape: dict[str, int]) -> CausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=96, max_position_embeddings=64, **shape)
    out = CausalLM(base=LlamaForCausalLM(config))
    out.build().train()
    return out


def frozen(task: CausalLM) -> None:
    """Nothing is trained in the layers, but a gradient flows through all of them."""
    task.build().requires_grad_(False)
    task.build().get_input_embeddings().weight.requires_grad_(True)


def full(task: CausalLM) -> None:
    pass


def lora(task: CausalLM) -> None:
    PEFT(peft.LoraConfig(r=RANK, target_modules="all-linear")).attach(task.build(), no_probe, ALONE)
    task.build().get_input_embeddings().weight.requires_grad_(True)


def saved(task: CausalLM) -> int:
    ids = torch.randint(96, TOKENS)
    batch = {"input_ids": ids, "labels": ids}
    with Counter(task.build(), batch=batch) as counter:
        loss = task.loss(batch)[0]
    assert loss.requires_grad
    return counter.saved_peak


def per_token_of_a_layer(method, shape: dict[str, int]) -> float:
    """Elements: what one layer more adds, so that embeddings, head and loss do not count."""
    sizes = []
    for layers in (1, 2, 3):
        model = task(layers, shape)
        method(model)
        sizes.append(saved(model))
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
    return (sizes[2] - sizes[1]) / 4 / (TOKENS[0] * TOKENS[1])


def closed_form(name: str, shape: dict[str, int]) -> int:
    hidden, inner, heads = (shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    keys = hidden // heads * shape["num_key_value_heads"]
    floor = 4 * hidden + 2 * keys + 3 * inner + heads + 2
    return floor + {"frozen": 0, "full": 4 * hidden + inner, "lora": 2 * hidden + inner + 7 * RANK}[name]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("shape", SHAPES, ids=["grouped keys", "as many keys as queries"])
@pytest.mark.parametrize("method", [frozen, full, lora])
def test_a_layer_saves_what_the_closed_form_says(method, shape):
    assert per_token_of_a_layer(method, shape) == closed_form(method.__name__, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped keys", "as many keys as queries"])
def test_smt_saves_the_floor_and_its_columns(shape):
    model, floor = task(2, shape), task(2, shape)
    strategy = SMT(blocks="random", block_size=16, num_blocks=5, targets=["q", "k", "v", "o", "down"])
    strategy.attach(model.build(), no_probe, ALONE)
    frozen(floor)
    for task_ in (model, floor):
        task_.build().get_input_embeddings().weight.requires_grad_(True)
    groups = {module.shared for module in model.build().modules() if isinstance(module, BlockLinear)}
    columns = sum(len(group.columns) * group.width for group in groups)
    assert columns > 0
    assert saved(model) - saved(floor) == TOKENS[0] * TOKENS[1] * columns * 4
