"""Records written as results of PEFT's method comparison; `peft_results` describes their form, and reads them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_sparse_profiling.documents import spell_nonfinite
from lit_sparse_profiling.drafts import check_replaceable, replace_text
from lit_sparse_profiling.measures import accuracy, forgetting, loss, seconds, tokens_per_second
from lit_sparse_profiling.peft_results import is_result
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import Runs, device_kind, document_of, peak_memory

OURS = "lit_sparse_record"
"""Key of a result that only ours have: the whole record."""


def write_results(runs: Runs, folder: Path) -> int:
    """Write each run that ended as a result, `<run>.json`, and return their number.

    PEFT's application reads them from a folder such as `method_comparison/lit-sparse/results`.

    Raises:
        ValueError: if no run ended, two have one name, the folder cannot be written to, or has a file of such a name
            that is no result of ours; nothing is written then.
    """
    ended = [record for _, record in runs if isinstance(record, RunRecord) and record.status == "ok"]
    names = [re.sub(r"[^\w.+-]", "_", record.name) for record in ended]
    if not ended:
        raise ValueError("Results in PEFT's format were asked for, but none of these runs ended; give one that did.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two of these runs are called {twice[0]}, and each is to be a file; give one of them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            check_replaceable(folder / f"{name}.json", "result", is_ours)
        for name, record in zip(names, ended, strict=True):
            document = json.dumps(spell_nonfinite(to_result(record)), indent=2, allow_nan=False)
            replace_text(folder / f"{name}.json", document + "\n")
    except OSError as error:
        raise ValueError(
            f"Results could not be written to {folder} ({error.strerror or error}); name a folder that can be written."
        ) from error
    return len(ended)


def is_ours(file: Path) -> bool:
    """Return whether a file is a result that `write_results` wrote."""
    document = document_of(file)
    return is_result(document) and OURS in document


def to_result(record: RunRecord) -> dict[str, Any]:
    """Return a record as PEFT's result, with the whole record beside it.

    What PEFT measures and we do not is 0 where its application needs a number: the size of the file, and the samples.
    Memory is the peak, since we keep no mean: of the device's reserved bytes on a GPU, of resident ones on a CPU.
    """
    peak, throughput = peak_memory(record, device_kind(record)) or 0, record.throughput
    tokens = 0 if throughput is None else throughput.tokens or 0
    steps = 0 if throughput is None else throughput.steps
    score = {
        "step": steps,
        "test accuracy": accuracy(record) or 0.0,
        "train loss": loss(record) or 0.0,
        "train samples": 0,
        "train total tokens": tokens,
        **({} if (rise := forgetting(record)) is None else {"forgetting": rise}),
    }
    interval = {
        "step": steps,
        "train loss": score["train loss"],
        "train samples": 0,
        "train time": 0.0 if throughput is None else throughput.seconds,
        "tokens / sec": tokens_per_second(record) or 0.0,
    }
    training = next((phase.seconds for phase in record.phases if phase.name == "training"), 0.0)
    methods = [str(update.get("class")) for update in record.updates]
    return {
        "run_info": {
            "created_at": record.created,
            "total_time": seconds(record) or 0.0,
            "experiment_name": f"{'+'.join(methods).lower() or 'full-finetuning'}/{record.name}",
            "peft_branch": "main",
            "train_config": {"model_id": "" if record.model is None else record.model.base, **record.settings},
            "peft_config": {"peft_type": "+".join(methods), "updates": record.updates} if methods else None,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": peak,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": peak,
            "train_time": training,
            "file_size": 0,
            "num_trainable_params": 0 if record.model is None else record.model.trainable,
            "num_total_params": 0 if record.model is None else record.model.parameters,
            "status": "success",
            "metrics": [interval, score],
        },
        "meta_info": {
            "model_info": None,
            "dataset_info": {},
            "package_info": {
                f"{name}-version": record.versions.get(name)
                for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
            },
            "system_info": {"accelerator": "" if record.device is None else record.device.name},
            "pytorch_info": "",
        },
        OURS: asdict(record),
    }
