"""Measures llama.cpp on a GGUF file: prefill of one prompt, decode of 1, 8 and 32 sequences.

Needs llama-cpp-python (README.md says how to build it). Prints JSON; see `--help`. The figures are tokens a second of
the median repeat, for the better of its two attention paths (flash attention on and off), both of which are in the
JSON. Time is taken around `llama_decode` and the read of its logits, which is all that a server must do for a step.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time

CELLS = {
    # name: (sequences, tokens of context before timing starts, tokens a sequence timed)
    "prefill_512": (1, 0, 512),
    "decode_1": (1, 512, 96),
    "decode_8": (8, 128, 32),
    "decode_32": (32, 128, 16),
}


def token(sequence, position, vocab):
    """Different tokens for every sequence and position; which ones does not matter for the time."""
    return 3 + (position * 7919 + sequence * 104729) % (vocab - 3)


class Model:
    def __init__(self, lib, path):
        self.lib = lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            sys.exit(f"{path}: llama.cpp cannot load it")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def description(self):
        text = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.model, text, 256)
        return text.value.decode()

    def close(self):
        self.lib.llama_model_free(self.model)


class Context:
    """A context for `sequences` sequences of up to `length` tokens each."""

    def __init__(self, model, sequences, length, threads, flash, unified):
        lib = self.lib = model.lib
        self.vocab = model.vocab
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * ((length + 255) // 256 * 256)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1 if flash else 0
        params.kv_unified = unified
        params.no_perf = True
        self.context = lib.llama_init_from_model(model.model, params)
        if not self.context:
            sys.exit("llama.cpp cannot make a context")
        self.batch = lib.llama_batch_init(512, 0, 1)

    def decode(self, entries):
        """Computes `(token, position, sequence, wanted)` each, and touches the logits that are wanted."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (tok, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = tok
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        begun = time.perf_counter()
        status = self.lib.llama_decode(self.context, batch)
        for i, entry in enumerate(entries):
            if entry[3]:
                _ = self.lib.llama_get_logits_ith(self.context, i)[0]
        seconds = time.perf_counter() - begun
        if status != 0:
            sys.exit(f"llama_decode failed: {status}")
        return seconds

    def fill(self, sequence, length):
        """Computes one sequence's prompt, in one batch where it fits."""
        seconds = 0.0
        for first in range(0, length, 512):
            last = min(first + 512, length)
            seconds += self.decode(
                [(token(sequence, p, self.vocab), p, sequence, p == length - 1) for p in range(first, last)]
            )
        return seconds

    def prepare(self, sequences, length):
        """Gives every sequence a context: computed for the first, its K and V copied for the others."""
        self.fill(0, length)
        size = self.lib.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        if self.lib.llama_state_seq_get_data(self.context, state, size, 0) != size:
            sys.exit("llama.cpp cannot save a sequence")
        for sequence in range(1, sequences):
            if self.lib.llama_state_seq_set_data(self.context, state, size, sequence) == 0:
                sys.exit("llama.cpp cannot restore a sequence")

    def truncate(self, sequences, length):
        """Forgets what lies behind `length`."""
        memory = self.lib.llama_get_memory(self.context)
        for sequence in range(sequences):
            self.lib.llama_memory_seq_rm(memory, sequence, length, -1)

    def close(self):
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)


def repeat(context, cell):
    """One repeat of a cell, and the memory as before: tokens a second."""
    sequences, filled, timed = CELLS[cell]
    seconds = 0.0
    if filled == 0:
        seconds = context.fill(0, timed)
    else:
        for position in range(filled, filled + timed):
            seconds += context.decode(
                [(token(s, position, context.vocab), position, s, True) for s in range(sequences)]
            )
    context.truncate(sequences, filled)
    return sequences * timed / seconds


def measure(model, cell, threads, repeats):
    """All settings of a cell, interleaved, so that what else the machine does hits them alike."""
    sequences, filled, timed = CELLS[cell]
    # The KV memory of several sequences may be one stream or one each: which is faster depends on the model.
    streams = (False, True) if sequences > 1 else (False,)
    settings = [(flash, unified) for flash in (True, False) for unified in streams]
    contexts = [Context(model, sequences, filled + timed, threads, *setting) for setting in settings]
    runs = [[] for _ in settings]
    for context in contexts:
        if filled:
            context.prepare(sequences, filled)
        repeat(context, cell)  # warm
    for _ in range(repeats):
        for context, rates in zip(contexts, runs):
            rates.append(repeat(context, cell))
    for context in contexts:
        context.close()
    variants = [
        {
            "flash_attn": flash,
            "kv_unified": unified,
            "tokens_per_s": statistics.median(rates),
            "repeats": rates,
        }
        for (flash, unified), rates in zip(settings, runs)
    ]
    best = max(variants, key=lambda v: v["tokens_per_s"])
    return {"tokens_per_s": best["tokens_per_s"], "best": best, "variants": variants}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each setting of a cell")
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--out", help="where to write the JSON; standard output otherwise")
    options = parser.parse_args()
    cells = options.cells.split(",")
    if unknown := [c for c in cells if c not in CELLS]:
        parser.error(f"no such cell: {', '.join(unknown)}")
    if options.threads < 1 or options.repeats < 1:
        parser.error("threads and repeats start at 1")
    try:
        import llama_cpp
    except ImportError as error:
        sys.exit(f"{error}: build llama-cpp-python as README.md beside this file says")
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = Model(llama_cpp, options.model)
    report = {
        "system": "llama.cpp",
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "features": llama_cpp.llama_print_system_info().decode().strip(),
        "machine": platform.machine(),
        "model": os.path.basename(options.model),
        "description": model.description(),
        "bytes": os.path.getsize(options.model),
        "threads": options.threads,
        "cells": {cell: measure(model, cell, options.threads, options.repeats) for cell in cells},
    }
    model.close()
    text = json.dumps(report, indent=1)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
