"""`python -m server`; where the package is installed, `vae-server` and `python -m vae_server`."""

import os
import signal
import sys
from pathlib import Path

# While it imports, Ctrl-C ends this process at once, instead of raising KeyboardInterrupt somewhere in a library.
is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_usual:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# A stream that the shell closed is None, which libraries do not expect.
sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  # for the whole process
sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115  # likewise

from .commands.cli import main  # noqa: E402  # see above

if is_usual:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    main()
