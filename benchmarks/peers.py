"""Step time and memory of SMT beside the frozen floor, full fine-tuning and PEFT's adapters, all in one run.

`python benchmarks/peers.py` appends its measurements to benchmarks/results/peers.jsonl and judges what is promised.
The demo model is trained on one batch of random tokens, in fp32 on the CPU, each mode in a process of its own
(benchmarks/peer.py). For times, two modes step in turn, a round at a time, and who is first alternates: what slows the
machine slows both. A round gives one ratio; the interval of their median is bootstrapped. Memory is of fresh processes
that do nothing else: one as anybody's, and one whose allocator gives freed tensors back to the system at once, so that
its peak is what was needed and not what glibc kept (`..._returned`; elsewhere than with glibc it is like the other).

The frozen floor is forward and backward through frozen weights: the outputs of q, k and v of the first decoder layer
become leaves that want a gradient, so that its graph is that of a method that trains q, k and v of that layer, without
the gradients of weights and without an optimizer step. A method whose lowest trained layer is higher up has a shorter
backward than the floor; `lowest_layer` tells.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import rich
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"
MEASURED = ("lit_sparse", "kernels", "profiling", "benchmarks/peer.py", "benchmarks/peers.py")
"""What a change of makes the measurements other ones than the commit's."""

FLOOR, FULL = "floor", "full fine-tuning"
SMT_1, SMT_5, SMT_LORA = "SMT 0.84 %", "SMT 5 %", "SMT as LoRA q,k,v"
LORA_QKV, LORA_ALL, DORA, SHIRA = "LoRA q,k,v", "LoRA all linears", "DoRA all linears", "SHiRA q,k,v"
MODES = (FLOOR, SMT_1, SMT_5, SMT_LORA, LORA_QKV, LORA_ALL, DORA, SHIRA, FULL)
PAIRS = (*((mode, FLOOR) for mode in MODES[1:]), (SMT_1, LORA_ALL), (SMT_5, LORA_ALL))
WARMUP = 2

RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""Makes glibc map and unmap every block from 128 KiB on by itself; it would raise that limit as it goes."""

Line = dict[str, Any]
Key = tuple[str, ...]


class Worker:
    """A mode's process, which computes only while it is asked."""

    def __init__(self, mode: str, options: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})) -> None:
        self.mode = mode
        environment = {**os.environ, **variables}
        command = [sys.executable, str(ROOT / "benchmarks" / "peer.py"), mode, *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, command: str) -> Any:
        """The process's answer, once its training is there.

        Raises:
            RuntimeError: if the process ended instead.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(command, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the process of {self.mode!r} ended without an answer; see its error above.")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def measured(mode: str, options: Sequence[str]) -> Line:
    """The line of one mode, alone in a fresh process, and the peaks of a second one that returns freed memory."""
    with closing(Worker(mode, options)) as worker:
        line = {"mode": mode, **worker.ask("measure")}
    with closing(Worker(mode, options, RETURNING)) as worker:
        second = worker.ask("measure")
    return line | {f"{name}_returned": second[name] for name in ("peak_rss", "selection_peak_rss")}


def compared(pair: tuple[str, str], options: Sequence[str], rounds: int, steps: int) -> Line:
    """The line of a pair: how many times the second's seconds the first takes."""
    with closing(Worker(pair[0], options)) as first, closing(Worker(pair[1], options)) as second:
        for worker in (first, second):
            seconds_of(worker, WARMUP)
        ratios = [ratio(first, second, steps, swapped=bool(number % 2)) for number in range(rounds)]
    low, high = interval(ratios)
    median, highest = statistics.median(ratios), max(ratios)
    figures = {"ratio_median": median, "ratio_low": low, "ratio_high": high, "ratio_max": highest}
    return {"pair": list(pair), **figures, "rounds": rounds, "steps_per_round": steps}


def ratio(first: Worker, second: Worker, steps: int, swapped: bool) -> float:
    order = [second, first] if swapped else [first, second]
    seconds = {worker: seconds_of(worker, steps) for worker in order}
    return seconds[first] / seconds[second]


def seconds_of(worker: Worker, steps: int) -> float:
    return sum(worker.ask("step") for _ in range(steps))


def interval(ratios: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))]


