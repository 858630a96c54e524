"""The planner's error: what `lit-sparse plan` predicts, beside what the same training allocates on this CPU.

`python -m benchmarks.planner` trains each method on tiny models of seven families, in three shapes of batch, with and
without activation checkpointing, through Lightning's own trainer. The measurement shares no code with the planner: it
adds up the events of the CPU's allocator from the loading of the model on, phase by phase, and the ledger's exact bytes
of weights, gradients and state. Configurations come in a fixed random order and are appended one by one to
benchmarks/results/planner.jsonl, so that a run may be stopped at any time and goes on with what is missing. After
them, two ranks train together, under DDP and under FSDP2, and one rank is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.measurements import Line, read_lines
from benchmarks.provenance import ROOT, of_device
from benchmarks.turns import append
from lit_sparse.cli import make_planned
from lit_sparse.commands.plan import fit_command
from lit_sparse.commands.shipped import methods
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse, building
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.planning.forecast import Forecast, Setting, forecast
from lit_sparse.planning.quantized import scales_of
from lit_sparse_profiling.allocator import size_changes, walk_events
from lit_sparse_profiling.ledger import ledger, storages
from lit_sparse_profiling.sections import Ledger

RESULTS = ROOT / "benchmarks" / "results" / "planner.jsonl"
VOCABULARY = 512
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen2": Qwen2Config(
        hidden_size=80,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=512),
    "olmo2": Olmo2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
    "opt": OPTConfig(hidden_size=64, ffn_dim=192, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64),
    "phi": PhiConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4),
    "qwen3": Qwen3Config(
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
    ),
}
"""Tiny models, by family; of the last two no test has any."""
SHAPES = ((2, 64), (1, 200), (5, 33))
"""Rows of a batch, and tokens of each."""
DRAWS = 6
"""Trainable sets that a training goes through, where it changes: some of them begin at the lowest layer."""
SHORT = ("--model.updates.interval=2",)
"""Options of methods that change what they train every so many steps: soon enough for a measurement."""
CONFIGURATIONS, MEDIAN, WORST, CATEGORY, TOO_LITTLE = 200, 0.01, 0.03, 0.05, 0.01
"""The marks: configurations, median and worst error of the peak, worst of a category, most that may be too little."""
PAIR, PAIRED = 2, ("llama", "gpt2", "qwen3")
"""Ranks that train together, and the families that they train."""
AT_ONCE = 12
"""Trainings that one pair of processes does."""
OF_RANKS = ("DDP buckets", "gathered weights")
"""Categories beside what is saved that two ranks hold at the beginning of a backward pass."""
NEGLIGIBLE = 0.01
"""Share of the peak below which a category's error does not count."""


Way = Literal["one", "ddp", "fsdp2", "nf4", "compiled"]
"""One process, with its base in 4 bits or compiled too, or two with DDP or FSDP2."""
ALONE = ("one", "nf4", "compiled")


class Case(NamedTuple):
    """One training to plan and to measure."""

    method: str
    family: str
    batch_size: int
    length: int
    checkpointing: bool
    way: Way = "one"

    @property
    def setting(self) -> Setting:
        """The planner's setting of it."""
        count = 1 if self.way in ALONE else PAIR
        return Setting("cpu", self.batch_size, self.length, ranks=count, sharded=self.way == "fsdp2")


class Measured(NamedTuple):
    """Bytes of a real training: peak by phase, and by category at the times when these are largest."""

    phases: dict[str, int]
    categories: dict[str, int]


def cases() -> list[Case]:
    """Return all configurations, in a fixed random order."""
    found = [
        Case(path.stem, family, *shape, checkpointing)
        for path, family, shape, checkpointing in product(methods(), FAMILIES, SHAPES, (False, True))
    ]
    random.Random(0).shuffle(found)
    return found


def cases_of_pairs() -> list[Case]:
    """Return the configurations of two ranks, in a fixed random order."""
    ways: tuple[Way, ...] = ("ddp", "fsdp2")
    found = [
        Case(path.stem, family, *SHAPES[0], checkpointing, way)
        for path, family, checkpointing, way in product(methods(), PAIRED, (False, True), ways)
    ]
    random.Random(1).shuffle(found)
    return found


