#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""Finds by trying how many positions a step may have before a GPU's memory is full.

    python scripts/find_batch_size.py --config-name mtbi_qwen2.5-7b_fastconformer +seconds=[5,15,30] +answer=64 \
        model.train_ds.input_cfg=null model.validation_ds.cuts_path=null

It trains on noise, with the model, precision and microbatches of the configuration, in one process: seconds are the
lengths of utterances that are tried, answer the tokens of each answer. It prints the largest
model.train_ds.batch_tokens that all of them bear. For layouts of several processes count with plan=true.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


@hydra_main(config_name="mtbi_demo", config_path=Path(__file__).resolve().parent.parent / "conf")
def main(cfg):
    """Print the largest batch that fits into memory."""
    import torch
    from omegaconf import open_dict
    from rich.console import Console

    from nemo_mtbi.commands.train import PRECISIONS
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.models.profiling import fits_in_memory, largest, step_maker
    from nemo_mtbi.parallel.device import pick_device

    console = Console()
    with open_dict(cfg):
        lengths, answer = list(cfg.get("seconds", [5, 15, 30])), int(cfg.get("answer", 64))
        rows = int(cfg.model.train_ds.get("rows_per_cut") or 1)
        precision = cfg.trainer.get("precision", "32-true")
        if precision not in PRECISIONS:
            raise ValueError(f"trainer.precision is {precision}; it must be one of {', '.join(PRECISIONS)}")
        if PRECISIONS[precision]:
            cfg.model.frozen_dtype = PRECISIONS[precision]
        cfg.model.train_ds = cfg.model.validation_ds = None
    device = pick_device(None)
    if device.type != "cuda":
        raise ValueError("this machine has no GPU, and main memory does not end where it should: use plan=true")
    torch.cuda.set_per_process_memory_fraction(0.95)
    model = MTBIModel(cfg.model).to(device).train()
    make, rows_of_table = step_maker(model, rows), []
    for seconds in lengths:
        samples = int(seconds * model.speech_llm.frame_counter.sample_rate)
        utterances = largest(fits_in_memory(model, rows, samples, answer))
        rows_of_table.append(utterances * make.cost(samples, answer))
        console.print(f"{seconds} s: {utterances} utterances, {rows_of_table[-1]} positions", highlight=False)
    if not min(rows_of_table):
        raise ValueError("not one utterance fits: lower model.micro_batch_tokens, or recompute activations")
    console.print(f"model.train_ds.batch_tokens: {min(rows_of_table)}", highlight=False)


if __name__ == "__main__":
    main()
