"""HELENE: its steps are the published equations, what its curvature is, and which settings are none."""

import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig
from torch import nn

from lit_sparse.checkpoints import read_checkpoint
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.export.replay import go_on_from
from lit_sparse.export.seedlog import SeedLog
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.optim import trainable
from lit_sparse.planning.forecast import Setting, forecast
from lit_sparse.strategies import HELENE, LISA, PEFT, MeZO, Updates, UpdateStrategy
from lit_sparse.strategies.helene import annealed
from lit_sparse.testing import contract, next_token_cross_entropy, tiny_encoder, tiny_llm
from lit_sparse.zeroth_order.curvature import squared_slopes
from lit_sparse.zeroth_order.quantile import quantiles
from lit_sparse_kernels.philox import row_noise, step_seed
from tests.methods import module
from tests.modules.test_sharding import Sent, moments
from tests.modules.test_sharding import fit as fit_on
from tests.pair import attempt, result, run_pair
from tests.test_cli import refused
from tests.test_resume import fit, saved

LR, EPSILON, STEPS = 2.0**-7, 1e-3, 7


class Toy(nn.Module):
    """A model of float64 alone, whose losses leave no rounding to slopes: it predicts a token from the one before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.embed = nn.Embedding(20, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 20, bias=False)
        self.double()

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return SimpleNamespace(logits=self.head(hidden))


class Loss:
    """The loss of a step's rows, which have unlike numbers of tokens; by row too."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self.model, self.step = model, step

    def __call__(self) -> torch.Tensor:
        return self.of_rows()[0]

    def of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.step)
        rows = [torch.randint(3, 20, (1, length), generator=generator) for length in (12, 5, 9)]
        losses = torch.stack([next_token_cross_entropy(self.model(input_ids=ids).logits, ids) for ids in rows])
        weights = losses.new_tensor([ids.shape[1] - 1 for ids in rows])
        return (losses * weights).sum() / weights.sum(), losses


def trained(*strategies: UpdateStrategy, model: nn.Module | None = None, steps: int = STEPS, loss=Loss, lr: float = LR):
    """A model after steps with the strategies, and its optimizer."""
    model = Toy() if model is None else model
    updates = Updates(strategies)
    updates.attach(model)
    optimizer = updates.optimizer(lr)
    for step in range(1, steps + 1):
        updates.step(step, optimizer, loss(model, step))
    return model, optimizer


def layer_of(name: str) -> int:
    return int(name.split(".")[1]) + 1 if "layers" in name else 4 * name.startswith("head")


def rounded_down(value: torch.Tensor) -> float:
    return float((value.float().view(torch.int32) & -65536).view(torch.float32))


