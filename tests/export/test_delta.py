"""A delta is applied to its base and removed again, bit for bit, and to no other model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_sparse.anatomy import linears, matrix
from lit_sparse.blocks.grid import Blocks
from lit_sparse.blocks.selection import random_scores, top_blocks
from lit_sparse.checkpoints import fingerprint
from lit_sparse.errors import BadInput
from lit_sparse.export.delta import FORMAT, ChangedBlocks, ChangedEntries, ChangedParameter, Delta, checksum
from lit_sparse.testing import TINY, tiny_llm

SIZE = (16, 24)
"""Blocks of which the last of a row or column is ragged in every tiny model."""


def made_of(model: PreTrainedModel, seed: int = 1) -> Delta:
    """A delta with blocks of two linear layers and two whole parameters (the embedding, tied in some models)."""
    torch.manual_seed(seed)
    layers = dict(list(linears(model).items())[:2])
    shapes = {name: (-(-m.shape[0] // SIZE[0]), -(-m.shape[1] // SIZE[1])) for name, m in matrices(layers).items()}
    chosen = top_blocks(random_scores(shapes, seed), SIZE, 5, "global")
    blocks = tuple(
        ChangedBlocks(name, chosen[name], moved(chosen[name].read(weight), chosen[name].read(torch.ones_like(weight))))
        for name, weight in matrices(layers).items()
    )
    first = next(name for name, p in model.named_parameters() if p is embedding(model))
    norm = [name for name, p in model.named_parameters() if p.ndim == 1][-1]
    whole = tuple(ChangedParameter(name, moved(model.get_parameter(name).detach())) for name in (first, norm))
    layer = list(linears(model))[2]
    weight = model.get_submodule(layer).weight.detach()
    after = weight.float().clone()
    after.view(-1)[::7] += 0.1
    entries = ChangedEntries.between(f"{layer}.weight", weight.float(), after)
    return Delta("tiny", fingerprint(model), ("SMT",), (*blocks, entries, *whole))


def tiny(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    return tiny_llm(kind).to(dtype)  # pyright: ignore[reportArgumentType]


def embedding(model: PreTrainedModel) -> nn.Parameter:
    return model.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


def matrices(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {name: matrix(layer).detach() for name, layer in layers.items()}  # pyright: ignore[reportArgumentType]


def moved(values: Tensor, within: Tensor | None = None) -> Tensor:
    """Return fp32 values nearby; unchanged where `within` is 0, past the edge of a weight."""
    noise = 0.1 * torch.randn(values.shape)
    return values.float() + (noise if within is None else noise * within)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    def bits(x: Tensor) -> Tensor:
        return x.view(torch.uint8)

    return left.keys() == right.keys() and all(torch.equal(bits(left[name]), bits(right[name])) for name in left)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TINY)
def test_goes_on_and_comes_off(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(kind, dtype)
    embedding(model).data[0, 0] = -0.0  # bits, not values
    before, outputs = weights(model), logits(model)
    made_of(model).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    delta.apply(model)
    now = weights(model)
    for change in delta.changes:
        target = change.target(model)
        assert torch.equal(change.read(target).float(), change.values.to(dtype).float())
        layer = isinstance(change, ChangedBlocks)
        name = f"{change.name}.weight" if layer else change.name
        same = (before[name] == now[name]).sum()
        if layer:  # nothing outside the blocks moved, and most inside did
            inside = change.blocks.numel(target)
            assert now[name].numel() - inside <= same < now[name].numel() - inside // 2
    changed = {change.name.removesuffix(".weight") for change in delta.changes} | {"lm_head"}
    assert all(torch.equal(before[n], now[n]) for n in before if n.removesuffix(".weight") not in changed)
    assert not torch.equal(logits(model), outputs)
    delta.remove(model)
    assert same_bits(weights(model), before)
    assert torch.equal(logits(model), outputs)


def test_tied_weights_stay_tied() -> None:
    model = tiny_llm("qwen2")
    delta = made_of(model)
    with delta.applied(model):
        whole = next(change for change in delta.changes if isinstance(change, ChangedParameter))
        assert torch.equal(model.get_parameter("lm_head.weight"), whole.values)
        assert model.get_parameter("lm_head.weight") is embedding(model)


def test_comes_off_after_an_error() -> None:
    model = tiny_llm()
    before = weights(model)
    with pytest.raises(KeyError), made_of(model).applied(model):
        raise KeyError
    assert same_bits(weights(model), before)


def test_goes_on_two_models_at_a_time_and_on_again() -> None:
    first, second = tiny_llm(), tiny_llm()
    before, delta = weights(first), made_of(first)
    with delta.applied(first), delta.applied(second):
        assert same_bits(weights(first), weights(second))
    delta.apply(first)
    delta.remove(first)
    assert same_bits(weights(first), before)
    assert same_bits(weights(second), before)


def test_made_of_another_precision_of_the_base() -> None:
    delta = made_of(tiny_llm())
    model = tiny("llama", torch.bfloat16)
    before = weights(model)
    delta.apply(model)
    delta.remove(model)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("other", [tiny_llm("llama", seed=1), tiny_llm("gpt2")], ids=["weights", "architecture"])
def test_refuses_another_base(other: PreTrainedModel) -> None:
    delta, before = made_of(tiny_llm()), weights(other)
    with pytest.raises(BadInput, match=r"made of tiny .* apply it to the unchanged tiny"):
        delta.apply(other)
    assert same_bits(weights(other), before)


def test_refuses_a_second_delta_and_taking_off_what_is_not_on() -> None:
    model = tiny_llm()
    # So small that the fingerprint, which is of bf16 values, does not see it.
    name = "model.layers.0.self_attn.q_proj.weight"
    small = ChangedParameter(name, model.get_parameter(name).detach() * (1 + 1e-6))
    delta, other = (Delta("tiny", fingerprint(model), (), (small,)) for _ in range(2))
    with pytest.raises(BadInput, match="nothing to take off"):
        delta.remove(model)
    delta.apply(model)
    for again in (delta, other):
        with pytest.raises(BadInput, match="applied to this model already"):
            again.apply(model)
    with pytest.raises(BadInput, match="nothing to take off"):
        other.remove(model)
    delta.remove(model)


def test_refuses_to_come_off_trained_weights() -> None:
    model = tiny_llm()
    delta = made_of(model)
    delta.apply(model)
    with torch.no_grad():
        delta.changes[1].target(model).mul_(1.5)
    before = weights(model)
    with pytest.raises(BadInput, match=f"{delta.changes[1].name} is no longer what the delta wrote"):
        delta.remove(model)
    assert same_bits(weights(model), before)


Q = "model.layers.0.self_attn.q_proj"
UNFIT = {
    "unknown layer": (ChangedBlocks("model.nowhere", Blocks((8, 8), torch.tensor([[0, 0]])), torch.ones(1, 8, 8))),
    "no linear layer": (ChangedBlocks("model.norm", Blocks((8, 8), torch.tensor([[0, 0]])), torch.ones(1, 8, 8))),
    "block outside": (ChangedBlocks(Q, Blocks((8, 8), torch.tensor([[4, 0]])), torch.ones(1, 8, 8))),
    "block below": (ChangedBlocks(Q, Blocks((8, 8), torch.tensor([[0, -1]])), torch.ones(1, 8, 8))),
    "values too few": (ChangedBlocks(Q, Blocks((8, 8), torch.tensor([[0, 0]])), torch.ones(1, 8, 4))),
    "entries of nothing": (ChangedEntries("model.nowhere", torch.tensor([0]), torch.ones(1))),
    "entry outside": (ChangedEntries(f"{Q}.weight", torch.tensor([32 * 32]), torch.ones(1))),
    "entry below": (ChangedEntries(f"{Q}.weight", torch.tensor([-1]), torch.ones(1))),
    "unknown parameter": (ChangedParameter("model.nowhere.weight", torch.ones(3))),
    "other shape": (ChangedParameter(f"{Q}.weight", torch.ones(32, 16))),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_refuses_what_does_not_fit(change: ChangedBlocks | ChangedEntries | ChangedParameter) -> None:
    model = tiny_llm()
    before = weights(model)
    fits = ChangedParameter("model.norm.weight", torch.zeros(32))
    with pytest.raises(BadInput, match=r"made for\.$") as refusal:
        Delta("tiny", fingerprint(model), (), (fits, change)).apply(model)
    assert change.name in str(refusal.value)
    assert same_bits(weights(model), before)


def test_file_says_what_it_is(tmp_path: Path) -> None:
    delta = made_of(tiny_llm())
    delta.save(tmp_path / "one")
    delta.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = Delta.load(tmp_path / "one")
    assert (again.base, again.base_fingerprint, again.updates) == ("tiny", delta.base_fingerprint, ("SMT",))
    assert {change.name for change in again.changes} == {change.name for change in delta.changes}


def test_empty_delta(tmp_path: Path) -> None:
    model = tiny_llm()
    Delta("tiny", fingerprint(model), (), ()).save(tmp_path / "delta")
    before = weights(model)
    with Delta.load(tmp_path / "delta").applied(model):
        assert same_bits(weights(model), before)


def rewrite(path: Path, **fields: Any) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    save_file(load_file(path), path, {FORMAT: json.dumps(header | fields)})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)


def rename_the_base(path: Path) -> None:
    rewrite(path, base="other")


def from_the_future(path: Path) -> None:
    rewrite(path, version=7)


def strip_the_metadata(path: Path) -> None:
    save_file(load_file(path), path)


DAMAGE = {
    truncate: "cannot be read as a delta",
    empty: "cannot be read as a delta",
    flip_a_bit: "is damaged",
    rename_the_base: "is damaged",
    from_the_future: "version 7, this lit_sparse reads version 1",
    strip_the_metadata: "is a safetensors file, but no delta",
    Path.unlink: "there is no delta",
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_refuses_a_damaged_file(damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    made_of(tiny_llm()).save(path)
    damage(path)
    with pytest.raises(BadInput, match=sentence) as refusal:
        Delta.load(path)
    assert "\n" not in str(refusal.value)


def forge(change: Callable[[dict[str, Any], dict[str, Tensor]], object], path: Path) -> None:
    """Write a delta that was changed, and signed again."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    tensors, header = load_file(path), {key: value for key, value in header.items() if key != "sha256"}
    change(header, tensors)
    save_file(tensors, path, {FORMAT: json.dumps(header | {"sha256": checksum(header, tensors)})})


