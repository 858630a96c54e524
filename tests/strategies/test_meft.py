"""MEFT: the reconstruction, its gradients, what is kept for the backward pass, what users run, and refusals."""

import copy
import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.adapters import PlainAdapters
from benchmarks.families import Cell
from benchmarks.meft import SIZES, bytes_kept, kept_at, slope
from benchmarks.tiny_models import FAMILIES, HEADED
from lit_sparse import cli
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.optim import trainable
from lit_sparse.reversible import segment
from lit_sparse.reversible.coupling import LIMIT, Coupling, fits, from_fixed, pack, to_fixed, unpack
from lit_sparse.runs import load_run
from lit_sparse.strategies import MEFT, Updates
from lit_sparse.strategies.base import Context, UpdateStrategy
from lit_sparse.testing import next_token_cross_entropy, tiny_encoder, tiny_llm
from tests.test_resume import fit

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
ANY_ERROR = 1e9
WAYS = [
    *({"variant": variant, "coupling": coupling} for variant in (1, 2, 3) for coupling in ("difference", "paper")),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MEFT: coupling is paper")
        yield


def loss_of(model: nn.Module) -> Tensor:
    return next_token_cross_entropy(model(input_ids=IDS).logits, IDS)


def attached(model: PreTrainedModel, seed: int = 0, std: float = 0.3, **settings: Any) -> MEFT:
    """Attach MEFT with adapters far from zero, so that every term counts."""
    torch.manual_seed(seed)
    strategy = MEFT(**{"exact": False, "max_error": ANY_ERROR, **settings})
    Updates([strategy]).attach(model, lambda steps, weighed=True: (loss_of(model) for _ in range(steps)))
    for _, parameter in trainable(model):
        nn.init.normal_(parameter, std=std)
    return strategy


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.grad is not None}


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


# ---- fixed point


