# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout trains the connector as a single process does: loss, gradients and weights.

What they are compared with is one plain graph: no schedule, no process groups, torch's own loss and clipping. A layout
is one job of several processes, which runs all cases that were asked for; each case of each layout is a test.
"""

import json
import os
from pathlib import Path

import pytest
from matrix import with_core
from parity_layouts import (
    CASES,
    LAYOUTS,
    TIMEOUT,
    error,
    make_reference,
    read_reference,
    reference_file,
    references,
    run_layout,
    warm_up,
)

KEYS = ("losses", "norms", "gradients", "weights", "evaluation")
# What every commit compares: the simplest layout of each kind on what differs most, and one that combines all kinds.
# All cases of all layouts run with --full.
CORE = ("k1_interleaved", "k4_interleaved", "hearing", "float32", "trainer")
ALWAYS = {
    "single": (*CORE, "bfloat16", "recompute_selective"),
    "tp2_sp": (*CORE, "qkv_bias", "kl"),
    "pp2_vp2": (*CORE, "recompute_full", "js_temperature"),
    "dp2": (*CORE, "text_rows", "uneven"),
    "tp2_pp2_vp2_sp": ("qk_norm", "kl"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the reference stands; ``PARITY_REFERENCE`` names a place to keep it."""
    kept = os.environ.get("PARITY_REFERENCE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("parity")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def selected(session):
    """Layout and case of every parity test of this session."""
    return [(p["layout"], p["case"]) for p in (i.callspec.params for i in session.items if i.function is test_parity)]


@pytest.fixture
def reference(folder, processes, request):
    """That folder, with the reference of all cases of this session in it."""
    cases = {case for _, case in selected(request.session)} | {"float32", "bfloat16"}
    keys = [key for key in references(CASES[case] for case in cases) if not reference_file(folder, *key).exists()]
    if keys:
        processes(make_reference, folder, json.dumps(keys), count=1)
    return folder


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def outcomes():
    """Layout: what its job has found of each case, and why it ended early."""
    return {}


@pytest.fixture
def outcome(outcomes, reference, processes, request):
    """``outcome(layout, case)``: for each process a list with the figures of each model; or a text: what failed."""

    def run(layout):
        config, data_size = LAYOUTS[layout]
        count = config.model_parallel_size * data_size
        cases = [case for name, case in selected(request.session) if name == layout]
        written = [reference / f"{layout}.{rank}.jsonl" for rank in range(count)]
        for path in written:
            path.write_text("")
        processes(warm_up, count=count)
        try:
            processes(run_layout, reference, layout, ",".join(cases), count=count, timeout=TIMEOUT)
            failure = "no result"
        except AssertionError as problem:
            failure = str(problem)
        found = [dict(map(json.loads, path.read_text().splitlines())) for path in written]
        return {case: [one[case] for one in found] if all(case in one for one in found) else failure for case in cases}

    def find(layout, case):
        if layout not in outcomes:
            outcomes[layout] = run(layout)
        return outcomes[layout][case]

    return find


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, case",
    with_core(
        [(layout, case) for layout in LAYOUTS for case in CASES],
        [(layout, case) for layout, cases in ALWAYS.items() for case in cases],
    ),
)
def test_parity(layout, case, outcome, record_property):
    found = outcome(layout, case)
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    figures = [one for process in found for one in process]
    exact = LAYOUTS[layout][0].tensor_model_parallel_size == LAYOUTS[layout][1] == 1
    for key in ("losses", "gradients", "weights") if CASES[case].trainer else KEYS:
        errors = [one[key] for one in figures if key in one]
        record_property(key, max(errors))
        worst = [value for value in errors if not value <= CASES[case].tolerance(key, exact)]
        assert not worst, f"{key} of {layout} {case} are off by {', '.join(f'{value:.1e}' for value in worst)}"
    if CASES[case].recompute:  # each attention runs once more, in backward
        assert [one["forwards"] for one in figures] == [2] * len(figures)


@pytest.mark.slow
def test_parity_of_bfloat16_weights_with_float32(reference):
    case = CASES["bfloat16"]
    found, expected = (read_reference(reference, case.data, "untied", dtype) for dtype in (case.dtype, "float32"))
    for key in found:
        assert 0 < error(found[key], expected[key]) < case.tolerance(key, exact=False)
