"""Binaries of quantised models against the library that defines what the checkpoints mean.

The oracle of every format is compressed-tensors' own execution: checkpoints that it does not read
are restated for it. In f32 it says what is meant, in bf16 how much rounding may cost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from furiosa_directory import quantizers_of, write_furiosa_directory
from model_zoo import load_reference, make_model
from quantized_zoo import (
    FP8_CACHE,
    WEIGHTS_FILE,
    edit_config,
    quantize_fine_grained,
    write_autofp8,
    write_compressed_tensors,
    write_fine_grained,
)
from safetensors.torch import load_file, save_file
from sequences import decode_inputs, prefill_inputs
from token_equality import rms

from furiosa_llm import ArtifactBuilder
from furiosa_llm.artifact.ledger import Ledger, check_complete
from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.llm.device import SimulatedDevice
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]
Tensors = dict[str, torch.Tensor]

ERROR_RATIO = 1.5
PROMPTS, TOKENS, DECODED = 4, 32, 3
"""How many prompts, of how many tokens, the last of which are decoded one by one."""
ODD: dict[str, Any] = {
    "hidden_size": 84,
    "intermediate_size": 150,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "vocab_size": 301,
}
RECORDED = Path(__file__).parents[1] / "recorded" / "modelopt"
BESIDE = "beside"
"""Furiosa's directory, inside that of the model."""


def fp8(**fields: object) -> QuantizationArgs:
    return QuantizationArgs.model_validate({"num_bits": 8, "type": "float", **fields})


def scheme(
    weights: QuantizationArgs | None, inputs: QuantizationArgs | None = None
) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


def blocks(rows: int, columns: int) -> QuantizationArgs:
    return fp8(strategy="block", block_structure=[rows, columns])


STATIC = preset_name_to_scheme("FP8", ["Linear"])
TOKEN = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
GROUP_INPUTS = fp8(strategy="group", group_size=32, dynamic=True)
CHANNEL_STATIC = scheme(TOKEN.weights, STATIC.input_activations)
GROUPS_STATIC = scheme(fp8(strategy="group", group_size=32), STATIC.input_activations)
BLOCKS = scheme(blocks(16, 32))
BLOCKS_32 = scheme(blocks(32, 32))
BLOCKS_GROUP = scheme(blocks(16, 32), GROUP_INPUTS)
BLOCKS_TOKEN = scheme(blocks(48, 32), TOKEN.input_activations)
"""48 divides no number of rows here."""


# --- checkpoints that the library does not read, restated for it ---


