"""Penalties towards an anchor: gradients against autograd, closed forms, both phases, and refusals."""

import copy
import math

import peft
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from lit_sparse.errors import BadInput
from lit_sparse.importance.recorded import layer_coefficients, path_importance
from lit_sparse.optim import AdamW, parameter_groups, trainable
from lit_sparse.places import configs_folder
from lit_sparse.runs import build_module
from lit_sparse.strategies import L2SP, PEFT, AdaptiveRegularization, RecordImportance, compose
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, contract, tiny_encoder, tiny_llm
from tests.methods import data, trainer
from tests.strategies.test_record_importance import lora, train
from tests.strategies.test_smt import loss_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Return a folder with a base, and runs of three steps of each first-phase YAML and of full fine-tuning."""
    folder = tmp_path_factory.mktemp("phases")
    tiny_llm(dropout=0.1).save_pretrained(folder / "base")
    tiny_llm(seed=1).save_pretrained(folder / "other")
    full = {"lr": 1e-3, "updates": [{"class_path": "RecordImportance"}]}
    for name, model in (
        ("general", read("record_importance")),
        ("fisher", read("phases/record_fisher")),
        ("full", full),
    ):
        module, fit = build(folder, model, lr=1e-3), trainer(3)
        fit.fit(module, datamodule=data(batch_size=1))
        fit.save_checkpoint(folder / name / "checkpoints" / "last.ckpt")
    module.detach().save_pretrained(folder / "tuned")
    return folder


def read(name):
    config = yaml.safe_load((configs_folder() / f"{name}.yaml").read_text())["model"]
    config["updates"] = config.pop("updates+")
    return config


def build(folder, config, **options):
    """Return the module of a configuration with the runs in `folder`; `options` override its last update or itself."""
    config = copy.deepcopy(config)
    for update in config["updates"]:
        keys = update.setdefault("init_args", {})
        for key in {"importance", "start_from"} & keys.keys():
            keys[key] = str(folder / keys[key].removeprefix("runs/").removesuffix("-1"))
    fields = {key: options.pop(key) for key in list(options) if key not in ("base", "lr", "precision")}
    if fields:
        config["updates"][-1]["init_args"] |= fields
    return build_module({"model": {"base": str(folder / "base"), **config, **options}})


FULL = {"lr": 1e-3, "updates": [{"class_path": "AdaptiveRegularization", "init_args": {"importance": "runs/full-1"}}]}


def second(kind):
    """Return the configuration of the second phase of that kind, and the options that it needs."""
    return {
        "adaptive": (read("phases/adaptive_regularization"), {}),
        "ewc": (read("phases/ewc"), {}),
        "full": (FULL, {"base": "tuned"}),
    }[kind]


def module_of(folder, kind, **options):
    config, needs = second(kind)
    return build(folder, config, **{key: str(folder / value) for key, value in needs.items()}, **options)


def weights_of(module):
    return {name: parameter.detach().clone() for name, parameter in trainable(module.build())}


@pytest.mark.parametrize("kind", ["adaptive", "ewc", "full"])
def test_both_phases_and_their_resuming(kind, phases, tmp_path):
    """The penalty is logged, holds weights nearer to where they were, and a resumed run is the straight one, bit for
    bit, also when the first phase is gone."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight, resumed, free = (module_of(phases, kind, phi=phi, lr=1e-2) for phi in (1.0, 1.0, 0.0))
    fit = trainer(4, callbacks=[checkpoint], enable_checkpointing=True, **options)
    fit.fit(straight, datamodule=data())
    assert fit.callback_metrics["adaptive_penalty"] > 0
    resumed.resume_from = tmp_path / "ckpt" / "step=2.ckpt"
    hidden = phases.rename(phases.with_name("hidden"))
    try:
        resumed.base = str(hidden / resumed.base.rpartition("/")[2])
        trainer(4, **options).fit(resumed, datamodule=data(), ckpt_path=resumed.resume_from)
    finally:
        hidden.rename(phases)
    expected, got = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    trainer(4, **options).fit(free, datamodule=data())
    held, loose = (penalty_of(straight, module) for module in (straight, free))
    assert held < 0.9 * loose


