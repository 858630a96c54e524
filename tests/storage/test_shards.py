"""Sharded checkpoints: whole or refused, read on any number of ranks, and replaced only by a whole one."""

import errno
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_sparse.checkpoints import read_checkpoint, trained_values
from lit_sparse.errors import BadInput
from lit_sparse.modules.checkpoint_io import WholeCheckpoints
from lit_sparse.storage import hashed_files, shards, whole
from lit_sparse.storage.shard_folders import KEY, folders_of, remove_orphans
from lit_sparse.storage.shards import BackgroundWriter, write_sharded
from lit_sparse.storage.whole import keep_previous
from tests.storage.test_whole import flip

WEIGHT, MOMENT, BIAS = torch.arange(35.0).reshape(7, 5), torch.ones(7, 5).bfloat16(), torch.arange(3)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def checkpoint(mesh, factor: int = 1) -> dict:
    weight, moment = (distribute_tensor(value, mesh, [Shard(0)]) for value in (factor * WEIGHT, MOMENT))
    states = [{"state": {0: {"exp_avg": moment, "step": torch.tensor(3.0)}}}]
    parked = {"class": "LISA", "state": {"parked": {2: [{"exp_avg": moment}]}}}
    return {
        "state_dict": {"model.a": weight, "model.b": BIAS},
        "optimizer_states": states,
        "lit_sparse": {"base": "", "updates": [parked]},
    }


@pytest.fixture
def file(one_rank, tmp_path) -> Path:
    write_sharded(checkpoint(one_rank), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_one_process_reads_full_tensors(file):
    found = read_checkpoint(file)
    assert torch.equal(found["state_dict"]["model.a"], WEIGHT)
    assert torch.equal(found["state_dict"]["model.b"], BIAS)
    state = found["optimizer_states"][0]["state"][0]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(state["exp_avg"], MOMENT)
    assert state["step"] == 3
    assert torch.equal(found["lit_sparse"]["updates"][0]["state"]["parked"][2][0]["exp_avg"], MOMENT)


def test_any_number_of_ranks_reads_its_rows(file):
    dist.destroy_process_group()
    rows = []
    for rank in range(4):  # as FSDP2 cuts seven rows: two for each, and the last one
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        found = read_checkpoint(file, mesh=init_device_mesh("cpu", (4,)))["state_dict"]
        rows.append(found["model.a"].to_local())
        if rank < 3:
            dist.destroy_process_group()
    assert [len(part) for part in rows] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(rows), WEIGHT)


def test_what_is_not_asked_for_is_not_read(file):
    found = read_checkpoint(file, ("lit_sparse",))
    assert found["state_dict"]["model.a"].is_meta
    assert found["state_dict"]["model.a"].shape == WEIGHT.shape
    assert not found["lit_sparse"]["updates"][0]["state"]["parked"][2][0]["exp_avg"].is_meta
    values = list(trained_values(found, file))
    assert [list(one) for one in values] == [["model.a"], ["model.b"]]
    assert torch.equal(values[0]["model.a"], WEIGHT)


def test_a_new_one_replaces_the_old_and_its_folder(file, one_rank):
    (before,) = folders_of(file)
    write_sharded(checkpoint(one_rank, 2), file)
    (after,) = folders_of(file)
    assert after != before
    assert torch.equal(read_checkpoint(file)["state_dict"]["model.a"], 2 * WEIGHT)
    WholeCheckpoints().save_checkpoint({"lit_sparse": {}, "state_dict": {}}, file)  # by one device
    assert not folders_of(file)


def test_the_previous_one_keeps_its_folder(file, one_rank):
    for factor in (2, 3):
        keep_previous(file)
        write_sharded(checkpoint(one_rank, factor), file)
        remove_orphans(file.parent)
        assert len(folders_of(file)) == 2
        for path, value in ((file, factor), (file.with_name("previous.ckpt"), factor - 1)):
            assert torch.equal(read_checkpoint(path)["state_dict"]["model.a"], value * WEIGHT)
    (folder,) = [one for one in folders_of(file) if one.name == torch.load(file, weights_only=True)[KEY]["folder"]]
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(BadInput, match=r"of its shards in .* The one before it, of step None, is whole: .*previous"):
        read_checkpoint(file)
    WholeCheckpoints().save_checkpoint({"lit_sparse": {}, "state_dict": {}}, file)  # by one device
    assert len(folders_of(file)) == 1
    assert torch.equal(read_checkpoint(file.with_name("previous.ckpt"))["state_dict"]["model.a"], 2 * WEIGHT)


@pytest.mark.parametrize("entry", [5, {}, {"folder": 5, "files": {}}], ids=str)
def test_shards_of_a_checkpoint_with_an_odd_entry_stay(file, entry):
    saved = torch.load(file, weights_only=True)
    whole.write_whole({**saved, KEY: entry}, file)
    remove_orphans(file.parent)
    assert folders_of(file)
    with pytest.raises(BadInput, match="is no checkpoint that a run wrote: its shards name no folder beside it"):
        read_checkpoint(file)


