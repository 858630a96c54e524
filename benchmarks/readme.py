"""Rewrites the generated tables of README.md and docs/ from the measurements in benchmarks/results.

`python benchmarks/readme.py` rewrites what stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`;
with `--check` it writes nothing, and exits with 1 if a page is not what it would write.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script, which is given its own folder only
    sys.path[0] = str(ROOT)  # in place of this folder, whose kernels.py transformers would take for a package

from benchmarks import family_tables, kernel_tables, step_tables  # noqa: E402
from benchmarks.fault_counts import SUMMED, summed  # noqa: E402
from benchmarks.measurements import caption, read_lines, table  # noqa: E402

MARKED = re.compile(r"(<!-- begin:(?P<name>[\w.-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.DOTALL)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
MARK = re.compile(r"<!-- (?:begin|end):")
QUALITY = ROOT / "benchmarks" / "quality"


def quality(name: str, results: Path) -> str:
    """Return the quality table of that name, as far as it is measured."""
    from benchmarks.ranking import published  # loads torch, which other tables do not need

    return published(name, results / "quality.jsonl")


def forgetting(results: Path) -> str:
    """Return the study of forgetting, as far as it is measured."""
    from benchmarks.tradeoff import published  # loads torch, as above

    return published(results / "forgetting.jsonl")


def claims(results: Path) -> str:
    """Return the statements of papers with what decides them, and the verdicts."""
    from benchmarks.claims import ledger  # loads torch, as above

    return ledger(results)


def pareto(results: Path) -> str:
    """Return the figure of loss over costs, if it was drawn."""
    if not (results.parent / "figures" / "pareto.svg").exists():
        return "Not drawn yet: `python -m benchmarks.plots` draws losses over memory, time and forgetting."
    return "![Held-out loss over memory, step time and forgetting](../../benchmarks/figures/pareto.svg)"


def rewinding(results: Path) -> str:
    """Return the scores of runs whose changes are scaled, as far as they are measured."""
    from benchmarks.rewinding import published  # loads torch, as above

    return published(results / "rewinding.jsonl")


def methods(_results: Path) -> str:
    """Return a row for each configs/*.yaml: its first comment, and what the classes that it names say of themselves."""
    import yaml

    from lit_sparse.runs import build_module

    rows = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        model = yaml.safe_load(text)["model"]
        updates = build_module({"model": {"base": "unused", "updates": model.get("updates+", [])}}).updates
        what = ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text.splitlines()[0].lstrip("# ").rstrip("."))
        start = "yes, from the start"
        changed = {"kept": "no", "trained": "yes", "rewritten": start, "moved": start, "replaced": "are replaced"}
        owns = [u.base for u in updates if "trainable" in u.claims or u.base == "replaced"]
        bases = owns or ["trained"]
        sharded = all(update.supports_sharding for update in updates)
        period = next((every(u.period) for u in updates if u.period is not None), "no")
        rows.append([f"`{path.name}`", what, changed[bases[0]], period, "yes" if sharded else "no"])
    head = ["YAML", "what it does", "base weights change", "trainable set changes", "FSDP2"]
    return table(head, rows).replace("---:", "---")  # words, not figures


def every(steps: int) -> str:
    """Return an interval in words."""
    return "every step" if steps == 1 else f"every {steps} steps"


def configuration(_results: Path) -> str:
    """Return the keys of a configuration."""
    from docs import reference  # loads all of lit_sparse, which other tables do not need

    return reference.configuration()


def command_line(_results: Path) -> str:
    """Return the options of the verbs."""
    from docs import reference

    return reference.command_line()


def short_help(verb: str) -> str:
    """Return the help of a verb as the package ships it."""
    from lit_sparse.commands.parsers import help_of

    return help_of([verb], long=False) + "\n"


def planner(results: Path) -> str:
    """Return the planner's error beside measured trainings: its median and worst, and the worst ten."""
    command = "python -m benchmarks.planner"
    lines = read_lines(results / "planner.jsonl", command)
    errors = sorted((line["predicted"]["peak"] / line["measured"]["peak"] - 1 for line in lines), key=abs)
    less = sum(error < -0.001 for error in errors)
    about = (
        f"{len(lines)} configurations: the error of the peak is {abs(errors[len(errors) // 2]):.3%} in the median and "
        f"{abs(errors[-1]):.2%} at worst; {sum(abs(error) > 0.03 for error in errors)} are beyond 3 %, {less} predict "
        "too little by more than 0.1 %. The worst ten:"
    )
    worst = sorted(lines, key=lambda line: -abs(line["predicted"]["peak"] / line["measured"]["peak"] - 1))[:10]
    rows = [
        [
            f"{line['method']}, {line['family']}",
            f"{line['batch_size']} x {line['length']}",
            "yes" if line["checkpointing"] else "no",
            line.get("way", "one"),
            *(f"{line[kind]['peak'] / 2**20:.3f}" for kind in ("predicted", "measured")),
            f"{line['predicted']['peak'] / line['measured']['peak'] - 1:+.2%}",
        ]
        for line in worst
    ]
    head = ["method, family", "batch", "checkpointing", "ranks", "predicted, MiB", "measured, MiB", "error"]
    return f"{about}\n\n{table(head, rows)}\n\n{caption(command, lines)}"


def published(results: Path) -> str:
    """Return published memory beside what is planned for a GPU."""
    command = "python -m benchmarks.published"
    lines = read_lines(results / "published.jsonl", command)
    rows = [
        [
            f"[{line['source']}]({line['address']})" if line.get("address") else line["source"],
            f"{line['model']}, {line['name']}",
            f"{line['batch_size']} x {line['length']}",
            f"{line['published']:.1f}",
            *(f"{line[name] / 1e9:.1f}" for name in ("allocated", "needed")),
            line["difference"],
        ]
        for line in lines
    ]
    head = [
        "table",
        "model, method",
        "planned batch",
        "published, GB",
        "allocated, GB",
        "with context, GB",
        "differs in",
    ]
    return f"{table(head, rows)}\n\n{caption(command, lines, 'Planned')}"


def faults(results: Path) -> str:
    """Return the counts of the campaign of faults, the pieces of each kind summed."""
    command = "python -m tests.faults"
    lines = read_lines(results / "faults.jsonl", command)
    rows = [[kind, *(f"{counts[name]:,}" for name in SUMMED)] for kind, counts in summed(lines).items()]
    heads = ["fault", "tried", "kills", "survived", "refused by name", "came to nothing", "failed"]
    return f"{table([*heads, 'steps taken again', 'corrupted'], rows)}\n\n{caption(command, lines)}"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "peers": step_tables.peers,
    "gpu": step_tables.gpu,
    "kernels": kernel_tables.kernels,
    "roofline": kernel_tables.roofline,
    "registers": kernel_tables.registers,
    "block_grad": kernel_tables.block_grad,
    "overhead": step_tables.overhead,
    "lisa": step_tables.lisa,
    "deft": step_tables.deft,
    "meft": step_tables.meft,
    "planner": planner,
    "published": published,
    "methods": methods,
    "faults": faults,
    "forgetting": forgetting,
    "claims": claims,
    "pareto": pareto,
    "rewinding": rewinding,
    "configuration": configuration,
    "command_line": command_line,
    **{f"families-{task}": partial(family_tables.families, task) for task in ("CausalLM", "Classifier")},
    **{f"quality-{name}": partial(quality, name) for name in sorted(p.stem for p in QUALITY.glob("*.yaml"))},
}
"""What makes each generated block, by its name."""


def rewritten(page: str, name: str, results: Path) -> str:
    """Return the page called `name` with all of its generated blocks rewritten.

    Raises:
        ValueError: if a block has no end, or a name that nothing makes.
    """

    def block(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise ValueError(f"{name} has a block {match['name']!r}; known are {', '.join(BLOCKS)}.")
        return f"{match[1]}{BLOCKS[match['name']](results)}\n{match[3]}"

    if MARK.search(MARKED.sub("", page)):
        raise ValueError(f"{name} has a begin or end mark without its counterpart; write both, each on its line.")
    return MARKED.sub(block, page)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite README.md, docs/ and help texts in the checkout `root`, or check them; return the exit status."""
    parser = argparse.ArgumentParser(description="Rewrite the generated tables of README.md and docs/, and help texts.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    check = parser.parse_args(arguments).check
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    try:
        old = {path: path.read_text(encoding="utf-8") for path in paths}
        new = {
            path: rewritten(text, path.relative_to(root).as_posix(), root / "benchmarks" / "results")
            for path, text in old.items()
        }
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in sorted((root / "lit_sparse" / "commands" / "short_help").glob("*.txt")):
        old[path], new[path] = path.read_text(encoding="utf-8"), short_help(path.stem)
    changed = [path for path in new if new[path] != old[path]]
    if check and changed:
        names = ", ".join(path.relative_to(root).as_posix() for path in changed)
        print(f"Not what benchmarks/results say: {names}; run `python benchmarks/readme.py`.", file=sys.stderr)
        return 1
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
