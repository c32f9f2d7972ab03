#!/usr/bin/env bash
# tandem next to the prebuilt llama.cpp of npm (AVX2 and Zen 4 libraries) and OpenVINO GenAI, int8, in the shape of TinyLlama 1.1B.
# Usage: scripts/bench/compare_all.sh FOLDER [options of compare.py]
# Fetches what FOLDER lacks: npm's @node-llama-cpp/linux-x64, an environment with openvino-genai, and a GGUF file of random weights.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(realpath "$1")
shift
here=$(realpath "$(dirname "$0")")
shape="$here/shapes/tinyllama_1.1b.json"

if [ ! -d "$folder/package" ]; then
  (cd "$folder" && npm pack --silent @node-llama-cpp/linux-x64 >/dev/null && tar xzf node-llama-cpp-linux-x64-*.tgz)
fi
if [ ! -x "$folder/openvino/bin/benchmark_app" ]; then
  python -m venv "$folder/openvino"
  "$folder/openvino/bin/pip" install --quiet openvino-genai
fi
if [ ! -f "$folder/tinyllama_q8_0.gguf" ]; then
  PYTHONPATH="$here/../.." python "$here/random_gguf.py" "$shape" "$folder/partial.gguf" --vocabulary
  mv "$folder/partial.gguf" "$folder/tinyllama_q8_0.gguf"
fi
PYTHONPATH="$here/../.." python "$here/compare.py" --model-config "$shape" --quantization rtn-a16w8,a8w8 --workers 2 \
  --llama-package "$folder/package" --openvino "$folder/openvino/bin/python" --gguf "$folder/tinyllama_q8_0.gguf" "$@"