def penalty_of(module, other):
    """The penalty of `module`'s last update at the weights of `other`."""
    values = weights_of(other)
    for name, parameter in trainable(module.build()):
        parameter.data.copy_(values[name])
    module.updates[-1].before_step(1, module.optimizers())
    return float(module.updates[-1].logged()["adaptive_penalty"])


@pytest.mark.parametrize("kind", ["adaptive", "full"])
def test_without_strength_or_importance_it_is_the_run_without(kind, phases):
    config, needs = second(kind)
    bare = {**config, "updates": config["updates"][:-1]}
    plain = build(phases, bare, **{key: str(phases / value) for key, value in needs.items()})
    torch.manual_seed(0)  # of dropout
    trainer(3).fit(plain, datamodule=data())
    expected = weights_of(plain)
    for phi in (0.0, 1.0):
        module = module_of(phases, kind, phi=phi)
        if phi:
            forget(module.updates[-1])
        torch.manual_seed(0)
        trainer(3).fit(module, datamodule=data())
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(module).items())


def forget(update):
    """Set an importance to zero everywhere."""
    place = update._place

    def zeroed():
        place()
        for weight in update._weights.values():
            weight.zero_()

    update._place = zeroed


@pytest.mark.parametrize("kind", ["adaptive", "ewc", "full"])
@pytest.mark.parametrize("paper", [False, True])
def test_its_gradient_is_autograds_of_the_penalty(kind, paper, phases):
    """phi * sum a_l Omega (U - U*)^2, from the record itself; the closed form is in fp32."""
    settings = {"xi": 1e-2, "xi_scale": "absolute", "normalize": "none", "layer_weights": "softmax"} if paper else {}
    module = module_of(phases, kind, phi=0.3, **settings)
    module.build()
    for update in module.updates:
        update.attach(module.model, no_probe, ALONE)
    penalty = module.updates[-1]
    checkpoint = torch.load(
        phases / {"adaptive": "general", "ewc": "fisher"}.get(kind, kind) / "checkpoints" / "last.ckpt"
    )
    entries = checkpoint["lit_sparse"]["updates"][-1]["state"]["importance"]["matrices"]
    ends = {name.removeprefix("model."): value.double() for name, value in checkpoint["state_dict"].items()}
    parameters = {name: p.detach().double().requires_grad_() for name, p in trainable(module.model)}
    torch.manual_seed(2)
    for name, parameter in trainable(module.model):
        moved = parameter.detach() + 0.01 * torch.randn_like(parameter)
        parameter.data.copy_(moved)
        parameters[name].data.copy_(moved)
        parameter.grad = torch.zeros_like(parameter)

    def dense(values, scale):
        return values[0] if scale is None else scale * values[1] @ values[0]

    omegas, distances = {}, {}
    for name, one in entries.items():
        start, end = [v.double() for v in one["start"].values()], [ends[n] for n in one["start"]]
        now, way = (
            dense([parameters[n] for n in one["start"]], one["scale"]),
            dense(end, one["scale"]) - dense(start, one["scale"]),
        )
        if kind == "ewc":
            omegas[name], distances[name] = one["sums"].double(), now
        else:
            omegas[name] = path_importance(one["sums"].double(), way, penalty.xi, not paper, clamp=True)
            distances[name] = now - dense(end, one["scale"])
    if not paper:
        mean = sum(o.sum() for o in omegas.values()) / sum(o.numel() for o in omegas.values())
        omegas = {name: omega / mean for name, omega in omegas.items()}
    norms = {name: float(omega.norm()) for name, omega in omegas.items()}
    factors = layer_coefficients(norms, penalty.layer_weights, 1.0)
    value = 0.3 * sum(factors[name] * (omegas[name] * distances[name].square()).sum() for name in omegas)
    value.backward()
    penalty.before_step(1, AdamW([p for _, p in trainable(module.model)], lr=0.0))
    assert float(penalty.logged()["adaptive_penalty"]) == pytest.approx(value.item(), rel=1e-4)
    whole = torch.stack([parameter.grad.norm() for parameter in parameters.values()]).norm()
    for name, parameter in trainable(module.model):
        error = (parameter.grad.double() - parameters[name].grad).norm() / whole
        assert error < 1e-5, (name, error.item())


