"""The density of activations on held-out data agrees with brute force, and is in a fit's record."""

import pytest
import torch

from lit_sparse.anatomy import mlps
from lit_sparse.callbacks.density import DensityMetric, DensityMonitor, tolerable_tau
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import ActivationDensity
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.methods import data, trainer


def test_density_is_the_brute_force_count():
    h = torch.randn(11, 40, generator=torch.Generator().manual_seed(0))
    h[h.abs() < 0.5] = 0
    h[:4, 16:32] = 0  # the second group of 16 and, with what follows, the first of 32 partly
    h[2] = 0
    metric = DensityMetric([1.0])
    metric.update(h[:5])
    metric.update(h[5:])
    got = metric.compute()
    for tau, name in ((0.0, ""), (1.0, "_above_1")):
        assert got[f"density{name}"] == pytest.approx(sum(abs(x) > tau for row in h.tolist() for x in row) / 440)
        for size, count in ((16, 3), (32, 2)):
            some = [any(abs(x) > tau for x in row[s : s + size]) for row in h.tolist() for s in range(0, 40, size)]
            assert got[f"density_groups_{size}{name}"] == pytest.approx(sum(some) / (11 * count))


def test_the_tolerable_threshold_is_the_largest():
    torch.manual_seed(0)
    down, h = torch.nn.Linear(64, 16), torch.randn(20, 64) ** 3
    with torch.no_grad():
        tau = tolerable_tau(down, h, 0.01)
        whole = h @ down.weight.t()

        def error(threshold):
            return float((torch.where(h.abs() > threshold, h, 0) @ down.weight.t() - whole).norm() / whole.norm())

        assert error(tau) <= 0.01 < error(tau * 1.05)
        assert 0.2 < float((h.abs() > tau).double().mean()) < 0.95
        h[h.abs() < 1] = 0
        assert tolerable_tau(down, h, 1e-6) < float(h[h != 0].abs().min())


def monitored(updates=(), **options):
    module = CausalLM(base=tiny_llm("llama"), updates=list(updates), lr=1e-2)
    return module, DensityMonitor(**options)


def test_a_diverged_activation_is_no_zero():
    metric = DensityMetric([0.1])
    metric.update(torch.tensor([[float("nan"), 0.0, 0.05, 1.0]]))
    assert (metric.compute()["density"], metric.compute()["density_above_0.1"]) == (0.75, 0.5)


def test_the_threshold_is_searched_on_some_tokens_of_each_batch():
    monitor = DensityMonitor()
    metric, down, searched = DensityMetric(), torch.nn.Linear(4, 2), list[torch.Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lit_sparse.callbacks.density.tolerable_tau", lambda _, h, __: searched.append(h) or float(len(searched))
        )
        for tokens in (64, 65, 200):
            batch = {"input_ids": torch.ones(1, tokens)}
            monitor.on_validation_batch_start(None, None, batch, 0)
            monitor._see(down, torch.full((1, tokens, 4), 1.5), metric)
    assert [len(h) for h in searched] == [64, 33, 50]
    assert [(tau, float(share)) for tau, share in monitor._within] == [(1.0, 1.0), (2.0, 0.0), (3.0, 0.0)]


def test_validation_logs_what_hooks_see():
    module, monitor = monitored(taus=[0.01])
    model, seen = module.build(), []
    for mlp in mlps(model):
        model.get_submodule(mlp.down).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hooks = [dict(child._forward_pre_hooks) for child in model.modules()]
    with pytest.MonkeyPatch.context() as patch:  # the search of a threshold calls the projections too
        patch.setattr("lit_sparse.callbacks.density.tolerable_tau", lambda *_: 0.02)
        scores = trainer(1, callbacks=[monitor]).validate(module, datamodule=data(), verbose=False)[0]
    assert scores["density"] == pytest.approx(
        float(torch.stack([h != 0 for h in seen if h.shape[1] == 12]).double().mean())
    )
    above = torch.stack([h.abs() for h in seen if h.shape[1] == 12])
    assert scores["density_above_0.01"] == pytest.approx(float((above > 0.01).double().mean()))
    assert scores["tau_within_error"] == pytest.approx(0.02)
    assert scores["density_within_error"] == pytest.approx(float((above > 0.02).double().mean()))
    assert [dict(child._forward_pre_hooks) for child in model.modules()] == hooks


def test_padding_does_not_count():
    _, monitor = monitored()
    metric, down = DensityMetric(), torch.nn.Linear(4, 2)
    monitor._metrics = [metric]
    h = torch.ones(2, 3, 4)
    h[0, 1:] = 0
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])}
    monitor.on_validation_batch_start(None, None, batch, 0)
    monitor._see(down, h, metric)
    assert metric.compute()["density"] == 1
    monitor._see(down, h[:1], metric)  # not of this batch
    monitor.on_validation_batch_start(None, None, {"input_ids": torch.ones(2, 3)}, 0)
    monitor._see(down, h, metric)
    assert metric.compute()["density"] == pytest.approx((4 + 4) / (4 + 6))


def test_a_record_has_it_before_and_after(tmp_path):
    run = tmp_path / "run-1"
    run.mkdir()
    module, monitor = monitored([ActivationDensity(weight=3.0, proxy="tanh", beta=20.0)])
    recorder = Recorder(run, Plan(warmup=1, profiled=1))
    fit = trainer(8, callbacks=[recorder, monitor], num_sanity_val_steps=-1, val_check_interval=8)
    fit.fit(module, datamodule=data(rows=20))
    outcome = RunRecord.read(run / "record.json").outcome
    names = {"density", "density_groups_16", "density_above_0.01", "density_within_error", "tau_within_error"}
    assert names <= outcome["before"].keys()
    assert outcome["after"]["density_above_0.01"] < outcome["before"]["density_above_0.01"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"taus": [0.0]}, r"taus are \[0.0\]; they must be above 0"),
        ({"taus": [-1.0]}, r"taus are \[-1.0\]; they must be above 0"),
        ({"error": 0.0}, "error is 0.0; it must be between 0 and 1"),
        ({"error": 1.5}, "error is 1.5; it must be between 0 and 1"),
    ],
)
def test_refuses_in_a_sentence(options, expected):
    with pytest.raises(BadInput, match=expected):
        DensityMonitor(**options)


def test_a_metric_refuses_negative_thresholds():
    with pytest.raises(BadInput, match=r"DensityMetric: taus are \[0.1, -1\]; they must be above 0"):
        DensityMetric([0.1, -1])
