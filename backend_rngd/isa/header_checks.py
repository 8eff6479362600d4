"""What a header's schema cannot say: each index points at something, sizes and ranks agree."""

from __future__ import annotations

from ... import errors
from .instructions import Control, Dma, Exec, Space
from .layout import RankNumbers
from .program import Block, Program, Region, Relocation, StageCut, TensorIo, io_dtype
from .rank_rules import partners
from .registers import BlockRegisters


def check_references(name: str, program: Program) -> None:
    """Every index in the header points at something. Raises: VED004."""
    header, n = program.header, len(program.commands)
    for i, region in enumerate(header.regions):
        kinds = region.model_dump(exclude_none=True, exclude={"name"})
        if len(kinds) != 1:
            raise errors.bad_header(name, f"regions.{i}", "a region has exactly one content")
        if region.parameter is not None:
            _check_relocation(name, f"regions.{i}.parameter", region.parameter)
        for io in filter(None, (region.input, region.output)):
            _check_io(name, f"regions.{i}", io)
        _check_ranks(name, f"regions.{i}", region, header.tensor_parallel_size)
    for i, block in enumerate(header.blocks):
        if block.first + block.count > n:
            raise errors.bad_header(name, f"blocks.{i}", f"the issue list has {n} entries")
        for entry, command in enumerate(program.block_commands(block)):
            if isinstance(command, Control):
                continue
            if command.head.provenance >= len(block.provenance):
                raise errors.bad_header(name, f"blocks.{i}.provenance", "a command has no entry")
            _check_partners(name, program, block, entry, command)
    registers = [BlockRegisters.of(program.block_commands(block)) for block in header.blocks]
    for i, found in enumerate(registers):
        if found.problem is not None:
            raise errors.bad_header(name, f"blocks.{i}", found.problem)
    for i, call in enumerate(header.calls):
        if call.block >= len(header.blocks):
            raise errors.bad_header(name, f"calls.{i}.block", "no such block")
        if call.successor is not None and call.successor >= len(header.calls):
            raise errors.bad_header(name, f"calls.{i}.successor", "no such call")
        if call.successor is None and any(
            entry.successor for entry in header.blocks[call.block].provenance
        ):
            raise errors.bad_header(name, f"calls.{i}.successor", "its block loads for one")
        if any(b.region >= len(header.regions) for b in call.bindings):
            raise errors.bad_header(name, f"calls.{i}.bindings", "no such region")
        problem = registers[call.block].problem_of([b.register_number for b in call.bindings])
        if problem is not None:
            raise errors.bad_header(name, f"calls.{i}.bindings", problem)
    for i, cut in enumerate(header.stage_cuts):
        problem = _problem_of_cut(program, cut)
        if problem is not None:
            raise errors.bad_header(name, f"stage_cuts.{i}", problem)
    numbers = [cut.call for cut in header.stage_cuts]
    if numbers != sorted(set(numbers)):
        raise errors.bad_header(name, "stage_cuts", "cuts come in the order of their calls")


def _problem_of_cut(program: Program, cut: StageCut) -> str | None:
    """What a cut names that does not exist."""
    if not 0 < cut.call < len(program.calls):
        return "a stage begins between two calls"
    for piece in cut.sends:
        if piece.region >= len(program.regions):
            return "no such region"
        region = program.regions[piece.region]
        sent = region.output is not None or region.scratch_bytes is not None
        if not sent or piece.offset + piece.size > region.bytes_for(slots=0):
            return f"the bytes of {region.name} that are sent are not what calls write"
    for reload in cut.reloads:
        if reload.call >= cut.call:
            return "a stage loads again what calls before it have loaded"
        block = program.blocks[program.calls[reload.call].block]
        if reload.entry >= block.count:
            return "no such entry"
        c = program.commands[block.first + reload.entry]
        if not isinstance(c, Dma) or (c.source.space, c.destination.space) != (
            Space.HBM,
            Space.DM,
        ):
            return "a stage loads again by transfers from HBM to data memory"
    return None


def _check_partners(name: str, program: Program, block: Block, entry: int, c: Exec | Dma) -> None:
    """Every rank has the partners that the command names. Raises: VED004, VED014."""
    ranks = program.header.tensor_parallel_size
    for side in (c.source, c.destination) if isinstance(c, Dma) else ():
        if side.rank_mask >= ranks or (side.rank_stride and ranks == 1):
            cause = "an address depends on ranks that do not exist"
            raise errors.bad_header(name, f"{block.name}[{entry}]", cause)
    for mask, what in partners(c):
        if mask >= ranks:
            module = block.provenance[c.head.provenance].path or block.name
            raise errors.missing_partner(name, f"{block.name}[{entry}]", module, what, mask, ranks)


def _check_relocation(name: str, where: str, relocation: Relocation) -> None:
    cut, begin, end = relocation.cut, relocation.begin, relocation.end
    if cut is not None and (
        cut.dim >= len(relocation.shape) or cut.end > relocation.shape[cut.dim]
    ):
        raise errors.bad_header(name, where, "the cut does not lie inside the tensor's shape")
    shape = relocation.local_shape
    if not len(shape) == len(begin) == len(end) or any(
        not b < e <= n for n, b, e in zip(shape, begin, end, strict=False)
    ):
        raise errors.bad_header(name, where, "the bounds do not lie inside the tensor's shape")
    extents = tuple(e - b for b, e in zip(begin, end, strict=True))
    if extents != relocation.layout.tensor_shape:
        raise errors.bad_header(name, where, "the layout is for another shape than the bounds")


def _check_ranks(name: str, where: str, region: Region, ranks: int) -> None:
    """What a region says of ranks it says of all of them. Raises: VED004."""
    parameter, derived, output = region.parameter, region.derived, region.output
    if isinstance(derived, RankNumbers) and len(derived.numbers) != ranks:
        raise errors.bad_header(name, f"{where}.derived", f"one number for each of {ranks} ranks")
    if region.input is not None and region.input.cut is not None:
        raise errors.bad_header(name, f"{where}.input.cut", "all ranks get all of an input")
    cuts = [content.cut for content in (parameter, output) if content is not None]
    if any(cut is not None and len(cut.slots) != ranks for cut in cuts):
        raise errors.bad_header(name, where, f"a cut has a part for each of {ranks} ranks")
    if output is not None and output.cut is not None:
        cut = output.cut
        fits = cut.dim < len(output.shape) and output.shape[cut.dim] == cut.local_size
        if not fits or not cut.covers():
            raise errors.bad_header(name, f"{where}.output.cut", "its parts are not the output")


def _check_io(name: str, where: str, io: TensorIo) -> None:
    element_bytes = io_dtype(io).bytes_for(1)
    if not io.shape or io.element_bytes < element_bytes:
        raise errors.bad_header(name, where, f"an element of {io.dtype} has {element_bytes} bytes")
    if (io.shape[-1] - 1) * io.element_bytes + element_bytes > io.row_bytes:
        raise errors.bad_header(name, where, "a row is shorter than its elements")
