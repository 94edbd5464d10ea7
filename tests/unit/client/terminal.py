"""A program at a terminal of its own."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

CODES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
PATIENCE_S = 30.0


class Terminal:
    """A command on a terminal of its own, and what it has drawn there since the last look."""

    def __init__(self, *command):
        self._master, slave = pty.openpty()
        self.resize(100)
        environment = os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        for fixed in ("COLUMNS", "LINES"):
            environment.pop(fixed, None)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def types(self, text):
        """As if at its keyboard; ctrl-D is the character 4."""
        os.write(self._master, text.encode())

    def resize(self, columns):
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def shows(self, pattern):
        """Reads until a match of `pattern` is drawn from now on; returns it."""
        seen, give_up = b"", time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern.encode(), CODES.sub(b"", seen))):
            assert time.monotonic() < give_up, seen[-2000:].decode(errors="replace")
            if select.select([self._master], [], [], 0.1)[0]:
                seen += os.read(self._master, 1 << 16)
        return found[0].decode()
