"""How attention divides its work: everything once, nothing too large, nothing that is hidden."""

from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.rules import LANES, SLICES_PER_PE, TRF_BYTES
from furiosa_llm.backend_rngd.kernels.attention_tiling import (
    KEY_TILE_BYTES,
    KEY_UNIT,
    MAX_ROWS,
    PART_BYTES,
    REGISTER_BYTES,
    SCORE_BYTES,
    Round,
    Rows,
    Span,
    attention_rounds,
    key_count,
    row_tiles,
    segments,
)

HEAD_DIMS = st.sampled_from([16, 48, 64, 128, 256])
TOKENS = st.one_of(st.just(1), st.integers(1, 32).map(lambda n: 8 * n))


@given(
    sequences=st.integers(1, 200),
    kv_heads=st.integers(1, 100),
    attended=st.integers(1, 20_000),
    more=st.integers(0, 2_000),
)
def test_rounds_cover_every_key_of_every_head_once(
    sequences: int, kv_heads: int, attended: int, more: int
) -> None:
    table = key_count(attended + more)
    seen = set()
    for turn in attention_rounds(sequences, kv_heads, attended, table):
        assert turn.slices <= SLICES_PER_PE
        assert turn.splits & (turn.splits - 1) == 0
        assert turn.keys % KEY_UNIT == 0
        assert attended <= turn.splits * turn.keys <= table
        for sequence in range(turn.sequences):
            for head in range(turn.kv_heads):
                pair = (turn.first_sequence + sequence, turn.first_head + head)
                assert pair not in seen
                seen.add(pair)
    assert len(seen) == sequences * kv_heads


@given(splits=st.integers(0, 6).map(lambda n: 1 << n), units=st.integers(1, 40), data=st.data())
def test_the_first_keys_of_each_slice_are_the_first_of_the_sequence(
    splits: int, units: int, data: st.DataObject
) -> None:
    turn = Round(0, 1, 0, 1, splits, units * KEY_UNIT)
    count = data.draw(st.integers(0, turn.splits * turn.keys))
    index = [
        [(j // KEY_UNIT * splits + c) * KEY_UNIT + j % KEY_UNIT for j in range(turn.keys)]
        for c in range(splits)
    ]
    within, up_to = turn.within(count), turn.up_to(count)
    assert all(key < count for keys in index for key in keys[:within])
    assert all(key >= count for keys in index for key in keys[up_to:])
    assert up_to - within in (0, KEY_UNIT)


@given(query_heads=st.integers(1, 40), tokens=TOKENS, head_dim=HEAD_DIMS)
def test_row_tiles_cover_every_row_once_and_fit(
    query_heads: int, tokens: int, head_dim: int
) -> None:
    seen = set()
    for tile in row_tiles(query_heads, tokens, head_dim):
        assert tile.count % tile.lanes == 0
        assert tile.count >= tile.heads * tile.tokens
        assert tile.count <= MAX_ROWS
        assert tile.lanes <= LANES
        assert tile.blocks * 2 * head_dim * tile.lanes <= REGISTER_BYTES < TRF_BYTES
        for head in range(tile.first_head, tile.first_head + tile.heads):
            for token in range(tile.first_token, tile.first_token + tile.tokens):
                assert (head, token) not in seen
                seen.add((head, token))
    assert len(seen) == query_heads * tokens


@given(
    rows=st.tuples(st.integers(1, 16), TOKENS, HEAD_DIMS),
    units=st.integers(1, 4_000),
)
def test_segments_cover_every_key_once_and_fit(rows: tuple[int, int, int], units: int) -> None:
    head_dim, keys = rows[2], units * KEY_UNIT
    for tile in row_tiles(*rows):
        kept = keys * 4 * head_dim <= KEY_TILE_BYTES
        plan = segments(tile, keys, head_dim, None if kept else 4 * head_dim)
        assert [key for span in plan.spans for key in range(span.first, span.end)] == [*range(keys)]
        for span in plan.spans:
            check_segment(tile, span, head_dim, kept=kept)
        assert plan.together >= 2
        waiting = min(plan.together, len(plan.spans))
        assert waiting <= 2 or waiting * tile.count * head_dim * 4 <= PART_BYTES


def check_segment(rows: Rows, span: Span, head_dim: int, *, kept: bool) -> None:
    smallest = span.count == KEY_UNIT
    assert smallest or span.count * rows.count * 4 <= SCORE_BYTES
    assert smallest or span.count * 2 * rows.blocks * rows.lanes <= REGISTER_BYTES
    assert kept or span.count * 4 * head_dim <= KEY_TILE_BYTES
