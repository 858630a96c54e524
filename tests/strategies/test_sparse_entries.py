"""Single trained entries against masked dense training, brute-force choices and hand-made moments."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.tiny_models import FAMILIES
from lit_sparse.anatomy import linears, weight_count
from lit_sparse.blocks.principal import principal_scores
from lit_sparse.entries.linear import EntryLinear, read_entries, write_entries
from lit_sparse.entries.scores import GradientSums, InputNorms, top_entries
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, trainable
from lit_sparse.strategies import SparseEntries, Updates
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, tiny_llm
from tests.methods import data, module, trainer
from tests.strategies.test_smt import loss_of, probe_of

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
ENTRIES = {"trainable_fraction": 0.05, "selection_batches": 2}


def attached(kind="llama", dtype=torch.float32, probe=None, **options):
    model = tiny_llm(kind).to(dtype).train()
    strategy = SparseEntries(**{**ENTRIES, **options})
    strategy.attach(model, probe or probe_of(model), ALONE)
    return model, strategy


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, EntryLinear)}


def positions(model):
    return {name: layer.index.clone() for name, layer in layers_of(model).items()}


def masks_of(model):
    return {
        name: torch.zeros(layer.weight.numel(), dtype=torch.bool).index_fill_(0, layer.index.long(), True)
        for name, layer in layers_of(model).items()
    }


# ---- the layer


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_entries_of_the_dense_ones(kind, dtype):
    model, _ = attached(kind, dtype, entries="random", trainable_fraction=0.2)
    dense = tiny_llm(kind).to(dtype).train()
    for one in (model, dense):
        loss_of(one).backward()
    for name, layer in layers_of(model).items():
        expected = dense.get_submodule(name).weight.grad.flatten()[layer.index.long()]
        assert torch.equal(layer.entries.grad.squeeze(1), expected.to(layer.entries.dtype)), name


def test_input_gradient_is_the_dense_one():
    for dense in (nn.Linear(24, 16), Conv1D(16, 24)):
        sparse = EntryLinear(copy.deepcopy(dense).requires_grad_(False), torch.tensor([3, 5]))
        x, y = (torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
        dense(x).square().sum().backward()
        sparse(y).square().sum().backward()
        assert torch.equal(x.grad, y.grad)


def test_entries_are_read_and_written_where_they_are():
    weight = torch.arange(12.0).view(4, 3).t()  # of any strides
    index = torch.tensor([1, 7, 11], dtype=torch.int32)
    assert read_entries(weight, index).squeeze(1).tolist() == weight.flatten()[index.long()].tolist()
    write_entries(weight, index, torch.tensor([[-1.0], [-2.0], [-3.0]]))
    assert weight.flatten()[index.long()].tolist() == [-1, -2, -3]
    assert (weight < 0).sum() == 3


# ---- training


@pytest.mark.parametrize("kind", TINY)
def test_a_fit_equals_a_masked_dense_one(kind):
    """With weight decay and momentum; in fp64, since fused AdamW rounds by an entry's place within a vector."""
    sparse, _ = attached(kind, entries="random")
    masks = masks_of(sparse)
    dense = tiny_llm(kind).double().train().requires_grad_(False)
    weights = [dense.get_submodule(name).weight.requires_grad_(True) for name in masks]
    updates = Updates([SparseEntries(**ENTRIES, entries="random")])
    model = tiny_llm(kind).double().train()
    updates.attach(model, no_probe)
    ours, theirs = updates.optimizer(1e-2), AdamW(weights, lr=1e-2)
    assert any(group["weight_decay"] for group in ours.param_groups if group["params"])
    for seed in range(4):
        updates.step(seed + 1, ours, lambda seed=seed: loss_of(model, seed))
        loss_of(dense, seed).backward()
        theirs.masks = {weight: mask.view(weight.shape) for weight, mask in zip(weights, masks.values(), strict=True)}
        theirs.step()
        theirs.zero_grad()
    updates.detach(model)
    base = dict(tiny_llm(kind).double().named_parameters())
    for (name, value), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=1e-15, msg=lambda text, n=name: n + text)
        if name.removesuffix(".weight") in masks:
            still = ~masks[name.removesuffix(".weight")].view(value.shape)
            assert torch.equal(value[still], base[name][still]), name


