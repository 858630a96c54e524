"""Run the Python that is shown to users: in docs/from-python.md, the bare loop and the notebook."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_sparse.examples import bare_loop
from lit_sparse.testing import tiny_llm

ROOT = Path(__file__).parents[1]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "A", "block", "of", "the", "weight", "matrix", "is", "trained", "and"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder with a tiny model, its tokenizer and some rows."""
    monkeypatch.chdir(tmp_path)
    tiny_llm("llama").save_pretrained("tiny")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("tiny")
    rows = [{"prompt": f"A block {n}", "completion": "is trained and is the matrix"} for n in range(80)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def fenced(text: str, mark: str) -> str:
    """The code block of a page that contains `mark`."""
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if mark in block)


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_python_of_the_docs_runs_as_it_stands(home):
    code = fenced((ROOT / "docs" / "from-python.md").read_text(), "task.detach()")
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny").replace("max_steps=1000", "max_steps=2")
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 8
    exec(compile(code, "from-python.md", "exec"), {})
    tuned, base = (AutoModelForCausalLM.from_pretrained(name) for name in ("tuned", "tiny"))
    moved = [
        name
        for (name, now), (_, then) in zip(tuned.named_parameters(), base.named_parameters(), strict=True)
        if not torch.equal(now, then)
    ]
    assert moved
    assert all(name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj")) for name in moved)


def test_the_bare_loop_learns_and_knows_no_lightning(home, capsys):
    losses = bare_loop.main("tiny", steps=12)
    assert losses[-1] < losses[0]
    assert "lightning" not in Path(bare_loop.__file__).read_text().replace("without Lightning", "")


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_of_two_methods_runs_in_its_small_form(home, monkeypatch):
    notebook = json.loads((ROOT / "docs" / "notebooks" / "two_methods.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for shown, tiny in (
        ("STEPS = 8", "STEPS = 2"),
        ('base="demo"', 'base="tiny"'),
        ("Embedded(max_length=128", 'Instructions("rows.jsonl", tokenizer="tiny", max_length=16'),
        ("import Embedded", "import Instructions"),
    ):
        assert shown in code
        code = code.replace(shown, tiny)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert all(output.get("name") != "stderr" for output in outputs)
    monkeypatch.setenv("MPLBACKEND", "agg")
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    with warnings.catch_warnings():  # the notebook hides its own, and what Lightning tells
        names = {}
        exec(compile(code, "two_methods.ipynb", "exec"), names)
    transformers.utils.logging.enable_progress_bar()
    log.setLevel(level)
    shares = names["tasks"]["SMT"].updates[0].describe()["share"]
    assert {n: row for n, row in enumerate(names["image"]) if any(row)}.keys() == {int(layer) for layer in shares}
    assert {Path(f"tuned-{name}/config.json").is_file() for name in ("SMT", "LoRA")} == {True}


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_the_notebook_is_valid_python_of_this_version(home):
    notebook = json.loads((ROOT / "lit_sparse" / "examples" / "first_steps.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = "\n".join(cells)
    for shown, tiny in (
        ('base="demo"', 'base="tiny"'),
        ("Embedded(max_length=256", 'Instructions("rows.jsonl", tokenizer="tiny", max_length=16'),
        ("import Embedded", "import Instructions"),
    ):
        assert shown in code
        code = code.replace(shown, tiny)
    exec(compile(code, "first_steps.ipynb", "exec"), {})
    assert Path("tuned/config.json").is_file()
    assert Path("runs/notebook-1/record.json").is_file()
