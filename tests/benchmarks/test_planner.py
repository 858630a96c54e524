"""The planner against real trainings, whose memory is added up from the allocator's events."""

from pathlib import Path

import pytest

from benchmarks.planner import error, line_of, predicted
from benchmarks.planner_cases import Case, config_in
from benchmarks.planner_measured import measured, measured_by_pair

PAIRS = [
    Case("full", "gpt2", 2, 48, True, "fsdp2"),
    Case("smt", "llama", 2, 48, False, "fsdp2"),
    Case("full", "llama", 2, 48, False, "ddp"),
    Case("lisa", "llama", 2, 48, False, "ddp"),
]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of GPT-2's layers, in a fit alike
def test_two_ranks_allocate_what_is_planned_of_one(tmp_path: Path) -> None:
    configs = {family: config_in(tmp_path, family) for family in ("gpt2", "llama")}
    for case, real in zip(PAIRS, measured_by_pair(PAIRS, configs), strict=True):
        assert not isinstance(real, str), real
        line = line_of(case, predicted(case, configs[case.family]), real)
        assert error(line) == pytest.approx(0, abs=0.01), (case, line)


@pytest.mark.parametrize(
    "case",
    [Case("gmt", "opt", 1, 100, False), Case("smt", "phi", 5, 33, False), Case("sparse_entries", "opt", 1, 200, True)],
    ids=lambda case: case.method,
)
def test_thresholds_and_a_selection_take_what_is_planned(case: Case, tmp_path: Path) -> None:
    """GMT counts many zeros in the gradients of ReLUs; SMT's batches are read before the first is scored."""
    config = config_in(tmp_path, case.family)
    line = line_of(case, predicted(case, config), measured(case, config))
    assert error(line) == pytest.approx(0, abs=0.002)