def test_on_a_quadratic_it_ends_where_the_closed_form_says(tmp_path):
    """w = (h a + 2 phi Omega w*) / (h + 2 phi Omega): free where Omega is 0, near the anchor where phi is large."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64))
    penalty = AdaptiveRegularization("unused", phi=2.0)
    omega, goal, curvature = (
        torch.tensor([0.0, 0.3, 1e3]),
        torch.tensor([1.0, -2.0, 3.0]),
        torch.tensor([1.0, 2.0, 0.5]),
    )
    weights, anchors = {"weight": omega}, {"weight": [torch.full((3,), 0.5)]}
    penalty.restore(
        model, {"space": "weights", "weights": weights, "anchors": anchors, "coefficients": {"weight": 1.0}}, ALONE
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=4e-4)
    for step in range(1, 4001):
        optimizer.zero_grad()
        (curvature * (model.weight - goal).square()).sum().div(2).backward()
        penalty.before_step(step, optimizer)
        optimizer.step()
    expected = (curvature * goal + 4 * omega * 0.5) / (curvature + 4 * omega)
    # Entry by entry: the stiff one has converged; the others by the plain rate of gradient descent.
    rate = curvature + 4 * omega
    left = (0.5 - expected.double()) * (1 - 4e-4 * rate.double()) ** 4000
    torch.testing.assert_close(model.weight.detach(), expected.double() + left, rtol=0, atol=1e-6)


# ---- refusals


def attach(module):
    model = module.build()
    for update in module.updates:
        update.attach(model, no_probe, ALONE)


def refused(folder, config, message, **options):
    with pytest.raises(BadInput, match=message):
        attach(build(folder, config, **options))


def test_importance_that_does_not_fit_is_refused(phases, tmp_path):
    config = read("phases/adaptive_regularization")
    elsewhere = copy.deepcopy(config)
    del elsewhere["updates"][0]["init_args"]["start_from"]
    refused(
        phases, elsewhere, "the anchor is the end of .*, but this run starts at other values .*start_from: .*general"
    )
    attach(build(phases, elsewhere, anchor="base"))
    refused(
        phases, elsewhere, "was recorded on another base than this run's", base=str(phases / "other"), anchor="base"
    )
    refused(phases, config, "start_from is .*general, which was trained on another base", base=str(phases / "other"))
    wide = copy.deepcopy(elsewhere)
    wide["updates"][0]["init_args"]["config"]["init_args"]["r"] = 4
    refused(
        phases, wide, r"with shapes \[\(8, 32\), \(32, 8\)\] and scale 4.0, this run has \[\(4, 32\)", anchor="base"
    )
    wide["updates"][0]["init_args"]["start_from"] = "runs/general-1"
    refused(phases, wide, r"which does not fit this adapter: .*lora_A.* is \(4, 32\) here, and that run has \(8, 32\)")
    fewer = copy.deepcopy(elsewhere)
    fewer["updates"][0]["init_args"]["config"]["init_args"]["target_modules"] = ["q_proj"]
    refused(phases, fewer, "has 6 matrices, this run regularises 3, and they differ in .*v_proj", anchor="base")
    more = copy.deepcopy(elsewhere)
    more["updates"][0]["init_args"]["config"]["init_args"]["target_modules"] = ["q_proj", "v_proj", "o_proj"]
    refused(phases, more, "has 6 matrices, this run regularises 9, and they differ in .*o_proj", anchor="base")
    attach(build(phases, more, anchor="base", targets=["q", "v"]))
    refused(phases, elsewhere, r"there is no checkpoint at .*nothing", importance=str(tmp_path / "nothing"))


def test_useless_records_are_refused(phases, tmp_path):
    config = read("phases/adaptive_regularization")
    saved = torch.load(phases / "general" / "checkpoints" / "last.ckpt")
    state = saved["lit_sparse"]["updates"][-1]["state"]["importance"]
    name, one = next(iter(state["matrices"].items()))

    def written(**changes):
        state.update(changes)
        torch.save(saved, tmp_path / "changed.ckpt")
        return str(tmp_path / "changed.ckpt")

    refused(phases, config, "saw no data: its run recorded 0 steps", importance=written(steps=0))
    for entry in state["matrices"].values():
        entry["sums"].fill_(-1)
    refused(phases, config, "has a mean of 0, which cannot be scaled to 1", importance=written(steps=3))
    one["sums"][0, 0] = math.nan
    refused(phases, config, f"is not finite at {name}: its run diverged", importance=written())
    saved["lit_sparse"]["updates"].pop()
    refused(phases, config, "is a run without RecordImportance or RecordFisher", importance=written())
    saved["lit_sparse"]["updates"].pop()
    torch.save(saved, tmp_path / "changed.ckpt")
    with pytest.raises(BadInput, match=r"start_from is .*, which has no adapter of PEFT's"):
        PEFT(LoraConfig(), start_from=str(tmp_path / "changed.ckpt")).attach(tiny_llm(), no_probe, ALONE)


@pytest.mark.parametrize("key", ["phi", "xi"])
def test_negative_settings_are_refused(key):
    with pytest.raises(BadInput, match=rf"{key} is -0\.1; it must be at least 0"):
        AdaptiveRegularization("runs/general-1", **{key: -0.1})


def test_other_settings_are_refused():
    with pytest.raises(BadInput, match="importance names no run"):
        AdaptiveRegularization([])
    with pytest.raises(BadInput, match="temperature is 0; it must be above 0"):
        AdaptiveRegularization("runs/general-1", temperature=0)
    with pytest.raises(BadInput, match="alpha is -1; it must be at least 0"):
        L2SP(alpha=-1)
    pissa = lora(init_lora_weights="pissa")
    for update in (L2SP(), AdaptiveRegularization("runs/general-1", anchor="base")):
        with pytest.raises(BadInput, match=f"{type(update).__name__} and PEFT cannot be combined: .* needs the base"):
            compose([pissa, update])
    assert compose([AdaptiveRegularization("runs/general-1"), RecordImportance(), pissa])[0] is pissa


def test_importances_of_several_runs_add_up(phases):
    config = read("phases/adaptive_regularization")
    path = str(phases / "general")
    once, twice = (build(phases, config, importance=i, normalize="none") for i in (path, [path, path]))
    for module in (once, twice):
        attach(module)
    first, both = (module.updates[-1].state_dict()["weights"] for module in (once, twice))
    assert all(torch.equal(both[name], 2 * weight) for name, weight in first.items())


def test_a_path_integral_and_a_fisher_do_not_add_up(phases):
    config, paths = read("phases/adaptive_regularization"), [str(phases / name) for name in ("fisher", "general")]
    refused(phases, config, "general is of the kind path, the runs before it are not", importance=paths, anchor="base")


def test_attached_again_its_importance_is_the_same(phases):
    module = build(phases, read("phases/adaptive_regularization"), normalize="none")
    model, penalty = module.build(), module.updates[-1]
    attach(module)
    first = dict(penalty.state_dict()["weights"])
    penalty.detach(model)
    penalty.attach(model, no_probe, ALONE)
    assert all(torch.equal(weight, first[name]) for name, weight in penalty.state_dict()["weights"].items())


def test_importance_may_be_kept_in_bf16(phases):
    """Its gradient is the same, to the rounding of the type that importance is kept in."""
    gradients = []
    for settings in ({}, {"dtype": "bfloat16"}):
        module = build(phases, read("phases/adaptive_regularization"), **settings)
        attach(module)
        for number, (_, parameter) in enumerate(trainable(module.model)):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.add_(0.01 * noise)
            parameter.grad = torch.zeros_like(parameter)
        module.updates[-1].before_step(1, torch.optim.SGD([p for _, p in trainable(module.model)], lr=1.0))
        gradients.append(torch.cat([p.grad.flatten() for _, p in trainable(module.model)]))
        weights = module.updates[-1].state_dict()["weights"].values()
        assert {str(weight.dtype) for weight in weights} == {f"torch.{settings.get('dtype', 'float32')}"}
    assert gradients[0].norm() > 0
    assert 0 < (gradients[1] - gradients[0]).norm() <= 2**-8 * gradients[0].norm()


def test_importances_of_other_matrices_do_not_add_up(phases, tmp_path):
    """Nor importances in another space: only the last run's would count."""
    saved = torch.load(phases / "general" / "checkpoints" / "last.ckpt")
    record = saved["lit_sparse"]["updates"][-1]["state"]["importance"]
    gone = sorted(record["matrices"])[0]
    del record["matrices"][gone]
    torch.save(saved, tmp_path / "fewer.ckpt")
    config, whole = read("phases/adaptive_regularization"), str(phases / "general")
    fewer = str(tmp_path / "fewer.ckpt")
    after = f"differs from the runs before it in {gone}, but importances add up"
    refused(phases, config, after, importance=[whole, fewer])
    refused(
        phases, config, f"has 5 matrices, this run regularises 6, and they differ in {gone}", importance=[fewer, whole]
    )
    saved = torch.load(phases / "full" / "checkpoints" / "last.ckpt")
    saved["lit_sparse"]["updates"][-1]["state"]["importance"]["space"] = "factors"
    torch.save(saved, tmp_path / "factors.ckpt")
    paths = [str(phases / "full"), str(tmp_path / "factors.ckpt")]
    options = {"base": str(phases / "tuned"), "importance": paths}
    refused(phases, FULL, "is in the space factors, others in weights, but importances add up", **options)