def config_in(folder: Path, family: str) -> Path:
    """Write the configuration of a family's tiny model into `folder`, and return its path."""
    config = FAMILIES[family]
    config.update({"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    config.save_pretrained(folder / family)
    return folder / family / "config.json"


def module_of(case: Case, config: Path) -> LitSparse:
    """Return the module that `fit` would train."""
    options = [f"--model.base={config}", f"--model.activation_checkpointing={str(case.checkpointing).lower()}"]
    if case.way == "nf4":
        options += [f"--model.base={weights_of(config)}", "--model.quantize=nf4"]
    more = (*(SHORT if case.method.startswith("lisa") else ()), *OPTIONS.get(case.way, ()))
    return make_planned([*fit_command(f"{case.method}.yaml", [], options), *more]).module


OPTIONS = {"compiled": ("--model.compile=true",)}


def weights_of(config: Path) -> Path:
    """Return a folder with random weights of a configuration: only weights can be quantised."""
    folder = config.parent.with_name(f"{config.parent.name}-weights")
    if not folder.exists():
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).save_pretrained(folder)
    return folder


def predicted(case: Case, config: Path) -> Forecast:
    """Plan the training of a case on a CPU."""
    return forecast(case.method, module_of(case, config), case.setting)


# ---- the measurement


class Marks(L.Callback):
    """Marks the phases of a training in the profile that runs, and takes the ledger before each backward pass and step.

    Attributes:
        ledgers: Those before each backward pass, and those before each optimizer step.
    """

    def __init__(self) -> None:
        self.ledgers: dict[str, list[Ledger]] = {"backward": [], "gradients": []}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *arguments: Any, **named: Any) -> None:
        if pl_module.updates.backward == "none":  # all is in the optimizer step, and nothing is kept for it
            self._take("backward", trainer, pl_module)
            self._take("gradients", trainer, pl_module)
            mark("optimizer step")
        else:
            mark("forward")

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if pl_module.updates.backward != "none":
            self._take("backward", trainer, pl_module)
            mark("backward")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._take("gradients", trainer, pl_module)
        mark("optimizer step")

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any, **named: Any) -> None:
        mark("between")

    def _take(self, name: str, trainer: L.Trainer, module: Any) -> None:
        # Not before a backward pass: PEFT's state dict shards what FSDP2 has gathered for it.
        state = [update.held() for update in module.updates] if name == "gradients" else None
        self.ledgers[name].append(ledger(module, trainer.optimizers[0], state))


def mark(phase: str) -> None:
    """Put the beginning of a phase into the profile."""
    with record_function(f"phase {phase}"):
        pass


def measured(case: Case, config: Path) -> Measured:
    """Train a case on this CPU with Lightning's trainer, and add up the allocator's events."""
    module, marks = module_of(case, config), Marks()
    attach = module.updates.attach

    def marked(*args: Any) -> None:
        mark("selection")
        attach(*args)
        mark("between")

    module.updates.attach = marked  # pyright: ignore[reportAttributeAccessIssue]
    before, scales = 0, 0
    if case.way == "nf4":  # threads load and pack it, and the profiler misses what they free
        before, scales = bytes_of(module.build())
    steps = max([2, *(DRAWS * update.period for update in module.updates if update.period is not None)])
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        warnings.simplefilter("ignore")
        mark("loading")
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[marks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **options_of(case.way),
        )
        rows = (steps + 8) * case.batch_size * case.setting.ranks
        data = Synthetic(vocab_size=VOCABULARY, max_length=case.length, batch_size=case.batch_size, rows=rows)
        trainer.fit(module, datamodule=data)
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = list(walk_events(profiled.profiler.kineto_results.experimental_event_tree()))
    peaks, levels = levels_of(events, before)
    return Measured(peaks, categories_of(marks.ledgers, levels, scales))


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a quantised model, and those of them that are scales, which no parameter has."""
    whole = [*model.parameters(), *model.buffers()]
    scales = [part for weight in model.parameters() if hasattr(weight, "quant_state") for part in scales_of(weight)]
    sizes = {storage: size for tensor in [*whole, *scales] for storage, size in storages(tensor)}
    return sum(sizes.values()), sum(tensor.nbytes for tensor in scales)


def options_of(way: Way) -> dict[str, Any]:
    """Return the trainer's options."""
    if way in ALONE:
        return {}
    return {"devices": PAIR, "strategy": FSDP2Strategy() if way == "fsdp2" else "ddp"}


