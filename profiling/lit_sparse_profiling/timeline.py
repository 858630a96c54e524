"""The allocations and frees of a computation in the order of events, and what was allocated at any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SAVED, TEMPORARY = "saved for backward", "temporaries"
"""Categories of what nobody labelled: what the backward pass finds of the forward pass, and everything else."""
BOUNDARY = "backward"
"""The phase at whose start unlabelled tensors are those saved for it."""


@dataclass(eq=False)
class Block:
    """One allocation.

    Attributes:
        size: Bytes as requested.
        op: The op that made it.
        module: Qualified name of the module in whose forward pass it was made; empty elsewhere.
        born, died: Indices into `Timeline.events`; `died` is None while it is alive.
        labels: (index of an event, category, name), in order.
    """

    size: int
    op: str
    module: str
    born: int
    died: int | None = None
    labels: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """The memory at the peak of a phase: bytes in all and by category, and the largest blocks, (bytes, category, name).

    Attributes:
        event: Index of the event that reached the peak.
    """

    phase: str
    bytes: int
    event: int
    categories: Mapping[str, int]
    largest: Sequence[tuple[int, str, str]]


class Timeline:
    """Allocations and frees, in phases.

    Attributes:
        events: For each allocation the block's number from 1, for each free the negative number.
        blocks: The blocks, by number less one.
        marks: (index of the first event, name) of each phase, in order.
    """

    def __init__(self) -> None:
        self.events: list[int] = []
        self.blocks: list[Block] = []
        self.marks: list[tuple[int, str]] = [(0, "loading")]

    # ---- what happens

    def phase(self, name: str) -> None:
        """Begin the phase `name`."""
        self.marks.append((len(self.events), name))

    def allocate(self, size: int, op: str, module: str) -> int:
        """Add a block of `size` bytes, and return its number."""
        self.blocks.append(Block(size, op, module, len(self.events)))
        self.events.append(len(self.blocks))
        return len(self.blocks)

    def free(self, number: int) -> None:
        """End the life of a block; do nothing if it has ended."""
        block = self.blocks[number - 1]
        if block.died is None:
            block.died = len(self.events)
            self.events.append(-number)

    @property
    def now(self) -> tuple[int, int]:
        """The number of events and of phases so far, for `repeat`."""
        return len(self.events), len(self.marks)

    def repeat(self, since: tuple[int, int]) -> None:
        """Append what happened after `since` once more: what lived and died within, in its phases.

        The same step again allocates and frees the same, beside what the first one left.
        """
        (start, first), end, numbers = since, len(self.events), dict[int, int]()
        marks = self.marks[first:]
        for index in range(start, end):
            while marks and marks[0][0] <= index:
                self.phase(marks.pop(0)[1])
            block, number = self.blocks[abs(self.events[index]) - 1], abs(self.events[index])
            if block.born < start or block.died is None:
                continue
            shift = len(self.events) - index
            if self.events[index] > 0:
                numbers[number] = self.allocate(block.size, block.op, block.module)
                self.blocks[-1].labels += [(at + shift, category, name) for at, category, name in block.labels]
            else:
                self.free(numbers[number])

    # ---- results

    def levels(self) -> list[int]:
        """Return the bytes allocated after each event."""
        out, level = [], 0
        for event in self.events:
            level += self.blocks[event - 1].size if event > 0 else -self.blocks[-event - 1].size
            out.append(level)
        return out

    def category(self, block: Block, event: int) -> tuple[str, str]:
        """Return category and name of a block that is alive after the event of that index."""
        named = f"{block.module}: {block.op}" if block.module else block.op
        if block.labels:
            before = [label for label in block.labels if label[0] <= event + 1]
            _, category, name = (before or block.labels[:1])[-1]
            return category, name
        saved = any(
            block.born < start and (block.died is None or block.died >= start) and start <= event + 1
            for start, phase in self.marks
            if phase == BOUNDARY
        )
        crosses = next((start for start, phase in self.marks if phase == BOUNDARY and start > block.born), None)
        ahead = crosses is not None and (block.died is None or block.died >= crosses)
        return (SAVED if saved or ahead else TEMPORARY), named

    def alive(self, event: int) -> list[Block]:
        """Return the blocks that are alive after the event of that index."""
        return [b for b in self.blocks if b.born <= event and (b.died is None or b.died > event)]

    def moment(self, phase: str, event: int, largest: int = 20) -> Moment:
        """Return what is alive after the event of that index."""
        found = [(block.size, *self.category(block, event)) for block in self.alive(event)]
        categories: dict[str, int] = {}
        for size, category, _ in found:
            categories[category] = categories.get(category, 0) + size
        return Moment(phase, sum(categories.values()), event, categories, sorted(found, reverse=True)[:largest])

    def peaks(self) -> dict[str, Moment]:
        """Return the highest moment of each phase, by name."""
        levels = self.levels()
        best: dict[str, tuple[int, int]] = {}
        ends = [start for start, _ in self.marks[1:]] + [len(self.events)]
        for (start, phase), end in zip(self.marks, ends, strict=True):
            first = max(start - 1, 0)  # the level that the phase begins with counts
            for event in range(first, end):
                if phase not in best or levels[event] > best[phase][0]:
                    best[phase] = levels[event], event
        return {phase: self.moment(phase, event) for phase, (_, event) in best.items()}
