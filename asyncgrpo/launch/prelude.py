"""Becomes a role's program, after asking the kernel to end it together with its launcher.

Run as a script with the standard library only: `python -I -S prelude.py LAUNCHER_PID ARGV...`. A
script instead of Popen's preexec_fn, which is not safe while other threads (a progress display)
run in the launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replaces itself by the program; exits with one line when it cannot."""
    launcher, argv = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != launcher:  # it died before prctl: nobody would tell us any more
        sys.exit(f"launcher {launcher} is gone; {argv[0]} is not started")
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.exit(f"cannot start {argv[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
