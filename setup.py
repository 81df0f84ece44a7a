# SPDX-License-Identifier: Apache-2.0
"""Builds and installs the package; what is tested together stands in conf/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Read, not imported: an import would need what this file is about to install.
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "nemo_mtbi/__init__.py").read_text(), re.MULTILINE).group(1)
README = ROOT / "README.md"

setup(
    name="nemo_mtbi",
    version=VERSION,
    description="Multi-task behavior imitation with speech-text interleaving (MTBI): a speech LLM for NVIDIA NeMo",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11.4",  # older ones extract archives without filters, and pickle enums otherwise
    # The folder conf/ is nemo_mtbi/conf in a wheel; an install in place reads conf/ itself (config_folder).
    packages=[*find_packages(include=["nemo_mtbi", "nemo_mtbi.*"]), "nemo_mtbi.conf", "nemo_mtbi.conf.rival"],
    package_dir={"nemo_mtbi.conf": "conf"},
    package_data={
        "nemo_mtbi": ["assets/**", "evaluation/templates/*", "py.typed"],
        "nemo_mtbi.conf": ["*.yaml", "*.txt", "rival/*.yaml"],
    },
    entry_points={"console_scripts": ["mtbi = nemo_mtbi.commands.mtbi:main"]},
    install_requires=[
        # NeMo 3 has no extra `nlp` any more; pip says so and installs it without.
        "nemo_toolkit[asr,nlp]>=2.7",
        "torch",
        "megatron-core>=0.16",
        "omegaconf",
        "hydra-core",
        "lhotse>=1.33",
        "lightning",
        "psutil",  # the checkpoint writer of Megatron imports it and does not require it
        "safetensors",
        "transformers",  # tokenizers, and the encoders of Hugging Face
        "jinja2>=3.1.6",  # chat templates
        "regex",  # patterns with a limit of time
        "sentencepiece",
        "soundfile",
        "numpy",
        "scipy",
        "librosa",
        "filelock",
        "pyyaml",
        "braceexpand",  # names of shards, as NeMo reads them
        "rich",
        "jiwer",
        "sacrebleu>=2",
        "whisper_normalizer",  # Whisper's text normalizers for WER; MIT, also among NeMo's own requirements for ASR
        "torchmetrics",
        "tensorboard",
    ],
    extras_require={
        "prepare": ["praatio"],  # TextGrids
        "demo": ["espeakng-loader"],  # brings espeak-ng, which is GPL
        "test": [
            "praatio",
            "pytest",
            "pytest-xdist>=3.7",
            "hypothesis",
            "ruff",
            "import-linter",
            "mypy",
            "types-PyYAML",
            "build",
        ],
        "benchmark": ["peft", "accelerate"],  # NeMo's SALM, which scripts/benchmark compares with
        # By URL: PyPI's `apex` is another project.
        "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
