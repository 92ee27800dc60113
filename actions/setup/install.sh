#!/usr/bin/env bash
# Installs the cml-runner of this very checkout, with what the clouds named in CLOUDS need, into
# the job's temporary directory, and puts it on the PATH of the steps that follow. It takes Python's
# own venv and pip or, where a system has left them out, uv.
set -euo pipefail

# Print a path as both bash and Windows' own programs understand it.
native() { cygpath -m "$1" 2>/dev/null || printf '%s\n' "$1"; }

find_python() {
    local one
    for one in python3 python; do
        if "$one" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$one"
            return
        fi
    done
    return 1
}

# Find uv, or have pip install it, also where pip may not install anything for everybody.
find_uv() {
    local python pinned=$root/cml_runner/boot/uv.txt uv=$place-uv/bin/uv
    command -v uv && return
    if [ ! -x "$uv" ]; then
        python=$(find_python) || return 1
        "$python" -m pip install --require-hashes -r "$pinned" --target "$place-uv" >/dev/null 2>&1 || return 1
    fi
    echo "$uv"
}

make_environment() {
    local python uv
    [ ! -x "$place/bin/python" ] && [ ! -x "$place/Scripts/python.exe" ] || return 0
    if python=$(find_python) && "$python" -m venv "$place" >/dev/null 2>&1; then
        return
    fi
    rm -rf "$place"
    uv=$(find_uv) && "$uv" venv --quiet --python '>=3.10' "$place"
}

install() {
    local programs=$place/bin suffix= uv
    if [ -d "$place/Scripts" ]; then
        programs=$place/Scripts suffix=.exe
    fi
    if [ -x "$programs/pip$suffix" ]; then
        "$programs/pip$suffix" install --quiet --disable-pip-version-check "$1"
    else
        uv=$(find_uv)
        "$uv" pip install --quiet --python "$programs/python$suffix" "$1"
    fi
    if [ -n "$suffix" ]; then # the same place everywhere
        mkdir -p "$place/bin"
        cp "$programs/cml-runner$suffix" "$place/bin/"
    fi
}

here=${BASH_SOURCE[0]//\\//}
root=$(native "$(cd "$(dirname "$here")/../.." && pwd)")
place=$(native "$RUNNER_TEMP")/cml-runner
extras=
clouds=${CLOUDS:-}
for cloud in ${clouds//,/ }; do
    case "$cloud" in
        local) ;; # needs nothing
        az) extras+=azure, ;;
        *) extras+=$cloud, ;;
    esac
done

make_environment || {
    needs="Python 3.10 or newer with its module venv (Debian's package python3-venv), or uv"
    echo "::error::cml-runner needs $needs: put actions/setup-python or astral-sh/setup-uv first"
    exit 1
}
install "$root${extras:+[${extras%,}]}"
cygpath -w "$place/bin" 2>/dev/null >>"$GITHUB_PATH" || echo "$place/bin" >>"$GITHUB_PATH"
"$place/bin/cml-runner" --version