def measured_by_pair(cases: Sequence[Case], configs: dict[str, Path]) -> list[Measured | str]:
    """Train cases in two processes; return what rank 0 measured of each, or why it was refused."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        spawn = torch.multiprocessing.spawn  # pyright: ignore[reportPrivateImportUsage]
        spawn(work, (cases, configs, Path(folder), port), nprocs=PAIR)
        found = [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(len(cases))]
    return [one if isinstance(one, str) else Measured(*one) for one in found]


def work(rank: int, cases: Sequence[Case], configs: dict[str, Path], folder: Path, port: int) -> None:
    """Train cases as one of two ranks; rank 0 writes what it measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench", "GROUP_RANK": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PAIR, "LOCAL_WORLD_SIZE": PAIR}
    os.environ.update({name: str(value) for name, value in {**there, **mine}.items()})
    dist.all_reduce = reduce
    building.hash_of = lambda named: ""  # it gathers every weight while loading, by gloo's own copies
    setattr(_fsdp_collectives.DefaultAllGather, "__call__", gather)  # noqa: B010 - a method
    setattr(_fsdp_collectives.DefaultReduceScatter, "__call__", scatter)  # noqa: B010
    for number, case in enumerate(cases):
        try:
            found: Any = measured(case, configs[case.family])
        except BadInput as refused:
            found = str(refused)
        if rank == 0:
            (folder / f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


SETTLE = 0.002
"""Seconds after which gloo's thread has let go of a tensor: what it frees itself, the profiler misses."""
all_reduce = dist.all_reduce


def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Sum over ranks in place, by gloo."""
    all_reduce(tensor, *args, **kwargs)
    sleep(SETTLE)


def gather(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options: Any) -> None:
    """Gather shards as a sum in place: gloo's own gather makes copies in its thread, which NCCL does not."""
    mine = output_tensor.view(-1, input_tensor.numel())[dist.get_rank()]
    values = input_tensor.clone()
    output_tensor.zero_()
    mine.copy_(values)
    del values
    reduce(output_tensor, group=options["group"])


def scatter(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options: Any) -> None:
    """Sum over ranks in place, and keep this rank's shard."""
    reduce(input_tensor, group=options["group"], op=options["op"])
    output_tensor.copy_(input_tensor.view(-1, output_tensor.numel())[dist.get_rank()])


def levels_of(events: Sequence[Any], level: int = 0) -> tuple[dict[str, int], list[int]]:
    """Return the peak of each phase in bytes, and the level at the beginning of each backward pass.

    Without any, it is the level at the beginning of each optimizer step.

    Args:
        level: Bytes that are there before.
    """
    begins = iter(sorted((e.start_time_ns, e.name[6:]) for e in events if e.name.startswith("phase ")))
    held: dict[int, int] = {}
    peaks: dict[str, int] = {}
    levels: dict[str, list[int]] = {}
    phase, ahead = "", next(begins, None)
    for change in size_changes(events):
        while ahead is not None and ahead[0] <= change.when:
            phase, ahead = ahead[1], next(begins, None)
            peaks[phase] = max(peaks.get(phase, 0), level)
            levels.setdefault(phase, []).append(level)
        if change.size > 0:
            held[change.address] = change.size
            level += change.size
        else:
            level -= held.pop(change.address, 0)
        if phase:
            peaks[phase] = max(peaks[phase], level)
    del peaks["between"]
    return peaks, levels.get("backward", levels["optimizer step"])


def categories_of(ledgers: dict[str, list[Ledger]], levels: Sequence[int], scales: int) -> dict[str, int]:
    """Return the bytes of each category, by the planner's names, at the highest beginning of a backward pass."""
    highest = max(range(len(levels)), key=lambda index: (levels[index], index))
    kept, last = ledgers["backward"][highest], ledgers["gradients"][highest]
    known = {
        "trained weights": last.trainable,
        "frozen weights": last.frozen + scales,
        "optimizer state": kept.optimizer,
    }
    beside = kept.buffers + last.strategy + kept.gradients
    return {
        **known,  # weights as they are between passes: under FSDP2 the ledger before a backward pass meets whole ones
        "gradients": last.gradients,
        "saved for backward": levels[highest] - sum(known.values()) - beside,
    }


# ---- the comparison


def line_of(case: Case, plan: Forecast, real: Measured) -> Line:
    """Return what was predicted and what was measured, in bytes."""
    beside = sum(plan.kept.categories.get(name, 0) for name in OF_RANKS) if case.setting.ranks > 1 else 0
    ours = {
        **{name: plan.kept.categories.get(name, 0) for name in real.categories},
        "saved for backward": plan.kept.categories.get("saved for backward", 0) + beside,
        "gradients": plan.phases["optimizer step"].categories.get("gradients", 0),
    }
    return {
        **of_device("planner", torch.device("cpu")),
        **case._asdict(),
        "predicted": {"peak": plan.allocated, **{name: moment.bytes for name, moment in plan.phases.items()}},
        "measured": {"peak": max(real.phases.values()), **real.phases},
        "predicted_categories": ours,
        "measured_categories": real.categories,
    }


def error(line: Line, phase: str = "peak") -> float:
    """Return the relative error of a phase's peak; above 0 where too much was predicted."""
    return line["predicted"][phase] / line["measured"][phase] - 1


def category_errors(line: Line) -> Iterator[float]:
    """Yield the relative error of each category that takes more than `NEGLIGIBLE` of the peak."""
    for name, size in line["measured_categories"].items():
        if size > NEGLIGIBLE * line["measured"]["peak"]:
            yield line["predicted_categories"][name] / size - 1


def fits_wrongly(line: Line) -> bool:
    """Return whether some card of memory would have been said to fit, and does not: too little was predicted."""
    return error(line) < -TOO_LITTLE


def missed(lines: Sequence[Line]) -> list[str]:
    """Return a sentence for each mark that the measured configurations miss."""
    errors = sorted(abs(error(line)) for line in lines)
    categories = [line for line in lines if max(map(abs, category_errors(line)), default=0) > CATEGORY]
    low = [line for line in lines if fits_wrongly(line)]
    said = []
    if len(lines) < CONFIGURATIONS:
        said.append(f"{len(lines)} configurations are measured, of {CONFIGURATIONS}.")
    if errors and errors[len(errors) // 2] > MEDIAN:
        said.append(f"The median error is {errors[len(errors) // 2]:.2%}, above {MEDIAN:.0%}.")
    said += [f"{named(line)}: the peak is off by {error(line):+.2%}." for line in lines if abs(error(line)) > WORST]
    said += [f"{named(line)}: a category is off by more than {CATEGORY:.0%}." for line in categories]
    said += [f"{named(line)}: {-error(line):.2%} too little is predicted." for line in low]
    return said


def named(line: Line) -> str:
    """Return the configuration of a line, in words."""
    return " ".join(map(str, case_of(line)))


def case_of(line: Line) -> Case:
    """Return the configuration of a line; those without `way` are of one process."""
    return Case(*(line[name] for name in Case._fields if name in line))


def measure(asked: Sequence[Case], configs: dict[str, Path]) -> Iterator[tuple[Case, Line | str]]:
    """Yield each case with its line, or with why it was refused; those of two ranks are trained by one pair."""
    pairs = measured_by_pair(asked, configs) if asked[0].setting.ranks > 1 else None
    for number, case in enumerate(asked):
        try:
            plan = predicted(case, configs[case.family])
            real = measured(case, configs[case.family]) if pairs is None else pairs[number]
            yield case, real if isinstance(real, str) else line_of(case, plan, real)
        except BadInput as refused:
            yield case, str(refused)


def groups(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """Yield as many cases as one pair of processes trains."""
    for start in range(0, len(cases), AT_ONCE):
        yield cases[start : start + AT_ONCE]


def main() -> int:
    """Measure what is missing; return the exit status, 1 if a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many (default 60)")
    parser.add_argument("--methods", nargs="+", help="only these (default all)")
    parser.add_argument("--pairs", action="store_true", help="only the configurations of two ranks")
    for name in ("lightning.pytorch", "lit_sparse"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="measure nothing; only say which marks are missed")
    asked = parser.parse_args()
    done = read_lines(asked.results, "python -m benchmarks.planner") if asked.results.exists() else []
    known = {case_of(line) for line in done}
    end = monotonic() + asked.minutes * 60

    def missing(cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if case not in known and case.method in (asked.methods or [case.method])]

    alone = [] if asked.pairs else missing(cases())
    todo = [[case] for case in alone] + [*groups(missing(cases_of_pairs()))]
    with tempfile.TemporaryDirectory() as folder:
        configs = {family: config_in(Path(folder), family) for family in FAMILIES}
        for some in [] if asked.check else todo:
            if monotonic() > end:
                break
            for case, line in measure(some, configs):
                if isinstance(line, str):
                    print(*case, "refused:", line, flush=True)
                    continue
                append(asked.results, [line])
                done.append(line)
                worst = max(map(abs, category_errors(line)), default=0)
                print(*case, f"{error(line):+.2%}", f"categories {worst:.2%}", flush=True)
    said = missed(done)
    for sentence in said:
        print(sentence)
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
