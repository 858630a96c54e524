"""Skip tests that need a device or assets this machine lacks; a folder in which the command line finds all it needs."""

import gc
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_sparse import demo
from lit_sparse.callbacks import recorder
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling import profiler

ROWS = [{"prompt": f"{a} and {b}", "completion": str(a + b)} for a in range(6) for b in range(4)]


LONG = (
    *("test_pairs", "test_sharding", "test_contract", "test_resumed_methods", "test_fuzz", "test_bench"),
    *("test_anchors_sharded", "test_runs"),
    *("test_many_ranks", "test_forgetting_study", "test_interpreter", "test_plan", "test_refusals", "test_readme"),
    *("test_documented_commands", "test_faults", "test_ranks", "test_rank_watch", "test_quality", "test_recipes"),
)
"""Files that take longest. They come first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; skip tests that need a device or assets that this machine lacks, with the reason."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if not demo.cached():
        reasons["needs_demo"] = "needs the demo model and data: make assets"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Leave what was imported out of each later collection, of which the profiler makes several a record."""
    gc.collect()
    gc.freeze()


def make_home(name: str, model: PreTrainedModel) -> None:
    """Put a model with a tokenizer of words, and rows to train on, into the current folder."""
    model.save_pretrained(name)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "and", *map(str, range(40))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(name)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.fixture(autouse=True)
def unpredicted(monkeypatch):
    """Predict no memory, which takes a quarter of a short fit; tests of predictions make them."""
    monkeypatch.setattr(recorder, "predict", lambda trainer, settings, seconds: None)


CEILINGS = cache(profiler.ceilings)


@pytest.fixture(autouse=True)
def ceilings_measured_once(monkeypatch):
    """Measure the device's ceilings once a process, which takes a fifth of a short fit that is measured."""
    monkeypatch.setattr(profiler, "ceilings", CEILINGS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to work in, with a tiny model and its tokenizer, and rows to train on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    make_home("tiny", tiny_llm("llama"))
    return tmp_path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """`tiny_base(kind, dropout)`: the folder of a tiny model, which is saved once; a test must leave it as it is."""

    @cache
    def save(kind: str = "llama", dropout: float = 0.0) -> Path:
        folder = tmp_path_factory.mktemp("bases") / kind
        tiny_llm(kind, dropout=dropout).save_pretrained(folder)
        return folder

    return save