@pytest.mark.parametrize("bits", range(8))
def test_dropped_bits_are_packed_without_loss_or_waste(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 7, 5), generator=torch.Generator().manual_seed(bits))
    packed = pack(values, bits)
    assert packed.numel() == -(-values.numel() // 8) * bits
    assert torch.equal(unpack(packed, bits, values.shape).long(), values)


@pytest.mark.parametrize("relative_", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.125])
def test_a_step_in_fixed_point_gives_back_the_very_bits(weight: float, relative_: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    f, read, kept = (torch.randn(4, 9, generator=generator) * 100 for _ in range(3))
    coupling, kept, read = Coupling(weight, relative_), to_fixed(kept), to_fixed(read)
    out, dropped = coupling.couple_fixed(f, read, kept)
    assert torch.equal(coupling.invert_fixed(f, read, out, dropped), kept)
    exact = coupling.couple(f.double(), from_fixed(read, torch.float64), from_fixed(kept, torch.float64))
    assert (from_fixed(out, torch.float64) - exact).abs().max() <= 2 * 2.0**-14


# ---- the model


def layer_of(model: Any, number: int, x: Tensor, part: str = "whole") -> Tensor:
    """Compute a Llama layer, or a part of it, by its submodules, as the architecture is defined."""
    layer, seq = model.model.layers[number], torch.arange(x.shape[1])[None]
    rotary = model.model.rotary_emb(x, seq)
    adapters = layer.meft
    if part in ("whole", "attention"):
        a = layer.self_attn(hidden_states=layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
        x = x + a  # the adapter behind the output projection is a hook of it
        if part == "attention":
            return x
    normed = layer.post_attention_layernorm(x)
    mlp = layer.mlp
    out = F.linear(mlp.act_fn(mlp.gate_proj(normed)) * F.linear(normed, mlp.up_proj.weight), mlp.down_proj.weight)
    return x + out + adapters["parallel"](normed)


def by_the_equations(model: Any, settings: MEFT) -> Tensor:
    """Return the loss of a Llama by the equations of the paper's section 3.2 (and of the difference coupling)."""
    w, r = settings.factor, settings.coupling == "difference"
    x1 = x2 = model.model.embed_tokens(IDS)
    layers = len(model.model.layers)
    for number in range(layers):
        adapters = dict(model.model.layers[number].meft.named_children())
        second = adapters.get("second")
        if settings.variant == 1:
            y1 = layer_of(model, number, x2) + w * (x1 - r * x2)
            y2 = x2 if second is None else second(y1) + x2
            x1, x2 = y2, y1
        elif settings.variant == 2:
            assert second is not None
            y1 = second(x2) + x1
            y2 = layer_of(model, number, y1) + w * (x2 - r * y1)
            x1, x2 = y2, y1
        else:
            y1 = layer_of(model, number, x2, "attention") + w * (x1 - r * x2)
            y2 = layer_of(model, number, y1, "mlp") + w * (x2 - r * y1)
            x1, x2 = y1, y2
    h = (x1 + x2) / 2 if not r else x1 if settings.variant == 2 else x2
    return next_token_cross_entropy(model.lm_head(model.model.norm(h)), IDS)


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_loss_and_its_gradients_are_the_equations(way: dict[str, Any], every: int | None) -> None:
    model = tiny_llm("llama").train().double()
    strategy = attached(model, **way, checkpoint_every=every)
    ours, got = loss_of(model), gradients(model)
    model.zero_grad()
    theirs = by_the_equations(model, strategy)
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in trainable(model) if parameter.grad is not None}
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # Llama's norms are in fp32
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_exact_gradients_are_those_of_stored_activations(way: dict[str, Any], kind: str, monkeypatch) -> None:
    """Bit for bit: what is computed back is what was there, so that each layer's backward pass is the same."""
    model = tiny_llm(kind).train()
    strategy = attached(model, **way, exact=True)
    assert strategy.describe() == {"reconstruction_error": 0.0}
    got, seen = gradients(model), []
    back = segment.Segment.back
    monkeypatch.setattr(
        segment.Segment, "back", lambda self, *args: (seen.append(step) or step for step in back(self, *args))
    )
    inputs: list[Tensor] = []
    value = segment.Segment.value

    def noted(self: Any, half: Any, call: Any, x: Tensor) -> Tensor:
        inputs.append(x.detach().clone())
        return value(self, half, call, x)

    monkeypatch.setattr(segment.Segment, "value", noted)
    again = gradients(model)
    assert all(torch.equal(got[name], again[name]) for name in got)
    forward, backward = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
    assert len(forward) >= 5
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_is_drawn_again(kind: str) -> None:
    """With dropout, the gradient is that of finite differences with the same numbers drawn."""
    model = tiny_llm(kind, dropout=0.3).train().double()
    attached(model, checkpoint_every=2)
    torch.manual_seed(3)
    got, state = gradients(model), torch.get_rng_state()
    name, parameter = next(iter(trainable(model)))
    direction, step, losses = torch.randn_like(parameter), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * direction
            torch.manual_seed(3)
            losses.append(loss_of(model))
            parameter -= sign * step * direction
    assert torch.equal(state, torch.get_rng_state())  # the recomputation leaves the generator as it was
    slope = float(losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float((got[name] * direction).sum()), rel=1e-3)


def test_at_the_start_the_model_is_about_the_base() -> None:
    """With adapters at zero, the difference coupling is off by `factor` of a layer's update, and no more for depth."""
    drifts = []
    for factor in (0.5, 0.125, 1 / 128):
        base = tiny_llm("llama").eval()
        model = copy.deepcopy(base)
        attached(model, factor=factor, std=0.0)
        with torch.no_grad():
            drifts.append(float((model(input_ids=IDS).logits - base(input_ids=IDS).logits).norm()))
    assert drifts[2] < drifts[1] / 4 < drifts[0] / 8


def test_a_trained_embedding_gets_its_gradient_too() -> None:
    model = tiny_llm("llama").train().double()
    attached(model)
    model.get_input_embeddings().weight.requires_grad_(True)  # pyright: ignore
    got = gradients(model)
    model.zero_grad()
    by_the_equations(model, MEFT(exact=False)).backward()
    expected = {name: parameter.grad for name, parameter in trainable(model) if parameter.grad is not None}
    assert relative(got, expected) < 1e-5


# ---- memory


def deep_llama(depth: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=depth, **sizes)).train()  # pyright: ignore


