# SPDX-License-Identifier: Apache-2.0
"""Builds the two small frozen models of the embedded demo, with the same NeMo and Megatron code that users run.

    python scripts/build_demo_models.py llm      # text LLM: about 25 minutes on 2 cores
    python scripts/build_demo_models.py encoder  # FastConformer-CTC: about 30 minutes on 2 cores
    python scripts/build_demo_models.py card     # scores both on held-out data and writes the model card

They are written to nemo_mtbi/assets/demo. Nothing is downloaded: sentences come from a grammar, speech from espeak-ng.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nemo_mtbi.demo import build  # noqa: E402


def main() -> None:
    """Build the chosen models of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("llm", "encoder", "card"))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "nemo_mtbi" / "assets" / "demo", help="where the models are written"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: what the shipped models had)")
    parser.add_argument("--resume", action="store_true", help="go on from the weights that are there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"llm": build.build_llm, "encoder": build.build_encoder, "card": build.write_card}[args.part](args)


if __name__ == "__main__":
    main()
