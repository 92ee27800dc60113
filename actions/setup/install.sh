#!/usr/bin/env bash
# Installs the cml-runner of this very checkout, with what the clouds named in CLOUDS need, into
# the job's temporary directory, and puts it on the PATH of the steps that follow.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
place="$RUNNER_TEMP/cml-runner"
extras=
clouds=${CLOUDS:-}
for cloud in ${clouds//,/ }; do
    case "$cloud" in
        local) ;; # needs nothing
        az) extras+=azure, ;;
        *) extras+=$cloud, ;;
    esac
done

[ -x "$place/bin/python" ] || python3 -m venv "$place"
"$place/bin/pip" install --quiet --disable-pip-version-check "$root${extras:+[${extras%,}]}"
echo "$place/bin" >>"$GITHUB_PATH"
"$place/bin/cml-runner" --version
