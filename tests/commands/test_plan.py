"""The command `lit-sparse plan`: what it predicts, what it prints, and what it refuses."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from lit_sparse.cli import main, make_planned
from lit_sparse.commands import plan as planning
from lit_sparse.commands.plan import CARDS, card_of, fit_command
from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.planning.forecast import Forecast, Setting, forecast
from lit_sparse.planning.training import batch_of
from lit_sparse.strategies import Updates
from lit_sparse_profiling.trace import Overdue, Trace

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


LAYER = (64 * 64, 64 * 32, 64 * 32, 64 * 64, *[64 * 160] * 3, 64, 64)
"""Weights of a decoder layer: attention's four, the MLP's three, two norms."""
SHARDED = ["full.yaml", "--trainer.strategy=lit_sparse.modules.sharding.FSDP2Strategy"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**SIZES).save_pretrained(folder)
    return str(folder / "config.json")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["lit-sparse", "plan", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    assert run(monkeypatch, *words, "--json", str(tmp_path / "plans.json")) == 0
    return json.loads((tmp_path / "plans.json").read_text("utf-8"))


def test_of_a_sharded_model_lisa_is_planned_for_either_draw_that_may_take_most(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours have their whole gradients at once; the lowest layer, below frozen embeddings, has most saved."""
    options = [f"--model.base={base}", "--model.updates.interval=2", "--model.activation_checkpointing=true"]
    command, setting = fit_command("lisa_grad_norm.yaml", [], options), Setting("cpu", 2, 64, ranks=2, sharded=True)
    ways = make_planned(command).module.updates.costliest(sharded=True)
    both = forecast("both", make_planned(command).module, setting)
    alone = []
    for way in ways:
        monkeypatch.setattr(Updates, "costliest", lambda *_, way=way: [way])
        alone.append(forecast("one", make_planned(command).module, setting))
    first, neighbours = alone
    assert both.allocated == neighbours.allocated > first.allocated
    assert both.phases["forward"].bytes == first.phases["forward"].bytes > neighbours.phases["forward"].bytes
    assert both.kept.bytes == first.kept.bytes


