"""Quantised decoders over ranks, through binaries: scales in parts, scales that ranks compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import (
    BOUND,
    INPUTS_BOUND,
    SLOTS,
    Case,
    fill_cache,
    reference,
    relative_rms,
    valid,
)
from sequences import PADDING_ID
from small_decoder import Decoder, Scheme
from xdsl.context import Context

from furiosa_llm.backend_rngd.encode import encode_program
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.ir.dist import FORWARD, CutAttr, cuts_of
from furiosa_llm.ir.dist_interpreter import take
from furiosa_llm.ir.verification import functions
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.pipeline import run_passes, shard_phase
from furiosa_llm.passes.signature import FIRST_CACHE
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]


def sharded(decoder: Decoder, ranks: int, level: int = 2) -> tuple[Program, CutAttr]:
    """Each rank's program, and how caches are cut."""
    module = decoder.module()
    run_passes(module, shard_phase(ranks))
    cut = cuts_of(functions(module)[FORWARD])[0][FIRST_CACHE]
    assert cut is not None
    for step in backend_phase(decoder.bucket, level):
        step.apply(Context(), module)
    program = encode_program(module, "small")
    check_order(program)
    return program, cut


def simulated(case: Case, ranks: int) -> Array:
    """Logits of the valid rows; padding tokens and unused slots hold NaN."""
    program, cut = sharded(case.decoder, ranks)
    device = Device()
    weights = case.decoder.weights()
    weights["embed"][PADDING_ID] = np.nan
    device.load(program, weights.__getitem__)
    device.allocate_caches(program, SLOTS)
    for layer, past in enumerate(case.past()):
        for rank in range(ranks):
            fill_cache(device.cache(layer, rank), take(cut, past, rank).view(torch.int16).numpy())
    return valid(case, device.execute(program, case.inputs())["logits"])


TOKEN, STATIC, CHANNEL = Scheme("channel", "token"), Scheme("tensor", "tensor"), Scheme("channel")
COLUMNS = Scheme("channel", "column")
CASES = {
    "one token": Case(Decoder(Bucket.decode(1, 40), scheme=TOKEN), (33,)),
    "ragged decode": Case(
        Decoder(Bucket.decode(5, 100), bias=True, scheme=TOKEN), (100, 1, 37, 64, 2)
    ),
    "prefill": Case(Decoder(Bucket.prefill(2, 24), heads=9, kv_heads=3, scheme=TOKEN), (20, 11)),
    "a stored number": Case(
        Decoder(Bucket.decode(4, 50), bias=True, scheme=STATIC), (50, 7, 12, 1)
    ),
    "stored numbers of columns": Case(
        Decoder(Bucket.decode(4, 50), bias=True, scheme=COLUMNS), (50, 7, 12, 1)
    ),
    # 192 features between products: blocks become halves on 2 and 8 ranks, quarters on 4.
    "blocks": Case(
        Decoder(
            Bucket.decode(3, 50),
            heads=8,
            head_dim=32,
            hidden=96,
            feed_forward=192,
            scheme=Scheme((64, 64)),
        ),
        (50, 7, 12),
    ),
    "weights alone": Case(Decoder(Bucket.prefill(1, 24), bias=True, scheme=CHANNEL), (24,)),
}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_interpreter(name: str, ranks: int) -> None:
    case = CASES[name]
    assert case.decoder.scheme is not None
    bound = BOUND if case.decoder.scheme.inputs == "none" else INPUTS_BOUND
    assert relative_rms(simulated(case, ranks), reference(case)) < bound
