#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts perf_analyzer, Triton server's load generator, into the virtual environment. The one in the wheel of tritonclient
# 2.51.0 runs on glibc 2.35; it needs two libraries, which nvidia-pytriton carries under other names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${LIGHTLLM_VENV:-$PWD/.venv}
WHEEL=tritonclient==2.51.0
DIRECTORY=$VENV/share/perf_analyzer

[ -x "$VENV/bin/python" ] || { echo "no environment in $VENV; run ./build.sh test or serve first" >&2; exit 1; }
libraries=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia_pytriton.libs
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT

# Downloaded and not installed: the environment keeps its own, newer tritonclient.
"$VENV/bin/python" -m pip download --disable-pip-version-check --no-deps --dest "$download" "$WHEEL"
"$VENV/bin/python" -m zipfile -e "$download"/*.whl "$download"
mkdir -p "$DIRECTORY"
install -m 755 "$download"/*.data/data/bin/perf_analyzer "$DIRECTORY/perf_analyzer"
ln -sf "$libraries"/libcudart-*.so.12* "$DIRECTORY/libcudart.so.12"
ln -sf "$libraries"/libb64-*.so.0d "$DIRECTORY/libb64.so.0d"

cat >"$VENV/bin/perf_analyzer" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH="$DIRECTORY\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" exec "$DIRECTORY/perf_analyzer" "\$@"
WRAPPER
chmod 755 "$VENV/bin/perf_analyzer"
"$VENV/bin/perf_analyzer" --version
