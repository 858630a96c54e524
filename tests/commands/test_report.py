"""The command `lit-sparse report`: what it refuses, in a sentence and with status 2."""

from pathlib import Path

import pytest

from lit_sparse.cli import main
from lit_sparse_profiling.record import RunRecord

REFUSED = {
    "a cut record": ('{"schema"', [], "A report of 1 records was asked for, but none can be read: "),
    "a cut record for a page": ('{"schema"', ["-o", "page.html"], "none can be read: "),
    "another file": ("[]", [], "is JSON but not a run record (it has no schema); give a run's record.json."),
    "a superscript for a card": (
        None,
        ["--card", "\u00b2"],
        "--card \u00b2 was asked for; the known sizes in GB are 8,",
    ),
}


@pytest.mark.parametrize(("content", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_sentence(
    content: str | None,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smt-1").mkdir()
    RunRecord(name="smt-1").write("smt-1/record.json")
    if content is not None:
        Path("smt-1", "record.json").write_text(content)
    monkeypatch.setattr("sys.argv", ["lit-sparse", "report", "smt-1", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert said in " ".join(told.err.split())
    assert told.err.startswith("lit-sparse: ")
    assert told.out == ""
    assert not Path("page.html").exists()
