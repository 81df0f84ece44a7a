# SPDX-License-Identifier: Apache-2.0
"""A base class of the checkpoint plugins that NeMo's ``AsyncFinalizerCallback`` accepts."""

from __future__ import annotations

from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO


class FinalizableCheckpointIO(AsyncFinalizableCheckpointIO):
    """A plugin that saves in the background by itself, without another plugin in it.

    Leaves out the constructor of NeMo's class, which takes a plugin with Megatron's own writer and starts its queue.
    NeMo's class is a base for its name only, which NeMo's callback looks for. A protocol in its place would replace
    this class.

    Subclasses define all methods of NeMo's class, and ``async_calls_queue`` with ``get_num_unfinalized_calls``.
    """

    def __init__(self) -> None:
        super(AsyncFinalizableCheckpointIO, self).__init__()
