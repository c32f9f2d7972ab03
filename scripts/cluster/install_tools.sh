#!/usr/bin/env bash
# Installs what the tests of the cluster scripts (Slurm, Open MPI, shellcheck, ...), of the server's page (Chromium) and of the kernels for
# ARM use, with apt-get.
# For throw-away machines: CI runs it.
# Usage: scripts/cluster/install_tools.sh
# Returns at once when all is there. It always ends with 0: without root or apt-get it says what is missing, and the tests skip that.
set -euo pipefail

# A program and the package of Debian and Ubuntu that has it. (Chromium: of Debian only; Ubuntu has it as a snap, which apt-get cannot install.)
tools=(
    mpirun openmpi-bin
    slurmctld slurm-wlm
    munged munge
    ss iproute2
    shellcheck shellcheck
    systemd-analyze systemd
    chromium chromium
    chromedriver chromium-driver
    aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
    aarch64-linux-gnu-gcc libc6-dev-arm64-cross
    qemu-aarch64 qemu-user
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
apt-get "${patience[@]}" update -qq >&2 || say "apt-get update failed"
# A package that this system does not have is not to keep the others away.
known=()
for package in "${packages[@]}"; do
    if LC_ALL=C apt-cache policy "$package" | grep -q 'Candidate: [^(]'; then
        known+=("$package")
    else
        say "there is no package $package here; the tests that use it will be skipped"
    fi
done
if [ "${#known[@]}" -gt 0 ] && ! apt-get "${patience[@]}" install -qq -y --no-install-recommends "${known[@]}" >&2; then
    say "apt-get failed; the tests that use ${known[*]} will be skipped"
fi
