"""The matrices in which blocks may lie: linear layers, and those of experts that share a tensor."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import Experts, decoder_layers, experts, matrix, role, target_experts, target_linears
from lit_sparse.blocks.grid import Blocks
from lit_sparse.blocks.selection import ScoreSheet
from lit_sparse.errors import BadInput

OF_ATTENTION = ("q", "k", "v", "qkv")
LEARN_MOST = ("v", "qkv", "up", "gate_up", "down")
"""What `auto` stands for. In docs/studies/which-weights.md blocks in v, up and down of a dense model learn more than in
q, k and v, as LIFT's entries do (arXiv 2506.00772). Blocks of fused experts take the gradient of a whole tensor, and
cannot be sharded: a model that has them keeps to the paper's targets."""


def shape_of(linear: nn.Module) -> Tensor:
    """Return a meta tensor of the layer's shape (out, in). A quantised weight itself is packed into another shape."""
    if isinstance(linear, nn.Linear):
        return torch.empty(linear.out_features, linear.in_features, device="meta")
    return torch.empty(matrix(linear).shape, device="meta")  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Targets:
    """The linear layers and the fused experts in which blocks may lie, by name, and the targets that chose them."""

    chosen_by: Sequence[str]
    linears: Mapping[str, nn.Linear | Conv1D]
    fused: Mapping[str, Experts]

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[str], compute: Callable[..., Any]) -> "Targets":
        """Return those that `targets` name.

        Args:
            targets: Roles, endings of names, `all` or `auto`: `LEARN_MOST`, or `OF_ATTENTION` if experts are fused.
            compute: Runs a function that uses the model, whose parameters may be sharded.

        Raises:
            BadInput: if there are none, or if fused experts among them are sharded.
        """
        if "auto" in targets:
            targets = [*(OF_ATTENTION if experts(model) else LEARN_MOST), *(t for t in targets if t != "auto")]
        fused = target_experts(model, targets)
        if sharded := [name for name, tensor in fused.items() if isinstance(tensor.parameter, DTensor)]:
            raise BadInput(
                f"trainer.strategy is fsdp2, but SMT trains no blocks of sharded fused experts, such as {sharded[0]}; "
                "give targets without them, or set trainer.strategy to ddp, where each rank has the full model."
            )
        return cls(targets, target_linears(model, targets, compute), fused)

    @property
    def shapes(self) -> dict[str, Tensor]:
        """Meta tensors of the shape (out, in) of each matrix, by name of the linear layer or expert."""
        out = {name: shape_of(linear) for name, linear in self.linears.items()}
        for name, tensor in self.fused.items():
            shape = tensor.matrix(0).detach().to("meta")
            out |= {f"{name}[{number}]": shape for number in range(len(tensor.parameter))}
        return out

    def watch(self, sheet: ScoreSheet, keep: bool) -> None:
        """Make the weights trainable, and let `sheet` score their gradients."""
        for name, linear in self.linears.items():
            linear.get_parameter("weight").requires_grad_(True)
            sheet.watch_weight(name, linear.get_parameter("weight"), isinstance(linear, Conv1D), keep)
        self.watch_fused(sheet, keep)

    def watch_fused(self, sheet: ScoreSheet, keep: bool) -> None:
        """Do so with the fused experts only."""
        for name, tensor in self.fused.items():
            tensor.parameter.requires_grad_(True)
            sheet.watch_experts(name, tensor, keep)


def by_layer(model: nn.Module, groups: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Yield the groups of modules, in parts that are each in one decoder layer.

    A layer may be sharded, or recomputed, by itself: all cross-attentions of an encoder-decoder model read what the
    encoder gives, but none may compute for another.
    """
    layer_of = {module: number for number, layer in enumerate(decoder_layers(model)) for module in layer.modules()}
    for group in groups:
        parts: dict[int, list[str]] = {}
        for name in group:
            parts.setdefault(layer_of[model.get_submodule(name)], []).append(name)
        yield from parts.values()


def trained_share(choice: Mapping[str, Blocks], shapes: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the trained share of each role's matrices that have blocks, by the number of their decoder layer.

    Args:
        choice: The trained blocks, by name of the linear layer or expert.
        shapes: Tensors of the shape (out, in) of each matrix that may have blocks. Experts without any count too.
    """
    trained: dict[tuple[str, str], int] = {}
    weights: dict[tuple[str, str], int] = {}
    fused = {name.partition("[")[0] for name in choice if "[" in name}
    for name in (name for name in shapes if name in choice or name.partition("[")[0] in fused):
        number = re.search(r"\.(\d+)\.", name)
        place = number[1] if number else "", role(name)
        trained[place] = trained.get(place, 0) + (choice[name].numel(shapes[name]) if name in choice else 0)
        weights[place] = weights.get(place, 0) + shapes[name].numel()
    out: dict[str, dict[str, float]] = {}
    for (layer, what), count in trained.items():
        out.setdefault(layer, {})[what] = count / weights[layer, what]
    return out