def test_all_entries_train_as_the_dense_matrices():
    every = {"entries": "magnitude", "lora_rank": 1000}
    model, strategy = attached(dtype=torch.float64, **every)
    assert all(len(layer.index) == layer.weight.numel() for layer in layers_of(model).values())
    dense = tiny_llm().double().train().requires_grad_(False)
    for linear in linears(dense).values():
        linear.weight.requires_grad_(True)
    ours, theirs = (torch.optim.AdamW([p for _, p in trainable(one)], lr=1e-2) for one in (model, dense))
    for seed in range(3):
        for one, optimizer in ((model, ours), (dense, theirs)):
            loss_of(one, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        strategy.after_step(seed + 1, ours)
    strategy.detach(model)
    for (name, value), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)


def test_state_is_of_the_entries_only():
    """16 bytes a trained entry with its gradient, and 4 for its position."""
    model, strategy = attached()
    updates = Updates([strategy])
    updates.follow(model)
    optimizer = updates.optimizer(1e-3)
    loss_of(model).backward()
    assert all(layer.weight.grad is None for layer in layers_of(model).values())
    optimizer.step()
    entries = strategy.describe()["entries"]
    assert entries == int(0.05 * weight_count(tiny_llm()))
    parameters = [parameter for _, parameter in trainable(model)]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert sum(t.nbytes for t in (*parameters, *(p.grad for p in parameters), *moments)) == 16 * entries
    kept = [entry["index"] for entry in strategy.state_dict()["matrices"].values()]
    assert sum(index.nbytes for index in kept) == 4 * entries
    assert {index.dtype for index in kept} == {torch.int32}


# ---- the first choice


