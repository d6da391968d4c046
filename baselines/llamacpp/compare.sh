#!/usr/bin/env bash
# Measures llama.cpp and quire on the same GGUF file, turn about, and prints a Markdown table with the ratios.
#
#   compare.sh MODEL.gguf [RESULTS_FOLDER]
#
# Settings, with their defaults: THREADS=2 ROUNDS=2 REPEATS=3 PYTHON=python3 QUIRE="cargo run --release --bin quire --"
# The raw JSON of every turn and the table stay in RESULTS_FOLDER (a new one under the temporary folder if not given).
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
model=$1
results=${2:-$(mktemp -d)}
threads=${THREADS:-2}
rounds=${ROUNDS:-2}
repeats=${REPEATS:-3}
python=${PYTHON:-python3}
read -r -a quire <<<"${QUIRE:-cargo run --quiet --release --bin quire --}"

[ -f "$model" ] || { echo "$model: no such file" >&2; exit 2; }
mkdir -p "$results"
# Whatever must be built is built before anything is timed.
"${quire[@]}" bench --help >/dev/null

for round in $(seq 1 "$rounds"); do
  echo "round $round of $rounds: llama.cpp" >&2
  "$python" "$here/bench.py" "$model" --threads "$threads" --repeats "$repeats" \
    --out "$results/llamacpp.$round.json"
  echo "round $round of $rounds: quire" >&2
  "${quire[@]}" bench --model "$model" --threads "$threads" --repeats "$repeats" --json >"$results/quire.$round.json"
done
"$python" "$here/table.py" "$results" | tee "$results/table.md"
echo "raw results and the table: $results" >&2