def kept_bytes(depth: int, **settings: Any) -> int:
    model = deep_llama(depth)
    if settings:
        attached(model, std=0.02, **settings)
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(0))
    return bytes_kept(model, lambda: next_token_cross_entropy(model(input_ids=ids).logits, ids))


def test_what_is_kept_hardly_grows_with_depth() -> None:
    full = {depth: kept_bytes(depth) for depth in (4, 32)}
    layer = (full[32] - full[4]) / 28
    exact = {depth: kept_bytes(depth, exact=True) for depth in (4, 8, 16, 32)}
    assert (exact[32] - exact[4]) / 28 < 0.05 * layer
    assert (exact[16] - exact[8]) / 8 == pytest.approx((exact[32] - exact[16]) / 16, rel=0.01)
    assert (exact[32] - exact[4]) / 28 == 2 * 64 * 32 * 3 / 8  # three bits a hidden unit and layer
    assert exact[32] < 0.16 * full[32]  # the paper's 84 % less
    every_4 = {depth: kept_bytes(depth, checkpoint_every=4) for depth in (4, 32)}
    assert (every_4[32] - every_4[4]) / 28 == 2 * 64 * 32 * 2 * 4 / 4  # two fp32 streams every four layers


def test_a_further_layer_keeps_little_of_what_a_frozen_one_does() -> None:
    """Frozen layers, through which gradients pass, store less than those that train."""
    small = {**SIZES, "hidden_size": 64, "intermediate_size": 256}

    def per_layer(strategies: list[UpdateStrategy]) -> float:
        return slope({"depths": (2, 4), "bytes": [kept_at(depth, strategies, small, 1, 64) for depth in (2, 4)]})

    frozen = per_layer([PlainAdapters()])
    assert frozen < per_layer([])
    for variant in (1, 2, 3):
        assert per_layer([MEFT(variant=variant)]) < 0.05 * frozen
    assert per_layer([PlainAdapters(every=1)]) == 64 * 64 * 4  # the hidden states before each layer
    assert per_layer([PlainAdapters(every=2)]) == 64 * 64 * 4 / 2


# ---- families


