# An image whose command is lit-sparse.
#   CPU:   docker build -t lit-sparse .
#   CUDA:  docker build -t lit-sparse --build-arg TORCH_INDEX=https://pypi.org/simple .
#   run:   docker run --rm -v "$PWD:/work" -v lit-sparse:/cache lit-sparse fit --config smt.yaml --data rows.jsonl
#          with a GPU, add --gpus all after `run`; torch's wheels bring CUDA's libraries, the host has the driver.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Triton compiles a launcher for its kernels with the C compiler at hand.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lit-sparse
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY lit_sparse lit_sparse
COPY kernels kernels
COPY profiling profiling
COPY configs configs

# The CPU build, 2.13.0+cpu, satisfies the pin of torch and is preferred to the one with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" --constraint constraints.txt '.[data]' \
    && lit-sparse --version

ENV LIT_SPARSE_CACHE=/cache/lit-sparse HF_HOME=/cache/huggingface
WORKDIR /work
ENTRYPOINT ["lit-sparse"]
CMD ["--help"]
