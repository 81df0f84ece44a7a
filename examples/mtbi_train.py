# SPDX-License-Identifier: Apache-2.0
"""Trains the connector between a frozen speech encoder and a frozen Megatron GPT.

    python examples/mtbi_train.py                                  # the embedded demo: offline, 2 cores, no GPU
    python examples/mtbi_train.py --config-name mtbi_digits data.digits_dir=DIR data.heldout_speakers=[theo]
    python examples/mtbi_train.py model.connector.kind=stack trainer.max_steps=400

The last line names what the run wrote: `results: PATH/results.json`.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main
from nemo_mtbi.commands.hydra_commands import train, train_schema

CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra_main(config_name="mtbi_demo", config_path=CONF, schema=train_schema)
def main(cfg):
    """Train as the configuration says."""
    train(cfg)


if __name__ == "__main__":
    main()
