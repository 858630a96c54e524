"""All that is measured on a GPU host, in stages of falling value, each step under its own limit.

`python -m benchmarks.gpu --minutes 9` needs no git, no index and no .venv: the interpreter at hand runs all. A step's
log, its line of steps.jsonl and its results are in the folder `--into` as soon as it is done, so that a cut-off loses
only the step under way; called again, finished steps are left out. `--dry` tries it on a CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "benchmarks/gpu/llama-3.2-1b.json"
STAGES = ("env", "tests", "kernels", "methods", "short", "contract", "alone", "plans", "large", "deft", "meft")
"""In order of value."""
OPS = ("block_grad", "block_adamw", "master_adamw", "pack_columns", "block_delta", "glu_density", "loss")
COMPILED = ("pack_columns", "block_delta", "glu_density")
"""Ops that must be ahead of torch.compile; it compiles while the tests run."""
PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:benchmark")
REPORTS = ("-rfEs", "-W", "ignore:Warning")  # torch 2.11 warns at a process's first torch.profiler
SANITY = """
import sys, torch, triton
from importlib.metadata import version
print(sys.version.split()[0], *(f"{name} {version(name)}" for name in "torch triton numpy transformers peft".split()))
import lit_sparse.cli, lit_sparse_kernels, lit_sparse_profiling
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_properties(0))
from lit_sparse_profiling.ceilings import ceilings
print(ceilings(torch.device("cuda"), torch.bfloat16))
"""


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, and the seconds that they may take.

    Attributes:
        commands: Arguments of the interpreter, by name.
        shown: Lines of each log that are printed, from its end.
        must: Whether nothing else can run where it fails.
    """

    name: str
    seconds: int
    commands: Mapping[str, Sequence[str]]
    shown: int = 12
    must: bool = False


def plan(stages: Sequence[str], into: Path, results: Path, dry: bool) -> Iterator[Step]:
    """Yield the steps of the stages."""
    drawn = memory() / "llama-3.2-1b"
    base = "benchmarks/quality/workloads/tiny.json" if dry else str(drawn)
    small = ["--trainer.accelerator=cpu", "--model.precision=float32", "--data.max_length=16", "--data.batch_size=1"]
    kernels = ["-m", "benchmarks.kernels", *OPS, "--tested", "--compiled", *COMPILED]
    fits = [f"--model.base={base}", *(small if dry else [])]
    rounds = ["--rounds=3" if dry else "--rounds=20"]
    for stage in stages:
        if stage == "env":
            yield Step("env", 60, {"env": ["-c", SANITY]}, must=not dry)
        elif stage == "tests":
            tests = {op: [*PYTEST, *REPORTS, tests_of(op)] for op in (*OPS, "interpreter")}
            tests["density"] = [*PYTEST, *REPORTS, "tests/strategies/test_activation_density.py"]
            beside = {"weights": ["-m", "benchmarks.weights", SHAPES, str(drawn)]}
            beside |= {f"warm_{op}": ["-m", "benchmarks.kernels", op, "--tested", "--warm"] for op in COMPILED}
            yield Step("tests", 90, tests if dry else tests | beside, shown=4)
        elif stage == "kernels":
            lines = f"--results={results / 'kernels.jsonl'}"
            yield Step("kernels", 90, {"kernels": [*kernels, *rounds, lines]}, shown=60)
        elif stage in ("methods", "short"):
            if not dry and stage == stages[0]:
                yield Step("weights", 60, {"weights": ["-m", "benchmarks.weights", SHAPES, str(drawn)]})
            name, seconds = ("gpu" if stage == "methods" else "gpu_short"), 400 if dry else 90
            words = ["-m", "benchmarks.gpu_methods", "pairs", f"--into={into / stage}", f"--seconds={seconds - 5}"]
            shape = ["--data.max_length=512", "--data.batch_size=1"] if stage == "short" and not dry else []
            lines = f"--results={results / name}.jsonl"
            yield Step(stage, seconds, {stage: [*words, lines, *rounds, *fits, *shape]}, shown=40)
        elif stage == "contract":
            yield Step("contract", 90, {"contract": [*PYTEST, *REPORTS, "tests/test_contract.py", "-n", "8"]})
        elif stage == "deft":
            yield Step(
                "deft", 900, {"deft": ["-m", "benchmarks.deft", f"--results={results / 'deft.jsonl'}"]}, shown=40
            )
        elif stage == "meft":
            words = ["-m", "benchmarks.gpu_methods", "lengths", f"--into={into}"]
            lines = [f"--results={results / 'gpu_lengths.jsonl'}", *(["--lengths", "16", "32"] if dry else [])]
            yield Step("meft", 900, {"meft": [*words, *lines, *fits]}, shown=40)
        elif stage == "plans":
            words = ["-m", "benchmarks.planner", "--gpu", "--minutes=9.5", f"--results={results / 'gpu_planner.jsonl'}"]
            if not dry:
                yield Step("plans", 600, {"plans": words}, shown=60)
        elif not dry:  # alone, large
            words = ["-m", "benchmarks.gpu_methods", stage, f"--into={into}", f"--results={results / 'gpu.jsonl'}"]
            yield Step(stage, 900, {stage: [*words, *(fits if stage == "alone" else [])]}, shown=40)


