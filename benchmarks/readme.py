"""Rewrites the generated tables of README.md and docs/ from the measurements in benchmarks/results.

`python benchmarks/readme.py` rewrites what stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`;
with `--check` it writes nothing, and exits with 1 if a page is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script, which is given its own folder only
    sys.path[0] = str(ROOT)  # in place of this folder, whose kernels.py transformers would take for a package

from benchmarks.measurements import Line, caption, newest, read_lines, table  # noqa: E402

MARKED = re.compile(r"(<!-- begin:(?P<name>[\w.-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.DOTALL)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
MARK = re.compile(r"<!-- (?:begin|end):")


def by_device(lines: Sequence[Line], block: Callable[[Sequence[Line]], str]) -> str:
    """Return a block for each device among `lines`, without empty ones."""
    devices = dict.fromkeys(line["device"] for line in lines)
    made = [block([line for line in lines if line["device"] == device]) for device in devices]
    return "\n\n".join(one for one in made if one)


def beside(lines: Sequence[Line], other: str, name: str, columns: Sequence[str]) -> tuple[str, list[Line]]:
    """Compare the step time of each mode with that of `other`; return the table and its lines.

    Args:
        lines: Measurements, of which the newest of each mode is shown.
        name: The name of `other` in the table.
        columns: Further columns, keys of SIZES.
    """
    modes = newest((line for line in lines if "mode" in line), key="mode")
    pairs = newest((line for line in lines if "pair" in line), key="pair")
    rows = []
    for line in modes.values():
        pair = pairs.get(json.dumps([line["mode"], other]))
        time = "1" if line["mode"] == other else "not timed" if pair is None else step_time(pair)
        trainable = f"{line['trainable']:,} ({line['trainable_share']:.2%})"
        rows.append([line["mode"], trainable, time, *(SIZES[column](line) for column in columns)])
    head = ["mode", "trainable", f"step time / {name} [95 %]", *columns]
    return table(head, rows), [*modes.values(), *pairs.values()]


def step_time(pair: Line) -> str:
    return f"{pair['ratio_median']:.3f} [{pair['ratio_low']:.3f}, {pair['ratio_high']:.3f}]"


PEAK, CHOOSING, SAVED = "peak resident, GiB", "while choosing", "saved for backward, MiB"
SIZES: dict[str, Callable[[Line], str]] = {
    PEAK: lambda line: f"{line['peak_rss'] / 2**30:.2f}",
    CHOOSING: lambda line: number(line["selection_peak_rss"], ".2f", 2**-30) if line["mode"].startswith("smt") else "-",
    SAVED: lambda line: f"{line['saved_bytes'] / 2**20:.1f}",
}
"""Columns of memory, by their heads."""


def peers(results: Path) -> str:
    """Compare each method with the frozen floor: a table for each device."""
    command = "python -m benchmarks.peers"

    def block(lines: Sequence[Line]) -> str:
        made, used = beside(lines, "floor", "frozen floor", [PEAK, CHOOSING, SAVED])
        return f"{caption(command, used)}\n\n{made}"

    return by_device(read_lines(results / "peers.jsonl", command), block)


GPU_HEAD = [
    "method",
    "",
    "trainable",
    "tokens/s",
    "step, ms",
    "of the matmul rate",
    "counted, GiB",
    "allocator, GiB",
    "residue",
    "reserved, GiB",
    "NVML, GiB",
    "J a step",
]


def gpu(results: Path) -> str:
    """Compare methods on GPUs: a table for each device and model, or a sentence if nothing was measured."""
    command = "python -m benchmarks.gpu"
    if not (results / "gpu.jsonl").exists():
        return f"Not measured yet with the present timing. `make gpu` (`{command}`) measures this table."
    lines = read_lines(results / "gpu.jsonl", command)
    places = dict.fromkeys((line["device"], line["model"]) for line in lines)
    return "\n\n".join(gpu_on(*place, lines, command) for place in places)


def gpu_on(device: str, model: str, lines: Sequence[Line], command: str) -> str:
    here = [line for line in lines if (line["device"], line["model"]) == (device, model)]
    methods = newest((line for line in here if "method" in line), key="method")
    pairs = newest((line for line in here if "pair" in line), key="pair")
    about = f"{caption(command, [*methods.values(), *pairs.values()])} Shapes of `{model}`."
    head = f"{about}\n\n{table(GPU_HEAD, map(gpu_row, methods.values()))}"
    rows = [[*line["pair"], step_time(line)] for line in pairs.values()]
    return f"{head}\n\n{table(['step time of', 'beside', 'ratio [95 %]'], rows)}" if rows else head


def gpu_row(line: Line) -> list[str]:
    return [
        line["method"],
        "measured",
        f"{line['trainable']:,} ({line['trainable_share']:.2%})",
        number(line["tokens_per_second"], ",.0f"),
        number(line["step_seconds_median"], ".1f", 1e3),
        number(line["utilization"], ".1%"),
        *(number(line[size], ".2f", 2**-30) for size in ("counted", "requested")),
        number(line["residue"], ".1%"),
        *(number(line[size], ".2f", 2**-30) for size in ("reserved", "nvml_process")),
        number(line["joules_per_step"], ".1f"),
    ]


KERNELS_HEAD = ["op", "shape", "beside", "time, ours / theirs [95 %]", "peak KiB, ours / theirs", "of the ceiling"]


def kernels(results: Path) -> str:
    """Compare each op with torch's ways to do the same: a table for each device, or a sentence without a GPU."""
    command = "python -m benchmarks.kernels"
    lines = read_lines(results / "kernels.jsonl", command)
    devices = dict.fromkeys(line["device"] for line in lines)
    tables = [kernels_on(device, lines, command) for device in devices]
    if all("threads" in device for device in devices):
        tables.append(f"On a GPU: not measured yet. `make gpu` (`{command}`) measures this table there.")
    return "\n\n".join(tables)


