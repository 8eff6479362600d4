"""How attention divides its work over slices, keys and rows: everything once, nothing too large."""

from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.rules import LANES, SLICES_PER_PE, TRF_BYTES, VRF_BYTES
from furiosa_llm.backend_rngd.kernels.attention_tiling import (
    KEY_TILE_BYTES,
    KEY_UNIT,
    attention_rounds,
    key_count,
    row_tiles,
)


@given(
    sequences=st.integers(1, 200),
    kv_heads=st.integers(1, 100),
    attended=st.integers(1, 20_000),
    head_dim=st.sampled_from([16, 48, 64, 128, 256]),
)
def test_rounds_cover_every_key_of_every_head_once(
    sequences: int, kv_heads: int, attended: int, head_dim: int
) -> None:
    seen = set()
    for turn in attention_rounds(sequences, kv_heads, attended, 4 * head_dim):
        assert turn.slices <= SLICES_PER_PE
        assert turn.splits & (turn.splits - 1) == 0
        assert turn.splits * turn.keys == key_count(attended) >= attended
        assert turn.keys % turn.key_tile == 0
        assert turn.key_tile % KEY_UNIT == 0
        assert turn.key_tile * 4 * head_dim <= max(KEY_TILE_BYTES, KEY_UNIT * 4 * head_dim)
        assert turn.key_tile * 8 <= VRF_BYTES
        for sequence in range(turn.sequences):
            for head in range(turn.kv_heads):
                pair = (turn.first_sequence + sequence, turn.first_head + head)
                assert pair not in seen
                seen.add(pair)
    assert len(seen) == sequences * kv_heads


@given(
    query_heads=st.integers(1, 40),
    tokens=st.one_of(st.just(1), st.integers(1, 32).map(lambda n: 8 * n)),
    keys=st.integers(1, 256).map(lambda n: 8 * n),
    head_dim=st.sampled_from([16, 48, 64, 128, 256]),
)
def test_row_tiles_cover_every_row_once_and_fit(
    query_heads: int, tokens: int, keys: int, head_dim: int
) -> None:
    seen = set()
    for tile in row_tiles(query_heads, tokens, keys, head_dim):
        assert tile.count % tile.lanes == 0
        assert tile.count >= tile.heads * tile.tokens
        assert tile.lanes <= LANES
        lane_bytes = TRF_BYTES // tile.lanes
        assert tile.blocks * 2 * max(head_dim, keys) <= max(lane_bytes, 2 * max(head_dim, keys))
        assert 8 * tile.count <= VRF_BYTES
        for head in range(tile.first_head, tile.first_head + tile.heads):
            for token in range(tile.first_token, tile.first_token + tile.tokens):
                assert (head, token) not in seen
                seen.add((head, token))
    assert len(seen) == query_heads * tokens