def textbook(
    steps: int = STEPS, beta1: float = 0.9, beta2: float = 0.99, k: int = 3, T: float = math.inf, h: str = "scalar",
    gnb: str = "examples", floors: str = "const", floor: float = 0.5, gamma: float | None = None, eps: float = 1e-8,
    kind: str = "rademacher", decay: float = 0.0,
) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """The equations written plainly, with whole tensors; returns the model, m and h."""
    model = Toy()
    named = list(model.named_parameters())
    numbers = {name: number for number, name in enumerate(sorted(name for name, _ in named))}
    layers = [layer_of(name) for name, _ in named]
    sizes = torch.tensor([float(sum(p.numel() for (_, p), n in zip(named, layers) if n == i)) for i in range(5)])  # noqa: B905
    m, h_all = [torch.zeros_like(p) for _, p in named], [torch.zeros_like(p) for _, p in named]
    units, refreshes = [], 0

    @torch.no_grad()
    def probe(step: int, query: int, active=lambda layer: True):
        seed, start = step_seed(0, step, query), copy.deepcopy(model.state_dict())
        z = [
            row_noise(torch.arange(len(p)), p[0].numel(), seed, numbers[n], kind=kind).view(p.shape).double()
            * active(i)
            for (n, p), i in zip(named, layers, strict=True)
        ]
        sides = []
        for sign in (1, -1):
            for (_, p), noise in zip(named, z, strict=True):
                p.add_(sign * EPSILON * noise)
            sides.append(Loss(model, step).of_rows())
            model.load_state_dict(start)
        (above, above_N), (below, below_N) = sides
        c, c_N = (above - below) / (2 * EPSILON), (above_N - below_N) / (2 * EPSILON)
        return c, (c_N.square().mean() if gnb == "examples" else len(c_N) * c**2), z

    for step in range(1, steps + 1):
        c, s, z = probe(step, 0)
        alpha = beta1 + (1 - beta1) * math.exp(-(step - 1) / T)
        m = [beta1 * one + alpha * c * noise for one, noise in zip(m, z, strict=True)]
        if (step - 1) % k == 0:
            refreshes += 1
            if h == "layer":
                found = [probe(step, 1 + i, lambda layer, i=i: layer == i)[1] for i in range(5)]
                units += found
                estimates = [torch.full_like(p, float(found[i])) for (_, p), i in zip(named, layers, strict=True)]
            else:
                units.append(s)
                estimates = [s * (noise**2 if h == "tensor" else torch.ones_like(noise)) for noise in z]
            h_all = [beta2 * one + (1 - beta2) * new for one, new in zip(h_all, estimates, strict=True)]
        factor = gamma or 1 / float(sum(units) / len(units))
        grown = 1 - beta2**refreshes
        bounds = [floor / factor] * 5
        if floors == "theory":
            radius = 2 * floor * sizes.mean().sqrt() / factor
            bounds = (radius / (2 * sizes.sqrt())).tolist()
        if floors == "quantile":
            ordered = [torch.cat([t.flatten() for t, n in zip(h_all, layers, strict=True) if n == i]) for i in range(5)]
            bounds = [rounded_down(t.sort().values[int(floor * len(t))]) / grown for t in ordered]
        with torch.no_grad():
            for (_, p), mean, curve, i in zip(named, m, h_all, layers, strict=True):
                p.mul_(1 - LR * decay * (p.ndim > 1))
                p.sub_(LR * mean / (factor * (curve / grown).clamp(min=bounds[i]) + eps))
    return model, m, h_all


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"anneal_steps": 4, "beta1": 0.8, "weight_decay": 0.5}, {"T": 4, "beta1": 0.8, "decay": 0.5}),
        (
            {"gnb": "batch", "gamma": 0.3, "eps": 0.1, "refresh_every": 1},
            {"gnb": "batch", "gamma": 0.3, "eps": 0.1, "k": 1},
        ),
        ({"h": "layer", "floors": "theory", "floor": 0.1}, {"h": "layer", "floors": "theory", "floor": 0.1}),
        ({"h": "tensor", "direction": "gaussian", "beta2": 0.5}, {"h": "tensor", "kind": "gaussian", "beta2": 0.5}),
        (
            {"h": "tensor", "direction": "gaussian", "floors": "quantile", "floor": 0.9, "weight_decay": 0.5},
            {"h": "tensor", "kind": "gaussian", "floors": "quantile", "floor": 0.9, "decay": 0.5},
        ),
        ({"h": "tensor", "floors": "theory"}, {"h": "tensor", "floors": "theory"}),
    ],
)
def test_steps_are_the_published_equations(options, theirs):
    helene = HELENE(**{"epsilon": EPSILON, "refresh_every": 3, "anneal_steps": None, **options})
    model, optimizer = trained(helene)
    wanted, m, h = textbook(**theirs)
    start = dict(Toy().named_parameters())
    for (name, p), mean, curve in zip(wanted.named_parameters(), m, h, strict=True):
        ours, state = model.get_parameter(name), optimizer.state[model.get_parameter(name)]
        assert (p - start[name]).norm() > 1e-3, name
        torch.testing.assert_close(ours, p, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(state["momentum"], mean, rtol=1e-5, atol=1e-6)
        if "curvature" in state:
            torch.testing.assert_close(state["curvature"], curve, rtol=1e-5, atol=1e-7)


def test_a_new_gradients_share_falls_from_one_to_beta1():
    helene = HELENE(beta1=0.9, anneal_steps=50)
    shares = [annealed(helene, step) for step in range(1, 1000)]
    assert shares[0] == 1
    assert shares[50] == pytest.approx(0.936788, abs=1e-6)
    assert shares[-1] == pytest.approx(0.9, abs=1e-6)
    assert shares == sorted(shares, reverse=True)
    assert annealed(HELENE(anneal_steps=None), 10**6) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("h", ["scalar", "tensor"])
def test_with_a_curvature_of_one_it_is_mezo_with_momentum_to_the_bit(h, momentum):
    """MeZO's momentum is a mean, HELENE's a sum; with powers of two, both round alike."""
    flat = {"gamma": 1e-20, "floor": 1e-20 if h == "tensor" else 1.0, "eps": 0.0, "anneal_steps": None}
    if h == "tensor":
        flat = {**flat, "gamma": 1.0, "floor": 1.0, "beta2": 0.0, "refresh_every": 10**6}
    helene, _ = trained(HELENE(h=h, beta1=momentum, **flat), model=Toy().float(), lr=LR * (1 - momentum), loss=Flat)
    mezo, _ = trained(MeZO(momentum=momentum), model=Toy().float(), loss=Flat)
    start = Toy().float()
    for name, p in mezo.named_parameters():
        assert torch.equal(helene.get_parameter(name), p), name
        assert not torch.equal(start.get_parameter(name), p), name


class Flat(Loss):
    """Rows without a slope of their own, so that the curvature stays below its floor."""

    def of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        loss, rows = super().of_rows()
        return loss, torch.zeros_like(rows)


@pytest.mark.parametrize("gnb", ["examples", "batch"])
def test_with_signs_a_tensor_is_a_scalar(gnb):
    options = {"gnb": gnb, "refresh_every": 2, "floor": 0.01}
    ours = HELENE(**options)
    scalar, _ = trained(ours)
    tensor, optimizer = trained(HELENE(h="tensor", **options))
    for name, p in scalar.named_parameters():
        torch.testing.assert_close(tensor.get_parameter(name), p, rtol=0, atol=1e-8)
        curvature = optimizer.state[tensor.get_parameter(name)]["curvature"]
        torch.testing.assert_close(curvature, torch.full_like(curvature, ours.state_dict()["curvature"]["values"][0]))


def test_gaussian_directions_add_to_the_gradients_norm_twice_the_weights_own_part():
    """So the curvature of a weight is hardly its own: E[(z g)^2 z_i^2] = |g|^2 + 2 g_i^2."""
    g = torch.linspace(0.1, 2, 8)
    z = row_noise(torch.arange(200_000), 8, 1, 0, kind="gaussian")
    found = ((z @ g).square()[:, None] * z.square()).mean(0)
    torch.testing.assert_close(found, g.square().sum() + 2 * g.square(), rtol=0.03, atol=0)


def test_estimates_are_the_hessian_for_labels_that_the_model_draws_and_not_for_others():
    """On softmax regression: the mean over examples of squared slopes against z^T H z."""
    torch.manual_seed(0)
    x, weight, z = (torch.randn(*shape, dtype=torch.float64) for shape in ((100_000, 6), (4, 6), (4, 6)))
    p, u = (x @ weight.t()).softmax(1), x @ z.t()
    hessian = float(((p * u * u).sum(1) - (p * u).sum(1).square()).mean())

    def estimate(labels: torch.Tensor) -> float:
        sides = [nn.functional.cross_entropy(x @ (weight + e * z).t(), labels, reduction="none") for e in (1e-4, -1e-4)]
        return squared_slopes((sides[0] - sides[1]) / 2e-4, 0.0, "examples")

    assert estimate(torch.multinomial(p, 1)[:, 0]) == pytest.approx(hessian, rel=0.05)
    assert estimate(torch.zeros(len(x), dtype=torch.long)) > 1.2 * hessian


def test_a_batch_estimate_is_examples_times_the_squared_mean():
    assert squared_slopes(torch.tensor([1.0, 5.0]), 3.0, "batch") == 18.0
    assert squared_slopes(torch.tensor([1.0, 5.0]), 3.0, "examples") == 13.0
    assert squared_slopes(torch.empty(0), 3.0, "examples") == 0.0


def test_a_floor_bounds_the_step():
    helene = HELENE(h="tensor", floor=1e4, gamma=2.0, direction="gaussian")
    model, optimizer = trained(helene, steps=1)
    start = dict(Toy().named_parameters())
    for name, p in model.named_parameters():
        step, m = (start[name] - p).abs(), optimizer.state[p]["momentum"].abs()
        torch.testing.assert_close(step, LR * m / 1e4, rtol=1e-6, atol=1e-14)  # nowhere is gamma h that large


def test_the_curvature_changes_at_refreshes_only():
    helene, seen = HELENE(h="tensor", refresh_every=3), []
    model, updates = Toy(), Updates([helene])
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    for step in range(1, 8):
        updates.step(step, optimizer, Loss(model, step))
        seen.append(optimizer.state[model.head.weight]["curvature"].sum().item())
    assert [n for n in range(1, 7) if seen[n] != seen[n - 1]] == [3, 6]
    assert seen[0] > 0


def test_quantiles_of_groups():
    torch.manual_seed(0)
    groups = [[torch.rand(1000), torch.rand(17, 3) * 1e-6], [torch.full((9,), 3.1)], [torch.zeros(4)], [torch.rand(1)]]
    for share in (0.1, 0.5, 0.99):
        values = [torch.cat([t.flatten() for t in group]).sort().values for group in groups]
        wanted = [rounded_down(one[int(share * len(one))]) for one in values]
        assert quantiles(groups, share) == wanted


# ---- rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "logits held whole", "classes"])
@pytest.mark.parametrize("rows", [None, 4])
def test_the_losses_of_rows_are_those_of_batches_of_one(kind, rows):
    """In one pass or some rows at a time; a row without a scored token is left out."""
    batch = next(iter(Synthetic(vocab_size=96, max_length=12, rows=14, heldout=2, batch_size=6).train_dataloader()))
    updates: list[UpdateStrategy] = [HELENE(micro_batch=rows)]
    if kind == "classes":
        task, scored = Classifier(tiny_encoder(), labels=["a", "b", "c"], updates=updates), range(6)
        batch = {**{k: v for k, v in batch.items() if k != "scored"}, "labels": torch.arange(6) % 3}
    else:
        task, scored = CausalLM(tiny_llm("gpt2" if kind == "gpt2" else "llama"), updates=updates), (0, 1, 2, 4, 5)
        task._head_is_plain = False if kind == "logits held whole" else None
        batch["labels"][0, :9], batch["labels"][3] = -100, -100
        batch.pop("scored", None)
    task.build().eval()
    loss = WindowLoss(task, [batch])
    with torch.no_grad():
        mean, found = loss.of_rows()
        accuracy = loss.accuracy
        torch.testing.assert_close(mean, loss())
        assert accuracy == loss.accuracy
        ones = [{key: value[n : n + 1] for key, value in batch.items()} for n in scored]
        torch.testing.assert_close(found, torch.stack([WindowLoss(task, [one])() for one in ones]))


def test_a_loss_of_no_rows_is_refused():
    model, updates = Toy(), Updates([HELENE()])
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    with pytest.raises(BadInput, match=r"^HELENE: the curvature is estimated from the losses of single examples, but"):
        updates.step(1, optimizer, lambda: Loss(model, 1)())


# ---- what is kept


@pytest.mark.parametrize(("h", "each"), [("scalar", 4), ("layer", 4), ("tensor", 8)])
def test_the_state_is_four_bytes_a_weight_and_four_more_for_a_tensor(h, each):
    model, optimizer = trained(HELENE(h=h), model=Toy().bfloat16(), steps=2)
    weights = sum(p.numel() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad is None for p in model.parameters())
    assert sum(t.nbytes for state in optimizer.state.values() for t in state.values()) == each * weights


def test_a_step_takes_mezos_memory_and_the_state(tmp_path):
    tiny_llm().save_pretrained(tmp_path / "base")
    weights = 4 * sum(p.numel() for p in tiny_llm().parameters())

    def peak(*updates: UpdateStrategy) -> int:
        return forecast("one", CausalLM(str(tmp_path / "base"), list(updates)), Setting("cpu", 2, 64)).allocated

    mezo = peak(MeZO())
    assert peak(HELENE(h="tensor")) - mezo == pytest.approx(2 * weights, abs=1000)


def test_an_adapters_state_is_the_adapters():
    peft = PEFT(LoraConfig(r=4, target_modules="all-linear"))
    model, optimizer = trained(peft, HELENE(epsilon=1e-2), model=tiny_llm(), steps=3)
    adapter, base = dict(trainable(model)), dict(tiny_llm().named_parameters())
    assert sum(t.numel() for state in optimizer.state.values() for t in state.values()) == sum(
        p.numel() for p in adapter.values()
    )
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name not in adapter}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(p, base[name]) for name, p in frozen.items())


