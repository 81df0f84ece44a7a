# SPDX-License-Identifier: Apache-2.0
"""Generates behavior targets: the text LLM answers every task's prompt about the transcripts of a corpus.

    python examples/mtbi_generate_targets.py cuts_path=cuts.jsonl.gz output_dir=targets
    python examples/mtbi_generate_targets.py manifest_filepath=a.json output_dir=OUT pretrained_llm=DIR tasks=b.yaml
    torchrun --nproc-per-node 8 examples/mtbi_generate_targets.py shar_path=DIR output_dir=targets

Started again after a kill, the script resumes. The last line says what to train on.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main
from nemo_mtbi.commands.hydra_commands import targets, targets_schema

CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra_main(config_name="mtbi_generate_targets", config_path=CONF, schema=targets_schema)
def main(cfg):
    """Generate targets as the configuration says."""
    targets(cfg)


if __name__ == "__main__":
    main()
