"""Utilization of a device's matrix-product rate by the timed steps, by every convention, and what makes it doubtful.

A run's FLOP/s are told in four ways, which differ by a factor of up to two, so that a bare "MFU" says little:

- executed, with what activation checkpointing recomputes (also called HFU), or the model's own, without it (MFU);
- causal attention in full, as PaLM (arXiv 2204.02311, appendix B) and torch's counter have it, or halved, as
  FlashAttention (arXiv 2205.14135) has it, since the mask rules out half of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.speed_sections import Kernels

BETWEEN = 0.1
"""Time between steps, as a fraction of the time of both, above which it is a finding."""
QUIET = 0.8
"""Lowest measured ceiling as a fraction of the highest, below which the machine was not quiet."""


@dataclass(frozen=True)
class Utilization:
    """FLOP/s of the median timed step as fractions of the measured matrix-product rate, by convention.

    Attributes:
        executed: With recomputation; causal attention in full.
        model: Without recomputation; causal attention in full.
        executed_halved: With recomputation; causal attention halved.
        model_halved: Without recomputation; causal attention halved.
    """

    executed: float
    model: float
    executed_halved: float
    model_halved: float


def utilizations(record: RunRecord) -> Utilization | None:
    """Return the utilization by all conventions; None if it was not measured, or if one is above 1."""
    found = _unchecked(record)
    return None if found is None or found.executed > 1 else found


def _unchecked(record: RunRecord) -> Utilization | None:
    throughput, kernels = record.throughput, record.kernels
    if throughput is None or kernels is None or throughput.flops is None or throughput.flops_per_second is None:
        return None
    flops, again = throughput.flops, throughput.recomputed
    counts = (
        flops,
        flops - again,
        flops - throughput.masked - throughput.masked_recomputed,
        flops - again - throughput.masked,
    )
    return Utilization(*(throughput.flops_per_second * count / flops / kernels.flops_ceiling for count in counts))


def describe(record: RunRecord) -> str | None:
    """Return a sentence with the utilization by all conventions; None if there is none."""
    found = utilizations(record)
    if found is None:
        return None
    text = f"Utilization of the matrix-product rate: {found.model:.1%} (MFU, without recomputation)"
    if found.executed != found.model:
        text += f", {found.executed:.1%} (HFU, with it)"
    text += ", causal attention in full"
    if found.executed_halved != found.executed:
        halved = f"; {found.model_halved:.1%}"
        text += (
            halved + (f" and {found.executed_halved:.1%}" if found.executed != found.model else "") + " with it halved"
        )
    return f"{text}."


def findings(record: RunRecord) -> Iterator[str]:
    """Yield one sentence for each figure of speed that is not as expected."""
    found, throughput = _unchecked(record), record.throughput
    if found is not None and found.executed > 1:
        yield (
            f"The steps run at {found.executed:.0%} of the measured matrix-product rate, which cannot be: the ceiling "
            "was measured while the machine was busy, or FLOPs were counted that were not executed. No utilization is "
            "told."
        )
    if throughput is not None and throughput.uncounted:
        names = ", ".join(f"{name} ({calls} calls)" for name, calls in sorted(throughput.uncounted.items()))
        yield f"FLOPs and utilization are too low: no formula is known for {names}."
    if throughput is not None and throughput.between is not None:
        whole = throughput.seconds + throughput.between
        if throughput.between > BETWEEN * whole:
            yield (
                f"{throughput.between / whole:.0%} of the time of the timed steps went by between them, in loading of "
                "data, logging and callbacks: tokens/s are without it."
            )
    if record.kernels is not None:
        yield from _ceilings(record.kernels)


def _ceilings(kernels: Kernels) -> Iterator[str]:
    for what, measured in (("matrix products", kernels.flops_measured), ("copies", kernels.bytes_measured)):
        if measured and min(measured) < QUIET * max(measured):
            yield (
                f"The machine was not quiet: the rate of {what} was between {min(measured) / max(measured):.0%} and "
                f"100% of the ceiling in {len(measured)} measurements during the run, and steps may be as much too "
                "slow."
            )
    above = [kernel.name for kernel in kernels.top if (kernels.achieved(kernel) or (0.0, ""))[0] > 1]
    if above:
        yield (
            f"Above the device's ceilings: {', '.join(dict.fromkeys(above))}. Their data fit into the caches, which "
            "are faster than the copy, or the ceilings were measured while the machine was busy."
        )
