"""Hold a pass to its contract: run the program before and after it in the reference interpreter.

Weights and inputs are random. Caches are filled with NaN wherever no token has been written,
slots are a random permutation, and padding names slots that do not exist, so a program that
touches any of it shows.

Shape letters: B sequences, T tokens, A keys that a sequence may see, S slots, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, SSAValue

from .. import errors
from ..ir import interpreter, nn, quant, quant_semantics
from ..ir.dist import FORWARD, LocalRowsOp, cuts_of, mesh_of
from ..ir.dist_interpreter import Ranks, assemble, run_ranks, take
from ..ir.interpreter import TORCH_DTYPES, Precision
from ..ir.text import make_context
from ..ir.types import CODES_TENSOR, dims_of, dtype_of, i32, shape_of
from ..ir.verification import functions, parameters, verify_module
from .contract import Bitwise, Budget, ContractPass, Relation, Tolerance, Ulps
from .scale_parameters import scale_parameters
from .signature import FIRST_CACHE, INPUT_IDS, paged_inputs
from .specialize_bucket import SpecializeBucketPass

PADDING_SLOT, NO_SLOT = -1, 1 << 30
"""What padding tokens write to, and what unused entries of a block table name."""

SPARE_SLOTS = 3

UNIT = 2.0**3
"""About what scales are: codes reach to 3,584, so that no value of a program is clipped."""

PRECISIONS: tuple[Precision, ...] = ("model", "unrounded")


def check_contract(one: ContractPass, module: ModuleOp, seed: int = 0) -> ModuleOp:
    """Run the pass on a copy of `module`, which stays as it is, and compare the two programs.

    Returns the copy. Raises: PAS012, or what the pass raises.
    """
    after = module.clone()
    one.apply(make_context(), after)
    verify_module(after)
    check = _Check(one, module, after, seed)
    {
        Relation.SAME: check.same,
        Relation.SPECIALIZED: check.same,
        Relation.SHARDED: check.same,
        Relation.QUANTIZED: check.same,
        Relation.PAGED: check.paged,
        Relation.LAST_TOKEN: check.last_token,
        Relation.NO_LOGITS: check.no_logits,
    }[one.relation]()
    return after


@dataclass(frozen=True)
class Step:
    """One call of a paged program for B sequences, each in its own slots."""

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    lengths: Tensor
    caches: tuple[Tensor, ...]

    @property
    def inputs(self) -> list[Tensor]:
        return [
            self.input_ids,
            self.position_ids,
            self.slot_mapping,
            self.block_table,
            self.lengths,
            *self.caches,
        ]


@dataclass(frozen=True)
class _Check:
    one: ContractPass
    before: ModuleOp
    after: ModuleOp
    seed: int

    def same(self) -> None:
        inputs = self._inputs()
        for precision in PRECISIONS:
            before = self._run(self.before, inputs, precision)
            after = self._run(self.after, inputs, precision)
            assert len(before) == len(after)
            for index, (old, new) in enumerate(zip(before, after, strict=True)):
                self._compare(f"result {index}", old, new, precision)

    def last_token(self) -> None:
        step = self._step()
        rows = (step.lengths.long() - 1).clamp(0, step.input_ids.shape[1] - 1)
        for precision in PRECISIONS:
            before = self._run(self.before, step.inputs, precision)
            after = self._run(self.after, step.inputs, precision)
            logits = before[0][torch.arange(len(rows)), rows][:, None]
            for name, old, new in zip(_names(after), (logits, *before[1:]), after, strict=True):
                self._compare(name, old, new, precision)

    def no_logits(self) -> None:
        step = self._step()
        for precision in PRECISIONS:
            before = self._run(self.before, step.inputs, precision)
            after = self._run(self.after, step.inputs, precision)
            for index, (old, new) in enumerate(zip(before[1:], after, strict=True)):
                self._compare(f"cache {index}", old, new, precision)

    def paged(self) -> None:
        """In one step, and in two: the sequences but for their last tokens, then those."""
        whole = self._paged_step()
        for precision in PRECISIONS:
            expected = self._run(self.before, [whole.input_ids, whole.position_ids], precision)[0]
            logits, *caches = self._run(self.after, whole.inputs, precision)
            for sequence, length in enumerate(whole.lengths.tolist()):
                at = f"sequence {sequence} of {length} tokens"
                self._compare(at, expected[sequence, :length], logits[sequence, :length], precision)
            self._compare_unused(whole, caches)

            first = _without_last_tokens(whole)
            _, *caches = self._run(self.after, first.inputs, precision)
            last = _last_tokens(whole, caches)
            logits = self._run(self.after, last.inputs, precision)[0]
            for sequence, length in enumerate(whole.lengths.tolist()):
                at = f"token {length - 1} of sequence {sequence}, in a step of its own"
                self._compare(at, expected[sequence, length - 1], logits[sequence, 0], precision)

    # --- inputs ---

    def _inputs(self) -> list[Tensor]:
        forward = functions(self.before)[FORWARD]
        if paged_inputs(forward) is not None:
            return self._step().inputs
        sizes = self._sizes()
        inputs = []
        for index, type in enumerate(_whole_types(forward)):
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in dims_of(type)]
            if dtype_of(type) == i32:
                limit = _vocabulary(self.before)
                inputs.append(_random_ints(shape, limit, self._generator(str(index))))
            else:
                values = torch.randn(shape, generator=self._generator(str(index)))
                inputs.append(values.to(TORCH_DTYPES[dtype_of(type)]))
        return inputs

    def _sizes(self) -> Mapping[str, int]:
        if isinstance(self.one, SpecializeBucketPass):
            return {**self.one.sizes, "slots": 2 * self.one.batch * self.one.length}
        batch, seq, attn = (int(x) for x in torch.randint(1, 6, (3,), generator=self._generator()))
        return {"batch": batch, "seq": seq, "attn": seq + attn}

    def _step(self) -> Step:
        """A step that fits the program's argument types, specialised or not."""
        forward = functions(self.before)[FORWARD]
        sizes = self._sizes()
        batch, tokens = (sizes.get(str(dim), dim) for dim in dims_of(forward.args[INPUT_IDS]))
        inputs = paged_inputs(forward)
        assert inputs is not None
        keys = dims_of(inputs.block_table)[1]
        keys = sizes[keys] if isinstance(keys, str) else keys
        whole = _whole_types(forward)[FIRST_CACHE:]
        caches = [dims_of(cache)[1:] for cache in whole]
        types = [TORCH_DTYPES[dtype_of(cache)] for cache in whole]
        return self._make_step(int(batch), int(tokens), keys, caches, types)

    def _paged_step(self) -> Step:
        """All tokens of each sequence, for a program that has just been given caches."""
        sizes = self._sizes()
        args = functions(self.after)[FORWARD].args[FIRST_CACHE:]
        caches = [dims_of(cache)[1:] for cache in args]
        types = [TORCH_DTYPES[dtype_of(cache)] for cache in args]
        tokens = max(sizes["seq"], 2)
        return self._make_step(sizes["batch"], tokens, tokens + 2, caches, types)

    def _make_step(
        self,
        batch: int,
        tokens: int,
        keys: int,
        caches: Sequence[tuple[int | str, ...]],
        types: Sequence[torch.dtype],
    ) -> Step:
        """Prompts from position 0 on; or, with one token, the next one of sequences that have
        random keys and values in their slots already."""
        generator = self._generator("step")
        decode = tokens == 1
        lengths = torch.randint(1, (keys if decode else tokens) + 1, (batch,), generator=generator)
        slots = int(lengths.sum()) + SPARE_SLOTS
        order = torch.randperm(slots, generator=generator).int()
        mapping = torch.full((batch, tokens), PADDING_SLOT, dtype=torch.int32)
        table = torch.full((batch, keys), NO_SLOT, dtype=torch.int32)
        used = 0
        for sequence, length in enumerate(lengths.tolist()):
            own = order[used : used + length]
            used += length
            table[sequence, :length] = own
            mapping[sequence, : len(own[-tokens:])] = own[-tokens:]
        positions = torch.arange(tokens).repeat(batch, 1)
        if decode:
            positions = lengths[:, None] - 1
        written = order[:used].long()
        return Step(
            _random_ints((batch, tokens), _vocabulary(self.before), generator),
            positions.int(),
            mapping,
            table,
            lengths.int(),
            tuple(
                _random_cache(
                    (slots, *map(int, dims)), dtype, written if decode else None, generator
                )
                for dims, dtype in zip(caches, types, strict=True)
            ),
        )

    def _generator(self, name: str = "") -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def _parameter(self, module: ModuleOp, precision: Precision, name: str) -> Tensor:
        """Of order one, at a scale that keeps activations there."""
        type = parameters(module)[name].type
        if module is self.before and name in self._quantized:
            values = self._dequantized(self._quantized[name])
            return values if precision != "model" else values.to(TORCH_DTYPES[dtype_of(type)])
        shape, dtype = shape_of(type), TORCH_DTYPES[dtype_of(type)]
        noise = torch.randn(shape, generator=self._generator(name))
        value = 1 + 0.1 * noise if len(shape) < 2 else noise * shape[-1] ** -0.5
        if dtype_of(type) in CODES_TENSOR.dtypes:
            value = value / UNIT
        elif name in self._scales:
            value = UNIT * (1 + 0.1 * noise).abs()
        return value.to(dtype)

    @cached_property
    def _scales(self) -> frozenset[str]:
        return scale_parameters(self.before) | scale_parameters(self.after)

    @cached_property
    def _quantized(self) -> dict[str, list[quant.LinearOp]]:
        """Weights that the pass has made codes, with the ops that multiply them or their rows."""
        if self.one.relation != Relation.QUANTIZED:
            return {}
        plain = {
            name
            for name, op in parameters(self.before).items()
            if dtype_of(op.type) not in CODES_TENSOR.dtypes
        }
        linears = (op for op in self.after.walk() if isinstance(op, quant.LinearOp))
        named: dict[str, list[quant.LinearOp]] = {}
        for op in linears:
            named.setdefault(_parameter_of(op.w), []).append(op)
        return {name: ops for name, ops in named.items() if name in plain}

    def _dequantized(self, ops: Sequence[quant.LinearOp]) -> Tensor:
        """What a weight's codes and scales stand for, in f32; each product says it of its rows."""
        codes = self._parameter(self.after, "model", _parameter_of(ops[0].w)).float()
        values = codes.clone()
        for op in ops:
            scale = self._parameter(self.after, "model", _parameter_of(op.w_scale))
            n, k = shape_of(op.w)
            multipliers = quant_semantics.spread_over_blocks(
                _rows_of(op.w_scale, scale), (n, k), op.block
            )
            _rows_of(op.w, values).copy_(_rows_of(op.w, codes) * multipliers)
        return values

    # --- running and comparing ---

    def _run(
        self, module: ModuleOp, inputs: Sequence[Tensor], precision: Precision
    ) -> list[Tensor]:
        """What the module gives for whole inputs, put together if it is cut over ranks."""
        mesh, source = mesh_of(module), partial(self._parameter, module, precision)
        if mesh is None:
            return interpreter.run(module, FORWARD, inputs, source, precision=precision)
        cuts, _ = cuts_of(functions(module)[FORWARD])
        parts = [
            tuple(x if cut is None else take(cut, x, rank) for rank in range(mesh.ranks))
            for x, cut in zip(inputs, cuts, strict=True)
        ]
        results = run_ranks(module, FORWARD, parts, source, precision=precision)
        return self._whole_results(module, results)

    def _whole_results(self, module: ModuleOp, results: Sequence[Ranks]) -> list[Tensor]:
        _, cuts = cuts_of(functions(module)[FORWARD])
        for index, (ranks, cut) in enumerate(zip(results, cuts, strict=True)):
            differing = None if cut else next((x for x in ranks if _differ(x, ranks[0])), None)
            if differing is not None:
                self._broken(f"result {index} is not the same on all ranks")
        pairs = zip(results, cuts, strict=True)
        return [ranks[0] if cut is None else assemble(cut, ranks) for ranks, cut in pairs]

    def _compare_unused(self, step: Step, caches: Sequence[Tensor]) -> None:
        """Slots that no token was mapped to hold what they held."""
        untouched = torch.ones(len(caches[0]), dtype=torch.bool)
        untouched[step.slot_mapping[step.slot_mapping >= 0].long()] = False
        for index, cache in enumerate(caches):
            if not cache[untouched].isnan().all():
                self._broken(f"cache {index}: a slot without a token was written")

    def _compare(self, at: str, old: Tensor, new: Tensor, precision: Precision) -> None:
        problem = difference(old, new, self.one.contract.tolerance, precision)
        if problem:
            self._broken(f"{at} (precision {precision}): {problem}")

    def _broken(self, what: str) -> None:
        tolerance = str(self.one.contract.tolerance)
        raise errors.contract_broken(self.one.name, what, f"{self.one.relation.value}; {tolerance}")


