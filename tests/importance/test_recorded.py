"""The formulas of importance agree with closed forms."""

import math

import pytest
import torch

from lit_sparse.importance.recorded import layer_coefficients, layer_of, path_importance
from lit_sparse.strategies import RecordImportance
from lit_sparse.strategies.base import no_probe

CURVATURE = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
GOAL = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
RATE, STEPS = 0.1, 20


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))


def test_gradient_descent_on_a_quadratic_has_its_closed_form():
    """L = 1/2 sum h (w - a)^2: Omega = h / (2 - rate h) * (1 - q^2T) / (1 - q^T)^2, with q = 1 - rate h."""
    model, recorder = Weights(), RecordImportance()
    recorder.attach(model, no_probe)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        (CURVATURE * (model.weight - GOAL).square()).sum().div(2).backward()
        recorder.before_step(step, optimizer)
        optimizer.step()
        recorder.after_step(step, optimizer)
    sums = recorder.state_dict()["importance"]["matrices"]["weight"]["sums"]
    q = 1 - RATE * CURVATURE
    expected = CURVATURE / (2 - RATE * CURVATURE) * (1 - q ** (2 * STEPS)) / (1 - q**STEPS).square()
    got = path_importance(sums, model.weight.detach(), xi=0, relative=False, clamp=True)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)  # sums of 20 terms in fp64


def test_of_the_true_decrease_the_importance_is_half_the_curvature():
    """On a quadratic, the path integral by trapezoids makes the penalty equal to the old loss."""
    decrease = CURVATURE * GOAL.square() / 2
    got = path_importance(decrease, GOAL, xi=0, relative=False, clamp=True)
    torch.testing.assert_close(got, CURVATURE / 2, rtol=1e-15, atol=0)


def test_damping_is_relative_to_the_mean_or_absolute_and_negatives_are_clamped():
    omega, moved = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 3.0]])  # mean of squares: 5
    assert path_importance(omega, moved, 0.2, relative=True, clamp=True).tolist() == [[1.5, 0.0]]
    assert path_importance(omega, moved, 2.0, relative=False, clamp=False)[0].tolist() == pytest.approx([1.0, -1 / 11])
    nothing = path_importance(torch.zeros(2, 2), torch.zeros(2, 2), 0.1, relative=True, clamp=True)
    assert nothing.tolist() == [[0, 0], [0, 0]]
    back = path_importance(torch.ones(2), torch.tensor([0.0, 1.0]), 0.0, relative=True, clamp=True)
    assert back.tolist() == [0, 1]  # the first went away and came back: nothing divides what it did


def test_coefficients_of_layers():
    norms = {"a": 1.0, "b": 3.0}
    paper = layer_coefficients(norms, "softmax", 1.0)
    assert paper == pytest.approx({"a": 1 / (1 + math.e**2), "b": 1 / (1 + math.e**-2)})
    ours = layer_coefficients(norms, "mean_softmax", 1.0)  # softmax of (0.5, 1.5), times 2
    assert ours == pytest.approx({"a": 2 / (1 + math.e), "b": 2 / (1 + 1 / math.e)})
    assert layer_coefficients({"a": 1e3, "b": 3e3}, "mean_softmax", 1.0) == pytest.approx(ours)
    assert layer_coefficients({"a": 1e3, "b": 3e3}, "softmax", 1.0)["b"] == 1, "it saturates: why ours divides"
    even = layer_coefficients(norms, "mean_softmax", 1e6)
    assert even == pytest.approx({"a": 1, "b": 1}, abs=1e-5)
    assert layer_coefficients(norms, "none", 1.0) == {"a": 1, "b": 1}


def test_what_a_layer_is():
    name = "model.layers.11.self_attn.q_proj"
    assert layer_of(name, "matrix") == name
    assert layer_of(name, "decoder_layer") == "model.layers.11"
    assert layer_of("lm_head.weight", "decoder_layer") == "lm_head.weight"