@pytest.mark.parametrize(
    "options", [{"h": "tensor", "floors": "quantile", "direction": "gaussian"}, {"h": "layer", "floors": "theory"}]
)
def test_contract(options):
    contract(lambda: [HELENE(refresh_every=2, **options)], steps=3)


def test_a_step_without_a_loss_is_skipped_and_too_many_end_the_run():
    helene = HELENE(max_skipped=2, h="tensor", refresh_every=1, weight_decay=0.1)
    model, updates = Toy(), Updates([helene])
    updates.attach(model)
    optimizer = updates.optimizer(LR)

    class Bad(Loss):
        def of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
            loss, rows = super().of_rows()
            return loss, rows * math.nan  # the estimate alone is none

    updates.step(1, optimizer, Loss(model, 1))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"], helene.state_dict()["curvature"]])
    for step in (2, 3):
        updates.step(step, optimizer, Bad(model, step))
    after = [model.state_dict(), optimizer.state_dict()["state"], helene.state_dict()["curvature"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert helene.describe()["skipped_steps"] == helene.logged()["helene_skipped"] == 2
    with pytest.raises(BadInput, match=r"^HELENE: the losses of 3 steps in a row are not finite"):
        updates.step(4, optimizer, Bad(model, 4))


# ---- ranks

WAYS = {
    "layers": {"h": "layer", "floors": "theory"},
    "quantiles": {"h": "tensor", "floors": "quantile", "direction": "gaussian"},
    "replicas": {"h": "tensor", "gnb": "batch"},
}


LOGGED = 2
"""Steps of the logs that a fit goes on from; the third is taken on what they made."""


def settings(name: str) -> dict[str, Any]:
    return {"epsilon": 1e-2, "refresh_every": 2, **WAYS[name]}


def trained_on(folder: Path, name: str, ranks: int, log: SeedLog | None = None, **options: Any) -> L.Trainer:
    made = module("helene", folder / "base", lr=1e-3)
    made.updates._strategies[0] = HELENE(**settings(name))
    made.take_earlier_steps = None if log is None else partial(go_on_from, log)
    way = {"strategy": "ddp"} if ranks > 1 and name == "replicas" else {}
    return fit_on(made, ranks > 1, unlike=True, **way, **options)


def sent(folder: Path, name: str) -> list[list[int]]:
    """Train on two ranks; return how many numbers each all-reduce of a step has."""
    callback = Sent()
    trained_on(folder, name, 2, callbacks=[callback]).save_checkpoint(folder / f"{name}.ckpt")
    return [sorted(numbers) for numbers in callback.sent]


class Taken(L.Callback):
    """Save what a fit has after the logged steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == LOGGED:
            trainer.save_checkpoint(self.path)


def went_on(folder: Path, name: str) -> int:
    log = SeedLog.load(folder / f"{name}.safetensors")
    trainer = trained_on(folder, name, 2, log, callbacks=[Taken(folder / f"{name} taken.ckpt")])
    trainer.save_checkpoint(folder / f"{name} on.ckpt")
    return trainer.global_step


def two_ranks(folder: Path, rank: int) -> None:
    for name in WAYS:
        attempt(folder, rank, name, lambda name=name: sent(folder, name))
        attempt(folder, rank, f"{name} on", lambda name=name: went_on(folder, name))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A folder with what one process and two trained, and what two made of the one's log."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_llm().save_pretrained(folder / "base")
    for name in WAYS:
        trainer = trained_on(folder, name, 1, callbacks=[Taken(folder / f"{name} first.ckpt")])
        trainer.save_checkpoint(folder / f"{name} one.ckpt")
        made: Any = trainer.lightning_module
        update, log = {"class_path": "HELENE", "init_args": settings(name)}, made.updates[0].tape.log[:LOGGED]
        SeedLog("base", made.base_fingerprint, "float32", [update], log).save(folder / f"{name}.safetensors")
    run_pair(two_ranks, folder)
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_train_what_one_does_and_exchange_numbers(name, pair):
    """On shards, and on replicas; the loss of a rank's rows is rounded before it is divided by 2 epsilon."""
    exchanged = [result(pair, name, rank) for rank in range(2)]
    got, wanted = (read_checkpoint(pair / file) for file in (f"{name}.ckpt", f"{name} one.ckpt"))
    torch.testing.assert_close(got["state_dict"], wanted["state_dict"], rtol=0, atol=2e-6)
    ours, theirs = moments(got), moments(wanted)
    assert ours.keys() == theirs.keys()
    for parameter, state in theirs.items():
        torch.testing.assert_close(ours[parameter], state, rtol=1e-3, atol=2e-4)
    layers = 5
    probes = 1 + layers * (name == "layers")
    refresh = [1, *[2] * probes, *[3] * 2 * probes, *[layers] * 16 * (name == "quantiles")]  # 1: of the log
    assert exchanged == [[refresh, [1, 3, 3], refresh]] * 2


@pytest.mark.parametrize("name", WAYS)
def test_a_log_makes_the_same_weights_on_two_ranks_which_go_on_from_there(name, pair):
    """To the bit with signs; Gaussian noise of a shard is computed at other places of a vector."""
    assert [result(pair, f"{name} on", rank) for rank in range(2)] == [3, 3]
    taken, first, on, straight = (
        read_checkpoint(pair / f"{name} {file}.ckpt") for file in ("taken", "first", "on", "one")
    )
    atol = 1e-7 if name == "quantiles" else 0
    torch.testing.assert_close(taken["state_dict"], first["state_dict"], rtol=0, atol=atol)
    for parameter, state in moments(first).items():
        torch.testing.assert_close(moments(taken)[parameter], state, rtol=0, atol=atol * 100)
    torch.testing.assert_close(on["state_dict"], straight["state_dict"], rtol=0, atol=2e-6)
    moved = {key: (value - first["state_dict"][key]).abs().max() for key, value in on["state_dict"].items()}
    assert min(moved.values()) > 1e-4, "the third step was not taken"


# ---- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": 0}, "epsilon is 0; it must be above 0."),
        ({"gamma": -1.0}, "gamma is -1.0; it must be above 0."),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be from 0 to below 1."),
        ({"beta2": -0.1}, "beta2 is -0.1; it must be from 0 to below 1."),
        ({"refresh_every": 0}, "refresh_every is 0; it must be at least 1."),
        ({"anneal_steps": 0}, "anneal_steps is 0; it must be at least 1."),
        ({"eps": -1e-8}, "eps is -1e-08; it must be at least 0."),
        ({"floor": 0}, "floor is 0, with floors const; it must be above 0."),
        ({"h": "tensor", "floors": "quantile", "floor": 1}, "it must be between 0 and 1, which quantile."),
        ({"floors": "quantile"}, "floors is quantile, with h scalar, but one number has no quantiles; set h to tensor"),
    ],
)
def test_settings_that_are_none_are_refused(options, sentence):
    with pytest.raises(BadInput, match=r"^HELENE: ") as refusal:
        HELENE(**options)
    assert sentence in str(refusal.value)


