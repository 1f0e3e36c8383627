"""Stands in for a peer's Python: it is started as one, and pretends to be the driver that it is to run."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FAKE_PYTHON = """#!{python}
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
sys.argv = ["driver", *sys.argv[3:]]  # without -m and the module
from bench.peers.protocol import Answer, main

class Fake:
    system, version, vocabulary = "fake", "1.2", 100
    def __init__(self, options):
        self.more = options.more
        behaviour = self.more.get("be")
        if behaviour == "missing":
            import no_such_module_at_all
        if behaviour == "refusing":
            raise SystemExit("error: no such model")
        if behaviour == "parent":
            self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            self.version = str(self.child.pid)
        print("loaded", options.model)
        os.write(1, b"noise of a library\\n")
    def prefill(self, prompts):
        return self.answer(prompts, 1)
    def decode(self, prompts, tokens):
        return self.answer(prompts, tokens)
    def answer(self, prompts, tokens):
        print("{{}}")
        behaviour = self.more.get("be")
        if "log" in self.more:
            with open(self.more["log"], "a") as log:
                log.write(f"{{self.more['as']}} {{len(prompts)}}x{{len(prompts[0])}}+{{tokens}}\\n")
        if behaviour == "dying":
            sys.stderr.write("out of luck\\n")
            os._exit(1)
        if behaviour == "slow":
            time.sleep(60)
        if behaviour == "raising":
            raise RuntimeError("no\\nroom")
        work = {{"work": {{"int8_ops": 1000, "read_bytes": 2000}}}} if self.more.get("counts") else {{}}
        short = 1 if behaviour == "short" and tokens > 1 else 0
        return Answer(self.more.get("seconds", 1e-6), [[7] * (tokens - short) for _ in prompts], work)

main(Fake)
"""


def write(folder: Path) -> str:
    """The path of such a Python, in this folder."""
    path = folder / "fake_python"
    path.write_text(_FAKE_PYTHON.format(python=sys.executable, root=str(ROOT)))
    path.chmod(0o755)
    return str(path)
