"""Run test cases in two processes, and pass their results through files."""

import json
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_pair(act: Callable[[Path, int], None], folder: Path) -> None:
    """Run `act(folder, rank)` in two processes that Lightning takes for those of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_begin, (act, folder, port), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def _begin(rank: int, act: Callable[[Path, int], None], folder: Path, port: int) -> None:
    warnings.filterwarnings("ignore")  # of the processes' start; what they train is what counts
    torch.set_num_threads(1)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in {**there, **mine}.items()})
    act(folder, rank)
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
