#!/usr/bin/env bash
# Trains on a TPU slice: makes the slice if need be, installs the code on all its hosts, starts every one.
# JAX finds the hosts by itself. Start it again after a preemption (exit code 75, or a slice that is gone): the run
# goes on from its last checkpoint.
#
# The workdir lies in the bucket: checkpoints, metrics, lock. The data are read through gcsfuse, which mounts a folder
# of the same bucket on every host: gs://$BUCKET/tfds, prepared by vir_jax.data.prepare and copied there. The slice's
# service account needs roles/storage.objectUser on the bucket. A run that was killed leaves its lock behind, which the
# next one watches for a minute before it takes it over.
#
#   bash launch/tpu_vm.sh
set -euo pipefail

NAME=vir                                  # of the slice
ZONE=us-central2-b
TYPE=v5litepod-256                        # v5e:16x16
VERSION=v2-alpha-tpuv5-lite               # runtime image that goes with the type
REPOSITORY=https://example.com/you/vir_jax.git
BUCKET=your-bucket                        # in the slice's region

on_every_host=$(cat <<'HOST'
set -euo pipefail
if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl -fsS $packages/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi
mkdir -p tfds
mountpoint -q tfds || gcsfuse --implicit-dirs --only-dir=tfds -o ro "$BUCKET" tfds

test -d vir_jax || git clone "$REPOSITORY" vir_jax
cd vir_jax
git pull --ff-only
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv # The image comes with Python 3.10.
test -d .venv || uv venv --quiet --python 3.11 .venv
. .venv/bin/activate
uv pip install --quiet -r requirements.txt
uv pip install --quiet "jax[tpu]==$(python -c 'import jax; print(jax.__version__)')"
exec python train.py \
  --config=configs/vir_b.py \
  --workdir="gs://$BUCKET/runs/vir_b" \
  --config.data.data_dir="$HOME/tfds"
HOST
)

tpu=(gcloud compute tpus tpu-vm)
if ! "${tpu[@]}" describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
  "${tpu[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
fi

"${tpu[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="BUCKET=$BUCKET REPOSITORY=$REPOSITORY
$on_every_host"
