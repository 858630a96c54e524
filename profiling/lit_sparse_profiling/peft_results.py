"""Results of PEFT's method comparison, read as records; `peft_export` writes them.

PEFT keeps one JSON document per experiment in `method_comparison/<task>/results/` (huggingface/peft), in three parts:
`run_info`, `train_info` and `meta_info`. Documents of before 2026 name the memory `cuda_memory_*` and the device `gpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lit_sparse_profiling.documents import parse_as
from lit_sparse_profiling.record import RunRecord, Status
from lit_sparse_profiling.sections import Device, ModelSize, Phase
from lit_sparse_profiling.speed_sections import Throughput

PARTS = ("run_info", "train_info", "meta_info")
STATUSES: Mapping[str, Status] = {"success": "ok", "canceled": "failed", "failed": "failed"}
NOTE = (
    "From PEFT's method comparison: the memory is what torch reserved beyond its start, evaluation and generation "
    "included; the time of training includes theirs, the tokens/s do not."
)


def is_result(document: Any) -> bool:
    """Return whether a JSON document is such a result."""
    return isinstance(document, dict) and all(isinstance(document.get(part), dict) for part in PARTS)


def to_record(document: Mapping[str, Any], name: str) -> RunRecord:
    """Return the record of a result.

    Args:
        document: The JSON document.
        name: Name of the run: that of the file.

    Raises:
        ValueError: if the document lacks a figure, or has another type of one.
    """
    try:
        return parse_as(asdict(_record(document, name)), RunRecord, "the result")
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"the result lacks {error}, or has it in another form") from error


def _record(document: Mapping[str, Any], name: str) -> RunRecord:
    run, train, meta = (document[part] for part in PARTS)
    config, metrics = run["train_config"], train["metrics"]
    last: Mapping[str, Any] = metrics[-1] if metrics else {}
    device = meta["system_info"].get("accelerator") or meta["system_info"].get("gpu") or "unknown GPU"
    status = STATUSES.get(train["status"], "failed")
    peft = run.get("peft_config") or {}
    scores = {"train_loss": "train loss", "test_accuracy": "test accuracy", "forgetting": "forgetting"}
    return RunRecord(
        name=name,
        status=status,
        reason=None if status == "ok" else str(run.get("error_msg") or f"PEFT's status is {train['status']}"),
        created=str(run["created_at"]),
        versions={
            key.removesuffix("-version"): str(value)
            for key, value in meta["package_info"].items()
            if key.endswith("-version") and value
        },
        device=Device("cuda", str(device)),
        model=ModelSize(str(config["model_id"]), int(train["num_total_params"]), int(train["num_trainable_params"])),
        updates=[{"class": f"PEFT {peft.get('peft_type', 'full fine-tuning')}", "fields": dict(peft), "chosen": {}}],
        settings={"train_config": dict(config), "peft_config": dict(peft)},
        phases=[Phase("training", float(train["train_time"]), 1, peak_reserved=_memory(train, "max"))],
        throughput=_throughput(metrics),
        outcome={"after": {ours: float(last[theirs]) for ours, theirs in scores.items() if theirs in last}},
        notes=[NOTE],
    )


def _memory(train: Mapping[str, Any], which: str) -> int:
    name = f"memory_{which}"
    return int(train[f"accelerator_{name}"] if f"accelerator_{name}" in train else train[f"cuda_{name}"])


def _throughput(metrics: list[dict[str, Any]]) -> Throughput | None:
    """Return tokens and seconds of the steps, without evaluation: the sums of the intervals."""
    steps = [one for one in metrics if "tokens / sec" in one and "train time" in one]
    if not steps or steps[-1]["step"] < 1:
        return None
    taken = sum(float(one["train time"]) for one in steps)
    tokens = round(sum(float(one["tokens / sec"]) * float(one["train time"]) for one in steps))
    return Throughput(tokens=tokens, padded_tokens=tokens, seconds=taken, steps=int(steps[-1]["step"]))