def test_a_removed_one_leaves_nothing(file):
    WholeCheckpoints().remove_checkpoint(file)
    assert [path.name for path in file.parent.iterdir() if path.name != "meeting"] == []


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_or_a_missing_file_is_found_by_every_reader(name, file):
    (folder,) = folders_of(file)
    flip(folder / name, 8 * ((folder / name).stat().st_size // 2))
    for read in (read_checkpoint, WholeCheckpoints().load_checkpoint):
        with pytest.raises(BadInput, match=rf"last\.ckpt is damaged: of its shards in .*, {name} is not as .*its hash"):
            read(file)
    (folder / name).unlink()
    for read in (read_checkpoint, WholeCheckpoints().load_checkpoint):
        with pytest.raises(BadInput, match=rf"of its shards in .*, {name} is not .*No such file.*; give another"):
            read(file)


def test_a_full_disk_keeps_the_one_before(file, one_rank, monkeypatch):
    class Full(hashed_files._Stream):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = folders_of(file)
    monkeypatch.setattr(hashed_files, "_Stream", Full)
    with pytest.raises(BadInput, match=r"could not be written: No space left .* is kept; free some space"):
        write_sharded(checkpoint(one_rank, 2), file)
    monkeypatch.undo()
    monkeypatch.setattr(whole, "_hash_of_disk", lambda *_: None)  # nothing is there
    with pytest.raises(BadInput, match=r"could not be written: it reads back otherwise"):
        write_sharded(checkpoint(one_rank, 2), file)
    monkeypatch.undo()
    assert folders_of(file) == before
    assert torch.equal(read_checkpoint(file)["state_dict"]["model.a"], WEIGHT)


def test_what_reads_back_otherwise_is_no_checkpoint(file, one_rank, monkeypatch):
    before = folders_of(file)
    monkeypatch.setattr(hashed_files, "sha256_of", lambda opened: "another")
    with pytest.raises(BadInput, match="reads back otherwise than it was written; check the disk"):
        write_sharded(checkpoint(one_rank, 2), file)
    assert folders_of(file) == before


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Hold the thread that writes a checkpoint in the background, just before the file names the new shards."""
    go, finish = threading.Event(), shards._Draft._finish

    def wait(draft, hashes):
        assert go.wait(60)
        finish(draft, hashes)

    monkeypatch.setattr(shards._Draft, "_finish", wait)
    return go


def test_in_the_background_values_are_those_of_the_save(one_rank, tmp_path, held):
    writer, later = BackgroundWriter(), checkpoint(one_rank)
    moving = [later["state_dict"]["model.a"].to_local(), BIAS.clone()]
    later["state_dict"]["model.b"] = moving[1]
    writer.write(later, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists(), "the save did not come back while it is being written"
    for tensor in moving:
        tensor.add_(1)
    held.set()
    writer.write(checkpoint(one_rank, 3), tmp_path / "later.ckpt")  # waits for the one before it
    found = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert torch.equal(found["model.a"], WEIGHT)
    assert torch.equal(found["model.b"], BIAS)
    writer.close()
    assert torch.equal(read_checkpoint(tmp_path / "later.ckpt")["state_dict"]["model.a"], 3 * WEIGHT)
    assert len(folders_of(tmp_path / "later.ckpt")) == 1


def test_a_kill_in_the_background_leaves_the_one_before(file, one_rank, held, tmp_path):
    before, writer = folders_of(file), BackgroundWriter()
    writer.write(checkpoint(one_rank, 2), file)
    shutil.copytree(tmp_path, tmp_path / "killed", ignore=shutil.ignore_patterns("meeting"))  # what a kill leaves
    held.set()
    writer.close()
    assert torch.equal(read_checkpoint(file)["state_dict"]["model.a"], 2 * WEIGHT)
    killed = tmp_path / "killed" / file.name
    assert len(folders_of(killed)) == 2
    assert torch.equal(read_checkpoint(killed)["state_dict"]["model.a"], WEIGHT)
    remove_orphans(killed.parent)
    assert [folder.name for folder in folders_of(killed)] == [folder.name for folder in before]
    assert torch.equal(read_checkpoint(killed)["state_dict"]["model.a"], WEIGHT)


def test_what_fails_in_the_background_is_told_at_the_next_save_and_at_the_end(file, one_rank, monkeypatch):
    writer, before = BackgroundWriter(), folders_of(file)
    monkeypatch.setattr(hashed_files, "sha256_of", lambda opened: "another")
    for begin in (lambda: writer.write(checkpoint(one_rank, 3), file), writer.close):
        writer.write(checkpoint(one_rank, 2), file)
        with pytest.raises(BadInput, match="reads back otherwise than it was written; check the disk"):
            begin()
    monkeypatch.undo()
    assert folders_of(file) == before
    assert torch.equal(read_checkpoint(file)["state_dict"]["model.a"], WEIGHT)


def test_metadata_runs_no_code(file):
    (folder,) = folders_of(file)

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match=r"builtins\.print is not among what a checkpoint's metadata consists of"):
        shards.read_shards(torch.load(file, weights_only=True), file)
