#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compares this project with NeMo's SALM and with a plain loop over a Hugging Face model, on equal work:
#   bash scripts/benchmark/run.sh OUT [--quick]
# Writes OUT/benchmark.json and OUT/benchmark.md. Models have random weights and are made here; nothing is downloaded but
# packages. SALM needs packages that this project does not, so all runs in a virtual environment of its own.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$REPO/scripts/lib.sh"
[[ $# -ge 1 && $1 != -* ]] || die "usage: bash scripts/benchmark/run.sh OUT [--quick]"
export NEMO_MTBI_VENV=${NEMO_MTBI_VENV:-$REPO/.venv-benchmark}
remove_stale_venv "$(venv_path)"
use_venv "$(venv_path)"
ensure_install demo,benchmark
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$REPO"
exec python scripts/benchmark/benchmark.py "$@"
