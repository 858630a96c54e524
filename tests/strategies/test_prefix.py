"""Prefix tuning: what a prefix computes, where it starts, training with and without gradients, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.families import FAMILIES
from lit_sparse import cli
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.optim import trainable
from lit_sparse.recompute import checkpoint_activations
from lit_sparse.runs import load_run
from lit_sparse.strategies import HELENE, PEFT, ActivationDensity, MeZO, UpdateStrategy, compose
from lit_sparse.strategies.base import ALONE, Context, no_probe
from lit_sparse.testing import TINY, contract, tiny_encoder, tiny_llm
from lit_sparse.zeroth_order.optimizer import Losses
from tests.test_resume import fit, saved
from tests.zeroth_order.test_together import makes, task_of

SIZE = 3
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
YAML = """
model:
  lr: 1e-2
  updates+:
    - class_path: PEFT
      init_args: {config: {class_path: peft.PrefixTuningConfig, init_args: {num_virtual_tokens: 3}}}
    - class_path: MeZO
      init_args: {epsilon: 0.01}
"""


def prefix(**settings: Any) -> PEFT:
    return PEFT(PrefixTuningConfig(num_virtual_tokens=SIZE, **settings))


def put_on(model: PreTrainedModel, **settings: Any) -> torch.Tensor:
    """Put a prefix on the model; return its keys and values as they train."""
    prefix(**settings).attach(model, no_probe, ALONE)
    (_, weight), *_ = trainable(model)
    return weight


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_computes_what_pefts_does(kind, projected):
    model, settings = tiny_llm(kind).eval(), {"prefix_projection": projected, "encoder_hidden_size": 5}
    put_on(model, **settings)
    config = PrefixTuningConfig(num_virtual_tokens=SIZE, task_type=TaskType.CAUSAL_LM, **settings)
    theirs = get_peft_model(tiny_llm(kind), config).eval()
    theirs.prompt_encoder.load_state_dict(model.prefix.state_dict())  # pyright: ignore
    for mask in (None, MASK):
        ours = model(input_ids=IDS, attention_mask=mask).logits
        expected = theirs(input_ids=IDS, attention_mask=mask).logits
        kept = slice(None) if mask is None else MASK.bool()
        torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, tiny_llm(kind).eval()(input_ids=IDS, attention_mask=MASK).logits, atol=1e-3)


@pytest.mark.parametrize("kind", TINY)
def test_it_starts_as_random_tokens_before_each_row(kind, monkeypatch):
    model, tokens = tiny_llm(kind).eval(), torch.tensor([[7, 90, 31]])
    whole = model(input_ids=torch.cat([tokens.expand(2, -1), IDS], dim=1)).logits[:, SIZE:]
    monkeypatch.setattr(torch, "randint", lambda *_, **__: tokens)
    put_on(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, whole, rtol=1e-5, atol=1e-5)


def test_generation_goes_on_from_the_prefix():
    model = tiny_llm("llama").eval()
    put_on(model).data.normal_(generator=torch.Generator().manual_seed(1))
    cached = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False))
    left = torch.cat([torch.zeros(2, 2, dtype=torch.int64), IDS], dim=1)
    padded = model.generate(left, attention_mask=(left > 0).long(), max_new_tokens=5, do_sample=False)
    assert torch.equal(padded[:, 2:], cached)
    start = model(input_ids=IDS[:, :4])
    rest = model(input_ids=IDS[:, 4:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, model(input_ids=IDS).logits[:, 4:], rtol=1e-5, atol=1e-5)


# ---- training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [None, MeZO, HELENE])
def test_contract(kind, method):
    def make() -> list[UpdateStrategy]:
        return [prefix(), *([] if method is None else [method(epsilon=1e-2)])]

    contract(make, kind)


def test_losses_of_a_prefix_are_computed_together():
    task, batch = task_of("llama", PrefixTuningConfig(num_virtual_tokens=SIZE))
    loss = WindowLoss(task, [batch])
    with torch.no_grad():
        apart, together = (torch.stack(Losses(task.build(), loss, count).of(makes(5))) for count in (1, 2))
    assert apart.unique().numel() == 5
    torch.testing.assert_close(together, apart, rtol=2e-6, atol=0)


def test_it_goes_with_a_penalty_on_activations():
    compose([prefix(), ActivationDensity()])


def test_a_run_goes_on_is_exported_and_generates(home: Path, capsys) -> None:
    Path("prefix.yaml").write_text(YAML)
    method = str(home / "prefix")
    straight = fit(method, "straight", 0)
    begun = fit(method, "cut", 4, "--checkpoint_steps=4")
    assert begun + fit(method, "cut", 0, "--ckpt_path=last") == straight
    (name, value), *others = saved("straight-1").items()
    assert not others
    assert name == "model.prefix.default.embedding.weight"
    assert torch.equal(saved("cut-1")[name], value)
    folder = export(Path("runs/cut-1"), "adapter")
    assert 'PeftModel.from_pretrained(base, "FOLDER")' in (folder / "README.md").read_text()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny"), folder).eval()
    ours = load_run(Path("runs/cut-1"))[0].build()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-6, atol=1e-6)
    for other in ("hf", "delta"):
        with pytest.raises(BadInput, match="export it with --to adapter"):
            export(Path("runs/cut-1"), other)
    capsys.readouterr()
    cli.run(["generate", "runs/cut-1", "1 and 2", "--max_new_tokens=2"])
    assert capsys.readouterr().out.strip()


# ---- refusals


def test_other_prompts_are_refused():
    with pytest.raises(BadInput, match=r"PromptTuningConfig prepends .* use peft\.PrefixTuningConfig, or an adapter"):
        PEFT(PromptTuningConfig(num_virtual_tokens=SIZE))


def test_models_without_keys_and_values_are_refused():
    with pytest.raises(BadInput, match="BertForSequenceClassification predicts no tokens"):
        put_on(tiny_encoder())
    mamba = FAMILIES["Mamba"].tiny()
    with pytest.raises(BadInput, match=r"PrefixTuningConfig was asked for, but .* MambaForCausalLM"):
        put_on(mamba)
    with pytest.raises(BadInput, match=r"has not 4 tensors of cached keys and values of the shape \(1, 2, 3, 8\)"):
        put_on(tiny_llm("llama"), num_layers=2)


def test_recomputed_layers_are_refused():
    model = tiny_llm("llama").train()
    checkpoint_activations(model)
    with pytest.raises(BadInput, match="PREFIX_TUNING does not work with gradient checkpointing"):
        prefix().attach(model, no_probe, Context(checkpointing=True))


def test_rows_that_it_cannot_stand_before_are_refused():
    model = tiny_llm("gpt2").eval()
    put_on(model)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(BadInput, match="rows are packed, and a prefix stands before the first of them only"):
        model(input_ids=IDS[:1], position_ids=places)
    most = model.config.max_position_embeddings
    with pytest.raises(BadInput, match=f"have {most + 1} tokens, but the model has {most} positions"):
        model(input_ids=torch.ones(1, most + 1 - SIZE, dtype=torch.int64))


def test_a_second_adapter_is_refused():
    with pytest.raises(BadInput, match="PEFT"):
        compose([prefix(), PEFT(LoraConfig(target_modules=["q_proj"]))])
