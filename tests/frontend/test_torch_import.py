"""Import of whole models: the interpreter computes what transformers computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_zoo import BASE, KINDS, LLAMA3_ROPE, load_reference, make_config, make_model
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.declarations import declared_parameters
from furiosa_llm.frontend.parameters import bind_parameters
from furiosa_llm.frontend.source import open_model
from furiosa_llm.frontend.torch_import import import_model
from furiosa_llm.ir import nn, provenance
from furiosa_llm.ir.interpreter import run
from furiosa_llm.ir.text import print_module
from furiosa_llm.ir.types import bf16, dims_of, dtype_of
from furiosa_llm.ir.verification import parameters, verify_module

Import = Callable[[str], ModuleOp]


@pytest.fixture(scope="module")
def imported(zoo: Callable[[str], Path]) -> Import:
    """A kind of the zoo as its config has it, in bf16; do not change it."""
    modules: dict[str, ModuleOp] = {}

    def module(kind: str) -> ModuleOp:
        if kind not in modules:
            modules[kind] = import_model(open_model(zoo(kind)).config)
        return modules[kind]

    return module


def inputs(batch: int, seq: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and positions that begin at `start`."""
    generator = torch.Generator().manual_seed(batch * 100 + seq)
    ids = torch.randint(0, BASE["vocab_size"], (batch, seq), generator=generator)
    return ids, (start + torch.arange(seq)).expand(batch, seq).contiguous()


def interpret(module: ModuleOp, model: torch.nn.Module, *tensors: torch.Tensor) -> torch.Tensor:
    """In float32, with the parameters of `model`, which has them all by their own names."""
    state = model.state_dict()
    i32 = [tensor.to(torch.int32) for tensor in tensors]
    (logits,) = run(module, "forward", i32, lambda name: state[name], precision="float32")
    return logits


