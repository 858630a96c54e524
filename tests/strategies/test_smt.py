"""Block-sparse tuning against dense training: the oracles of the method."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.families import FAMILIES
from lit_sparse.anatomy import linears, matrix, role
from lit_sparse.blocks.grid import Blocks
from lit_sparse.blocks.linear import BlockLinear, DeltaLinear, SharedInput, _SharedBlocks
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.optim import trainable
from lit_sparse.recompute import checkpoint_activations
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.strategies.smt import SMT
from lit_sparse.testing import TINY, contract, tiny_llm
from lit_sparse_profiling.counted import Counter
from tests.methods import data, trainer


def tokens(seed=0, shape=(2, 12)):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed=0):
    ids = tokens(seed)
    return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def probe_of(model):
    return lambda steps, weighed=True: (loss_of(model, seed) for seed in range(steps))


def attached(kind="llama", dtype=torch.float32, **options):
    model = tiny_llm(kind).to(dtype)
    strategy = SMT(
        **{"trainable_fraction": 0.05, "block_size": 8, "selection_batches": 2, "targets": ["all"], **options}
    )
    strategy.attach(model, probe_of(model), ALONE)
    return model, strategy


def dense_gradients(kind, dtype):
    """Gradients of all linear layers' weights as (out, in), by ordinary autograd."""
    model = tiny_llm(kind).to(dtype)
    loss_of(model).backward()
    layers = linears(model)
    return {
        name: layer.weight.grad.t() if isinstance(layer, Conv1D) else layer.weight.grad
        for name, layer in layers.items()
    }


# Oracle 1: the blocks' gradients are the dense gradient's blocks.
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [8, 16, (16, 8)])
def test_gradients_are_blocks_of_the_dense_ones(kind, dtype, tolerance, size):
    model, strategy = attached(kind, dtype, block_size=size, blocks="random", trainable_fraction=0.2)
    loss_of(model).backward()
    dense = dense_gradients(kind, dtype)
    parameters = dict(model.named_parameters())
    scale = max(float(gradient.abs().max()) for gradient in dense.values())
    for name, blocks in strategy.choice.items():
        expected = blocks.read(dense[name])
        torch.testing.assert_close(parameters[f"{name}.blocks"].grad, expected, rtol=tolerance, atol=tolerance * scale)


def test_bf16_accumulates_in_fp32():
    layer = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    blocks = Blocks.of((16, 16), torch.tensor([[0, 1], [2, 3]]))
    sparse = BlockLinear(layer, blocks, SharedInput([blocks], 64))
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(512, 64, generator=generator).bfloat16() for _ in range(2))
    sparse(x).backward(dy)
    exact = blocks.read(dy.double().t() @ x.double())
    assert (sparse.blocks.grad.double() - exact).norm() / exact.norm() < 2e-6


# Oracle 2: what flows on is what a dense layer passes on.
def test_input_gradient_is_the_dense_one():
    layer = nn.Linear(24, 16)
    blocks = Blocks.of((8, 8), torch.tensor([[0, 1]]))
    sparse = BlockLinear(copy.deepcopy(layer).requires_grad_(False), blocks, SharedInput([blocks], 64))
    x, y = (torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    sparse(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


# The trained blocks are what the model computes with.
@pytest.mark.parametrize("kind", TINY)
def test_trained_blocks_change_the_forward(kind):
    model, strategy = attached(kind)
    before = model(input_ids=tokens()).logits
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable(model)], lr=1.0)
    for name, _ in trainable(model):  # each one on its own
        model.zero_grad()
        loss_of(model).backward()
        kept = copy.deepcopy(model.state_dict())
        for other, parameter in trainable(model):
            if other != name:
                parameter.grad = None
        optimizer.step()
        strategy.after_step(1, optimizer)
        assert not torch.equal(model(input_ids=tokens()).logits, before), name
        model.load_state_dict(kept)
        assert torch.equal(model(input_ids=tokens()).logits, before), name


