"""A handful of cells of the table of families, and how they are written down."""

import json
import re

import pytest

from benchmarks import families, family_tables
from benchmarks.families import Cell, one_cell
from benchmarks.tiny_models import FAMILIES
from lit_sparse.strategies import MEFT

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # of PEFT's own, for older models
]


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("Llama-4", "lora"),
        ("Gemma-3 (multimodal)", "lora"),
        ("gpt-oss", "lora"),
        ("DeepSeek-V3", "smt"),
        ("Falcon", "smt all, delta"),
        ("Mamba", "smt all, delta"),
        ("T5", "smt all, delta"),
        ("BART", "lisa"),
    ],
)
def test_it_fits_resumes_and_exports(family, method, tmp_path):
    tiny = FAMILIES[family]
    found = one_cell(Cell(tiny, method, tiny.write(tmp_path / "base"), tmp_path))
    assert found["ok"], found
    assert found["error"] <= min(families.TOLERANCE, found["change"])


@pytest.mark.parametrize(
    ("family", "method", "why"),
    [
        ("Mixtral", "glora", "does not reach the experts of MixtralForCausalLM"),
        ("Mllama", "lisa", "takes no part in a forward pass over text"),
        ("Mllama", "lora", "would not load again .*; export it with --to delta"),
    ],
)
def test_what_does_not_work_is_refused_in_a_sentence(family, method, why, tmp_path):
    tiny = FAMILIES[family]
    found = one_cell(Cell(tiny, method, tiny.write(tmp_path / "base"), tmp_path))
    assert not found["ok"]
    assert "failed" not in found, found
    assert re.search(why, found["refused"]), found


def test_a_run_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    """Cells that have a line are skipped, and those that failed are tried again."""
    tried = []

    def cells(family, names, ranks):
        for name in names:
            tried.append((family.name, name, ranks))
            yield name, {"ok": True, "error": 0.0} if name != "ia3" else {"ok": False, "failed": "ValueError"}

    monkeypatch.setattr(MEFT, "supports_sharding", False)  # as a method may say of itself
    monkeypatch.setattr(families, "cells", cells)
    monkeypatch.setattr(families, "quiet", lambda: None)  # it silences the whole process
    given = ["Llama", "BERT", "--methods", "lora", "ia3", "meft", "--results", str(tmp_path / "families.jsonl")]
    assert families.main(given) == 1  # one failed
    first, tried[:] = list(tried), []
    assert ("Llama", "lora", 2) in first
    assert ("Llama", "meft", 2) not in first
    assert families.main(given) == 1
    assert {name for _, name, _ in tried} == {"ia3"}
    with pytest.raises(SystemExit):
        families.main(["Lama"])
    assert "there is no family 'Lama'; known are Llama" in capsys.readouterr().err


def test_the_table_has_letters_and_numbered_reasons(tmp_path):
    source = {"date": "2026-01-02", "commit": "abc", "device": "a CPU", "versions": {"torch": "2"}}
    why = "IA3Config was asked for, but PEFT cannot put it on {} (no names); give other target_modules"
    lines = [
        {"family": "Llama", "method": "lora", "ranks": 1, "ok": True},
        {"family": "Llama", "method": "lora", "ranks": 2, "ok": True},
        {"family": "Llama", "method": "smt", "ranks": 1, "ok": True},
        {"family": "Llama", "method": "ia3", "ranks": 1, "ok": False, "refused": why.format("LlamaForCausalLM")},
        {"family": "GPT-2", "method": "ia3", "ranks": 1, "ok": False, "refused": why.format("GPT2LMHeadModel")},
        {"family": "GPT-2", "method": "smt", "ranks": 1, "ok": False, "failed": "ValueError"},
    ]
    (tmp_path / "families.jsonl").write_text("".join(json.dumps({**source, **line}) + "\n" for line in lines))
    made = family_tables.families("CausalLM", tmp_path)
    head, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in made.splitlines() if "|" in row]
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert cells["Llama"]["lora"] == "FRES"
    assert cells["Llama"]["smt"] == "FRE"
    assert cells["Llama"]["ia3"] == cells["GPT-2"]["ia3"] == "[1]"
    assert cells["GPT-2"]["smt"] == "fails"
    assert cells["Phi-3"]["lora"] == "-"
    assert f"\n1. {why.format('the model')}\n" in made
    assert made.splitlines()[-1].startswith("Not tried on any of them yet: ")
