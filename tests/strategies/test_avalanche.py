"""RecordImportance against an independent Synaptic Intelligence, that of avalanche-lib, where it is installed."""

import pytest
import torch

from lit_sparse.importance.recorded import path_importance
from lit_sparse.optim import AdamW, parameter_groups, trainable
from lit_sparse.strategies import RecordImportance
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import tiny_llm
from tests.strategies.test_smt import loss_of

pytest.importorskip("avalanche", reason="avalanche-lib (0.6.0) is not installed; pip install it to compare with it")


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of its np.square of a tensor
def test_the_path_integral_and_its_importance_are_avalanches():
    from avalanche.training.plugins import SynapticIntelligencePlugin as Theirs  # pyright: ignore

    model, recorder, damping = tiny_llm().train(), RecordImportance(), 1e-7
    recorder.attach(model, no_probe, ALONE)
    kept = ({}, {}), {key: {} for key in ("old_theta", "new_theta", "grad", "trajectory", "cum_trajectory")}
    Theirs.create_syn_data(model, *kept, set())
    Theirs.init_batch(model, *kept, set())
    optimizer = AdamW(parameter_groups(trainable(model)), lr=1e-2)
    for step in range(1, 6):
        Theirs.pre_update(model, kept[1], set())
        for parameter in model.parameters():  # on a CPU theirs keeps the very memory that a step then changes
            parameter.data = parameter.data.clone()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        recorder.before_step(step, optimizer)
        optimizer.step()
        recorder.after_step(step, optimizer)
        Theirs.post_update(model, kept[1], set())
    trajectory = {name: one.data.clone() for name, one in kept[1]["trajectory"].items()}
    Theirs.update_ewc_data(model, *kept, clip_to=float("inf"), excluded_parameters=set(), c=1, eps=damping)
    recorded = recorder.state_dict()["importance"]["matrices"]
    assert recorded.keys() == trajectory.keys()
    for name, one in recorded.items():
        assert one["sums"].abs().max() > 0
        torch.testing.assert_close(one["sums"].flatten(), -trajectory[name], rtol=1e-6, atol=0)
        moved = model.get_parameter(name).detach() - one["start"][name]
        ours = path_importance(one["sums"], moved, damping, relative=False, clamp=False)
        torch.testing.assert_close(ours.flatten(), kept[0][1][name].data, rtol=1e-6, atol=0)
