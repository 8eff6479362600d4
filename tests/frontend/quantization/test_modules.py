"""Modules are told from names and shapes; torch knows the truth for every supported family."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_zoo import KINDS, RELATIVES, make_config

from furiosa_llm.frontend.checkpoint import TensorInfo
from furiosa_llm.frontend.quantization.modules import Modules
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES


@pytest.mark.parametrize("kind", [*KINDS, *RELATIVES])
def test_linears_and_attentions_are_those_of_the_model(kind: str) -> None:
    config = make_config(kind)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    tensors = {
        name: TensorInfo(name, tuple(tensor.shape), DTYPES["BF16"], "BF16")
        for name, tensor in model.state_dict().items()
    }
    modules = Modules(tensors)
    named = dict(model.named_modules())
    linears = {name for name, module in named.items() if isinstance(module, torch.nn.Linear)}
    attentions = {name for name, m in named.items() if type(m).__name__.endswith("Attention")}
    assert set(modules.linears) == linears
    assert set(modules.attentions) == attentions
    assert not modules.scales