def _parameter_of(value: SSAValue) -> str:
    """The parameter that a value is, or is some rows of."""
    if isinstance(value.owner, nn.SliceOp):
        return _parameter_of(value.owner.x)
    assert isinstance(value.owner, nn.GetParameterOp), value
    return value.owner.parameter_name


def _rows_of(value: SSAValue, parameter: Tensor) -> Tensor:
    """The rows of a parameter that a value is, as a view."""
    if not isinstance(value.owner, nn.SliceOp):
        return parameter
    return parameter[value.owner.start.value.data : value.owner.end.value.data]


def _differ(x: Tensor, y: Tensor) -> bool:
    return difference(x, y, Bitwise()) is not None


def _names(results: Sequence[Tensor]) -> list[str]:
    return ["logits", *(f"cache {index}" for index in range(len(results) - 1))]


def _whole_types(forward: FuncOp) -> list[Attribute]:
    """The types of @forward's arguments, those that are cut put together."""
    pairs = zip(forward.args, cuts_of(forward)[0], strict=True)
    return [x.type if cut is None else cut.whole_type(x.type) for x, cut in pairs]


def _vocabulary(module: ModuleOp) -> int:
    """Ids below this are rows of every embedding table."""
    rows = [
        op.ids.owner.cut.whole_size
        if isinstance(op.ids.owner, LocalRowsOp)
        else shape_of(op.table)[0]
        for op in module.walk()
        if isinstance(op, nn.EmbeddingOp)
    ]
    return min(rows, default=8)


