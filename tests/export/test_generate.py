"""Text from a run is what its export says, and the draw depends on the seed alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.export.generate import generate
from tests.export.test_folder import METHODS, Run, load, logits, make_base, make_run


def add_tokenizer(folder: Path, chat: bool) -> None:
    """A tokenizer of the tiny models' 96 tokens: words t3 to t95."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, 96)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="t3")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ {'user': 't9'}[m.role] }} {{ m.content }} {% endfor %}t8"
    tokenizer.save_pretrained(folder)


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def talking(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    add_tokenizer(make_base(tmp_path / "base", "llama"), chat=request.param)
    return make_run(tmp_path, "llama", METHODS["full"])


def greedy(model: Any, ids: list[int], count: int) -> str:
    """The likeliest tokens one after the other, without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return " ".join(f"t{token}" for token in ids[-count:] if token > 2)


def test_generates(talking: Run, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export(talking.folder)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(talking.base).get_vocab()
    ids = [9, 5, 6, 8] if tokenizer.chat_template else [5, 6]
    run, base = (greedy(load(folder), ids, 5) for folder in (exported, talking.base))
    assert run != base
    capsys.readouterr()
    generate(talking.folder, "t5 t6", max_new_tokens=5)
    assert capsys.readouterr().out == f"{run}\n"
    generate(talking.folder, "t5 t6", base=True, max_new_tokens=5)
    assert capsys.readouterr().out == f"--- try-1\n{run}\n--- base: {talking.base}\n{base}\n"


def test_draws_from_the_seed_alone(talking: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    answers = []
    for seed in (0, 0, 1):
        generate(talking.folder, "t5 t6", max_new_tokens=20, temperature=2.0, seed=seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # transformers finds none for one, makes up one for the other
def test_base_without_a_tokenizer(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, kind, METHODS["smt"])
    output = export(run.folder)
    assert "The export has no tokenizer." in capsys.readouterr().out
    assert not list(output.glob("token*"))
    assert torch.equal(logits(load(output)), run.logits)
    with pytest.raises(BadInput, match="tokenizer"):
        generate(run.folder, "t5")


@pytest.mark.parametrize("wish", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}], ids=str)
def test_refuses_numbers_without_sense(wish: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1 and at least 0"):
        generate(tmp_path, "t5", **wish)