def test_importance_of_whole_weights_is_of_this_base_too(phases):
    """With the base as anchor, a run may start where the earlier one started or ended, and nowhere else."""
    for base in ("base", "tuned"):
        attach(build(phases, FULL, base=str(phases / base), anchor="base"))
    refused(
        phases, FULL, "is of another base than this run's, .*: .* is neither", base=str(phases / "other"), anchor="base"
    )


# ---- L2-SP


@pytest.mark.parametrize(
    "config",
    [peft.LoHaConfig(r=2, target_modules=["q_proj"]), LoraConfig(r=2, target_modules=["embed_tokens"])],
    ids=["loha", "embedding"],
)
def test_factors_are_not_taken_for_weights(config):
    for update in (L2SP(), RecordImportance()):
        model = tiny_llm()
        PEFT(config).attach(model, no_probe, ALONE)
        with pytest.raises(BadInput, match=f"{type(update).__name__}: .* is a factor of .*, not a weight"):
            update.attach(model, no_probe, ALONE)
    model = tiny_llm()
    PEFT(config).attach(model, no_probe, ALONE)
    RecordImportance(space="factors").attach(model, no_probe, ALONE)


def test_biases_beside_lora_are_weights():
    model, update = tiny_llm("qwen2"), L2SP()
    lora(bias="all").attach(model, no_probe, ALONE)
    update.attach(model, no_probe, ALONE)
    assert any(name.endswith("q_proj.base_layer.bias") for name in update._anchors)


