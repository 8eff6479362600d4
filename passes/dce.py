"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp

from .contract import Bitwise, Contract, ContractPass, Relation
from .rewriting import erase_dead_code


@dataclass(frozen=True)
class DcePass(ContractPass):
    """Erase what no output depends on.

    Before: `%1 = nn.neg %0` without a use; a private function without a call; a parameter
    that is never read.
    After:  all of them gone. Arguments of functions stay.
    """

    name = "dce"
    contract: ClassVar[Contract] = Contract("any module", Relation.SAME, Bitwise())

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        erase_dead_code(op)
