"""ActivationDensity: value and gradient of the penalty, its logs, its refusals, and a clean detach."""

import copy
import itertools

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from lit_sparse.anatomy import decoder_layers, mlps
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.recompute import checkpoint_activations
from lit_sparse.strategies import LISA, PEFT, SMT, ActivationDensity, Updates, UpdateStrategy, compose
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, contract, tiny_llm
from lit_sparse_kernels.glu_density import proxied
from tests.methods import data, trainer
from tests.test_saved_bytes import SHAPES, frozen, full, lora, per_token_of_a_layer

IDS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [0] * 3 + [1] * 7])
PROXIES = [{"proxy": "rational", "eps": 1e-3}, {"proxy": "tanh", "beta": 3.0}, {"proxy": "sigmoid", "beta": 5.0}]
OTHERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, hidden_act="gelu")),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)),
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def model_of(kind):
    torch.manual_seed(0)
    return tiny_llm(kind) if kind in TINY else OTHERS[kind]()


def attached(kind="llama", **options):
    model = model_of(kind).train()
    strategy = ActivationDensity(**{"eps": 1e-3, **options})
    strategy.attach(model, no_probe, ALONE)
    return model, strategy


def penalty_of(model, strategy, mask=PADDED):
    output = model(input_ids=IDS, attention_mask=mask)
    penalty = strategy.penalty({"input_ids": IDS, "attention_mask": mask}, output)
    assert penalty is not None
    return penalty


def seen_activations(kind, where):
    """Return each layer's activations without the strategy, (tokens, I), through hooks; padding included."""
    model, seen = model_of(kind).train(), []
    for mlp in mlps(model):
        if where == "product":
            model.get_submodule(mlp.down).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            mlp.act.register_forward_hook(lambda _, args, out: seen.append(out))
    model.config.attention_probs_dropout_prob = 0
    model(input_ids=IDS, attention_mask=PADDED)
    return model, [x.flatten(0, -2) for x in seen]


def brute_force(seen, proxy="rational", eps=1e-3, beta=None):
    if proxy == "sigmoid":
        count = [2 * torch.sigmoid(beta * x.abs()) - 1 for x in seen]
    else:
        count = [proxied(x, eps if proxy == "rational" else beta, proxy) for x in seen]
    return torch.stack([one[PADDED.flatten().bool()].mean() for one in count]).mean()


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("options", [{}, {"where": "product", "proxy": "tanh"}, {"layer_weights": "adaptive"}], ids=str)
def test_keeps_the_contract(kind, options):
    contract(lambda: [ActivationDensity(**options)], kind)


PARTNERS = {
    "smt": lambda: SMT(blocks="random", block_size=8, trainable_fraction=0.05, targets=["gate", "up"]),
    "lora": lambda: PEFT(peft.LoraConfig(r=2, target_modules="all-linear")),
    "dora": lambda: PEFT(peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True)),
    "ia3": lambda: PEFT(peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "lisa": lambda: LISA(active_layers=1, interval=2),
}


# Both effects: the partner's contract holds, and its trained weights get another gradient with the penalty.
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("partner", PARTNERS)
def test_goes_with_the_others_in_either_order(partner, first):
    def pair(weight=1.0):
        both = [ActivationDensity(weight=weight, proxy="tanh"), PARTNERS[partner]()]
        return both if first else both[::-1]

    contract(pair)
    grads = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model, updates = model_of("llama").train(), compose(pair(weight))
        for update in updates:
            update.attach(model, no_probe, ALONE)
        output = model(input_ids=IDS, labels=IDS)
        penalties = [p for u in updates if (p := u.penalty({"input_ids": IDS}, output)) is not None]
        assert len(penalties) == (weight > 0)
        (output.loss + sum(penalties)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    moved = [name for name in grads[0] if not torch.equal(grads[0][name], grads[1][name])]
    assert any(".mlp." in name for name in moved)


@pytest.mark.parametrize("options", PROXIES, ids=str)
@pytest.mark.parametrize(("kind", "where"), [*itertools.product(TINY, ("gate_act", "product")), ("opt", "gate_act")])
def test_is_the_masked_mean_by_brute_force(kind, where, options):
    reference, seen = seen_activations(kind, where)
    expected = brute_force(seen, **options)
    model, strategy = attached(kind, where=where, **options)
    got = penalty_of(model, strategy)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    got.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if theirs[name].grad is None:  # the op gives zeros where its outputs are not used
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            # 100 roundings of the largest: a key's bias, whose true gradient is 0, has nothing but them
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", OTHERS)
def test_finds_other_models(kind):
    model, strategy = attached(kind)
    assert strategy.describe() == {"mlps": 2, "activation": {"bert": "gelu", "opt": "relu", "phi3": "silu"}[kind]}
    penalty_of(model, strategy).backward()
    first = decoder_layers(model)[0]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in first.parameters())


