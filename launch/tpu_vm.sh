#!/usr/bin/env bash
# Trains on a TPU slice: makes the slice if need be, installs the code on all its hosts, starts every one.
# JAX finds the hosts by itself. Start it again after a preemption: the run goes on from its last checkpoint.
#
#   bash launch/tpu_vm.sh
set -euo pipefail

NAME=vir                                  # of the slice
ZONE=us-central2-b
TYPE=v5litepod-256                        # v5e:16x16
VERSION=v2-alpha-tpuv5-lite               # runtime image that goes with the type
REPOSITORY=https://example.com/you/vir_jax.git
BUCKET=gs://your-bucket                   # seen by all hosts: data and workdir
COMMAND="python train.py --config=configs/vir_b.py --workdir=$BUCKET/runs/vir_b --config.data.data_dir=$BUCKET/tfds"

tpu=(gcloud compute tpus tpu-vm)
if ! "${tpu[@]}" describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
  "${tpu[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
fi

"${tpu[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="
  set -e
  test -d vir_jax || git clone $REPOSITORY vir_jax
  cd vir_jax
  git pull --ff-only
  test -d .venv || python3 -m venv .venv
  . .venv/bin/activate
  pip install --quiet -r requirements.txt
  pip install --quiet \"jax[tpu]==\$(python -c 'import jax; print(jax.__version__)')\"
  $COMMAND
"
