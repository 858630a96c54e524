"""An exported folder computes what the run computed, and a failed export leaves nothing behind."""

import gc
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_sparse.errors import BadInput
from lit_sparse.export import folder as exporting
from lit_sparse.export.delta import ChangedBlocks, ChangedEntries, Delta
from lit_sparse.export.folder import MARK, export
from lit_sparse.export.generate import generate
from lit_sparse.export.merge import CastError, cast_error
from lit_sparse.modules import LitSparse
from lit_sparse.runs import LAST, build_module, load_run
from lit_sparse.storage.shards import write_sharded
from lit_sparse.testing import TINY, tiny_llm
from lit_sparse_profiling.memory import heap_in_use

pytestmark = [
    # PEFT reads an attribute that transformers renamed, is given by jsonargparse what it has as default, and is told
    # to adapt tied weights, about which we say our own.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*loftq_config"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

SMT = {"class_path": "SMT", "init_args": {"blocks": "random", "num_blocks": 6, "block_size": [16, 24]}}


def lora(**settings: Any) -> list[dict[str, Any]]:
    config = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, **settings}}
    return [{"class_path": "PEFT", "init_args": {"config": config}}]


ENTRIES = {"class_path": "SparseEntries", "init_args": {"entries": "random", "reselect": 1, "trainable_fraction": 0.1}}
METHODS = {
    "smt": [SMT],
    "entries": [ENTRIES],
    "full": [],
    "lora": lora(target_modules="all-linear", fan_in_fan_out=True),  # for GPT-2's Conv1D
    "dora": lora(target_modules=["q_proj", "down_proj"], use_dora=True),
}
RUNS = [
    ("entries", "gpt2"),
    ("smt", "llama"),
    ("smt", "qwen2"),
    ("smt", "gpt2"),
    ("full", "qwen2"),
    ("lora", "gpt2"),
    ("dora", "llama"),
]


class Batches(L.LightningDataModule):
    """Two batches of tokens."""

    val_names = ("heldout",)
    test_names = ()

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.arange(3, 95).repeat(2)[: 2 * 4 * 16].reshape(2, 4, 16)
        return DataLoader([{"input_ids": ids, "labels": ids} for ids in tokens], batch_size=None)  # pyright: ignore

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.train_dataloader()]


@dataclass(frozen=True)
class Run:
    """A run's folder, its base's folder, and the logits at the end of training."""

    folder: Path
    base: Path
    logits: Tensor


def make_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    tiny_llm(kind).to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return folder


def make_run(root: Path, kind: str, updates: list[dict[str, Any]], **model: Any) -> Run:
    """Train a tiny base for two real steps."""
    torch.manual_seed(0)
    base, folder = root / "base", root / "runs" / "try-1"
    if not base.exists():
        make_base(base, kind)
    config = {"model": {"base": str(base), "updates": updates, "lr": 1e-2, "schedule": "constant", **model}}
    module = build_module(config)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches())
    trainer.save_checkpoint(folder / LAST)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with module.autocast():
        return Run(folder, base, logits(module.build()))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    method, kind = request.param
    return make_run(tmp_path_factory.mktemp("run"), kind, METHODS[method])


@pytest.fixture(scope="module")
def smt(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("smt"), "llama", METHODS["smt"])


def test_folder_says_what_the_run_says(run: Run, tmp_path: Path) -> None:
    found = load(export(run.folder, output=tmp_path / "out"))
    assert found.dtype == torch.float32
    merges = "PEFT" in (run.folder / "config.yaml").read_text()
    torch.testing.assert_close(logits(found), run.logits, rtol=0, atol=1e-5 if merges else 0)
    assert not torch.allclose(logits(found), logits(load(run.base)), atol=1e-2)


def test_base_of_random_weights(tmp_path: Path) -> None:
    configuration = tmp_path / "base.json"
    tiny_llm("llama").config.to_json_file(configuration)
    run = make_run(tmp_path, "llama", [SMT], base=str(configuration))
    torch.testing.assert_close(logits(load(export(run.folder, output=tmp_path / "out"))), run.logits, rtol=0, atol=0)


