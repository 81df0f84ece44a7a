# SPDX-License-Identifier: Apache-2.0
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


mutate = load(ROOT / "scripts" / "experiments" / "mutate_parity.py")
MUTATIONS = mutate.read_mutations()
SCALE = next(mutation for mutation in MUTATIONS if mutation.name == "scale by the number of tokens")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_fits_the_package_of_today(mutation):
    source = (ROOT / "nemo_mtbi" / mutation.file).read_text()
    mutated = mutation.apply(source)
    assert mutated != source
    compile(mutated, mutation.file, "exec")


def test_every_mutation_names_a_test_of_the_suite():
    suite = load(ROOT / mutate.SUITE)
    known = {f"{layout}-{case}" for layout in suite.LAYOUTS for case in suite.CASES}
    assert {mutation.test for mutation in MUTATIONS} <= known
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("source", ["a = 1", "x = 1\nx = 1"])
def test_a_mutation_whose_text_is_not_there_once_is_refused(source):
    with pytest.raises(
        ValueError, match="times the text of the mutation 'm': bring its text in parity_mutations.yaml"
    ):
        mutate.Mutation("m", "a.py", "x = 1", "x = 2", "single-k1").apply(source)


def report(*cases):
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


def test_the_first_failure_and_its_reason_are_taken_from_the_report():
    passed, error = '<testcase name="a"/>', '<testcase name="b"><error message="setup"/></testcase>'
    failed = '<testcase name="{}"><failure message="{}"/></testcase>'
    assert mutate.first_failure(report(passed, error)) is None
    figures = failed.format("c", "AssertionError: weights of tp2 k4 are off by 1.0e-01&#10;assert not [0.1]")
    assert mutate.first_failure(report(passed, figures, failed.format("d", "x"))) == (
        "c",
        "weights of tp2 k4 are off by 1.0e-01",
    )
    trace = "process 1: Traceback (most recent call last):\n  File x\nValueError: a | b\n--- worker0.log\nmore"
    failed = f'<testcase name="e"><failure message="Failed: {trace[:40]} [+3 more lines]">{trace}</failure></testcase>'
    assert mutate.first_failure(report(failed)) == ("e", "ValueError: a / b")


def test_the_table_names_survivors():
    text = mutate.table({SCALE: mutate.Verdict(None, "", 3.2)})
    assert text.splitlines()[-1] == (
        "| scale by the number of tokens | speech_llm/model.py | **nothing: it survives** |  | 3 |"
    )


@pytest.mark.slow
@pytest.mark.full
def test_what_changes_a_result_is_noticed_and_what_does_not_survives(capsys):
    harmless = mutate.Mutation("a name", SCALE.file, "class StepLoss(", "x = 1\n\n\nclass StepLoss(", "single-k1")
    scale = mutate.Mutation(SCALE.name, SCALE.file, SCALE.old, SCALE.new, "single-k1")
    assert mutate.main([scale, harmless], timeout=120) == 1
    out = capsys.readouterr().out
    assert "| `test_parity[single-k1]` | losses of single k1 are off by" in out
    assert "| a name | speech_llm/model.py | **nothing: it survives**" in out
    assert "1 of 2 mutations are noticed" in out
