"""SparseEntries: train single entries of weight matrices in place, and choose them anew if asked to.

The published methods of this kind differ in which entries they choose and whether they choose again:

- `principal`: LIFT, arXiv 2506.00772, the largest entries of each matrix's best low-rank approximation;
- `gradient`: SPEFT, arXiv 2412.13488 (largest |sum of gradients|), and SIFT, arXiv 2312.11875 (of one batch);
- `magnitude`, `smallest`, `wanda`: Super-Tuning, arXiv 2607.09287; `random`: SHiRA, arXiv 2406.13175;
- `policy: grow_and_prune`: SpIEL, arXiv 2401.16405 (its variant with accumulated gradients).

Each entry has an fp32 master, which the optimizer updates and which is written into the weight after every step, and an
int32 position. Gradients of whole weights exist one at a time, in the backward pass of their layer.

Deliberate differences from the authors' codes: LIFT's keeps a mask of all entries in host memory and all gradients
until the step, and has no masters. SpIEL's chooses by one rank's gradients and counts steps for each entry; here
gradients are means over ranks, and `moments: seeded` starts newcomers so that the common count gives them steps of the
usual size. SIFT's applies each update a step late. Several batches are summed for candidates only: see `GradientSums`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.anatomy import has_values, replace, weight_count
from lit_sparse.blocks.principal import principal_scores
from lit_sparse.entries.batch_scores import BatchScores
from lit_sparse.entries.former import FormerEntries, described
from lit_sparse.entries.linear import EntryLinear
from lit_sparse.entries.scores import GradientSums, InputNorms, random_scores, top_entries
from lit_sparse.entries.selection import check_selection, counts, read_selection
from lit_sparse.entries.targets import entry_targets
from lit_sparse.errors import BadInput
from lit_sparse.optim import full_tensor
from lit_sparse.ranks import of_first_rank
from lit_sparse.strategies.base import Attaches, Claim, Context, Need, Probe, UpdateStrategy

KINDS = ("principal", "gradient", "magnitude", "smallest", "wanda", "random")


@dataclasses.dataclass
class SparseEntries(UpdateStrategy):
    """Train single entries of weight matrices in place (LIFT, arXiv 2506.00772; SPEFT, SpIEL and others).

    Args:
        entries: How the entries of each matrix are chosen: `principal` (largest of its low-rank approximation, LIFT),
            `gradient` (largest gradients on the first training batches), `magnitude` and `smallest` (of the weights),
            `wanda` (largest |weight| times norm of its input), `random`, or a file: what `lit-sparse select` wrote, or
            the checkpoints/last.ckpt of a run, for that run's entries.
        trainable_fraction: Share of all weights of the model to train. Each target gets entries in proportion to its
            size.
        lora_rank: Train as many entries of each matrix (out, in) as LoRA of this rank has weights, rank (out + in),
            instead of trainable_fraction.
        targets: Linear layers of which entries are trained: roles (q, k, v, qkv, o, gate, up, gate_up, down), endings
            of module names, or `all`.
        approximation_rank: Rank of the approximation of `principal`; null takes the rank of a LoRA with as many
            weights, near which the authors find it works best.
        selection_batches: Training batches that `gradient` and `wanda` look at before training.
        reselect: Optimizer steps from one choice to the next; null chooses once. Each matrix keeps its number of
            entries.
        policy: What a new choice is: `choose` repeats the first one on what the weights are then; entries that stop
            training keep their value. `grow_and_prune` (SpIEL) replaces the entries that have moved least by those with
            the largest gradients, and gives the former back the base's value.
        replaced_share: Share of the entries that `grow_and_prune` replaces, above 0 and at most 1.
        replaced_until: Optimizer step by which that share has fallen to 0 linearly, in SpIEL the last one; null keeps
            it.
        scoring_steps: Optimizer steps before a new choice whose gradients (or inputs) are summed; at most all.
        moments: What becomes of the optimizer's moments at a new choice: `carried` keeps those of entries that stay and
            starts newcomers at 0; `seeded` starts newcomers at the moments of their scored gradients, as they are
            before trainer.gradient_clip_val; `reset` drops all moments and the count of steps.
        seed: Seed of `random`.
    """

    entries: str = "principal"
    trainable_fraction: float = 0.05
    lora_rank: int | None = None
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    approximation_rank: int | None = None
    selection_batches: int = 8
    reselect: int | None = None
    policy: Literal["choose", "grow_and_prune"] = "choose"
    replaced_share: float = 0.2
    replaced_until: int | None = None
    scoring_steps: int = 1
    moments: Literal["carried", "seeded", "reset"] = "carried"
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    attaches_to: ClassVar[Attaches] = "shards"
    selects: ClassVar[str] = "entries"
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("trainable_fraction", "replaced_share"):
            if not 0 < getattr(self, name) <= 1:
                raise BadInput(f"SparseEntries: {name} is {getattr(self, name)}; it must be above 0 and at most 1.")
        for name in (
            "lora_rank",
            "approximation_rank",
            "selection_batches",
            "reselect",
            "replaced_until",
            "scoring_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"SparseEntries: {name} is {value}; it must be at least 1.")
        self._check_policy()
        self._swapped: dict[str, tuple[nn.Module, EntryLinear]] = {}
        self._scores = BatchScores()
        self._former = FormerEntries(restored=self.policy == "grow_and_prune")
        self._step = 0

    def _check_policy(self) -> None:
        if self.policy == "grow_and_prune" and self.reselect is None:
            raise BadInput(
                "SparseEntries: policy is grow_and_prune, but reselect is null, so that nothing ever grows; set "
                "reselect to the number of steps between two changes, such as 20."
            )
        if (
            self.policy == "choose"
            and self.reselect is not None
            and (Path(self.entries).is_file() or Path(self.entries).suffix in (".json", ".ckpt"))
        ):
            raise BadInput(
                f"SparseEntries: reselect is {self.reselect}, but entries is the file {self.entries}, which chooses "
                "once; set reselect to null, or policy to grow_and_prune."
            )
        if self.moments == "seeded" and not (self.reselect is not None and self._by_gradient):
            raise BadInput(
                "SparseEntries: moments is seeded, which takes the gradients that a new choice was made by; set "
                "reselect, and entries to gradient or policy to grow_and_prune, or moments to carried."
            )

    @property
    def period(self) -> int | None:
        return self.reselect

    @property
    def _by_gradient(self) -> bool:
        """True if new choices are made by gradients."""
        return self.policy == "grow_and_prune" or self.entries == "gradient"

    @property
    def _layers(self) -> dict[str, EntryLinear]:
        """The layers that train entries, by name."""
        return {name: layer for name, (_, layer) in self._swapped.items()}

    # ---- preparing

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A graph; and to choose again, gradients that are there beside the optimizer's state."""
        return frozenset({"graph"} if self.reselect is None else {"graph", "gradients"})

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        linears = self._targets(model, context.compute)
        weights = {name: linear.get_parameter("weight") for name, linear in linears.items()}
        if self.entries not in KINDS:
            self._swap(model, read_selection(Path(self.entries), weights, type(self).__name__))
        else:
            number = self._counts(model, weights)
            model.requires_grad_(False)
            self._swap(model, {name: torch.empty(0, dtype=torch.int32) for name, n in number.items() if n})
            try:
                self._look(probe, number)
                for name, layer in self._layers.items():
                    layer.choose(self._chosen(name, layer, number[name], step=0))
            except BaseException:
                self.detach(model)  # else hooks and layers without entries would stay
                raise
            self._scores.stop()
        for name, layer in self._layers.items():
            self._former.remember(name, layer)
        self._watch(1)

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        saved = state["matrices"]
        linears = self._targets(model, context.compute)
        weights = {name: linear.get_parameter("weight") for name, linear in linears.items()}
        check_selection({name: entry["index"] for name, entry in saved.items()}, weights, "the checkpoint")
        self._swap(model, {name: entry["index"] for name, entry in saved.items()})
        self._step = state["step"]
        self._watch(self._step + 1)
        for name, layer in self._layers.items():
            self._former.load(name, layer, saved[name])
            if name in self._scores.by_name:
                self._scores.by_name[name].load(saved[name], layer.index.device)

    def _targets(self, model: nn.Module, compute: Callable[..., Any]) -> dict[str, Any]:
        return entry_targets(model, self.targets, compute, type(self).__name__)

    def _counts(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
        if self.lora_rank is not None:
            return {n: min(self.lora_rank * sum(weight.shape), weight.numel()) for n, weight in weights.items()}
        return counts(weights, int(self.trainable_fraction * weight_count(model)))

    def _swap(self, model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
        model.requires_grad_(False)
        for name, index in chosen.items():
            original = model.get_submodule(name)
            layer = EntryLinear(original, index)  # pyright: ignore[reportArgumentType]
            replace(model, name, layer)
            self._swapped[name] = original, layer

    # ---- choosing

    def _look(self, probe: Probe, number: Mapping[str, int]) -> None:
        """Score what the first choice needs, on training batches."""
        if self.entries == "gradient":
            self._scores.watch_gradients(self._layers, number)
            for loss in probe(self.selection_batches):
                loss.backward()
                self._scores.end_step()
        elif self.entries == "wanda":
            self._scores.watch_inputs(self._layers)
            with torch.no_grad():
                for _ in probe(self.selection_batches):
                    self._scores.end_step()

    def _watch(self, step: int) -> None:
        """Score the batches of optimizer step `step` (from 1), if a choice soon needs them; else stop."""
        if self.reselect is None or (step - 1) % self.reselect < self.reselect - self.scoring_steps:
            return
        if self._scores.by_name:
            return
        if self._by_gradient:
            self._scores.watch_gradients(self._layers, {name: len(one.index) for name, one in self._layers.items()})
        elif self.entries == "wanda":
            self._scores.watch_inputs(self._layers)

    def _chosen(self, name: str, layer: EntryLinear, count: int, step: int) -> Tensor:
        """Return the positions of `count` entries by the method of choice, after `step` steps; alike on all ranks."""
        scores = self._scores.by_name.get(name)
        if isinstance(scores, GradientSums):
            return of_first_rank(scores.best(count))
        weight = full_tensor(layer.get_parameter("weight").detach())
        if self.entries == "random":
            values = random_scores(weight.shape, self.seed, step, name).to(weight.device)
        elif self.entries == "principal":
            rank = self.approximation_rank or max(1, round(count / sum(weight.shape)))
            values = principal_scores(weight, rank)
        elif isinstance(scores, InputNorms):
            values = scores.scores(weight, layer.transposed)
        else:
            values = weight.float().abs() if self.entries == "magnitude" else -weight.float().abs()
        return of_first_rank(top_entries(values, count))

    def _grown(self, name: str, layer: EntryLinear, step: int) -> Tensor:
        """Return the positions after SpIEL's change: those that moved least go, the largest gradients come.

        An entry that goes and would come at once stays as it is.
        """
        scores = self._scores.gradients(name)
        moved = (layer.entries.detach() - self._former.start[name]).squeeze(1).abs()
        left = 1.0 if self.replaced_until is None else max(0.0, 1 - step / self.replaced_until)
        count = int(self.replaced_share * left * len(layer.index))
        if not count:
            return layer.index
        kept = layer.index[top_entries(moved, len(moved) - count)] if count < len(moved) else layer.index[:0]
        grown = scores.best(count, ~torch.isin(scores.candidates, kept))
        return of_first_rank(torch.cat([kept, grown]).sort().values)

    # ---- training

    def scale_gradients(self, factor: Tensor) -> None:
        self._scores.scale(factor)

    def regrouped(self, optimizer: Optimizer) -> None:
        if self.moments == "seeded" and not isinstance(optimizer, torch.optim.Adam):
            raise BadInput(
                f"SparseEntries: moments is seeded, which is for Adam's moments, but the optimizer is "
                f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; set moments to carried."
            )

    def _check_moments(self, optimizer: Optimizer) -> None:
        """Refuse moments of which single ones cannot move, such as those in 8 bits with a scale for each block."""
        for layer in self._layers.values():
            for key, value in optimizer.state.get(layer.entries, {}).items():
                if not isinstance(value, Tensor) or value.shape != layer.entries.shape or not has_values(value):
                    continue
                if type(value) is not Tensor or not value.is_floating_point():
                    raise BadInput(
                        f"SparseEntries: moments is carried, but {type(optimizer).__qualname__} keeps {key} as "
                        f"{type(value).__name__} of {value.dtype}, of which single entries cannot move; set moments to "
                        "reset, or reselect to null."
                    )

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        self._scores.end_step()

    def skip_step(self) -> None:
        self._scores.skip()

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        for _, layer in self._swapped.values():
            layer.write()
        if self.reselect is None:
            return False
        if not self._step and self.moments == "carried":
            self._check_moments(optimizer)
        self._step = step
        if step % self.reselect == 0:
            for name, layer in self._layers.items() if self._scores.seen else ():
                grows = self.policy == "grow_and_prune"
                new = self._grown(name, layer, step) if grows else self._chosen(name, layer, len(layer.index), step)
                self._move(name, layer, new, optimizer)
            self._scores.stop()
        self._watch(step + 1)
        return False  # the parameters are the same objects, of the same sizes

    def _move(self, name: str, layer: EntryLinear, new: Tensor, optimizer: Optimizer) -> None:
        """Train the entries `new` (N,) from now on; values and moments of those that stay move with them."""
        weight, old = layer.get_parameter("weight"), layer.index
        if not has_values(weight):  # a planned training
            self._former.plan(name, layer)
            return
        stays, stayed = torch.isin(new, old), torch.isin(old, new)  # both are sorted, so they match in order
        self._move_moments(name, layer, new, stays, stayed, optimizer)
        values = self._former.change(name, layer, new, stays, stayed)
        values[stays] = layer.entries.detach()[stayed]
        layer.choose(new, values)

    def _move_moments(
        self, name: str, layer: EntryLinear, new: Tensor, stays: Tensor, stayed: Tensor, optimizer: Optimizer
    ) -> None:
        state = optimizer.state.get(layer.entries, {})
        if self.moments == "reset":
            optimizer.state.pop(layer.entries, None)
            return
        seeds: dict[str, Tensor] = {}
        if self.moments == "seeded" and "exp_avg" in state:
            scores = self._scores.gradients(name)
            group = next(g for g in optimizer.param_groups if any(p is layer.entries for p in g["params"]))
            pair = scores.moments(new[~stays], group["betas"], float(state["step"]))
            seeds = dict(zip(("exp_avg", "exp_avg_sq"), pair, strict=True))
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == layer.entries.shape:
                moved = torch.zeros_like(value)
                moved[stays] = value[stayed]
                if key in seeds:
                    moved[~stays] = seeds[key][:, None].to(value.dtype)
                value.copy_(moved)

    def written(self) -> Iterator[nn.Parameter]:
        for _, layer in self._swapped.values():
            yield layer.get_parameter("weight")

    # ---- what is kept

    def detach(self, model: nn.Module) -> None:
        self._scores.stop()
        for name, (original, layer) in self._swapped.items():
            layer.write()
            replace(model, name, original)
        self._swapped.clear()
        self._former.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "matrices": {name: self._state_of(name) for name in self._swapped}}

    def _state_of(self, name: str) -> dict[str, Any]:
        scores = self._scores.by_name.get(name)
        former = self._former.state_of(name)
        layer = self._swapped[name][1]
        shape = list(layer.get_parameter("weight").shape)
        return {"index": layer.index, "shape": shape, **former, **({} if scores is None else scores.state_dict())}

    def held(self) -> Any:
        """Return the state, and what is being summed for the next choice."""
        return [self.state_dict(), [scores.window for scores in self._scores.by_name.values()]]

    def describe(self) -> dict[str, Any]:
        """Return the numbers of trained entries, and of those that trained before; and the trained share by role."""
        numbers = {name: (len(layer.index), math.prod(layer.matrix.shape)) for name, layer in self._layers.items()}
        return described(numbers, self._former.left.values())
