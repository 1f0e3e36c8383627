"""Quantise a GGUF file by llama.cpp's own function; run by the Python that has llama-cpp-python.

python -m bench.peers.llama_quantise floats.gguf out.gguf Q4_K_M 2
"""

from __future__ import annotations

import ctypes
import sys


def quantise(source: str, target: str, type_name: str, threads: int) -> None:
    import llama_cpp

    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}", None)
    if file_type is None:
        raise SystemExit(f"error: llama.cpp has no type {type_name!r}; accepted: Q4_0, Q4_K_M and the like")
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.nthread = file_type, threads
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(wanted))
    if code:
        raise SystemExit(f"error: llama_model_quantize returned {code} for {source}")


if __name__ == "__main__":
    quantise(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
