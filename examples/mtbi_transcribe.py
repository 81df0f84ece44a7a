# SPDX-License-Identifier: Apache-2.0
"""Asks an MTBI model about audio files and writes its answers as JSONL: audio_filepath, prompt, pred_text.

    python examples/mtbi_transcribe.py model_path=m.nemo audio=[a.wav,b.flac] prompt="what was said here?"
    python examples/mtbi_transcribe.py model_path=m.nemo audio_dir=DIR audio_type=flac prompts_file=prompts.txt
    python examples/mtbi_transcribe.py model_path=m.nemo dataset_manifest=test.json output_filename=out.jsonl

The last line names what the run wrote: `answers: PATH`.
"""

from pathlib import Path

from nemo_mtbi.cli import hydra_main


@hydra_main(config_name="mtbi_transcribe", config_path=Path(__file__).resolve().parent.parent / "conf")
def main(cfg):
    from rich.console import Console

    from nemo_mtbi.inference import transcribe as library

    # All of the configuration is checked before the model is loaded.
    config = library.parse_transcribe_config(cfg)
    utterances, output = library.read_utterances(config), library.output_path(config)
    if output.exists() and not config.overwrite_transcripts:
        print(f"answers: {output} (there already; overwrite_transcripts=true makes them anew)")
        return
    device = library.pick_device(config.cuda)

    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups

    groups.start_one_replica(config.tensor_model_parallel_size, config.pipeline_model_parallel_size)

    model = MTBIModel.restore_from(config.model_path, map_location=device).eval()
    result = library.transcribe(
        model.responder(),
        utterances,
        output,
        batch_size=config.batch_size,
        on_bad_audio=config.on_bad_audio,
        show=config.show,
    )
    if groups.is_global_first():
        result.render(Console())
        print(f"answers: {result.output}")


if __name__ == "__main__":
    main()
