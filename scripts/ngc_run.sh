#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command of this repository in an NGC container, with what that image lacks installed into it.
#
#   bash scripts/ngc_run.sh python examples/mtbi_train.py trainer.devices=8 model.tensor_model_parallel_size=8
#
# Environment:
#   IMAGE   (default: nvcr.io/nvidia/nemo:26.02)
#   MOUNTS  further folders for the container, separated by spaces, e.g. "/data /models"
#
#   image                 PyTorch  Megatron-core  Transformer Engine  NeMo    installed on top
#   nemo:26.02            2.10     0.16           2.12                2.7     this package, lhotse>=1.33
#   nemo:26.04            2.11     0.17           2.14                2.7/8   this package, lhotse>=1.33
#   nemo-speech:26.07.00  2.12     none           2.15                3.0     this package, megatron-core 0.16
#
# What stands in these images is what their documentation says; this script was not run in all of them. NeMo, PyTorch
# and Transformer Engine of the image are never replaced (--no-deps).
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
IMAGE=${IMAGE:-nvcr.io/nvidia/nemo:26.02}
(($#)) || {
    sed -n '3,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
}
command -v docker >/dev/null || {
    echo "error: docker is not installed: see https://docs.nvidia.com/datacenter/cloud-native/container-toolkit" >&2
    exit 1
}

extra="lhotse>=1.33"
case $IMAGE in *nemo-speech*) extra+=" megatron-core>=0.16,<0.18" ;; esac
# Caches outlive the container: corpora, targets and what Hugging Face downloads.
mounts=(-v "$REPO:$REPO" -v "$HOME/.cache:/cache" -e XDG_CACHE_HOME=/cache -e NEMO_MTBI_CACHE=/cache/nemo_mtbi)
for folder in ${MOUNTS:-}; do mounts+=(-v "$folder:$folder"); done

# shellcheck disable=SC2016  # expanded in the container
exec docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
    "${mounts[@]}" -w "$REPO" -e EXTRA="$extra" "$IMAGE" bash -c '
        set -euo pipefail
        pip install --quiet --no-deps -e .
        # one word for each requirement
        pip install --quiet --no-deps $EXTRA
        pip install --quiet safetensors sentencepiece jiwer sacrebleu whisper_normalizer espeakng-loader psutil filelock
        exec "$@"' _ "$@"