def train(model, parameters, steps, after=lambda: None, weight_decay=0.0):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        after()
    return optimizer


# Oracle 3: with every block chosen it is full training of those matrices. In fp64, since AdamW blows up the rounding of
# gradients near zero.
@pytest.mark.parametrize("kind", TINY)
def test_all_blocks_train_as_the_dense_matrices(kind):
    every = {"blocks": "random", "num_blocks": everything(kind), "trainable_fraction": 1.0}
    sparse, strategy = attached(kind, torch.float64, **every)
    dense = tiny_llm(kind).double().requires_grad_(False)
    for linear in linears(dense).values():
        linear.weight.requires_grad_(True)
    train(sparse, [p for _, p in trainable(sparse)], 4, lambda: strategy.after_step(1, None))
    train(dense, [p for _, p in trainable(dense)], 4)
    strategy.detach(sparse)
    for (name, a), b in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def everything(kind):
    return sum(-(-m.shape[0] // 8) * -(-m.shape[1] // 8) for m in map(matrix, linears(tiny_llm(kind)).values()))


# Oracle 4: what was not chosen does not move by a bit.
@pytest.mark.parametrize("kind", TINY)
def test_the_rest_stays_bit_for_bit(kind):
    base = tiny_llm(kind)
    model, strategy = attached(kind)
    choice = strategy.choice
    train(model, [p for _, p in trainable(model)], 5, lambda: strategy.after_step(1, None), weight_decay=0.1)
    strategy.detach(model)
    for name, blocks in choice.items():
        before, after = matrix(base.get_submodule(name)), matrix(model.get_submodule(name))
        mask = torch.zeros_like(before)
        blocks.write(mask, torch.ones(len(blocks.index), *blocks.size))
        assert torch.equal(after[mask == 0], before[mask == 0]), name
        assert not torch.equal(after[mask == 1], before[mask == 1]), name
    untouched = {name for name, _ in base.named_parameters()} - {f"{name}.weight" for name in choice}
    for name in untouched:
        assert torch.equal(model.get_parameter(name), base.get_parameter(name)), name


# Oracle 5: dense AdamW on gradients masked to the blocks walks the same path.
def test_masked_dense_training_is_the_same():
    sparse, strategy = attached("llama")
    choice = strategy.choice
    dense = tiny_llm("llama").requires_grad_(False)
    masked = {name: dense.get_submodule(name).weight.requires_grad_(True) for name in choice}
    for name, weight in masked.items():
        mask = torch.zeros_like(weight)
        choice[name].write(mask, torch.ones(len(choice[name].index), *choice[name].size))
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    train(sparse, [p for _, p in trainable(sparse)], 6, lambda: strategy.after_step(1, None))
    train(dense, list(masked.values()), 6)
    strategy.detach(sparse)
    for name, weight in masked.items():
        torch.testing.assert_close(sparse.get_submodule(name).weight, weight, rtol=1e-5, atol=2e-6)


# Oracle 7: a block that carries the signal is found.
@pytest.mark.parametrize("score", ["abs_mean", "l2"])
def test_a_planted_block_is_found(score):
    model = tiny_llm("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, args: (args[0] * torch.where(torch.arange(32) // 8 == 2, 50.0, 1.0),))
    layer.register_forward_hook(lambda _, args, out: out * torch.where(torch.arange(64) // 8 == 5, 50.0, 1.0))
    strategy = SMT(num_blocks=1, block_size=8, targets=["all"], score=score, selection_batches=4)
    strategy.attach(model, probe_of(model), ALONE)
    assert {name: blocks.index.tolist() for name, blocks in strategy.choice.items()} == {
        "model.layers.1.mlp.up_proj": [[5, 2]]
    }


# Oracle 8: real copies, counted to the byte, one for all who share an input.
def test_saved_bytes_are_the_packed_columns():
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    blocks = Blocks.of((8, 8), torch.tensor([[0, 1], [3, 1], [2, 6]]))
    sparse = BlockLinear(layer, blocks, SharedInput([blocks], 64))
    x = torch.randn(4, 16, 64)
    with Counter(sparse) as saved:
        out = sparse(x)
    assert saved.saved_peak == 4 * 16 * 2 * 8 * 4
    out.sum().backward()


@pytest.mark.parametrize("fraction", [0.03, 0.1])
def test_saved_bytes_of_a_model_are_the_frozen_ones_and_the_columns(fraction):
    model, strategy = attached("llama", trainable_fraction=fraction, targets=["q", "k", "v"], blocks="random")
    frozen = tiny_llm("llama").requires_grad_(False)
    start = min(int(name.split(".")[2]) for name in strategy.choice)
    frozen.model.layers[start].input_layernorm.register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    ids = tokens()
    with Counter(frozen) as floor:
        kept = frozen(input_ids=ids).logits
    with Counter(model) as saved:
        out = model(input_ids=ids).logits
    groups = {id(linear.shared): linear.shared for _, linear in strategy._swapped.values()}.values()
    columns = sum(ids.numel() * len(group.columns) * group.width * 4 for group in groups)
    assert saved.saved_peak - floor.saved_peak == columns
    assert out.requires_grad
    assert kept.requires_grad


def test_siblings_share_one_copy():
    _, strategy = attached("llama", blocks="random", trainable_fraction=0.3)
    groups = [
        sorted(name.rpartition(".")[2] for name, _ in group)
        for _, group in itertools.groupby(
            sorted(((n, id(p[1].shared)) for n, p in strategy._swapped.items()), key=lambda e: e[1]), key=lambda e: e[1]
        )
    ]
    assert ["k_proj", "q_proj", "v_proj"] in groups
    assert ["gate_proj", "up_proj"] in groups
    assert all(
        set(group) <= {"q_proj", "k_proj", "v_proj"} or set(group) <= {"gate_proj", "up_proj"} or len(group) == 1
        for group in groups
    )


def test_backward_stops_below_the_lowest_block(tmp_path):
    (tmp_path / "b.json").write_text('{"model.layers.2.self_attn.v_proj": {"size": [8, 8], "index": [[0, 0]]}}')
    model, _ = attached("llama", blocks=str(tmp_path / "b.json"))
    reached = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, args, out, i=i: reached.append(
                (i, (out if isinstance(out, torch.Tensor) else out[0]).requires_grad)
            )
        )
    loss_of(model).backward()
    assert reached == [(0, False), (1, False), (2, True)]


# Oracle 9: ragged edges, by finite differences.
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_on_ragged_blocks(bias):
    layer = nn.Linear(11, 7, bias=bias).double().requires_grad_(False)
    blocks = Blocks.of((4, 4), torch.tensor([[1, 2], [0, 0], [1, 0]]))
    shared = SharedInput([blocks], 64)

    def function(x, values):
        weight = layer.weight.clone()
        blocks.write(weight, values)
        return _SharedBlocks.apply(x, shared.pack(x), shared, weight, layer.bias, values)[0]

    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, blocks.read(layer.weight).requires_grad_()))


# Oracle 10: recomputation changes nothing.
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointed_gradients_are_the_plain_ones(kind):
    plain, _ = attached(kind)
    checkpointed, _ = attached(kind)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}) if not hasattr(
        checkpointed, "activation_checkpointing_enable"
    ) else checkpointed.activation_checkpointing_enable()
    checkpointed.disable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        loss_of(model).backward()
    for (name, a), (_, b) in zip(trainable(plain), trainable(checkpointed), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("mode", ["in_place", "delta"])
@pytest.mark.parametrize("family", ["T5", "BART"])
def test_cross_attention_that_reads_one_tensor_in_all_layers_can_be_recomputed(family, mode):
    gradients = []
    for recomputed in (False, True):
        model = FAMILIES[family].tiny().train()
        strategy = SMT(trainable_fraction=0.5, block_size=8, targets=["all"], blocks="random", mode=mode)
        strategy.attach(model, no_probe, ALONE)
        if recomputed:
            checkpoint_activations(model)
        ids = tokens()
        torch.manual_seed(0)  # of dropout
        ids[:, -1] = model.config.eos_token_id
        model(input_ids=ids).logits.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model)})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("mode", ["in_place", "delta"])
