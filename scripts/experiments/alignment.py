#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How far word boundaries found by alignment are from the true ones, which made speech knows.

  python scripts/experiments/alignment.py --out OUT --digits free-spoken-digit-dataset

Sentences by espeak-ng are aligned with the demo encoder, whose training had neither them nor their voices. Connected
digits of each speaker are aligned with the demo encoder as it is, and adapted by CTC to the other speakers. Prints a
table in Markdown; what it has made is kept in OUT, and found there by the next run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--digits", type=Path, metavar="DIR", help="a clone of the Free Spoken Digit Dataset")
    parser.add_argument("--speakers", nargs="*", metavar="NAME", help="held out in turn (all)")
    parser.add_argument("--utterances", type=int, default=200, metavar="N", help="that are aligned (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="of CTC training (%(default)s)")
    return parser.parse_args()


def aligned(cuts: Path, asr: str | Path, out: Path) -> dict:
    """Return the report of ``scripts/align.py`` on a corpus whose word times are known."""
    from nemo_mtbi.io.file_digests import file_digest
    from nemo_mtbi.prepare.alignment.corpus import AlignConfig, align_corpus
    from nemo_mtbi.prepare.alignment.ctc import CTCModel
    from nemo_mtbi.prepare.recipes import open_cuts
    from nemo_mtbi.speech_llm.pretrained import resolve

    source = f"{file_digest(resolve(asr, 'asr', 'encoder.nemo'))} {file_digest(cuts)}"
    found, total = open_cuts(cuts)
    return align_corpus(found, out, CTCModel.load(asr), AlignConfig(), source=source, total=total).as_dict()


def adapted(args: argparse.Namespace, heldout: str, speakers: list[str]) -> Path:
    """The demo encoder, trained by CTC on the other speakers."""
    from nemo_mtbi.data.cut_files import CUTS_FILE
    from nemo_mtbi.demo.corpora.digits import build_digits
    from nemo_mtbi.encoders.ctc import save_asr, train_ctc
    from nemo_mtbi.speech_llm.pretrained import load_asr_model

    path = args.out / f"encoder-without-{heldout}-{args.steps}.nemo"
    if path.exists():
        return path
    others = [speaker for speaker in speakers if speaker != heldout]
    settings = dict(num_utterances=2000, seed=0, split="train", augment=True, progress=False)
    folder = build_digits(args.out / "corpora", args.digits, speakers=others, **settings)
    model = load_asr_model("demo")
    options = dict(steps=args.steps, learning_rate=1e-3, seed=0, batch_duration=40.0, spec_augment=True)
    train_ctc(model, [folder / CUTS_FILE], progress=False, **options)
    save_asr(model, path)
    return path


def rows(args: argparse.Namespace):
    """Corpus, encoder and report, one after the other."""
    from nemo_mtbi.data.cut_files import CUTS_FILE
    from nemo_mtbi.demo.corpora.digits import build_digits, list_speakers
    from nemo_mtbi.demo.corpora.synthetic import build_synthetic

    settings = dict(num_utterances=args.utterances, seed=5, split="test", progress=False)
    spoken = build_synthetic(args.out / "corpora", **settings)
    yield "espeak-ng, noise and reverberation", "demo", aligned(spoken / CUTS_FILE, "demo", args.out / "espeak")
    speakers = list_speakers(args.digits) if args.digits else []
    for speaker in args.speakers or speakers:
        digits = build_digits(args.out / "corpora", args.digits, speakers=[speaker], **settings) / CUTS_FILE
        yield f"digits, {speaker}", "demo", aligned(digits, "demo", args.out / f"{speaker}-demo")
        asr = adapted(args, speaker, speakers)
        yield f"digits, {speaker}", "adapted to the others", aligned(digits, asr, args.out / f"{speaker}-{args.steps}")


def main() -> None:
    """Align made speech and print the distances from its true word times."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| corpus | encoder | utterances aligned | words | start, ms | end, ms | both, ms |")
    print("|---|---|---|---|---|---|---|")
    reports = []
    for corpus, encoder, report in rows(args):
        reports.append({"corpus": corpus, "encoder": encoder, **report})
        found, counts = report.get("against_the_former", {}), report["counts"]
        medians = [str(found.get(f"median_{name}_ms", "—")) for name in ("start", "end", "boundary")]
        cells = [
            corpus,
            encoder,
            f"{counts.get('aligned', 0)} of {counts['cuts']}",
            str(found.get("words", 0)),
            *medians,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    (args.out / "alignment.json").write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
