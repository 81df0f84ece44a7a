#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment, installs this repository into it and trains the embedded default; arguments go to
# examples/mtbi_train.py. The last line is `results: PATH/results.json`. See lib.sh for the environment variables.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib.sh"

use_venv "$(venv_path)"
ensure_install demo
say "training: python examples/mtbi_train.py $*"
exec python "$REPO/examples/mtbi_train.py" "$@"