def _random_ints(shape: Sequence[int], limit: int, generator: torch.Generator) -> Tensor:
    return torch.randint(limit, tuple(shape), generator=generator, dtype=torch.int32)


def _random_cache(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    written: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    cache = torch.full(shape, torch.nan)
    if written is not None:
        cache[written] = torch.randn((len(written), *shape[1:]), generator=generator)
    return cache.to(dtype)


def _without_last_tokens(step: Step) -> Step:
    """The same sequences, each one token shorter."""
    mapping = step.slot_mapping.clone()
    for sequence, length in enumerate(step.lengths.tolist()):
        mapping[sequence, length - 1] = PADDING_SLOT
    return replace(step, slot_mapping=mapping, lengths=step.lengths - 1)


def _last_tokens(step: Step, caches: Sequence[Tensor]) -> Step:
    """The last token of each sequence, as a step of one token."""
    last = step.lengths.long()[:, None] - 1
    return Step(
        step.input_ids.gather(1, last),
        step.position_ids.gather(1, last),
        step.slot_mapping.gather(1, last),
        step.block_table,
        step.lengths,
        tuple(caches),
    )


# --- tolerances ---


def difference(
    old: Tensor, new: Tensor, tolerance: Tolerance, precision: Precision = "model"
) -> str | None:
    """In what two tensors differ more than they may; None if they do not."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{list(old.shape)} {old.dtype} became {list(new.shape)} {new.dtype}"
    if not torch.equal(old.isnan(), new.isnan()):
        return "NaN in other places"
    old, new = (torch.where(x.isnan(), torch.zeros_like(x), x) for x in (old, new))
    match tolerance:
        case Bitwise():
            return None if _ulps(old, new) == 0 else _largest(old, new)
        case Ulps(count):
            return None if _ulps(old, new) <= count else f"{_ulps(old, new)} ulps"
        case Budget(relative=relative, relative_float32=relative_float32):
            allowed = relative if precision == "model" else relative_float32
            scale = float(old.double().abs().max()) if old.numel() else 0.0
            error = float((old.double() - new.double()).abs().max()) if old.numel() else 0.0
            return (
                None
                if error <= allowed * scale
                else f"an error of {error} where {scale} is the largest value"
            )


def _ulps(old: Tensor, new: Tensor) -> int:
    """The largest distance, counted in representable numbers; -0.0 and 0.0 are one apart."""
    if not old.dtype.is_floating_point:
        return int((old.long() - new.long()).abs().max()) if old.numel() else 0
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = sizes[old.element_size()]

    def rank(x: Tensor) -> Tensor:
        bits = x.contiguous().view(integer).long()
        lowest = torch.iinfo(integer).min
        return torch.where(bits < 0, lowest - bits - 1, bits)

    return int((rank(old) - rank(new)).abs().max()) if old.numel() else 0


def _largest(old: Tensor, new: Tensor) -> str:
    error = float((old.double() - new.double()).abs().max())
    return f"not equal: the largest difference is {error}"
