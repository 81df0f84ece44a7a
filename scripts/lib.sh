# SPDX-License-Identifier: Apache-2.0
# Shared by the shell scripts of this folder; sourced, not run. Needs bash 4 and REPO, the root of the repository.
#
# Environment:
#   NEMO_MTBI_VENV  folder of the virtual environment (default: REPO/.venv)
#   PYTHON          interpreter that makes it (default: the first of python3, python3.11 … that is 3.11.4 to 3.13)
#   TORCH_SPEC      what to give pip for torch, e.g. "torch==2.13.0 --index-url https://…" (default: constraints.txt)
#   NEMO_VERSION    another NeMo than the tested one, e.g. 2.7.3; gets a virtual environment of its own

CONSTRAINTS="$REPO/conf/constraints.txt"
PYTORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11, 4) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11.4 to 3.13 with the module venv found: install one (Debian: python3-venv) or set PYTHON to it"
}

# The virtual environment that NEMO_MTBI_VENV and NEMO_VERSION name.
venv_path() { printf '%s\n' "${NEMO_MTBI_VENV:-$REPO/.venv}${NEMO_VERSION:+-nemo$NEMO_VERSION}"; }

# make_venv DIR: makes it, or repairs one whose making was interrupted. Removes nothing.
make_venv() {
    local python
    "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python)
    say "new virtual environment in $1 ($("$python" -V))"
    "$python" -m venv "$1"
}

# The tested version of a package, as NAME==VERSION.
tested() { sed -n "s/^\($1==[^; ]*\).*/\1/p" "$CONSTRAINTS"; }

# True if torch's own package index answers within five seconds.
pytorch_index_answers() {
    python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$PYTORCH_CPU_INDEX/" 2>/dev/null
}

require_pip() {
    python -m pip --version >/dev/null || die "$VIRTUAL_ENV has no pip: run 'python -m ensurepip' in it"
    python -m pip install --quiet "pip>=23" # older ones can't install this package in place
}

install_torch() {
    local spec=${TORCH_SPEC:-}
    python -c 'import torch' 2>/dev/null && return
    if [[ -z $spec ]]; then
        spec=$(tested torch)
        # PyPI's Linux wheels bring gigabytes of CUDA libraries that are of no use without a GPU.
        if [[ $(uname -s) == Linux ]] && ! nvidia-smi -L >/dev/null 2>&1 && pytorch_index_answers; then
            spec+=" --extra-index-url $PYTORCH_CPU_INDEX"
        fi
    fi
    say "installing torch: $spec"
    # shellcheck disable=SC2086  # the specification may hold several words
    python -m pip install $spec
}

# The direct requirements of the installed package for the given extras, one a line, without NeMo itself.
our_requirements() {
    python - "$1" <<'PY'
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("nemo_mtbi")):
    wanted = any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in sys.argv[1].split(","))
    if wanted and requirement.name.replace("-", "_") != "nemo_toolkit":
        requirement.marker = None
        print(requirement)
PY
}

# The constraints, but with the torch that is installed: TORCH_SPEC or the environment may have chosen another.
effective_constraints() {
    local keep='.'
    # Another NeMo wants other versions of nearly everything, so only what does not depend on it stays pinned.
    [[ -n ${NEMO_VERSION:-} ]] && keep='^(megatron-core|lhotse|espeakng-loader|ruff|import-linter|pytest|pytest-xdist|hypothesis|build)=='
    grep -v '^torch==' "$CONSTRAINTS" | grep -E "$keep"
    python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'
}

install_package() {
    local pins=$1 requirements
    if [[ -z ${NEMO_VERSION:-} ]]; then
        python -m pip install -c "$pins" -e "$REPO[$2]"
        return
    fi
    # Without NeMo's extra `nlp`: it means numpy < 2 and NeMo's own LLM code, which this package does not use.
    python -m pip install --no-deps -e "$REPO"
    requirements=$(our_requirements "$2")
    # shellcheck disable=SC2086  # one word for each requirement
    python -m pip install -c "$pins" "nemo_toolkit[asr]==$NEMO_VERSION" $requirements
}

# The file in a virtual environment that says what is installed there: requirements_digest, and the extras.
stamp_of() { printf '%s\n' "$1/.nemo_mtbi_install"; }

# The digest of all that decides what is installed.
requirements_digest() {
    {
        [[ ! -f $REPO/setup.py ]] || cat "$REPO/setup.py"
        cat "$REPO/pyproject.toml" "$CONSTRAINTS"
        echo "$REPO ${TORCH_SPEC:-} ${NEMO_VERSION:-}"
    } | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1
}

# remove_stale_venv DIR: removes a virtual environment that holds the requirements of another commit, or half of them.
remove_stale_venv() {
    [[ ! -e $1 || $(head -n 1 "$(stamp_of "$1")" 2>/dev/null) == "$(requirements_digest)" ]] || rm -rf "$1"
}

# ensure_install EXTRAS: installs this repository with EXTRAS (comma-separated) into the active virtual environment,
# unless that is already done for these very requirements.
ensure_install() {
    local stamp wanted have=() missing="" extra pins
    stamp=$(stamp_of "$VIRTUAL_ENV")
    wanted=$(requirements_digest)
    [[ -f $stamp ]] && mapfile -t have <"$stamp"
    if [[ ${have[0]:-} == "$wanted" ]]; then
        for extra in ${1//,/ }; do
            [[ ,${have[1]:-}, == *",$extra,"* ]] || missing+=" $extra"
        done
        [[ -z $missing ]] && return
        set -- "$1${have[1]:+,${have[1]}}"
    fi
    rm -f "$stamp" # an install that is cut short must not look finished
    require_pip
    install_torch
    say "installing nemo_mtbi[$1]${NEMO_VERSION:+ with NeMo $NEMO_VERSION}; the first time takes minutes"
    pins=$(mktemp)
    effective_constraints >"$pins"
    install_package "$pins" "$1"
    rm -f "$pins"
    printf '%s\n%s\n' "$wanted" "$1" >"$stamp"
}

# use_venv DIR: makes DIR the active virtual environment of this script.
use_venv() {
    make_venv "$1"
    VIRTUAL_ENV=$(cd "$1" && pwd)
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    unset PYTHONHOME
}
