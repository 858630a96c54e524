"""The demo's data in parts, for a machine without an index."""

import pytest

from benchmarks.assets import MANIFEST, NAMES, main
from lit_sparse import demo

pytestmark = pytest.mark.needs_demo
FEW = ["--names", "data", "labelled", "--mib", "4"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    into = tmp_path_factory.mktemp("packed") / "parts"
    assert main(["pack", *FEW, "--into", str(into)]) == 0
    return into


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_cache_has_the_same_files(packed, tmp_path, monkeypatch, capsys):
    theirs = {name: files(NAMES[name].path) for name in ("data", "labelled")}
    parts = [path for path in packed.iterdir() if path.name != MANIFEST]
    assert len(parts) > 2
    assert all(path.stat().st_size <= 4 * 2**20 for path in parts)
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path))
    for _ in range(2):  # the second finds it there
        assert main(["unpack", "--into", str(packed)]) == 0
        assert capsys.readouterr().out == f"In {tmp_path}: data, labelled.\n"
        assert {name: files(NAMES[name].path) for name in theirs} == theirs
    assert demo.dataset_file("gsm8k").parent == NAMES["data"].path


def test_a_part_that_is_missing_or_damaged_is_named(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    into = tmp_path / "parts"
    into.mkdir()
    assert main(["unpack", "--into", str(into)]) == 2
    assert f"has no whole {MANIFEST}" in capsys.readouterr().err
    for name, content in files(packed).items():
        (into / name).write_bytes(content)
    first, second, *_ = sorted(path for path in into.iterdir() if path.name != MANIFEST)
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    assert main(["unpack", "--into", str(into)]) == 2
    assert f"{first} is damaged" in capsys.readouterr().err
    first.write_bytes((packed / first.name).read_bytes())
    second.unlink()
    assert main(["unpack", "--into", str(into)]) == 2
    assert f"{second.name} of" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main(["pack", *FEW, "--into", str(into)]) == 2
    assert "is not empty" in capsys.readouterr().err