def test_l2sp_leaves_a_classifiers_head_free():
    model, update = tiny_encoder(), L2SP()
    update.attach(model, no_probe, ALONE)
    own = {name for name, _ in trainable(model)}
    assert own - update._anchors.keys() == {
        f"{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")
    }
    with pytest.raises(BadInput, match=r"only the classifier's head is among the targets \['classifier'\]"):
        L2SP(targets=["classifier"]).attach(tiny_encoder(), no_probe, ALONE)


@pytest.mark.parametrize("kind", TINY)
def test_contract_of_l2sp(kind):
    contract(lambda: [L2SP(alpha=0.1), lora(target_modules="all-linear")], kind)
    contract(lambda: [L2SP(alpha=0.1)], kind)


def test_on_lora_its_gradient_is_that_of_the_dense_product():
    model, update = tiny_llm(), L2SP(alpha=0.7)
    lora().attach(model, no_probe, ALONE)
    update.attach(model, no_probe, ALONE)
    torch.manual_seed(0)
    values = {}
    for name, parameter in trainable(model):
        parameter.data.normal_()
        parameter.grad = torch.zeros_like(parameter)
        values[name] = parameter.detach().double().requires_grad_()
    names = [name.partition(".lora_A")[0] for name in values if "lora_A" in name]
    a, b = ([values[f"{name}.lora_{factor}.default.weight"] for name in names] for factor in "AB")
    value = 0.35 * sum((2.0 * second @ first).square().sum() for first, second in zip(a, b, strict=True))
    value.backward()
    update.before_step(1, AdamW([p for _, p in trainable(model)], lr=1.0))
    assert float(update.logged()["l2sp_penalty"]) == pytest.approx(value.item(), rel=1e-6)
    for name, parameter in trainable(model):
        torch.testing.assert_close(parameter.grad.double(), values[name].grad, rtol=1e-5, atol=1e-5)


