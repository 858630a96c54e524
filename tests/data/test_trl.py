"""The learnt tokens and the losses of 200 real rows against TRL's SFTTrainer, where it is installed.

python -m venv trl && trl/bin/pip install -e . trl pytest && trl/bin/python -m pytest tests/data/test_trl.py
"""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_sparse import demo
from lit_sparse.data import Instructions
from lit_sparse.data.encoding import Encoder, load_tokenizer
from lit_sparse.data.rows import IGNORED, parse
from lit_sparse.data.sources import read
from lit_sparse.modules import CausalLM

pytest.importorskip("trl", reason="trl (1.16) is not installed; pip install it to compare with it")
pytestmark = [
    pytest.mark.needs_demo,
    pytest.mark.filterwarnings("ignore"),  # theirs, and of the libraries that they bring
]

ROWS, STEPS, RATE = 200, 12, 1e-3


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return [row.data for row in read(str(demo.dataset_file("gsm8k")))[:ROWS]]


def tiny(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, **sizes))


def theirs(rows: list[dict[str, str]], tokenizer: Any, folder: Path) -> Any:
    """Return their trainer, on the rows in order, without weight decay and clipping."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]

    class Recording(SFTTrainer):
        losses: list[float] = []

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            self.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    config = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return Recording(
        model=tiny(len(tokenizer)), args=config, train_dataset=Dataset.from_list(chats), processing_class=tokenizer
    )


def labels(trainer: Any) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each row, as their collator makes them."""
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


def test_the_learnt_tokens_are_theirs_but_for_a_line_break(rows: list[dict[str, str]], tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(demo.DEMO))
    line_break = encoder.encode_text("\n")
    for row, (ids, labelled) in zip(rows, labels(theirs(rows, encoder.tokenizer, tmp_path)), strict=True):
        own = encoder.encode(parse(row))
        assert ids == own.input_ids + line_break
        assert labelled == own.labels + line_break  # the template's, behind the end token: no model has to say it


def test_the_losses_of_a_fit_are_theirs(rows: list[dict[str, str]], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo.DEMO)
    tokenizer.chat_template = (  # without a line break at the end, the one difference
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
        "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    trainer = theirs(rows, tokenizer, tmp_path / "theirs")
    encoder = Encoder(tokenizer)
    own = [encoder.encode(parse(row)) for row in rows]
    assert labels(trainer) == [(one.input_ids, one.labels) for one in own]
    assert all(one.labels.count(IGNORED) < len(one.labels) for one in own)
    trainer.train()

    losses: list[float] = []

    class Recorded(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # pyright: ignore
            losses.append(float(trainer.callback_metrics["train_loss"]))

    data = Instructions(str(demo.dataset_file("gsm8k")), heldout=0, tokenizer=tokenizer, max_length=1024, shuffle=False)
    task = CausalLM(
        tiny(len(tokenizer)),
        lr=RATE,
        schedule="constant",
        optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
    )
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        use_distributed_sampler=False,
        enable_checkpointing=False,
        callbacks=[Recorded()],
        default_root_dir=tmp_path,
        **quiet,
    ).fit(task, data)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(trainer.losses), rtol=0, atol=1e-5)
    assert len(losses) == STEPS
