"""Measure the costs of recording importance, and of penalties.

The steps of a run with RecordImportance are interleaved with those of the same run without it, and so are those of each
kind of penalty. RecordFisher on LoRA's product is compared with the published recipe of EWC-LoRA (arXiv 2305.10626),
the Fisher of every parameter: both see the same samples, one at a time, one recipe after the other in this process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.curves import Study
from benchmarks.measurements import Line
from benchmarks.provenance import of_device
from benchmarks.provenance import provenance as provenance_of
from benchmarks.quality import written
from benchmarks.ranking import Results
from benchmarks.trials import Config, digest, filled
from benchmarks.turns import pair_line
from lit_sparse.commands.bench import bench
from lit_sparse.data import Instructions
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.runs import build_module
from lit_sparse.strategies import RecordFisher
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import folders

EXTRAPOLATED = 20_000
"""Samples that the published recipe uses."""
PENALTY = "penalty: "
"""Prefix of a method's name in a line on the cost of its penalty."""
QUIET_STEPS = "--profile.profiled=0"


def measure_costs(
    study: Study, results: Results, names: Callable[[], Mapping[str, str]], into: Path, sizes: Mapping[str, int]
) -> None:
    """Measure the missing costs and append them.

    Args:
        names: Makes the text and the phases; returns their paths by placeholder.
        sizes: `rounds` of steps with and without a recorder or penalty, and `samples` of each Fisher.

    Raises:
        BadInput: if a phase computes in another type than the Fishers, which have no trainer to choose it.
        RuntimeError: if a run failed.
    """
    general, fisher = study.phases
    for phase in (general, fisher):
        if (precision := phase.config["model"].get("precision", "auto")) != "float32":
            raise BadInput(
                f"the phase {phase.name} has model.precision {precision}, but the Fishers are measured in float32, and "
                "costs in two types do not compare; set it to float32."
            )
    rounds, samples = sizes["rounds"], sizes["samples"]
    measures: dict[str, tuple[Config, int, Callable[[Config], Line]]] = {
        "recorder": (general.config, rounds, lambda config: recorder_cost(config, into / "cost", rounds)),
        "lean": (fisher.config, samples, lambda config: lean_cost(config, samples)),
        "published": (fisher.config, samples, lambda config: published_cost(config, samples)),
    }
    for name, config in penalised(study).items():
        cost = partial(penalty_cost, name, into=into / "cost", rounds=rounds)
        measures[f"{PENALTY}{name}"] = (config, rounds, cost)
    for what, (config, size, measure) in measures.items():
        identity = digest({"cost": what, "of": config, "text": study.text_rows, "size": size}, results.stack)
        if any(line["identity"] == identity for line in costs(results)):
            continue
        made = filled(config, names())
        begun, line = time.monotonic(), measure(made)
        about = {"kind": "cost", "stack": results.stack, "identity": identity, "cost": what}
        results.append({**about, **line, "seconds": time.monotonic() - begun})


# ---- interleaved steps


def in_turn(name: str, config: Config, into: Path, rounds: int) -> tuple[RunRecord, Line]:
    """Interleave steps of a run with those of the run without its last update; return its record and the pair's line.

    Raises:
        RuntimeError: if a run failed.
    """
    trainer = {key: value for key, value in config["trainer"].items() if key != "callbacks"}  # they would score
    config = {**config, "trainer": trainer}
    plain = {**config, "model": {**config["model"], "updates": config["model"]["updates"][:-1]}}
    files = [written(into / f"{stem}.yaml", one) for stem, one in ((name, config), (f"{name}_plain", plain))]
    if bench([str(files[0]), f"--against={files[1]}", f"--into={into}", f"--steps={rounds}", QUIET_STEPS]):
        raise RuntimeError(f"the cost of {name} was not measured: a run of `lit-sparse bench` failed; see above.")
    record = RunRecord.read(folders(into, name)[-1] / "record.json")
    if record.pair is None or record.throughput is None or record.ledger is None:
        raise RuntimeError(f"the cost of {name} was not measured: {record.status}, {record.reason}")
    held = {"held_bytes": record.ledger.strategy}
    return record, {**provenance_of("forgetting", record), **held, **pair_line(name, record.pair)}


