"""Run test cases in two processes or more, and pass their results through files."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["lit_sparse.cli", "lit_sparse.callbacks.recorder", "tests.methods"]
"""Modules that pairs need, which import nearly all that their files import."""
LIMIT = 600
"""Seconds a pair may take: the longest takes about a hundred, and gloo itself waits for half an hour."""


def run_pair(act: Callable[[Path, int], None], folder: Path, ranks: int = 2) -> None:
    """`act(folder, rank)` in two processes, or in `ranks`, that Lightning takes for those of torchrun.

    A process that dies of a signal is not a test that failed: in about one of ten runs of many FSDP2 fits on CPUs in
    one process, the allocator aborts it ("munmap_chunk(): invalid pointer"), for a reason that is not known yet. The
    pair is then run again from the start, once, and says so.
    """
    before = set(folder.iterdir())
    try:
        _spawn(act, folder, ranks)
    except torch.multiprocessing.ProcessExitedException as crash:  # pyright: ignore[reportPrivateImportUsage]
        if crash.signal_name is None:
            raise
        warned = f"a process of the pair died of {crash.signal_name}; the pair runs once more"
        print(warned, file=sys.stderr, flush=True)
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _spawn(act, folder, ranks)


def _spawn(act: Callable[[Path, int], None], folder: Path, ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked from a server that has imported what all of them need, which takes each one seven seconds otherwise.
    multiprocessing.set_forkserver_preload(PRELOADED)
    start = torch.multiprocessing.start_processes  # pyright: ignore[reportPrivateImportUsage]
    context = start(_begin, (act, folder, port, ranks), nprocs=ranks, join=False, start_method="forkserver")
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=max(deadline - time.monotonic(), 0)):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the pair of processes had not ended after {LIMIT} s; they wait for one another")


def _begin(rank: int, act: Callable[[Path, int], None], folder: Path, port: int, ranks: int) -> None:
    warnings.filterwarnings("ignore")  # of the processes' start; what they train is what counts
    torch.set_num_threads(1)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in {**there, **mine}.items()})
    act(folder, rank)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def attempt(folder: Path, rank: int, name: str, act: Callable[[], Any]) -> None:
    """Write what `act` returned or raised into a file."""
    try:
        found = {"result": act()}
    except Exception:
        found = {"error": traceback.format_exc()}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found))


def result(folder: Path, name: str, rank: int = 0) -> Any:
    """Return the result of `act` in that process."""
    found = json.loads((folder / f"{name}-{rank}.json").read_text())
    assert "error" not in found, found["error"]
    return found["result"]
