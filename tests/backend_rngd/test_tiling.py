"""Tiling records: their text, pins, and the search against all tilings of small products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_decoder import Decoder
from xdsl.context import Context
from xdsl.ir import Block

from furiosa_llm.backend_rngd import tiling_search
from furiosa_llm.backend_rngd.emitter import Emitter, Ref
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Exec
from furiosa_llm.backend_rngd.isa.layout import heads, plain
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import Memory
from furiosa_llm.backend_rngd.kernels.linear_limits import _objection, check_tiling, group_chunks
from furiosa_llm.backend_rngd.rngd import BufferType, TilingOp
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.backend_rngd.tiling import (
    Cycles,
    MatmulTiling,
    ProductName,
    Role,
    parse_pins,
    parse_tiling,
    pinned,
)
from furiosa_llm.backend_rngd.tiling_search import (
    ProductKey,
    _cycles_within,
    _emit_product,
    block_cycles,
    candidates,
    cheapest,
    predict,
    runner_up,
    score,
    search,
)
from furiosa_llm.errors import CompileError
from furiosa_llm.models.config_types import Bucket

numbers = st.integers(0, 10**6)
tilings = st.builds(
    MatmulTiling,
    st.sampled_from(Role),
    numbers,
    numbers,
    numbers,
    numbers,
    numbers,
    numbers,
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.none() | st.builds(Cycles, numbers, numbers, numbers, numbers),
)


@given(tiling=tilings)
def test_text_of_a_tiling_is_read_back(tiling: MatmulTiling) -> None:
    assert parse_tiling(tiling.to_text(), "here") == tiling


LINE = "weights-stream tokens=1 rows=16 load_rows=16 load_chunks=4 command_chunks=4"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no role"),
        ("rows-stream tokens=1", "'rows-stream' is no role"),
        ("weights-stream tokens=1", "not given"),
        (LINE + " depth=3", "'depth=3'"),
        (LINE + " rows=16", "'rows=16'"),
        (LINE + " k_split=-1", "'k_split=-1'"),
        (LINE + " every_slice=7", "every_slice is 0 or 1, not 7"),
        (LINE + " run_per_row=2", "run_per_row is 0 or 1"),
        (LINE + " main_cycles=7", "all or none"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(CompileError) as caught:
        parse_tiling(text, "pins:3")
    assert caught.value.code == "BCK006"
    assert said in caught.value.cause
    assert caught.value.at == "pins:3"
    assert "--explain-tiling" in caught.value.next_step


def product(module: str) -> ProductName:
    return ProductName("block_0", module, 2, 48)


@pytest.mark.parametrize(
    "pattern", ["up", "*/up", "b*/u?#2@48", "up@4*", "up#2", "block_0/up", "@48"]
)
def test_a_pattern_leaves_out_what_does_not_matter(pattern: str) -> None:
    assert product("up").matches(pattern)
    assert ProductName.parse(str(product("up"))) == product("up")


@pytest.mark.parametrize("pattern", ["u", "up@47", "up#1", "block_1/up", "p*"])
def test_a_pattern_of_another_product(pattern: str) -> None:
    assert not product("up").matches(pattern)


def test_the_first_pin_that_matches_counts() -> None:
    pins = parse_pins(["# decode", "", f"*.q_proj: {LINE}", f"*: {LINE} k_split=2"], "file")
    assert pinned(pins, product("attn.q_proj")) == parse_tiling(LINE, "")
    assert pinned(pins, product("mlp.up")) == parse_tiling(LINE + " k_split=2", "")
    assert pinned({}, product("mlp.up")) is None
    twice = parse_pins([f"up: {LINE}", f"up: {LINE} k_split=2"], "file")
    assert pinned(twice, product("up")) == parse_tiling(LINE, "")
    with pytest.raises(CompileError) as caught:
        parse_pins(["weights-stream"], "file")
    assert (caught.value.code, caught.value.at) == ("BCK006", "file:1")


KEY = ProductKey(plain(4096), plain(4096), 4)


@pytest.mark.parametrize(
    "change",
    [
        {"k_split": 3},
        {"k_split": 2},  # a plain order cannot have copies in the slices beyond it
        {"tokens": 0},
        {"tokens": 17},
        {"tokens": 16},  # 128 KB of tokens
        {"rows": 12, "load_rows": 12},
        {"rows": 4, "load_rows": 20},
        {"load_rows": 80},
        {"every_slice": False},
        {"command_chunks": 5, "load_chunks": 5},
        {"command_chunks": 2},
        {"role": Role.TOKENS, "tokens": 3},
        {"role": Role.TOKENS, "rows": 16, "load_rows": 16},  # 128 KB of weights at once
        {"role": Role.TOKENS, "rows": 16, "load_rows": 16, "command_chunks": 2, "load_chunks": 3},
        {"role": Role.TOKENS, "rows": 16, "load_rows": 32, "command_chunks": 1, "load_chunks": 2},
    ],
)
def test_a_pin_that_does_not_suit_the_product_is_refused(change: dict[str, Any]) -> None:
    good = parse_tiling(LINE, "").__class__(Role.WEIGHTS, 4, 16, 16, 4, 4)
    check_tiling(KEY.shape, good, "mlp.up")
    with pytest.raises(CompileError) as caught:
        check_tiling(KEY.shape, replace(good, **change), "mlp.up")
    assert caught.value.code == "BCK006"
    assert caught.value.at == "mlp.up"


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 1},
        {"tokens": 32},
        {"every_slice": False},
        {"load_rows": 32},
        {"load_chunks": 2},
        {"command_chunks": 0},
        {"command_chunks": 8},
        {"k_split": 2},
    ],
)
def test_a_pin_that_does_not_suit_groups_of_slices_is_refused(change: dict[str, Any]) -> None:
    key = ProductKey(plain(1792), plain(1024), 64, groups=4)
    good = search(key, load_machine())
    check_tiling(key.shape, good, "mlp.down")
    with pytest.raises(CompileError) as caught:
        check_tiling(key.shape, replace(good, **change), "mlp.down")
    assert caught.value.code == "BCK006"


@pytest.mark.parametrize(
    ("block", "change", "problem"),
    [
        ((1, 16), {"load_rows": 16}, "vector register file"),
        ((128, 128), {"load_rows": 256}, "vector register file"),
        ((64, 48), {"role": Role.TOKENS, "command_chunks": 2, "load_chunks": 2}, "3 chunks of K"),
    ],
)
def test_a_pin_that_does_not_suit_scales_of_blocks_is_refused(
    block: tuple[int, int], change: dict[str, Any], problem: str
) -> None:
    """Slices hold six chunks of K, of which blocks of 48 have three."""
    key = ProductKey(plain(6144), plain(16384), 4, weight_dtype=DType.F8E4M3, block=block)
    good = MatmulTiling(Role.WEIGHTS, 1, 4, 4, 6, 6)
    check_tiling(key.shape, good, "mlp.up")
    tokens = 4 if "role" in change else 1
    pin = replace(good, tokens=tokens, rows=16, **{"load_rows": 16, **change})
    with pytest.raises(CompileError, match=problem) as caught:
        check_tiling(key.shape, pin, "mlp.up")
    assert caught.value.code == "BCK006"


SMALL = {
    "few tokens": ProductKey(plain(512), plain(700), 3),
    "more tokens than lanes": ProductKey(plain(2048), plain(1024), 13, bias=True),
    "heads of a shard": ProductKey(plain(1024), heads(4, 64, rotary=True), 2, may_repeat=True),
    "many tokens": ProductKey(plain(2048), plain(1024), 96),
    "logits": ProductKey(plain(576), plain(3000), 1, DType.F32),
    "groups of slices": ProductKey(plain(4096), plain(1024), 96, groups=4),
    "groups whose units are chunks": ProductKey(plain(1792), plain(1024), 64, groups=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_search_is_within_5_percent_of_all_tilings(name: str) -> None:
    key, machine = SMALL[name], load_machine()
    found = search(key, machine)
    every = (replace(t, predicted=predict(key, t, machine)) for t in _all_tilings(key))
    assert score(found) <= 1.05 * min(score(tiling) for tiling in every)


LOOPS = ProductKey(plain(64), plain(64 * 16 * 165), 128)
"""Its loads or its tiles are a loop, with some of the tilings."""


@pytest.mark.parametrize("key", [*SMALL.values(), LOOPS], ids=[*SMALL, "loops"])
def test_giving_candidates_up_changes_nothing(key: ProductKey) -> None:
    machine = load_machine()
    every = [replace(t, predicted=predict(key, t, machine)) for t in candidates(key.shape)]
    found = search(key, machine)
    assert found == cheapest(every)
    others = [tiling for tiling in every if tiling != found]
    assert runner_up(key, found, machine) == (cheapest(others) if others else None)


@pytest.mark.parametrize("key", [*SMALL.values(), LOOPS], ids=[*SMALL, "loops"])
def test_a_candidate_is_given_up_when_its_score_is_above_the_limit(key: ProductKey) -> None:
    machine = load_machine()
    for tiling in candidates(key.shape):
        cycles = predict(key, tiling, machine)
        assert _cycles_within(cycles.score, key, tiling, machine) == cycles
        assert _cycles_within(cycles.score - 0.5, key, tiling, machine) is None


@pytest.mark.parametrize("key", [*SMALL.values(), LOOPS], ids=[*SMALL, "loops"])
def test_commands_cost_the_same_whether_they_are_kept_or_not(key: ProductKey) -> None:
    machine = load_machine()
    for tiling in candidates(key.shape):
        emit = Emitter(Block())
        _emit_product(emit, key, tiling)
        assert block_cycles(emit.block, machine) == predict(key, tiling, machine)


def test_the_turns_of_a_loop_cost_what_they_cost_written_out() -> None:
    written_out, looped = (_twenty_turns(straight) for straight in (20, 1))
    assert (looped.sub, looped.dma) == (written_out.sub, written_out.dma)
    assert looped.total >= written_out.total
    assert looped.total % 20 == 0


def _twenty_turns(straight: int) -> Cycles:
    """What loads and the fills that wait for them cost."""
    emit = Emitter(block := Block())
    source = Ref(block.insert_arg(BufferType(Memory.HBM, 0), 0))
    for _ in emit.loop(20, straight):
        loaded = emit.alloc(Memory.DM, 1024, "vector")
        emit.load_slices(source, loaded, 1024)
        emit.load_vrf(loaded, 256, "vector")
    return block_cycles(block, load_machine())


def test_what_is_too_dear_is_not_emitted_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    key, machine = ProductKey(plain(2048), plain(1024), 128), load_machine()
    search.cache_clear()
    priced: list[Exec] = []
    price = tiling_search._Price.exec

    def counted(self: Any, command: Exec, *buffers: Any) -> None:
        priced.append(command)
        price(self, command, *buffers)

    monkeypatch.setattr(tiling_search._Price, "exec", counted)
    for tiling in candidates(key.shape):
        predict(key, tiling, machine)
    in_all = len(priced)
    search(key, machine)
    assert 0 < len(priced) - in_all < in_all // 2


def test_only_streamed_tokens_take_a_residual() -> None:
    key, machine = ProductKey(plain(512), plain(700), 3, residual=True), load_machine()
    found = search(key, machine)
    assert found.role == Role.TOKENS
    other = runner_up(key, found, machine)
    assert other is None or other.role == Role.TOKENS


def _all_tilings(key: ProductKey) -> list[MatmulTiling]:
    """Every valid tiling on a grid of tokens, rows, chunks, splits."""
    shape = key.shape
    chunks = range(1, (group_chunks(shape)[0] if key.groups > 1 else shape.k_chunks) + 1)
    grid = (
        MatmulTiling(
            role, tokens, rows, load, load_chunks, command, parts, per_row, every, key.groups
        )
        for role in Role
        for tokens in {1, 2, 4, 8, 16, shape.tokens}
        for load in range(4, shape.per_slice + 1, 4)
        for rows in {4, 16, load}
        for load_chunks in chunks
        for command in chunks
        for parts in (shape.parts,)
        for per_row in (False, True)
        for every in (False, True)
    )
    return [tiling for tiling in grid if _objection(shape, tiling) is None]


def records(pins: tuple[str, ...]) -> list[str]:
    """The tilings of a small decoder's block."""
    module = Decoder(Bucket.decode(2, 16), layers=1).module()
    TilePass("decode", 2, 16, pins).apply(Context(), module)
    found = [op for op in module.walk() if isinstance(op, TilingOp)]
    return [op.record.data.split(" main_cycles")[0] for op in found]


PIN = "weights-stream tokens=1 rows=4 load_rows=8 load_chunks=1 command_chunks=1 k_split=1"


def test_a_pinned_tiling_is_what_the_block_records() -> None:
    free, fixed = records(()), records((f"mlp.up: {PIN}",))
    text = f"{PIN} run_per_row=0 every_slice=1"
    assert [record for record in fixed if record not in free] == [text]
    assert len(free) == len(fixed)


def test_a_pin_that_no_product_can_have_names_its_module() -> None:
    with pytest.raises(CompileError) as caught:
        records((f"*up: {PIN} k_split=2".replace("k_split=1 ", ""),))
    assert (caught.value.code, caught.value.at) == ("BCK006", "mlp.up")
