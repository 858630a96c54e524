"""PEFT loads an exported adapter on the base, and computes what the run computed."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lit_sparse.errors import BadInput
from lit_sparse.export import adapter as adapters
from lit_sparse.export.folder import MARK, export
from tests.export.test_folder import SMT, Run, files, load, logits, lora, make_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),  # about PEFT's way of exporting
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def other(kind: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"class_path": "PEFT", "init_args": {"config": {"class_path": f"peft.{kind}", "init_args": settings}}}]


VELORA = {"class_path": "peft.VeloraConfig", "init_args": {"num_groups": 8, "init_type": "batch_average_once"}}
ADAPTERS = {
    "lora": lora(target_modules="all-linear"),
    "dora": lora(target_modules="all-linear", use_dora=True),
    "pissa": lora(target_modules="all-linear", init_lora_weights="pissa"),
    "pissa-rslora": lora(
        target_modules="all-linear", init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2}
    ),
    "pissa-dora": lora(target_modules="all-linear", init_lora_weights="pissa", use_dora=True),
    "velora": lora(target_modules="all-linear", velora_config=VELORA),
    "head": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": other("IA3Config"),
    "shira": other("ShiraConfig", r=4, target_modules="all-linear"),
    "vera": other("VeraConfig", r=4, target_modules=["q_proj", "o_proj"]),
}
RUNS = [(name, "llama") for name in ADAPTERS] + [
    ("lora", "gpt2"),
    ("dora", "qwen2"),
    ("ia3", "gpt2"),
    ("pissa", "gpt2"),
]


def with_adapter(run: Run, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(load(run.base), folder))


@pytest.mark.parametrize(("method", "kind"), RUNS)
def test_peft_computes_what_the_run_computed(method: str, kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind, ADAPTERS[method])
    found = with_adapter(run, export(run.folder, "adapter"))
    exact = not method.startswith("pissa")  # the others are the same numbers in the same places
    torch.testing.assert_close(found, run.logits, rtol=0, atol=0 if exact else 1e-5)
    assert not torch.allclose(found, logits(load(run.base)), atol=1e-3)


def test_the_folder_is_pefts_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "llama", ADAPTERS["pissa-rslora"])
    folder = export(run.folder, "adapter")
    assert folder == run.folder / "adapter"
    assert {path.name for path in files(folder)} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        MARK,
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["task_type"]) == (8, True, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(run.base)
    assert json.loads((folder / MARK).read_text())["updates"] == ["PEFT"]
    assert f"Wrote {folder}." in capsys.readouterr().out
    whole = logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(whole, run.logits, rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="is there already"):
        export(run.folder, "adapter")
    assert export(run.folder, "adapter", overwrite=True) == folder


def test_a_run_without_an_adapter_is_refused(tmp_path: Path) -> None:
    for number, (updates, name) in enumerate([([SMT], "SMT"), ([], "full fine-tuning")]):
        run = make_run(tmp_path / str(number), "llama", updates)
        before = files(tmp_path)
        with pytest.raises(BadInput, match=f"an adapter of try-1 was asked for, but {name} trained none"):
            export(run.folder, "adapter")
        assert files(tmp_path) == before


def test_a_start_that_rounded_the_base_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", ADAPTERS["pissa"], precision="bfloat16")
    with pytest.raises(BadInput, match=r"would not compute on its base what the run computed .* --to hf"):
        export(run.folder, "adapter")
    assert not (run.folder / "adapter").exists()
    assert export(run.folder).is_dir()


def test_an_adapter_in_bfloat16_keeps_its_masters(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", ADAPTERS["lora"], precision="bfloat16")
    assert export(run.folder, "adapter").is_dir()
    with pytest.raises(BadInput, match="adapter in float32 was asked for"):
        export(run.folder, "adapter", dtype="float32", overwrite=True)


def test_an_adapter_that_loads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "llama", ADAPTERS["lora"])
    monkeypatch.setattr(adapters.PeftModel, "from_pretrained", lambda base, folder: base)
    with pytest.raises(BadInput, match="would not compute on its base"):
        export(run.folder, "adapter")
    assert not (run.folder / "adapter").exists()
