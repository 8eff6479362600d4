"""What a pass promises: when it may run, how the program after it relates to the one before.

`contract_check` holds a pass to its contract with the reference interpreter.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeAlias

from xdsl.passes import ModulePass


class Relation(Enum):
    """How inputs and outputs of @forward after the pass correspond to those before."""

    SAME = "same inputs, same outputs"
    PAGED = (
        "KV caches, slot mapping, block table and lengths are added; a token's logits are those "
        "of the whole sequence up to it, in whatever steps and slots it was computed"
    )
    LAST_TOKEN = "of the logits only each sequence's last token is left"
    NO_LOGITS = "the logits are gone, the caches are the same"
    SHARDED = "same inputs, same outputs, those that are cut put together from the ranks' parts"
    QUANTIZED = (
        "same inputs, same outputs, for weights that are what the codes and scales of the "
        "parameters after the pass stand for"
    )
    SPECIALIZED = "same inputs, same outputs, for inputs of the bucket's sizes only"


@dataclass(frozen=True)
class Bitwise:
    """Equal bits; a NaN equals any NaN."""


@dataclass(frozen=True)
class Ulps:
    """At most `count` representable numbers of the result's type apart."""

    count: int


@dataclass(frozen=True)
class Budget:
    """An error relative to the largest magnitude in the tensor, because of `reason`."""

    reason: str
    relative: float
    """With the element types that the program names."""
    relative_float32: float
    """With every float in f32 and no codes, where rounding hides no mistake."""


Tolerance: TypeAlias = Bitwise | Ulps | Budget


@dataclass(frozen=True)
class Contract:
    """A pass's promise; `precondition` says which modules it may be run on."""

    precondition: str
    relation: Relation
    tolerance: Tolerance


class ContractPass(ModulePass, ABC):
    """A pass with a contract; subclasses are frozen dataclasses whose fields are its options."""

    name: ClassVar[str]
    contract: ClassVar[Contract]

    @property
    def relation(self) -> Relation:
        """The contract's, unless an option changes it."""
        return self.contract.relation