def test_padding_has_no_gradient():
    model, strategy = attached()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, attention_mask=PADDED)
    strategy.penalty({"attention_mask": PADDED}, None).backward()
    real = PADDED.bool()
    assert embedded.grad[real].any(-1).all()
    # What is padded in front is seen by no token; what is padded behind comes after all that count.
    assert not embedded.grad[~real].any()


def test_packed_rows_count_by_their_own_mask():
    model, strategy = attached()
    model(input_ids=IDS)
    everything = strategy.penalty({"input_ids": IDS}, None)
    model(input_ids=IDS)
    got = strategy.penalty({"input_ids": IDS, "token_mask": PADDED}, None)
    assert not torch.equal(got, everything)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_counts_once(kind):
    grads = []
    for checkpointed in (False, True):
        (model, strategy), penalty = attached(kind), torch.zeros(())
        if checkpointed:
            checkpoint_activations(model)
        for _ in range(2):  # the second pass must not find what the first one's backward computed again
            penalty = penalty_of(model, strategy)
            (penalty * 3).backward()
            assert not strategy._sums.take()
        grads.append([penalty.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) > 5
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compiled_model_has_the_same_penalty(kind):
    grads = []
    for compiled in (False, True):
        torch._dynamo.reset()
        (model, strategy), penalty = attached(kind), torch.zeros(())
        if compiled:
            model.base_model.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            penalty = strategy.penalty({"input_ids": IDS}, model.base_model(input_ids=IDS, use_cache=False))
            penalty.backward()
        grads.append([penalty.detach(), *(p.grad for p in model.parameters() if p.grad is not None and p.grad.any())])
    assert len(grads[0]) > 5
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)


def test_a_pass_that_keeps_no_gradients_is_refused():
    model, strategy = attached()
    with torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(BadInput, match="no MLP ran with gradients enabled"):
        strategy.penalty({"input_ids": IDS}, None)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluation_runs_the_plain_forward(kind):
    model, strategy = attached(kind)
    plain = model_of(kind).eval()(input_ids=IDS).logits
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert not strategy._sums.take()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_detaching_leaves_nothing_and_a_copy_has_its_own(kind):
    model, strategy = attached(kind)
    twin = copy.deepcopy(model)
    for mine, theirs in zip(model.modules(), twin.modules(), strict=True):
        site = mine.__dict__.get("forward")
        assert (site is None) == ("forward" not in theirs.__dict__)
        assert site is None or theirs.__dict__["forward"].module is theirs
    penalty_of(model, strategy)
    twin(input_ids=IDS)
    strategy.detach(model)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    assert strategy.penalty({"input_ids": IDS}, None) is None


def test_weight_zero_is_the_run_without():
    runs = []
    for updates in ([], [ActivationDensity(weight=0)]):
        module = CausalLM(base=tiny_llm("llama", dropout=0.1), updates=updates, lr=1e-2)
        torch.manual_seed(0)
        trainer(3).fit(module, datamodule=data())
        runs.append(list(module.build().parameters()))
    for plain, penalised in zip(*runs, strict=True):
        assert torch.equal(plain, penalised)