@pytest.mark.parametrize("already", [False, True])
def test_choosing_recomputes_activations_and_finds_the_same_blocks(mode, already):
    chosen, peaks, used = [], [], []
    for able in (True, False):
        model = tiny_llm("llama").train()
        if already:
            checkpoint_activations(model)
        model.supports_gradient_checkpointing = able
        strategy = SMT(trainable_fraction=0.05, block_size=8, selection_batches=2, targets=["auto"], mode=mode)
        with Counter(model) as saved:
            strategy.attach(model, probe_of(model), ALONE)
        chosen.append({name: blocks.index.tolist() for name, blocks in strategy.choice.items()})
        peaks.append(saved.saved_peak)
        used.append(model.model.layers[0].gradient_checkpointing)
    assert chosen[0] == chosen[1]
    assert used == [already, already]  # as it was before
    assert peaks[0] == peaks[1] if already else peaks[0] < 0.7 * peaks[1]


def test_activations_are_kept_again_after_a_refusal():
    model = tiny_llm("llama").train()
    with pytest.raises(BadInput, match="training batches are needed"):
        SMT(targets=["auto"], block_size=8).attach(model, no_probe, ALONE)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("Llama", {"v", "up", "down"}),
        ("GPT-2", {"qkv", "up", "down"}),
        ("Phi-3", {"qkv", "gate_up", "down"}),
        ("Mixtral", {"q", "k", "v"}),
    ],
)
def test_automatic_targets_are_those_that_learn_most_and_leave_fused_experts_out(kind, roles):
    model = FAMILIES[kind].tiny()
    strategy = SMT(trainable_fraction=0.05, block_size=8, targets=["auto"], blocks="random", ranking="per_matrix")
    strategy.attach(model, no_probe, ALONE)
    assert {role(name) for name in strategy.choice} == roles


