"""The planner against real trainings, whose memory is added up from the allocator's events."""

from pathlib import Path

import pytest

from benchmarks.planner import Case, config_in, error, line_of, measured_by_pair, predicted

PAIRS = [
    Case("full", "gpt2", 2, 48, True, "fsdp2"),
    Case("smt", "llama", 2, 48, False, "fsdp2"),
    Case("full", "llama", 2, 48, False, "ddp"),
    Case("lisa", "llama", 2, 48, False, "ddp"),
]


def test_two_ranks_allocate_what_is_planned_of_one(tmp_path: Path) -> None:
    configs = {family: config_in(tmp_path, family) for family in ("gpt2", "llama")}
    for case, real in zip(PAIRS, measured_by_pair(PAIRS, configs), strict=True):
        assert not isinstance(real, str), real
        line = line_of(case, predicted(case, configs[case.family]), real)
        assert error(line) == pytest.approx(0, abs=0.01), (case, line)