class StoredActivations:
    """The same steps of a model's layers, by plain autograd. It takes the place of its reversible stack."""

    def __init__(self, strategy: MEFT) -> None:
        made = strategy._stack
        assert made is not None
        self.layers, self.form = made.layers, made.form
        for number, layer in enumerate(self.layers):
            layer.module.forward = partial(self.run, number)

    def run(self, number: int, hidden: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[number]
        if number == 0:
            self.kept = self.read = hidden
        for half in layer.halves:
            out = half.coupling.couple(half.function(self.read, (args, kwargs)), self.read, self.kept)
            self.kept, self.read = self.read, out
        if layer.swap:
            self.kept, self.read = self.read, self.kept
        out = hidden if number + 1 < len(self.layers) else self.form.output(self.kept, self.read)
        return (out, *[None] * (layer.outputs - 1)) if layer.outputs else out


MIXTURES = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss", "OLMoE")
"""Their adapters are parallel to the whole mixture; DeepSeek's first layer has a plain MLP."""
WITHOUT_MODULES = ("BLOOM", "LFM2")
"""Their MLPs have no module that is named as an activation; LFM2 has convolutions in place of some attentions."""


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("family", [*MIXTURES, *WITHOUT_MODULES])
def test_layers_of_other_kinds_train(family: str, variant: int) -> None:
    model = FAMILIES[family].tiny().train()
    if (family, variant) == ("BLOOM", 3):  # its MLP adds the residual itself
        with pytest.raises(BadInput, match="BloomBlock is not an attention and then an MLP"):
            attach(model, variant=3)
        return
    strategy = attached(copy.deepcopy(model), variant=variant, exact=True)
    assert strategy.describe() == {"reconstruction_error": 0.0}
    model = model.double()
    model.config._experts_implementation = "eager"  # torch's grouped product has no fp64
    strategy = attached(model, variant=variant, checkpoint_every=2)
    got, ours = gradients(model), loss_of(model)
    StoredActivations(strategy)
    torch.testing.assert_close(ours, loss_of(model), rtol=1e-6, atol=0)
    assert len(got) == len(trainable(model))  # every adapter is reached
    assert relative(got, gradients(model)) < 1e-4  # routers and norms are in fp32


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["Mistral", "Gemma-2", "Gemma-3 (text)", "Qwen3", "Phi-3"])
def test_masks_and_windows_pass_through(family: str, exact: bool) -> None:
    """Rows that are padded give what they give alone, and gradients are those of stored activations."""
    model = FAMILIES[family].tiny().train()
    if family == "Mistral":
        model.config.sliding_window = 4  # Gemma's is 8
    strategy = attached(model, std=0.05, exact=exact, checkpoint_every=None if exact else 1)
    lengths = (12, 5)
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in lengths])

    def losses() -> Tensor:
        logits = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        rows = zip(logits, IDS, lengths, strict=True)
        return torch.stack([F.cross_entropy(row[: n - 1], ids[1:n]) for row, ids, n in rows])

    padded = losses()
    rows = [ids[None, :n] for ids, n in zip(IDS, lengths, strict=True)]
    alone = [next_token_cross_entropy(model(input_ids=ids).logits, ids) for ids in rows]
    torch.testing.assert_close(padded, torch.stack(alone), rtol=1e-3, atol=0)  # fixed-point steps may round otherwise
    model.zero_grad()
    padded.sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.grad is not None}
    StoredActivations(strategy)
    model.zero_grad()
    losses().sum().backward()
    assert len(got) == len(trainable(model))
    for name, parameter in trainable(model):
        assert parameter.grad is not None
        assert F.cosine_similarity(got[name].flatten(), parameter.grad.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", [1, 2, 3])
def test_bf16_weights_are_reconstructed_exactly(kind: str, variant: int) -> None:
    """And more stored states than there are layers are one at the end."""
    model = tiny_llm(kind).bfloat16().train()
    strategy = attached(copy.deepcopy(model), variant=variant, exact=True)
    assert strategy.describe() == {"reconstruction_error": 0.0}
    found = []
    for every in (None, 99):
        one = copy.deepcopy(model)
        attached(one, variant=variant, checkpoint_every=every)
        found.append(gradients(one))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("every", [None, 1])
def test_gradients_of_a_deep_model_are_those_of_plain_backpropagation(every: int | None) -> None:
    """In fp32, of the same forward pass: exact (None), which also rounds each state to fixed point, and by layer."""
    model = deep_llama(12)
    strategy = attached(model, std=0.05, exact=every is None, checkpoint_every=every)
    got = gradients(model)
    model.zero_grad()
    by_the_equations(model, strategy).backward()
    expected = {name: parameter.grad for name, parameter in trainable(model) if parameter.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.999, name


def test_packed_rows_do_not_see_each_other() -> None:
    model = tiny_llm("llama").train()
    attached(model, exact=True)
    rows = [IDS[0, :5], IDS[1, :7]]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(input_ids=torch.cat(rows)[None], position_ids=places, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-3)  # a fixed-point step may round the other way
    packed.sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.grad is not None}
    model.zero_grad()
    alone.sum().backward()
    for name, parameter in trainable(model):
        assert parameter.grad is not None
        assert F.cosine_similarity(got[name].flatten(), parameter.grad.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("exact", [True, False])
def test_casts_are_made_again(exact: bool, monkeypatch) -> None:
    """The forward pass is under autocast, the backward pass, as usual, is not."""
    model = tiny_llm("llama").train()
    attached(model, exact=exact, checkpoint_every=None if exact else 1)
    gave: list[Tensor] = []
    value = segment.Segment.value

    def noted(self: Any, half: Any, call: Any, x: Tensor) -> Tensor:
        gave.append(value(self, half, call, x).detach())
        return value(self, half, call, x)

    monkeypatch.setattr(segment.Segment, "value", noted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    forward, backward = gave[: len(gave) // 2], gave[len(gave) // 2 :]
    for first, again in zip(forward, reversed(backward), strict=True):
        assert first.dtype == again.dtype
        torch.testing.assert_close(first, again, rtol=0, atol=0 if exact else 1e-2)


def test_each_adapter_gets_one_gradient_a_backward_pass() -> None:
    """So that gradients accumulate over batches, and hooks of optimizers and of DDP act once."""
    model, seen = tiny_llm("llama").train(), list[str]()
    attached(model, exact=True)
    once = gradients(model)
    for name, parameter in trainable(model):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    loss_of(model).backward()  # on top of the first
    assert sorted(seen) == sorted(once)
    for name, parameter in trainable(model):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_each_step_asks_for_the_gradients_of_its_layer_alone(monkeypatch) -> None:
    model, asked, grad = deep_llama(6), list[int](), torch.autograd.grad
    attached(model, exact=True)

    def counted(f: Tensor, inputs: Any, *args: Any, **options: Any) -> Any:
        asked.append(len(inputs))
        return grad(f, inputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    assert gradients(model)
    assert asked == [1 + 4, *[1 + 8] * 10]  # the hidden states, and two matrices and biases of each adapter


# ---- what users run

SEGMENTS = ("--model.updates.exact=false", "--model.updates.checkpoint_every=1")


def trained(run: str) -> dict[str, Tensor]:
    module, _ = load_run(Path("runs") / run)
    return {name: value.detach() for name, value in trainable(module.build())}


@pytest.mark.parametrize("settings", [(), SEGMENTS], ids=["exact", "segments"])
def test_a_run_goes_on_in_mid_epoch_is_exported_and_generates(home: Path, settings: tuple[str, ...]) -> None:
    fit("meft", "whole", 0, *settings)
    fit("meft", "cut", 4, *settings, "--checkpoint_steps=4")
    fit("meft", "cut", 0, *settings, "--ckpt_path=last")
    whole, rest = trained("whole-1"), trained("cut-1")
    assert whole.keys() == rest.keys()
    assert all(torch.equal(value, whole[name]) for name, value in rest.items())
    folder = export(Path("runs/cut-1"), "adapter")
    card = (folder / "README.md").read_text()
    assert 'MEFT.load("FOLDER", base)' in card
    assert "`FOLDER` is this folder. It needs lit-sparse." in card
    model = AutoModelForCausalLM.from_pretrained("tiny")
    MEFT.load(folder, model)
    ids, (module, _) = torch.tensor([[1, 5, 6, 4]]), load_run(Path("runs/cut-1"))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, module.build().eval()(input_ids=ids).logits)
    without_cache = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), without_cache)
    cli.run(["generate", "runs/cut-1", "1 and 2"])
    for other in ("hf", "delta"):
        with pytest.raises(BadInput, match="export it with --to adapter"):
            export(Path("runs/cut-1"), other)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_classifier_is_resumed_and_exported_with_its_head(tmp_path: Path) -> None:
    family = FAMILIES["Llama (classifier)"]
    cell = Cell(family, "meft", family.write(tmp_path / "base"), tmp_path)
    cell.fit_and_resume()
    assert cell.export()["change"] > 0
    text = (cell.run / "adapter" / "README.md").read_text()
    assert "id2label={0: 'blue', 1: 'green', 2: 'red'}" in text
    code = text.partition("```python\n")[2].partition("```")[0].replace('"FOLDER"', repr(str(cell.run / "adapter")))
    names: dict[str, Any] = {}
    exec(code, names)  # as the card says
    module, _ = load_run(cell.run)
    for ours, theirs in zip(module.build().score.parameters(), names["base"].score.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = type(names["base"]).from_pretrained(cell.base, num_labels=5, ignore_mismatched_sizes=True)
    with pytest.raises(BadInput, match=r"give the base .* the number of its classes \(num_labels\)"):
        MEFT.load(cell.run / "adapter", other)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"variant": 4}, "variant is 4"),
        ({"coupling": "none"}, "coupling none"),
        ({"factor": 0.0}, "factor is 0"),
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"checkpoint_every": 0, "exact": False}, "checkpoint_every 0"),
        ({"max_error": -1.0}, "max_error is -1"),
        ({"checkpoint_every": 4}, "set checkpoint_every to null"),
        ({"factor": 0.1}, "such as 0.125"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        MEFT(**settings)


def attach(model: PreTrainedModel, context: Context | None = None, **settings: Any) -> None:
    MEFT(**settings).attach(
        model, lambda steps, weighed=True: (loss_of(model) for _ in range(steps)), context or Context()
    )


@pytest.mark.parametrize(("variant", "times"), [(1, "8"), (3, "64")])
def test_the_papers_coupling_tells_how_errors_grow(variant: int, times: str) -> None:
    model = tiny_llm("llama").train()
    with pytest.warns(UserWarning, match=rf"is far from a base .* multiplies errors by about {times}; difference"):
        attach(model, coupling="paper", exact=False, variant=variant, max_error=ANY_ERROR)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(BadInput, match="BertForSequenceClassification is an encoder"):
        attach(tiny_encoder())


def test_checkpointing_beside_it_is_refused() -> None:
    with pytest.raises(BadInput, match="activation_checkpointing to false"):
        attach(tiny_llm("llama"), Context(checkpointing=True))


def test_dropout_in_fixed_point_is_refused() -> None:
    with pytest.raises(BadInput, match=r"exact is on, but .* dropout"):
        attach(tiny_llm("llama", dropout=0.1).train())


def test_more_depth_than_the_coupling_bears_is_refused_with_its_error() -> None:
    with pytest.raises(BadInput, match=r"from 24 layers above, .* error of \d.* or checkpoint_every to 12 or less"):
        attach(deep_llama(24), exact=False)
    attach(deep_llama(24), exact=False, checkpoint_every=2)
    attach(deep_llama(24))


def test_a_model_that_works_between_its_layers_is_refused() -> None:
    model = tiny_llm("llama").train()
    attach(model)
    layers: Any = model.model.layers  # pyright: ignore
    own = layers[1].forward
    layers[1].forward = lambda hidden, **kwargs: own(hidden * 1.0, **kwargs)
    with pytest.raises(BadInput, match=r"does more between its layers .* \(before layer 1\)"):
        loss_of(model)


def test_layers_that_share_state_are_refused() -> None:
    model = tiny_llm("llama").train()

    class Shared(type(model.model.layers[0])):  # pyright: ignore
        counted: list[int] = []

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.counted.append(1)
            return super().forward(hidden_states, *args, **kwargs) + len(self.counted)

    for layer in model.model.layers:  # pyright: ignore
        layer.__class__ = Shared
    with pytest.raises(BadInput, match="keeps state that other layers share"):
        attach(model)


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_layers_that_share_keys_and_values_are_refused(family: str) -> None:
    sizes = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 8}
    sizes |= {"vocab_size_per_layer_input": 96, "global_head_dim": 8, "laurel_rank": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**HEADED, **sizes}))
    with pytest.raises(BadInput, match="share shared kv states, whose gradients would be lost"):
        attach(model)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    model: Any = tiny_llm("llama").train()
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(BadInput, match="calls one layer several times"):
        attach(model)


