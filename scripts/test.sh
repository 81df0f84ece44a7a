#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs this repository with its test tools into the active virtual environment, or else into its own, and runs
# every check and the tests. Arguments go to pytest: --full runs the long matrices too (combined layouts, kill and
# resume, further commands of the README), -n 0 runs in one process. TEST_WORKERS is the most processes that share the
# tests (4; never more than there are CPUs). See lib.sh for the other environment variables.
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
if [[ -z ${NEMO_VERSION:-} ]]; then # what does not run the code does not depend on the version of NeMo
    SECONDS=0
    say "ruff"
    ruff check .
    ruff format --check .
    say "direction of imports"
    lint-imports
    say "types"
    mypy
    say "static checks: $SECONDS s"
fi
SECONDS=0
say "tests"
# Workers take whole files, so that what a file shares is made once, and one of them takes all files that start several
# processes; in the order of tests/conftest.py, which begins with the slow ones.
status=0
python -m pytest --numprocesses=logical --maxprocesses="${TEST_WORKERS:-4}" --dist=loadfile \
    --no-loadscope-reorder --durations=25 "$@" || status=$?
say "tests: $SECONDS s"
exit "$status"
