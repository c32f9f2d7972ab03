#!/usr/bin/env bash
# Makes .venv in the project's root where it is missing and installs the project there, editable, with the extras named.
# Usage: scripts/install.sh [EXTRA ...]      e.g. scripts/install.sh test serve
# PYTHON names the interpreter that .venv is made with (default: python3; 3.10 or newer).
# A call that finds everything installed and pyproject.toml unchanged returns at once.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/installed"

say() { printf 'install: %s\n' "$*" >&2; }

# First line of the stamp: what was installed, and from where (a copied tree must not use the original's files). Then one extra a line.
state="$(sha256sum <"$root/pyproject.toml" | cut -d ' ' -f 1) $root"

is_installed() {
    [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$state" ] || return 1
    local extra
    for extra in "$@"; do
        tail -n +2 "$stamp" | grep -qxF -- "$extra" || return 1
    done
}

if is_installed "$@"; then
    exit 0
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        say "Python 3.10 or newer is needed, but '$python' is $("$python" --version 2>&1 || true)."
        say "Set PYTHON to a newer interpreter, for example PYTHON=python3.12 bash scripts/install.sh"
        exit 2
    fi
    say "making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        say "'$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv."
        exit 1
    fi
fi

# Extras installed before stay, so that a call with other ones does not take them away.
extras="$({ tail -n +2 "$stamp" 2>/dev/null || true; printf '%s\n' "$@"; } | sed '/^$/d' | sort -u)"
rm -f "$stamp"
list="$(paste -sd , <<<"$extras")"
say "installing tandem-launcher${list:+[$list]} (some minutes the first time)"
(cd "$root" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".${list:+[$list]}")

printf '%s\n' "$state" ${extras:+"$extras"} >"$stamp.part"
mv "$stamp.part" "$stamp"
say "done in $SECONDS s"