def kernels_on(device: str, lines: Sequence[Line], command: str) -> str:
    here = newest((line for line in lines if line["device"] == device), key="shape")
    rows = [row for line in here.values() for row in kernels_rows(line)]
    return f"{caption(command, [*here.values()])}\n\n{table(KERNELS_HEAD, rows)}"


def kernels_rows(line: Line) -> Iterator[list[str]]:
    """Return a row for each rival of an op at one shape."""
    ours = line["peak_bytes"]["ours"]
    reached = max(line["of_matmul"] or 0, line["of_copy"] or 0)
    for place, (name, (middle, low, high)) in enumerate(line["ratio"].items()):
        head = [line["op"], line["shape"]] if not place else ["", ""]
        sizes = " / ".join(f"{size / 2**10:,.0f}" for size in (ours, line["peak_bytes"][name]))
        yield [*head, name, f"{middle:.3f} [{low:.3f}, {high:.3f}]", sizes, f"{reached:.0%}" if not place else ""]


PLANS = {
    "128x256, 4 stages, even": "128x256 tiles (kept)",
    "tma 128x256, 4 stages, even": "the same by TMA",
    "128x128, 8 warps, even": "128x128 tiles (before)",
    "gather + grouped_mm": "gather, grouped_mm",
    "whole dW": "whole dW",
}
"""Some of the plans in block_grad_variants.jsonl, with their names in the table."""


def block_grad(results: Path) -> str:
    """Return the plans of block_grad that were tried on a GPU: microseconds, and the share of the dense rate."""
    lines = read_lines(results / "block_grad_variants.jsonl", "")
    rows = []
    for line in lines:
        cells = [f"{line['tokens']:,}", str(line["blocks"])]
        for plan in PLANS:
            seconds = line["seconds"][plan]
            cells.append(f"{seconds * 1e6:.0f} us, {line['flops'] / seconds / line['ceiling']:.0%}")
        rows.append(cells)
    first = lines[0]
    about = (
        f"Measured once on {first['device']} at commit {first['commit']}, torch {first['versions']['torch']}, by a "
        "script that walked 34 plans and was removed with those that lost. The share is that of a dense bf16 product's "
        "rate in the same run."
    )
    return f"{about}\n\n{table(['tokens', 'blocks of 96', *PLANS.values()], rows)}"


def roofline(results: Path) -> str:
    """Return the floor of each op on an H100 beside the newest measurement of the same shape on a GPU."""
    command = "python -m benchmarks.roofline"
    lines = read_lines(results / "roofline.jsonl", command)
    timed = read_lines(results / "kernels.jsonl", "python -m benchmarks.kernels")
    measured = newest((line for line in timed if "threads" not in line["device"]), key="shape")
    rows = []
    for line in lines:
        run = measured.get(json.dumps(line["shape"]))
        taken = "-" if run is None else f"{run['seconds']['ours'] * 1e6:.1f} ({run['device'].split()[-1]})"
        cells = [f"{line['flops'] / 1e9:,.1f}", f"{line['bytes'] / 1e6:,.1f}", f"{line['seconds'] * 1e6:.1f}"]
        rows.append([line["op"], line["shape"], *cells, line["bound"], number(line["balance"], ".0%"), taken])
    head = ["op", "shape", "GFLOP", "MB", "at least, us", "bound by", "balance", "measured, us"]
    return f"Computed by `{command}`; table by `python benchmarks/readme.py`.\n\n{table(head, rows)}"


