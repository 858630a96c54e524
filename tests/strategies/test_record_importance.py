"""The path integral against the loss that it explains, over ranks and resumed; and the Fisher."""

import math
import types

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.importance.matrices import displacement
from lit_sparse.modules import CausalLM
from lit_sparse.optim import AdamW, parameter_groups, trainable
from lit_sparse.strategies import (
    LISA,
    PEFT,
    ActivationDensity,
    KLToBase,
    RecordFisher,
    RecordImportance,
    compose,
)
from lit_sparse.strategies.base import ALONE, UpdateStrategy, no_probe
from lit_sparse.testing import TINY, contract, tiny_llm
from tests.methods import data, trainer
from tests.strategies.test_smt import loss_of, probe_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def lora(**settings):
    return PEFT(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}))


def attached(adapter, recorder, model=None):
    model, updates = model or tiny_llm(), compose([recorder, *([lora()] if adapter else [])])
    torch.manual_seed(1)
    for update in updates:
        update.attach(model.train(), probe_of(model), ALONE)
    return model, updates


def train(model, updates, optimizer, steps, seeds=(0,), first=1):
    """Take `steps` steps on the mean loss of the batches `seeds`, with a backward pass for each."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for seed in seeds:
            (loss_of(model, seed) / len(seeds)).backward()
        for update in updates:
            update.before_step(step, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # the recorder must have read by now
        optimizer.step()
        for update in updates:
            update.after_step(step, optimizer)


def recorded(recorder):
    return {name: one["sums"] for name, one in recorder.state_dict()["importance"]["matrices"].items()}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("space", ["weights", "factors"])
def test_contract_beside_lora(kind, space):
    contract(lambda: [RecordImportance(space=space), lora(target_modules="all-linear")], kind)
    contract(lambda: [RecordImportance(space=space)], kind)


@pytest.mark.parametrize(
    ("adapter", "make", "largest"),
    [(False, torch.optim.SGD, 0.02), (True, torch.optim.SGD, 0.4), (True, AdamW, 4e-3)],
)
def test_the_sums_add_up_to_what_the_loss_fell_by(adapter, make, largest):
    """For a full batch, up to a share that falls with the learning rate, since the integral is a sum of steps."""
    misses = []
    for rate, steps in ((largest, 8), (largest / 4, 32), (largest / 16, 128)):
        model, updates = attached(adapter, recorder := RecordImportance())
        optimizer = make([p for _, p in trainable(model)], lr=rate)
        before = loss_of(model, 0).item()
        train(model, updates, optimizer, steps)
        fell = before - loss_of(model, 0).item()
        assert fell > 1e-4
        misses.append(abs(sum(float(sums.sum()) for sums in recorded(recorder).values()) / fell - 1))
    assert misses[1] < misses[0] / 2, misses
    assert misses[2] < misses[1] / 2, misses
    assert misses[2] < 0.05


@pytest.mark.parametrize("adapter", [False, True])
def test_it_changes_no_bit_of_the_training(adapter):
    with_it, updates = attached(adapter, RecordImportance())
    without, others = attached(adapter, RecordImportance())
    others.pop().detach(without)
    for model, strategies in ((with_it, updates), (without, others)):
        train(model, strategies, AdamW([p for _, p in trainable(model)], lr=1e-2), 3, seeds=(0, 1))
    theirs = dict(without.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in with_it.named_parameters())


@pytest.mark.parametrize("adapter", [False, True])
def test_a_layer_left_out_of_the_forward_pass_records_nothing(adapter):
    """A layer that no token went through has no gradient."""
    model, updates = attached(adapter, recorder := RecordImportance())
    left_out, kept = (f"layers.{number}." for number in (1, 0))
    decoder_layers(model)[1].forward = lambda hidden, **_others: hidden
    train(model, updates, torch.optim.SGD([p for _, p in trainable(model)], lr=0.1), 2)
    sums = recorded(recorder)
    assert not any(one.any() for name, one in sums.items() if left_out in name)
    assert all(one.any() for name, one in sums.items() if kept in name)


def test_every_other_step_counts_twice_and_sums_may_lie_elsewhere():
    sums = {}
    for every in (1, 2):
        model, updates = attached(True, recorder := RecordImportance(every=every, offload=every == 2))
        optimizer = torch.optim.SGD([p for _, p in trainable(model)], lr=0.1)
        for step in (1, 2):
            train(model, updates, optimizer, 1, first=step)
            sums[every, step] = {name: one.clone() for name, one in recorded(recorder).items()}
    assert not any(one.any() for one in sums[2, 1].values())
    for name, one in sums[2, 2].items():
        expected = 2 * (sums[1, 2][name] - sums[1, 1][name])  # of which subtracting loses some bits
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_record_is_the_straight_one(adapter, tmp_path):
    """Bit for bit, in bf16, with dropout, accumulation, clipping and recomputed activations."""
    tiny_llm(dropout=0.1).save_pretrained(tmp_path / "base")

    def module():
        updates = [RecordImportance(every=2), *([lora(lora_dropout=0.1)] if adapter else [])]
        return CausalLM(str(tmp_path / "base"), updates, lr=1e-2, precision="bfloat16", activation_checkpointing=True)

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    straight, resumed = module(), module()
    trainer(5, callbacks=[checkpoint], enable_checkpointing=True, **options).fit(straight, datamodule=data())
    resumed.resume_from = tmp_path / "ckpt" / "step=3.ckpt"
    trainer(5, **options).fit(resumed, datamodule=data(), ckpt_path=resumed.resume_from)
    expected, got = (recorded(one.updates[-1]) for one in (straight, resumed))
    assert expected.keys() == got.keys()
    for name, sums in got.items():
        assert sums.any()
        assert torch.equal(sums, expected[name]), name


# ---- Fisher


class Regression(torch.nn.Module):
    """y = w x, in what looks like a model with one decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(num_hidden_layers=1)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)])


