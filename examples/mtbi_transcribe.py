# SPDX-License-Identifier: Apache-2.0
"""Asks an MTBI model about audio files and writes its answers as JSONL: audio_filepath, prompt, pred_text.

    python examples/mtbi_transcribe.py model_path=m.nemo audio=[a.wav,b.flac] prompt="what was said here?"
    python examples/mtbi_transcribe.py model_path=m.nemo audio_dir=DIR audio_type=flac prompts_file=prompts.txt
    python examples/mtbi_transcribe.py model_path=m.nemo dataset_manifest=test.json output_filename=out.jsonl

Started again after an interruption it goes on behind its last answer. The last line names what it wrote:
`answers: PATH`.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


def schema():
    from nemo_mtbi.commands.transcribe_questions import TranscribeConfig

    return TranscribeConfig


@hydra_main(config_name="mtbi_transcribe", config_path=Path(__file__).resolve().parent.parent / "conf", schema=schema)
def main(cfg):
    from rich.console import Console

    from nemo_mtbi.commands import transcribe as library
    from nemo_mtbi.io.display import printable
    from nemo_mtbi.parallel.device import pick_device

    # All of the configuration is checked before the model is loaded.
    config = library.parse_transcribe_config(cfg)
    utterances = library.read_utterances(config)
    output = library.output_path(config, utterances)
    if output.exists() and not config.overwrite_transcripts:
        print(f"answers: {printable(str(output))} (there already; overwrite_transcripts=true makes them anew)")
        return
    device = pick_device(config.cuda)

    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups

    groups.start_one_replica(config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    stored = MTBIModel.restore_from(config.model_path, return_config=True)
    library.spare_model(output, config.model_path, stored)

    model = MTBIModel.restore_from(config.model_path, map_location=device).eval()
    try:
        result = library.transcribe(
            model.responder(),
            utterances,
            output,
            batch_size=config.batch_size,
            on_bad_audio=config.on_bad_audio,
            show=config.show,
            model=str(sorted(model.frozen.fingerprints.items())),
        )
    except KeyboardInterrupt:  # it has said how to go on, and a traceback says nothing more
        raise SystemExit(130) from None
    if groups.is_global_first():
        result.render(Console())
        print(f"answers: {printable(str(result.output))}")


if __name__ == "__main__":
    main()
