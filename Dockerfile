# Training on NVIDIA GPUs: the wheels bring CUDA's libraries, the host its driver (NVIDIA Container Toolkit).
#
#     docker build -t xdpo .
#     docker run --gpus all --ipc host -v "$PWD/runs:/xdpo/runs" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#         xdpo bash scripts/train_sd15.sh
FROM python:3.12-slim

# A C++ compiler for compute.compile; git for the commit that a run's record names.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /xdpo
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
