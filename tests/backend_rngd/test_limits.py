"""What does not fit on a PE is refused, and what only looks too large is cut."""

import pytest
from small_decoder import Decoder

from furiosa_llm.errors import CompileError
from furiosa_llm.models.config_types import Bucket


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
    parts = [b.name for b in decoder.program().blocks if b.name.startswith("epilogue")]
    assert len(parts) > 1
