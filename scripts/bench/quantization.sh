#!/usr/bin/env bash
# What each quantization costs: perplexity on the first 4 x 512 tokens of a text, float32 arithmetic, and bytes of the tensors.
# Usage: scripts/bench/quantization.sh FLOAT_CHECKPOINT BOOLQ_JSONL TEXT OUT_FOLDER [RANKS]
set -euo pipefail

if [ $# -lt 4 ]; then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
fi
model=$1 boolq=$2 text=$3 out=$4 ranks=${5:-1}
mkdir -p "$out"

measure() { # NAME CHECKPOINT
  local score
  score=$(tandem eval --task perplexity --data "$text" --limit 4 --checkpoint "$2" --dtype float32 --workers "$ranks" \
    --log-dir "$out/log" --json 2>"$out/log.txt")
  python - "$1" "$2" "$score" <<'PYTHON'
import json
import sys
from pathlib import Path

from model.checkpoint.formats import open_checkpoint

name, path, score = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
size = sum(info.num_bytes for info in open_checkpoint(path).tensors.values())
print(f"| {name} | {score['perplexity']:.2f} | {size / 1e6:.1f} MB |", flush=True)
PYTHON
}

try() { # NAME OPTIONS...
  local name=$1 folder
  shift
  folder="$out/${name// /_}"
  tandem quantize --checkpoint "$model" "$@" --output "$folder" --overwrite --workers "$ranks" --log-dir "$out/log" \
    >"$folder.report.txt" 2>"$out/log.txt"
  measure "\`${*//"$boolq"/FILE}\`" "$folder"
}

data=(-t boolq -s "$boolq")
echo "| quantization | perplexity | tensors |"
echo "|---|---|---|"
measure "float" "$model"
try a16w8 -a rtn-a16w8
try c8 -a rtn-c8 "${data[@]}"
try c8_token -a rtn-c8 --kvcache-granularity per_token
try smooth -a smooth_quant "${data[@]}"
try smooth_fold -a smooth_quant --fold "${data[@]}"
try a8w8 -a a8w8
try w4 -a rtn-a16w4 --group-size 64
try gptq -a gptq --group-size 64 "${data[@]}"
try awq -a awq --group-size 64 "${data[@]}"
try awq_asymmetric -a awq --asymmetric --group-size 64 "${data[@]}"
