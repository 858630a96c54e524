"""`Updates`: the hooks that future methods need, each used in a fit, the contract and a bare loop."""

import dataclasses
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_sparse.anatomy import decoder_layers
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import LISA, PEFT, SMT, Updates, UpdateStrategy
from lit_sparse.testing import contract, next_token_cross_entropy, tiny_llm


class TwoPoints(torch.optim.Optimizer):
    """Moves along one random direction by the loss on either side of the weights (SPSA)."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "steps": 0})
        self.graphs: list[bool] = []

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        group, parameters = self.param_groups[0], [p for group in self.param_groups for p in group["params"]]
        group["steps"] += 1
        draw = torch.Generator().manual_seed(group["steps"])
        start = [p.clone() for p in parameters]
        direction = [torch.randn(p.shape, generator=draw).to(p.dtype) for p in parameters]
        losses = []
        for sign in (1, -1):
            for p, before, z in zip(parameters, start, direction, strict=True):
                p.copy_(before + sign * 1e-2 * z)
            losses.append(closure())  # pyright: ignore[reportOptionalCall]
            self.graphs.append(losses[-1].requires_grad)
        slope = (losses[0] - losses[1]) / 2e-2
        for p, before, z in zip(parameters, start, direction, strict=True):
            p.copy_(before - group["lr"] * slope * z)
        return torch.stack(losses).mean()


@dataclasses.dataclass
class ForwardOnly(UpdateStrategy):
    """Trains by losses alone, in the dtype of the weights."""

    claims: ClassVar = frozenset({"optimizer", "backward"})
    backward: ClassVar = "none"
    masters: ClassVar = False

    def __post_init__(self):
        self.steps: list[int] = []

    def before_step(self, step, optimizer):
        self.steps.append(step)

    def optimizer(self, groups, lr):
        return TwoPoints(groups, lr)


class InBackward(torch.optim.Optimizer):
    """Updates each weight during the backward pass and frees its gradient."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})
        self._handles = {}

    def watch(self):
        """Hook the parameters that have none yet, and take the hooks off those that left."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p in self._handles.keys() - groups.keys():
            self._handles.pop(p).remove()
        for p in groups.keys() - self._handles.keys():
            self._handles[p] = p.register_post_accumulate_grad_hook(self._update)

    @torch.no_grad()
    def _update(self, parameter):
        (group,) = (group for group in self.param_groups if any(p is parameter for p in group["params"]))
        parameter.sub_(parameter.grad, alpha=group["lr"])
        parameter.grad = None

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None if closure is None else closure()


@dataclasses.dataclass
class Fused(UpdateStrategy):
    """Trains during the backward pass."""

    claims: ClassVar = frozenset({"optimizer", "backward"})
    backward: ClassVar = "fused"

    def optimizer(self, groups, lr):
        return InBackward(groups, lr)

    def regrouped(self, optimizer):
        optimizer.watch()


@dataclasses.dataclass
class WarmUp(UpdateStrategy):
    """Lowers the learning rate of the first steps, with an optimizer whose steps are as long as its rate."""

    claims: ClassVar = frozenset({"optimizer"})

    def optimizer(self, groups, lr):
        return torch.optim.SGD(groups, lr)

    def lr_factor(self, step):
        return min(1.0, step / 4)


def lisa():
    return LISA(active_layers=1, interval=2, sampler="cyclic")


def lora():
    from peft import LoraConfig

    return PEFT(LoraConfig(r=2, target_modules="all-linear"))


def trainer(steps, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "max_steps": steps, "use_distributed_sampler": False, "enable_model_summary": False}
    return L.Trainer(**{**fixed, **quiet, **options})


def data():
    return Synthetic(vocab_size=96, max_length=12, rows=26, heldout=2, batch_size=2)


def fitted(updates, steps=4, base=None, lr=1e-3, trainer_options=None, **options):
    task = CausalLM(base or tiny_llm(), updates, lr=lr, **options)
    trainer(steps, **(trainer_options or {})).fit(task, datamodule=data())
    return task


# ---- the contract holds for them, alone and with others


@pytest.mark.parametrize(
    "make",
    [
        lambda: [ForwardOnly()],
        lambda: [ForwardOnly(), lora()],
        lambda: [ForwardOnly(), lisa()],
        lambda: [ForwardOnly(), SMT(mode="delta", block_size=8, trainable_fraction=0.05)],
        lambda: [Fused()],
        lambda: [Fused(), lisa()],
        lambda: [Fused(), SMT(block_size=8, trainable_fraction=0.05)],
        lambda: [WarmUp()],
        lambda: [WarmUp(), lisa()],
    ],
    ids=[
        "none",
        "none+lora",
        "none+lisa",
        "none+delta",
        "fused",
        "fused+lisa",
        "fused+smt",
        "own",
        "own+lisa",
    ],
)
def test_contract(make):
    contract(make)


# ---- forward-only


def test_a_forward_only_method_gets_losses_without_a_graph_once_a_window():
    update = ForwardOnly()
    task = fitted([update], 3, trainer_options={"accumulate_grad_batches": 2})
    (optimizer,) = task.trainer.optimizers
    assert update.steps == [1, 2, 3]
    assert getattr(optimizer, "optimizer", optimizer).graphs == [False] * 6
    assert all(p.grad is None for p in task.build().parameters())
    assert task.trainer.global_step == 3


def test_its_weights_stay_in_bf16():
    task = fitted([ForwardOnly()], base=tiny_llm().to(torch.bfloat16), precision="bfloat16")
    assert {parameter.dtype for parameter in task.build().parameters()} == {torch.bfloat16}


def test_it_is_clipped_by_no_trainer():
    with pytest.raises(BadInput, match=r"ForwardOnly keeps no gradients .* remove trainer\.gradient_clip_val"):
        fitted([ForwardOnly()], trainer_options={"gradient_clip_val": 1.0})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_it_resumes_to_the_same_bits(tmp_path):
    tiny_llm().save_pretrained(tmp_path / "base")
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"callbacks": [keep], "enable_checkpointing": True}
    straight = fitted([ForwardOnly(), lisa()], 5, str(tmp_path / "base"), trainer_options=options)
    resumed = CausalLM(str(tmp_path / "base"), [ForwardOnly(), lisa()], lr=1e-3)
    resumed.resume_from = tmp_path / "ckpt" / "step=2.ckpt"
    trainer(5).fit(resumed, datamodule=data(), ckpt_path=resumed.resume_from)
    theirs = dict(straight.build().named_parameters())
    for name, value in resumed.build().named_parameters():
        assert torch.equal(value, theirs[name]), name


def test_blocks_in_place_are_refused():
    """In place, the forward pass reads the weights, so a perturbed master would not change the loss."""
    with pytest.raises(BadInput, match="SMT and ForwardOnly cannot be combined: SMT trains through gradients"):
        Updates([SMT(), ForwardOnly()])
    with pytest.raises(BadInput, match="LISA and ForwardOnly cannot be combined: LISA needs gradients that live"):
        Updates([LISA(sampler="grad_norm"), ForwardOnly()])


# ---- fused backward


def test_a_fused_backward_follows_the_trainable_set():
    task = fitted([Fused(), lisa()], 6, lr=1e-2)
    base = dict(tiny_llm().named_parameters())
    for number, layer in enumerate(decoder_layers(task.build())):
        still = [n for n, p in layer.named_parameters() if torch.equal(p, base[f"model.layers.{number}.{n}"])]
        assert not still, f"layer {number}: {still} did not move"
    assert all(p.grad is None for p in task.build().parameters())


# ---- a method's own optimizer


@dataclasses.dataclass
class OneGroup(UpdateStrategy):
    """Makes a group of its own of what it is given."""

    claims: ClassVar = frozenset({"optimizer"})

    def optimizer(self, groups, lr):
        return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr)


def test_an_optimizer_with_groups_of_its_own_making_is_refused():
    with pytest.raises(BadInput, match=r"OneGroup has 1 parameter group\(s\) of its own making.* of the 2 groups that"):
        fitted([OneGroup(), lisa()])


def test_learning_rates_are_scaled_for_the_step_alone():
    """Plain SGD: a step is as long as its rate; the schedule and the log see the configured one."""
    moved, rates = [], []
    updates, model = Updates([WarmUp()]), tiny_llm()
    updates.attach(model)
    optimizer, ids = updates.optimizer(1e-3), torch.arange(3, 9)[None]
    for step in range(1, 6):
        before = [p.detach().clone() for p in model.parameters()]
        updates.step(step, optimizer, lambda: next_token_cross_entropy(model(input_ids=ids).logits, ids))
        rates.append({group["lr"] for group in optimizer.param_groups})
        moved.append(torch.stack([(p - b).norm() for p, b in zip(model.parameters(), before, strict=True)]).norm())
    assert rates == [{1e-3}] * 5
    ratios = (torch.stack(moved) / moved[-1]).tolist()
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], rel=0.05)


# ---- order and context


@dataclasses.dataclass
class Noted(UpdateStrategy):
    """Record which hooks are called, and with which siblings."""

    events: list[str]
    name: str
    changes: bool = False

    def attach(self, model, probe, context):
        others = "".join(sorted(sibling.name for sibling in context.siblings))
        self.events.append(f"{self.name} beside {others}, {'' if context.checkpointing else 'not '}checkpointed")

    def before_step(self, step, optimizer):
        self.events.append(f"{self.name} before {step}")

    def after_step(self, step, optimizer):
        self.events.append(f"{self.name} after {step}")
        return self.changes

    def regrouped(self, optimizer):
        self.events.append(f"{self.name} regrouped")

    def detach(self, model):
        self.events.append(f"{self.name} off")


@dataclasses.dataclass
class Adding(Noted):
    gradients: ClassVar = "adds"


@dataclasses.dataclass
class Reading(Noted):
    gradients: ClassVar = "reads"


@pytest.mark.parametrize("bare", [False, True])
def test_the_order_of_hooks(bare):
    events: list[str] = []
    updates = [Adding(events, "a"), Reading(events, "r"), Noted(events, "n", changes=True)]
    if bare:
        model, run, ids = tiny_llm(), Updates(updates), torch.arange(3, 9)[None]
        run.attach(model)
        run.step(1, run.optimizer(1e-3), lambda: model(input_ids=ids, labels=ids).loss)
        run.detach(model)
    else:
        fitted(updates, 1).detach()
    assert events == [
        *(f"{name} beside {others}, not checkpointed" for name, others in (("n", "ar"), ("r", "an"), ("a", "nr"))),
        *(f"{name} regrouped" for name in "nra"),
        *(f"{name} before 1" for name in "nra"),
        *(f"{name} after 1" for name in "arn"),
        *(f"{name} regrouped" for name in "nra"),
        *(f"{name} off" for name in "arn"),
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_context_says_whether_activations_are_checkpointed():
    events: list[str] = []
    fitted([Noted(events, "n")], 1, activation_checkpointing=True)
    assert events[0] == "n beside , checkpointed"


# ---- strategies that owe the contract something


@dataclasses.dataclass
class Nothing(UpdateStrategy):
    """Does nothing."""


@dataclasses.dataclass
class Constant(UpdateStrategy):
    """A penalty that depends on the weights, and reaches none."""

    def penalty(self, batch, output):
        return output.logits.detach().square().mean()


@dataclasses.dataclass
class Thief(UpdateStrategy):
    """Trains one layer, and moves another one."""

    claims: ClassVar = frozenset({"trainable"})

    def attach(self, model, probe, context):
        model.requires_grad_(False)
        first, self.second, *_ = decoder_layers(model)
        first.requires_grad_(True)

    def after_step(self, step, optimizer):
        with torch.no_grad():
            next(self.second.parameters()).add_(1e-3)
        return False


@dataclasses.dataclass
class FirstHooks(Fused):
    """Hooks the weights that train first, and none of those that train later."""

    def __post_init__(self):
        self.hooked = False

    def regrouped(self, optimizer):
        if not self.hooked:
            optimizer.watch()
        self.hooked = True


@dataclasses.dataclass
class Forgetful(WarmUp):
    """Forgets how many steps it has taken when it resumes."""

    def attach(self, model, probe, context):
        self.count = 0

    def before_step(self, step, optimizer):
        self.count += 1

    def lr_factor(self, step):
        return min(1.0, self.count / 4)


@dataclasses.dataclass
class Litter(UpdateStrategy):
    """Leaves a hook behind that changes nothing."""

    def attach(self, model, probe, context):
        self.model = model
        decoder_layers(model)[0].register_forward_hook(lambda *_: None)

    def penalty(self, batch, output):
        return output.logits.square().mean()


@dataclasses.dataclass
class Amnesiac(UpdateStrategy):
    """Claims to record importance, and records none."""

    claims: ClassVar = frozenset({"importance"})

    def state_dict(self):
        return {"sums": torch.zeros(3)}


@pytest.mark.parametrize(
    ("make", "broken"),
    [
        (lambda: [Nothing()], "Nothing has no effect"),
        (lambda: [Nothing(), lora()], "Nothing has no effect"),
        (lambda: [Constant()], "Constant has no effect"),
        (lambda: [Thief()], r"model\.layers\.1\..* is frozen, but step moved it"),
        (lambda: [FirstHooks(), lisa()], "is trainable, but"),
        (lambda: [Forgetful()], "a resumed training gave another"),
        (lambda: [Litter()], "detaching left a hook on model.layers.0"),
        (lambda: [Amnesiac()], "Amnesiac recorded nothing"),
    ],
    ids=["nothing", "nothing beside", "constant", "thief", "first hooks", "forgetful", "litter", "amnesiac"],
)
def test_the_contract_is_not_fooled(make, broken):
    with pytest.raises(AssertionError, match=broken):
        contract(make)
