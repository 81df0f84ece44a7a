# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.llm.layers import RMSNorm, transformer_config
from nemo_mtbi.testing import ARCHITECTURE, scale_weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_is_computed_in_float32_or_better(dtype):
    norm = RMSNorm(transformer_config(DecoderConfig(**ARCHITECTURE), dtype), 6, eps=1e-3)
    assert norm.weight.dtype == dtype
    scale_weights(nn.ModuleDict({"norm": norm}))
    x = 1e-2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    # the result is rounded once, from a float32 value
    tolerance = dict(rtol=1e-12, atol=0) if dtype == torch.float64 else dict(rtol=2**-8, atol=0)
    torch.testing.assert_close(norm(x).double(), expected, **tolerance)