def brute_force(scores, count):
    """The largest, ties to the lower position."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


def test_top_entries_with_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (7, 9), generator=generator).float()
    for count in range(1, scores.numel() + 1):
        assert top_entries(scores, count).tolist() == brute_force(scores.flatten().tolist(), count)
    with pytest.raises(BadInput, match="not finite"):
        top_entries(torch.tensor([1.0, float("nan")]), 1)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_principal_scores_are_of_the_exact_svd(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    for rank in (1, 3, 11):
        exact = np.abs(u[:, :rank] * s[:rank] @ v[:rank])
        np.testing.assert_allclose(principal_scores(weight, rank).numpy(), exact, atol=1e-12)
    assert torch.equal(principal_scores(weight, 12), weight.abs())


@pytest.mark.parametrize("kind", TINY)
def test_each_kind_chooses_the_largest_scores(kind):
    base = tiny_llm(kind).train()
    loss_of(base).backward()
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1)))
        for name, layer in linears(base).items()
    ]
    loss_of(base)
    for hook in hooks:
        hook.remove()

    def scores(name, layer, count):
        weight = layer.weight.detach()
        norms = inputs[name].norm(dim=0)
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        rank = max(1, round(count / sum(weight.shape)))
        return {
            "magnitude": weight.abs(),
            "smallest": -weight.abs(),
            "gradient": layer.weight.grad.abs(),
            "wanda": weight.abs() * (norms[:, None] if isinstance(layer, Conv1D) else norms),
            "principal": (u[:, :rank] * s[:rank] @ v[:rank]).abs(),
        }

    for entries in ("magnitude", "smallest", "gradient", "wanda", "principal"):
        model, _ = attached(kind, entries=entries, selection_batches=1)
        for name, index in positions(model).items():
            wanted = scores(name, linears(base)[name], len(index))[entries].flatten()
            chosen = torch.zeros(len(wanted), dtype=torch.bool).index_fill_(0, index.long(), True)
            slack = 1e-6 * wanted.abs().max()  # for sums in another order
            assert wanted[chosen].min() >= wanted[~chosen].max() - slack, (entries, name)


def test_gradients_are_summed_with_their_signs():
    """|sum g|, not sum |g|: an entry whose gradients cancel is not chosen (SPEFT)."""
    sums = GradientSums(3, torch.device("cpu"))
    for first in (1.0, -1.0):
        sums.add(torch.tensor([[5 * first, 1.0], [0.5, 0.1]]))
        sums.end_step()
    assert sums.candidates.tolist() == [0, 1, 2]
    assert sums.best(2).tolist() == [1, 2]


def test_random_entries_are_of_seed_and_step():
    chosen = [positions(attached(entries="random", seed=seed)[0]) for seed in (0, 0, 1)]
    name = next(iter(chosen[0]))
    assert torch.equal(chosen[0][name], chosen[1][name])
    assert not torch.equal(chosen[0][name], chosen[2][name])


def test_as_many_as_a_lora_has():
    model, _ = attached(entries="magnitude", lora_rank=2)
    assert all(len(layer.index) == 2 * sum(layer.weight.shape) for layer in layers_of(model).values())


NO_INDEX = [[0.5], [True], [1, True], [2**32], [2**40], [10**30], [-1], [[1]], None, "1", 1]


def test_a_selection_is_read_from_a_file(tmp_path):
    name = next(iter(linears(tiny_llm())))
    shape = list(linears(tiny_llm())[name].weight.shape)
    (tmp_path / "chosen.json").write_text(json.dumps({"matrices": {name: {"index": [7, 3], "shape": shape}}}))
    model, _ = attached(probe=no_probe, entries=str(tmp_path / "chosen.json"))
    assert {name: index.tolist() for name, index in positions(model).items()} == {name: [3, 7]}
    for text, message in {
        "no": "no choice of entries could be read",
        json.dumps({"matrices": {"head": {"index": [1]}}}): "not among the",
        json.dumps({"matrices": {name: {"index": [10**6]}}}): "outside the",
        json.dumps({"matrices": {name: {"index": []}}}): "selects no entry",
        json.dumps({"matrices": {name: {"index": [1], "shape": [9, 9]}}}): "was made for another model: its model.lay",
        **{json.dumps({"matrices": {name: {"index": index}}}): "whole numbers" for index in NO_INDEX},
        f'{{"matrices": {{"{name}": {{"index": [1]}}, "{name}": {{"index": [2]}}}}}}': "is there twice",
        '{"matrices":' * 9000 + "1" + "}" * 9000: "nested too deeply",
    }.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(BadInput, match=message):
            attached(probe=no_probe, entries=str(tmp_path / "bad.json"))


def test_a_failed_choice_leaves_the_model_as_it_was():
    model, base = tiny_llm(), tiny_llm()
    with pytest.raises(BadInput, match="training batches are needed"):
        SparseEntries(entries="gradient").attach(model, no_probe, ALONE)
    assert [type(one) for one in model.modules()] == [type(one) for one in base.modules()]


# ---- choosing again


def trained(steps, dtype=torch.float32, **options):
    """A model, its strategy and its optimizer after some steps, and the entries of the steps before the last."""
    model = tiny_llm().to(dtype).train()
    updates = Updates([SparseEntries(**{**ENTRIES, **options})])
    updates.attach(model, probe_of(model))
    optimizer = updates.optimizer(1e-2)
    history = [positions(model)]
    for step in range(1, steps + 1):
        updates.step(step, optimizer, lambda step=step: loss_of(model, step))
        history.append(positions(model))
    return model, updates, optimizer, history


@pytest.mark.parametrize("entries", ["principal", "gradient", "wanda", "random"])
def test_moments_and_masters_move_with_entries_that_stay(entries):
    options = {"entries": entries, "reselect": 3, "dtype": torch.bfloat16}
    before, _, then, _ = trained(2, **options)
    loss_of(before, 3).backward()  # the third step, without the choice after it
    then.step()
    after, _, now, history = trained(3, **options)
    stayed = left = 0
    for name, layer in layers_of(after).items():
        old, earlier = history[0][name], before.get_submodule(name)
        stays, was = torch.isin(layer.index, old), torch.isin(old, layer.index)
        for key in ("exp_avg", "exp_avg_sq"):
            ours, theirs = now.state[layer.entries][key], then.state[earlier.entries][key]
            assert torch.equal(ours[stays], theirs[was])
            assert not ours[~stays].any()
        assert torch.equal(layer.entries[stays], earlier.entries[was])  # fp32, which bf16 weights do not hold
        assert now.state[layer.entries]["step"] == 3
        stayed, left = stayed + int(stays.sum()), left + int((~stays).sum())
    assert left
    assert stayed


def test_moments_can_be_reset():
    model, _, optimizer, _ = trained(2, entries="random", reselect=2, moments="reset")
    assert not any(optimizer.state.get(layer.entries) for layer in layers_of(model).values())


def test_entries_that_leave_keep_their_value_and_are_saved():
    model, updates, _, history = trained(7, entries="random", reselect=2)
    base = dict(linears(tiny_llm()))
    state = updates.state_dict()[0]["state"]
    again = tiny_llm().train()
    restored = Updates([SparseEntries(**ENTRIES, entries="random", reselect=2)])
    restored.restore(again, updates.state_dict())
    for name, layer in layers_of(model).items():
        ever = torch.cat([chosen[name] for chosen in history]).unique()
        entry = state["matrices"][name]
        assert torch.equal(torch.cat([entry["index"], entry["left"]["positions"]]).sort().values, ever)
        moved = (layer.weight != base[name].weight).flatten().nonzero().squeeze(1)
        assert set(moved.tolist()) <= set(ever.tolist())
        left = entry["left"]["positions"].long()
        assert torch.equal(again.get_submodule(name).weight.flatten()[left], layer.weight.flatten()[left])
    assert updates[0].describe()["left"] == sum(len(entry["left"]["positions"]) for entry in state["matrices"].values())


def numpys_change(index, values, start, candidates, sums, count):
    """SpIEL's change in NumPy: the new positions."""
    moved = np.abs(np.subtract(values, start))
    keep = sorted(sorted(range(len(index)), key=lambda n: (-moved[n], n))[: len(index) - count])
    kept = [index[n] for n in keep]
    pool = [n for n in range(len(candidates)) if candidates[n] not in kept]
    grown = sorted(pool, key=lambda n: (-abs(sums[n]), n))[:count]
    return sorted(kept + [candidates[n] for n in grown])


