#!/usr/bin/env bash
# Installs what the tests of the cluster scripts use (Slurm, Open MPI, shellcheck, ...) with apt-get. For throw-away machines: CI runs it.
# Usage: scripts/cluster/install_tools.sh
# Returns at once when all is there. It always ends with 0: without root or apt-get it says what is missing, and the tests skip that.
set -euo pipefail

# A program and the package of Debian and Ubuntu that has it.
tools=(
    mpirun openmpi-bin
    slurmctld slurm-wlm
    munged munge
    ss iproute2
    shellcheck shellcheck
    systemd-analyze systemd
)

say() { printf 'install_tools: %s\n' "$*" >&2; }

PATH="$PATH:/usr/sbin:/sbin"
packages=()
for ((i = 0; i < ${#tools[@]}; i += 2)); do
    command -v "${tools[i]}" >/dev/null || packages+=("${tools[i + 1]}")
done

if [ "${#packages[@]}" -eq 0 ]; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    say "missing, and only root can install them, with apt-get: ${packages[*]}; the tests that use them will be skipped"
    exit 0
fi
say "installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
patience=(-o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=60)
if ! { apt-get "${patience[@]}" update -qq && apt-get "${patience[@]}" install -qq -y --no-install-recommends "${packages[@]}"; } >&2; then
    say "apt-get failed; the tests that use ${packages[*]} will be skipped"
fi
