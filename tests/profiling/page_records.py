"""Records for the tests of the page: several methods on a GPU with all that a record can hold, and what goes wrong."""

from dataclasses import replace
from pathlib import Path

from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import (
    Allocator,
    Device,
    Driver,
    Held,
    Large,
    Ledger,
    Level,
    Memory,
    ModelSize,
    Phase,
    Predicted,
    StateBytes,
)
from lit_sparse_profiling.speed_sections import Kernel, Kernels, Throughput

GIB = 2**30
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">\x1b[31m%{x}\u202e&amp;'
METHODS = {
    "full": (16.0, 16.0, 32.0, 0.0, 7.0, 1450.0, 1.02, 0.21),
    "lora": (16.0, 0.1, 0.4, 0.0, 13.0, 2100.0, 1.11, 0.02),
    "smt": (16.0, 0.1, 0.3, 0.1, 9.0, 2600.0, 1.06, 0.03),
    "lisa": (16.0, 1.0, 2.1, 0.9, 6.0, 2450.0, 1.08, 0.06),
    "ia3": (16.0, 0.01, 0.01, 0.0, 15.0, 1900.0, 1.31, 0.01),
}
"""GiB of weights, gradients, optimizer state, strategy state, saved; tokens/s; loss; forgetting."""


def gpu_record(method: str, number: int = 1, scale: float = 1.0, model: str = "a/model-8b") -> RunRecord:
    """A run with every section that a record has; `scale` multiplies memory, time and loss."""
    weights, gradients, optimizer, strategy, saved, speed, loss, rise = METHODS[method]
    ledger = Ledger(
        trainable=size(gradients * scale),
        frozen=size(weights - min(weights, gradients)),
        gradients=size(gradients * scale),
        optimizer=size(optimizer * scale),
        strategy=size(strategy),
    )
    held = Held(ledger, batch=2**20, saved=size(saved * scale), temporaries=size(0.6), phase="backward")
    requested = held.total + size(0.2)
    reserved = round(requested * 1.06)
    peaks = {"peak_rss": 3 * GIB, "peak_requested": requested, "peak_allocated": requested, "peak_reserved": reserved}
    tokens, seconds = 200_000, 200_000 / speed * scale
    return RunRecord(
        name=f"{method}-{number}",
        created="2026-11-28T08:00:00+00:00",
        command=f"lit-sparse fit --config {method}.yaml --model.base {model}",
        versions={"python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2"},
        device=Device("cuda", "NVIDIA H100 80GB HBM3", memory=81559 * 2**20),
        model=ModelSize(model, 8_030_000_000, round(8_030_000_000 * min(1, gradients / weights))),
        updates=[{"class": method.upper(), "fields": {}, "chosen": choice(method)}] if method != "full" else [],
        settings={"data": {"batch_size": 4, "max_length": 1024}, "seed_everything": number, "method": method},
        phases=[
            Phase("imports", 6.0, 1, 2 * GIB),
            Phase("loading", 8.0 * scale, 1, **peaks),
            Phase("selection", 20.0 if method == "smt" else 1.0, 1, **peaks),
            Phase("training", seconds, 3, **peaks),
            Phase("evaluation", 12.0, 2, **peaks),
            Phase("examination", 9.0, 1, **peaks),
            Phase("forward", 2.0, 1, **peaks),
            Phase("polishing", 2.0, 1, **peaks),
        ],
        memory=Memory(
            3 * GIB,
            "VmHWM",
            size(saved),
            held,
            Allocator("an allocator", requested, 0, round(requested * 1.01), reserved, size(0.3)),
            course=[
                Level(0.0, "course", {"frozen": held.ledger.frozen}),
                Level(0.2, "forward", {"frozen": held.ledger.frozen, "saved": held.saved // 2}),
                Level(0.5, "backward", {"frozen": held.ledger.frozen, "saved": held.saved}),
                Level(0.9, "optimizer step", {"frozen": held.ledger.frozen, "gradients": held.ledger.gradients}),
            ],
            largest=[Large(GIB, "saved", [4, 1024, 128256], "bfloat16", "lm_head", "loss.py:12")],
        ),
        predicted=Predicted(
            peak_bytes=round(requested * 1.01),
            reserved_bytes=round(reserved * 0.995),
            needed_bytes=reserved + size(0.7),
            free_bytes=79 * GIB,
            phase="backward",
            categories={"frozen weights": held.ledger.frozen},
            batch_size=4,
            length=1024,
            seconds=4.0,
        ),
        throughput=Throughput(tokens, 210_000, seconds, 60, seconds / 60, seconds / 40, flops=8 * 10**13),
        driver=Driver(
            device="NVIDIA H100 80GB HBM3",
            uuid="GPU-1",
            driver="580",
            mig=False,
            memory="v2",
            attribution="own pid",
            used=reserved + GIB,
            process=reserved + size(0.7),
            context=size(0.6),
            foreign=0,
            samples=90,
            joules=500.0 * seconds,
            watts=500.0,
        ),
        kernels=Kernels(2, 0.4, 0.08, "bfloat16", 7e14, 2.6e12, 140, [*kernels(method)]),
        states=[StateBytes(step, size(optimizer), size(strategy) * step) for step in (1, 6, 11)]
        if method == "lisa"
        else [],
        outcome={
            "before": {"heldout_loss": 1.6, "general_loss": 2.1},
            "after": {"heldout_loss": loss * scale, "heldout_accuracy": 0.7, "general_loss": 2.1 + rise},
        },
    )


def size(gib: float) -> int:
    return round(gib * GIB)


def choice(method: str) -> dict:
    if method == "smt":
        return {"share": {str(layer): {"q": 0.02 * layer, "v": 0.5 - 0.05 * layer} for layer in range(8)}}
    return {"draws": {str(step): [step % 7, 7] for step in (1, 6, 11)}} if method == "lisa" else {}


def kernels(method: str) -> list[Kernel]:
    return [
        Kernel("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT", "aten::mm", 450, 0.21, 1.1e14, 4e10),
        Kernel("block_grad_kernel", "lit_sparse::block_grad", 56, 0.04, 1e13, 5e9, ours=True),
        Kernel("void at::native::elementwise_kernel<128, 4>", "aten::add", 300, 0.03, None, 6e10),
        Kernel("a kernel of unknown work", "aten::sort", 3, 0.01),
        Kernel("cached copy", "aten::copy_", 9, 0.005, None, 9e10),
    ]


def oom_record() -> RunRecord:
    """A run that was out of memory."""
    kept = gpu_record("full")
    return RunRecord(name="galore-1", status="oom", reason="CUDA out of memory", model=kept.model, device=kept.device)


def hostile_record() -> RunRecord:
    """A run whose every text is meant to be obeyed."""
    record = gpu_record("lora", 9)
    return replace(
        record,
        name=HOSTILE,
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
        device=replace(record.device, name=HOSTILE),
        phases=[replace(phase, name=HOSTILE if phase.name == "polishing" else phase.name) for phase in record.phases],
        kernels=replace(record.kernels, top=[Kernel(HOSTILE, HOSTILE, 1, 0.1)]),
        updates=[{"class": HOSTILE, "fields": {}, "chosen": {"share": {HOSTILE: {HOSTILE: 0.5}}}}],
        settings={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )


def write_runs(root: Path, *records: RunRecord) -> Path:
    """Write the records as runs, with a metrics.csv each; return the folder of all."""
    for n, record in enumerate(records):
        folder = root / (record.name if record.name.isascii() and "/" not in record.name else f"run-{n}")
        folder.mkdir(parents=True)
        record.write(folder / "record.json")
        lines = [f"{step},{1.6 / (1 + step / 30) + 0.02 * (step % 3)},{40 + 0.01 * n},\n" for step in range(60)]
        text = "step,train_loss,peak_memory_gib,heldout_loss\n" + "".join(lines) + "59,,,1.1\n"
        (folder / "metrics.csv").write_text(text, encoding="utf-8")
    return root
