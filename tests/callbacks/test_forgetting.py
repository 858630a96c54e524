"""Scores of forgetting agree with a plain computation, and scoring does not change the fit."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lit_sparse.callbacks.forgetting import Forgetting, Trained, rows_of, untrained
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.data import Instructions, Labelled, Text
from lit_sparse.data.sources import Row
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.testing import tiny_encoder, tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.modules.words import word_tokenizer

PASSAGES = [{"text": f"w{n % 19} red w{n % 5} green w{n % 7}" + " blue" * (n % 4)} for n in range(30)]
QUESTIONS = [
    {"question": f"w{n % 19} w{n % 7}", "choices": ["red", f"green w{n % 5} blue w{n % 3}", "blue red"], "label": n % 3}
    for n in range(30)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def forgetting(folder: Path, **options: Any) -> Forgetting:
    text, questions = written(folder / "text.jsonl", PASSAGES), written(folder / "ask.jsonl", QUESTIONS)
    defaults = {"rows": 20, "text": text, "questions": [questions], "batch_size": 3, "max_length": 32}
    return Forgetting(**{**defaults, **options})


def fitted(folder: Path, callbacks: list[Any], steps: int = 4, heldout: int = 2, **options: Any) -> CausalLM:
    L.seed_everything(0)
    module, ckpt_path = CausalLM(tiny_llm("gpt2", dropout=0.2), lr=1e-2), options.pop("ckpt_path", None)
    data = Instructions(
        written(folder / "train.jsonl", PASSAGES[:14]), heldout=heldout, tokenizer=word_tokenizer(), max_length=32
    )
    trainer = L.Trainer(
        **{"max_steps": steps, "callbacks": callbacks, "accelerator": "cpu", "logger": False, **options},
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def test_scores_are_a_plain_computation(tmp_path):
    callback = forgetting(tmp_path)
    module = fitted(tmp_path, [callback])
    model, nll, tokens, right = module.build().eval(), 0.0, 0, 0
    assert len(callback._passages) == 18  # all but the 12 rows that were trained on
    with torch.no_grad():
        for example in callback._passages:
            ids = torch.tensor([example.input_ids])
            nll += F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += len(example.input_ids) - 1
        (items,) = callback._choices.values()
        for item in items:
            means = []
            for choice in item.examples:
                ids, labels = torch.tensor([choice.input_ids]), torch.tensor(choice.labels[1:])
                means.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels, ignore_index=-100).item())
            right += means.index(min(means)) == item.label
    assert len(items) == 20
    assert callback.after["general_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert callback.after["general_perplexity"] == pytest.approx(torch.tensor(nll / tokens).exp().item(), rel=1e-5)
    assert callback.after[f"{tmp_path}/ask.jsonl_zero_shot"] == pytest.approx(right / 20)
    assert callback.before["general_loss"] != callback.after["general_loss"]


def test_training_goes_on_to_the_same_bits(tmp_path):
    with_it, without = fitted(tmp_path, [forgetting(tmp_path)]), fitted(tmp_path, [])
    others = dict(without.named_parameters())
    for name, value in with_it.named_parameters():
        assert torch.equal(value, others[name]), name


def test_the_mode_of_every_module_is_as_it_was(tmp_path):
    callback = forgetting(tmp_path)
    module = fitted(tmp_path, [callback])
    module.train()
    module.build().get_submodule("transformer.h.0").eval()
    modes, state = [part.training for part in module.modules()], torch.get_rng_state()
    callback.scores(module)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_record_has_both(tmp_path):
    (tmp_path / "run-1").mkdir()
    recorder = Recorder(tmp_path / "run-1", Plan(warmup=0, examine=False, profiled=0), samples=0, checkpoint_steps=0)
    callback = forgetting(tmp_path)
    fitted(tmp_path, [callback, recorder], num_sanity_val_steps=0)
    record = RunRecord.read(tmp_path / "run-1" / "record.json")
    assert record.outcome["before"] == callback.before
    assert record.outcome["after"].items() >= callback.after.items()
    assert "forgetting" in {phase.name for phase in record.phases}
    with pytest.raises(BadInput, match="Forgetting comes after the Recorder"):
        fitted(tmp_path, [recorder, callback])


def test_before_comes_from_the_checkpoint_of_a_resumed_fit(tmp_path):
    first, second = forgetting(tmp_path), forgetting(tmp_path)
    fitted(tmp_path, [first])
    second.load_state_dict(first.state_dict())
    fitted(tmp_path, [second], steps=6)
    assert second.before == first.before
    assert second.after != first.after


def test_a_half_trained_model_is_not_scored_as_before(tmp_path, caplog):
    fitted(tmp_path, [], steps=2).trainer.save_checkpoint(tmp_path / "half.ckpt")
    late = forgetting(tmp_path)
    fitted(tmp_path, [late], steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert late.before == {}
    assert "general_loss" in late.after
    assert "there are no scores from before training" in caplog.text


def test_rows_of_an_earlier_phase_can_be_left_out(tmp_path):
    earlier = written(tmp_path / "earlier.jsonl", PASSAGES[14:25])
    some, all_of_them = (
        forgetting(tmp_path, rows=len(PASSAGES), exclude=names) for names in ([earlier], [str(tmp_path / "text.jsonl")])
    )
    fitted(tmp_path, [some])
    assert len(some._passages) == len(PASSAGES) - 12 - 11  # trained on now, and earlier
    with pytest.raises(BadInput, match=r"all rows of .*text\.jsonl are trained on"):
        fitted(tmp_path, [all_of_them])


def test_passages_of_plain_text_are_left_out(tmp_path):
    """Passages of this fit's text and of an earlier one's are found, whatever their line breaks."""
    for name, passages in {"own.txt": PASSAGES[:6], "earlier.txt": PASSAGES[4:9]}.items():
        (tmp_path / name).write_text("\n\n".join(row["text"].replace(" ", "\n", 1) for row in passages))
    data = Text(str(tmp_path / "own.txt"), heldout=0, tokenizer=word_tokenizer(), max_length=8)
    data.rows = data.read_rows()
    rows = rows_of(forgetting(tmp_path).text, "text")
    left = untrained(rows, Trained([str(tmp_path / "earlier.txt")], data), len(rows), "text")
    assert sorted(row.data["text"] for row in left) == sorted(row["text"] for row in PASSAGES[9:])
    with pytest.raises(BadInput, match="all rows of text are trained on"):
        untrained(rows[:6], Trained([], data), 6, "text")


def test_what_a_stream_reads_and_answers_in_plain_text_are_left_out(tmp_path, caplog):
    question = {"question": "What is it ?", "choices": ["w1", "w2"], "label": 1}
    (tmp_path / "own.txt").write_text("\n".join([PASSAGES[0]["text"], "What is it ?  w2 w3"]))
    data = Text(str(tmp_path / "own.txt"), stream=True, tokenizer=word_tokenizer(), max_length=8)
    trained = Trained([], data)
    for label in (7, "A"):
        with pytest.raises(BadInput, match=r"^mine line 1: "):
            trained.has(Row("mine line 1", {"question": "Which?", "choices": ["a", "b"], "label": label}))
    assert trained.has(Row("a", PASSAGES[0]))
    assert not trained.has(Row("b", PASSAGES[1]))
    assert trained.has(Row("c", question))
    assert not trained.has(Row("d", {**question, "label": 0}))
    with caplog.at_level("INFO"):
        assert not Trained([], Text("a/b", stream=True, tokenizer=word_tokenizer(), max_length=8)).has(
            Row("e", question)
        )
    assert "Forgetting cannot tell what the stream of a/b has" in caplog.text


def test_a_demo_set_is_the_one_that_is_named(tmp_path, monkeypatch):
    def found(name):
        return written(tmp_path / "found.jsonl", [{"text": name}])

    monkeypatch.setattr("lit_sparse.demo.dataset_file", found)
    assert [rows_of(name, "text")[0].data["text"] for name in ("demo", "gsm8k")] == ["text", "gsm8k"]


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"all rows of .*few\.jsonl are trained on"):
        fitted(tmp_path, [forgetting(tmp_path, text=written(tmp_path / "few.jsonl", PASSAGES[:3]))], heldout=0)
    with pytest.raises(BadInput, match="no multiple-choice question of up to 32 tokens"):
        fitted(tmp_path, [forgetting(tmp_path, questions=[str(tmp_path / "text.jsonl")])])
    with pytest.raises(BadInput, match="`rows` is 0; it must be 1 or more"):
        forgetting(tmp_path, rows=0)
    rows = [{"text": f"w{n}", "label": n % 2} for n in range(8)]
    data = Labelled(written(tmp_path / "rows.jsonl", rows), heldout=0, tokenizer=word_tokenizer(), max_length=8)
    trainer = L.Trainer(max_steps=1, logger=False, accelerator="cpu", callbacks=[forgetting(tmp_path)])
    with pytest.raises(BadInput, match="the task is Classifier; leave the callback out"):
        trainer.fit(Classifier(tiny_encoder(classes=2)), datamodule=data)


@pytest.mark.needs_demo
def test_the_demo_sets_are_found(monkeypatch, tmp_path):
    monkeypatch.delenv("LIT_SPARSE_CACHE")
    callback = Forgetting(rows=2, tokenizer=word_tokenizer(), max_length=512)
    fitted(tmp_path, [callback], steps=1)
    assert set(callback.after) == {
        "general_loss",
        "general_perplexity",
        *(f"{name}_zero_shot" for name in ("piqa", "sciq", "arc_easy", "hellaswag")),
    }
