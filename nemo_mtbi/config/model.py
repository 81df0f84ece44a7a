# SPDX-License-Identifier: Apache-2.0
"""The schema of the ``model:`` section. An unknown or contradictory key is an error that names the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from omegaconf import MISSING

from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.checks import Count, FrozenDtype, OneOf, RaiseOrSkip, Section, above
from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderSection
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.config.interleave import InterleaveConfig
from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.config.schema import read_section

FORMAT_VERSION = 3  # of the .nemo
ADAMS = ("adam", "adamw", "fused_adam")  # beside which the LLM may train
LAYOUT_KEYS = tuple(field.name for field in fields(ParallelConfig))
RUN_KEYS = (*LAYOUT_KEYS, "dist_timeout", "encoder_cache")  # of a run: a .nemo fits any other


@dataclass
class TargetsConfig:
    """Which targets training accepts.

    Attributes:
        allow_foreign: train on the answers of another LLM or chat format.
    """

    allow_foreign: bool = False


@dataclass
class ModelConfig(Section):
    """The section ``model:``.

    Attributes:
        pretrained_asr: NeMo ASR ``.nemo`` whose front end and encoder are used, directory of a Hugging Face encoder,
            or ``demo``.
        encoder: how the encoder is used, and whether it trains: see :class:`nemo_mtbi.config.encoder.EncoderSection`.
        pretrained_llm: text LLM directory, of ours or of Hugging Face, or ``demo``.
        chat: how prompt and speech are put into the LLM's chat format: see
            :class:`nemo_mtbi.config.chat.ChatConfig`; ``null``: as the LLM says.
        connector: the trainable part.
        llm: whether the LLM itself trains: see :class:`nemo_mtbi.config.llm.LlmConfig`; ``null``: it is
            frozen.
        lora: adapters in the LLM, which are trained too: see :class:`nemo_mtbi.config.llm.LoraConfig`; ``null``: the
            LLM stays what it is.
        interleave: which rows get words as text; ``null`` leaves all rows speech.
        loss: what is minimized: see :class:`nemo_mtbi.config.loss.LossConfig`.
        generation: decoding, in validation and ``generate``.
        micro_batch_tokens: rows x longest row of a microbatch; bounds activation memory.
        tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size,
            sequence_parallel: see :class:`nemo_mtbi.config.parallel.ParallelConfig`.
        activations_checkpoint_granularity: ``full`` recomputes the LLM's layers in backward, ``selective`` its
            attention; ``null`` keeps all activations.
        frozen_dtype: of frozen weights of encoder and LLM, and of the LLM's where they train; follows from
            ``trainer.precision`` in training. The front end and what else is trained stay float32, and so does every
            optimizer.
        encoder_cache: folder where the encoder's frames are kept by the content of the audio, for many runs over the
            same speech; ``null``: nothing is kept.
        dist_timeout: seconds that a process waits for another one before it ends the run; ``null``: torch's default.
        on_nonfinite: what a NaN or Inf in loss or gradient does: ``raise``, or ``skip`` the step and count it. A
            skipped step changes nothing and is not counted by ``trainer.max_steps``; 100 of them in a row end the run.
        on_bad_audio: ``raise`` or ``skip`` (skipped cuts are counted by reason and reported after each epoch). A step
            without a usable cut is skipped like one that is not finite; 1000 of them in a row, or a whole pass, end
            the run.
        targets: see :class:`TargetsConfig`.
        transcription_task: task whose generated answer is scored as a transcript in validation.
        train_ds, validation_ds: NeMo's own data keys and ``rows_per_cut`` (:mod:`nemo_mtbi.data.loader`).
        test_ds: NeMo's key; it must be ``null``, since ``examples/mtbi_eval.py`` evaluates a trained model.
        optim: NeMo's optimizer and ``sched`` keys; it trains all but weights of the LLM, which follow its schedule.
        nemo_content: ``small``: a ``.nemo`` refers to the frozen parts by path and hash; ``full``: it holds them.
        fingerprints: hashes of the frozen parts, written by us and checked when a ``.nemo`` is restored.
        file_digests: SHA-256 of files of the frozen parts above 1 GiB, of which ``fingerprints`` cover samples only;
            written and checked likewise.
        llm_was_trained: written by us: the LLM inside a full ``.nemo`` is not the one of its fingerprint any more.
    """

    SECTION: ClassVar[str] = "model"

    pretrained_asr: str = MISSING
    pretrained_llm: str = MISSING
    encoder: EncoderSection | None = None
    chat: ChatConfig | None = None
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    llm: LlmConfig | None = None
    lora: LoraConfig | None = None
    interleave: InterleaveConfig | None = field(default_factory=InterleaveConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    micro_batch_tokens: Count = 8192
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    activations_checkpoint_granularity: Annotated[str | None, OneOf("selective", "full")] = None
    frozen_dtype: FrozenDtype = "float32"
    encoder_cache: str | None = None
    dist_timeout: Annotated[float | None, above(0)] = None
    on_nonfinite: RaiseOrSkip = "raise"
    on_bad_audio: RaiseOrSkip = "raise"
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    transcription_task: str = "transcribe"
    train_ds: Any = None
    validation_ds: Any = None
    test_ds: Any = None
    optim: Any = None
    nemo_content: Annotated[str, OneOf("small", "full")] = "small"
    fingerprints: dict[str, str] = field(default_factory=dict)
    file_digests: dict[str, list[str]] = field(default_factory=dict)
    llm_was_trained: bool = False
    format_version: int = FORMAT_VERSION
    # NeMo writes these into every model's configuration
    target: str | None = None
    nemo_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_ds is not None:
            raise ValueError(
                "model.test_ds is not used: set it to null, and evaluate the trained model with examples/mtbi_eval.py "
                "(its key sets names the data)"
            )
        encoders = [self.encoder, self.encoder and self.encoder.beside]
        if self.encoder_cache and any(encoder is not None and encoder.freeze is not True for encoder in encoders):
            raise ValueError(
                "model.encoder_cache keeps what a frozen encoder gives: remove it, or set model.encoder.freeze=true"
            )
        self._check_llm()
        self.layout  # noqa: B018 (raises for sizes that contradict each other)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this model has format_version {self.format_version}, but this nemo_mtbi reads up to "
                f"{FORMAT_VERSION}: install a newer nemo_mtbi"
            )

    def _check_llm(self) -> None:
        """Refuse what contradicts an LLM that trains.

        Raises:
            ValueError: names the remedy.
        """
        if self.llm is None or not self.llm.trains:
            return
        if self.lora is not None:
            raise ValueError("model.llm trains the LLM itself and model.lora adapters in it: choose one of them")
        if self.loss.uses_teacher:
            raise ValueError(
                "model.loss compares with the LLM as it was, which model.llm.freeze does not keep: use model.lora, or "
                "set kl_weight and hidden_weight to 0"
            )
        optim = self.optim or {}
        name = optim.get("_target_") or optim.get("name", "adamw")
        if name not in ADAMS:
            raise ValueError(f"model.optim.name is {name}, but the LLM is trained by Adam: set it to adamw")
        if optim.get("lr") == 0:
            raise ValueError("model.optim.lr is 0, and the LLM follows its schedule: make it small, such as 1e-8")

    @property
    def layout(self) -> ParallelConfig:
        """Layout of the model over processes."""
        return ParallelConfig(**{key: getattr(self, key) for key in LAYOUT_KEYS})

    @property
    def megatron(self) -> dict[str, Any]:
        """Keys of Megatron's ``TransformerConfig`` that follow from this configuration."""
        if self.activations_checkpoint_granularity == "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        return {"recompute_granularity": self.activations_checkpoint_granularity}


def parse_model_config(cfg: Mapping) -> ModelConfig:
    """Return a ``model:`` section, checked.

    Args:
        cfg: a ``DictConfig`` or mapping.

    Raises:
        ValueError: unknown key (with the nearest known one), wrong type, missing key or contradiction.
    """
    return read_section(ModelConfig, cfg, "model")
