"""Memory of the arms of a table of quality: the peak memory of a short fit of each, in a process of its own.

`python -m benchmarks.arm_memory` measures those of the README's figure and writes benchmarks/results/arm_memory.jsonl,
one line an arm; done arms are not measured again. The peak is that of the whole process: loading, the choice of blocks,
and training, before it is saved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.provenance import ROOT, provenance
from benchmarks.quality import QUIET, fitted, written
from benchmarks.trials import read_table
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.runner import Job

RESULTS = ROOT / "benchmarks" / "results" / "arm_memory.jsonl"
ARMS = {"blocks_0.84": ("smt_abs_mean", "smt_diagonal", "lora", "dora", "shira", "full"), "lisa": ("lisa_uniform",)}
"""Arms of the figure, by table."""
SHORT = ("--samples=0", "--checkpoint_steps=0", "--trainer.limit_val_batches=0", "--trainer.max_steps=6")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the arms without a line, and append one for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=Path("runs/arm_memory"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    text = asked.results.read_text(encoding="utf-8") if asked.results.exists() else ""
    done = {(line["table"], line["arm"]) for line in map(json.loads, text.splitlines())}
    for name, wanted in ARMS.items():
        made = read_table(name)
        for arm in made.arms:
            if arm.name not in wanted or (name, arm.name) in done:
                continue
            file = written(asked.into / f"{arm.name}.yaml", made.trial(arm, arm.rates[0], made.seeds[0]).config)
            command = [sys.executable, "-m", "lit_sparse", "fit", f"--config={file}", *QUIET, *SHORT]
            place = [f"--run={arm.name}", f"--trainer.default_root_dir={asked.into}"]
            record = RunRecord.read(fitted(asked.into, Job(arm.name, [*command, *place], {})) / "record.json")
            assert record.memory is not None
            peak = record.memory.peak_resident
            line = provenance("arm_memory", record) | {"table": name, "arm": arm.name, "peak_resident": peak}
            with asked.results.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(f"{arm.name}: {peak / 2**30:.2f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
