#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# MTBI and its rivals, with several seeds and amounts of speech, trained and compared: see generalization.md. Run it
# again to go on where it was interrupted.
#
#   bash scripts/experiments/generalization.sh OUT [FURTHER ARGUMENTS OF generalization.py]
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${1:?give a folder for all that is made}
shift
exec python "$REPO/scripts/experiments/generalization.py" --out "$OUT" "$@"
