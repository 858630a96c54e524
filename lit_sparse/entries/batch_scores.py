"""Scores of entries that are summed over training batches, watched in the layers that train the entries."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_sparse.entries.linear import EntryLinear
from lit_sparse.entries.scores import CANDIDATES, GradientSums, InputNorms


class BatchScores:
    """Scores of the entries of some layers, summed while a choice is ahead.

    Attributes:
        by_name: The scores of each layer that is watched; empty while none is.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, GradientSums | InputNorms] = {}
        self._layers: list[EntryLinear] = []
        self._hooks: list[RemovableHandle] = []

    def watch_gradients(self, layers: Mapping[str, EntryLinear], number: Mapping[str, int]) -> None:
        """Sum the gradients of `CANDIDATES` entries for each of the `number` that a layer trains."""
        for name, layer in layers.items():
            count = min(CANDIDATES * number[name], layer.get_parameter("weight").numel())
            sums = GradientSums(count, layer.index.device)
            layer.observe, self.by_name[name] = sums.add, sums
            self._layers.append(layer)

    def watch_inputs(self, layers: Mapping[str, EntryLinear]) -> None:
        """Sum the squares of the layers' inputs."""
        for name, layer in layers.items():
            norms = self.by_name[name] = InputNorms()

            def add(module: nn.Module, args: tuple[Tensor, ...], norms: InputNorms = norms) -> None:
                if module.training:  # not in an evaluation
                    norms.add(args[0])

            self._hooks.append(layer.register_forward_pre_hook(add))

    def stop(self) -> None:
        """Watch no layer any more, and drop the scores."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.observe = None
        self._hooks.clear()
        self._layers.clear()
        self.by_name.clear()

    def end_step(self) -> None:
        """Take what was added since the last step as one step's. Every rank must call it."""
        for scores in self.by_name.values():
            scores.end_step()

    def skip(self) -> None:
        """Drop what was added since the last step."""
        for scores in self.by_name.values():
            scores.skip()

    @property
    def seen(self) -> bool:
        """False if layers are watched and no step was seen: all were skipped. Of some, no token may have been there."""
        return not self.by_name or any(scores.steps for scores in self.by_name.values())

    def scale(self, factor: Tensor) -> None:
        """Multiply by `factor` the gradients that were added since the last step."""
        for scores in self.by_name.values():
            if isinstance(scores, GradientSums):
                scores.scale(factor)

    def gradients(self, name: str) -> GradientSums:
        """Return the sums of a layer whose gradients are watched."""
        scores = self.by_name[name]
        assert isinstance(scores, GradientSums), "the inputs are watched"
        return scores