def test_grow_and_prune_is_spiels(monkeypatch):
    """The positions are NumPy's; what is dropped is the base's again; newcomers' first steps are of the usual size."""
    seen = {}
    whole = SparseEntries._grown

    def watched(self, name, layer, step):
        scores = self._scores.by_name[name]
        new = whole(self, name, layer, step)
        started = self._former.start[name].squeeze(1)
        arrays = (layer.index, layer.entries.detach().squeeze(1), started, scores.candidates)
        count = int(self.replaced_share * len(layer.index))
        wanted = numpys_change(*(a.numpy().tolist() for a in arrays), scores.sums.tolist(), count)
        assert new.tolist() == wanted
        mean, square = scores.sums / scores.steps, scores.squares / scores.steps
        assert scores.steps == 2
        seen[name] = dict(
            zip(scores.candidates.tolist(), zip(mean.tolist(), square.tolist(), strict=True), strict=True)
        )
        return new

    monkeypatch.setattr(SparseEntries, "_grown", watched)
    options = {"entries": "gradient", "reselect": 4, "policy": "grow_and_prune", "scoring_steps": 2}
    model, updates, optimizer, history = trained(4, **options, moments="seeded", replaced_share=0.5)
    base, changed = dict(linears(tiny_llm())), 0
    for name, layer in layers_of(model).items():
        old, new = history[0][name], layer.index
        dropped, fresh = old[~torch.isin(old, new)].long(), ~torch.isin(new, old)
        assert torch.equal(layer.weight.flatten()[dropped], base[name].weight.flatten()[dropped])
        assert len(new) == len(old) == len(new.unique())
        state = optimizer.state[layer.entries]
        for place in fresh.nonzero().flatten().tolist():
            mean, square = seen[name][int(new[place])]
            torch.testing.assert_close(float(state["exp_avg"][place]), mean * (1 - 0.9**4), rtol=1e-5, atol=1e-12)
            torch.testing.assert_close(float(state["exp_avg_sq"][place]), square * (1 - 0.999**4), rtol=1e-5, atol=0.0)
        changed += int(fresh.sum())
    assert changed
    assert updates[0].describe()["left"] == 0
    before = {name: layer.entries.detach().clone() for name, layer in layers_of(model).items()}
    updates.step(5, optimizer, lambda: loss_of(model, 5))
    moved = max(float((layer.entries.detach() - before[name]).abs().max()) for name, layer in layers_of(model).items())
    assert moved < 2.5e-2  # lr is 1e-2; with moments of zero a first step is up to three times as large