# The oracle: more weight, fewer activations that are not nearly zero.
def test_density_falls_with_the_weight():
    densities = []
    for weight in (0.0, 0.3, 3.0):
        model = model_of("llama").train()
        strategy = ActivationDensity(weight=weight, proxy="tanh", beta=20.0)
        strategy.attach(model, no_probe, ALONE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(25):
            optimizer.zero_grad()
            output = model(input_ids=IDS, labels=IDS)
            penalty = strategy.penalty({"input_ids": IDS}, output)
            (output.loss + (0 if penalty is None else penalty)).backward()
            optimizer.step()
        strategy.detach(model)
        probe = ActivationDensity(proxy="tanh", beta=20.0)
        probe.attach(model, no_probe, ALONE)
        model(input_ids=IDS)
        densities.append(float(probe.penalty({"input_ids": IDS}, None).detach()))
    assert densities[0] > 1.1 * densities[1] > 1.2 * densities[2]


def test_sharpness_is_annealed_by_equal_factors_and_resumed():
    _, strategy = attached(eps=1e-1, end=1e-5, anneal_steps=4)
    course = [float(strategy._sums.sharpness)]
    for step in range(1, 7):
        strategy.after_step(step, None)
        course.append(float(strategy._sums.sharpness))
    assert course == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-5, 1e-5])
    resumed = ActivationDensity(eps=1e-1, end=1e-5, anneal_steps=4)
    resumed.restore(model_of("llama"), {"step": 2}, ALONE)
    assert float(resumed._sums.sharpness) == pytest.approx(1e-3)


def test_equal_batches_may_be_accumulated():
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(1))
    gradients = []
    for size in (4, 2):
        model, strategy = attached(proxy="tanh")
        for part in ids.split(size):
            penalty = strategy.penalty({"input_ids": part}, model(input_ids=part))
            (penalty * size / 4).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))


@pytest.mark.gpu
def test_attaches_on_a_gpu():
    penalties = []
    for device in ("cpu", "cuda"):
        model, strategy = model_of("llama").train().to(device), ActivationDensity(proxy="tanh")
        strategy.attach(model, no_probe, ALONE)
        batch = {"input_ids": IDS.to(device)}
        penalties.append(strategy.penalty(batch, model(**batch)))
        penalties[-1].backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "gate_proj" in name)
    torch.testing.assert_close(penalties[1].cpu(), penalties[0], rtol=1e-4, atol=1e-6)


def test_layers_are_weighted():
    def penalty(**options):
        model, strategy = attached(**options)
        return penalty_of(model, strategy).detach()

    singles = [penalty(layer_weights=[float(n == m) for n in range(3)]) for m in range(3)]
    torch.testing.assert_close(sum(singles) / 3, penalty())
    torch.testing.assert_close(penalty(layer_weights=[1.0, 1.0, 2.0]) * 4, singles[0] + singles[1] + 2 * singles[2])


def test_adaptive_weights_minimise_the_weighted_density_less_entropy():
    model, strategy = attached(layer_weights="adaptive", entropy=0.05)
    even = penalty_of(model, strategy)
    strategy.after_step(1, None)
    d, w = strategy._means, torch.tensor(strategy.describe()["layer_weights"]) / 3
    torch.testing.assert_close(d.mean(), even.detach())
    again = penalty_of(model, strategy)
    torch.testing.assert_close(again.detach(), (w * d).sum())

    def objective(w):
        return (w * d).sum() + 0.05 * (w * w.log()).sum()

    for _ in range(50):
        assert objective(torch.softmax(w.log() + 0.1 * torch.randn(3), 0)) >= objective(w) - 1e-7


class OwnForward(UpdateStrategy):
    leaves = "own_forward"


class ForwardOnly(UpdateStrategy):
    backward = "none"


@pytest.mark.parametrize(("other", "why"), [(ForwardOnly, "ActivationDensity trains"), (OwnForward, "the penalty of")])
def test_refuses_what_leaves_no_gradient_inside(other, why):
    with pytest.raises(BadInput, match=f"ActivationDensity and {other.__name__} cannot be combined: {why}"):
        compose([other(), ActivationDensity()])


