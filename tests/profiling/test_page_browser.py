"""The page in a headless Chromium without a network: nothing goes wrong, everything is drawn, and the controls work."""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_sparse_profiling.figures import ACROSS
from lit_sparse_profiling.figures_of_one import OF_ONE
from lit_sparse_profiling.page import render, write_page
from lit_sparse_profiling.run_folders import read_runs
from tests.profiling.page_records import METHODS, gpu_record, hostile_record, oom_record, write_runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CARDS = {8: 8188, 12: 12282, 16: 15360, 24: 23028, 40: 40448, 48: 46068, 80: 81251, 141: 143771}
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SLOW = 60_000
"""Milliseconds to wait for a page on a busy machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of seven runs of one model, one of them out of memory, and of one run of another."""
    folder = tmp_path_factory.mktemp("page")
    small = replace(gpu_record("smt", 3, 0.5, "b/small"), settings={})
    records = [*map(gpu_record, METHODS), gpu_record("lora", 2, 1.03), oom_record(), small]
    write_page(read_runs([write_runs(folder / "runs", *records)]), folder / "page.html", CARDS)
    return folder / "page.html"


def opened(browser: Any, file: Path, size: dict[str, int] = DESK, scheme: str = "light") -> tuple[Any, list[str]]:
    """Open the page without a network; return it, drawn, and the list of what its console says."""
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(SLOW)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("requestfailed", lambda request: told.append(request.url))
    page.goto(file.as_uri())
    drawn(page)
    return page, told


def drawn(page: Any) -> None:
    """Wait until every figure is drawn."""
    page.wait_for_selector("body[data-ready]")


def until(page: Any, condition: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way evaluates text, which the page forbids."""
    for _ in range(SLOW // 100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {condition}")


@pytest.fixture(scope="module")
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page on a desk, whose console says nothing whatever the tests do with it."""
    page, told = opened(browser, file)
    yield page
    assert told == []
    page.context.close()


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), (DESK, "light")], ids=["phone", "desk"])
def test_every_figure_is_drawn_and_fits_the_width_without_a_word_in_the_console(browser, file, size, scheme) -> None:
    page, told = opened(browser, file, size, scheme)
    for run in ("smt-1", "lisa-1"):
        page.select_option("#run", label=run)
        drawn(page)
        titles = page.locator("figure h3").all_inner_texts()
        wanted = {title for title, *_ in ACROSS} | {"Kernels of a step"}
        assert wanted <= set(titles) <= {title for title, *_ in [*ACROSS, *OF_ONE]}
        assert page.locator("figure .plot .main-svg").count() >= len(titles)
        assert page.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.xtitle'))")
        wrong = page.evaluate(
            "[...document.querySelectorAll('.plot')].flatMap(p => Plotly.validate(p.data, p.layout) || [])"
            ".filter(problem => problem.code !== 'dynamic')"  # of which plotly.js 3.0 tells where nothing is wrong
            ".map(problem => `${problem.path}: ${problem.msg}`)"
        )
        assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert page.evaluate(
        "[...document.querySelectorAll('svg text')].every(t => parseFloat(getComputedStyle(t).fontSize) >= 11)"
    )
    assert told == []
    page.context.close()


def test_the_scheme_changes_with_the_reader_s_and_by_the_button(page) -> None:
    colour = "getComputedStyle(document.querySelector('#figure-memory .xtitle')).fill"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    until(page, f"{colour} !== '{light}'")
    page.click("#scheme")
    until(page, f"{colour} === '{light}'")


def test_hover_legend_sort_filter_and_downloads_work(page, tmp_path) -> None:
    page.locator("#figure-memory").scroll_into_view_if_needed()
    page.locator("#figure-memory .barlayer .point path").first.hover(force=True)
    page.wait_for_selector("#figure-memory .hoverlayer text")
    assert "GiB" in page.locator("#figure-memory .hoverlayer").text_content()
    bars = page.locator("#figure-memory .barlayer .trace").count()
    page.click("#figure-memory .legend button >> nth=0")
    until(page, f"document.querySelectorAll('#figure-memory .barlayer .trace').length === {bars - 1}")

    page.click("#table th[data-key=tokens_per_second] button")
    page.click("#table th[data-key=tokens_per_second] button")
    assert page.locator("#table th[data-key=tokens_per_second]").get_attribute("aria-sort") == "descending"
    names = page.locator("#table tbody tr td:first-child").all_inner_texts()
    assert names[:2] + names[-1:] == [
        "smt-3",
        "smt-1",
        "galore-1",
    ]  # 5,200 and 2,600 a second; the last was not measured
    page.fill("#filter", "model-8b peak_memory_gib<30")
    assert page.locator("#table tbody tr td:first-child").all_inner_texts() == ["smt-1", "lisa-1"]

    with page.expect_download() as download:
        page.click("#csv")
    download.value.save_as(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["run"] for row in rows] == ["smt-1", "lisa-1"]
    assert float(rows[0]["tokens_per_second"]) == pytest.approx(2600, rel=1e-3)
    with page.expect_download() as download:
        page.click("#json")
    download.value.save_as(tmp_path / "runs.json")
    assert json.loads((tmp_path / "runs.json").read_text())[1]["command"].endswith("--model.base a/model-8b")


