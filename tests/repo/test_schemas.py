"""One sentence for whatever a file or a flag should not hold."""

import dataclasses
import os
import socket
import subprocess
import sys
from typing import Literal

import pytest
from conftest import ROOT

from schemas import Schema, UserError, check_flags, flags, parse_json, read_json
from schemas.lock import LOCK, lock_folder


class Example(Schema):
    size: flags.Count
    rate: flags.NonNegative
    kind: Literal["a", "b"] = "a"
    shape: tuple[int, int] = (1, 1)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b'{"size": 1, "ra', "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"size": 1, "size": 2, "rate": 0}', "has the key 'size' twice"),
        (b'{"size": 1' + b"0" * 5000 + b', "rate": 0}', "is not valid JSON (Exceeds the limit"),
        (b"[1, 2]", "must be an object with keys"),
        (b'{"rate": 0}', "has no size"),
        (b'{"size": 0, "rate": 0}', "has size 0, but it must be at least 1"),
        (b'{"size": true, "rate": 0}', "has size true, but it must be a whole number"),
        (b'{"size": "1", "rate": 0}', 'has size "1", but it must be a whole number'),
        (b'{"size": 1, "rate": NaN}', "has rate NaN, but it must be a finite number"),
        (b'{"size": 1, "rate": null}', "has rate null, but it must be a number"),
        (b'{"size": 1, "rate": 0, "kind": "c"}', "has kind \"c\", but it must be 'a' or 'b'"),
        (b'{"size": 1, "rate": 0, "shape": [1]}', "has no shape.1"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_file_key_and_remedy(tmp_path, content, said):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, Example, remedy="copy it again")
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and sentence.endswith(": copy it again")
    assert said in sentence and "\n" not in sentence


def test_what_fits_is_read_and_more_is_kept(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"size": 3, "rate": 1, "shape": [2, 4], "other": "x"}')
    found = read_json(path, Example, remedy="")
    assert (found.size, found.rate, found.shape, found.other) == (3, 1.0, (2, 4), "x")


def test_a_pipe_and_a_folder_are_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(UserError, match="copy it again"):
            read_json(tmp_path / name, Example, remedy="copy it again")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_flag_out_of_range_is_one_sentence(value):
    @dataclasses.dataclass
    class Args:
        num_envs: flags.Count = 8
        learning_rate: flags.NonNegative = 0.1

    check_flags(Args())
    with pytest.raises(UserError, match=r"^--learning_rate \S+ must be (a finite number|at least 0)$"):
        check_flags(Args(learning_rate=value))


def test_duplicate_keys_are_found_at_any_depth():
    with pytest.raises(UserError, match="'b' twice"):
        parse_json(b'{"a": {"b": 1, "b": 1}}', "x", "y")


# ------------------------------------------------------------------ one writer per folder
def test_a_folder_has_one_writer_and_is_free_when_that_is_killed(tmp_path):
    """The second is told who the first is; nothing has to be removed after a kill -9."""
    hold = (
        "import sys, time, pathlib; from schemas.lock import lock_folder\n"
        "lock_folder(pathlib.Path(sys.argv[1]), 'it'); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"^--run_dir x is being .* process {first.pid} on {socket.gethostname()}"):
            lock_folder(tmp_path, "--run_dir x")
        first.kill()
    os.close(lock_folder(tmp_path, "--run_dir x"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("elsewhere", path)])
def test_what_is_no_lock_file_is_neither_waited_for_nor_followed(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(UserError, match=r"^--output x cannot be locked"):
        lock_folder(tmp_path, "--output x")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_what_windows_editors_write_is_read(tmp_path, line_end):
    """Notepad begins a file with a byte order mark, and ends lines in two bytes."""
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + line_end.join(("{", '"a": 1', "}", "")).encode())
    assert read_json(file, dict, "") == {"a": 1}
