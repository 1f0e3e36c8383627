"""The entry point: runs a verb, and turns whatever ends it into one line and an exit code."""

from __future__ import annotations

import gc
import io
import os
import sys
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and leave with its exit code: 0, 1 for an error, 130 for Ctrl-C."""
    code: object = 0
    try:
        _prepare_streams()
        # Imported in here, so that Ctrl-C is as quiet now as it is later.
        from ridgeline.cli.app import app

        code = app(standalone_mode=False, prog_name="ridgeline")
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader has what it wanted. What is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        from ridgeline.cli.errors import user_message

        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 1
    gc.disable()  # what is left goes with the process, and need not be looked through before
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """Streams that a parent has closed lead nowhere, and characters that do not fit an encoding are "?"."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
