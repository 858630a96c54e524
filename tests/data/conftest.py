"""Tiny tokenizers trained in memory, and a cache per test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "<|im_start|>", "<|im_end|>")


def byte_level(special: Sequence[str] = SPECIAL) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the answer is on the mat\n\n"] * 20, trainer)
    return tokenizer


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a ChatML template that adds no begin token."""
    found = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>", bos_token="<|im_start|>")
    found.chat_template = CHATML
    return found


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a template that adds <s> to every text."""
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Give each test a cache of its own, unless it needs the demo's assets."""
    if request.node.get_closest_marker("needs_demo") is None:
        monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSON-lines file and return its path."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
