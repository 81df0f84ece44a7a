# SPDX-License-Identifier: Apache-2.0
"""Layout of one model over processes."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_mtbi.config.checks import Count, Section


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Layout of one model over processes, in NeMo's and Megatron's names.

    Attributes:
        tensor_model_parallel_size: processes that share each layer.
        pipeline_model_parallel_size: stages, each with a run of layers.
        virtual_pipeline_model_parallel_size: runs of layers in each stage (the interleaved schedule); ``None``: one.
        sequence_parallel: norms and residuals are split over the tensor-parallel processes by position.

    Raises:
        ValueError: for sizes that contradict each other.
    """

    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self):
        super().__post_init__()
        virtual = self.virtual_pipeline_model_parallel_size
        if virtual is not None and (virtual < 2 or self.pipeline_model_parallel_size < 2):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size is {virtual} with pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size}: both must be at least 2, or leave the former null"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size of at least 2: set it to false")

    @property
    def model_parallel_size(self) -> int:
        """Processes of one model replica."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def chunks(self) -> int:
        """Runs of layers on each process."""
        return self.virtual_pipeline_model_parallel_size or 1

    def replicas(self, world: int) -> int:
        """Return the number of model replicas among ``world`` processes.

        Raises:
            ValueError: if they do not divide.
        """
        if world < 1 or world % self.model_parallel_size:
            raise ValueError(
                f"{world} processes do not divide by tensor x pipeline = {self.tensor_model_parallel_size} x "
                f"{self.pipeline_model_parallel_size}: start a multiple of {self.model_parallel_size} processes"
            )
        return world // self.model_parallel_size

    def check_architecture(self, num_layers: int, num_attention_heads: int, num_query_groups: int, ffn: int) -> None:
        """Check that an LLM can be split this way.

        Raises:
            ValueError: names the size that does not divide.
        """
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        for what, size in (
            ("attention heads", num_attention_heads),
            ("query groups", num_query_groups),
            ("feed-forward channels", ffn),
        ):
            if size % tensor:
                raise ValueError(
                    f"the LLM has {size} {what}, which {tensor} tensor-parallel processes can't share: choose a "
                    "tensor_model_parallel_size that divides them"
                )
        if num_layers % (pipeline * self.chunks):
            raise ValueError(
                f"the LLM has {num_layers} layers, which {pipeline} pipeline stages of {self.chunks} runs can't share:"
                " choose a pipeline_model_parallel_size (and virtual_pipeline_model_parallel_size) that divides "
                "them"
            )
