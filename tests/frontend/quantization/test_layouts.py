"""Where a checkpoint's tensors lie: in several files, tied, or under other prefixes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compressed_tensors.quantization import preset_name_to_scheme
from memory_checkpoint import MemoryCheckpoint
from quantized_zoo import FP8_CACHE, edit_config, write_compressed_tensors

from furiosa_llm.artifact.ledger import LEDGER_FILE, check_complete, check_losses, make_ledger
from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.codes import check_codes
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.scales import check_scale_values
from furiosa_llm.frontend.safetensors_checkpoint import INDEX_FILE, SafetensorsCheckpoint
from furiosa_llm.models.quantization import Quantization

Zoo = Callable[[str], Path]


def describe(directory: Path, checkpoint: Any = None) -> Quantization:
    found = read_quantization(directory, checkpoint or SafetensorsCheckpoint(directory))
    assert found is not None
    return found


# --- several files ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the kind `ct-tensor` is, in files so small that weights and scales are apart."""
    return write_compressed_tensors(
        tmp_path_factory.mktemp("sharded"),
        {"group_0": preset_name_to_scheme("FP8", ["Linear"])},
        kv_cache_scheme=FP8_CACHE,
        max_shard_size="20KB",
    )


def test_several_files_are_one_checkpoint(sharded: Path, quantized: Zoo) -> None:
    files = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    found = describe(sharded)
    assert found == describe(quantized("ct-tensor"))
    apart = [x for x in found.linears if files[x.weight] != files[x.scale.name]]
    assert apart, "no scale is in another file than its weight"

    checkpoint = SafetensorsCheckpoint(sharded)
    check_scale_values(found, checkpoint.path, checkpoint.read)
    made = make_ledger(found, checkpoint.tensors, {}, check_codes(found, checkpoint))
    assert check_losses(made, []) == ()
    check_complete(made, files, LEDGER_FILE)


def test_a_scale_that_the_index_forgets_is_there(sharded: Path, tmp_path: Path) -> None:
    """transformers loads all that is in the files, too."""
    directory = shutil.copytree(sharded, tmp_path / "copy")
    index = json.loads((directory / INDEX_FILE).read_text())
    name = describe(sharded).linears[5].scale.name
    del index["weight_map"][name]
    (directory / INDEX_FILE).write_text(json.dumps(index))
    assert name in SafetensorsCheckpoint(directory).tensors
    assert {x.module: x for x in describe(directory).linears} == {
        x.module: x for x in describe(sharded).linears
    }


# --- tied heads ---


def test_a_tied_head_is_no_linear(quantized: Zoo) -> None:
    directory = quantized("ct-tied")
    checkpoint = SafetensorsCheckpoint(directory)
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in checkpoint.tensors
    schemes = {row.tensor: row.scheme_in for row in make_ledger(
        describe(directory), checkpoint.tensors, {}
    ).rows}  # fmt: skip
    assert schemes["model.embed_tokens.weight"] == "BF16"
    assert schemes["model.layers.0.self_attn.q_proj.bias"] == "BF16"


def test_scales_of_a_head_that_is_not_there_are_named(quantized: Zoo) -> None:
    whole = MemoryCheckpoint.copy_of(SafetensorsCheckpoint(quantized("ct-tied")))
    scale = np.ones((320, 1), ml_dtypes.bfloat16)
    with pytest.raises(CompileError) as caught:
        describe(quantized("ct-tied"), whole.changed("lm_head.weight_scale", scale))
    assert caught.value.code == "QNT003"
    assert "`lm_head.weight_scale` scales nothing" in caught.value.cause


def test_a_head_may_be_quantised(tmp_path: Path) -> None:
    """The library then writes its codes, although the config ties them to the embedding."""
    write_compressed_tensors(
        tmp_path, {"group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])}, ignore=()
    )
    (head,) = [x for x in describe(tmp_path).linears if x.module == "lm_head"]
    assert head.shape == (320, 64)


# --- prefixes ---

PREFIXED = ["ct-tensor", "ct-channel", "fine-grained", "autofp8-kv", "modelopt-fp8_kv"]


@pytest.mark.parametrize("kind", PREFIXED)
def test_a_decoder_inside_another_model(quantized: Zoo, tmp_path: Path, kind: str) -> None:
    """Vision-language models call theirs `language_model`; lists name modules with that prefix."""
    prefix = "language_model."
    directory = shutil.copytree(quantized(kind), tmp_path / "copy")
    fields = json.loads((directory / "config.json").read_text())["quantization_config"]
    for key in ("ignore", "ignored_layers", "modules_to_not_convert"):
        if fields.get(key):
            fields[key] = [prefix + name for name in fields[key]]
    if kind == "fine-grained":
        fields["modules_to_not_convert"] = [f"{prefix}lm_head"]
    edit_config(directory, quantization_config=fields)
    (directory / "hf_quant_config.json").unlink(missing_ok=True)

    whole = MemoryCheckpoint.copy_of(SafetensorsCheckpoint(directory))
    moved = MemoryCheckpoint({prefix + name: array for name, array in whole.arrays.items()})
    assert describe(directory, moved) == with_prefix(describe(quantized(kind)), prefix)


def with_prefix(quantization: Quantization, prefix: str) -> Quantization:
    def renamed(part: Any) -> Any:
        """A linear, cache or scale whose texts that are names of modules or tensors are longer."""
        if part is None:
            return None
        fields = {
            key: prefix + getattr(part, key)
            for key in ("module", "weight", "name")
            if hasattr(part, key)
        }
        scales = {
            key: renamed(getattr(part, key))
            for key in ("scale", "input_scale", "key_scale", "value_scale")
            if hasattr(part, key)
        }
        return replace(part, **fields, **scales)

    return replace(
        quantization,
        linears=tuple(map(renamed, quantization.linears)),
        caches=tuple(map(renamed, quantization.caches)),
    )