def part(tensors: dict[str, Tensor], kind: str) -> str:
    return next(key for key in sorted(tensors) if key.startswith(f"{kind}/"))


def put(kind: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any, dict[str, Tensor]], object]:
    return lambda header, tensors: tensors.update({part(tensors, kind): change(tensors[part(tensors, kind)])})


def not_a_number(values: Tensor) -> Tensor:
    values.flatten()[0] = torch.nan
    return values


FORGED: dict[str, tuple[Callable[[Any, dict[str, Tensor]], object], str]] = {
    "nan": (put("values", not_a_number), "is not finite"),
    "infinite": (put("whole", lambda x: x / 0), "is not finite"),
    "complex": (put("whole", lambda x: x + 0j), "complex64, and not torch.float32"),
    "half": (put("values", Tensor.half), "float16, and not torch.float32"),
    "float index": (put("index", Tensor.float), "float32, and not torch.int32"),
    "flat index": (put("index", Tensor.flatten), "have the shapes"),
    "another shape": (put("values", lambda x: x[:, :3].clone()), "have the shapes"),
    "twice": (put("index", lambda x: x[:1].repeat(len(x), 1)), "is there twice"),
    "unknown": (lambda header, tensors: tensors.update(other=torch.ones(2)), "other is a tensor that belongs to no"),
    "no values": (lambda header, tensors: tensors.pop(part(tensors, "values")), "is not there"),
    "block and whole": (
        lambda header, tensors: tensors.update({f"whole/{min(header['block_sizes'])}.weight": torch.ones(2)}),
        "is changed twice",
    ),
    "more keys": (lambda header, tensors: header.update(run="rm"), "its header has the keys"),
    "no base": (lambda header, tensors: header.pop("base"), "its header has the keys"),
    "a number for the base": (lambda header, tensors: header.update(base=3), "its base is 3"),
    "a text of updates": (lambda header, tensors: header.update(updates="SMT"), "its updates is 'SMT'"),
    "numbers of updates": (lambda header, tensors: header.update(updates=[1]), "its updates are no names"),
    "a list of sizes": (lambda header, tensors: header.update(block_sizes=[]), "its block_sizes is"),
    "a size of nothing": (
        lambda header, tensors: header.update(block_sizes={name: [0, 4] for name in header["block_sizes"]}),
        "the block size of",
    ),
    "true for a version": (lambda header, tensors: header.update(version=True), "its version is True"),
}


@pytest.mark.parametrize(("change", "sentence"), FORGED.values(), ids=FORGED)
def test_refuses_what_export_does_not_write_also_when_it_is_signed(
    change: Callable[[Any, dict[str, Tensor]], object], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "delta.safetensors"
    made_of(tiny_llm()).save(path)
    forge(change, path)
    with pytest.raises(BadInput, match=sentence):
        Delta.load(path)


@pytest.mark.parametrize("text", ["3", "[]", '"x"', "null", "[" * 9999, "{"])
def test_refuses_a_header_that_is_no_object(text: str, tmp_path: Path) -> None:
    save_file({"whole/a": torch.ones(2)}, tmp_path / "delta", {FORMAT: text})
    with pytest.raises(BadInput, match="delta"):
        Delta.load(tmp_path / "delta")