def test_mixtures_of_several_kinds_are_refused_by_their_name() -> None:
    """JetMoE has experts of attention, too."""
    sizes = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **{**HEADED, **sizes}))
    with pytest.raises(BadInput, match="JetMoeForCausalLM has mixtures of experts, of which a layer must hold one"):
        attach(model)


def test_layers_that_are_not_found_are_refused() -> None:
    model = tiny_llm("gpt2")
    model.config.num_hidden_layers = 7
    with pytest.raises(BadInput, match=r"layers of GPT2LMHeadModel were not found: .* is 7"):
        attach(model)


def test_layers_that_do_not_repeat_what_they_compute_are_refused_in_fixed_point() -> None:
    model: Any = tiny_llm("llama").train()
    mlp, calls = model.model.layers[1].mlp, []
    own = mlp.forward
    mlp.forward = lambda x: calls.append(1) or own(x) + 1e-4 * len(calls)  # as sums do whose order changes
    with pytest.raises(BadInput, match=r"does not repeat bit for bit \(relative error .*\); set exact: false"):
        attach(model)


def test_parallel_attention_and_mlp_are_no_variant_3() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, **sizes)).train()  # pyright: ignore
    with pytest.raises(BadInput, match="is not an attention and then an MLP"):
        attach(model, variant=3)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no meft\.json"):
        MEFT.load(tmp_path, tiny_llm("llama"))
    model = tiny_llm("llama").train()
    attached(model).save(tmp_path / "saved")
    with pytest.raises(BadInput, match="for a model of other sizes"):
        MEFT.load(tmp_path / "saved", tiny_llm("qwen2"))
    (tmp_path / "saved" / "meft.json").write_text(json.dumps({"variant": 9}))
    with pytest.raises(BadInput, match="variant is 9"):
        MEFT.load(tmp_path / "saved", tiny_llm("llama"))