def assert_same(module: ModuleOp, model: Any, *tensors: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(input_ids=tensors[0], position_ids=tensors[1], use_cache=False).logits
    found = interpret(module, model, *tensors)
    # Both in f32, sums in orders of their own. Logits are below 1 and have some 100 roundings of
    # 2**-24 behind them, which add up like independent ones: to about 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-20)


SIZES = [(2, 24, 0), (1, 1, 7), (1, 5, 0), (3, 1, 2)]
"""Batch, tokens, first position. Tracing takes sizes of 2 and more; 1 must be as good."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_computes_the_models_logits(
    zoo: Callable[[str], Path], imported: Import, kind: str
) -> None:
    module, model = imported(kind), load_reference(zoo(kind))
    verify_module(module)
    for batch, seq, start in SIZES:
        assert_same(module, model, *inputs(batch, seq, start))


OTHERS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Llama": {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "yarn", "factor": 2.0}},
    "Phi3": {"pad_token_id": 0},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.22},
    "Gemma": {"head_dim": 16},
    "Olmo2": {},
    "SmolLM3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_work_too(family: str) -> None:
    """Windows, scaled RoPE, fused projections, scalar factors, norms elsewhere, no RoPE."""
    config = config_of(family, **OTHERS[family])
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).to(torch.float32).eval()
    module = import_model(config, torch.float32)
    verify_module(module)
    assert_same(module, model, *inputs(2, 12))


def config_of(family: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**BASE, **fields})
    config.architectures = [f"{family}ForCausalLM"]
    return config


def test_windows_become_attributes() -> None:
    module = import_model(config_of("Qwen2", **OTHERS["Qwen2"]))
    windows = [op.window and op.window.value.data for op in of_kind(module, nn.AttentionOp)]
    assert windows == [None, 4]


def of_kind(module: ModuleOp, kind: type[Any]) -> Iterator[Any]:
    return (op for op in module.walk() if isinstance(op, kind))


# --- the shape of the result ---


def test_the_signature_has_named_dims(imported: Import) -> None:
    (forward,) = of_kind(imported("llama"), FuncOp)
    ids, positions = forward.body.block.args
    assert (ids.name_hint, positions.name_hint) == ("input_ids", "position_ids")
    assert dims_of(ids) == dims_of(positions) == ("batch", "seq")
    (logits,) = forward.function_type.outputs
    assert (dims_of(logits), dtype_of(logits)) == (("batch", "seq", 320), bf16)


def test_parameters_have_the_checkpoints_names(
    zoo: Callable[[str], Path], imported: Import
) -> None:
    for kind in KINDS:
        checkpoint = open_model(zoo(kind)).checkpoint
        bound = bind_parameters(declared_parameters(imported(kind)), checkpoint)
        assert bound.extra == ()
        assert bound("model.norm.weight").dtype == "bfloat16"


def test_tied_parameters_are_one(imported: Import) -> None:
    module = imported("llama_tied")
    assert "lm_head.weight" not in parameters(module)
    reads = [op.parameter_name for op in of_kind(module, nn.GetParameterOp)]
    assert reads.count("model.embed_tokens.weight") == 1
    assert next(iter(parameters(module))) == "model.embed_tokens.weight"


def test_parameters_have_the_dtype_that_is_asked_for() -> None:
    config = make_config("llama", num_hidden_layers=1)
    assert {spec.dtype.name for spec in declared_parameters(import_model(config))} == {"bfloat16"}
    wide = declared_parameters(import_model(config, torch.float32))
    assert {spec.dtype.name for spec in wide} == {"float32"}


def test_rotary_frequencies_are_exact(zoo: Callable[[str], Path], imported: Import) -> None:
    (constant,) = of_kind(imported("llama3_rope"), nn.ConstantOp)
    expected = load_reference(zoo("llama3_rope")).model.rotary_emb.inv_freq
    np.testing.assert_array_equal(constant.to_numpy(), expected.numpy())


def test_every_op_says_where_it_comes_from(imported: Import) -> None:
    module = imported("qwen3")
    (forward,) = of_kind(module, FuncOp)
    places = [provenance.read(op.location) for op in forward.body.block.ops]
    assert all(place is not None and place.node for place in places)
    linears = [provenance.module_path(op) for op in of_kind(module, nn.LinearOp)]
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    layer = [f"self_attn.{n}" for n in names] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    layers = [f"model.layers.{index}.{name}" for index in (0, 1) for name in layer]
    assert linears == [*layers, "lm_head"]
    norms = {provenance.module_path(op) for op in of_kind(module, nn.RsqrtOp)}
    assert {"model.norm", "model.layers.1.self_attn.q_norm"} <= norms


def test_what_does_not_reach_the_logits_is_left_out(imported: Import) -> None:
    """Such as transformers' search for packed sequences, which has no `nn` operators."""
    (forward,) = of_kind(imported("llama"), FuncOp)
    ops = list(forward.body.block.ops)
    assert all(result.uses for op in ops for result in op.results)


def test_importing_twice_gives_the_same_text() -> None:
    config = make_config("llama", num_hidden_layers=1)
    assert print_module(import_model(config)) == print_module(import_model(config))


def test_the_config_is_not_changed() -> None:
    config = make_config("llama", num_hidden_layers=1)
    before = config.to_json_string(), config._attn_implementation
    import_model(config)
    assert (config.to_json_string(), config._attn_implementation) == before


def test_no_parameter_gets_memory() -> None:
    """A model that would need 200 GB."""
    config = make_config(
        "llama", hidden_size=65536, intermediate_size=262144, num_hidden_layers=1, head_dim=128
    )
    specs = {spec.name: spec.shape for spec in declared_parameters(import_model(config))}
    assert specs["model.layers.0.mlp.down_proj.weight"] == (65536, 262144)


# --- refusals ---


@pytest.mark.parametrize(
    ("family", "fields", "reasons"),
    [
        (
            "Gemma2",
            {"head_dim": 16},
            ["attention with argument softcap in model.layers.*.self_attn"],
        ),
        ("GPTJ", {}, ["AttentionInterface"]),
        (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            [
                "a tensor of shape [batch*seq, 64] in model.layers.*.mlp",
                "operator aten.topk.default in model.layers.*.mlp.gate (2 layers, first model",
                "operator aten.sort.default in model.layers.*.mlp.experts",
            ],
        ),
        (
            "GptOss",
            {"num_local_experts": 4},
            ["attention with argument s_aux", "operator aten.topk.default"],
        ),
        (
            "GPTNeoX",
            {},
            ["operator aten.layer_norm.default in gpt_neox.layers.*.input_layernorm"],
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["it cannot be traced: GuardOnDataDependentSymNode"],
        ),
        ("Cohere", {}, ["a slice with step 2", "operator aten.stack.default"]),
        ("Bloom", {}, ["it cannot be traced: TypeError"]),
    ],
)
def test_what_cannot_be_imported_is_refused_with_all_reasons(
    family: str, fields: dict[str, Any], reasons: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CompileError) as caught:
        import_model(config_of(family, **fields))
    assert caught.value.code == "FRO007"
    assert family in caught.value.message
    for reason in reasons:
        assert reason in caught.value.cause
    assert "def forward" not in capfd.readouterr().err  # torch's dump of the graph


def test_an_extra_module_does_not_hide_a_wrong_checkpoint(tmp_path: Path) -> None:
    """The weights of one model under the config of another: every difference is told."""
    model = make_model("llama", tmp_path / "model")
    other = import_model(make_config("llama", intermediate_size=96, attention_bias=True))
    with pytest.raises(CompileError) as caught:
        bind_parameters(declared_parameters(other), open_model(model).checkpoint)
    assert caught.value.code == "CKP005"
    assert caught.value.cause.count("\n") == 14  # 3 shapes and 4 biases in each of 2 layers
