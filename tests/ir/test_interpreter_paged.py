"""Paged ops: the same attention as without caches, and padding that can hold anything."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Operation, Region

from furiosa_llm.ir import interpreter, nn, paged
from furiosa_llm.ir.types import bf16, f32, i32, tensor
from furiosa_llm.ir.types import f8e4m3 as f8
from furiosa_llm.ir.verification import verify_module

HEADS, GROUPS, SIZE, SLOTS = 4, 2, 8, 24
NAN = float("nan")


def function(name: str, types: list[Attribute], ops: list[Operation], block: Block) -> FuncOp:
    block.add_ops([*ops, ReturnOp(*ops[-1].results)])
    return FuncOp(name, (types, ops[-1].result_types), Region(block))


def make_module(dtype: Attribute, window: int | None) -> ModuleOp:
    """@plain(q, k, v) and @write(cache, k, v, slots) and @attend(q, cache, …)."""
    q = tensor(("batch", HEADS, "seq", SIZE), dtype)
    kv = tensor(("batch", GROUPS, "seq", SIZE), dtype)
    cache = paged.cache_type(GROUPS, SIZE, dtype)
    tokens, lengths = tensor(("batch", "seq"), i32), tensor(("batch",), i32)
    table = tensor(("batch", "attn"), i32)

    plain = Block(arg_types=[q, kv, kv])
    write = Block(arg_types=[cache, kv, kv, tokens])
    attend = Block(arg_types=[q, cache, table, lengths, tokens])
    attention = paged.AttentionOp(*attend.args, scale=0.3, window=window)
    module = ModuleOp(
        [
            function(
                "plain",
                [q, kv, kv],
                [nn.AttentionOp(*plain.args, scale=0.3, window=window)],
                plain,
            ),
            function("write", [cache, kv, kv, tokens], [paged.WriteOp(*write.args)], write),
            function("attend", [q, cache, table, lengths, tokens], [attention], attend),
        ]
    )
    verify_module(module)
    return module


def run(module: ModuleOp, name: str, *inputs: Tensor) -> Tensor:
    (result,) = interpreter.run(module, name, inputs, lambda name: pytest.fail(name))
    return result


@dataclass(frozen=True)
class Batch:
    """Sequences of these lengths, padded to `tokens`, in distinct random slots."""

    q: Tensor
    k: Tensor
    v: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    lengths: Tensor
    position_ids: Tensor


def make_batch(lengths: list[int], tokens: int, keys: int, seed: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator).tolist()
    mapping = torch.full((len(lengths), tokens), -1, dtype=torch.int32)
    table = torch.full((len(lengths), keys), 99999, dtype=torch.int32)
    for sequence, length in enumerate(lengths):
        own = torch.tensor([slots.pop() for _ in range(length)], dtype=torch.int32)
        mapping[sequence, :length] = own
        table[sequence, :length] = own

    def random(heads: int) -> Tensor:
        shape = (len(lengths), heads, tokens, SIZE)
        return torch.randn(shape, generator=generator).to(dtype)

    return Batch(
        q=random(HEADS),
        k=random(GROUPS),
        v=random(GROUPS),
        slot_mapping=mapping,
        block_table=table,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        position_ids=torch.arange(tokens, dtype=torch.int32).repeat(len(lengths), 1),
    )


def attend(module: ModuleOp, batch: Batch, cache: Tensor) -> Tensor:
    written = run(module, "write", cache, batch.k, batch.v, batch.slot_mapping)
    return run(
        module, "attend", batch.q, written, batch.block_table, batch.lengths, batch.position_ids
    )


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(
    lengths=LENGTHS,
    padding=st.integers(0, 2),
    window=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 1000),
)
def test_paged_attention_is_attention_over_the_written_tokens(
    lengths: list[int], padding: int, window: int | None, seed: int
) -> None:
    module = make_module(f32, window)
    tokens = max(lengths) + padding
    batch = make_batch(lengths, tokens, tokens + padding, seed, torch.float32)
    cache = torch.full((SLOTS, GROUPS, 2, SIZE), NAN)

    expected = run(module, "plain", batch.q, batch.k, batch.v)
    actual = attend(module, batch, cache)
    for sequence, length in enumerate(lengths):
        torch.testing.assert_close(actual[sequence, :length], expected[sequence, :length])


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    garbage=st.sampled_from([NAN, float("inf"), -1e30]),
    table_garbage=st.sampled_from([0, -1, 2**31 - 1]),
    window=st.sampled_from([None, 2]),
    seed=st.integers(0, 1000),
)
def test_what_nobody_sees_changes_nothing_bit_for_bit(
    lengths: list[int], garbage: float, table_garbage: int, window: int | None, seed: int
) -> None:
    module = make_module(bf16, window)
    batch = make_batch(lengths, 7, 9, seed, torch.bfloat16)
    clean = attend(module, batch, torch.zeros(SLOTS, GROUPS, 2, SIZE, dtype=torch.bfloat16))

    unused = torch.arange(9)[None] >= batch.lengths[:, None]
    batch.block_table[unused] = table_garbage
    for sequence, length in enumerate(lengths):  # padding tokens of q, k and v
        for x in (batch.q, batch.k, batch.v):
            x[sequence, :, length:] = garbage
    cache = torch.full((SLOTS, GROUPS, 2, SIZE), garbage, dtype=torch.bfloat16)
    dirty = attend(module, batch, cache)

    for sequence, length in enumerate(lengths):
        assert torch.equal(
            dirty[sequence, :length].view(torch.int16), clean[sequence, :length].view(torch.int16)
        )


def test_decoding_token_by_token_gives_the_same_rows() -> None:
    module = make_module(f32, None)
    batch = make_batch([5, 3], 5, 6, 0, torch.float32)
    whole = attend(module, batch, torch.full((SLOTS, GROUPS, 2, SIZE), NAN))

    cache = torch.full((SLOTS, GROUPS, 2, SIZE), NAN)
    for token in range(5):
        step = slice(token, token + 1)
        k, v = batch.k[:, :, step], batch.v[:, :, step]
        cache = run(module, "write", cache, k, v, batch.slot_mapping[:, step].contiguous())
        row = run(
            module,
            "attend",
            batch.q[:, :, step],
            cache,
            batch.block_table,
            torch.minimum(batch.lengths, torch.tensor(token + 1, dtype=torch.int32)),
            batch.position_ids[:, step].contiguous(),
        )
        for sequence in range(2):
            if token < batch.lengths[sequence]:
                torch.testing.assert_close(row[sequence, 0], whole[sequence, token])


def test_a_value_that_one_query_sees_does_not_reach_another() -> None:
    """Token 1 has NaN: its own query gets NaN, the query of token 0 gets exactly v[0]."""
    module = make_module(f32, None)
    batch = make_batch([2], 2, 2, 0, torch.float32)
    batch.v[:, :, 1] = NAN
    result = attend(module, batch, torch.zeros(SLOTS, GROUPS, 2, SIZE))

    first = batch.v[0, :, 0].repeat_interleave(HEADS // GROUPS, dim=0)
    assert torch.equal(result[0, 0], first)
    assert result[0, 1].isnan().all()


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    module = make_module(f32, None)
    batch = make_batch([0], 3, 3, 0, torch.float32)
    result = attend(module, batch, torch.full((SLOTS, GROUPS, 2, SIZE), NAN))
    assert torch.equal(result, torch.zeros_like(result))


def test_write_changes_only_the_named_slots_and_not_its_input() -> None:
    module = make_module(f32, None)
    batch = make_batch([2, 1], 2, 2, 0, torch.float32)
    cache = torch.randn(SLOTS, GROUPS, 2, SIZE)
    before = cache.clone()
    written = run(module, "write", cache, batch.k, batch.v, batch.slot_mapping)

    assert torch.equal(cache, before)
    used = [slot for slot in batch.slot_mapping.flatten().tolist() if slot >= 0]
    assert len(used) == 3
    kept = [slot for slot in range(SLOTS) if slot not in used]
    assert torch.equal(written[kept], before[kept])
    slot = int(batch.slot_mapping[0, 1])
    assert torch.equal(written[slot, :, 0], batch.k[0, :, 1])
    assert torch.equal(written[slot, :, 1], batch.v[0, :, 1])


def test_attention_rounds_once() -> None:
    """In bf16 the result is the f32 result of the same bf16 inputs, rounded."""
    batch = make_batch([6, 4], 6, 6, 3, torch.bfloat16)
    narrow = attend(
        make_module(bf16, None), batch, torch.zeros(SLOTS, GROUPS, 2, SIZE, dtype=torch.bfloat16)
    )
    wide_batch = Batch(
        batch.q.float(),
        batch.k.float(),
        batch.v.float(),
        batch.slot_mapping,
        batch.block_table,
        batch.lengths,
        batch.position_ids,
    )
    wide = attend(make_module(f32, None), wide_batch, torch.zeros(SLOTS, GROUPS, 2, SIZE))
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def run_codes(batch: Batch, cache: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
    """Attention in f32 to k and v of the batch, which are codes."""
    q, kv = tensor(("batch", HEADS, "seq", SIZE), f32), tensor(("batch", GROUPS, "seq", SIZE), f8)
    tokens, lengths = tensor(("batch", "seq"), i32), tensor(("batch",), i32)
    one = tensor((1,), f32)
    types: list[Attribute] = [
        *(q, paged.cache_type(GROUPS, SIZE, f8), kv, kv, tokens),
        *(tensor(("batch", "attn"), i32), lengths, tokens, one, one),
    ]
    block = Block(arg_types=types)
    query, place, k, v, slots, table, length, positions, k_scale, v_scale = block.args
    write = paged.WriteOp(place, k, v, slots)
    attend = paged.AttentionOp(
        query, write.y, table, length, positions, k_scale, v_scale, scale=0.3
    )
    module = ModuleOp([function("codes", types, [write, attend], block)])
    verify_module(module)
    inputs = (batch.q, cache, batch.k, batch.v, batch.slot_mapping)
    return run(
        module, "codes", *inputs, batch.block_table, batch.lengths, batch.position_ids, *scales
    )


@settings(deadline=None, max_examples=20)
@given(lengths=LENGTHS, padding=st.integers(0, 2), seed=st.integers(0, 1000))
def test_codes_in_the_cache_are_what_they_stand_for(
    lengths: list[int], padding: int, seed: int
) -> None:
    """Attention to codes times their scales in f32, whatever the unwritten slots hold."""
    tokens = max(lengths) + padding
    batch = make_batch(lengths, tokens, tokens + padding, seed, torch.float32)
    k_scale, v_scale = torch.tensor([0.37]), torch.tensor([2.6])
    k_codes, v_codes = (x.to(torch.float8_e4m3fn) for x in (3 * batch.k, 3 * batch.v))
    cache = torch.full((SLOTS, GROUPS, 2, SIZE), NAN).to(torch.float8_e4m3fn)
    quantized = replace(batch, k=k_codes, v=v_codes)
    actual = run_codes(quantized, cache, (k_scale, v_scale))

    meant = replace(batch, k=k_codes.float() * k_scale, v=v_codes.float() * v_scale)
    expected = attend(make_module(f32, None), meant, torch.zeros(SLOTS, GROUPS, 2, SIZE))
    for sequence, length in enumerate(lengths):
        assert torch.equal(actual[sequence, :length], expected[sequence, :length])


@pytest.mark.parametrize(
    ("tokens", "lengths", "rows"), [(4, [4, 1, 2], [3, 0, 1]), (1, [9, 1, 0], [0, 0, 0])]
)
def test_last_token(tokens: int, lengths: list[int], rows: list[int]) -> None:
    types: list[Attribute] = [tensor(("batch", "seq", 5), f32), tensor(("batch",), i32)]
    block = Block(arg_types=types)
    last = function("last", types, [paged.LastTokenOp(*block.args)], block)
    module = ModuleOp([last])
    verify_module(module)
    x = torch.randn(3, tokens, 5)
    result = run(module, "last", x, torch.tensor(lengths, dtype=torch.int32))
    assert torch.equal(result, x[torch.arange(3), rows][:, None])