def test_of_linear_regression_with_unit_noise_the_fisher_is_the_mean_square_of_the_inputs():
    model, recorder = Regression(), RecordFisher(samples=20)
    inputs = torch.randn(10, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def probe(steps, weighed=True):
        for number in range(steps):
            output = model.layers[0](inputs[number // 2])
            yield (output - (output.detach() + (-1) ** number)).square().sum() / 2  # noise of exactly +-1

    recorder.attach(model, probe, ALONE)
    got = recorded(recorder)["layers.0.weight"]
    torch.testing.assert_close(got, inputs.square().mean(0), rtol=1e-12, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_of_logistic_regression_the_fisher_is_the_mean_of_p_times_1_minus_p_times_the_square_of_the_inputs():
    """Each input four times, once with the label 1, where the model says one in four."""
    model, recorder = Regression(), RecordFisher(samples=20)
    inputs = torch.randn(5, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        inputs[..., 2] += (math.log(1 / 3) - model.layers[0](inputs)[..., 0]) / 2

    def probe(steps, weighed=True):
        for number in range(steps):
            logit = model.layers[0](inputs[number // 4])
            yield torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.full_like(logit, number % 4 == 0))

    recorder.attach(model, probe, ALONE)
    expected = 3 / 16 * inputs.square().mean(0)
    torch.testing.assert_close(recorded(recorder)["layers.0.weight"], expected, rtol=1e-12, atol=0)


def test_on_a_new_adapter_it_is_the_fisher_of_the_weights_themselves():
    """The mean of squares of per-sample gradients, without dropout, and the model left as it was."""

    def probe_of_one(model):
        def losses(steps, weighed=True):
            for seed in range(steps):
                ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(seed))
                logits = model(input_ids=ids).logits[0, :-1]
                yield torch.nn.functional.cross_entropy(logits, ids[0, 1:])

        return losses

    model, plain, recorder = tiny_llm(dropout=0.5).train(), tiny_llm(), RecordFisher(samples=5)
    lora(lora_dropout=0.5).attach(model, no_probe, ALONE)
    recorder.attach(model, probe_of_one(model), ALONE)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    expected = dict.fromkeys(recorded(recorder), 0)
    for loss in probe_of_one(plain)(5):
        plain.zero_grad()
        loss.backward()
        for name in expected:
            expected[name] = expected[name] + plain.get_submodule(name).weight.grad.square() / 5
    assert len(expected) == 6
    for name, sums in recorded(recorder).items():
        torch.testing.assert_close(sums, expected[name], rtol=1e-3, atol=1e-6 * float(expected[name].max()))


def test_batches_of_several_samples_and_none_are_refused():
    model = tiny_llm()
    with pytest.raises(BadInput, match=r"squares the gradient of each sample, but a batch has 2; set data\.batch_size"):
        RecordFisher().attach(model, probe_of(model), ALONE)
    assert not any(m._forward_pre_hooks for m in model.modules())
    ids = torch.arange(3, 11)[None]
    packed = {"input_ids": ids, "position_ids": torch.arange(4).repeat(2)[None], "labels": ids}
    with pytest.raises(BadInput, match=r"but a row packs several; set data\.packing to false"):
        RecordFisher().attach(model, lambda steps, weighed: iter(model(**packed).loss for _ in range(steps)), ALONE)
    with pytest.raises(BadInput, match=r"RecordFisher got no training data; set data\.train"):
        RecordFisher().attach(model, lambda steps, weighed: iter(()), ALONE)


# ---- what goes together


class Fused(UpdateStrategy):
    backward = "fused"


@pytest.mark.parametrize("penalty", [ActivationDensity(weight=0.1), KLToBase()], ids=lambda one: type(one).__name__)
def test_a_recorder_reads_the_gradient_of_the_task_alone(penalty):
    names = f"RecordImportance and {type(penalty).__name__}"
    with pytest.raises(BadInput, match=f"{names} cannot be combined: .* reads the gradient of the task's loss"):
        compose([penalty, RecordImportance()])
    compose([penalty, RecordFisher()])  # which looks at the task's loss before the first step


def test_incompatible_strategies_are_refused():
    with pytest.raises(
        BadInput,
        match=r"RecordImportance and Fused cannot be combined: .* needs gradients that live",
    ):
        compose([Fused(), RecordImportance()])
    with pytest.raises(BadInput, match=r"RecordFisher and LISA cannot be combined: .* trains others later"):
        compose([RecordFisher(), LISA()])
    with pytest.raises(BadInput, match="both take over the model's importance"):
        compose([RecordFisher(), RecordImportance()])
    with pytest.raises(BadInput, match="every is 0; it must be at least 1"):
        RecordImportance(every=0)
    with pytest.raises(BadInput, match="samples is 0; it must be at least 1"):
        RecordFisher(samples=0)


def test_a_quantised_base_may_be_recorded_beside_an_adapter_only():
    assert CausalLM("x", [lora(), RecordImportance()], quantize="nf4").updates
    with pytest.raises(BadInput, match="but full fine-tuning changes the base's own weights"):
        CausalLM("x", [RecordImportance()], quantize="nf4")


def test_the_checkpoint_has_start_and_sums_and_the_way_between():
    """By parameter name: the final values are in the checkpoint anyway."""
    model, updates = attached(True, recorder := RecordImportance(targets=["v"]))
    start = {name: parameter.detach().clone() for name, parameter in trainable(model)}
    train(model, updates, AdamW(parameter_groups(trainable(model)), lr=1e-2), 2)
    entries = recorder.state_dict()["importance"]["matrices"]
    assert [name.rpartition(".")[2] for name in entries] == ["v_proj"] * 3
    for one in entries.values():
        assert all(torch.equal(value, start[name]) for name, value in one["start"].items())
        end = [dict(model.named_parameters())[name].detach() for name in one["start"]]
        assert displacement(list(one["start"].values()), end, one["scale"]).shape == one["sums"].shape