def test_what_was_chosen_is_restored_whatever_the_targets_are_by_now():
    _, before = attached("llama", targets=["q", "k", "v"], blocks="random", trainable_fraction=0.02)
    model, now = tiny_llm("llama"), SMT(targets=["auto"], block_size=8)
    now.restore(model, before.state_dict(), ALONE)
    assert {name: blocks.index.tolist() for name, blocks in now.choice.items()} == {
        name: blocks.index.tolist() for name, blocks in before.choice.items()
    }


def test_automatic_targets_are_named_where_they_do_not_suffice():
    model = FAMILIES["Mixtral"].tiny()
    with pytest.raises(BadInput, match=r"targets \['q', 'k', 'v', 'qkv'\] have"):
        SMT(trainable_fraction=0.9, block_size=8, targets=["auto"], blocks="random").attach(model, no_probe, ALONE)


def test_accumulated_gradients_add_up():
    model, _ = attached("llama")
    single = []
    for seed in (0, 1):
        model.zero_grad()
        loss_of(model, seed).backward()
        single.append([p.grad.clone() for _, p in trainable(model)])
    model.zero_grad()
    for seed in (0, 1):
        loss_of(model, seed).backward()
    for (_, p), a, b in zip(trainable(model), *single, strict=True):
        torch.testing.assert_close(p.grad, a + b)


def test_tied_embeddings_stay_tied_and_frozen():
    model, strategy = attached("qwen2")
    train(model, [p for _, p in trainable(model)], 2, lambda: strategy.after_step(1, None))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, tiny_llm("qwen2").get_input_embeddings().weight)