def provenance(model: str, threads: int) -> Line:
    """Where and of what the measurements are; a commit with + has changes that are not committed."""
    source = {"bench": "peers", "commit": commit(), "date": str(date.today()), "device": device(threads)}
    return {**source, "versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "model": model}


def commit() -> str:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changes = ["git", "status", "--porcelain", "--", *MEASURED]
    dirty = subprocess.run(changes, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return head.stdout.strip() + ("+" if dirty else "")


def device(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {threads} threads"


def key(line: Line) -> Key:
    return ("pair", *line["pair"]) if "pair" in line else ("mode", line["mode"])


def kept(path: Path | None, source: Line) -> dict[Key, Line]:
    """The lines in `path` of the same source, whatever their date."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    same = source.keys() - {"date"}
    return {key(line): line for line in lines if all(line[name] == source[name] for name in same)}


def write(line: Line, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def verdicts(lines: Mapping[Key, Line]) -> Iterator[tuple[str, bool]]:
    """What is promised, as far as it was measured, with the number, and whether it holds."""
    for mode, most in ((SMT_1, 1.05), (SMT_5, 1.10)):
        if line := lines.get(("pair", mode, FLOOR)):
            high = line["ratio_high"]
            yield f"{mode}: upper end of step time / floor {high:.3f}, at most {most:.2f}", high <= most
    for mode in (SMT_1, SMT_5):
        if line := lines.get(("pair", mode, LORA_ALL)):
            most = line["ratio_max"]
            yield f"{mode}: slowest of {line['rounds']} rounds {most:.3f} of {LORA_ALL}, below 1", most < 1
    if (ours := lines.get(("mode", SMT_LORA))) and (theirs := lines.get(("mode", LORA_QKV))):
        yield memory_verdict("peak of the steps", ours, theirs, ["peak_rss"])
        names = ["peak_rss_returned", "selection_peak_rss_returned"]
        yield memory_verdict("peak with selection, freed memory returned", ours, theirs, names)
    for line in lines.values():
        if line.get("saved_formula") is not None:
            saved, formula = line["saved_bytes"], line["saved_formula"]
            yield f"{line['mode']}: {saved:,} bytes saved for backward, by formula {formula:,}", saved == formula


def memory_verdict(what: str, ours: Line, theirs: Line, names: Sequence[str]) -> tuple[str, bool]:
    """Whether the highest of the sizes `names` is below that of the other, which trains as many weights."""
    mine, other = (max(line[name] for name in names) / 2**20 for line in (ours, theirs))
    counts = f"{ours['trainable']:,} and {theirs['trainable']:,} trained weights"
    text = f"{SMT_LORA}: {what} {mine:,.0f} MiB, below {other:,.0f} MiB ({counts})"
    return text, mine < other and ours["trainable"] == theirs["trainable"]


def show(lines: Mapping[Key, Line]) -> None:
    rich.print(table([mode_row(line) for line in lines.values() if "mode" in line]))
    rich.print(table([pair_row(line) for line in lines.values() if "pair" in line]))
    for text, met in verdicts(lines):
        rich.print("[green]met[/]   " if met else "[red]missed[/]", text)


def table(rows: Sequence[Mapping[str, str]]) -> Table:
    out = Table(*(rows[0] if rows else ()))
    for row in rows:
        out.add_row(*row.values())
    return out


def mode_row(line: Line) -> dict[str, str]:
    selects = line["lowest_layer"] is not None
    return {
        "mode": line["mode"],
        "trained": f"{line['trainable']:,}",
        "from layer": str(line["lowest_layer"]) if selects else "",
        "step s": f"{line['step_seconds_median']:.3f}",
        "peak MiB": f"{line['peak_rss'] / 2**20:,.0f}",
        "returned": f"{line['peak_rss_returned'] / 2**20:,.0f}",
        "saved MiB": f"{line['saved_bytes'] / 2**20:,.1f}",
        "selection s": f"{line['selection_seconds']:.1f}" if selects else "",
        "its peak": f"{line['selection_peak_rss'] / 2**20:,.0f}" if selects else "",
    }


def pair_row(line: Line) -> dict[str, str]:
    return {
        "step time": " / ".join(line["pair"]),
        "median": f"{line['ratio_median']:.3f}",
        "95 %": f"{line['ratio_low']:.3f} to {line['ratio_high']:.3f}",
        "highest": f"{line['ratio_max']:.3f}",
        "rounds": str(line["rounds"]),
    }


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description="Measure step time and memory of SMT beside its peers.")
    out.add_argument(
        "--model", choices=("demo", "tiny"), default="demo", help="tiny tries this program out, in seconds"
    )
    out.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="only these, and their pairs")
    out.add_argument("--rounds", type=int, default=12, help="rounds of a pair")
    out.add_argument("--steps-per-round", type=int, default=1, help="steps of each mode in a round")
    out.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each process")
    out.add_argument("--resume", action="store_true", help="keep what was measured here at this commit")
    out.add_argument("--results", type=Path, help="file to append to (default of the demo model: the README's)")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, write each line as it is known, and show all; the exit status."""
    asked = parser().parse_args(arguments)
    if min(asked.rounds, asked.steps_per_round, asked.threads) < 1:
        print("--rounds, --steps-per-round and --threads must be at least 1.", file=sys.stderr)
        return 2
    results = asked.results or (RESULTS if asked.model == "demo" else None)
    source = provenance(asked.model, asked.threads)
    lines = kept(results, source) if asked.resume else {}
    for name, measure in measures(asked).items():
        if name not in lines:
            print(f"measuring {' / '.join(name[1:])}", flush=True)
            lines[name] = source | measure()
            write(lines[name], results)
    show(lines)
    return 0


def measures(asked: argparse.Namespace) -> dict[Key, Callable[[], Line]]:
    """What makes each line that was asked for."""
    options = ["--model", asked.model, "--threads", str(asked.threads)]
    out: dict[Key, Callable[[], Line]] = {("mode", mode): partial(measured, mode, options) for mode in asked.modes}
    for pair in PAIRS:
        if set(pair) <= set(asked.modes):
            out["pair", *pair] = partial(compared, pair, options, asked.rounds, asked.steps_per_round)
    return out


if __name__ == "__main__":
    sys.exit(main())