def test_another_kind_of_curvature_than_the_checkpoints_is_refused():
    written = Updates([HELENE(h="layer")])
    for changed, sentence in (
        (HELENE(h="tensor"), "h is tensor, but the checkpoint was written with layer, whose curvature is kept in"),
        (HELENE(h="layer", floors="theory"), "floors is theory, but the checkpoint was written with const"),
    ):
        with pytest.raises(BadInput, match=f"HELENE: {sentence}"):
            Updates([changed]).restore(Toy(), written.state_dict())


def test_layers_that_change_are_refused():
    with pytest.raises(BadInput, match="HELENE follows the weights that train from the start, and LISA trains others"):
        Updates([LISA(), HELENE()])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trainer.gradient_clip_val=1"], "so trainer.gradient_clip_val has no effect; remove"),
        (["--model.updates.floors=quantile"], "HELENE: floors is quantile, with h scalar, but one number has no"),
    ],
)
def test_settings_are_refused_and_leave_nothing(home, capsys, monkeypatch, words, sentence):
    data = ["--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "4"]
    call = ["fit", "--config", "helene.yaml", "--model.base", "tiny", *data, "--trainer.accelerator=cpu", *words]
    assert sentence in refused(capsys, monkeypatch, *call)
    assert not list(Path("runs").glob("*"))


# ---- whole runs


def test_a_stopped_run_goes_on_exactly_and_its_record_says_what_it_cost(home):
    """With the command line's defaults; the curvature is refreshed before the stop and after it."""
    words = ("--model.updates.h=tensor", "--model.updates.floors=quantile", "--model.updates.refresh_every=2")
    straight = fit("helene", "straight", 0, *words)
    begun = fit("helene", "cut", 3, *words, "--checkpoint_steps=3")
    assert begun + fit("helene", "cut", 0, *words, "--ckpt_path=last") == straight
    for name, value in saved("straight-1").items():
        assert torch.equal(saved("cut-1")[name], value), name
    columns = Path("runs/straight-1/metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"helene_slope", "helene_curvature", "helene_skipped", "train_loss"} <= set(columns)
    record = json.loads(Path("runs/straight-1/record.json").read_text())
    assert record["updates"][0]["chosen"]["forwards_per_step"] == 2
    assert record["updates"][0]["chosen"]["gamma"] > 0
    assert record["ledger"]["gradients"] == 0
    assert record["ledger"]["optimizer"] == 2 * record["ledger"]["trainable"]