def test_autocast_matches_a_bf16_model():
    model, _ = attached("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    gradients = [p.grad.clone() for _, p in trainable(model)]
    model.zero_grad()
    loss_of(model).backward()
    for (name, p), low in zip(trainable(model), gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), low.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 512}, "a block of 512 x 512 is larger than"),
        ({"num_blocks": 10**6}, "1000000 blocks were asked for, but the targets"),
        ({"trainable_fraction": 1e-6}, "is less than one block of 8 x 8"),
        ({"targets": ["nowhere"]}, "no linear layer of LlamaForCausalLM is among the targets"),
        ({"blocks": "no/such/file.json"}, "no choice of blocks could be read"),
        *(
            ({"blocks": kind, "trainable_fraction": 0.9}, "SMT: 90.000% of the weights is more than the targets")
            for kind in ("diagonal", "slab", "coupled")
        ),
    ],
)
def test_impossible_blocks_are_refused_in_one_sentence(options, message):
    with pytest.raises(BadInput, match=message):
        attached("llama", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_fraction": 0.0},
        {"trainable_fraction": 1.5},
        {"num_blocks": 0},
        {"num_blocks": 8, "blocks": "diagonal"},
        {"selection_batches": 0},
        {"block_size": "large"},
        {"block_size": -8},
    ],
)
def test_bad_fields_are_refused_at_once(options):
    with pytest.raises(BadInput, match=f"SMT: {next(iter(options))} is"):
        SMT(**options)


def test_scoring_needs_data():
    with pytest.raises(BadInput, match="training batches are needed before training"):
        SMT(block_size=8, trainable_fraction=0.05).attach(tiny_llm(), no_probe, ALONE)


# ---- a contiguous slab, fewer columns