def registers(results: Path) -> str:
    """Return what each kernel takes of a multiprocessor: a range over its launches, and each model."""
    command = "python -m benchmarks.ahead"
    lines = read_lines(results / "ahead.jsonl", command)

    def between(values: Sequence[int], divisor: int = 1) -> str:
        return " to ".join(f"{value / divisor:,.0f}" for value in dict.fromkeys(values))

    rows = [
        [
            f"`{line['kernel'].strip('_')}`",
            line["model"],
            between(line["registers"]),
            between(line["shared"], 2**10),
            between(line["barriers"]),
            ", ".join(map(str, line["widths"])),
        ]
        for line in lines
    ]
    head = ["kernel", "model", "registers a thread", "shared, KiB", "barriers", "bits a load or store"]
    return f"{caption(command, lines)}\n\n{table(head, rows)}"


def overhead(results: Path) -> str:
    """Return the overhead of the profiler on the steps that it times, and on whole fits, for each device."""
    command = "python -m benchmarks.overhead"
    lines = [
        line | {"key": [line["device"], "fits" in line]} for line in read_lines(results / "overhead.jsonl", command)
    ]
    return "\n".join(f"{ratio(line)}\n{caption(command, [line])}" for line in newest(lines, key="key").values())


def ratio(line: Line) -> str:
    low, high = (f"{line[name]:.3f}" for name in ("ratio_low", "ratio_high"))
    times = f"{line['ratio_median']:.3f} [{low}, {high}]"
    if "fits" in line:
        pairs = f"median of {line['rounds']} pairs, and its 95 % interval"
        return f"Whole fits of 60 short steps take {times} times as long as with `--profile=false` ({pairs})."
    rounds = f"median of {line['rounds']} rounds in turn, and its 95 % interval"
    return f"Steps with the profiler take {times} times as long as without ({rounds})."


LISA = "python -m benchmarks.lisa_costs"
STATE_HEAD = [
    "when a layer stops training",
    "MiB of state at first",
    "after 10 switches",
    "after 20 switches",
    "full fine-tuning",
    PEAK,
]


def lisa(results: Path) -> str:
    """Compare LISA with full fine-tuning and LoRA, and the state of its policies: tables for each device."""
    return by_device(read_lines(results / "lisa.jsonl", LISA), lisa_block)


def lisa_block(lines: Sequence[Line]) -> str:
    steps, timed = beside(lines, "full", "full fine-tuning", [PEAK, SAVED])
    policies = list(newest((line for line in lines if "policy" in line), key="policy").values())
    made = [f"{caption(LISA, timed)}\n\n{steps}"] if timed else []
    if policies:
        made.append(f"{caption(f'{LISA} state', policies)}\n\n{table(STATE_HEAD, map(state_row, policies))}")
    return "\n\n".join(made)


def state_row(line: Line) -> list[str]:
    held = [optimizer + strategy for _, optimizer, strategy in line["states"]]
    sizes = [*(held[switches] for switches in (0, 10, 20)), line["full_state"]]
    return [line["policy"], *(f"{size / 2**20:,.1f}" for size in sizes), f"{line['peak_rss'] / 2**30:.2f}"]


def meft(results: Path) -> str:
    """Compare MEFT with activation checkpointing: bytes kept against depth, and memory and time of each device."""
    command = "python -m benchmarks.meft"
    if not (results / "meft.jsonl").exists():
        return f"Not measured yet: `{command}` measures these tables."

    def block(lines: Sequence[Line]) -> str:
        curves = list(newest((line for line in lines if "curve" in line), key="curve").values())
        made = [f"{caption(f'{command} curve', curves)}\n\n{depths(curves)}"] if curves else []
        steps, timed = beside(lines, "adapters_every_1", "adapters, every layer recomputed", [PEAK, SAVED])
        made += [f"{caption(f'{command} pairs', timed)}\n\n{steps}"] if timed else []
        return "\n\n".join(made)

    return by_device(read_lines(results / "meft.jsonl", command), block)


def depths(curves: Sequence[Line]) -> str:
    """Return a table of KiB kept by each arm at each depth, and of bytes that each further layer adds a token."""
    rows = []
    for line in curves:
        (first, *_, last), tokens = line["depths"], line["tokens"]
        added = (line["bytes"][-1] - line["bytes"][0]) / (last - first) / tokens
        rows.append([line["curve"], *(f"{kept / 2**10:,.0f}" for kept in line["bytes"]), f"{added:,.0f}"])
    head = ["KiB kept for the backward pass", *(f"{depth} layers" for depth in curves[0]["depths"])]
    return table([*head, "bytes a token and further layer"], rows)


def deft(results: Path) -> str:
    """Compare LoRA with and without the penalty on activations: a table for each device."""
    command = "python -m benchmarks.deft"
    if not (results / "deft.jsonl").exists():
        return f"Not measured yet: `{command}` measures this table."

    def block(lines: Sequence[Line]) -> str:
        made, used = beside(lines, "lora", "LoRA alone", [SAVED])
        return f"{caption(command, used)}\n\n{made}"

    return by_device(read_lines(results / "deft.jsonl", command), block)