def test_an_entry_that_goes_after_several_changes_gets_the_bases_value_back():
    """In fp32, where masters and the base's values have one dtype."""
    options = {"entries": "gradient", "policy": "grow_and_prune", "reselect": 2, "replaced_share": 0.5}
    model, *_, history = trained(8, **options)
    base, masks, late = dict(linears(tiny_llm())), masks_of(model), 0
    for name, layer in layers_of(model).items():
        weight, start = (linear.weight.flatten()[~masks[name]] for linear in (layer, base[name]))
        assert torch.equal(weight, start), name
        changes = [index[name] for index in history[::2]]
        late += int((torch.isin(changes[0], changes[1]) & ~torch.isin(changes[0], changes[-1])).sum())
    assert late, "no entry stayed at a change and went at a later one"


def test_the_replaced_share_falls_to_zero():
    options = {"entries": "gradient", "policy": "grow_and_prune", "reselect": 2, "replaced_until": 4}
    _, _, _, history = trained(6, **options, replaced_share=1.0)
    changes = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(history)]
    assert changes == [False, True, False, False, False, False]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_choice_by_gradients_is_of_the_whole_step(accumulate, tmp_path):
    """With accumulation the sums are of the window's micro-batches; an evaluation in between does not count."""
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    updates = [{"class_path": "SparseEntries", "init_args": {**ENTRIES, "entries": "gradient", "reselect": 2}}]
    made = [module("full", tmp_path / "base", updates=copy.deepcopy(updates), lr=1e-3) for _ in range(2)]
    for task, options in zip(made, ({}, {"val_check_interval": accumulate}), strict=True):
        fit = trainer(3, accumulate_grad_batches=accumulate, num_sanity_val_steps=0, **options)
        fit.fit(task, datamodule=data(batch_size=2))
    for name, index in positions(made[0].build()).items():
        assert torch.equal(index, positions(made[1].build())[name])


def test_a_run_resumes_within_the_scored_steps(tmp_path):
    """From a checkpoint between two scored steps, whose sums it holds."""
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    fields = {**ENTRIES, "policy": "grow_and_prune", "reselect": 2, "scoring_steps": 2, "moments": "seeded"}
    make = lambda: module(  # noqa: E731
        "full", tmp_path / "base", lr=1e-2, updates=[{"class_path": "SparseEntries", "init_args": dict(fields)}]
    )
    straight, resumed = make(), make()
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(5, callbacks=[keep], enable_checkpointing=True).fit(straight, datamodule=data())
    resumed.resume_from = tmp_path / "ckpt" / "step=3.ckpt"
    saved = torch.load(resumed.resume_from, weights_only=True)["lit_sparse"]["updates"][0]["state"]["matrices"]
    assert all("sums" in entry for entry in saved.values())
    trainer(5).fit(resumed, datamodule=data(), ckpt_path=resumed.resume_from)
    for (name, value), expected in zip(resumed.build().named_parameters(), straight.build().parameters(), strict=True):
        assert torch.equal(value, expected), name
    for name, index in positions(straight.build()).items():
        assert torch.equal(index, positions(resumed.build())[name])


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_fraction": 0.0}, "trainable_fraction is 0.0; it must be above 0"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"reselect": 0}, "reselect is 0"),
        ({"scoring_steps": 0}, "scoring_steps is 0"),
        ({"policy": "grow_and_prune"}, "set reselect to the number of steps"),
        ({"entries": "mine.json", "reselect": 5}, "chooses once; set reselect to null"),
        ({"moments": "seeded"}, "set reselect, and entries to gradient"),
        ({"moments": "seeded", "reselect": 5}, "set reselect, and entries to gradient"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        SparseEntries(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entries": "nowhere.json"}, "no choice of entries could be read from nowhere.json"),
        ({"entries": "magnitudes", "reselect": 2}, "no choice of entries could be read from magnitudes .* magnitude"),
        ({"trainable_fraction": 0.9}, "but the targets have"),
        ({"trainable_fraction": 1e-9}, "larger trainable_fraction"),
        ({"targets": ["nothing"]}, "no linear layer"),
    ],
)
def test_a_choice_that_the_model_does_not_have_is_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        attached(**fields)


