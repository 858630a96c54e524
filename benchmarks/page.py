"""Time how long the page of many runs takes to write and to open: `python -m benchmarks.page --runs 500`.

It opens in a headless Chromium without a network, and is open when every figure of the first model and run is drawn.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from playwright.sync_api import sync_playwright

from lit_sparse.commands.plan import CARDS
from lit_sparse_profiling.page import write_page
from lit_sparse_profiling.run_folders import read_runs


def main() -> None:
    """Print the seconds of both, and the size of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run's folder, whose record all of them have, under names of their own")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    (file, record), *_ = read_runs([Path(asked.run)])
    if isinstance(record, str):
        parser.error(record)
    runs = [(file, replace(record, name=f"run{n}-1", settings={"n": n})) for n in range(asked.runs)]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        begun = perf_counter()
        write_page(runs, page, CARDS)
        print(f"written in {perf_counter() - begun:.2f} s, {page.stat().st_size / 1e6:.1f} MB")
        for seconds, busy in opened(page, asked.rounds):
            print(f"opened in {seconds:.2f} s, of which its thread worked {busy:.2f} s")


def opened(page: Path, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds from asking for the page until it is drawn, and those of its thread, in fresh tabs."""
    found: list[tuple[float, float]] = []
    with sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for _ in range(rounds):
            tab = browser.new_context(offline=True).new_page()
            inspector = tab.context.new_cdp_session(tab)
            inspector.send("Performance.enable", {"timeDomain": "threadTicks"})  # processor time: others do not count
            begun = perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("body[data-ready]")
            seconds = perf_counter() - begun
            told = {one["name"]: one["value"] for one in inspector.send("Performance.getMetrics")["metrics"]}
            found.append((seconds, told["TaskDuration"]))
            tab.context.close()
        browser.close()
    return found


if __name__ == "__main__":
    main()
