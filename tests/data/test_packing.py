"""Packed rows: logits and loss equal those of single rows, or the model is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from benchmarks.tiny_models import FAMILIES
from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.data.examples import Examples
from lit_sparse.data.packing import Packed, PackedRows, check_packing
from lit_sparse.errors import BadInput
from lit_sparse_profiling.stopwatch import count_tokens

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "qwen2": Qwen2Config(**SIZES, **HEADS),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}


def model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)  # as initialised, attention hardly matters to the logits
    return built.eval()


def examples() -> Examples:
    torch.manual_seed(1)
    ids = [torch.randint(64, (length,)).tolist() for length in (9, 3, 7, 5, 2, 12)]
    return Examples.of([Example(one, one) for one in ids])


def total_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_give_the_loss_and_gradient_of_single_ones(name, attention):
    net, data = model(name, attention), examples()
    packed = PackedRows(data, data.lengths, 16)
    assert len(packed) < len(data)
    batch = Packed(Padding(multiple=8))([packed[index] for index in range(len(packed))])
    losses = [total_loss(net, batch), sum(total_loss(net, Padded(Padding())([data[i]])) for i in range(len(data)))]
    gradients = [torch.autograd.grad(loss, tuple(net.parameters())) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_check_accepts_models_that_keep_examples_apart(name, attention):
    net = model(name, attention).train()
    check_packing(net)
    check_packing(net.bfloat16())
    assert net.training


@pytest.mark.parametrize("name", CONFIGS)
def test_check_refuses_models_that_mix_them(name, monkeypatch):
    net = model(name, "sdpa")

    whole = net.forward

    def mixing(input_ids: torch.Tensor, **inputs: Any) -> Any:
        mask = torch.ones_like(input_ids)  # given one, the model does not look for examples in the positions
        return whole(input_ids=input_ids, attention_mask=mask, **inputs)

    monkeypatch.setattr(net, "forward", mixing)
    with pytest.raises(BadInput, match=r"ForCausalLM|LMHeadModel lets the examples of a packed row see each other"):
        check_packing(net)


def test_check_has_as_many_rows_as_a_batch(monkeypatch):
    """transformers' flash attention keeps examples apart in one row, and attends over whole rows in several."""
    net = model(next(iter(CONFIGS)), "sdpa")
    whole = net.forward

    def flash(input_ids: torch.Tensor, **inputs: Any) -> Any:
        mask = {"attention_mask": torch.ones_like(input_ids)} if len(input_ids) > 1 else {}
        return whole(input_ids=input_ids, **mask, **inputs)

    monkeypatch.setattr(net, "forward", flash)
    check_packing(net, 1)
    with pytest.raises(BadInput, match=r"flash attention keeps them apart with data\.batch_size 1"):
        check_packing(net, 2)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3"])
def test_check_accepts_experts(family, monkeypatch):
    """An expert sums in another order with another number of tokens, so the logits are equal up to rounding only."""
    net, calls = FAMILIES[family].tiny(), itertools.count()
    check_packing(net)
    whole = net.forward

    def rounded(**inputs: Any) -> Any:
        out = whole(**inputs)
        out.logits = out.logits + 5e-7 * (next(calls) % 2)
        return out

    monkeypatch.setattr(net, "forward", rounded)
    check_packing(net)
    monkeypatch.undo()
    check_packing(net.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Mamba", "LFM2", "gpt-oss"])  # the last ignores positions, with sliding windows
def test_check_refuses_models_that_let_text_through(family, dtype):
    with pytest.raises(BadInput, match=r"ForCausalLM lets the examples of a packed row see each other"):
        check_packing(FAMILIES[family].tiny().to(dtype))


def test_check_refuses_models_that_count_positions_themselves(monkeypatch):
    net = model("gpt2", "sdpa")
    whole = net.forward

    def counting(input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        apart = (position_ids.diff(prepend=position_ids[:, :1]) < 0).cumsum(1)
        mask = (apart[:, None, :, None] == apart[:, None, None, :]) & torch.ones(2 * apart.shape[-1:]).tril().bool()
        return whole(input_ids, attention_mask=mask, use_cache=use_cache)

    monkeypatch.setattr(net, "forward", counting)
    with pytest.raises(BadInput, match="see each other"):
        check_packing(net)


def test_rows_hold_every_example_once_and_no_more_than_fits():
    lengths = [1 + (index * 7) % 16 for index in range(100)]
    packed = PackedRows(Examples.of([Example([0] * n, [0] * n) for n in lengths]), lengths, 16)
    assert sorted(index for row in packed.rows for index in row) == list(range(100))
    assert packed.lengths == [sum(lengths[index] for index in row) for row in packed.rows]
    assert max(packed.lengths) <= 16
    assert len(packed) <= 1.05 * sum(lengths) / 16 + 1


def test_packed_batch():
    batch = Packed(Padding(token=1))([[Example([5, 6], [5, 6]), Example([7, 8], [-100, 8])], [Example([9], [9])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert "attention_mask" not in batch
    assert count_tokens(batch) == (5, 8)
