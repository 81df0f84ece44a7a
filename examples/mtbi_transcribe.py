# SPDX-License-Identifier: Apache-2.0
"""Prompts an MTBI model with audio files and writes its answers as JSONL: audio_filepath, prompt, pred_text.

    python examples/mtbi_transcribe.py model_path=m.nemo audio=[a.wav,b.flac] prompt="what was said here?"
    python examples/mtbi_transcribe.py model_path=m.nemo audio_dir=DIR audio_type=flac prompts_file=prompts.txt
    python examples/mtbi_transcribe.py model_path=m.nemo dataset_manifest=test.json output_filename=out.jsonl

Started again after an interruption, the script resumes behind its last answer. The last line names what it wrote:
`answers: PATH`.
"""

from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main
from nemo_mtbi.commands.hydra_commands import transcribe, transcribe_schema

CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra_main(config_name="mtbi_transcribe", config_path=CONF, schema=transcribe_schema)
def main(cfg):
    """Transcribe as the configuration says."""
    transcribe(cfg)


if __name__ == "__main__":
    main()