def test_a_quantised_base_needs_an_adapter_beside_it():
    Updates([ActivationDensity(), PEFT(peft.LoraConfig(r=2))]).check_quantizable("x")
    with pytest.raises(BadInput, match="full fine-tuning changes"):
        Updates([ActivationDensity()]).check_quantizable("x")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight": -1.0}, "weight is -1.0; it must not be negative"),
        ({"eps": 0.0}, "eps is 0.0; it must be above 0"),
        ({"beta": -2.0}, "beta is -2.0; it must be above 0"),
        ({"entropy": 0.0}, "entropy is 0.0; it must be above 0"),
        ({"end": -1e-3, "anneal_steps": 2}, "end is -0.001; it must be above 0"),
        ({"end": 1e-3}, "end is 0.001 and anneal_steps is 0; set both"),
        ({"anneal_steps": 3}, "end is None and anneal_steps is 3; set both"),
        ({"layer_weights": [1.0, -1.0, 0.0]}, "give one for each layer, none negative and not all 0"),
        ({"layer_weights": []}, r"layer_weights are \[\]; give one for each layer"),
        ({"layer_weights": [1.0]}, "1 layer_weights were given, but the model has 3 layers"),
    ],
)
def test_refuses_in_a_sentence(options, expected):
    with pytest.raises(BadInput, match=expected):
        attached(**options)


def test_refuses_models_without_such_mlps():
    model = model_of("llama")
    decoder_layers(model)[1].mlp = torch.nn.Identity()
    what = r"no MLP was found in model\.layers\.1 of LlamaForCausalLM: it has 0 gate, 0 up and 0 down projections"
    with pytest.raises(BadInput, match=what):
        ActivationDensity().attach(model, no_probe, ALONE)
    for act, what in (("mish", "none of silu, gelu, gelu_tanh, relu"),):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act=act))
        with pytest.raises(BadInput, match=what):
            ActivationDensity().attach(model, no_probe, ALONE)
    with pytest.raises(BadInput, match="set where to gate_act"):
        attached("phi3", where="product")


def test_refuses_a_gated_mlp_of_another_form():
    model = model_of("llama")
    mlp = decoder_layers(model)[2].mlp
    kind = type("Scaled", (type(mlp),), {"forward": lambda self, x: 2 * type(mlp).__mro__[1].forward(self, x)})
    mlp.__class__ = kind
    with pytest.raises(BadInput, match=r"the Scaled that holds model\.layers\.2\.mlp\.up_proj does not compute down"):
        ActivationDensity().attach(model, no_probe, ALONE)
    assert not any("forward" in module.__dict__ for module in model.modules())


# ---- bytes saved for the backward, beside tests/test_saved_bytes.py's closed forms


@pytest.mark.parametrize("where", ["gate_act", "product"])
@pytest.mark.parametrize("method", [frozen, full, lora])
def test_a_layer_saves_less_with_the_penalty_than_without(method, where):
    def with_penalty(model):
        method(model)
        ActivationDensity(where=where).attach(model.build(), no_probe, ALONE)

    shape = SHAPES[0]
    assert per_token_of_a_layer(with_penalty, shape) == per_token_of_a_layer(method, shape) - shape["intermediate_size"]


@pytest.mark.parametrize("layer_weights", [None, [1.0, 0.0, 3.0]])
def test_logs_the_mean_over_the_batches_of_a_step(layer_weights):
    model, strategy = attached(weight=0.5, layer_weights=layer_weights)
    assert strategy.logged() == {}
    penalties = [penalty_of(model, strategy, mask) for mask in (PADDED, torch.ones_like(PADDED))]
    assert penalties[0] != penalties[1]
    got = strategy.logged()["density_penalty"]
    torch.testing.assert_close(got, torch.stack(penalties).mean().detach())
    assert not got.requires_grad
    strategy.after_step(1, torch.optim.SGD(model.parameters()))
    assert strategy.logged() == {}


def test_an_adapters_dropout_is_no_other_formula():
    """Each of two passes draws its own mask, which a learnt adapter shows."""
    model, strategy = model_of("llama").train(), ActivationDensity()
    torch.manual_seed(0)
    PEFT(peft.LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)).attach(
        model, no_probe, ALONE
    )
    strategy.attach(model, no_probe, ALONE)
    assert strategy.describe()["mlps"] == 3
    assert all(module.training for module in model.modules())
