#!/usr/bin/env bash
# Decodes prompts with one rank or with several, waits for the run and passes its exit code on.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: run_predict.sh PARALLEL CONFIG_PATH CKPT_PATH [DEVICE_NUM] [more options of tandem predict]

  PARALLEL     single: one rank; parallel: DEVICE_NUM ranks
  CONFIG_PATH  YAML configuration
  CKPT_PATH    checkpoint, a file or a folder
  DEVICE_NUM   number of ranks: needed for parallel; for single it may be left out or be 1

Prints one line 'text_generation_text': [PROMPT AND CONTINUATION] per prompt; without --prompt or --prompts-file, three prompts are used.

Example: run_predict.sh parallel configs/predict.yaml output/checkpoint 2 --prompt 'The capital of France is'
TEXT
}

fail() {
    printf 'run_predict.sh: %s\n' "$*" >&2
    exit 2
}

case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac
if [ "$#" -gt 0 ] && [ "$1" != single ] && [ "$1" != parallel ]; then
    fail "PARALLEL must be 'single' or 'parallel', not '$1'"
fi
if [ "$#" -lt 3 ] || [ -z "$2" ] || [ -z "$3" ]; then
    usage >&2
    exit 2
fi

parallel="$1" config_path="$2" ckpt_path="$3"
shift 3
if [ "$parallel" = parallel ]; then
    [[ "${1-}" =~ ^[1-9][0-9]*$ ]] || fail "parallel needs DEVICE_NUM, a positive integer, as its 4th argument, not '${1-}'"
    num_workers="$1"
    shift
else
    num_workers=1
    if [ "$#" -gt 0 ] && [[ "$1" != -* ]]; then
        [ "$1" = 1 ] || fail "single runs one rank: DEVICE_NUM may be left out or be 1, not '$1'"
        shift
    fi
fi

# Asked from /, where no folder of the caller can pass for an installed package.
has_tandem() {
    (cd / && "$1" -c 'import importlib.metadata; importlib.metadata.version("tandem-launcher")') 2>/dev/null
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
if ! has_tandem "$python"; then
    if has_tandem python3; then
        python=python3
    else
        bash "$root/scripts/install.sh"
    fi
fi

# A folder named model or launcher in the caller's working directory must not be imported instead of the project (Python 3.11+).
export PYTHONSAFEPATH=1
# The original's three prompts, where the caller gives none.
prompts=(--prompt 'I love Beijing, because' --prompt 'LLaMA is a' --prompt 'Huawei is a company that')
for word in "$@"; do
    case "$word" in
        --prompt | --prompt=* | --prompts-file | --prompts-file=*) prompts=() ;;
    esac
done
# A --format among the caller's options goes over the one here.
exec "$python" -m launcher predict --config "$config_path" --checkpoint "$ckpt_path" --workers "$num_workers" \
    --format mindformers ${prompts[@]+"${prompts[@]}"} "$@"
