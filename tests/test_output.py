"""Output that is closed, full, gone or of an encoding that lacks letters: nothing of it ends a command."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT

from runtime import output

COMMAND = """
import contextlib, os, sys
from runtime import output

@output.lasting()
def main():
    with open(sys.argv[1], "wb") as file:
        print("FID 1 ± 2")
        print("a warning", file=sys.stderr)
        for number in (1, 2):  # as a library does
            with contextlib.suppress(OSError):
                os.write(number, b"noise")
        file.write(b"result")
        file.flush()
        print("x" * 100_000)  # more than a buffer

main()
"""


@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full 2>/dev/full", "<&- >&-"])
def test_a_command_whose_output_goes_nowhere_does_its_work(streams, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    words = [sys.executable, tmp_path / "command.py", tmp_path / "result"]
    ended = subprocess.run(["bash", "-c", f'"$@" {streams}', "bash", *words], env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"a warning\nnoise" if streams == "<&- >&-" else b"")
    assert (tmp_path / "result").read_bytes() == b"result"


def test_letters_that_the_encoding_lacks_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    lasting = output.Lasting(stream)
    assert lasting.write("1 ± 2\n") == 6
    lasting.flush()
    assert stream.buffer.getvalue() == b"1 \\xb1 2\n"


def test_what_comes_after_the_reader_has_gone_is_dropped():
    reader, writer = os.pipe()
    lasting = output.Lasting(open(writer, "w"))
    lasting.write("read")
    lasting.flush()
    assert os.read(reader, 9) == b"read"
    os.close(reader)
    for _ in range(2):
        lasting.write("x" * 100_000)
        lasting.flush()
    assert os.write(writer, b"of a library") == 12
    lasting.close()
