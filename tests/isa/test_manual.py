"""docs/isa.md: its tables are those of the code, its example does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from error_bounds import Approx
from run_commands import make_program, run_program

from furiosa_llm.backend_rngd.isa.assembly import format_command, parse_command
from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.instructions import Dma, Exec
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.runtime_sim.timing import time_program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "isa.md").read_text(encoding="utf-8")
BOOK = load_machine("book")


def worked_example() -> list[Exec | Dma]:
    commands = []
    for text in re.findall(r"```asm\n(.*?)\n```", PAGE, re.DOTALL):
        command = parse_command(text)
        assert isinstance(command, Exec | Dma)
        assert format_command(command) == text
        commands.append(command)
    return commands


def test_the_tables_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_isa.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    advice = "run `make docs`"
    assert result.returncode == 0, f"{result.stdout}{result.stderr}{advice}"


def test_the_worked_example_multiplies() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1024, 64)).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((8, 64)).astype(ml_dtypes.bfloat16)
    inputs = {"w": w, "x": x}
    program = make_program(
        worked_example(), inputs, {"y": np.zeros((64, 8, 16), ml_dtypes.bfloat16)}
    )
    y = run_program(program, inputs)["y"].astype(np.float64)
    # 64 exact products summed in f32, then one rounding to bf16.
    expected = Approx.exact(x).linear(w.astype(np.float64))
    expected.check_bf16(y.transpose(1, 0, 2).reshape(8, 1024))


def test_the_worked_example_takes_the_cycles_that_the_page_says() -> None:
    commands = worked_example()
    cycles = [
        (
            exec_cost(plan_exec(c, "page"), BOOK)
            if isinstance(c, Exec)
            else dma_cost(plan_dma(c, "page"), BOOK)
        ).total_cycles
        for c in commands
    ]
    program = make_program(
        commands,
        {
            "w": np.zeros((1024, 64), ml_dtypes.bfloat16),
            "x": np.zeros((8, 64), ml_dtypes.bfloat16),
        },
        {"y": np.zeros((64, 8, 16), ml_dtypes.bfloat16)},
    )
    total = time_program(program, BOOK).cycles
    said = re.search(
        r"commands 1 to 5 take ([\d, and]+) cycles.*?: ([\d,]+) cycles", PAGE, re.DOTALL
    )
    assert said is not None
    assert [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d", said[1])] == cycles
    assert int(said[2].replace(",", "")) == total - 2600
