"""Recorders, and what holds weights, under FSDP2 on two processes: as on one process with their rows."""

from pathlib import Path

import pytest
import torch

from lit_sparse.modules import LitSparse
from lit_sparse.testing import tiny_llm
from tests.pair import attempt, result, run_pair
from tests.test_contract import module
from tests.test_sharding import ATOL, FULL, assert_alike, fit, keep, saved, saving

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed runs save otherwise

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ADAPTER = {"class_path": "PEFT", "init_args": {"config": {"class_path": "peft.LoraConfig", "init_args": LORA}}}
TRAINED = {"product": [ADAPTER], "parameters": []}
RECORDING = {
    **{kind: [*updates, {"class_path": "RecordImportance"}] for kind, updates in TRAINED.items()},
    "factors": [ADAPTER, {"class_path": "RecordImportance", "init_args": {"space": "factors", "every": 2}}],
    "offloaded": [{"class_path": "RecordImportance", "init_args": {"targets": ["q"], "offload": True}}],
}
SETTINGS = {**FULL, "updates": []}
LOST = {"precision": "bfloat16", "lr": 1e-5, "warmup_steps": 0, "schedule": "constant"}
"""Steps so small that they are lost in bf16 weights; the optimizer's masters make them."""


def recording(folder: Path, kind: str) -> LitSparse:
    return module("full", folder / "llama", **{**SETTINGS, "updates": RECORDING[kind]})


def holding(folder: Path, kind: str, how: str) -> LitSparse:
    """A module that trains what `kind` names, held to what one process recorded, or to the base."""
    held = {"importance": str(folder / f"{kind} one.ckpt"), "phi": 1.0, "anchor": "base"}
    update = {
        "adaptive": {"class_path": "AdaptiveRegularization", "init_args": held},
        "offload": {
            "class_path": "AdaptiveRegularization",
            "init_args": {**held, "offload": True, "dtype": "bfloat16"},
        },
        "l2sp": {"class_path": "L2SP", "init_args": {"alpha": 1.0}},
        "free": None,
    }[how]
    updates = [*TRAINED[kind], *([update] if update else [])]
    return module("full", folder / "llama", **{**SETTINGS, "updates": updates})


HELD = [(kind, how) for kind in TRAINED for how in ("adaptive", "offload", "l2sp")]


def work(folder: Path, rank: int) -> None:
    """What two processes do, of which this is one."""
    for kind in RECORDING:
        attempt(folder, rank, kind, lambda kind=kind: recorded_and_resumed(folder, kind))
    for kind, how in HELD:
        attempt(folder, rank, f"{kind} {how}", lambda kind=kind, how=how: held_and_resumed(folder, kind, how))
    attempt(folder, rank, "lost", lambda: lost(folder))
    attempt(folder, rank, "fisher", lambda: keep(fit(fisher(folder, 16), True, 1, batch=2), folder / "fisher.ckpt"))


def recorded_and_resumed(folder: Path, kind: str) -> None:
    straight = fit(recording(folder, kind), True, 6, **saving(folder / kind))
    keep(straight, folder / f"{kind}.ckpt")
    keep(fit(recording(folder, kind), True, 6, folder / kind / "step=3.ckpt", seed=1), folder / f"{kind} again.ckpt")


def held_and_resumed(folder: Path, kind: str, how: str) -> float:
    name = f"{kind} {how}"
    straight = fit(holding(folder, kind, how), True, 6, **saving(folder / name))
    keep(straight, folder / f"{name}.ckpt")
    keep(fit(holding(folder, kind, how), True, 6, folder / name / "step=3.ckpt", seed=1), folder / f"{name} again.ckpt")
    return penalty(straight.lightning_module)


def penalty(made) -> float:
    (value,) = made.updates[-1].logged().values()
    return float(value)


def lost(folder: Path) -> None:
    made = module("full", folder / "llama", **LOST, updates=RECORDING["parameters"])
    keep(fit(made, True, 6), folder / "lost.ckpt")


