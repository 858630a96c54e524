"""The kept losses of rows: they are those that the scores are made of, on the same rows in every run."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from benchmarks.pairing import difference, scores_of
from benchmarks.row_scores import RowScores, rows_of
from lit_sparse.data import Labelled
from lit_sparse.modules import Classifier
from lit_sparse.testing import tiny_encoder
from tests.modules.words import word_tokenizer

WORDS = ("red", "green", "blue")


@pytest.fixture
def base(tmp_path: Path) -> str:
    """An encoder without a head, with its tokenizer."""
    tiny_encoder().base_model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows of several lengths, so that batches are padded, whose class is a word that they hold."""
    path = tmp_path / "rows.jsonl"
    made = [{"text": f"w{n} {WORDS[n % 3]} " + "w1 " * (n % 5), "label": WORDS[n % 3]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def trained(base: str, rows: str, place: Path, seed: int, **options: Any) -> dict[str, Any]:
    """Train a classifier, validated twice on the way, and return its line of results."""
    L.seed_everything(seed)
    # The seed orders the rows that are trained on, never those that are scored.
    data = Labelled(
        rows, **{"tokenizer": base, "heldout": 13, "max_length": 16, "batch_size": 4, "seed": seed, **options}
    )
    module = Classifier(base, lr=1e-2)
    loop = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        log_every_n_steps=1,
        logger=CSVLogger(place, name="", version=""),
        callbacks=[RowScores()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loop.fit(module, datamodule=data)
    after = {name: float(value) for name, value in loop.callback_metrics.items()}
    assert loop.log_dir is not None
    return {"seed": seed, "after": after, "rows": rows_of(Path(loop.log_dir))}


def test_a_classifiers_rows_make_its_loss(base: str, rows: str, tmp_path: Path) -> None:
    line = trained(base, rows, tmp_path / "a", 0)
    kept = line["rows"]["heldout"]
    assert kept["tokens"] == [1] * 13  # of the last validation alone
    assert len(set(kept["nll"])) > 3
    assert sum(kept["nll"]) / 13 == pytest.approx(line["after"]["heldout_loss"], abs=1e-5)
    scores = scores_of([line])
    assert scores is not None
    assert scores.sums is not None
    assert scores.sums.shape == (1, 13)


def test_classifiers_are_paired_over_the_same_rows_only(base: str, rows: str, tmp_path: Path) -> None:
    lines = [trained(base, rows, tmp_path / f"{seed}", seed) for seed in (0, 1)]
    assert len({line["rows"]["heldout"]["of"] for line in lines}) == 1
    found = difference(lines, lines)
    assert found is not None
    assert found.rows == 13
    fewer = trained(base, rows, tmp_path / "fewer", 0, heldout=12)
    assert fewer["rows"]["heldout"]["of"] != lines[0]["rows"]["heldout"]["of"]
    path = Path(rows)
    path.write_text(path.read_text().replace('"label": "red"', '"label": "blue"'))
    other = trained(base, str(path), tmp_path / "other", 0)  # the same texts of other classes are other rows
    assert other["rows"]["heldout"]["of"] != lines[0]["rows"]["heldout"]["of"]
