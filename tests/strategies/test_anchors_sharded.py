"""Recorders and penalties under FSDP2 on two processes give the results of one process on the same rows."""

from pathlib import Path
from typing import cast

import pytest
import torch

from lit_sparse.modules import LitSparse
from lit_sparse.testing import tiny_llm
from tests.methods import module
from tests.modules.test_sharding import ATOL, FULL, SMT_FIELDS, assert_alike, fit, keep, refusal, saved, saving
from tests.pair import attempt, result, run_pair

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed runs save otherwise
]


def lora(r: int = 4, **settings: object) -> dict:
    config = {"r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"], **settings}
    return {"class_path": "PEFT", "init_args": {"config": {"class_path": "peft.LoraConfig", "init_args": config}}}


def recorder(**fields: object) -> dict:
    return {"class_path": "RecordImportance", "init_args": fields}


BLOCKS = {"class_path": "SMT", "init_args": {**SMT_FIELDS, "blocks": "random"}}
RECORDING: dict[str, tuple[str, list[dict]]] = {
    "product": ("llama", [lora(), recorder()]),
    "odd": ("llama", [lora(3, target_modules="all-linear"), recorder()]),  # shards of unlike sizes
    "one": ("llama", [lora(1), recorder(space="factors")]),  # one process has nothing of A
    "factors": ("llama", [lora(), recorder(space="factors", every=2)]),
    "parameters": ("llama", [recorder()]),
    "tied": ("qwen2", [recorder()]),  # and biases
    "transposed": ("gpt2", [recorder(targets=["qkv", "down"])]),
    "transposed product": ("gpt2", [lora(target_modules=["c_attn"]), recorder()]),
    "blocks": ("llama", [BLOCKS, recorder()]),  # which every rank has whole
}
"""The base of each kind of run that records, and its updates."""
SETTINGS = {**FULL, "updates": []}
TRAINED = {"product": [lora()], "parameters": []}
HELD = [(kind, how) for kind in TRAINED for how in ("adaptive", "bfloat16 importance", "l2sp")]
STEPS = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
BFLOAT16 = {"precision": "bfloat16", "lr": 1e-5, "warmup_steps": 0, "schedule": "constant"}
"""Steps so small that they are lost in bf16 weights; the optimizer's masters make them."""


def recording(folder: Path, kind: str) -> LitSparse:
    base, updates = RECORDING[kind]
    return module("full", folder / base, **{**SETTINGS, "updates": updates})


def holding(folder: Path, kind: str, how: str, **options: object) -> LitSparse:
    """Return a module that trains what `kind` names, with a penalty on one process's record or towards the base."""
    held = {"importance": str(folder / f"{kind} one.ckpt"), "phi": 1.0, "anchor": "base"}
    update = {
        "adaptive": {"class_path": "AdaptiveRegularization", "init_args": held},
        "bfloat16 importance": {"class_path": "AdaptiveRegularization", "init_args": {**held, "dtype": "bfloat16"}},
        "l2sp": {"class_path": "L2SP", "init_args": {"alpha": 1.0}},
        "free": None,
    }[how]
    updates = [*TRAINED[kind], *([update] if update else [])]
    return module("full", folder / "llama", **{**SETTINGS, "updates": updates, **options})


def small_steps(folder: Path) -> LitSparse:
    return module("full", folder / "llama", **BFLOAT16, updates=[recorder()])


FISHER: dict[str, list[dict]] = {"product": [lora()], "parameters": [], "blocks": [BLOCKS]}
"""Methods that train beside RecordFisher. The model is sharded before it where SMT trains blocks, which are not."""


def fisher(folder: Path, kind: str, samples: int) -> LitSparse:
    update = {"class_path": "RecordFisher", "init_args": {"samples": samples}}
    return module("full", folder / "llama", **{**SETTINGS, "updates": [*FISHER[kind], update]})


# ---- what runs in the two processes


def work(folder: Path, rank: int) -> None:
    """Run all cases in one of the two processes."""
    for kind in RECORDING:
        attempt(folder, rank, kind, lambda kind=kind: record(folder, kind))
    for kind, how in HELD:
        attempt(folder, rank, f"{kind} {how}", lambda kind=kind, how=how: hold(folder, kind, how))
    attempt(folder, rank, "small", lambda: resumed(folder, "small", lambda: small_steps(folder)))
    for kind in FISHER:
        attempt(folder, rank, f"fisher {kind}", lambda kind=kind: look(folder, kind))
    half = {"precision": "bfloat16"}
    attempt(folder, rank, "half", lambda: refusal(lambda: fit(holding(folder, "parameters", "adaptive", **half), True)))


def record(folder: Path, kind: str) -> dict:
    return resumed(folder, kind, lambda: recording(folder, kind))[-1]


def hold(folder: Path, kind: str, how: str) -> list[dict]:
    return resumed(folder, f"{kind} {how}", lambda: holding(folder, kind, how))


def resumed(folder: Path, name: str, make) -> list[dict]:
    """Save a straight run and one resumed after the third of six steps; return each strategy's description."""
    straight = fit(make(), True, 6, **saving(folder / name), **STEPS)
    keep(straight, folder / f"{name}.ckpt")
    keep(fit(make(), True, 6, folder / name / "step=3.ckpt", seed=1, **STEPS), folder / f"{name} again.ckpt")
    made = cast(LitSparse, straight.lightning_module)
    return [said_by(update) for update in made.updates]


def said_by(update) -> dict:
    return {**update.describe(), **{name: float(value) for name, value in update.logged().items()}}


def look(folder: Path, kind: str) -> None:
    keep(fit(fisher(folder, kind, 16), True, 1, batch=2), folder / f"fisher {kind}.ckpt")


