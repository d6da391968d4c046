"""Draws the Markdown table of a results folder that compare.sh wrote: llamacpp.N.json and quire.N.json, N from 1.

The former hold `{"cells": {NAME: {"tokens_per_s": RATE}}}`, the latter what `quire bench --json` prints. A turn of one system is compared with the turn of the
other that follows it, so that what the machine does in the meantime hits both alike; the ratio is the median of those.
"""

import json
import pathlib
import statistics
import sys

ROWS = {
    "prefill_512": ("prefill of 512 tokens", 2.0),
    "decode_1": ("decode, 1 sequence, context 512-608", 1.5),
    "decode_8": ("decode, 8 sequences, context 128-160", 2.0),
    "decode_32": ("decode, 32 sequences, context 128-144", 2.0),
}


def load(folder, system):
    rounds = []
    while (path := folder / f"{system}.{len(rounds) + 1}.json").exists():
        rounds.append(json.loads(path.read_text(encoding="utf-8")))
    if not rounds:
        sys.exit(f"{folder}: no {system}.1.json")
    return rounds


def quire_cells(report):
    """The figures of `quire bench --json` by the names of the cells."""
    return {
        f"{f['kind']}_{f['context' if f['kind'] == 'prefill' else 'sequences']}": f["tokens_per_second"]
        for f in report["figures"]
    }


def spread(values):
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    theirs, ours = load(folder, "llamacpp"), load(folder, "quire")
    if len(theirs) != len(ours):
        sys.exit(f"{folder}: {len(theirs)} turns of llama.cpp, {len(ours)} of quire")
    first = theirs[0]
    print(f"{first['model']} ({first['description']}), {first['threads']} threads, {len(ours)} turns each, ")
    print(f"tokens a second, median (least-most). llama.cpp: {first['version']}, its best setting of each cell.")
    print()
    print("| | llama.cpp | quire | ratio | wanted |")
    print("|---|---|---|---|---|")
    for cell, (label, wanted) in ROWS.items():
        try:
            a = [r["cells"][cell]["tokens_per_s"] for r in theirs]
            b = [quire_cells(r)[cell] for r in ours]
        except KeyError:
            print(f"| {label} | | not measured by both | | {wanted:.1f} |")
            continue
        ratio = statistics.median(y / x for x, y in zip(a, b))
        print(f"| {label} | {spread(a)} | {spread(b)} | {ratio:.2f} | {wanted:.1f} |")
    print()
    for cell in ROWS:
        if best := first["cells"].get(cell, {}).get("best"):
            attention = "flash attention" if best["flash_attn"] else "plain attention"
            streams = "one KV stream" if best["kv_unified"] else "a KV stream a sequence"
            print(f"- {cell}: llama.cpp was fastest with {attention}, {streams} (first turn).")


if __name__ == "__main__":
    main()
