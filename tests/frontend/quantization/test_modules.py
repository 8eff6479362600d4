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


def test_attentions_are_in_the_order_of_their_layers() -> None:
    modules = [f"model.layers.{number}.self_attn" for number in range(12)]
    names = sorted(f"{module}.k_proj.weight" for module in modules)
    assert names[2].startswith("model.layers.10")  # as safetensors files have them
    tensors = {name: TensorInfo(name, (4, 8), DTYPES["BF16"], "BF16") for name in names}
    assert Modules(tensors).attentions == tuple(modules)
