# SPDX-License-Identifier: Apache-2.0
"""Compares systems on held-out wordings, held-out tasks and public benchmarks; writes tables and report.html.

    python examples/mtbi_eval.py output_dir=eval systems.mtbi.nemo=m.nemo sets.test.cuts=test/cuts.jsonl.gz
    python examples/mtbi_eval.py --config-path DIR --config-name my_eval       # systems and sets of your own

All systems are checked before the first one answers. Started again after a kill, the script resumes and ends with the
same bytes. The last line names the report.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main
from nemo_mtbi.commands.hydra_commands import evaluate, evaluate_schema

CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra_main(config_name="mtbi_eval", config_path=CONF, schema=evaluate_schema)
def main(cfg):
    """Evaluate as the configuration says."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
