"""What nobody reads goes nowhere, and the work goes on."""

import errno
import io
import os

import pytest

from lit_sparse.commands.streams import Outlived


class Broken(io.StringIO):
    """A stream that fails as `number` says."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        return self.spare


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_what_nobody_reads_goes_nowhere_and_the_work_goes_on(number, tmp_path):
    with open(tmp_path / "printed", "w") as file:
        stream = Broken(number)
        stream.spare = file.fileno()
        assert Outlived(stream).write("told") == 4
        file.write("more")  # which goes where the reader was
    assert (tmp_path / "printed").read_text() == ""


def test_a_full_disk_below_what_is_printed_is_told():
    with pytest.raises(OSError, match="No space left"):
        Outlived(Broken(errno.ENOSPC)).write("told")


def test_characters_that_an_encoding_lacks_are_written_as_numbers():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    written = Outlived(stream)
    written.write("\u00fcn\udcff")
    written.flush()
    assert stream.buffer.getvalue() == b"\\xfcn\\udcff"
