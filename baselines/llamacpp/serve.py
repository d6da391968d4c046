"""Serves a GGUF file by llama.cpp's own HTTP server (continuous batching), until it is interrupted.

One cache that all requests share, none of it kept for later prompts.
"""

import argparse
import pathlib
import signal
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=512, help="tokens that the cache holds, of all requests together")
    parser.add_argument("--parallel", type=int, default=8, help="requests in a pass; others wait")
    parser.add_argument("--token-budget", type=int, default=512, help="tokens in a pass")
    parser.add_argument("--kv-dtype", choices=["f32", "f16"], default="f32")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not options.model.is_file():
        parser.error(f"{options.model}: no such file")
    try:
        import xllamacpp
    except ImportError as error:
        sys.exit(f"{error}: pip install xllamacpp")
    # Before there are threads, so that all of them leave it to this one.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.port = options.port
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.n_parallel = options.parallel
    params.n_batch = params.n_ubatch = options.token_budget
    params.n_ctx = options.slots
    params.kv_unified = True
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.kv_dtype.upper()}")
    params.verbosity = 2  # warnings and errors
    # What is asked for and no less: without this it may choose a size of its own.
    params.fit_params = False
    params.cache_prompt = params.cache_idle_slots = False
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1 (xllamacpp {xllamacpp.__version__})", flush=True)
    signal.sigwait(signals)


if __name__ == "__main__":
    main()
