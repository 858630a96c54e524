"""The generated tables of the README show the newest measurements, and `--check` sees differences."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme

SOURCE = {
    "bench": "peers",
    "commit": "abc123",
    "date": "2026-11-20",
    "device": "a CPU",
    "versions": {"torch": "2.13.0"},
}


def mode(name: str, **changes: Any) -> dict[str, Any]:
    figures = {"trainable": 1234567, "trainable_share": 0.0123, "peak_rss": 3 * 2**29, "saved_bytes": 5 * 2**20}
    return {**SOURCE, "mode": name, **figures, "selection_peak_rss": 2**30, "step_seconds_median": 1.0, **changes}


def pair(name: str, **changes: Any) -> dict[str, Any]:
    ratios = {"ratio_median": 1.25, "ratio_low": 1.2, "ratio_high": 1.304, "rounds": 9}
    return {**SOURCE, "pair": [name, "floor"], **ratios, **changes}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Title\n\n<!-- begin:peers -->\nold\n<!-- end:peers -->\n\nThe end.\n")
    measure(tmp_path, mode("floor", trainable=0, trainable_share=0.0), mode("smt"), pair("smt"))
    return tmp_path


def measure(checkout: Path, *lines: dict[str, Any]) -> None:
    with (checkout / "benchmarks" / "results" / "peers.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def written(checkout: Path) -> str:
    assert readme.main([], checkout) == 0
    return (checkout / "README.md").read_text()


def test_the_block_is_rewritten_and_the_rest_stays(checkout: Path) -> None:
    assert written(checkout) == (
        "# Title\n\n<!-- begin:peers -->\n"
        "Measured by `python -m benchmarks.peers` on a CPU, torch 2.13.0, 2026-11-20, commit abc123; "
        "table by `python benchmarks/readme.py`.\n\n"
        "| mode | trainable | step time / frozen floor [95 %] | peak resident, GiB | while choosing | "
        "saved for backward, MiB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| floor | 0 (0.00%) | 1 | 1.50 | - | 5.0 |\n"
        "| smt | 1,234,567 (1.23%) | 1.250 [1.200, 1.304] | 1.50 | 1.00 | 5.0 |\n"
        "<!-- end:peers -->\n\nThe end.\n"
    )


def test_writing_twice_changes_nothing_and_check_agrees(checkout: Path) -> None:
    assert written(checkout) == written(checkout)
    assert readme.main(["--check"], checkout) == 0


def test_check_writes_nothing_and_says_what_to_do(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (checkout / "README.md").read_text()
    assert readme.main(["--check"], checkout) == 1
    assert "Not what benchmarks/results say: README.md" in (message := capsys.readouterr().err)
    assert "run `python benchmarks/readme.py`" in message
    assert (checkout / "README.md").read_text() == before


def test_only_the_newest_line_of_each_counts(checkout: Path) -> None:
    measure(checkout, mode("smt", date="2026-11-21", peak_rss=2**31, commit="def456"))
    measure(checkout, mode("smt", date="2026-11-19", peak_rss=2**32), pair("smt", ratio_median=9.0, date="2026-11-19"))
    measure(checkout, pair("smt", ratio_median=1.22))  # of the same day, but written later
    text = written(checkout)
    assert "| smt | 1,234,567 (1.23%) | 1.220 [1.200, 1.304] | 2.00 | 1.00 | 5.0 |" in text
    assert text.count("| smt |") == 1
    assert "2026-11-20 and 2026-11-21, commit abc123, def456;" in text


def test_devices_do_not_mix(checkout: Path) -> None:
    measure(checkout, mode("smt", device="a GPU", peak_rss=2**31, date="2026-11-22"))
    cpu, gpu = written(checkout).split("on a GPU")
    assert "1.250 [1.200, 1.304] | 1.50 |" in cpu
    assert "| smt | 1,234,567 (1.23%) | not timed | 2.00 |" in gpu


def rewrite_readme(checkout: Path, text: str) -> None:
    (checkout / "README.md").write_text(text)


def corrupt(checkout: Path, text: str) -> None:
    (checkout / "benchmarks" / "results" / "peers.jsonl").write_text(text)


@pytest.mark.parametrize("arguments", [[], ["--check"]])
@pytest.mark.parametrize(
    ("damage", "text", "finding"),
    [
        (rewrite_readme, "<!-- begin:peers -->\n", "a begin or end mark without its counterpart"),
        (rewrite_readme, "<!-- begin:peers -->\n<!-- end:peer -->\n", "a begin or end mark without its counterpart"),
        (
            rewrite_readme,
            "<!-- begin:pears -->\n<!-- end:pears -->\n",
            "a block 'pears'; known are peers, gpu, kernels, roofline",
        ),
        (corrupt, "", "has no measurements; run `python -m benchmarks.peers` first"),
        (corrupt, '{"mode": ', "peers.jsonl:1 is no JSON"),
        (corrupt, f'{json.dumps(mode("a"))}\n\n{{"mode": "b"}}\n', "peers.jsonl:3 is no measurement"),
        (corrupt, "[]", "peers.jsonl:1 is no measurement"),
    ],
)
def test_what_cannot_be_made_is_named(
    checkout: Path, capsys: pytest.CaptureFixture[str], damage: Any, text: str, finding: str, arguments: list[str]
) -> None:
    damage(checkout, text)
    before = (checkout / "README.md").read_text()
    assert readme.main(arguments, checkout) == 1
    assert finding in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == before


def test_the_profiler_s_overhead_is_a_sentence(checkout: Path) -> None:
    line = {**SOURCE, "ratio_median": 1.0006, "ratio_low": 0.9936, "ratio_high": 1.0072, "rounds": 200}
    fits = {**line, "ratio_median": 1.0831, "rounds": 12, "fits": 12}
    (checkout / "benchmarks" / "results" / "overhead.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(fits)}\n")
    rewrite_readme(checkout, "<!-- begin:overhead -->\n<!-- end:overhead -->\n")
    assert "Whole fits of 60 short steps take 1.083 [0.994, 1.007] times as long as with" in written(checkout)
    assert "Steps with the profiler take 1.001 [0.994, 1.007] times as long" in written(checkout)
    assert "Measured by `python -m benchmarks.overhead` on a CPU" in written(checkout)


def test_every_table_has_a_name_that_a_mark_may_have() -> None:
    for name in readme.BLOCKS:
        assert readme.MARKED.search(f"<!-- begin:{name} -->\nold\n<!-- end:{name} -->\n"), name


def test_pages_of_docs_are_written_and_checked(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(checkout)
    page = checkout / "docs" / "studies" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text("<!-- begin:peers -->\n<!-- end:peers -->\n")
    assert readme.main(["--check"], checkout) == 1
    assert "docs/studies/page.md; run" in capsys.readouterr().err
    written(checkout)
    assert "frozen floor" in page.read_text()
    page.write_text("<!-- begin:pears -->\n<!-- end:pears -->\n")
    assert readme.main(["--check"], checkout) == 1
    assert "docs/studies/page.md has a block 'pears'" in capsys.readouterr().err


def test_a_readme_without_blocks_is_up_to_date(checkout: Path) -> None:
    rewrite_readme(checkout, "# Title\n")
    assert readme.main(["--check"], checkout) == 0


def test_it_runs_as_a_script() -> None:
    script = Path(readme.__file__)
    run = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--check" in run.stdout
