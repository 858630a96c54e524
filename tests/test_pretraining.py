"""Pre-training from a bare configuration by the command line's own defaults: fit, resume, score, export, generate."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_sparse import cli
from lit_sparse.calls import dummy_forward
from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.data.loader import evaluation_loader
from lit_sparse.data.text import embedded_text
from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.modules import CausalLM
from lit_sparse.modules.metrics import TokenScores
from lit_sparse.places import configs_folder
from lit_sparse.roles import sizes_of
from lit_sparse.runs import load_run
from lit_sparse.testing import tiny_llm
from tests.test_cli import SMALL
from tests.test_resume import Cut

WORDS = [
    f"the {a} {b} sat on the {c} mat, and the {c} {b} slept.\n"
    for a in ("big", "old")
    for b in ("cat", "dog")
    for c in "xyz"
]
LENGTHS = [4, 9, 2, 7, 7, 3, 12, 5, 6, 2, 8]
RESTARTS = """
model:
  updates:
    - class_path: LowRank
      init_args: {rank: 0.25, refactorize_every: 2}
    - class_path: MomentumReset
      init_args: {every: 3, recovery_steps: 2}
"""


@pytest.fixture
def books(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with text, and the smallest model's configuration made smaller."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "books").mkdir()
    for number in range(6):
        (tmp_path / "books" / f"{number}.txt").write_text("".join(WORDS[number:] + WORDS[:number]) * 4)
    config = json.loads((configs_folder() / "models" / "llama-3m.json").read_text())
    small = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    Path("config.json").write_text(json.dumps({**config, **small, "num_key_value_heads": 4, "num_hidden_layers": 2}))
    Path("restarts.yaml").write_text(RESTARTS)
    return tmp_path


def fit(run: str, *words: str, method: str = "low_rank.yaml") -> None:
    data = [
        "--data.train=books",
        "--data.vocabulary=320",
        "--data.heldout=8",
        "--data.max_length=32",
        "--data.batch_size=4",
    ]
    configs = ["--config", method, "--config", "models/llama-3m.yaml"]
    cli.run(["fit", *configs, "--model.base=config.json", *data, *SMALL, "--samples=0", f"--run={run}", *words])


def last(run: str) -> Path:
    return Path("runs") / run / "checkpoints" / "last.ckpt"


def values(run: str) -> dict[str, torch.Tensor]:
    return torch.load(last(run), weights_only=True)["state_dict"]


def bases(run: str) -> str:
    return torch.load(last(run), weights_only=True)["lit_sparse"]["base"]


@pytest.mark.parametrize(
    ("method", "stream"),
    [("low_rank.yaml", ()), ("restarts.yaml", ("--data.stream=true", "--data.num_workers=2"))],
    ids=["blocks", "stream"],
)
def test_a_model_is_trained_from_scratch_resumed_evaluated_and_exported(books, capsys, method, stream):
    words = ("--trainer.max_steps=8", "--model.lr=0.01", *stream)
    fit("straight", *words, method=method)
    call = ("--trainer.callbacks+=tests.test_resume.Stop", "--trainer.callbacks.step=5", "--checkpoint_steps=5")
    with pytest.raises(Cut):
        fit("cut", *words, *call, method=method)
    fit("cut", *words, "--ckpt_path=last", method=method)
    for name, value in values("cut-1").items():
        assert torch.equal(value, values("straight-1")[name]), name
    outcome = json.loads(Path("runs/straight-1/record.json").read_text())["outcome"]
    assert outcome["after"]["heldout_loss"] < outcome["before"]["heldout_loss"] - 0.1
    assert outcome["after"]["heldout_perplexity"] == pytest.approx(math.exp(outcome["after"]["heldout_loss"]), rel=1e-5)
    exported = cli.run(["export", "runs/straight-1"])
    assert not exported
    model, tokenizer = (kind.from_pretrained("runs/straight-1/hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained("runs/straight-1/tokenizer").get_vocab()
    assert 257 < len(tokenizer) < 320  # the text has few pairs
    assert {type(module).__name__ for module in model.modules()} >= {"Linear", "LlamaAttention"}
    with torch.no_grad():
        ids = torch.tensor([tokenizer("the old cat sat on the x mat, and the x cat slept.\n")["input_ids"]])
        assert model(input_ids=ids, labels=ids).loss < outcome["before"]["heldout_loss"]
    capsys.readouterr()
    cli.run(["generate", "runs/straight-1", "the old", "--max_new_tokens=3"])
    assert capsys.readouterr().out.strip()


def test_seeds_start_from_weights_of_their_own_and_a_run_keeps_its_seed(books, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards
    words = ("--trainer.max_steps=3", "--checkpoint_steps=2")
    fit("straight", *words, "--seed_everything=1", method="full.yaml")
    call = ("--trainer.callbacks+=tests.test_resume.Stop", "--trainer.callbacks.step=2")
    with pytest.raises(Cut):
        fit("cut", *words, *call, "--seed_everything=1", method="full.yaml")
    fit("cut", *words, "--ckpt_path=last", method="full.yaml")  # seed_everything is 0 again
    fit("other", *words, method="full.yaml")
    for name, value in values("straight-1").items():
        assert torch.equal(values("cut-1")[name], value), name
    matrix = "model.model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(values("other-1")[matrix], values("straight-1")[matrix], atol=0.01)
    assert load_run(Path("runs/straight-1"))[0].base_fingerprint == bases("straight-1") != bases("other-1")
    cli.run(["validate", "--config=runs/straight-1/config.yaml", "--seed_everything=5", f"--ckpt_path={last('cut-1')}"])


def test_cola_is_trained_and_has_no_export(books):
    fit("cola", "--trainer.max_steps=2", method="cola.yaml")
    for to in ("hf", "delta", "adapter"):
        with pytest.raises(BadInput, match=r"use it through lit_sparse\.runs\.load_run") as refusal:
            export(Path("runs/cola-1"), to)
        assert "--to adapter" not in str(refusal.value)
    assert not Path("runs/cola-1/hf").exists()
    module, _ = load_run(Path("runs/cola-1"))
    assert dummy_forward(module.build()).isfinite().all()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--data.train=empty",), r"The folder empty has no text: files that end in \.txt, .* none in it or below it"),
        (("--data.train=blank",), r"The folder blank has no text: .*those that end so are empty"),
        (("--data.train=nowhere.txt",), r"There is no data file nowhere\.txt"),
        (("--data.train=rows.jsonl",), r"rows\.jsonl line 1 has words and no `text`; give rows with a text"),
        (("--data.vocabulary=10",), r"`vocabulary` is 10; a byte-level one has 257 tokens at least"),
        (("--data.stream=true",), r"data\.stream has no end; set trainer\.max_steps"),
        (("--model.updates.every=0",), r"MomentumReset: every is 0"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["blocks", "stream"])
def test_bad_text_is_a_sentence_and_leaves_nothing(books, words, sentence, stream):
    for folder in ("empty", "blank"):
        Path(folder).mkdir()
    Path("blank/a.md").write_text("")
    Path("rows.jsonl").write_text('{"words": "a"}\n')
    more = () if not stream or "--data.stream=true" in words else ("--data.stream=true", "--trainer.max_steps=2")
    with pytest.raises(BadInput, match=sentence):
        fit("bad", *words, *more)
    assert not Path("runs/bad-1").exists()


@pytest.mark.parametrize(
    ("name", "total", "inside"),
    [
        ("3m", 3.2e6, 1.86e6),
        ("60m", 58.1e6, 25.3e6),
        ("130m", 134.1e6, 84.9e6),
        ("350m", 368e6, 302.4e6),
        ("1b", 1339.1e6, 1207.9e6),
    ],
)
def test_the_models_have_the_papers_sizes(name, total, inside):
    """Weights in all, and those of the layers' matrices."""
    config = AutoConfig.from_pretrained(resolve(f"models/llama-{name}.json"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=0.01)
    assert sizes_of(model)["matrix"] == pytest.approx(inside, rel=0.01)


def test_a_shipped_configuration_gives_way_to_a_file_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("models/llama-3m.json") == str(configs_folder() / "models" / "llama-3m.json")
    Path("models").mkdir()
    Path("models/llama-3m.json").write_text("{}")
    assert resolve("models/llama-3m.json") == "models/llama-3m.json"


def test_perplexity_is_the_same_on_any_layout_of_ranks_workers_and_batches():
    """Sums over all tokens, divided once: a mean of batches' means, or of ranks', would change with each layout."""
    model = CausalLM(tiny_llm(), updates=[])
    rows = [Example([3 + (7 * n * k) % 90 for k in range(length)], [5] * length) for n, length in enumerate(LENGTHS, 1)]

    def scored(world: int, batch: int, workers: int = 0) -> dict[str, float]:
        total = TokenScores()
        for rank in range(world):
            for one in evaluation_loader(rows, LENGTHS, batch, Padded(Padding()), rank, world, workers):
                total.update(*model.scores(one), one["labels"])
        return {"tokens": float(total.tokens), **{key: float(value) for key, value in total.compute().items()}}

    wanted = scored(1, 1)
    assert wanted["tokens"] == sum(LENGTHS) - len(LENGTHS)
    assert wanted["perplexity"] == pytest.approx(math.exp(wanted["loss"]), rel=1e-12)
    for layout in ((1, 4), (2, 3), (3, 2), (7, 1), (2, 2, 2)):
        assert scored(*layout) == pytest.approx(wanted, rel=1e-6), layout


@pytest.mark.needs_demo
def test_the_embedded_text_is_prose_in_a_fixed_order():
    rows = embedded_text()
    assert len(rows) > 15_000
    assert sum(len(row.data["text"]) for row in rows) > 5e6
    assert [row.data for row in rows] == [row.data for row in embedded_text()]
    kinds = ["hellaswag" in row.where for row in rows[:200]]
    assert 50 < sum(kinds) < 180  # novels and articles are mixed, so that held-out blocks have both
