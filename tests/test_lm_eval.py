"""The harness line of docs/export-and-serve.md, on an exported run and questions of our own (there is no network)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_sparse.export.folder import export
from tests.export.test_folder import SMT, make_base, make_run
from tests.export.test_generate import add_tokenizer

QUESTIONS = [
    {"question": f"t{number} t{number + 1}", "choices": [f"t{number + 2}", f"t{3 * number + 5}"], "label": number % 2}
    for number in range(10, 22)
]
TASK = {
    "task": "ours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}


def test_the_harness_reads_an_exported_folder(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the harness: pip install 'lit-sparse[eval]'")
    add_tokenizer(make_base(tmp_path / "base", "llama"), chat=False)
    folder = export(make_run(tmp_path, "llama", [SMT]).folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"]
    place = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    ran = subprocess.run([*command, "--tasks", "ours", *place], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (found,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(found.read_text())["results"]["ours"]["acc,none"] == pytest.approx(accuracy(folder))


def accuracy(folder: Path) -> float:
    """The share of questions whose right choice is the likelier one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def score(question: str, choice: str) -> float:
        ids = tokenizer(f"{question} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            return float(-model(ids, labels=ids).loss * (ids.shape[1] - 1))

    right = [max((0, 1), key=lambda n: score(row["question"], row["choices"][n])) == row["label"] for row in QUESTIONS]
    return sum(right) / len(right)
