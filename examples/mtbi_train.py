# SPDX-License-Identifier: Apache-2.0
"""Teaches a text LLM to listen: trains the connector between a frozen speech encoder and a frozen Megatron GPT.

    python examples/mtbi_train.py                                  # the embedded demo: offline, 2 cores, no GPU
    python examples/mtbi_train.py --config-name mtbi_digits data.digits_dir=DIR data.heldout_speakers=[theo]
    python examples/mtbi_train.py model.connector.kind=stack trainer.max_steps=400

The last line names what the run wrote: `results: PATH/results.json`.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


def schema():
    from nemo.utils.exp_manager import ExpManagerConfig

    from nemo_mtbi.commands.train import BenchmarkConfig, DataConfig, ModelConfig

    sections = {
        "data": DataConfig,
        "model": ModelConfig,
        "benchmark": BenchmarkConfig,
        "exp_manager": ExpManagerConfig,
    }
    return {"name": str, "init_from_nemo_model": str, **sections}


@hydra_main(config_name="mtbi_demo", config_path=Path(__file__).resolve().parent.parent / "conf", schema=schema)
def main(cfg):
    from nemo_mtbi.commands.train import train
    from nemo_mtbi.parallel.groups import is_global_first

    results = train(cfg)
    if results is not None and is_global_first():
        print(f"results: {results}")


if __name__ == "__main__":
    main()