def test_base_of_random_weights_drawn_where_auto_was_another_type(tmp_path: Path) -> None:
    configuration = tmp_path / "base.json"
    tiny_llm("llama").config.to_json_file(configuration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitSparse, "frozen_dtype", property(lambda _: torch.bfloat16))  # as on a GPU
        run = make_run(tmp_path, "llama", [SMT], base=str(configuration))
    assert load_run(run.folder)[0].frozen_dtype == torch.bfloat16
    found = logits(load(export(run.folder, output=tmp_path / "out")))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, run.logits.to(found), rtol=0.02, atol=0.02)


def test_entries_of_all_choices_are_in_the_delta(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", [ENTRIES])
    found, base = load(export(run.folder, output=tmp_path / "out")), load(run.base)
    delta = Delta.load(export(run.folder, "delta", tmp_path / "delta"))
    parameters = dict(found.named_parameters())
    for change in delta.changes:
        assert isinstance(change, ChangedEntries)
        moved = (parameters[change.name] != base.get_parameter(change.name)).flatten()
        assert torch.equal(change.places, moved.nonzero().squeeze(1).int())
        assert torch.equal(change.values, parameters[change.name].flatten()[moved])
    entries = sum(len(change.places) for change in delta.changes)
    trained = sum(0.1 * parameter.numel() for parameter in parameters.values() if parameter.ndim == 2)
    assert trained < entries < 2 * trained  # of two choices
    assert (tmp_path / "delta").stat().st_size < 8 * entries + 2**14


def test_a_run_is_rewound(run: Run, tmp_path: Path) -> None:
    """Bit for bit the run at 1 and the base at 0; half of each change in between, in a folder as in a delta."""
    ends = {scale: load(export(run.folder, output=tmp_path / str(scale), scale=scale)) for scale in (0.0, 0.5, 1.0)}
    base = load(run.base)
    assert same(weights(ends[0.0]), weights(base))
    assert same(weights(ends[1.0]), weights(load(export(run.folder, output=tmp_path / "run"))))
    for name, half in weights(ends[0.5]).items():
        mean = (weights(base)[name].double() + weights(ends[1.0])[name].double()) / 2
        torch.testing.assert_close(half.double(), mean, rtol=1e-6, atol=1e-9)
    delta = Delta.load(export(run.folder, "delta", tmp_path / "delta", scale=0.5))
    with delta.applied(base):
        assert same(weights(base), weights(ends[0.5]))
    assert "plus 0.5 times" in (tmp_path / "0.5" / "README.md").read_text()
    assert "Rewound" not in (tmp_path / "1.0" / "README.md").read_text()


@pytest.mark.parametrize(
    ("to", "scale", "message"),
    [
        ("hf", -0.5, "a scale of -0.5"),
        ("hf", float("nan"), "a scale of nan"),
        ("hf", 1e39, r"a scale of 1e\+39"),
        ("adapter", 0.5, "give --to hf"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(to: Any, scale: float, message: str, smt: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        export(smt.folder, to, tmp_path / "out", scale=scale)
    assert not files(tmp_path)


def test_delta_on_the_base_says_what_the_run_says(run: Run, tmp_path: Path) -> None:
    delta = Delta.load(export(run.folder, "delta", tmp_path / "delta"))
    model = load(run.base)
    before = weights(model)
    with delta.applied(model):
        assert same(weights(model), weights(load(export(run.folder, output=tmp_path / "out"))))
    assert same(weights(model), before)


@pytest.mark.parametrize("kind", TINY)
def test_delta_of_smt_is_its_blocks(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind, METHODS["smt"])
    delta = Delta.load(export(run.folder, "delta"))
    checkpoint = torch.load(run.folder / LAST, weights_only=True)
    masters = {key.removeprefix("model.").removesuffix(".blocks"): x for key, x in checkpoint["state_dict"].items()}
    chosen = checkpoint["lit_sparse"]["updates"][0]["state"]
    assert {change.name for change in delta.changes} == set(masters)
    for change in delta.changes:
        assert isinstance(change, ChangedBlocks)
        assert torch.equal(change.values, masters[change.name])
        assert torch.equal(change.blocks.index, chosen[change.name]["index"])
    assert (delta.base, delta.updates) == (str(run.base), ("SMT",))
    assert delta.base_fingerprint == checkpoint["lit_sparse"]["base"]


def test_delta_of_a_frozen_bf16_base_keeps_the_masters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base(tmp_path / "base", "llama", torch.bfloat16)
    run = make_run(tmp_path, "llama", METHODS["smt"], precision="bfloat16")
    delta = Delta.load(export(run.folder, "delta"))
    model = load(run.base).float()
    before = weights(model)
    with delta.applied(model):
        exact = weights(model)
    cast = load(export(run.folder))
    assert cast.dtype == torch.bfloat16
    assert same(weights(cast), {name: value.bfloat16() for name, value in exact.items()})
    whole = load(export(run.folder, dtype="float32", overwrite=True))
    assert same(weights(whole), exact)
    assert not same(weights(whole), {name: value.float() for name, value in weights(cast).items()})
    said = capsys.readouterr().out
    expected = cast_error([(before[name], exact[name]) for name in exact], torch.bfloat16)
    assert expected.sentence() in said
    assert expected.weights > 0
    assert expected.of_change > 0
    assert CastError("float32", expected.weights, 0, 0, 0, 0).sentence() in said


def test_precision_of_the_run_is_no_change(tmp_path: Path) -> None:
    """A run that loads an fp32 base in bf16 rounds it, which is no change by training."""
    run = make_run(tmp_path, "llama", METHODS["smt"], precision="bfloat16")
    delta = Delta.load(export(run.folder, "delta"))
    assert delta.changes
    assert all(isinstance(change, ChangedBlocks) for change in delta.changes)


def test_cast_error() -> None:
    small, large = 2**-10, 2**-5  # bf16 has 7 bits after the point: 1 + small and 8 + large are lost
    before = torch.tensor([1.0, 1.0, 1.0, 8.0, 0.5])
    after = torch.tensor([1.0, 1.0 + small, 1.5, 8.0 + large, 0.5])
    error = cast_error([(before, after)], torch.bfloat16)
    assert (error.weights, error.largest, error.undone) == (3, large, 2 / 3)
    lost = small**2 + large**2
    assert error.of_change == pytest.approx((lost / (lost + 0.5**2)) ** 0.5)
    assert error.of_weights == pytest.approx((lost / ((1 + small) ** 2 + 1.5**2 + (8 + large) ** 2)) ** 0.5)
    assert "--dtype float32" not in error.sentence()
    error = cast_error([(before[:2], after[:2])], torch.bfloat16)
    assert error.of_change == 1
    assert "--dtype float32" in error.sentence()
    assert cast_error([], torch.bfloat16) == CastError("bfloat16", 0, 0.0, 0.0, 0.0, 0.0)
    assert "no weight differs" in cast_error([], torch.bfloat16).sentence()


def test_untied_head(tmp_path: Path) -> None:
    """A head that is untied and trained fits into a folder, but not into a delta."""
    run = make_run(tmp_path, "qwen2", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    found = load(export(run.folder))
    torch.testing.assert_close(logits(found), run.logits, rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match=r"other parameters than its base has \(lm_head.weight\)"):
        export(run.folder, "delta")


def test_refuses_a_merge_that_changes_the_outputs(tmp_path: Path) -> None:
    run = make_run(tmp_path, "qwen2", lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(BadInput, match=r"PEFT trained cannot be merged into .* without changing its outputs"):
        export(run.folder)


@pytest.mark.parametrize("verb", [export, partial(generate, prompt="t5")], ids=["export", "generate"])
def test_refuses_a_run_that_diverged(verb: Callable[[Path], object], tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", METHODS["smt"])
    checkpoint = torch.load(run.folder / LAST, weights_only=True)
    next(iter(checkpoint["state_dict"].values()))[0, 0, 0] = torch.nan
    torch.save(checkpoint, run.folder / LAST)
    with pytest.raises(BadInput, match=r"try-1 diverged: .*\.blocks is not finite"):
        verb(run.folder)


def test_refuses_what_is_no_run(smt: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a run"):
        export(tmp_path)
    (tmp_path / "config.yaml").write_text((smt.folder / "config.yaml").read_text())
    with pytest.raises(BadInput, match="there is no checkpoint"):
        export(tmp_path)
    assert files(tmp_path) == {tmp_path / "config.yaml"}


def test_refuses_unknown_wishes(smt: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'onnx' was asked for; there is hf, delta, adapter"):
        export(smt.folder, "onnx", tmp_path / "out")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="delta in bfloat16"):
        export(smt.folder, "delta", tmp_path / "out", dtype="bfloat16")
    assert not files(tmp_path)


def test_says_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "llama", METHODS["smt"])
    assert export(run.folder) == run.folder / "hf"
    assert export(run.folder, "delta") == run.folder / "delta.safetensors"
    said = capsys.readouterr().out
    assert f"Wrote {run.folder / 'hf'}." in said
    assert f"Wrote {run.folder / 'delta.safetensors'}." in said
    mark = json.loads((run.folder / "hf" / MARK).read_text())
    assert (mark["run"], mark["base"], mark["updates"]) == ("try-1", str(run.base), ["SMT"])
    assert mark["cast"]["dtype"] == "float32"


@pytest.mark.parametrize("to", ["hf", "delta"])
def test_overwrites_only_an_export_and_only_when_told(to: Literal["hf", "delta"], smt: Run, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    export(smt.folder, to, output)
    once = files(tmp_path)
    with pytest.raises(BadInput, match="is there already"):
        export(smt.folder, to, output)
    stray = output / "model-00001-of-00002.safetensors"  # of an earlier, larger export
    if to == "hf":
        stray.touch()
    export(smt.folder, to, output, overwrite=True)
    assert files(tmp_path) == once


def test_leaves_other_things_alone(smt: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    before = files(tmp_path)
    with pytest.raises(BadInput, match="something else than an export"):
        export(smt.folder, output=tmp_path / "folder", overwrite=True)
    with pytest.raises(BadInput, match="is a file, but --to hf writes a folder"):
        export(smt.folder, output=tmp_path / "file", overwrite=True)
    with pytest.raises(BadInput, match="is a folder, but a delta is one file"):
        export(smt.folder, "delta", tmp_path / "folder", overwrite=True)
    with pytest.raises(BadInput, match="could not be written"):
        export(smt.folder, output=tmp_path / "file" / "out")
    assert files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert (export(smt.folder, output=tmp_path / "empty") / "config.json").is_file()


def safetensors_of_another_kind(path: Path) -> None:
    save_file({"log": torch.zeros(2)}, path, {"format": "pt"})


OTHER_FILES = {
    "text": lambda path: path.write_text("model: {}\n"),
    "empty": Path.touch,
    "safetensors": safetensors_of_another_kind,
}


@pytest.mark.parametrize("to", ["delta", "seedlog"])
@pytest.mark.parametrize("make", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_is_no_export_is_not_replaced(make: Any, to: Any, smt: Run, tmp_path: Path) -> None:
    make(output := tmp_path / "file")
    before = output.read_bytes()
    with pytest.raises(BadInput, match="something else than an export"):
        export(smt.folder, to, output, overwrite=True)
    assert output.read_bytes() == before
    assert files(tmp_path) == {output}


def test_a_card_that_is_no_text_is_not_replaced(smt: Run, tmp_path: Path) -> None:
    (tmp_path / "out.md").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="the file's model card is to stand"):
        export(smt.folder, "delta", tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("to", ["hf", "delta"])
@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_an_output_without_a_name_is_refused(name: str, to: Any, smt: Run, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="has no name for the export; give one, such as exports/"):
        export(smt.folder, to, Path(name), overwrite=True)
    assert not files(tmp_path)


@pytest.mark.parametrize("to", ["hf", "delta"])
def test_a_pipe_is_not_replaced(to: Any, smt: Run, tmp_path: Path) -> None:
    os.mkfifo(output := tmp_path / "pipe")
    with pytest.raises(BadInput, match="is a device, a pipe or a socket"):
        export(smt.folder, to, output, overwrite=True)
    assert output.is_fifo()


def draft_like(folder: Path) -> None:
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "new").touch()


def test_a_refused_export_removes_nothing(smt: Run, tmp_path: Path) -> None:
    draft_like(tmp_path / ".out-abcd_123")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    before = files(tmp_path)
    with pytest.raises(BadInput, match="something else than an export"):
        export(smt.folder, output=tmp_path / "out", overwrite=True)
    assert files(tmp_path) == before


def test_an_earlier_export_that_a_killed_writer_had_moved_away_is_not_overwritten(smt: Run, tmp_path: Path) -> None:
    draft_like(tmp_path / ".out-abcd_123")
    (tmp_path / ".out-abcd_123" / "old").write_text("earlier")
    with pytest.raises(BadInput, match="is there already"):
        export(smt.folder, "delta", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "earlier"
    assert files(tmp_path) == {tmp_path / "out"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwriting"])
def test_nothing_is_left_behind(
    error: BaseException, earlier: bool, smt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if earlier:
        export(smt.folder, output=output)
    before = files(tmp_path)

    def fail(merge: exporting.Merge, folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise error

    monkeypatch.setattr(exporting, "check_loads", fail)
    with pytest.raises(BadInput if isinstance(error, OSError) else KeyboardInterrupt):
        export(smt.folder, output=output, overwrite=True)
    assert files(tmp_path) == before


def test_refuses_a_folder_that_would_load_otherwise(smt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_llm(seed=1)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reader := Reader(other))
    with pytest.raises(BadInput, match="would not load again as it was saved"):
        export(smt.folder, output=tmp_path / "out")
    assert reader.asked
    assert not files(tmp_path)


class Reader:
    """Loads models, but replaces that of an export's draft by another one."""

    def __init__(self, other: nn.Module) -> None:
        self.other, self.asked, self.load = other, False, AutoModelForCausalLM.from_pretrained

    def __call__(self, source: Any, **options: Any) -> Any:
        self.asked = Path(source).name == "new"
        return self.other if self.asked else self.load(source, **options)


# ---- memory


class Taken:
    """Within the context, note the most memory of tensors: what the C allocator gave, and pages of mapped files."""

    def __enter__(self) -> "Taken":
        gc.collect()
        self._ended, self.most, self._before = threading.Event(), 0, self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.003):
            self.most = max(self.most, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (mapped,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))
        return (heap_in_use() or 0) + mapped


def shard(run: Run) -> None:
    """Replace the run's checkpoint by a sharded one, of one rank."""
    checkpoint = torch.load(run.folder / LAST, weights_only=True)
    dist.init_process_group("gloo", init_method=f"file://{run.folder / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in state}
        write_sharded(checkpoint, run.folder / LAST)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(heap_in_use() is None, reason="needs glibc's mallinfo2")
@pytest.mark.parametrize("method", ["full", "lora", "delta"])
def test_the_model_is_never_held_twice(method: str, tmp_path: Path) -> None:
    """At most: the merged model in fp32, the base's file (half of it) while transformers reads that, and a tensor."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 2048}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, dtype="bfloat16")).bfloat16()
    model.save_pretrained(tmp_path / "base")
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    smt = {"class_path": "SMT", "init_args": {**SMT["init_args"], "mode": "delta"}}
    updates = {"full": [], "lora": lora(target_modules="all-linear"), "delta": [smt]}[method]
    run = make_run(tmp_path, "llama", updates)
    shard(run)
    for to in ("hf", "delta", "adapter") if method == "lora" else ("hf", "delta"):
        with Taken() as taken:
            export(run.folder, to)  # pyright: ignore[reportArgumentType]
        assert sum(sizes) < taken.most < 1.5 * sum(sizes) + max(sizes), to