MODEL = re.compile(r"\b\w+(?:For(?:CausalLM|SequenceClassification|ConditionalGeneration)|LMHeadModel)\b")
PLACE = re.compile(r"[\w.]+\.(?:layers?|block|h)\.\d+[\w.\[\]]*|\w*(?:Experts|Router)\b(?!\s+of)")
COUNT = re.compile(
    r"\b\d+(?= (?:gate|up|down|modules|more|layers))|(?<=base layer )\d+|[\w.]+ \(\d+\)|\{'[^}]*\}"
    r"|(?<=model_type=)'\w+'"
)
"""Parts of a refusal that stand for one model: its class, its modules, and their numbers."""


def families(task: str, results: Path) -> str:
    """Return what each method does on each family of a task: a table, and the reasons of what is refused."""
    from benchmarks.families import COMMAND, FAMILIES, methods  # loads torch, which other tables do not need

    rows_of = [name for name, family in FAMILIES.items() if family.task == task]
    lines = [line for line in read_lines(results / "families.jsonl", COMMAND) if line["family"] in rows_of]
    cells = {(line["family"], line["method"], line["ranks"]): line for line in lines}  # of each, the last
    tried = [method for method in methods() if any(line["method"] == method for line in cells.values())]
    notes: dict[str, int] = {}
    rows = []
    for family in rows_of:
        found = ([cells.get((family, method, ranks)) for ranks in (1, 2)] for method in tried)
        rows.append([family, *(family_cell(lines, notes) for lines in found)])
    made = table(["family", *tried], rows).replace("---:", "---")
    left = ", ".join(f"`{method}`" for method in methods() if method not in tried)
    reasons = [f"{place}. {reason}" for reason, place in notes.items()]
    missing = [f"\nNot tried on any of them yet: {left}."] if left else []
    return "\n".join([f"{caption(COMMAND, [*cells.values()])}\n", f"{made}\n", *reasons, *missing])


def family_cell(lines: Sequence[Line | None], notes: dict[str, int]) -> str:
    """Return the stages that held, by letter, or the number of the note that says why they were refused."""
    one, two = lines
    if one is None:
        return "-"
    if not one["ok"]:
        return note_of(one, notes)
    sharded = "" if two is None else "S" if two["ok"] else f" {note_of(two, notes)}"
    return f"FRE{sharded}"


def note_of(line: Line, notes: dict[str, int]) -> str:
    if "failed" in line:
        return "fails"
    reason = COUNT.sub("...", PLACE.sub("...", MODEL.sub("the model", line["refused"])))
    return f"[{notes.setdefault(reason, len(notes) + 1)}]"


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "peers": peers,
    "gpu": gpu,
    "kernels": kernels,
    "roofline": roofline,
    "registers": registers,
    "overhead": overhead,
    "lisa": lisa,
    "deft": deft,
    "meft": meft,
}


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


def quality(name: str, results: Path) -> str:
    """Return the quality table of that name, as far as it is measured."""
    from benchmarks.ranking import published  # loads torch, which other tables do not need

    return published(name, results / "quality.jsonl")


def forgetting(results: Path) -> str:
    """Return the study of forgetting, as far as it is measured."""
    from benchmarks.tradeoff import published  # loads torch, as above

    return published(results / "forgetting.jsonl")


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
    """Return the counts of the campaign of faults, the newest of each kind."""
    command = "python -m tests.faults"
    lines = newest(read_lines(results / "faults.jsonl", command), key="kind").values()
    names = ("tried", "survived", "refused", "nothing", "failed", "lost_steps", "corrupted")
    rows = [[line["kind"], *(f"{line[name]:,}" for name in names)] for line in lines]
    head = [
        "fault",
        "tried",
        "survived",
        "refused by name",
        "came to nothing",
        "failed",
        "steps taken again",
        "corrupted",
    ]
    return f"{table(head, rows)}\n\n{caption(command, [*lines])}"


BLOCKS["faults"] = faults
BLOCKS["planner"] = planner
BLOCKS["published"] = published
BLOCKS["methods"] = methods
BLOCKS["configuration"] = configuration
BLOCKS["command_line"] = command_line
BLOCKS |= {f"families-{task}": partial(families, task) for task in ("CausalLM", "Classifier")}
BLOCKS["block_grad"] = block_grad
BLOCKS["forgetting"] = forgetting
BLOCKS |= {
    f"quality-{path.stem}": partial(quality, path.stem) for path in sorted((ROOT / "benchmarks/quality").glob("*.yaml"))
}


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
