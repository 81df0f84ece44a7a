# SPDX-License-Identifier: Apache-2.0
"""Compares systems on held-out wordings, held-out tasks and public benchmarks; writes tables and report.html.

    python examples/mtbi_eval.py output_dir=eval systems.mtbi.nemo=m.nemo sets.test.cuts=test/cuts.jsonl.gz
    python examples/mtbi_eval.py --config-path DIR --config-name my_eval       # systems and sets of your own

All systems are checked before the first is asked. Started again after a kill it goes on where it stopped, and ends
with the same bytes. The last line names the report.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


def schema():
    from nemo_mtbi.evaluation.settings import EvalConfig

    return EvalConfig


@hydra_main(config_name="mtbi_eval", config_path=Path(__file__).resolve().parent.parent / "conf", schema=schema)
def main(cfg):
    from nemo_mtbi.evaluation.settings import parse_eval_config

    config = parse_eval_config(cfg)  # a wrong one is refused before the imports below take their seconds

    from nemo_mtbi.commands.evaluate import run

    report = run(config)
    if report is not None:
        print(f"report: {report}")


if __name__ == "__main__":
    main()
