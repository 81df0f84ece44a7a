#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""Finds the buckets of training data once, so that no run of a large corpus has to.

    python scripts/estimate_bins.py --config-name mtbi_qwen2.5-7b_fastconformer model.train_ds.input_cfg=blend.yaml \
        model.train_ds.num_buckets=30 model.validation_ds.cuts_path=null

It takes the configuration of the run, reads its first cuts (model.train_ds.num_cuts_for_bins_estimate) without audio
and weights, and prints what to put under model.train_ds.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


@hydra_main(config_name="mtbi_demo", config_path=Path(__file__).resolve().parent.parent / "conf")
def main(cfg):
    """Print the bucket boundaries of a corpus."""
    from rich.console import Console

    from nemo_mtbi.planning.buckets import estimate_bins

    estimate_bins(cfg).render(Console())


if __name__ == "__main__":
    main()