@pytest.mark.parametrize("kind", TINY)
def test_slab_trains_one_band_of_each_matrix(kind):
    model, strategy = attached(kind, blocks="slab", trainable_fraction=0.05, block_size="auto")
    assert all(len(blocks.index) == 1 for blocks in strategy.choice.values())
    assert set(strategy.choice) == set(linears(tiny_llm(kind)))
    loss_of(model).backward()
    dense = dense_gradients(kind, torch.float32)
    parameters = dict(model.named_parameters())
    for name, blocks in strategy.choice.items():
        torch.testing.assert_close(parameters[f"{name}.blocks"].grad, blocks.read(dense[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blocks", ["gradient", "random"])
def test_fewer_columns_are_kept(blocks):
    _, free = attached(blocks=blocks, trainable_fraction=0.1)
    model, bound = attached(blocks=blocks, trainable_fraction=0.1, kept_columns=0.5)
    (many, of), (few, of_fewer) = free.describe()["kept_columns"], bound.describe()["kept_columns"]
    assert few <= of_fewer / 2 + 1
    assert few / of_fewer < many / of
    counts = [sum(len(b.index) for b in strategy.choice.values()) for strategy in (free, bound)]
    assert counts[0] == counts[1]
    loss_of(model).backward()


def test_kept_columns_must_leave_room_for_the_blocks():
    with pytest.raises(BadInput, match="blocks were asked for, but the targets"):
        attached(trainable_fraction=0.4, kept_columns=0.1)


# ---- warm-up with updates, as the authors' code has it


def test_warmup_with_updates_chooses_what_the_formulas_say():
    steps, size, fraction, lr = 4, 8, 0.05, 1e-2
    targets = ["q", "k", "v"]
    options = {"warmup": "update", "warmup_lr": lr, "score": "mean_abs", "selection_batches": steps}
    model, strategy = attached("llama", block_size=size, trainable_fraction=fraction, targets=targets, **options)

    other = tiny_llm("llama")  # core.md 1(b), steps 1 to 6, on dense matrices
    optimizer = torch.optim.AdamW(other.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    names = [name for name in linears(other) if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")]
    summed = {name: torch.zeros_like(other.get_submodule(name).weight) for name in names}
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(other, seed).backward()
        for name in names:
            summed[name] += other.get_submodule(name).weight.grad
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    tiles = []
    for name, total in summed.items():
        for row in range(total.shape[0] // size):
            for column in range(total.shape[1] // size):
                tile = total[row * size : (row + 1) * size, column * size : (column + 1) * size]
                tiles.append((float(tile.mean().abs()), name, row, column))
    count = int(fraction * sum(p.numel() / size**2 for p in other.parameters() if p.ndim == 2))
    expected = {tile[1:] for tile in sorted(tiles, reverse=True)[:count]}
    chosen = {(n, *index) for n, blocks in strategy.choice.items() for index in blocks.index.tolist()}
    assert chosen == expected
    for name, parameter in other.named_parameters():  # and the whole model has moved alike
        assert torch.equal(dict(model.named_parameters())[name], parameter), name
    assert all(name.endswith(".blocks") for name, _ in trainable(model))


def test_warmup_with_updates_needs_float32():
    with pytest.raises(BadInput, match="which needs float32"):
        attached(dtype=torch.bfloat16, warmup="update")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": "update", "blocks": "random"}, "does not work with blocks 'random'"),
        ({"warmup": "update", "mode": "delta"}, "mode delta"),
        ({"dropout": 0.05}, "dropout is 0.05 with mode in_place"),
        ({"dropout": 1.0, "mode": "delta"}, "dropout is 1.0"),
        ({"kept_columns": 0.0}, "kept_columns is 0.0"),
        ({"kept_columns": 0.5, "blocks": "slab"}, "with blocks 'slab'"),
    ],
)
def test_incompatible_settings_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        SMT(**options)


# ---- delta: beside a base that is not touched


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("blocks", ["random", "diagonal", "slab"])
def test_delta_computes_what_the_blocks_in_place_do(kind, dtype, tolerance, blocks):
    options = {"blocks": blocks, "trainable_fraction": 0.1, "block_size": 8}
    (inside, _), (beside, strategy) = (attached(kind, dtype, mode=mode, **options) for mode in ("in_place", "delta"))
    base = {name: parameter.clone() for name, parameter in beside.named_parameters() if not parameter.requires_grad}
    for step in range(3):
        for model in (inside, beside):
            model.zero_grad()
            loss_of(model, step).backward()
        ours, theirs = (dict(trainable(model)) for model in (beside, inside))
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            torch.testing.assert_close(
                parameter.grad.double(), theirs[name].grad.double(), rtol=tolerance, atol=tolerance
            )
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter -= 0.1 * theirs[name].grad
                theirs[name] -= 0.1 * theirs[name].grad
            for module in inside.modules():
                if isinstance(module, BlockLinear):
                    module.write()
        wanted, got = (model(input_ids=tokens(9)).logits for model in (inside, beside))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for name, parameter in beside.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    logits = beside(input_ids=tokens(9)).logits
    strategy.detach(beside)
    torch.testing.assert_close(beside(input_ids=tokens(9)).logits, logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs", "l2"])
def test_delta_chooses_the_same_blocks_by_gradient(score):
    (_, inside), (_, beside) = (attached(mode=mode, score=score) for mode in ("in_place", "delta"))
    assert {n: b.index.tolist() for n, b in inside.choice.items()} == {
        n: b.index.tolist() for n, b in beside.choice.items()
    }


def test_an_untrained_delta_leaves_the_base_as_it_was():
    model, strategy = attached(mode="delta", dtype=torch.bfloat16)
    strategy.detach(model)
    base = tiny_llm("llama").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(base.named_parameters())[name]), name


@pytest.mark.parametrize("dropout", [0.5, 0.05])
def test_dropout_is_of_what_the_blocks_read(dropout):
    """The output and both gradients against autograd, with the same draw; in evaluation nothing is dropped."""
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 16).double().requires_grad_(False), torch.randn(3, 7, 24).double()
    chosen = Blocks.of((8, 8), torch.tensor([[0, 2], [1, 0]]))  # columns 0 to 7 and 16 to 23
    layer = DeltaLinear(linear, (16, 24), chosen, SharedInput([chosen], 24), dropout).train()
    values = torch.randn(2, 8, 8).double()
    layer.blocks.data.copy_(values)
    torch.manual_seed(1)
    got = layer(given := x.clone().requires_grad_())
    torch.manual_seed(1)
    factor = torch.nn.functional.dropout(torch.ones(21, 16).double(), dropout)
    wanted_x, wanted_blocks = x.clone().requires_grad_(), values.clone().requires_grad_()
    kept = factor.view(3, 7, 16)
    added = torch.cat(
        [  # blocks are in order of their columns: the first is block row 1 of columns 0 to 7
            (wanted_x[..., 16:] * kept[..., 8:]) @ wanted_blocks[1].t(),
            (wanted_x[..., :8] * kept[..., :8]) @ wanted_blocks[0].t(),
        ],
        dim=-1,
    )
    wanted = linear(wanted_x) + added
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).double()
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(given.grad, wanted_x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.blocks.grad, wanted_blocks.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer.eval()(x))


# ---- what the record shows


def test_the_share_of_each_matrix_is_told_by_layer_and_role():
    model, strategy = attached(trainable_fraction=0.1, targets=["q", "down"])
    share = strategy.describe()["share"]
    sizes = {name: matrix(linear).numel() for name, linear in linears(tiny_llm("llama")).items()}
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    told = 0.0
    for layer, roles in share.items():
        assert set(roles) <= {"q", "down"}
        for what, part in roles.items():
            block = "self_attn.q_proj" if what == "q" else "mlp.down_proj"
            told += part * sizes[f"model.layers.{layer}.{block}"]
    assert told == pytest.approx(trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_is_packed_also_where_autocast_changes_the_type(dtype):
    _, strategy = attached("llama", blocks="random", trainable_fraction=0.1, targets=["q", "k", "v"])
    group = next(linear.shared for _, linear in strategy._swapped.values() if len(linear.shared.places) > 1)
    users = [linear for _, linear in strategy._swapped.values() if linear.shared is group]
    x = torch.randn(2, 5, users[0].matrix.shape[1], requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = [linear(x) for linear in users]
    packed = {output.grad_fn.saved_tensors[0].data_ptr() for output in outputs}
    assert len(packed) == 1
    assert group._input is None


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("options", [{"mode": "delta"}, {"blocks": "slab"}, {"kept_columns": 0.5}], ids=str)
def test_every_setting_keeps_the_contract(kind, options):
    settings = {"trainable_fraction": 0.05, "block_size": 8, "selection_batches": 2, "targets": ["all"]}
    contract(lambda: [SMT(**{**settings, **options})], kind)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("both", [True, False], ids=["resume_from", "trainer alone"])
def test_a_run_that_warmed_up_with_updates_resumes_exactly(both, tmp_path):
    tiny_llm("llama", dropout=0.1).save_pretrained(tmp_path / "base")

    def task():
        settings = {"trainable_fraction": 0.05, "block_size": 8, "selection_batches": 2, "targets": ["q", "v"]}
        return CausalLM(str(tmp_path / "base"), [SMT(warmup="update", warmup_lr=1e-2, **settings)], lr=1e-2)

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight, resumed = task(), task()
    trainer(4, callbacks=[checkpoint], enable_checkpointing=True).fit(straight, datamodule=data())
    path = tmp_path / "ckpt" / "step=2.ckpt"
    resumed.resume_from = path if both else None
    trainer(4).fit(resumed, datamodule=data(), ckpt_path=path)
    base = dict(tiny_llm("llama", dropout=0.1).named_parameters())
    ours = dict(resumed.build().named_parameters())
    for name, parameter in straight.build().named_parameters():
        assert torch.equal(parameter, ours[name]), name
    assert not torch.equal(ours["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler, to itself
@pytest.mark.parametrize("mode", ["in_place", "delta"])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(mode):
    model, _ = attached("llama", blocks="random", trainable_fraction=0.2, mode=mode)
    loss_of(model).backward()
    plain = {name: parameter.grad.clone() for name, parameter in trainable(model)}
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    loss_of(model).backward()
    for name, parameter in trainable(model):
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-7)
