# An image that trains: this checkout with its pinned requirements.
#
#   docker build -t your-registry/vir_jax:latest .                                # CPU
#   docker build -t your-registry/vir_jax:latest --build-arg ACCELERATOR=cuda13 . # NVIDIA GPUs; JAX's wheels bring CUDA
#   docker run --rm -v "$PWD/runs:/vir_jax/runs" your-registry/vir_jax:latest vir-train --config=vir_digits --workdir=runs/vir_digits
FROM python:3.12-slim

# "cpu", or an extra of jax: "cuda13", "cuda12", "tpu".
ARG ACCELERATOR=cpu

WORKDIR /vir_jax
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt \
 && if [ "$ACCELERATOR" != cpu ]; then \
      pip install --no-cache-dir -c requirements.txt "jax[$ACCELERATOR]"; \
    fi
COPY pyproject.toml setup.py README.md LICENSE ./
COPY train.py eval.py predict.py generate.py ./
COPY configs configs
COPY vir_jax vir_jax
# The commands; the code is run from this folder, so that configs/ and train.py are what they are in a checkout.
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["vir-train", "--help"]
