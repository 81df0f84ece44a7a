#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs this repository with its test tools into the active virtual environment, or else into its own, and runs
# every check and the whole suite; arguments go to pytest. See lib.sh for the environment variables.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib.sh"

if [[ -n ${VIRTUAL_ENV:-} && -z ${NEMO_VERSION:-} ]]; then
    use_venv "$VIRTUAL_ENV"
else
    use_venv "$(venv_path)"
fi
ensure_install demo,test

cd "$REPO"
# The models of the tests are so small that more threads only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
say "ruff"
ruff check .
ruff format --check .
say "direction of imports"
lint-imports
say "tests"
exec python -m pytest "$@"
