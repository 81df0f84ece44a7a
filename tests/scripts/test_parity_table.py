# SPDX-License-Identifier: Apache-2.0
import runpy
from pathlib import Path

script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "experiments" / "parity_table.py"))

REPORT = """<testsuites><testsuite>
<testcase name="test_parity[tp2-k4]"><properties>
  <property name="losses" value="2e-16"/><property name="norms" value="1"/><property name="weights" value="3e-15"/>
</properties></testcase>
<testcase name="test_parity[tp2-kl]"><properties><property name="losses" value="5e-16"/></properties></testcase>
<testcase name="test_parity[tp2-float32]"><properties><property name="losses" value="1e-7"/></properties></testcase>
<testcase name="test_parity[pp2_vp2-k4]"><failure>no</failure></testcase>
<testcase name="test_parity_of_bfloat16_weights_with_float32"/>
</testsuite></testsuites>"""


def test_the_worst_of_each_layout_and_precision(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    worst, cases, failures = script["read_report"](path)
    assert worst == {
        ("tp2", "float64", "losses"): 5e-16,
        ("tp2", "float64", "weights"): 3e-15,
        ("tp2", "float32", "losses"): 1e-7,
    }
    assert cases == {"tp2": {"k4", "kl", "float32"}, "pp2_vp2": {"k4"}} and failures == 1
    rows = script["table"](worst, cases).splitlines()
    assert rows[0].startswith("| layout | cases | fp64 losses | fp64 gradients | fp64 weights | fp32 losses |")
    assert rows[2].startswith("| tp2 | 3 | 5.0e-16 | – | 3.0e-15 | 1.0e-07 |")
    assert len({row.count("|") for row in rows}) == 1
