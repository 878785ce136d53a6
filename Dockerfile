# SPDX-License-Identifier: Apache-2.0
# docker run --gpus all -p 8080:8000 -v /models:/data IMAGE --model_dir /data/llama-7B
# docs/security.md has the options for a read-only container with limits, docs/kubernetes.md those of a cluster.
ARG TRITON_SERVER=26.10
# @sha256:… pins the server's image to the bytes of that digest.
ARG TRITON_SERVER_DIGEST=
FROM nvcr.io/nvidia/tritonserver:${TRITON_SERVER}-py3${TRITON_SERVER_DIGEST} AS server

# Triton-lang compiles its launchers with the C compiler and Python's headers, also while the server runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 lightllm \
    && useradd --create-home --uid 10001 --gid 10001 lightllm

FROM server AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv
# An environment of its own, with locked packages alone.
WORKDIR /opt/lightllm
RUN python3 -m venv environment
ENV PATH=/opt/lightllm/environment/bin:${PATH} PIP_NO_CACHE_DIR=1
COPY requirements.lock ./
# Replaces the locked torch, which needs a driver of CUDA 13. For older drivers: torch==2.10.0, and TRITON_SERVER=25.07.
ARG TORCH=
# The lock names every package, hence no dependencies. The version of torch is in the argument.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-deps --require-hashes --requirement requirements.lock \
    && if [ -n "${TORCH}" ]; then python3 -m pip install "${TORCH}"; fi

COPY pyproject.toml README.md LICENSE ./
COPY client ./client
COPY lightllm_backend ./lightllm_backend
COPY model_repository ./model_repository
# Editable: the backend stays beside the model repository that belongs to it. Built by the locked setuptools. Compiled
# now, since a read-only container cannot keep the bytecode.
RUN python3 -m pip install --no-deps --no-build-isolation --config-settings editable_mode=compat \
        --editable . --editable ./client \
    && python3 -m compileall -q lightllm_backend client

FROM server
LABEL org.opencontainers.image.title="LightLLM on Triton server" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/lightllm /opt/lightllm
WORKDIR /opt/lightllm
# The first python3 on PATH is that of Triton server's models.
ENV PATH=/opt/lightllm/environment/bin:${PATH}
USER 10001:10001
EXPOSE 8000 8001 8002
# A large model takes minutes to load.
HEALTHCHECK --start-period=15m --interval=30s --timeout=10s CMD ["lightllm", "health"]
ENTRYPOINT ["python3", "-m", "lightllm_backend.serve", "--host", "0.0.0.0"]
