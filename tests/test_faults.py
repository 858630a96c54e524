"""About a hundred trials of `make faults`, the same each time; and the trials themselves find what they are for."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.fault_counts import summed
from tests.faults import undisturbed
from tests.faults.__main__ import Campaign
from tests.faults.child import Fault, command, journal_of, lose_unsynced
from tests.faults.fits import RUN, bench, compared, going_on, words
from tests.faults.notes import Notes, counts
from tests.faults.undisturbed import Undisturbed, keep, read

SOME = {"kills": 2, "power cuts": 2, "damage": 50, "good loads": 20, "full disks": 2, "exports": 2, "odd input": 30}


@pytest.fixture(scope="module")
def campaign():
    with bench() as made:
        made.methods = ["lisa", "lora"]  # the other ones are left to `make faults`
        yield Campaign(made)


@pytest.mark.parametrize("kind", SOME)
def test_a_fault_loses_nothing(campaign, kind):
    found = [campaign.trial(kind, number) for number in range(SOME[kind])]
    assert not [one for one in found if one.how == "failed"]
    if kind == "damage":
        assert sum(one.how == "refused" for one in found) > 40


def test_a_reader_that_believes_damage_is_found_out(campaign):
    kept = campaign.files.kinds
    path, files, _ = kept["delta (smt)"]
    campaign.files.kinds = {"delta (smt)": (path, files, Path.read_bytes)}
    try:
        found = [{**vars(campaign.files.damage(random.Random(number))), "seconds": 0} for number in range(5)]
    finally:
        campaign.files.kinds = kept
    assert [one["why"] for one in found] == ["believed"] * 5
    assert counts(found) == {
        **{"tried": 5, "killed": 0, "survived": 0, "refused": 0, "nothing": 0, "failed": 5},
        **{"lost_steps": 0, "corrupted": 5, "seconds": 0},
    }


def test_pieces_of_a_campaign_add_up_and_try_no_seed_twice(tmp_path):
    results, (one, other) = tmp_path / "results.jsonl", (tmp_path / name for name in ("one", "other"))
    found = {"how": "survived", "lost": 1, "killed": 2, "why": "", "seconds": 1.0}
    for folder, commit, seeds in [(one, "a", [0, 1]), (one, "b", [2]), (other, "b", [4, 5])]:
        folder.mkdir(exist_ok=True)
        notes = Notes("kills", folder, results)
        for seed in seeds:
            notes.add({"number": seed, "commit": commit, **found})
        notes.publish({"commit": "c"})
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["first"], line["tried"], line["commit"]) for line in lines] == [(0, 2, "a"), (2, 1, "b"), (4, 2, "b")]
    sums = summed(lines)["kills"]
    assert (sums["tried"], sums["killed"], sums["lost_steps"], sums["failed"]) == (5, 10, 5, 0)
    assert Notes("kills", tmp_path, results).left(8) == [3, 6, 7]
    with pytest.raises(ValueError, match="seed 4"):
        summed([*lines, lines[-1]])


def test_an_undisturbed_fit_is_kept_until_its_command_line_or_its_code_changes(tmp_path, monkeypatch):
    path = tmp_path / "kept" / "lora-1.pt"
    keep(Undisturbed({"step": torch.ones(2)}, events=3, seconds=0.5), path, ["fit"])
    kept = read(path, ["fit"])
    assert kept is not None
    assert kept.checkpoint is not None
    assert (kept.events, kept.checkpoint["step"].tolist()) == (3, [1, 1])
    assert read(path, ["fit", "--run=other"]) is None
    monkeypatch.setattr(undisturbed, "code", lambda: "other")
    assert read(path, ["fit"]) is None


def test_a_kill_comes_before_the_file_event_that_was_named(campaign):
    with campaign.bench.place() as place:
        (ended,) = command(words("lora", 1), place, Fault(event=1))
        assert ended.status < 0
        assert not (place / RUN).exists()


def test_a_file_system_that_is_full_keeps_the_last_checkpoint(campaign):
    straight, *_ = campaign.bench.straight("lora", 1)
    with campaign.bench.place() as place:
        disk = place / "runs"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here: it takes root")
        try:
            (full,) = command(words("lora", 1), place)
            assert (full.status, "No space left on device. The checkpoint before it is kept" in full.told) == (2, True)
            subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
            (ended,) = command(going_on("lora", 1, place), place)
            assert ended.status == 0, ended.told
            assert compared(place, None, straight, 0, {}).how == "survived"
        finally:
            subprocess.run(["umount", disk], check=True)


def writes(how: str):
    """Return a command that writes a file and renames it, and syncs the file, the folder, both or neither."""

    def act(line):
        import os

        Path("draft").write_bytes(b"new" * 2000)
        if "file" in how:
            with open("draft", "rb") as file:
                os.fsync(file.fileno())
        os.replace("draft", "kept")
        if "folder" in how:
            entry = os.open(".", os.O_RDONLY)
            os.fsync(entry)

    return act


@pytest.mark.parametrize(("how", "loses"), [("", True), ("folder", True), ("file", True), ("file and folder", False)])
def test_a_power_cut_loses_what_was_not_synced(tmp_path, how, loses):
    found = set()
    for number in range(12):
        work = tmp_path / f"{number}"
        work.mkdir()
        (work / "kept").write_bytes(b"old")
        (ended,) = command([], work, Fault(power=True), act=writes(how))
        assert ended.status == 0, ended.told
        lose_unsynced(journal_of(work), random.Random(number))
        found.add((work / "kept").read_bytes())
    assert b"new" * 2000 in found
    assert (len(found) > 1) is loses
    if how == "file":
        assert found == {b"new" * 2000, b"old"}
