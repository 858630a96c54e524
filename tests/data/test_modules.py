"""The data modules under a trainer and a command line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lit_sparse import demo
from lit_sparse.data import Embedded, Instructions, Labelled, Synthetic, Text
from lit_sparse.data.evaluation import samples
from lit_sparse.data.module import overfitted
from lit_sparse.data.rows import parse
from lit_sparse.errors import BadInput
from lit_sparse_profiling.stopwatch import count_tokens

PROBLEMS = [{"prompt": f"the cat {n}", "completion": f"{n} + 1\n#### {n + 1}"} for n in range(40)]
CHOICES = [{"question": f"the cat {n}", "choices": ["yes", "no", f"{n}"], "label": n % 3} for n in range(40)]
PASSAGES = [{"text": f"the mat {n}"} for n in range(40)]


def ready(module: L.LightningDataModule, stage: str = "fit") -> Any:
    module.prepare_data()
    module.setup(stage)
    return module


@pytest.fixture
def assets(own_cache: None) -> None:
    """Replace the demo data by small files."""
    demo.DATA.path.mkdir(parents=True)
    for name, rows in {"gsm8k": PROBLEMS, "sciq": CHOICES, "text": PASSAGES}.items():
        (demo.DATA.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def batches(loader: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.usefixtures("assets")
def test_embedded_problems(chat_tokenizer):
    data = ready(Embedded(tokenizer=chat_tokenizer, heldout=6), "test")
    assert data.val_names == ["heldout", "text"]
    assert data.test_names == ["questions"]
    assert [len(data.examples[name]) for name in ("train", "heldout", "text")] == [34, 6, 6]
    (questions,) = data.test_dataloader()
    answers = [(text, answer) for b in questions for text, answer in zip(decoded(data, b), b["answer"], strict=True)]
    assert len(answers) == 6
    for prompt, answer in answers:
        number = int(prompt.split("the cat ")[1].split("<|im_end|>")[0])
        assert answer == str(number + 1)
        assert prompt.endswith("assistant\n")


def decoded(data: Any, batch: dict[str, Any]) -> list[str]:
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [data.tokenizer.decode(ids[mask.bool()]) for ids, mask in pairs]


@pytest.mark.usefixtures("assets")
def test_passages_are_cut_where_questions_are_left_out(chat_tokenizer):
    long = [f"{'the cat ' * 60}{n}" for n in range(20)]
    of = {"sciq": [{**CHOICES[0], "question": text} for text in long], "text": [{"text": text} for text in long]}
    for name, rows in of.items():
        with (demo.DATA.path / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    data = ready(Embedded("sciq", tokenizer=chat_tokenizer, heldout=30, max_length=60))
    assert not data.examples["text"].dropped
    assert data.examples["text"].cut
    assert data.examples["heldout"].dropped
    assert not data.examples["heldout"].cut


@pytest.mark.usefixtures("assets")
def test_embedded_choices(chat_tokenizer):
    data = ready(Embedded("sciq", tokenizer=chat_tokenizer, heldout=6, batch_size=4), "test")
    assert data.test_names == ["choices"]
    first, second = data.test_dataloader()[0]
    assert first["input_ids"].shape[0] == 3 * len(first["label"])
    assert len(first["label"]) + len(second["label"]) == 6


@pytest.mark.usefixtures("assets")
def test_samples_are_held_out_prompts(chat_tokenizer):
    data = ready(Embedded(tokenizer=chat_tokenizer, heldout=6, num_samples=2))
    heldout = {row.data["prompt"]: row.data["completion"] for row in data.rows["heldout"]}
    assert len(data.samples) == 2
    for sample in data.samples:
        assert heldout[sample["prompt"]] == sample["reference"]
        assert sample["prompt"] in data.tokenizer.decode(sample["prompt_ids"])


@pytest.mark.usefixtures("assets")
def test_training_and_held_out_rows_are_disjoint_and_stable(chat_tokenizer):
    first, again = (ready(Embedded(tokenizer=chat_tokenizer, heldout=6, seed=seed)) for seed in (0, 1))
    sets = [{row.data["prompt"] for row in first.rows[name]} for name in ("train", "heldout")]
    assert not sets[0] & sets[1]
    assert len(sets[0] | sets[1]) == 40
    assert first.rows == again.rows
    assert batches(first.train_dataloader()) == batches(first.train_dataloader())
    assert batches(first.train_dataloader()) != batches(again.train_dataloader())


def test_instructions_hold_rows_out_or_take_a_file(chat_tokenizer, jsonl):
    own = ready(Instructions(jsonl(PROBLEMS), heldout=5, tokenizer=chat_tokenizer))
    assert [len(own.examples[name]) for name in ("train", *own.val_names)] == [35, 5]
    given = ready(Instructions(jsonl(PROBLEMS), jsonl(PASSAGES, "b.jsonl"), tokenizer=chat_tokenizer))
    assert [len(given.examples[name]) for name in ("train", *given.val_names)] == [40, 40]
    assert given.samples == []
    none = ready(Instructions(jsonl(PROBLEMS), heldout=0, tokenizer=chat_tokenizer))
    assert none.val_dataloader() == none.val_names == none.samples == []


def test_formats_may_be_mixed_in_one_file(chat_tokenizer, jsonl):
    data = ready(Instructions(jsonl([*PROBLEMS, *CHOICES, *PASSAGES]), heldout=60, tokenizer=chat_tokenizer), "test")
    assert data.test_names == ["choices", "questions"]
    assert len(data.choices) + len(data.questions) < 60
    assert sum(len(loader.dataset) for loader in data.test_dataloader()) == len(data.choices) + len(data.questions)


def test_bad_row_stops_before_anything_is_written(chat_tokenizer, jsonl, tmp_path):
    path = jsonl([*PASSAGES, {"text": None}])
    with pytest.raises(BadInput, match=r"rows\.jsonl line 41: it has the keys text"):
        Instructions(path, tokenizer=chat_tokenizer, heldout=0).prepare_data()
    assert not (tmp_path / "cache").exists()


def test_drops_are_printed(chat_tokenizer, jsonl, caplog):
    path = jsonl([*PASSAGES, {"text": "the cat " * 100}, {"text": "the mat " * 100}])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        ready(Instructions(path, tokenizer=chat_tokenizer, heldout=0, max_length=20))
    assert "train: 2 rows have over 20 tokens" in caplog.text
    assert "in the chat format" in caplog.text


def test_cuts_and_ignored_keys_are_printed(chat_tokenizer, jsonl, caplog):
    path = jsonl([*PASSAGES, {"text": "the cat " * 100, "source": "web"}, {"text": "a", "source": None}])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        ready(Instructions(path, tokenizer=chat_tokenizer, heldout=0, max_length=20, overlong="truncate"))
        ready(Instructions(path, tokenizer=chat_tokenizer, heldout=0, max_length=20, overlong="truncate"))  # cached
    assert caplog.text.count("train: 1 rows have over 20 tokens and are cut there.") == 2
    assert "train: nothing is read from `source` (1 rows)." in caplog.text
    assert "answers end with <|im_end|>" in caplog.text


@pytest.mark.parametrize("module", [Instructions, Labelled])
def test_padding_beyond_the_longest_row_is_refused(module, jsonl):
    with pytest.raises(BadInput, match="`pad_to_multiple_of` is 1000000000, but rows have at most `max_length` 20"):
        module(jsonl(PASSAGES), heldout=0, max_length=20, pad_to_multiple_of=10**9)


def test_a_prompt_that_the_template_refuses_is_placed(chat_tokenizer, jsonl):
    chat_tokenizer.chat_template = (
        "{% if add_generation_prompt and '7' in messages[0].content %}{{ raise_exception('no 7') }}{% endif %}"
        + str(chat_tokenizer.chat_template)
    )
    data = Instructions(jsonl(PROBLEMS[7:8]), tokenizer=chat_tokenizer, heldout=0)
    with pytest.raises(BadInput, match=r"rows\.jsonl line 1: the tokenizer's chat template refuses it \(no 7\)"):
        samples(data.rows["train"], data.encoder, 64, 1)


def test_rows_are_trained_in_their_files_order_if_asked(chat_tokenizer, jsonl):
    data = ready(Instructions(jsonl(PASSAGES), tokenizer=chat_tokenizer, heldout=4, shuffle=False, batch_size=3))
    given = [data.encoder.encode(parse(row)).input_ids for row in PASSAGES]
    heldout = [data.examples["heldout"][index].input_ids for index in range(4)]
    seen = [
        ids[mask.bool()].tolist()
        for batch in data.train_dataloader()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert seen == [ids for ids in given if ids not in heldout]
    with pytest.raises(BadInput, match="`packing` joins rows by their lengths"):
        Instructions("rows.jsonl", tokenizer=chat_tokenizer, shuffle=False, packing=True)


def test_packing_keeps_the_tokens(chat_tokenizer, jsonl):
    path = jsonl(PROBLEMS)
    plain, packed = (
        ready(
            Instructions(path, heldout=0, tokenizer=chat_tokenizer, max_length=256, packing=packing)
        ).train_dataloader()
        for packing in (False, True)
    )
    assert len(packed) < len(plain)
    counts = [[(int(real), all_) for real, all_ in map(count_tokens, loader)] for loader in (plain, packed)]  # pyright: ignore[reportGeneralTypeIssues]
    assert len({sum(tokens for tokens, _ in one) for one in counts}) == 1


def test_text_is_cut_into_blocks(chat_tokenizer, tmp_path):
    words = [f"the cat {n} sat on the mat\n" for n in range(200)]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("".join(words[:100]))
    paths[1].write_text("".join(words[100:]))
    data = ready(Text([str(path) for path in paths], heldout=3, tokenizer=chat_tokenizer, max_length=64))
    train, heldout = data.examples["train"], data.examples["heldout"]
    assert len(heldout) == 3
    assert set(train.lengths) == {64}
    stream = [token for one in (train, heldout) for index in range(len(one)) for token in one[index].input_ids]
    assert data.tokenizer.decode(stream) == "".join(words[:100]) + "<|im_end|>" + "".join(words[100:]) + "<|im_end|>"
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_blocks_of_text_begin_with_the_begin_token(plain_tokenizer, tmp_path):
    words = [f"the cat {n} sat on the mat\n" for n in range(50)]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("<s>" + "".join(words) + "<|im_end|>\n")  # marks of its own are not doubled
    paths[1].write_text("".join(words))
    data = ready(Text([str(path) for path in paths], heldout=2, tokenizer=plain_tokenizer, max_length=32))
    begin, end = plain_tokenizer.convert_tokens_to_ids(["<s>", "<|im_end|>"])
    blocks = [one[index] for one in (data.examples["train"], data.examples["heldout"]) for index in range(len(one))]
    assert all(block.input_ids[0] == begin and len(block.input_ids) <= 32 for block in blocks)
    assert sum(block.input_ids.count(end) for block in blocks) == 2
    assert sum(block.input_ids.count(begin) for block in blocks) in (len(blocks), len(blocks) + 1)
    for block in blocks:
        assert block.labels == [-100 if token == begin else token for token in block.input_ids]
    text = [token for block in blocks for token in block.input_ids if token != begin]
    assert data.tokenizer.decode(text) == ("".join(words) + "<|im_end|>") * 2


def test_text_that_is_missing_empty_or_short(chat_tokenizer, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("the cat")
    for name, says in {"none": "no data file", "empty": "is empty", "short": "1 block of 512 tokens"}.items():
        with pytest.raises(BadInput, match=says):
            Text(str(tmp_path / f"{name}.txt"), tokenizer=chat_tokenizer).prepare_data()


def test_synthetic_rows_come_from_the_seed():
    def of(seed: int) -> Synthetic:
        return ready(Synthetic(vocab_size=50, max_length=7, rows=10, heldout=3, batch_size=4, seed=seed))

    data = of(0)
    first, again, other = (batches(one.train_dataloader()) for one in (data, of(0), of(1)))
    assert first == again != other
    assert sorted(len(batch) for batch in first) == [2, 4, 4]
    assert {len(row) for batch in first for row in batch} == {7}
    assert max(token for batch in first for row in batch for token in row) < 50
    (heldout,) = data.val_dataloader()
    assert not {tuple(r) for b in batches(heldout) for r in b} & {tuple(r) for b in first for r in b}


@pytest.mark.parametrize("name", ["max_length", "batch_size", "pad_to_multiple_of", "heldout", "seed", "num_workers"])
def test_sizes_below_their_minimum_are_refused(name):
    with pytest.raises(BadInput, match=f"`{name}` is -1; it must be"):
        Embedded("gsm8k", **{name: -1})


def test_replicas_share_as_the_strategy_says(chat_tokenizer, jsonl):
    data = ready(Instructions(jsonl(PROBLEMS), heldout=6, tokenizer=chat_tokenizer, batch_size=3))
    seen: dict[str, list[str]] = {"train": [], "val": []}
    for rank in range(2):
        shared = {"num_replicas": 2, "rank": rank}
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=shared, overfit_batches=0, current_epoch=0)
        for name, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader()[0])):
            seen[name] += [str(row[mask.bool()].tolist()) for b in loader for row, mask in rows_and_masks(b)]
    assert {name: (len(rows), len(set(rows))) for name, rows in seen.items()} == {"train": (34, 34), "val": (6, 6)}


def rows_and_masks(batch: dict[str, torch.Tensor]) -> Any:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


class Reader(L.LightningModule):
    """A module that records the batches it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch["input_ids"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["val"].append(dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["test"].append(dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", use_distributed_sampler=False, default_root_dir=folder, **quiet, **settings)


@pytest.mark.usefixtures("assets")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_trainer_fits_and_tests(chat_tokenizer, tmp_path):
    reader, data = Reader(), Embedded(tokenizer=chat_tokenizer, heldout=6)
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0)
    run.fit(reader, data)
    run.test(reader, data)
    assert len(reader.seen["train"]) == 9
    assert reader.seen["val"] == [0, 0, 1, 1]
    assert reader.seen["test"] == [0, 0]


@pytest.mark.usefixtures("assets")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You requested to overfit")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_overfitting_sees_the_same_rows_in_every_epoch(chat_tokenizer, tmp_path):
    reader, data = Reader(), Embedded(tokenizer=chat_tokenizer, heldout=6)
    run = trainer(tmp_path, max_epochs=3, enable_checkpointing=False, overfit_batches=2, limit_val_batches=0)
    run.fit(reader, data)
    epochs = [reader.seen["train"][begin : begin + 2] for begin in (0, 2, 4)]
    rows = [sorted(str(row) for batch in epoch for row in batch) for epoch in epochs]
    assert len(rows[0]) == 8
    assert len({len(str(row)) for row in rows}) == 1


def test_overfitting_limits_random_rows_too():
    data = Synthetic(vocab_size=96, max_length=4, rows=40, batch_size=4)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, overfit_batches=2, current_epoch=0)  # pyright: ignore
    loader = data.train_dataloader()
    epochs = [[tuple(row) for batch in loader for row in batch["input_ids"].tolist()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(epochs[0]) == 8
    assert [overfitted(data.trainer, 4, rows) for rows in (40, 6)] == [8, 6]


@pytest.mark.usefixtures("assets")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_reloaded_loaders_go_on_with_the_next_epoch(chat_tokenizer, tmp_path):
    seen = []
    for reload in (0, 1):
        reader, data = Reader(), Embedded(tokenizer=chat_tokenizer, heldout=6)
        settings = {"reload_dataloaders_every_n_epochs": reload, "limit_val_batches": 0}
        trainer(tmp_path, max_epochs=3, enable_checkpointing=False, **settings).fit(reader, data)
        seen.append(reader.seen["train"])
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings(r"ignore:\s+(By default only one|``instantiate_classes`` was deprecated)")
class TestCommandLine:
    """Return arguments and help as jsonargparse reads them from the classes."""

    @staticmethod
    def parser() -> Any:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        return parser

    @pytest.mark.parametrize("name", ["embedded", "instructions", "text", "synthetic"])
    def test_shipped_configs_build(self, name, tmp_path):
        path = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
        parser = self.parser()
        parser.add_argument("--config", action="config")
        built = parser.instantiate_classes(parser.parse_args(["--config", str(path)]))
        assert type(built.data).__name__.lower() == name

    def test_common_arguments_are_accepted(self):
        given = {"task": "piqa", "max_length": 99, "tokenizer": "demo", "packing": True}
        config = {"data": {"class_path": "lit_sparse.data.Embedded", "init_args": given}}
        parser = self.parser()
        data = parser.instantiate_classes(parser.parse_object(config)).data
        assert (data.task, data.max_length, data.tokenizer_name, data.packing) == ("piqa", 99, "demo", True)

    @pytest.mark.parametrize("name", ["Embedded", "Instructions", "Text", "Synthetic"])
    def test_every_argument_is_explained(self, name, capsys):
        from jsonargparse import ArgumentParser

        import lit_sparse.data

        parser = ArgumentParser()
        parser.add_class_arguments(getattr(lit_sparse.data, name))
        for action in parser._actions:
            if action.dest not in ("help", "print_config", "config"):
                assert action.help, action.dest
