#!/usr/bin/env bash
# Runs `tandem predict` under Open MPI's mpirun on the hosts of a hostfile, as many ranks as it has slots. Each process joins as a rank.
# Usage: scripts/cluster/openmpi.sh HOSTFILE CONFIG CKPT [more options of tandem predict]
#        e.g. bash scripts/cluster/openmpi.sh hosts configs/smollm2_135m_rtn.yaml output/demo/smollm2-135m-rtn --output results.jsonl
# The project, CONFIG and CKPT must have the same paths on every host. The exit code is that of the first rank that failed, else 0.
# MASTER_PORT, when it is set, is handed on to every rank.
set -euo pipefail

fail() {
    printf 'openmpi.sh: %s\n' "$*" >&2
    exit 2
}

case "${1-}" in
    -h | --help)
        sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
if [ "$#" -lt 3 ] || [ -z "$2" ] || [ -z "$3" ]; then
    sed -n '3,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
hostfile="$1" config="$2" checkpoint="$3"
shift 3

[ -f "$hostfile" ] || fail "there is no hostfile '$hostfile'; scripts/cluster/hostfile.example is one"
num_slots=0
hosts=()
while read -r host options || [ -n "$host" ]; do
    [[ "$host" != "" && "$host" != \#* ]] || continue
    [[ " $options " =~ [[:space:]]slots=([1-9][0-9]*)[[:space:]] ]] || fail "'$host' in '$hostfile' has no slots=N, its number of ranks"
    hosts+=("$host")
    num_slots=$((num_slots + BASH_REMATCH[1]))
done <"$hostfile"
[ "$num_slots" -gt 0 ] || fail "'$hostfile' names no host; write one a line, as in: node0 slots=4"
if [ "${#hosts[@]}" -gt 1 ] && [[ "${hosts[0]}" =~ ^(localhost|127\..*|::1)$ ]]; then
    fail "the first of the ${#hosts[@]} hosts in '$hostfile' is ${hosts[0]}, where the others cannot find it; give its name on the network"
fi
for word in "$config" "$checkpoint" "$@"; do
    [ "$word" != : ] || fail "mpirun takes the word ':' for the start of another program; write --option=: instead"
done
command -v mpirun >/dev/null || fail "mpirun is missing; on Debian and Ubuntu it is in the package openmpi-bin"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)" || fail "there is no Python at '$python'; run: bash scripts/install.sh"
# The project is found without being installed, and no folder named model in the working directory is taken for it (Python 3.11+).
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# A single host needs to be reached from nowhere else.
address="${hosts[0]}"
[ "${#hosts[@]}" -gt 1 ] || address=127.0.0.1
options=(--hostfile "$hostfile" -n "$num_slots" -x MASTER_ADDR="$address" -x PYTHONPATH -x PYTHONSAFEPATH)
[ -z "${MASTER_PORT-}" ] || options+=(-x MASTER_PORT)
# tandem itself puts threads on cores.
options+=(--bind-to none)
# mpirun refuses root, to save people from mistakes. Who is root already, as in most containers, has decided that.
[ "$(id -u)" -ne 0 ] || options+=(--allow-run-as-root)

exec mpirun "${options[@]}" "$python" -m launcher predict --config "$config" --checkpoint "$checkpoint" "$@"