def test_several_plans_tell_which_is_being_made(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    planned = planning.planned

    def watched(name: str, *rest: Any) -> Any:
        told.append(capsys.readouterr().err)
        return planned(name, *rest)

    monkeypatch.setattr(planning, "planned", watched)
    words = ["--model.base", base, "--data.max_length", "16"]
    assert run(monkeypatch, "ia3.yaml", "meft.yaml", *words, "--model.quantize", "int8", "lora.yaml") == 1
    assert told == [
        "1 of 3: ia3.yaml ...",
        " cannot be planned\n2 of 3: meft.yaml ...",
        " cannot be planned\n3 of 3: lora.yaml ...",
    ]
    told.clear()
    capsys.readouterr()
    assert run(monkeypatch, "ia3.yaml", "lora.yaml", *words) == 0
    assert told[0] == "1 of 2: ia3.yaml ..."
    assert told[1].endswith(" GiB\n2 of 2: lora.yaml ...")
    out = capsys.readouterr()
    assert out.err.endswith(" GiB\n")
    assert "of 2:" not in out.out
    assert run(monkeypatch, "ia3.yaml", *words) == 0
    assert "1 of 1" not in capsys.readouterr().err


def test_full_fine_tuning_keeps_what_arithmetic_says(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU: fp32 weights, their gradients and two moments; bf16 logits of a chunk beside fp32 ones."""
    (found,) = plans(monkeypatch, tmp_path, "full.yaml", "--model.base", base, "--data.max_length", "32")
    weights = sum(parameter.numel() for parameter in LlamaForCausalLM(LlamaConfig(**SIZES)).parameters())
    assert found["parameters"] == found["trainable"] == weights
    step = found["phases"]["optimizer step"]["categories"]
    assert step["trained weights"] == step["gradients"] == 4 * weights
    assert 8 * weights <= step["optimizer state"] < 8 * weights + 4096
    assert found["allocated"] <= found["reserved"] < found["needed"]
    assert found["reserved"] % (2 * 2**20) == 0
    # Matrix products take 6 FLOPs a weight and token, those of the embedding none.
    tokens, matrices = 4 * 32, weights - 512 * 64
    assert 6 * tokens * matrices <= found["flops"] <= 8 * tokens * matrices


def test_checkpointing_adapters_and_shorter_rows_take_less(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = ["--model.base", base, "--device", "cpu"]
    full, smt = plans(monkeypatch, tmp_path, "full.yaml", "smt.yaml", *common)
    (checkpointed,) = plans(monkeypatch, tmp_path, "full.yaml", *common, "--model.activation_checkpointing", "true")
    (shorter,) = plans(monkeypatch, tmp_path, "full.yaml", *common, "--data.max_length", "128")
    assert smt["allocated"] < full["allocated"]
    assert smt["trainable"] < 0.01 * smt["parameters"]
    assert checkpointed["allocated"] < 0.8 * full["allocated"]
    assert shorter["allocated"] < 0.5 * full["allocated"]
    assert full["reserved"] == full["allocated"]  # no caching allocator on a CPU


def test_a_ddp_rank_also_has_buckets_of_its_gradients(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = ["full.yaml", "--model.base", base, "--device", "cpu"]
    (alone,) = plans(monkeypatch, tmp_path, *common)
    (rank,) = plans(monkeypatch, tmp_path, *common, "--trainer.strategy", "ddp", "--trainer.devices", "2")
    assert rank["allocated"] - alone["allocated"] == 4 * alone["trainable"]


def test_a_rank_of_fsdp2_has_its_shards_and_one_unit_whole(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = ["full.yaml", "--model.base", base, "--device", "cpu", "--data.max_length", "32"]
    (alone,) = plans(monkeypatch, tmp_path, *common)
    ranks = ["--trainer.strategy", "fsdp2", "--trainer.devices", "4"]
    (rank,) = plans(monkeypatch, tmp_path, *common, *ranks)
    assert rank["setting"]["ranks"] == 4
    weights = 4 * alone["trainable"]
    step = rank["phases"]["optimizer step"]["categories"]
    assert step["trained weights"] == step["gradients"] == weights / 4
    assert weights / 2 <= step["optimizer state"] < weights / 2 + 4096
    gathered = [rank["phases"][phase]["categories"]["gathered weights"] for phase in ("forward", "backward")]
    outside = weights - 4 * (4 * sum(LAYER))  # which stays whole until the backward pass has ended
    assert all(size in (outside, outside + 4 * sum(LAYER)) for size in gathered)
    # HSDP: two groups of two ranks, each of which holds a half.
    spread = ["--trainer.strategy.init_args.replicas=2", "--trainer.devices=[0,1,2,3]"]
    (group,) = plans(monkeypatch, tmp_path, *SHARDED, *common[1:], *spread)
    assert group["phases"]["optimizer step"]["categories"]["gradients"] == weights / 2


def test_the_largest_batch_fits_and_a_larger_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, 8, 900)
    LlamaConfig(**{**SIZES, "num_hidden_layers": 1}).save_pretrained(tmp_path)  # several plans, of a layer each
    command = fit_command("full.yaml", [], [f"--model.base={tmp_path / 'config.json'}", "--data.max_length=64"])
    found = planning.planned("full.yaml", make_planned, command, "cuda", 8)
    assert found.largest is not None
    assert found.largest > 4

    def needed(size: int) -> int:
        return forecast("full", make_planned(command).module, Setting("cuda", size, 64)).needed

    assert needed(found.largest) <= 900 * 2**20 < needed(found.largest + max(4, found.largest // 10))


def test_it_says_what_is_alive_and_which_lever_would_make_it_fit(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CARDS, 8, 860)
    assert run(monkeypatch, "full.yaml", "--model.base", base, "--card", "8", "--tflops", "312") == 0
    printed = capsys.readouterr().out
    assert "model.embed_tokens.weight" not in printed.split("alive at the peak")[0]
    assert "saved for backward" in printed
    assert "full does not fit 8 GB" in printed
    assert "With --model.activation_checkpointing=true it needs" in printed
    assert "us/token, estimated" in printed


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("meft", "With --data.batch_size=1 it needs"),  # which refuses checkpointing
        ("mezo", "With --data.batch_size=1 it needs"),  # of which it would change nothing
    ],
)
def test_levers_that_a_method_does_not_take_are_not_tried(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, told: str
) -> None:
    monkeypatch.setitem(CARDS, 8, 700)
    assert run(monkeypatch, f"{method}.yaml", "--model.base", base, "--card", "8", "--data.max_length", "32") == 0
    advice = capsys.readouterr().out.partition(f"{method} does not fit 8 GB")[2]
    assert told in advice
    assert "checkpointing" not in advice


@pytest.mark.parametrize("method", ["lift", "losia"])
def test_entries_that_trained_before_are_planned_on_the_host(base: str, method: str) -> None:
    """They keep a position and a value each: as many as train, since a plan knows no values to choose others by."""

    def state(device: Any) -> int:
        made = make_planned(fit_command(f"{method}.yaml", [], [f"--model.base={base}", "--model.updates.reselect=2"]))
        plan = forecast(method, made.module, Setting(device, 1, 16))
        trained.append(plan.trainable)
        return plan.phases["forward"].categories["strategy state"]

    trained: list[int] = []
    # LoSiA's subnets of the head are in no part of it: they change at no time.
    assert state("cpu") - state("cuda") == pytest.approx(8 * trained[0], rel=0.0001)


def test_more_gpus_are_tried_for_a_single_method_that_nothing_else_makes_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CARDS, 8, 800)  # the context and the workspaces of cuBLAS alone take more
    LlamaConfig(**{**SIZES, "num_hidden_layers": 1}).save_pretrained(tmp_path)
    words = ["--model.base", str(tmp_path / "config.json"), "--data.max_length", "16", "--card", "8"]
    words += ["--data.batch_size", "1", "--model.activation_checkpointing", "true"]
    assert run(monkeypatch, "full.yaml", *words) == 0
    told = capsys.readouterr().out.partition("full does not fit 8 GB")[2]
    assert "With --trainer.devices=8 --trainer.strategy=fsdp2 it needs" in told
    assert "nf4" not in told  # full fine-tuning trains what would be packed
    assert run(monkeypatch, "full.yaml", "ia3.yaml", *words) == 0
    assert "--trainer.devices" not in capsys.readouterr().out


def test_a_model_whose_activations_are_powers_is_planned_with_checkpointing(tmp_path: Path) -> None:
    """GPT-2's GELU is computed in fp32 under a GPU's autocast, in the forward pass and when it is recomputed."""
    special = {"bos_token_id": 1, "eos_token_id": 2}
    GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=512, **special).save_pretrained(tmp_path)

    def planned(checkpointing: str) -> Any:
        options = [f"--model.base={tmp_path / 'config.json'}", f"--model.activation_checkpointing={checkpointing}"]
        return forecast("full", make_planned(fit_command("full.yaml", [], options)).module, Setting("cuda", 2, 32))

    saved = [planned(checkpointing).kept.categories["saved for backward"] for checkpointing in ("true", "false")]
    assert saved[0] < 0.5 * saved[1]


def test_a_compiled_model_is_planned_as_it_is_and_says_so(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["lora.yaml", "--model.base", base, "--data.max_length", "32", "--device", "cpu"]
    (plain,) = plans(monkeypatch, tmp_path, *common)
    assert "model.compile" not in capsys.readouterr().out
    (compiled,) = plans(monkeypatch, tmp_path, *common, "--model.compile", "true")
    assert "an estimate and no bound" in capsys.readouterr().out
    assert compiled["compiled"]
    assert compiled["allocated"] == plain["allocated"]


def test_a_base_in_4_bits_has_half_a_byte_and_its_scales_for_each_weight(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    common = ["lora.yaml", "--model.base", base, "--data.max_length", "32"]
    (plain,) = plans(monkeypatch, tmp_path, *common)
    (packed,) = plans(monkeypatch, tmp_path, *common, "--model.quantize", "nf4")
    assert packed["parameters"] == plain["parameters"]
    linear, layers = sum(LAYER) - 128, 4  # all but the norms
    rest = plain["parameters"] - layers * linear
    size = packed["phases"]["optimizer step"]["categories"]["frozen weights"]
    assert size == pytest.approx(2 * rest + layers * linear * (1 / 2 + 1 / 64 + 4 / 64 / 256), abs=28 * 1200)


def test_methods_stack(base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = ["--model.base", base, "--device", "cpu", "--data.max_length", "32", "--data.batch_size", "1"]
    lora, both = plans(monkeypatch, tmp_path, "lora.yaml", "lora.yaml+deft.yaml", *common)
    assert both["name"] == "lora+deft"
    assert both["trainable"] == lora["trainable"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["full.yaml", "--card", "23"], "--card 23 was asked for; the known sizes in GB are 8, 12, 16, 24"),
        (["full.yaml", "--card", "²"], "--card ² was asked for; the known sizes in GB are 8, 12, 16, 24"),
        (["full.yaml", "--largest"], "--largest was asked for without a card; add --card 24"),
        (["full.yaml", "--tflops", "0"], "--tflops is 0.0; give the card's dense bf16 TFLOP/s"),
        (["full.yaml", "--tflops", "inf"], "--tflops is inf; give the card's dense bf16 TFLOP/s"),
        (["full.yaml", "--trainer.devices", "x"], "trainer.devices is x; give a number of devices, a list of their"),
        (["full.yaml", "--trainer.devices", "0"], "trainer.devices is 0; give a number of devices"),
        (["full.yaml", "--trainer.num_nodes", "0"], "trainer.num_nodes is 0, but it is a number of machines; give 1"),
        (["full.yaml", "--trainer.num_nodes", "-1"], "trainer.num_nodes is -1, but it is a number of machines; give 1"),
        (["full.yaml", "--trainer.devices", "0,b"], "trainer.devices is 0,b; give a number of devices"),
        (["nothing.yaml"], "there is no nothing.yaml"),
        (["full.yaml", "--model.base", "BARE"], "gives no hidden_size and no num_hidden_layers and no vocab_size"),
        (["full.yaml", "--model.base", "WORDS"], "Field 'num_hidden_layers' expected int, got str (value: 'many')"),
        (["full.yaml", "--model.base", "UNEVEN"], "The hidden size (66) is not a multiple of the number of attention"),
        (["full.yaml", "--model.base", "ZERO"], "has hidden_size 0 (at least 1); correct it"),
        (["full.yaml", "--model.base", "/nowhere/at/all"], "no model could be loaded from '/nowhere/at/all'"),
        (["lora.yaml", "--model.quantize", "int8"], "model.quantize is int8, where what is kept of a batch depends"),
        (["smt.yaml", *SHARDED[1:], "--model.updates.warmup=update"], "trainer.strategy is fsdp2, but SMT"),
        ([*SHARDED, "--trainer.strategy.offload=true"], "trainer.strategy has offload, whose host memory plan does"),
        ([*SHARDED, "--trainer.strategy.replicas=2"], "replicas 2, which do not divide 1 ranks; give a divisor"),
        (
            ["full.yaml", "--data.batch_size", "1000000000"],
            "1000000000 x 16 tokens was to be planned, but at most 8,388",
        ),
        (
            ["full.yaml", "--trainer.devices", "1000000000"],
            "1000000000 ranks were to be planned, but at most 1,000,000",
        ),
        (
            ["full.yaml", "--trainer.accumulate_grad_batches=0"],
            "trainer.accumulate_grad_batches is 0, but a step needs",
        ),
        (["full.yaml", "--json", "."], "The plan was to be written to ., which is a folder; name a file."),
        (
            ["full.yaml", "--json", "/nowhere/at/all.json"],
            "--json /nowhere/at/all.json cannot be written: there is no folder",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    said: str,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.json"
    wrong = {
        "BARE": {},
        "WORDS": {"num_hidden_layers": "many"},
        "UNEVEN": {"hidden_size": 66},
        "ZERO": {"hidden_size": 0},
    }
    for word in set(wrong) & set(words):
        sizes = wrong[word] and {**SIZES, **wrong[word]}
        file.write_text(json.dumps({"model_type": "llama", **sizes}))
        words = [str(file) if one == word else one for one in words]
    model = [] if "--model.base" in words else ["--model.base", base]
    assert run(monkeypatch, *words, *model, "--data.vocab_size", "96", "--data.max_length", "16") == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed.replace("\n", " ")
    assert printed.startswith("lit-sparse: ")


def test_json_replaces_plans_only_and_keeps_them_where_the_disk_is_full(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["full.yaml", "--model.base", base, "--data.vocab_size", "96", "--data.max_length", "16"]
    file = tmp_path / "plans.json"
    file.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(planning, "planned", lambda *_: pytest.fail("it was planned"))
        assert run(monkeypatch, *words, "--json", str(file)) == 2
    assert "no earlier plan; give another path, or remove it." in capsys.readouterr().err
    assert file.read_text() == "mine"
    file.write_text("")
    plans(monkeypatch, tmp_path, *words)
    before = plans(monkeypatch, tmp_path, *words)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert run(monkeypatch, *words, "--json", str(file)) == 2
    assert "plans.json cannot be written: No space left on device; give another file." in capsys.readouterr().err
    assert json.loads(file.read_text()) == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_batch_is_that_of_the_collator(base: str) -> None:
    row = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    module = make_planned(fit_command("full.yaml", [], [f"--model.base={base}"])).module
    made, collated = batch_of(module, Setting("cpu", 3, len(row))), Padded(Padding())([Example(row, row)] * 3)
    assert made.keys() == collated.keys()
    assert all(torch.equal(made[name], collated[name]) for name in made)


@pytest.mark.parametrize("method", ["full.yaml", "mezo.yaml"])
def test_a_step_of_many_batches_is_traced_as_one_of_two(base: str, method: str) -> None:
    def at(micro_batches: int) -> Forecast:
        module = make_planned(fit_command(method, [], [f"--model.base={base}"])).module
        return forecast("x", module, Setting("cpu", 1, 16, micro_batches))

    one, two, many = at(1), at(2), at(10**6)
    assert many.allocated == two.allocated
    assert many.flops == one.flops + (10**6 - 1) * (two.flops - one.flops)


def test_the_largest_batch_has_no_more_tokens_than_can_be_planned(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_TOKENS", 160)
    module = make_planned(fit_command("full.yaml", [], [f"--model.base={base}"])).module
    first = forecast("x", module, Setting("cuda", 2, 16))
    assert planning.largest_batch(first, lambda size: replace(first, setting=Setting("cuda", size, 16)), 24) == 10


def test_a_trace_ends_at_its_limit_of_time(base: str) -> None:
    module = make_planned(fit_command("full.yaml", [], [f"--model.base={base}"])).module
    with pytest.raises(Overdue):
        forecast("full", module, Setting("cpu", 1, 16), seconds=0.0)


def test_a_trace_that_is_over_its_time_ends_in_no_question_for_a_device():
    """Within TensorIterator, where C++ asks for it, an exception ends the process with SIGABRT."""
    trace = Trace(seconds=0.0)
    fake = trace.empty(torch.zeros(2))
    with trace:
        assert torch.ops.prim.device.default(fake).type == "cpu"
        with pytest.raises(Overdue):
            _ = fake + fake


def test_a_method_that_reads_values_is_refused_with_a_bound(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unique(self: Any, step: int, optimizer: Any) -> None:
        torch.unique(next(iter(optimizer.param_groups[0]["params"])).grad)

    command = fit_command("gmt.yaml", [], [f"--model.base={base}"])
    made = make_planned(command)
    monkeypatch.setattr("lit_sparse.strategies.gmt.GMT.before_step", unique)
    with pytest.raises(planning.BadInput, match=r"GMT cannot be traced without values .*at most \d+\.\d\d GiB"):
        forecast("gmt", made.module, Setting("cpu", 1, 16))


def test_a_card_may_be_given_with_its_unit() -> None:
    assert card_of("24GB") == card_of("24") == 24
    assert card_of(None) is None


@pytest.mark.parametrize("text", ["²", "9" * 5000, "", "-24", "2.4"])
def test_a_card_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(planning.BadInput, match=r"^--card .* was asked for; the known sizes in GB are 8, 12, 16, 24"):
        card_of(text)


def test_a_yaml_whose_path_has_a_plus_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run of two methods leaves it."""
    monkeypatch.chdir(tmp_path)
    path = Path("runs", "lora+deft-1", "config.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("data: Text\n")
    assert fit_command(str(path), [], []) == [f"--config={path}"]
    assert len(fit_command("lora.yaml+deft.yaml", [], ["--data=Text"])) == 3
