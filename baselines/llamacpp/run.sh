#!/usr/bin/env bash
# Measures llama.cpp alone on Q4_1, Q4_0 and Q8_0 files of the fetched model, making the latter two if needed.
#
#   run.sh [MODEL.Q4_1.gguf]        THREADS=2 REPEATS=3 PYTHON=python3
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$here/../../models/SmolLM2-135M-Instruct.Q4_1.gguf}
python=${PYTHON:-python3}
[ -f "$model" ] || { echo "$model: no such file; scripts/get-model fetches it" >&2; exit 2; }
"$python" "$here/quantize.py" "$model" --threads "${THREADS:-2}" >&2
for format in Q4_1 Q4_0 Q8_0; do
  "$python" "$here/bench.py" "${model%.*.gguf}.$format.gguf" \
    --threads "${THREADS:-2}" --repeats "${REPEATS:-3}"
done
