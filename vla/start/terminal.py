"""The last words of a rank: they stay below what DeepSpeed's launcher writes when a rank ends."""

import os
import subprocess
import sys

from vla.start.launch import LAUNCHER, command_of

DEBUG = "SOLOVLA_DEBUG"  # environment variable: 1 shows what libraries print, and the traceback of every error
WAIT_SECONDS = 15.0  # for the end of the launcher, which gives each rank 30 s
# A program that forks itself, so that the launcher does not find it among the rank's processes and end it.
# Arguments: the launcher's process id, seconds, and the number of the stream. Standard input: the text.
SPEAKER = """
import os, select, sys
text = sys.stdin.buffer.read()
try:
    launcher = os.pidfd_open(int(sys.argv[1]))
except OSError:
    launcher = None
if os.fork():
    os._exit(0)
if launcher is not None:
    select.select([launcher], [], [], float(sys.argv[2]))
while text:
    text = text[os.write(int(sys.argv[3]), text):]
"""


def debugging() -> bool:
    """Whether the user wants to see everything."""
    return os.environ.get(DEBUG) == "1"


def say_last(text: str, stream: int) -> None:
    """Write a line to stdout (1) or stderr (2) below everything that DeepSpeed's launcher still has to say.

    When a rank ends, the launcher writes how it ends the others, and with which exit code. The text would scroll away.
    So a small process waits until the launcher has ended, and writes then. Without that launcher, and with
    SOLOVLA_DEBUG=1, the text is written at once. Call it just before the rank ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    launcher = os.getppid()
    if LAUNCHER in command_of(launcher) and not debugging():
        command = [sys.executable, "-ISc", SPEAKER, str(launcher), str(WAIT_SECONDS), str(stream)]
        try:
            content = f"{text}\n".encode(errors="backslashreplace")
            if subprocess.run(command, input=content, start_new_session=True, stdout=1, stderr=2).returncode == 0:
                return
        except OSError:  # no memory, or no more processes: at once is better than never
            pass
    print(text, file=sys.stdout if stream == 1 else sys.stderr, flush=True)
