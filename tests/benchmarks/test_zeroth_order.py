"""The bytes that a step of MeZO moves, and the pairs that its benchmark times."""

import torch

from benchmarks.zeroth_order import bytes_moved, main, ratios
from lit_sparse import loss
from lit_sparse.testing import tiny_llm
from lit_sparse.zeroth_order import perturbed

IDS = torch.arange(3, 15).view(2, 6)


def test_a_step_moves_at_most_six_times_the_weights():
    """Each of two passes reads and writes them once, and the update does; of the embedding only the batch's rows."""
    assert 5 < bytes_moved(tiny_llm(), IDS) <= 6


def test_a_longer_batch_moves_no_more(monkeypatch):
    """Its logits do not fit into a chunk, but the head is read once for all tokens."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 96 * 3)
    monkeypatch.setitem(loss.HEAD_WEIGHTS, "cpu", 2**8)
    assert 5 < bytes_moved(tiny_llm(), IDS) <= 6


def test_steps_and_forward_passes_are_timed_in_turn():
    found = ratios(tiny_llm(), IDS, "rademacher", 3)
    assert len(found) == 3
    assert all(ratio > 1 for ratio in found)


def test_a_tied_head_moves_no_more(monkeypatch):
    """The rows that its embedding gathers are read as in a plain pass."""
    monkeypatch.setitem(perturbed.CHUNK, "cpu", 2**8)
    model = tiny_llm("gpt2")
    assert model.config.tie_word_embeddings
    assert 5 < bytes_moved(model, IDS, lambda: model(input_ids=IDS).logits.mean()) <= 6


def test_the_command_measures_all_that_it_names(home, capsys):
    """Of a model so small that noise and the state of an adapter count: marks may be missed."""
    assert main(["--base=tiny", "--rows=2", "--tokens=6", "--pairs=2"]) in (0, 1)
    said = capsys.readouterr().out.splitlines()
    assert [line[7:].partition(":")[0] for line in said] == [
        "a step moves 6.00 times the bytes of the weights, at most 6 (the published code",
        *("rademacher", "gaussian", "LoRA, two losses in one pass", "MeZO", "MeZO on LoRA", "HELENE on LoRA"),
        *("HELENE", "HELENE, h"),
    ]
    assert [bool(line[:6].strip()) for line in said] == [True, True, False, *[True] * 4, False, False]
    assert said[0].startswith("met   ")
