#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every kind of connector, trained and compared. Run it again to go on where it was interrupted.
#
#   bash scripts/experiments/connectors.sh OUT [FURTHER ARGUMENTS OF connectors.py]
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${1:?give a folder for all that is made}
shift
exec python "$REPO/scripts/experiments/connectors.py" --out "$OUT" "$@"
