#!/usr/bin/env bash
# Make .venv with the pinned versions and this package. A second run is instant; an interrupted one is taken up again.
# "make env" calls this with PYTHON (empty: look for one) and MIN_DISK_GB.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

check_system() {
    case "$(uname -s)" in
        Linux) ;;
        Darwin) stop "NeMo does not run on macOS. Use a Linux machine or a Linux container (x86-64, Python 3.11)." ;;
        *) stop "NeMo does not run on $(uname -s). On Windows, use WSL 2 and run make inside it." ;;
    esac
}

is_311() {
    [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = 3.11 ]
}

# The Python to build with. One inside .venv does not count: it may be the half of an interrupted run.
find_python() {
    local name search
    search=$(tr ':' '\n' <<<"$PATH" | grep -vxF "$PWD/.venv/bin" | paste -sd:)
    for name in ${PYTHON:-python3.11 python3 python}; do
        name=$(PATH=$search type -P "$name") || continue
        if is_311 "$name"; then
            echo "$name"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        stop "PYTHON=$PYTHON is not a Python 3.11. Name one that is: make workshop PYTHON=/path/to/python3.11"
    fi
    stop "Python 3.11 was not found (other versions do not run the pinned NeMo). Install it, for instance with" \
        "  apt install python3.11 python3.11-venv    or name it: make workshop PYTHON=/path/to/python3.11"
}

check_disk() {
    local free
    [[ $MIN_DISK_GB =~ ^[0-9]+$ ]] || stop "MIN_DISK_GB is '$MIN_DISK_GB'; give a whole number of gigabytes."
    free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    [ "$free" -ge "$MIN_DISK_GB" ] ||
        stop "only $free GB are free in $PWD; the environment and the models want $MIN_DISK_GB. Free some space, or try: make env MIN_DISK_GB=$free"
}

make_venv() {
    local python=$1
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python has no venv module. Install it, for instance with: apt install python3.11-venv"
    echo "creating .venv with $python"
    "$python" -m venv --clear .venv
}

# A fingerprint of what .venv is made from: when it changes, .venv is brought up to date.
wanted() {
    { cat requirements.txt pyproject.toml; pwd; } | sha256sum | cut -d' ' -f1
}

MIN_DISK_GB=${MIN_DISK_GB:-8}
export HOME=~ # without one, pip makes a folder called "~" for a user that the system does not know
stamp=.venv/.complete
check_system
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ] && is_311 .venv/bin/python; then
    exit 0
fi
check_disk
if ! { is_311 .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python)
    make_venv "$python"
fi
rm -f "$stamp"
echo "installing $(grep -c == requirements.txt) pinned packages; the first time takes some minutes"
.venv/bin/python -m pip install --quiet --progress-bar on --requirement requirements.txt ||
    stop "pip could not install the packages; its message stands above. Run the command again to go on where it stopped."
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
# JupyterLab would ask whether it may fetch news, and look for updates.
.venv/bin/python -m workshop_utils.core.home .venv/bin/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements >/dev/null 2>&1
wanted >"$stamp"