def fisher(folder: Path, samples: int) -> LitSparse:
    update = {"class_path": "RecordFisher", "init_args": {"samples": samples}}
    return module("full", folder / "llama", **{**SETTINGS, "updates": [ADAPTER, update]})


# ---- the tests


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The folder with what one process and two trained."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_llm("llama").save_pretrained(folder / "llama")
    for kind in RECORDING:
        keep(fit(recording(folder, kind), False, 6), folder / f"{kind} one.ckpt")
    run_pair(work, folder)
    return folder


def recorded(path: Path) -> dict[str, dict]:
    return saved(path)["lit_sparse"]["updates"][-1]["state"]["importance"]["matrices"]


@pytest.mark.parametrize("kind", RECORDING)
def test_two_processes_record_what_one_does(kind, pair):
    result(pair, kind)
    got, wanted = recorded(pair / f"{kind}.ckpt"), recorded(pair / f"{kind} one.ckpt")
    assert got.keys() == wanted.keys()
    for name, one in wanted.items():
        largest = float(one["sums"].abs().max())
        assert largest > 0
        # Sums of products of fp32 gradients and movements, each added up in another order: some 2^-22 of the largest.
        torch.testing.assert_close(got[name]["sums"], one["sums"], rtol=0, atol=1e-5 * largest)
        assert got[name]["base"] == one["base"]
        for key, value in one["start"].items():
            assert torch.equal(got[name]["start"][key], value)


@pytest.mark.parametrize("kind", RECORDING)
def test_a_resumed_record_is_the_straight_one(kind, pair):
    result(pair, kind)
    again, straight = (saved(pair / f"{name}.ckpt") for name in (f"{kind} again", kind))
    assert_alike(again, straight)
    ours, theirs = recorded(pair / f"{kind} again.ckpt"), recorded(pair / f"{kind}.ckpt")
    assert all(torch.equal(ours[name]["sums"], one["sums"]) for name, one in theirs.items())


@pytest.mark.parametrize(("kind", "how"), HELD)
def test_two_processes_hold_what_one_does(kind, how, pair):
    value = result(pair, f"{kind} {how}")
    one = fit(holding(pair, kind, how), False, 6)
    keep(one, pair / "held one.ckpt")
    got, wanted = saved(pair / f"{kind} {how}.ckpt"), saved(pair / "held one.ckpt")
    assert_alike(got, wanted, ATOL)
    assert value == pytest.approx(penalty(one.lightning_module), rel=1e-3)
    assert_alike(saved(pair / f"{kind} {how} again.ckpt"), got)
    free = fit(holding(pair, kind, "free"), False, 6).lightning_module.state_dict()
    assert any((value - free[name]).abs().max() > 100 * ATOL for name, value in wanted["state_dict"].items())


def test_steps_that_bf16_weights_lose_are_recorded(pair):
    """From the optimizer's masters: in the weights themselves hardly anything moves."""
    result(pair, "lost")
    start = tiny_llm("llama").bfloat16().float()
    trained, moved = saved(pair / "lost.ckpt")["state_dict"], []
    for name, one in recorded(pair / "lost.ckpt").items():
        began = start.get_parameter(name).detach()
        assert torch.equal(one["start"][name], began)
        moved.append(((trained[f"model.{name}"].bfloat16().float() != began).flatten(), (one["sums"] != 0).flatten()))
    in_weights, in_sums = (torch.cat(parts).float().mean() for parts in zip(*moved, strict=True))
    assert in_weights < 0.5 < 0.99 < in_sums


def test_the_fisher_is_of_the_samples_of_all_processes(pair):
    """Each row once, in orders that depend on the number of processes."""
    result(pair, "fisher")
    keep(fit(fisher(pair, 32), False, 1, batch=1), pair / "fisher one.ckpt")
    got, wanted = recorded(pair / "fisher.ckpt"), recorded(pair / "fisher one.ckpt")
    assert got.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(got[name]["sums"], one["sums"], rtol=1e-5, atol=1e-6 * float(one["sums"].max()))
