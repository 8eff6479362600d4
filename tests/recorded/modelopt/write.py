"""Write the checkpoints beside this file, with nvidia-modelopt 0.47.0 on a CPU.

Not a dependency: it brings 200 MB along and takes half a minute. Install it apart, without its
dependencies (`pip install --target DIR --no-deps nvidia-modelopt==0.47.0 scipy omegaconf
antlr4-python3-runtime==4.9.3 pulp nvidia-ml-py`), then run this file with DIR and `tests` on
PYTHONPATH.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from model_zoo import make_config
from modelopt.torch.export import export_hf_checkpoint

BLOCK = 32


def recipes() -> dict[str, dict[str, Any]]:
    """Directory -> what is given to `mtq.quantize`."""
    with_cache = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    with_cache["quant_cfg"] = with_cache["quant_cfg"] + mtq.FP8_KV_CFG["quant_cfg"]
    blocks = copy.deepcopy(mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)
    for entry in blocks["quant_cfg"]:
        sizes = entry.get("cfg", {}).get("block_sizes")
        if sizes:
            sizes.update({-1: BLOCK, -2: BLOCK})
    return {
        "fp8": copy.deepcopy(mtq.FP8_DEFAULT_CFG),
        "fp8_kv": with_cache,
        "per_channel_per_token": copy.deepcopy(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
        "block": blocks,
        "int8_smoothquant": copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG),
    }


def write(directory: Path, recipe: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = make_config("llama", vocab_size=32, bos_token_id=0, eos_token_id=1)
    config.num_hidden_layers = 1
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    mtq.quantize(model, recipe, lambda m: m(torch.arange(32)[None]))
    export_hf_checkpoint(model, export_dir=str(directory))


if __name__ == "__main__":
    for name, recipe in recipes().items():
        write(Path(__file__).parent / name, recipe)
