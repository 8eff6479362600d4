"""The vector engine's units: what each computes and where it stands in the pipeline."""

from __future__ import annotations

from .vector_fields import Alu, Op

ALU_OPS: dict[Alu, tuple[Op, ...]] = {
    Alu.LOGIC_AND: (Op.AND,),
    Alu.LOGIC_OR: (Op.OR,),
    Alu.LOGIC_XOR: (Op.XOR,),
    Alu.LOGIC_LSHIFT: (Op.SHL,),
    Alu.LOGIC_RSHIFT: (Op.SHR, Op.SAR),
    Alu.FXP_ADD: (Op.IADD, Op.ISUB, Op.IADD_SAT, Op.ISUB_SAT),
    Alu.FXP_LSHIFT: (Op.SHL, Op.SHL_SAT),
    Alu.FXP_MUL: (Op.IMUL, Op.MUL_FXP),
    Alu.FXP_RSHIFT: (Op.SHR, Op.SAR, Op.SAR_ROUND),
    Alu.FXP_TO_FP: (Op.ITOF,),
    Alu.FMA: (Op.ADD, Op.SUB, Op.MUL, Op.FMA),
    Alu.FPU: (Op.DIV, Op.SQRT, Op.TANH, Op.SIGMOID, Op.ERF, Op.LOG, Op.SIN, Op.COS),
    Alu.EXP: (Op.EXP, Op.NEGEXP),
    Alu.MUL0: (Op.MUL,),
    Alu.MUL1: (Op.MUL,),
    Alu.FP_DIV: (Op.DIV,),
    Alu.FP_TO_FXP: (Op.FTOI,),
    Alu.CLIP_ADD: (Op.ADD, Op.IADD, Op.IADD_SAT),
    Alu.CLIP_MAX: (Op.MAX, Op.IMAX, Op.ABSMAX, Op.IABSMAX),
    Alu.CLIP_MIN: (Op.MIN, Op.IMIN, Op.ABSMIN, Op.IABSMIN),
}
STAGE = {
    **dict.fromkeys(list(Alu)[0:5], 0),
    **dict.fromkeys(list(Alu)[5:9], 1),
    Alu.FXP_TO_FP: 2,
    **dict.fromkeys(list(Alu)[10:15], 3),
    Alu.FP_DIV: 5,
    Alu.FP_TO_FXP: 6,
    **dict.fromkeys(list(Alu)[17:20], 7),
}
"""Pipeline stage of each unit; the reducer is stage 4. Inside a stage the order is free."""
REDUCE_STAGE = 4
CONVERSIONS = {Op.ITOF, Op.FTOI}
UNARY = {
    Op.SQRT,
    Op.TANH,
    Op.SIGMOID,
    Op.ERF,
    Op.LOG,
    Op.SIN,
    Op.COS,
    Op.EXP,
    Op.NEGEXP,
} | CONVERSIONS
REVERSIBLE = {Op.SUB, Op.ISUB, Op.ISUB_SAT, Op.DIV}
