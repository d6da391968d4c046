"""Makes Q4_0 and Q8_0 files, or others (F32, F16), beside a GGUF file by llama.cpp's own quantizer.

Tensors that are quantized already are widened and quantized again: such files are for timing, and say nothing about
quality.
"""

import argparse
import ctypes
import os
import pathlib
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path, help="a GGUF file, such as SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--into", type=pathlib.Path, help="folder of the results (that of the model)")
    parser.add_argument("--formats", default="Q4_0,Q8_0")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    try:
        import llama_cpp
    except ImportError as error:
        sys.exit(f"{error}: build llama-cpp-python as README.md beside this file says")
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    into = options.into or options.model.parent
    # NAME.Q4_1.gguf becomes NAME.Q8_0.gguf.
    stem = options.model.stem.rsplit(".", 1)[0]
    for name in options.formats.split(","):
        whole = "ALL" if name == "F32" else "MOSTLY"
        kind = getattr(llama_cpp, f"LLAMA_FTYPE_{whole}_{name}", None)
        if kind is None:
            parser.error(f"llama.cpp has no format {name}")
        target = into / f"{stem}.{name}.gguf"
        if target.exists():
            print(f"{target}: already there")
            continue
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = kind
        params.allow_requantize = True
        params.nthread = options.threads
        partial = target.with_suffix(".partial")
        status = llama_cpp.llama_model_quantize(
            os.fsencode(options.model), os.fsencode(partial), ctypes.byref(params)
        )
        if status != 0:
            partial.unlink(missing_ok=True)
            sys.exit(f"{options.model}: llama.cpp cannot quantize it to {name} ({status})")
        partial.rename(target)
        print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