# ---- the tests


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Return the folder with the results of one process and of two."""
    folder = tmp_path_factory.mktemp("pair")
    for kind in ("llama", "qwen2", "gpt2"):
        tiny_llm(kind).save_pretrained(folder / kind)
    for kind in RECORDING:
        keep(fit(recording(folder, kind), False, 6, **STEPS), folder / f"{kind} one.ckpt")
    run_pair(work, folder)
    return folder


def recorded(path: Path) -> dict[str, dict]:
    return saved(path)["lit_sparse"]["updates"][-1]["state"]["importance"]["matrices"]


def assert_recorded_alike(got: dict[str, dict], wanted: dict[str, dict], tolerance: float) -> None:
    """Check equal starts, and sums that differ by at most `tolerance` of a matrix's largest entry."""
    assert got.keys() == wanted.keys()
    for name, one in wanted.items():
        largest = float(one["sums"].abs().max())
        assert largest > 0
        torch.testing.assert_close(got[name]["sums"], one["sums"], rtol=0, atol=tolerance * largest)
        assert got[name]["base"] == one["base"]
        assert got[name]["start"].keys() == one["start"].keys()
        assert all(torch.equal(got[name]["start"][key], value) for key, value in one["start"].items())


@pytest.mark.parametrize("kind", RECORDING)
def test_two_processes_record_what_one_does(kind, pair):
    """Sums of products of fp32 gradients and movements, each added up in another order, which six steps carry on."""
    result(pair, kind)
    assert_recorded_alike(recorded(pair / f"{kind}.ckpt"), recorded(pair / f"{kind} one.ckpt"), 5e-5)


@pytest.mark.parametrize("kind", [*RECORDING, "small"])
def test_a_resumed_record_is_the_straight_one(kind, pair):
    result(pair, kind)
    assert_alike(saved(pair / f"{kind} again.ckpt"), saved(pair / f"{kind}.ckpt"))
    assert_recorded_alike(recorded(pair / f"{kind} again.ckpt"), recorded(pair / f"{kind}.ckpt"), 0)


@pytest.mark.parametrize("kind", ["product", "parameters"])
def test_a_record_goes_on_with_another_number_of_processes(kind, pair):
    result(pair, kind)
    on_one = fit(recording(pair, kind), False, 6, pair / kind / "step=3.ckpt", seed=1, **STEPS)
    keep(on_one, pair / "on one.ckpt")
    assert_recorded_alike(recorded(pair / "on one.ckpt"), recorded(pair / f"{kind}.ckpt"), 5e-5)


@pytest.mark.parametrize("kind", ["product", "parameters"])
def test_each_rank_keeps_the_sums_of_its_shards(kind, pair):
    whole = sum(one["sums"].nbytes for one in recorded(pair / f"{kind}.ckpt").values())
    shares = [result(pair, kind, rank)["bytes"] for rank in (0, 1)]
    assert sum(shares) == (2 * whole if kind == "product" else whole)


@pytest.mark.parametrize(("kind", "how"), HELD)
def test_two_processes_hold_what_one_does(kind, how, pair):
    said = result(pair, f"{kind} {how}")[-1]
    one = fit(holding(pair, kind, how), False, 6, **STEPS)
    keep(one, pair / "held one.ckpt")
    got, wanted = saved(pair / f"{kind} {how}.ckpt"), saved(pair / "held one.ckpt")
    assert_alike(got, wanted, ATOL)
    (name,) = [name for name in said if name.endswith("_penalty")]
    assert said[name] == pytest.approx(said_by(cast(LitSparse, one.lightning_module).updates[-1])[name], rel=1e-3)
    assert_alike(saved(pair / f"{kind} {how} again.ckpt"), got)
    free = fit(holding(pair, kind, "free"), False, 6, **STEPS).lightning_module.state_dict()
    assert any((value - free[name]).abs().max() > 100 * ATOL for name, value in wanted["state_dict"].items())


def test_steps_that_bf16_weights_lose_are_recorded(pair):
    """By the optimizer's masters, as on one device by weights in fp32; gradients in bf16 change some signs."""
    result(pair, "small")
    start, trained = tiny_llm("llama").bfloat16(), saved(pair / "small.ckpt")["state_dict"]
    moved = [trained[f"model.{name}"].bfloat16() != value for name, value in start.state_dict().items()]
    assert torch.cat([one.flatten() for one in moved]).float().mean() < 0.5, "nothing is lost in bf16"
    keep(fit(small_steps(pair), False, 6, **STEPS), pair / "small one.ckpt")
    got, wanted = recorded(pair / "small.ckpt"), recorded(pair / "small one.ckpt")
    for name, one in wanted.items():
        error = (got[name]["sums"] - one["sums"]).norm() / one["sums"].norm()
        assert error < 0.02, name
        assert all(torch.equal(got[name]["start"][key], value) for key, value in one["start"].items())


def test_gradients_in_bf16_which_lose_a_weak_penalty_are_refused(pair):
    sentence = "BadInput: AdaptiveRegularization regularises model.embed_tokens.weight, whose gradients are in bfloat16"
    assert result(pair, "half").startswith(sentence)


@pytest.mark.parametrize("kind", FISHER)
def test_the_fisher_is_of_the_samples_of_all_processes(kind, pair):
    """Each row once, in orders that depend on the number of processes."""
    result(pair, f"fisher {kind}")
    keep(fit(fisher(pair, kind, 32), False, 1, batch=1), pair / "fisher one.ckpt")
    assert_recorded_alike(recorded(pair / f"fisher {kind}.ckpt"), recorded(pair / "fisher one.ckpt"), 1e-5)
