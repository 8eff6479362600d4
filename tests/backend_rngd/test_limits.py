"""What does not fit on a PE is refused, and what only looks too large is cut."""

import pytest
from random_models import DECODE, RandomModel, lowered
from small_decoder import Decoder

from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.errors import CompileError
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.pipeline import run_passes, shard_phase


def refused(decoder: Decoder) -> CompileError:
    with pytest.raises(CompileError) as caught:
        decoder.program()
    return caught.value


def test_a_block_that_does_not_fit_is_refused_by_name() -> None:
    error = refused(Decoder(Bucket.decode(1, 8), hidden=16, vocabulary=9_000_000, layers=1))
    assert error.code == "BCK003"
    assert "epilogue" in error.message
    assert "decode:1,8" in (error.at or "")
    assert "bytes" in error.cause


def test_too_many_rotary_features_are_refused() -> None:
    decoder = Decoder(Bucket.decode(1, 8), heads=1100, kv_heads=1, head_dim=64, layers=1)
    assert refused(decoder).code == "BCK005"


def test_logits_of_all_rows_are_made_a_few_at_a_time() -> None:
    decoder = Decoder(Bucket.prefill(1, 128), vocabulary=200_000, last_token_only=False, layers=1)
    program = decoder.program()
    parts = [call for call in program.calls if "epilogue" in program.blocks[call.block].name]
    assert len(parts) > 1


def test_chunks_with_the_same_code_share_a_block() -> None:
    # At level 2 a block also depends on what the next call wants loaded.
    program = Decoder(Bucket.prefill(1, 2048), layers=1).program(level=1)
    calls = [program.blocks[call.block].name for call in program.calls]
    assert calls.count("block_0_segment_0_part_0") == 2  # of four chunks each
    assert calls.count("block_0_segment_2_part_0") == 2
    attention = [name for name in calls if "segment_1" in name]
    assert len(attention) == len(set(attention)) == 4  # each sees more keys than the one before
    offsets = {b.offset for call in program.calls for b in call.bindings}
    assert len(offsets) > 4


def test_parts_that_other_ranks_need_whole_are_refused_by_module() -> None:
    """Norms over all heads: no family that the backend runs on one rank has them."""
    module = lowered(RandomModel(whole_norms=True), DECODE)
    run_passes(module, shard_phase(2))
    with pytest.raises(CompileError, match="BCK001") as caught:
        run_passes(module, [TilePass.for_bucket(DECODE)])
    gathers = [line for line in caught.value.cause.splitlines() if "dist.all_gather" in line]
    assert len(gathers) == 2  # queries and keys
    assert all("qkv_" in line and "-tp 1" in line for line in gathers)
