#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A 60-step demo run, killed with SIGKILL at 10 random moments and resumed each time, must end with bitwise the same
# weights as an undisturbed run: for data, tensor and pipeline parallel runs. About 10 minutes for each on 2 cores.
#
#   bash scripts/experiments/kill_resume.sh OUT [LAYOUT …]     (default: dp2 tp2 pp2)
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${1:?give a new folder for the runs}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
status=0
for layout in "${@:-dp2 tp2 pp2}"; do
    # shellcheck disable=SC2086  # the default holds several words
    for one in $layout; do
        python "$REPO/scripts/experiments/kill_resume.py" --layout "$one" --out "$OUT/$one" || status=1
    done
done
exit "$status"
