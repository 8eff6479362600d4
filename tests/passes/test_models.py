"""From the import to one bucket: every supported family ends in the same few ops."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from model_zoo import BASE, KINDS
from nn_programs import LLAMA, Program
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp

from furiosa_llm.frontend.torch_import import import_model
from furiosa_llm.ir import nn, paged
from furiosa_llm.ir.provenance import module_path
from furiosa_llm.ir.types import dims_of, shape_of
from furiosa_llm.ir.verification import callee_name, functions, parameters
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.contract import ContractPass
from furiosa_llm.passes.contract_check import check_contract
from furiosa_llm.passes.pipeline import bucket_phase, import_phase, model_phase, run_passes

ImportZoo = Callable[[str], ModuleOp]

DECODE = Bucket.decode(4, 256)

PROJECTION = ["nn.linear", "nn.reshape", "nn.transpose"]
NORMED_PROJECTION = ["nn.linear", "nn.reshape", "nn.rms_norm", "nn.transpose"]
ATTEND = ["paged.write", "paged.attention", "nn.reshape", "nn.linear", "nn.add"]
MLP = ["nn.rms_norm", "nn.linear", "nn.silu", "nn.linear", "nn.mul", "nn.linear", "nn.add"]

LLAMA_BLOCK = ["nn.rms_norm", *PROJECTION * 3, "nn.rope", "nn.rope", *ATTEND, *MLP]
QWEN3_BLOCK = [
    "nn.rms_norm",
    *NORMED_PROJECTION * 2,
    *PROJECTION,
    "nn.rope",
    "nn.rope",
    *ATTEND,
    *MLP,
]


def lower(module: ModuleOp, bucket: Bucket = DECODE) -> ModuleOp:
    run_passes(module, [*import_phase(), *model_phase(), *bucket_phase(bucket)])
    return module


def op_names(function: FuncOp) -> list[str]:
    return [op.name for op in function.body.block.ops if op.name != "func.return"]


def called(module: ModuleOp) -> list[tuple[str, str | None]]:
    calls = [op for op in functions(module)["forward"].walk() if isinstance(op, CallOp)]
    return [(callee_name(call), module_path(call)) for call in calls]


@pytest.mark.parametrize("kind", KINDS)
def test_zoo_ends_in_one_canonical_block(kind: str, imported: ImportZoo) -> None:
    module = lower(imported(kind))
    found = functions(module)
    assert list(found) == ["forward", "prologue", "block_0", "epilogue"]
    assert called(module) == [
        ("prologue", ""),
        ("block_0", "model.layers.0"),
        ("block_0", "model.layers.1"),
        ("epilogue", ""),
    ]
    assert op_names(found["prologue"]) == ["nn.embedding"]
    assert op_names(found["block_0"]) == (QWEN3_BLOCK if kind == "qwen3" else LLAMA_BLOCK)
    assert op_names(found["epilogue"]) == ["nn.rms_norm", "nn.linear"]
    biased = [op for op in found["block_0"].walk() if isinstance(op, nn.LinearOp) and op.bias]
    assert len(biased) == (3 if kind == "qwen2" else 0)


def test_forward_takes_caches_and_returns_one_row_of_logits(imported: ImportZoo) -> None:
    forward = functions(lower(imported("llama")))["forward"]
    hints = [argument.name_hint for argument in forward.args]
    assert hints == [
        "input_ids",
        "position_ids",
        "slot_mapping",
        "block_table",
        "lengths",
        "cache",
        "cache",
    ]
    cache = ("slots", 2, 2, 16)
    inputs = [dims_of(type) for type in forward.function_type.inputs]
    assert inputs == [(4, 1), (4, 1), (4, 1), (4, 256), (4,), cache, cache]
    outputs = [dims_of(type) for type in forward.function_type.outputs]
    assert outputs == [(4, 1, 320), cache, cache]
    only_calls = {op.name for op in forward.body.block.ops}
    assert only_calls == {"nn.get_parameter", "func.call", "func.return"}


def test_locations_are_relative_in_blocks_and_absolute_elsewhere(imported: ImportZoo) -> None:
    found = functions(lower(imported("llama")))
    paths = [module_path(op) for op in found["block_0"].body.block.ops]
    assert paths[:2] == ["input_layernorm", "self_attn.q_proj"]
    assert "mlp.down_proj" in paths
    assert not any("layers" in (path or "") for path in paths)
    assert [module_path(op) for op in found["epilogue"].body.block.ops] == [
        "model.norm",
        "lm_head",
        "",
    ]


def test_rope_keeps_frequencies_and_scaling(imported: ImportZoo) -> None:
    """Llama 3's scaling changes the low frequencies; they come from the model's own buffer."""
    for kind, last in (("llama", 0.0003162278), ("llama3_rope", None)):
        block = functions(lower(imported(kind)))["block_0"]
        (q, k) = [op for op in block.walk() if isinstance(op, nn.RopeOp)]
        assert q.inv_freq == k.inv_freq
        assert len(q.inv_freq.get_values()) == 8
        assert q.attention_scaling.value.data == 1.0
        if last is not None:
            assert q.inv_freq.get_values()[-1] == pytest.approx(last)


def test_head_of_prefill_works_on_one_row(imported: ImportZoo) -> None:
    epilogue = functions(lower(imported("llama"), Bucket.prefill(1, 128)))["epilogue"]
    assert op_names(epilogue) == ["paged.last_token", "nn.rms_norm", "nn.linear"]
    (cut,) = [op for op in epilogue.walk() if isinstance(op, paged.LastTokenOp)]
    assert dims_of(cut.x) == (1, 128, 64)
    assert module_path(cut) == "model.norm"
    assert dims_of(epilogue.function_type.outputs.data[0]) == (1, 1, 320)


def test_without_logits_the_head_is_gone(imported: ImportZoo) -> None:
    module = imported("llama")
    run_passes(module, [*import_phase(), *model_phase(rows=0)])
    assert list(functions(module)) == ["forward", "prologue", "block_0"]
    assert "lm_head.weight" not in parameters(module)
    assert "model.norm.weight" not in parameters(module)
    assert len(functions(module)["forward"].function_type.outputs) == 2


def test_tied_embeddings_stay_one_parameter(imported: ImportZoo) -> None:
    module = lower(imported("llama_tied"))
    assert "lm_head.weight" not in parameters(module)
    uses = [op for op in module.walk() if isinstance(op, nn.GetParameterOp)]
    assert [op.parameter_name for op in uses].count("model.embed_tokens.weight") == 1


def test_passes_keep_their_contracts_on_a_model(imported: ImportZoo) -> None:
    module = imported("qwen3")
    small = Bucket.decode(2, 6)
    for one in [*import_phase(), *model_phase(), *bucket_phase(small)]:
        assert isinstance(one, ContractPass)
        module = check_contract(one, module)


# --- families beyond the zoo ---


def import_family(family: str, **overrides: Any) -> ModuleOp:
    config = getattr(transformers, f"{family}Config")(**{**BASE, "pad_token_id": 0, **overrides})
    config.architectures = [f"{family}ForCausalLM"]
    return import_model(config)


def test_phi3_fused_projections_are_split() -> None:
    module = import_family("Phi3", partial_rotary_factor=0.5)
    for one in import_phase():
        assert isinstance(one, ContractPass)
        module = check_contract(one, module)
    block = functions(lower(module))["block_0"]
    weights = ["nn.slice", "nn.linear"]
    names = op_names(block)
    assert [name for name in names if name not in weights] == [
        name for name in LLAMA_BLOCK if name not in weights
    ]
    rows = [
        (op.start.value.data, op.end.value.data)
        for op in block.walk()
        if isinstance(op, nn.SliceOp)
    ]
    assert rows == [(0, 64), (64, 96), (96, 128), (0, 128), (128, 256)]
    slices = [op for op in block.walk() if isinstance(op, nn.SliceOp)]
    assert {module_path(op) for op in slices} == {"self_attn.qkv_proj", "mlp.gate_up_proj"}
    (q, _) = [op for op in block.walk() if isinstance(op, nn.RopeOp)]
    assert (len(q.inv_freq.get_values()), shape_of(q.x)[3]) == (4, 16)


def test_smollm3_layers_without_rope_are_a_block_of_their_own() -> None:
    module = lower(import_family("SmolLM3", num_hidden_layers=3, no_rope_layer_interval=2))
    assert [name for name, _ in called(module)] == [
        "prologue",
        "block_0",
        "block_1",
        "block_0",
        "epilogue",
    ]
    without_rope = functions(module)["block_1"]
    assert op_names(without_rope) == [name for name in LLAMA_BLOCK if name != "nn.rope"]
    hints = [argument.name_hint for argument in without_rope.args[-5:]]
    assert hints == ["position_ids", "slot_mapping", "block_table", "lengths", "cache"]


def test_windows_longer_than_the_bucket_go() -> None:
    module = import_family("Mistral", sliding_window=100)
    for length, window in ((100, None), (101, 100)):
        small = lower(module.clone(), Bucket.decode(1, length))
        found = [op.window for op in small.walk() if isinstance(op, paged.AttentionOp)]
        assert len(found) == 1
        assert (found[0] and found[0].value.data) == window


def test_import_phase_is_linear_in_layers() -> None:
    """In function calls, which no busy machine changes: four times the layers, four times as many.

    However many layers there are, there is one function per distinct block.
    """
    calls = {}
    for layers in (4, 16):
        module = Program(LLAMA.dtype, LLAMA.layers[:1] * layers, LLAMA.head).module()
        with cProfile.Profile() as profile:
            run_passes(module, import_phase(), verify_each=False)
        calls[layers] = sum(entry.callcount for entry in profile.getstats())
        assert list(functions(module)) == ["forward", "prologue", "block_0", "epilogue"]
    assert calls[16] < 4.4 * calls[4]