def test_the_choice_answers_from_the_records(page) -> None:
    answer = page.locator("#answer")
    assert page.locator("#card option:checked").inner_text() == "NVIDIA H100 80GB HBM3: 79.6 GiB"
    assert "Take full-1: 1.020 nats/token" in answer.inner_text()  # the lowest loss, and it fits
    page.select_option("#card", label="40 GB")
    assert "Take smt-1: 1.060 nats/token" in answer.inner_text()
    assert "lisa-1 is within 1.9 % of it: that is a tie" in answer.inner_text()
    assert "more than the card has: 1" in answer.inner_text()
    page.select_option("#goal", label="least forgetting")
    assert "Take ia3-1: 0.010 nats/token" in answer.inner_text()
    page.select_option("#card", label="8 GB")
    assert "No run of this model answers that: did not end well: 1, more than the card has: 5." in answer.inner_text()
    assert "smt-1 takes least: 27.88 GiB." in answer.inner_text()


def test_a_loss_of_held_out_rows_goes_before_that_of_training(page) -> None:
    def chosen(rows: str) -> str:
        page.evaluate(
            f"const before = data.rows; data.rows = structuredClone(before); {rows}; choose(); data.rows = before"
        )
        return page.locator("#answer").inner_text()

    page.select_option("#card", label="NVIDIA H100 80GB HBM3: 79.6 GiB")
    page.select_option("#goal", label="lowest loss")
    told = chosen("for (const row of data.rows) if (row.label !== 'smt-1') row.loss = 'train_loss'")
    assert "Take smt-1" in told
    assert "another loss than heldout_loss: " in told
    assert "No rows were held out" not in told
    told = chosen("for (const row of data.rows) row.loss = 'train_loss'")
    assert "Take full-1" in told
    assert "No rows were held out: the loss is that of the last training batches" in told


def test_two_are_compared_with_a_verdict(page) -> None:
    verdict = page.locator("#verdict")
    page.select_option("#a", label="full-1 (a/model-8b)")
    page.select_option("#b", label="smt-1 (a/model-8b)")
    assert "Against full-1, smt-1 is better in peak memory (-63" in verdict.inner_text()
    assert "worse in loss after (+3.9 %)" in verdict.inner_text()
    assert "no spread is known, so that 2 % (of forgetting, 0.01 nats) counts as equal" in verdict.inner_text()
    cells = "row => [row.cells[0].textContent, row.cells[4].textContent]"
    better = dict(page.evaluate(f"[...document.querySelectorAll('#differences tbody tr')].map({cells})"))
    assert (better["tokens/s"], better["loss after, nats/token"], better["accuracy after, %"]) == ("B", "A", "equal")
    page.select_option("#b", label="galore-1 (a/model-8b)")
    assert "galore-1 ended as oom: there is no verdict." in verdict.inner_text()
    page.select_option("#b", label="smt-3 (b/small)")
    assert "They train different models" in verdict.inner_text()


def test_hostile_texts_run_nothing(browser, tmp_path) -> None:
    hostile, file = hostile_record(), tmp_path / "page.html"
    records = [hostile, gpu_record("smt"), replace(gpu_record("full"), model=replace(hostile.model, base=hostile.name))]
    write_page(read_runs([write_runs(tmp_path / "runs", *records)]), file, CARDS)
    page, told = opened(browser, file)
    for select in ("#model", "#run"):
        for index in range(page.locator(f"{select} option").count()):
            page.select_option(select, index=index)
            drawn(page)
    page.select_option("#b", index=0)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert told == []
    page.context.close()


def test_five_hundred_records_are_drawn(browser, tmp_path) -> None:
    """`python -m benchmarks.page` times it; here, that nothing breaks, and that the table begins with few lines."""
    records = [replace(gpu_record(method, n, 1 + n / 500), settings={"n": n}) for n in range(100) for method in METHODS]
    read = [(Path("runs", record.name, "record.json"), record) for record in records]
    (tmp_path / "page.html").write_text(render(read, CARDS))
    page, told = opened(browser, tmp_path / "page.html")
    lines, frame = "document.querySelectorAll('#table tbody tr').length", "document.querySelector('#table .scroll')"
    assert page.evaluate(lines) == 100
    for more in (200, 300, 400, 500):
        page.evaluate(f"{frame}.scrollTop = {frame}.scrollHeight")
        until(page, f"{lines} === {more}")
    page.click("#table th[data-key=run] button")
    first = page.locator("#table tbody tr td:first-child").all_inner_texts()
    assert (len(first), first[0], first[99]) == (100, "full-0", "full-99")  # in order of all 500
    assert page.locator("#count").inner_text() == "500 of 500 runs"
    assert page.locator("#figure-memory .ytick").count() == 80
    assert "The 80 of 500 that take least" in page.locator("#figure-memory figcaption").inner_text()
    assert told == []
    page.context.close()