def recorder_cost(config: Config, into: Path, rounds: int) -> Line:
    """Compare steps with and without the recorder."""
    record, pair = in_turn("recorder", config, into, rounds)
    assert record.throughput is not None
    rows = config["data"]["init_args"]["batch_size"]
    importance = next(update["chosen"] for update in record.updates if update["class"] == "RecordImportance")
    seconds = record.throughput.median_step / rows
    return {**pair, "seconds_a_sample": seconds, "samples": rounds * rows, "bytes": importance["bytes"]}


def penalised(study: Study) -> dict[str, Config]:
    """Return a trial of the first method with each kind of penalty, by name."""
    found: dict[str, tuple[str, Config]] = {}
    for curve in study.curves:
        if curve.swept is not None:
            config = study.table.trial(curve.swept, curve.swept.rates[0], study.table.seeds[0]).config
            found.setdefault(config["model"]["updates"][-1]["class_path"], (curve.name, config))
    return dict(found.values())


def penalty_cost(name: str, config: Config, into: Path, rounds: int) -> Line:
    """Compare steps with and without the penalty, and measure the bytes that it keeps."""
    return in_turn(name, config, into, rounds)[1]


# ---- Fishers


def lean_cost(config: Config, samples: int) -> Line:
    """Time RecordFisher on LoRA's product."""
    module = module_of(config, updates=1)
    module.updates[0].attach(module.build(), no_probe, ALONE)
    recorder, seconds = RecordFisher(samples), list[float]()
    recorder.attach(module.build(), lambda count, weighed=True: timed(losses(module, config, count), seconds), ALONE)
    matrices = recorder.state_dict()["importance"]["matrices"]
    return fisher_line(module, seconds, [one["sums"] for one in matrices.values()])


def published_cost(config: Config, samples: int) -> Line:
    """Time the Fisher of all parameters."""
    module, seconds = module_of(config, updates=0), list[float]()
    found = published_fisher(module.build(), timed(losses(module, config, samples), seconds))
    return fisher_line(module, seconds, found.values())


def published_fisher(model: nn.Module, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the mean of squared gradients of every parameter, fp32 on the host.

    As in the code of EWC-LoRA (arXiv 2305.10626): one sample at a time, dropout off, squares summed on the host.
    """
    model.requires_grad_(True).eval()
    sums = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    count = 0
    for loss in losses:
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.to("cpu", torch.float32)
                sums[name].addcmul_(gradient, gradient)
        count += 1
    return {name: total / count for name, total in sums.items()}


def module_of(config: Config, updates: int) -> Any:
    """Build the phase's module on its device, with the first of its updates, which start anew."""
    kept = [without_start(update) for update in config["model"]["updates"][:updates]]
    module = build_module({**config, "model": {**config["model"], "updates": kept}})
    module.build().to(device())  # pyright: ignore[reportArgumentType]
    return module


def without_start(update: Config) -> Config:
    return {**update, "init_args": {key: value for key, value in update["init_args"].items() if key != "start_from"}}


def losses(module: CausalLM, config: Config, count: int) -> Iterator[Tensor]:
    """Yield the losses of the first samples, with a graph."""
    data = Instructions(**config["data"]["init_args"], tokenizer=config["model"]["base"])
    data.setup("fit")
    for _, batch in zip(range(count), data.train_dataloader(), strict=False):
        yield module.loss({name: value.to(device()) for name, value in batch.items()})[0]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(losses: Iterator[Tensor], seconds: list[float]) -> Iterator[Tensor]:
    """Yield `losses`; append to `seconds` the time of each, with all that its consumer did before the next."""
    begun = time.perf_counter()
    for loss in losses:
        yield loss
        if loss.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()


def fisher_line(module: CausalLM, seconds: list[float], sums: Iterable[Tensor]) -> Line:
    about = {**of_device("forgetting", device()), "model": str(module.base)}
    spread = {"fastest": min(seconds), "slowest": max(seconds)}
    size = sum(one.nbytes for one in sums)
    return {**about, "seconds_a_sample": statistics.median(seconds), "samples": len(seconds), "bytes": size, **spread}


def costs(results: Results) -> list[Line]:
    """Return the lines of costs of this stack."""
    return [line for line in results.others if line["kind"] == "cost"]