def test_on_weights_it_ends_at_ridge_regression_around_the_base():
    torch.manual_seed(0)
    x, y, start = torch.randn(30, 4).double(), torch.randn(30).double(), torch.randn(1, 4).double()
    model, update = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64), L2SP(alpha=5.0)
    model.weight.data.copy_(start)
    update.attach(model, no_probe, ALONE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, 401):
        optimizer.zero_grad()
        (model(x)[:, 0] - y).square().sum().div(2).backward()
        update.before_step(step, optimizer)
        optimizer.step()
    expected = torch.linalg.solve(x.t() @ x + 5 * torch.eye(4).double(), x.t() @ y + 5 * start[0])
    torch.testing.assert_close(model.weight.detach()[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_weights_adam_does_not_rescale_it(dtype):
    """With a zero gradient, weights move back by lr * alpha of the distance; on the fp32 master if there is one."""
    model, update = torch.nn.Linear(4, 4, bias=False).to(dtype), L2SP(alpha=0.5)
    update.attach(model, no_probe, ALONE)
    start = model.weight.detach().float().clone()
    optimizer = AdamW(parameter_groups(model.named_parameters()), lr=0.1, weight_decay=0.0)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    held = optimizer.state[model.weight].get("master", model.weight).detach()
    held += 1
    update.before_step(1, optimizer)
    optimizer.step()
    # 1 - 0.05 of the way is left; fp32 rounds weights of about 1.
    torch.testing.assert_close(held.float() - start, torch.full((4, 4), 0.95), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.weight.detach(), held.to(dtype), rtol=0, atol=0)


def test_l2sp_of_no_strength_is_the_run_without():
    models = []
    for updates in ([], [L2SP(alpha=0.0)], [L2SP(alpha=5.0)]):
        model = tiny_llm()
        for update in updates:
            update.attach(model, no_probe, ALONE)
        train(model, updates, AdamW(parameter_groups(trainable(model)), lr=1e-3), 3)
        models.append(model)
    same = [all(torch.equal(a, b) for a, b in zip(models[0].parameters(), m.parameters(), strict=True)) for m in models]
    assert same == [True, True, False]
    assert loss_of(models[0], 0) == loss_of(models[1], 0)