def test_a_base_that_has_adapters_is_refused(tmp_path: Path) -> None:
    model = tiny_llm("llama").train()
    attached(model).save(tmp_path / "saved")
    for other in (model, get_peft_model(tiny_llm("llama"), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(BadInput, match="is not a model of transformers without adapters"):
            MEFT.load(tmp_path / "saved", other)  # pyright: ignore[reportArgumentType]


def test_an_embedding_of_positions_that_trains_is_refused() -> None:
    model = tiny_llm("llama").train()
    attached(model)
    scale = nn.Parameter(torch.ones(()))
    rotary: Any = model.model.rotary_emb  # pyright: ignore
    own = rotary.forward
    rotary.forward = lambda *args, **kwargs: tuple(part * scale for part in own(*args, **kwargs))
    with pytest.raises(BadInput, match="whose gradient MEFT would lose"):
        loss_of(model)


# ---- states beyond what fixed point holds, and graphs used otherwise


@pytest.mark.parametrize("value", [1e9, float("nan")])
def test_states_that_fixed_point_does_not_hold_give_no_number(value: float) -> None:
    """A loss that has diverged must not look like any other."""
    model = tiny_llm("llama").train()
    attached(model, exact=True)
    model.model.layers[1].meft["parallel"].up.bias.data.fill_(value)  # pyright: ignore
    assert loss_of(model).isnan()
    with torch.no_grad():
        assert loss_of(model).isnan()


def test_a_base_whose_states_fixed_point_does_not_hold_is_refused() -> None:
    model = tiny_llm("llama").train()
    model.model.layers[1].mlp.down_proj.weight.data *= 1e12  # pyright: ignore
    with pytest.raises(BadInput, match=r"hidden states are not within 65,536 .* exact: false and checkpoint_every: 1"):
        attach(model)


@pytest.mark.parametrize("weight", [1.0, 0.125])
def test_a_sum_that_wraps_around_does_not_fit(weight: float) -> None:
    most = torch.tensor([LIMIT - 1.0])
    for read, kept in ((-most, most), (most, -most), (most, most)):
        coupling = Coupling(weight, relative=True)
        for f in (most, -most):
            exact = coupling.couple(f, read, kept)
            assert fits(coupling.couple_fixed(f, to_fixed(read), to_fixed(kept))[0]) == (exact.abs() < LIMIT)


def test_a_graph_is_used_again_as_torch_has_it() -> None:
    model = tiny_llm("llama").train()
    attached(model, exact=True)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.grad is not None}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in trainable(model) if p.grad is not None)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    found = torch.autograd.grad(loss_of(model), [p for _, p in trainable(model)], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


def test_going_on_from_a_cache_with_gradients_on_is_refused() -> None:
    model = tiny_llm("llama")
    attached(model, exact=True)
    model.eval()
    cache = model(input_ids=IDS[:, :6]).past_key_values
    with pytest.raises(BadInput, match=r"with gradients on, .* within torch.no_grad\(\)"):
        model(input_ids=IDS[:, 6:], past_key_values=cache)
    with torch.no_grad():
        cache, whole = model(input_ids=IDS[:, :6]).past_key_values, model(input_ids=IDS).logits[:, 6:]
        torch.testing.assert_close(model(input_ids=IDS[:, 6:], past_key_values=cache).logits, whole)
        cache = model(input_ids=IDS[:, :6]).past_key_values
    with pytest.raises(BadInput, match="with gradients on"):
        model(input_ids=IDS[:, 6:], past_key_values=cache)


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_a_copy_of_the_model_has_layers_of_its_own(variant: int, tmp_path: Path) -> None:
    """As averages of weights make one, or `torch.save(model)`."""
    model = tiny_llm("llama").train()
    attached(model, variant=variant, exact=True)
    torch.save(model, tmp_path / "model.pt")
    expected, before = gradients(model), loss_of(model)
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        got = gradients(other)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        for _, parameter in trainable(other):
            nn.init.zeros_(parameter)
        assert not torch.equal(loss_of(other), before)
        assert torch.equal(loss_of(model), before)
