"""The trace of a run is a file of its own in the run's folder, and nowhere else."""

from pathlib import Path

import pytest

from lit_sparse.callbacks.profile import Profile
from lit_sparse.errors import BadInput
from lit_sparse_profiling.step_plan import Plan


@pytest.mark.parametrize("name", [None, "trace.json", "trace.json.gz", "my trace.json"])
def test_a_file_name_is_taken(tmp_path: Path, name: str | None) -> None:
    assert Profile(tmp_path, Plan(trace=name)).plan.trace == name


@pytest.mark.parametrize(
    "name", ["/elsewhere/rows.json", "../rows.json", "a/rows.json", "..", ".", "", "rows", "config.yaml", "record.json"]
)
def test_a_path_and_a_file_that_a_run_has_are_refused_before_anything_is_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        BadInput, match=r"^profile\.trace is .* run's folder; give a file name without folders that ends"
    ):
        Profile(tmp_path / "run-1", Plan(trace=name))
    assert list(tmp_path.iterdir()) == []
