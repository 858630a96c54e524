"""The host: refusals, keys, and a strategy that changes the trainable set in the middle of a fit."""

import dataclasses
import random
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.tiny_models import FAMILIES
from lit_sparse.anatomy import decoder_layers
from lit_sparse.checkpoints import get_rng, set_rng
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.modules.schedule import factor
from lit_sparse.optim import AdamW, trainable
from lit_sparse.strategies import LISA, PEFT, SMT, KLToBase, UpdateStrategy, compose
from lit_sparse.testing import tiny_llm


@dataclasses.dataclass
class Fused(UpdateStrategy):
    """Updates weights inside the backward (as far as the host is told)."""

    backward: ClassVar = "fused"
    claims: ClassVar = frozenset({"backward"})


@dataclasses.dataclass
class OwnOptimizer(UpdateStrategy):
    """Brings its optimizer."""

    claims: ClassVar = frozenset({"optimizer"})

    def optimizer(self, groups, lr):
        return torch.optim.SGD(groups, lr)


@dataclasses.dataclass
class OneLayer(UpdateStrategy):
    """Trains one layer, another one after every second step."""

    claims: ClassVar = frozenset({"trainable"})

    def attach(self, model, probe, context):
        self.layers = decoder_layers(model)
        self.choose(model, 0)

    def choose(self, model, number):
        model.requires_grad_(False)
        self.layers[number].requires_grad_(True)

    def after_step(self, step, optimizer):
        if step % 2:
            return False
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(number == step // 2 % len(self.layers))
        return True


@dataclasses.dataclass
class Pull(UpdateStrategy):
    """A penalty of a constant size."""

    size: float = 3.0

    def penalty(self, batch, output):
        return output.last_hidden_state.sum() * 0 + self.size


def data():
    return Synthetic(vocab_size=96, max_length=12, rows=14, heldout=2, batch_size=2)


def trainer(steps=1, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", max_steps=steps, use_distributed_sampler=False, **{**quiet, **options})


def fitted(steps=1, base=None, trainer_options=None, **options):
    model = CausalLM(base=base or tiny_llm("llama"), **{"lr": 1e-2, **options})
    fit = trainer(steps, **(trainer_options or {}))
    fit.fit(model, datamodule=data())
    return model, fit


@pytest.mark.parametrize("setting", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_settings_that_a_fused_backward_cannot_follow_are_refused(setting):
    with pytest.raises(BadInput, match=rf"Fused keeps no gradients .* remove trainer\.{next(iter(setting))}"):
        fitted(updates=[Fused()], trainer_options=setting)


def test_an_optimizer_that_a_strategy_overrides_is_refused():
    with pytest.raises(BadInput, match=r"model\.optimizer is set, but OwnOptimizer brings its own"):
        fitted(updates=[OwnOptimizer()], optimizer=torch.optim.SGD)
    _, fit = fitted(updates=[OwnOptimizer()])
    assert isinstance(fit.optimizers[0], torch.optim.SGD)


def test_two_strategies_with_one_claim_are_refused():
    with pytest.raises(BadInput, match="SMT and OneLayer cannot be combined: both take over the model's trainable"):
        compose([SMT(), OneLayer()])
    assert len(compose([OneLayer(), OwnOptimizer(), Fused()])) == 3


def test_a_penalty_is_added():
    model = CausalLM(base=tiny_llm("llama"), updates=[Pull(3.0), Pull(0.5)])
    plain = CausalLM(base=tiny_llm("llama"))
    for module in (model, plain):
        trainer(1).fit(module, datamodule=data())
        module.log = lambda *args, **kwargs: None  # there is no trainer to log to any more
    batch = next(iter(data().train_dataloader()))
    assert float((model.training_step(batch, 0) - model.loss(batch)[0]).detach()) == pytest.approx(3.5)
    assert plain.training_step(batch, 0) == plain.loss(batch)[0]


def test_the_trainable_set_may_change_and_resumes(tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model, fit = fitted(5, base, {"callbacks": [keep], "enable_checkpointing": True}, updates=[OneLayer()])
    fresh = tiny_llm("llama")
    moved = {n.split(".")[2] for n, p in model.build().named_parameters() if not torch.equal(p, fresh.get_parameter(n))}
    assert moved == {"0", "1", "2"}
    names = {name for group in fit.optimizers[0].param_groups for name in group["param_names"]}
    assert names == {f"model.{name}" for name, _ in trainable(model.build())}
    assert {id(p) for p in fit.optimizers[0].state} <= {id(p) for _, p in trainable(model.build())}
    saved = torch.load(tmp_path / "ckpt" / "step=3.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[3] for name in saved} == {"0", "1"}, "layers trained earlier belong into the checkpoint"


@pytest.mark.parametrize("blocks", ["random", "slab", "gradient"])
def test_strategies_are_attached_where_the_default_device_is_the_ordinary_one(blocks, monkeypatch):
    """Lightning makes its device the default meanwhile, and a CPU generator cannot draw there."""
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda *_, **__: torch.device("meta"))
    module, _ = fitted(base=tiny_llm("llama"), updates=[SMT(trainable_fraction=0.05, block_size=8, blocks=blocks)])
    assert all(chosen.index.device.type == "cpu" for chosen in module.updates[0].choice.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("updates", [[], [SMT(trainable_fraction=0.05, block_size=8)]], ids=["full", "smt"])
def test_activation_checkpointing_changes_nothing_but_memory(kind, updates):
    values = []
    for checkpointing in (False, True):
        model, _ = fitted(
            3, tiny_llm(kind), updates=[dataclasses.replace(u) for u in updates], activation_checkpointing=checkpointing
        )
        assert model.build().is_gradient_checkpointing == checkpointing
        values.append([p.detach() for _, p in trainable(model.build())])
    for plain, checkpointed in zip(*values, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_attention_is_passed_on(tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path)
    assert CausalLM(base=str(tmp_path), attention="eager").build().config._attn_implementation == "eager"


def test_attention_is_transformers_own_choice(tmp_path):
    for family, chosen in (("Llama", "sdpa"), ("Gemma-2", "eager"), ("BLOOM", "eager"), ("gpt-oss", "eager")):
        base = FAMILIES[family].write(tmp_path / family)
        assert CausalLM(base=str(base)).build().config._attn_implementation == chosen


@pytest.mark.parametrize("asked", ["sdpa", "flash_attention_2", "flex_attention", "nonsense"])
def test_an_attention_that_a_model_lacks_is_refused_with_a_way_out(asked, tmp_path):
    base = FAMILIES["BLOOM"].write(tmp_path / "base")
    with pytest.raises(BadInput, match=f"with model.attention {asked}: .*; leave it out .* --model.attention eager"):
        CausalLM(base=str(base), attention=asked).build()


def lora_on(**settings):
    return [PEFT(LoraConfig(r=4, **settings))]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`|You are using the default")
@pytest.mark.parametrize(
    ("family", "updates"),
    [
        ("Llama", []),
        ("Gemma-2", []),  # caps its logits
        ("Granite", []),  # scales them
        ("Llama", lora_on(target_modules=["lm_head"])),
        ("Llama", lora_on(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("OPT", [KLToBase()]),
    ],
)
def test_a_batch_without_a_scored_token_has_a_loss_of_0(family, updates):
    task = CausalLM(FAMILIES[family].tiny(), updates=updates)
    task.updates.attach(task.build())
    ids = torch.arange(3, 15)[None]
    for labels, zero in ((torch.full_like(ids, -100), True), (ids, False)):
        task.zero_grad()
        batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        loss, output = task.loss(batch)
        total = task.updates.penalized(loss, batch, output)
        total.backward()
        grads = [p.grad for p in task.parameters() if p.grad is not None]
        assert grads
        assert bool(loss == 0) == zero
        assert total.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert zero == (not any(grad.any() for grad in grads)) or family == "OPT"


def test_text_leaves_a_vision_tower_alone(tmp_path):
    base = FAMILIES["Gemma-3 (multimodal)"].write(tmp_path / "base")
    for updates in ([], lora_on(target_modules="all-linear")):
        task, _ = fitted(1, str(base), updates=updates)
        assert all(".language_model." in name or "lm_head" in name for name, _ in trainable(task))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler says to itself
def test_a_compiled_model_trains_to_the_same_loss():
    batch = next(iter(data().train_dataloader()))
    losses = []
    for compiled in (False, True):
        model, _ = fitted(2, updates=[SMT(trainable_fraction=0.05, block_size=8)], compile=compiled)
        losses.append(model.loss(batch)[0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler says to itself
def test_layers_that_take_turns_stay_compiled(monkeypatch):
    """Twelve draws of other layers: a graph for each set of them would pass the compiler's limit of eight."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    task, _ = fitted(12, updates=[LISA(active_layers=1, interval=1)], compile=True)
    assert len({tuple(draw) for draw in task.updates[0].draws}) > 1


def test_a_cap_that_small_logits_do_not_show_is_noticed():
    config = Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    assert not CausalLM(base=Gemma2ForCausalLM(config)).head_is_plain
    config.final_logit_softcapping = None
    assert CausalLM(base=Gemma2ForCausalLM(config)).head_is_plain


def test_a_head_that_caps_its_logits_is_noticed():
    model = CausalLM(base=tiny_llm("llama"))
    assert model.head_is_plain
    capped = CausalLM(base=tiny_llm("llama"))
    capped.build().lm_head.register_forward_hook(lambda _, args, out: torch.tanh(out))
    assert not capped.head_is_plain
    batch = next(iter(data().train_dataloader()))
    logits = capped.build()(batch["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(capped.loss(batch)[0], expected)
    nll, _ = capped.scores(batch)
    torch.testing.assert_close(nll.mean(), expected)


def test_a_loaded_model_is_there_once():
    model = CausalLM(base=tiny_llm("llama"))
    model.build()
    assert all(name.startswith("model.") for name in model.state_dict())
    assert model.base == "LlamaForCausalLM"


def test_a_bare_configuration_has_the_same_weights_each_time(tmp_path):
    tiny_llm("llama").config.save_pretrained(tmp_path)
    first, second = (CausalLM(base=str(tmp_path / "config.json")) for _ in range(2))
    first.build()
    torch.manual_seed(5)
    second.build()
    assert first.base_fingerprint == second.base_fingerprint


def test_a_base_of_another_type_is_refused():
    with pytest.raises(BadInput, match=r"model\.base is 7; it must be demo"):
        CausalLM(base=7).build()


@dataclasses.dataclass
class Events(UpdateStrategy):
    """Notes when it is attached or restored."""

    events: list[str]

    def attach(self, model, probe, context):
        self.events.append("strategy")


def test_a_given_model_is_moved_before_strategies_keep_copies_of_it(tmp_path):
    """Also where a run is resumed."""
    for resumed in (False, True):
        base, events = tiny_llm("llama"), []
        move = base.to
        base.to = lambda device, move=move, events=events: events.append(device.type) or move(device)
        model, fit = CausalLM(base=base, updates=[Events(events)]), trainer(1 + resumed)
        model.resume_from = tmp_path / "run.ckpt" if resumed else None
        fit.fit(model, datamodule=data(), ckpt_path=model.resume_from)
        assert events == ["cpu", "strategy"]
        fit.save_checkpoint(tmp_path / "run.ckpt")


def test_schedules():
    assert [factor("linear", step, 2, 6) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factor("cosine", 4, 2, 6) == pytest.approx(0.5)
    assert factor("constant", 5, 0, 6) == 1.0


def test_a_classifiers_checkpoint_is_of_another_task():
    model = CausalLM(base=tiny_llm("llama"))
    with pytest.raises(BadInput, match="the checkpoint is of another task than CausalLM"):
        model.restore({"lit_sparse": {"base": "another", "updates": [], "classes": {"labels": ["a"]}}})


def test_random_numbers_go_on_by_process():
    def draw():
        return float(torch.rand(())), random.random()

    cpu = torch.device("cpu")
    kept = get_rng(cpu, 1)
    wanted = [draw()]
    kept += get_rng(cpu, 1)
    wanted.append(draw())
    for rank in range(2):
        assert set_rng(kept, cpu, rank, 2) == 2
        assert draw() == wanted[rank]
    assert set_rng({**kept[1], "cuda": []}, cpu, 0, 1) == 1  # as checkpoints had it once
    assert draw() == wanted[1]
    drawn = []
    for rank in (0, 1, 2, 2):
        assert set_rng(kept, cpu, rank, 3) == 2
        drawn.append(draw())
    assert drawn[2] == drawn[3]
    assert len({*wanted, *drawn}) == 5


def test_bf16_gradients_are_clipped_by_an_fp32_scale():
    task, weight = CausalLM(tiny_llm()), torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    optimizer = AdamW([weight])
    task.configure_gradient_clipping(optimizer, 2.0)
    assert optimizer.grad_scale.dtype == torch.float32
    assert float(optimizer.grad_scale) == pytest.approx(2.5, rel=1e-3)


class Losing(CausalLM):
    """The losses of some steps (from 1 on) are not finite."""

    lost: ClassVar[dict[int, float]] = {}

    def graded_loss(self, batch):
        loss, output, hits = super().graded_loss(batch)
        factor = self.lost.get(self.global_step + 1) if self.training and self._trainer is not None else None
        return loss if factor is None else loss * factor, output, hits


class Weights(L.Callback):
    """Notes a weight after each step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.found):
            self.found.append([parameter.detach().clone() for _, parameter in trainable(pl_module.build())])


def losing(monkeypatch, lost, steps=4, **options):
    monkeypatch.setattr(Losing, "lost", lost)
    notes = Weights()
    module = Losing(base=tiny_llm("llama"), lr=1e-2, **options)
    trainer(steps, callbacks=[notes], accumulate_grad_batches=2, gradient_clip_val=1.0).fit(module, datamodule=data())
    return module, notes.found


def same(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("updates", [[], [SMT(blocks="random", targets=["all"])], [LISA(interval=2)]], ids=len)
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(monkeypatch, caplog, updates, factor):
    module, found = losing(monkeypatch, {2: factor}, updates=updates)
    if not any(isinstance(update, LISA) for update in updates):  # which trains other weights after step 2
        assert same(found[0], found[1])
        assert not same(found[1], found[2])
    assert all(parameter.isfinite().all() for step in found for parameter in step)
    assert module.guard.total == 1
    assert f"Step 2 is skipped: its loss is {factor} (1 in a row, at most 10; 1 in all)" in caplog.text


def test_steps_are_skipped_up_to_a_limit_of_so_many_in_a_row(monkeypatch):
    nan = float("nan")
    module, _ = losing(monkeypatch, {1: nan, 3: nan}, max_skipped=1)
    assert module.guard.total == 2
    with pytest.raises(BadInput, match=r"the losses of 2 steps in a row are not finite.*raise model\.max_skipped"):
        losing(monkeypatch, {2: nan, 3: nan}, max_skipped=1)
