"""Imported codes and scales mean what the libraries that wrote them compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_programs import LLAMA, Program, programs
from quantized_descriptions import activations, described
from quantized_zoo import FP8_CACHE, write_compressed_tensors, write_fine_grained
from safetensors.torch import load_file
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.frontend.torch_import import import_model
from furiosa_llm.ir import dist, interpreter, nn, quant
from furiosa_llm.ir.provenance import module_path
from furiosa_llm.ir.text import make_context, parse_module
from furiosa_llm.ir.types import shape_of
from furiosa_llm.ir.verification import functions, parameters
from furiosa_llm.models.quantization import (
    DYNAMIC_TOKEN,
    NO_ACTIVATION,
    PER_CHANNEL,
    PER_TENSOR,
    STATIC_TENSOR,
    ActivationScheme,
    Quantization,
    QuantizedCache,
    QuantizedLinear,
    ScaleTensor,
    WeightScheme,
    parse_quantization,
    per_block,
    print_quantization,
)
from furiosa_llm.passes.contract import Budget, Contract
from furiosa_llm.passes.contract_check import check_contract
from furiosa_llm.passes.import_fp8_quantization import (
    DESCRIPTION,
    ImportFp8QuantizationPass,
    describe_quantization,
)
from furiosa_llm.passes.pipeline import import_phase, model_phase, run_passes
from furiosa_llm.passes.pipeline_text import parse_passes
from furiosa_llm.passes.shard_tensor_parallel import ShardTensorParallelPass

ONE = ScaleTensor("a.scale", "f32", (), (1, 1))
FUSED = "canonicalize,cse,dce,fuse-primitives"


# --- against the library ---


def fp8(**fields: object) -> QuantizationArgs:
    return QuantizationArgs.model_validate({"num_bits": 8, "type": "float", **fields})


def preset(name: str) -> dict[str, QuantizationScheme]:
    return {"group_0": preset_name_to_scheme(name, ["Linear"])}


BLOCKS = QuantizationScheme(
    targets=["Linear"],
    weights=fp8(strategy="block", block_structure=[16, 32]),
    input_activations=fp8(strategy="group", group_size=32, dynamic=True),
)
WRITTEN: Mapping[str, dict[str, Any]] = {
    "tensor": {"groups": preset("FP8")},
    "tensor, caches": {"groups": preset("FP8"), "kv_cache_scheme": FP8_CACHE},
    "channel, token": {"groups": preset("FP8_DYNAMIC")},
    "block, group": {"groups": {"group_0": BLOCKS}},
    "a group for some layers": {
        "groups": {"group_0": preset_name_to_scheme("FP8", ["re:.*mlp.*"])},
        "ignore": ("lm_head", "model.layers.1.mlp.up_proj"),
    },
    "the head, too": {"groups": preset("FP8_DYNAMIC"), "ignore": ()},
    "fused, block": {"groups": {"group_0": BLOCKS}, "kind": "phi3"},
}


def imported(directory: Path) -> ModuleOp:
    """After the import phase."""
    quantization = read_quantization(directory, SafetensorsCheckpoint(directory))
    assert quantization is not None
    config = transformers.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    module = import_model(config, torch.bfloat16)
    describe_quantization(module, quantization)
    run_passes(module, import_phase())
    assert DESCRIPTION not in module.attributes
    return module


def logits(module: ModuleOp, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """All floats in f32."""
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    inputs = [ids.int(), positions.int()]
    (found,) = interpreter.run(module, "forward", inputs, tensors.__getitem__, precision="float32")
    return found


@pytest.mark.parametrize("kind", WRITTEN)
def test_logits_are_those_of_compressed_tensors(kind: str, tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path / "model", **WRITTEN[kind])
    check_logits(tmp_path / "model")


def check_logits(directory: Path) -> None:
    """In f32 both multiply the same codes by the same scales; only the order of sums differs."""
    ids = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(0))
    found = logits(imported(directory), load_file(directory / "model.safetensors"), ids)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_blocks_that_are_quantised_alike_are_one_function(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path / "alike", **WRITTEN["tensor"])
    write_compressed_tensors(tmp_path / "not", **WRITTEN["a group for some layers"])
    alike, different = imported(tmp_path / "alike"), imported(tmp_path / "not")
    assert [name for name in functions(alike) if name.startswith("block")] == ["block_0"]
    assert [name for name in functions(different) if name.startswith("block")] == [
        "block_0",
        "block_1",
    ]


def test_the_last_row_alone_is_quantised_for_the_head(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path / "model", **WRITTEN["the head, too"])
    module = imported(tmp_path / "model")
    run_passes(module, model_phase())
    head = [op for op in module.walk() if isinstance(op, quant.LinearOp) and _at_head(op)]
    assert len(head) == 1
    assert shape_of(head[0].y)[1] == 1


def _at_head(op: quant.LinearOp) -> bool:
    return module_path(op) == "lm_head"


def test_inputs_of_several_linears_are_quantised_once(tmp_path: Path) -> None:
    write_fine_grained(tmp_path / "model")
    module = imported(tmp_path / "model")
    block = functions(module)["block_0"]
    names = [op.name for op in block.body.block.ops]
    assert names.count("quant.linear") == 7
    assert names.count("quant.quantize") == names.count("quant.dynamic_scale") == 4


# --- several layers in one weight ---

FUSED_PROGRAM = """
nn.parameter @fused : tensor<128x64xbf16>
func.func @forward(%ids: tensor<2xi32>, %table: tensor<9x64xbf16>)
    -> (tensor<2x64xbf16>, tensor<2x32xbf16>, tensor<2x32xbf16>) {
  %w = nn.get_parameter @fused : tensor<128x64xbf16>
  %x = nn.embedding %ids, %table : tensor<2xi32>, tensor<9x64xbf16> -> tensor<2x64xbf16>
  %wq = nn.slice %w dim 0 from 0 to 64 : tensor<128x64xbf16> -> tensor<64x64xbf16>
  %q = nn.linear %x, %wq : tensor<2x64xbf16>, tensor<64x64xbf16> -> tensor<2x64xbf16>
  %wk = nn.slice %w dim 0 from 64 to 96 : tensor<128x64xbf16> -> tensor<32x64xbf16>
  %k = nn.linear %x, %wk : tensor<2x64xbf16>, tensor<32x64xbf16> -> tensor<2x32xbf16>
  %wv = nn.slice %w dim 0 from 96 to 128 : tensor<128x64xbf16> -> tensor<32x64xbf16>
  %v = nn.linear %x, %wv : tensor<2x64xbf16>, tensor<32x64xbf16> -> tensor<2x32xbf16>
  func.return %q, %k, %v : tensor<2x64xbf16>, tensor<2x32xbf16>, tensor<2x32xbf16>
}
"""


def fused(scheme: WeightScheme, stored: tuple[int, ...] | None = None) -> ModuleOp:
    """Queries, keys and values in one weight, described but not imported yet."""
    module = parse_module(FUSED_PROGRAM)
    grid = scheme.grid_of((128, 64))
    linear = QuantizedLinear(
        module="fused",
        weight="fused",
        shape=(128, 64),
        storage="e4m3",
        scheme=scheme,
        scale=ScaleTensor("fused_scale", "f32", grid if stored is None else stored, grid),
        activation=STATIC_TENSOR,
        input_scale=ONE,
    )
    describe_quantization(module, Quantization("compressed-tensors", (linear,)))
    return module


PARTS: Mapping[str, tuple[ModuleOp, list[tuple[int, ...]]]] = {
    "one scale": (fused(PER_TENSOR, ()), [(), (), ()]),
    "channels": (fused(PER_CHANNEL, (128,)), [(64,), (32,), (32,)]),
    "blocks": (fused(per_block(16, 32)), [(4, 2), (2, 2), (2, 2)]),
    "blocks in four dimensions": (
        fused(per_block(32, 32), (4, 1, 2, 1)),
        [(2, 1, 2, 1), (1, 1, 2, 1), (1, 1, 2, 1)],
    ),
    "keys and queries share a block": (fused(per_block(96, 64)), [(1, 1), (1, 1), (1, 1)]),
    "one block": (fused(per_block(256, 32)), [(1, 2), (1, 2), (1, 2)]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_weight_have_the_scales_of_their_rows(name: str) -> None:
    module, scales = PARTS[name]
    check_contract(ImportFp8QuantizationPass(), module)
    run_passes(module, [ImportFp8QuantizationPass()])
    products = [op for op in module.walk() if isinstance(op, quant.LinearOp)]
    assert [shape_of(op.w) for op in products] == [(64, 64), (32, 64), (32, 64)]
    assert [shape_of(op.w_scale) for op in products] == scales
    assert len({op.x for op in products}) == 1, "all take the same codes"


@pytest.mark.parametrize("rows", [16, 48, 96])
def test_parts_are_cut_over_ranks_with_their_scales(rows: int) -> None:
    """Of blocks of 48, keys lie in that in which queries end: each rank needs its scale twice."""
    module = fused(per_block(rows, 64))
    run_passes(module, [ImportFp8QuantizationPass()])
    after = check_contract(ShardTensorParallelPass(2), module)
    assert not any(isinstance(op, dist.ShardOp) for op in after.walk())


def test_a_part_that_begins_inside_a_block_and_leaves_it_is_refused() -> None:
    """Keys are rows 64 to 95: blocks of 40 end at 80. Values begin inside the next one."""
    with pytest.raises(CompileError, match=r"row 96 of .*\n.*row 64 of `fused`") as caught:
        ImportFp8QuantizationPass().apply(make_context(), fused(per_block(40, 64)))
    assert caught.value.code == "QNT022"


# --- on random programs ---


DYNAMIC = st.sampled_from([NO_ACTIVATION, DYNAMIC_TOKEN, ActivationScheme("dynamic", "group", 4)])


@dataclass(frozen=True)
class WeightsOnly(ImportFp8QuantizationPass):
    """The same pass, held to what it may lose where no input is quantised."""

    contract: ClassVar[Contract] = replace(
        ImportFp8QuantizationPass.contract,
        tolerance=Budget("products are rounded in another order", 2**-3, 1e-4),
    )


@settings(max_examples=15)
@given(program=programs(), data=st.data())
def test_weights_alone_change_nothing_but_the_order_of_rounding(
    program: Program, data: st.DataObject
) -> None:
    module = program.module()
    run_passes(module, parse_passes(FUSED))
    description = described(module, data, st.just(NO_ACTIVATION))
    describe_quantization(module, description)
    after = check_contract(WeightsOnly(), module)
    linears = [op for op in after.walk() if isinstance(op, quant.LinearOp)]
    assert len(linears) >= len(description.linears)


@settings(max_examples=15)
@given(program=programs(), data=st.data())
def test_the_pass_keeps_its_contract(program: Program, data: st.DataObject) -> None:
    module = program.module()
    run_passes(module, parse_passes(FUSED))
    describe_quantization(module, described(module, data, DYNAMIC))
    check_contract(ImportFp8QuantizationPass(), module)


@settings(max_examples=5)
@given(data=st.data())
def test_stored_scales_of_inputs_keep_the_contract(data: st.DataObject) -> None:
    """What is beyond 448 times a stored scale is clipped, so values are small here."""
    module = LLAMA.module()
    run_passes(module, parse_passes(FUSED))
    describe_quantization(module, described(module, data, activations()))
    check_contract(ImportFp8QuantizationPass(), module)


# --- descriptions that do not fit ---


def described_llama(**changes: Any) -> tuple[ModuleOp, Quantization]:
    module = LLAMA.module()
    run_passes(module, parse_passes(FUSED))
    linear = next(op for op in module.walk() if isinstance(op, nn.LinearOp))
    assert isinstance(linear.w.owner, nn.GetParameterOp)
    name, (rows, columns) = linear.w.owner.parameter_name, shape_of(linear.w)
    quantized = QuantizedLinear(
        module=name.removesuffix(".weight"),
        weight=name,
        shape=(rows, columns),
        storage="e4m3",
        scheme=PER_CHANNEL,
        scale=ScaleTensor(f"{name}_scale", "bf16", (rows, 1), (rows, 1)),
        activation=NO_ACTIVATION,
        input_scale=None,
    )
    return module, Quantization("compressed-tensors", (replace(quantized, **changes),))


REFUSED: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "another model's weight": ({"weight": "model.x.weight"}, "QNT021", "model.x.weight"),
    "a weight of another shape": ({"shape": (3, 5)}, "QNT021", "is [3, 5], not ["),
    "a norm's weight": ({"weight": "norm"}, "QNT021", "is not only the weight of linear"),
    "codes of another chip": ({"storage": "e4m3fnuz"}, "QNT022", "e4m3fnuz"),
    "one scale of a batch": (
        {"activation": ActivationScheme("dynamic", "tensor")},
        "QNT022",
        "depend on the others in its batch",
    ),
    "weights without codes": ({"codes_are_stored": False}, "QNT022", "by the build"),
    "ranges": ({"scale": replace(ONE, divisor=448.0)}, "QNT022", "448 times a scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    changes, code, message = REFUSED[name]
    module, quantization = described_llama(**changes)
    if name == "a norm's weight":
        norm = next(op for op in module.walk() if isinstance(op, nn.RmsNormOp))
        assert isinstance(norm.weight.owner, nn.GetParameterOp)
        module, quantization = described_llama(weight=norm.weight.owner.parameter_name)
    describe_quantization(module, quantization)
    with pytest.raises(CompileError, match=message.replace("[", r"\[")) as caught:
        ImportFp8QuantizationPass().apply(make_context(), module)
    assert caught.value.code == code


def test_a_cache_of_no_attention_is_refused() -> None:
    module, quantization = described_llama()
    cache = QuantizedCache("model.layers.9.self_attn", ONE, ONE)
    describe_quantization(module, replace(quantization, caches=(cache,)))
    with pytest.raises(CompileError, match=r"layers\.9\.self_attn` computes no") as caught:
        ImportFp8QuantizationPass().apply(make_context(), module)
    assert caught.value.code == "QNT021"


def test_a_scale_of_keys_and_values_is_one_parameter() -> None:
    module, quantization = described_llama()
    attention = next(op for op in module.walk() if isinstance(op, nn.AttentionOp))
    path = module_path(attention)
    assert path is not None
    describe_quantization(module, replace(quantization, caches=(QuantizedCache(path, ONE, ONE),)))
    run_passes(module, [ImportFp8QuantizationPass()])
    assert ONE.name in parameters(module)
    for operand in (attention.k, attention.v):
        assert isinstance(operand.owner, quant.DequantizeOp)


def test_descriptions_round_trip() -> None:
    _, quantization = described_llama()
    text = print_quantization(replace(quantization, caches=(QuantizedCache("a", ONE, ONE),)))
    assert print_quantization(parse_quantization(text)) == text
    assert "\n" not in text