def reshaped(tensors: Tensors) -> Tensors:
    """Scales as [1], [O, 1] or [O/b, I/b], those of caches at the attention module."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        scale = tensor[:, 0, :, 0] if tensor.ndim == 4 else tensor.reshape(-1, *[1] * tensor.ndim)
        if last == "kv_scale":
            made |= {f"{module}.k_scale": scale, f"{module}.v_scale": scale.clone()}
        elif last in ("k_scale", "v_scale"):
            made[f"{module.rpartition('.')[0]}.{last}"] = scale
        else:
            made[name] = scale if last.endswith("_scale") else tensor
    return made


def with_multipliers(tensors: Tensors) -> Tensors:
    """What transformers calls the inverse is what codes are multiplied by."""
    return {
        name.removesuffix("_inv"): tensor.float() if name.endswith("_scale_inv") else tensor
        for name, tensor in tensors.items()
    }


def quantized_as_furiosa_says(tensors: Tensors) -> Tensors:
    """A plain checkpoint with codes and scales, by the magnitudes in `quantizers_of`."""
    made = dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim != 2 or "embed" in name or "lm_head" in name:
            continue
        module, values = name.removesuffix(".weight"), weight.float()
        scale = values.abs().amax(1, keepdim=True) / 448
        made[name] = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        made[f"{module}.weight_scale"] = scale
        made[f"{module}.input_scale"] = torch.tensor([5.0]) / 448
        if module.endswith("k_proj"):
            attention, layer = module.removesuffix(".k_proj"), int(module.split(".")[2])
            made[f"{attention}.k_scale"] = torch.tensor([1.0 + 2 * layer]) / 448
            made[f"{attention}.v_scale"] = torch.tensor([2.0 + 2 * layer]) / 448
    return made


def in_bf16(tensors: Tensors) -> Tensors:
    """The library in bf16 rounds scales to it, so its error is that of a model which has these."""
    return {
        name: tensor.bfloat16() if name.endswith("_scale") else tensor
        for name, tensor in tensors.items()
    }


class Restated(NamedTuple):
    change: Callable[[Tensors], Tensors]
    scheme: QuantizationScheme
    caches: bool

    def write(self, source: Path, target: Path, scales: Callable[[Tensors], Tensors]) -> Path:
        """Every linear but the head has scales: the library makes up those that are missing."""
        target.mkdir()
        shutil.copy(source / "config.json", target)
        quantized = QuantizationConfig(
            config_groups={"group_0": self.scheme},
            ignore=["lm_head"],
            kv_cache_scheme=FP8_CACHE if self.caches else None,
            format="float-quantized",
            quantization_status="compressed",
        )
        edit_config(target, quantization_config=quantized.to_dict())
        tensors = scales(self.change(load_file(source / WEIGHTS_FILE)))
        save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
        return target


# --- the cases ---


class Case(NamedTuple):
    write: Callable[[Path], Path]
    restated: Restated | None = None
    """None if the library wrote the checkpoint."""
    ranks: int = 1


def library(kind: str, scheme: QuantizationScheme, **options: Any) -> Callable[[Path], Path]:
    return partial(write_compressed_tensors, groups={"group_0": scheme}, kind=kind, **options)


def recorded(name: str) -> Callable[[Path], Path]:
    return lambda path: Path(shutil.copytree(RECORDED / name, path))


def furiosa(path: Path) -> Path:
    make_model("llama", path)
    write_furiosa_directory(path / BESIDE, quantizers_of(SafetensorsCheckpoint(path), layers=2))
    return path


def fused_fine_grained(path: Path) -> Path:
    return quantize_fine_grained(make_model("phi3", path), (16, 32))


CACHES = {"kv_cache_scheme": FP8_CACHE}
CASES: Mapping[str, Case] = {
    "tensor": Case(library("llama", STATIC)),
    "tensor, caches": Case(library("qwen3", STATIC, **CACHES)),
    "tensor, caches, 4 ranks": Case(library("qwen3", STATIC, **CACHES), ranks=4),
    "token, biases": Case(library("qwen2", TOKEN)),
    "token, caches, odd sizes": Case(library("llama", TOKEN, **CACHES, **ODD)),
    "token, caches, odd sizes, 2 ranks": Case(library("llama", TOKEN, **CACHES, **ODD), ranks=2),
    "token, blocks without a norm before them": Case(library("exaone4", TOKEN)),
    "channel, static": Case(library("llama", CHANNEL_STATIC)),
    "blocks, caches": Case(library("llama", BLOCKS, **CACHES)),
    "blocks, 2 ranks": Case(library("llama", BLOCKS), ranks=2),
    "partial blocks, token": Case(library("llama", BLOCKS_TOKEN)),
    "groups, static": Case(library("qwen3", GROUPS_STATIC)),
    "blocks, groups of inputs": Case(library("qwen3", BLOCKS_GROUP, **CACHES)),
    "fine-grained": Case(
        write_fine_grained, Restated(with_multipliers, BLOCKS_GROUP, caches=False), ranks=2
    ),
    "fine-grained, powers of two": Case(
        partial(write_fine_grained, scale_fmt="ue8m0"),
        Restated(with_multipliers, BLOCKS_GROUP, caches=False),
    ),
    "fused, tensor, caches, 2 ranks": Case(library("phi3", STATIC, **CACHES), ranks=2),
    "token, the head, 2 ranks": Case(library("llama", TOKEN, ignore=()), ranks=2),
    "fused, token": Case(library("phi3", TOKEN)),
    "fused, blocks, groups of inputs": Case(library("phi3", BLOCKS_GROUP, **CACHES)),
    "fused, fine-grained, 2 ranks": Case(
        fused_fine_grained, Restated(with_multipliers, BLOCKS_GROUP, caches=False), ranks=2
    ),
    "AutoFP8": Case(write_autofp8, Restated(reshaped, STATIC, caches=False)),
    "AutoFP8, caches": Case(
        partial(write_autofp8, cache=True), Restated(reshaped, STATIC, caches=True)
    ),
    "ModelOpt": Case(recorded("fp8"), Restated(reshaped, STATIC, caches=False)),
    "ModelOpt, caches": Case(recorded("fp8_kv"), Restated(reshaped, STATIC, caches=True)),
    "ModelOpt, token": Case(
        recorded("per_channel_per_token"), Restated(reshaped, TOKEN, caches=False)
    ),
    "ModelOpt, blocks": Case(recorded("block"), Restated(reshaped, BLOCKS_32, caches=False)),
    "Furiosa": Case(furiosa, Restated(quantized_as_furiosa_says, CHANNEL_STATIC, caches=True)),
}


LONG = (
    "tensor",
    "tensor, caches",
    "token, caches, odd sizes",
    "channel, static",
    "blocks, caches",
    "blocks, 2 ranks",
    "blocks, groups of inputs",
    "token, the head, 2 ranks",
    "fused, token",
    "fused, blocks, groups of inputs",
    "fused, fine-grained, 2 ranks",
    "AutoFP8",
    "ModelOpt",
)
"""What these have, others have: with caches, on several ranks or in another format."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES]
)
def test_logits_err_no_more_than_the_library_in_bf16(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.write(tmp_path / "model")
    artifact = build(model, tmp_path / "artifact", case.ranks)
    prompts = prompts_for(model)
    found = run(artifact, prompts)

    meant = loaded = model
    if case.restated is not None:
        meant = case.restated.write(model, tmp_path / "meant", lambda tensors: tensors)
        loaded = case.restated.write(model, tmp_path / "loaded", in_bf16)
    exact = logits(meant, torch.float32, prompts)
    rounded = logits(loaded, torch.bfloat16, prompts)
    allowed = rms(rounded - (exact if loaded is meant else logits(loaded, torch.float32, prompts)))
    ratio = rms(found - exact) / allowed
    print(f"{name}: {ratio:.2f} x bf16's RMS error, {allowed / float(exact.std()):.2%} of logits")
    assert ratio <= ERROR_RATIO


def build(model: Path, artifact: Path, ranks: int) -> Path:
    """Its ledger says of every tensor in the index that it is exact, but for Furiosa's weights."""
    beside = model / BESIDE
    ArtifactBuilder(
        model,
        prefill_buckets=[(1, TOKENS)],
        decode_buckets=[(1, TOKENS)],
        tensor_parallel_size=ranks,
        calculate_logit_only_for_last_token=False,
        quantize_artifact_path=beside if beside.exists() else None,
    ).build(artifact, warn=lambda _: None)
    ledger = read_artifact(artifact).ledger
    assert ledger is not None
    check_ledger(ledger, load_file(model / WEIGHTS_FILE))
    said = read_artifact(artifact).description.model_metadata.llm_config.quantization_config
    assert said is not None
    codes = {row.scheme_out for row in ledger.rows if row.tensor.endswith("_proj.weight")}
    assert said.weight == "fp8-E4M3"
    assert (said.activation == "bf16") == all("inputs unquantised" in text for text in codes)
    assert said.use_mcp == (ledger.source == "furiosa")
    return artifact


def check_ledger(ledger: Ledger, index: Tensors) -> None:
    check_complete(ledger, index, "ledger")
    for row in ledger.rows:
        has_codes = index[row.tensor].dtype == torch.float8_e4m3fn
        quantized = has_codes or row.tensor.endswith("_proj.weight")
        unverified = ledger.source == "furiosa" and quantized
        assert row.verdict == ("unverified" if unverified else "exact")
        assert row.scheme_out.startswith("e4m3, scale per ") == quantized


def prompts_for(model: Path) -> Array:
    """[PROMPTS, TOKENS]"""
    words = load_file(model / WEIGHTS_FILE)["model.embed_tokens.weight"].shape[0]
    return np.random.default_rng(0).integers(0, words, (PROMPTS, TOKENS), np.int32)


def run(artifact: Path, prompts: Array) -> Array:
    """Logits of every token [PROMPTS, TOKENS, V]: prefill, then decode steps."""
    opened = read_artifact(artifact)
    slots = TOKENS + 1
    device = SimulatedDevice(opened, opened.parameters(None), slots=slots, machine=None)
    first = TOKENS - DECODED
    found = []
    for tokens in prompts.tolist():
        prefill = prefill_inputs(tokens[:first], TOKENS)
        rows = list(device.run(Bucket.prefill(1, TOKENS), prefill)[0, :first])
        for length in range(first + 1, TOKENS + 1):
            inputs = decode_inputs(tokens[length - 1], length, TOKENS)
            rows.append(device.run(Bucket.decode(1, TOKENS), inputs)[0, 0])
        found.append(np.stack(rows))
    return np.stack(found)


@torch.no_grad()
def logits(model: Path, dtype: torch.dtype, prompts: Array) -> Array:
    """The library's, which quantises inputs for all sequences of a batch alike or each token."""
    outputs: torch.Tensor = load_reference(model, dtype)(torch.from_numpy(prompts).long()).logits
    return outputs.float().numpy()
