"""A higher level of `build -O` never gives slower code, for any family of the model zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from model_zoo import KINDS, RELATIVES, make_config

from furiosa_llm.backend_rngd.encode import encode_program
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.pipeline import DIALECTS, backend_phase
from furiosa_llm.frontend.torch_import import import_model
from furiosa_llm.ir.text import make_context
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.pipeline import bucket_phase, import_phase, model_phase, run_passes
from furiosa_llm.runtime_sim.timing import time_program

BUCKETS = (Bucket.prefill(1, 32), Bucket.decode(3, 48))
LEVELS = (0, 1, 2)
LARGER: Mapping[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
"""Beside the zoo's own sizes: enough work per kernel for loads to overlap with it."""


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.long) for kind in RELATIVES)]
)
def test_each_level_is_at_least_as_fast_as_the_one_below(kind: str) -> None:
    check(make_config(kind))


def test_the_same_for_larger_products() -> None:
    check(make_config("llama", **LARGER))


def check(config: Any) -> None:
    machine = load_machine()
    module = import_model(config, torch.bfloat16)
    run_passes(module, [*import_phase(), *model_phase(rows=1)])
    for bucket in BUCKETS:
        cycles = []
        for level in LEVELS:
            copy = module.clone()
            passes = [*bucket_phase(bucket), *backend_phase(bucket, level)]
            run_passes(copy, passes, context=make_context(DIALECTS))
            cycles.append(time_program(encode_program(copy, "zoo"), machine).cycles)
        assert cycles == sorted(cycles, reverse=True), f"{bucket.name}: -O0, -O1, -O2 = {cycles}"