def test_seeds_need_adams_moments():
    model, strategy = attached(entries="gradient", reselect=2, moments="seeded")
    with pytest.raises(BadInput, match=r"the optimizer is torch\.optim\.sgd\.SGD; set moments to carried"):
        strategy.regrouped(torch.optim.SGD([p for _, p in trainable(model)], lr=1.0))


def test_moments_of_which_single_ones_cannot_move_are_refused_before_the_first_change():
    model, strategy = attached(entries="magnitude", reselect=4)
    layer = next(iter(layers_of(model).values()))
    optimizer = AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    optimizer.state[layer.entries]["state1"] = torch.zeros(
        layer.entries.shape, dtype=torch.uint8
    )  # bitsandbytes' codes
    with pytest.raises(BadInput, match=r"keeps state1 as Tensor of torch\.uint8, of which single entries cannot move"):
        strategy.after_step(1, optimizer)


@pytest.mark.parametrize(
    "options",
    [{"entries": "gradient"}, {"entries": "wanda"}, {"entries": "random", "policy": "grow_and_prune"}],
    ids=str,
)
def test_layers_that_text_does_not_reach_train_no_entries(options):
    """Mllama's cross-attention waits for an image: its layer has no gradients and no inputs."""
    given = {"text_config": FAMILIES["Mllama"].sizes["text_config"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mllama", **given))
    strategy = SparseEntries(**options, trainable_fraction=0.05, reselect=1)
    strategy.attach(model, probe_of(model), ALONE)
    before = positions(model)
    assert before
    assert not any(".layers.1." in name for name in before)
    optimizer = AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    loss_of(model, 1).backward()
    strategy.before_step(1, optimizer)
    optimizer.step()
    strategy.after_step(1, optimizer)
    assert any(not torch.equal(index, before[name]) for name, index in positions(model).items())


def test_an_expert_that_no_token_reaches_has_a_choice_all_the_same():
    sums = GradientSums(4, torch.device("cpu"))
    assert sums.best(2).tolist() == [0, 1]
    assert [one.tolist() for one in sums.moments(torch.tensor([1]), (0.9, 0.999), 3)] == [[0.0], [0.0]]
    assert InputNorms().scores(torch.ones(2, 3), False).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    "options", [{"entries": "gradient"}, {"entries": "wanda"}, {"policy": "grow_and_prune"}], ids=str
)
@pytest.mark.parametrize("skipped", [{2}, {1, 2}, {1}])
def test_steps_whose_loss_is_not_finite_leave_no_score(options, skipped):
    """A choice is made by the other steps, or not made if there is none; nothing that is not finite enters."""
    model, strategy = attached(**{"entries": "random", **options}, reselect=2, scoring_steps=2)
    optimizer = AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    before = positions(model)
    for step in (1, 2):
        (loss_of(model, step) * (float("nan") if step in skipped else 1.0)).backward()
        if step in skipped:
            strategy.skip_step()
        else:
            strategy.before_step(step, optimizer)
            optimizer.step()
        optimizer.zero_grad()
        strategy.after_step(step, optimizer)
    after = positions(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    moved = any(not torch.equal(after[name], before[name]) for name in before)
    assert moved == (skipped != {1, 2})