def tests_of(op: str) -> str:
    """Return the file of an op's tests."""
    return "tests/test_loss.py" if op == "loss" else f"tests/kernels/test_{op}.py"


def memory() -> Path:
    """Where weights are kept for the runs of one call: in memory, where a host has the room."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        found = os.statvfs(shared)
        if found.f_bavail * found.f_frsize > 30e9:
            return shared
    return Path("/tmp")


def environment(into: Path) -> dict[str, str]:
    """Return the variables of all commands: our folders come first, and nothing is downloaded."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "profiling"), *os.environ.get("PYTHONPATH", "").split(":")]
    ours = {"PYTHONPATH": ":".join(filter(None, paths)), "TORCHINDUCTOR_CACHE_DIR": str(into / "inductor")}
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **ours}


def run(step: Step, seconds: float, into: Path) -> dict[str, object]:
    """Run a step's commands side by side for at most `seconds`; what became of them."""
    begin = monotonic()
    started: dict[str, subprocess.Popen[bytes]] = {}
    for name, arguments in step.commands.items():
        with (into / "logs" / f"{name}.log").open("wb") as log:
            command = [sys.executable, *arguments]
            started[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment(into), stdout=log, stderr=log, start_new_session=True
            )
    codes: dict[str, int | None] = {}
    for name, process in started.items():
        try:
            codes[name] = process.wait(max(0.1, begin + seconds - monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.wait()
            codes[name] = None
    return {"step": step.name, "codes": codes, "seconds": round(monotonic() - begin, 1)}


def finished(into: Path) -> set[str]:
    """Steps that an earlier call in this folder has done."""
    lines = into / "steps.jsonl"
    if not lines.exists():
        return set()
    found = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    return {one["step"] for one in found if set(one["codes"].values()) == {0}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it (default 30)")
    parser.add_argument("--into", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs and runs")
    parser.add_argument("--results", type=Path, help="folder of the JSON lines (default: that of --into)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, to try this")
    asked = parser.parse_args(arguments)
    begin, into, code = monotonic(), asked.into.resolve(), 0
    results = into if asked.results is None else asked.results.resolve()
    (into / "logs").mkdir(parents=True, exist_ok=True)
    done = finished(into)
    for step in plan(asked.stages, into, results, asked.dry):
        left = asked.minutes * 60 - (monotonic() - begin)
        if step.name in done or left < 8:
            print(f"--- {step.name}: {'done before' if step.name in done else 'no time is left'}", flush=True)
            continue
        line = run(step, min(step.seconds, left), into)
        with (into / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"--- {step.name}: {line['codes']} after {line['seconds']} s; {monotonic() - begin:.0f} s in all",
            flush=True,
        )
        for name in step.commands:
            said = (into / "logs" / f"{name}.log").read_text("utf-8", "replace").splitlines()
            print("\n".join(text[:180] for text in said[-step.shown :]), flush=True)
        if set(line["codes"].values()) != {0}:  # pyright: ignore[reportAttributeAccessIssue]
            code = 1
            if step.must:
                return code
    return code


if __name__ == "__main__":
    sys.exit(main())
