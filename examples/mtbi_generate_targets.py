# SPDX-License-Identifier: Apache-2.0
"""Behavior targets: lets the text LLM answer every task's prompt about the transcripts of a corpus.

    python examples/mtbi_generate_targets.py cuts_path=cuts.jsonl.gz output_dir=targets
    python examples/mtbi_generate_targets.py manifest_filepath=a.json output_dir=OUT pretrained_llm=DIR tasks=b.yaml
    torchrun --nproc-per-node 8 examples/mtbi_generate_targets.py shar_path=DIR output_dir=targets

Started again after a kill it goes on where it stopped. The last line says what to train on.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


def schema():
    from nemo_mtbi.commands.targets import GenerateTargetsConfig

    return GenerateTargetsConfig


@hydra_main(
    config_name="mtbi_generate_targets", config_path=Path(__file__).resolve().parent.parent / "conf", schema=schema
)
def main(cfg):
    from rich.console import Console

    from nemo_mtbi.commands.targets import run

    report = run(cfg)
    if report is not None:
        report.render(Console())


if __name__ == "__main__":
    main()
