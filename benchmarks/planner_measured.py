"""The memory that a training allocates on this CPU: events of the allocator by phase, and the ledger's exact bytes.

It shares no code with the planner, whose error it shows. Two ranks train under DDP or FSDP2, and the first is measured.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.planner_cases import ALONE, PAIR, VOCABULARY, Case, Way, module_of
from lit_sparse.blocks import selection
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse, building
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.planning.quantized import scales_of
from lit_sparse_profiling.allocator import size_changes, walk_events
from lit_sparse_profiling.ledger import ledger, storages
from lit_sparse_profiling.sections import Ledger

DRAWS = 6
"""Trainable sets that a training goes through, where it changes: some of them begin at the lowest layer."""


class Measured(NamedTuple):
    """Bytes of a real training: peak by phase, and by category at the times when these are largest."""

    phases: dict[str, int]
    categories: dict[str, int]


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


def marked(act: Callable[..., None]) -> Callable[..., None]:
    """Return `act` as a part of the phase of selection."""

    def within(*args: Any) -> None:
        mark("selection")
        act(*args)
        mark("between")

    return within


def measured(case: Case, config: Path) -> Measured:
    """Train a case on this CPU with Lightning's trainer, and add up the allocator's events."""
    module, marks = module_of(case, config), Marks()
    for name in ("attach", "on_shard"):
        setattr(module.updates, name, marked(getattr(module.updates, name)))
    before, scales = 0, 0
    if case.way == "nf4":  # threads load and pack it, and the profiler misses what they free
        before, scales = bytes_of(module.build())
    with (
        warnings.catch_warnings(),
        patch.object(selection, "has_values", lambda *_: False),  # the blocks of a plan
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        warnings.simplefilter("ignore")
        mark("loading")
        train(case, module, [marks])
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = list(walk_events(profiled.profiler.kineto_results.experimental_event_tree()))
    peaks, levels = levels_of(events, before)
    return Measured(peaks, categories_of(marks.ledgers, levels, scales))


def train(case: Case, module: LitSparse, callbacks: list[L.Callback]) -> None:
    """Train with Lightning's own trainer, past several changes of the trainable set where it changes."""
    steps = max([2, *(DRAWS * update.period for update in module.updates if update.period is not None)])
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
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


def measured_on_gpu(case: Case, config: Path) -> Measured:
    """Train a case on this GPU; return the peaks of what tensors requested and of what the allocator reserved."""
    module = module_of(case, config)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # those of the training before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(), patch.object(selection, "has_values", lambda *_: False):
        warnings.simplefilter("ignore")
        train(case, module, [])
    told = torch.cuda.memory_stats()
    return Measured({"peak": told["requested_bytes.all.peak"], "reserved": told["reserved_bytes.all.peak"]}, {})


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a quantised model, and those of them that are scales, which no parameter has."""
    whole = [*model.parameters(), *model.buffers()]
    scales = [part for weight in model.parameters() if hasattr(weight, "quant_state") for part in scales_of(weight)]
    sizes = {storage: size for tensor in [*whole, *scales] for storage, size in storages(tensor)}
    return sum(sizes.values()), sum(tensor.nbytes for tensor in scales)


def options_of(way: Way) -> dict[str, Any]:
    """Return the trainer's options."""
    if way in ALONE:
        return {"accelerator": "gpu" if way == "gpu" else "cpu", "devices": 1}
    return {"accelerator": "cpu", "devices": PAIR, "strategy": FSDP2Strategy() if way == "fsdp2" else "ddp"}


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
    dist.all_reduce, _functional_collectives.wait_tensor = reduce, wait
    setattr(dist, "_broadcast_coalesced", broadcast)  # noqa: B010 - private
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


SETTLE, LONGEST = 0.002, 2.0
"""Seconds between two looks whether gloo's thread has let go of a tensor, and the most to wait for it."""
all_reduce = dist.all_reduce


@contextmanager
def settled(tensor: torch.Tensor) -> Iterator[None]:
    """Wait after a collective until gloo's thread has let go of its tensor: what it frees, the profiler misses."""
    holders: Any = tensor  # whose number torch's stubs do not know
    before, end = holders._use_count(), monotonic() + LONGEST
    yield
    sleep(SETTLE)
    while holders._use_count() > before and monotonic() < end:
        sleep(SETTLE)


def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Sum over ranks in place, by gloo."""
    with settled(tensor):
        all_reduce(tensor, *args, **kwargs)


wait_tensor = _functional_collectives.wait_tensor


def wait(tensor: torch.Tensor) -> torch.Tensor:
    """Wait for a collective of DTensors, and as long as gloo's thread may hold on to what it has sent."""
    out = wait_tensor(tensor)
    sleep(SETTLE)
    return out


def broadcast(group: Any, tensors: Sequence[torch.Tensor], size: int, source: int = 0) -> None:
    """Send DDP's buffers to the other ranks, flattened by dtype: of gloo's own copies its thread may free the last."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        parts = [tensor.detach() for tensor in tensors if tensor.dtype is dtype]
        flat = torch.cat([part.flatten() for part in parts])
        with settled(flat):
            dist.broadcast(flat, source, group=group)
        for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))


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
