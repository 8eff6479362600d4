"""Time and memory of builds, the interpreter's start and all imports included.

    python benchmarks/build_cost.py [--rounds 3]

Each command runs as a process of its own; memory is the largest proportional set size (PSS) that
it and its children had together, sampled every 20 ms. Printed are medians, and the goals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

SAMPLE_SECONDS = 0.02

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Case:
    """Commands that are measured together, and their goals."""

    name: str
    commands: Sequence[Sequence[str]]
    goal: Cost


def cases(directory: Path) -> list[Case]:
    from furiosa_llm.models.demo import demo_model_path

    llama = directory / "llama-3.1-8b"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    small, large = str(directory / "small"), str(directory / "large")
    buckets = ["-pb", "1,128", "-db", "1,256", "-db", "4,256"]
    skip = ["-pb", "1,512", "-db", "1,1024", "--weights", "skip"]
    return [
        Case(
            "SmolLM2-135M, 3 buckets",
            [["build", str(demo_model_path()), small, *buckets]],
            Cost(20, 1200),
        ),
        Case(
            "Llama-3.1-8B from its config, 2 buckets, and profile",
            [["build", str(llama), large, *skip], ["profile", large, "--json"]],
            Cost(90, 2500),
        ),
    ]


def measure(arguments: Sequence[str]) -> Cost:
    """Run one `furiosa-llm` command to its end. Fails if it does."""
    command = [str(Path(sys.executable).with_name("furiosa-llm")), *arguments]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, pss_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    if arguments[0] == "build" and not (Path(arguments[2]) / "manifest.json").exists():
        raise SystemExit(f"{' '.join(arguments)} wrote no artifact")
    return Cost(time.perf_counter() - began, peak / 1e6)


def pss_bytes(pid: int) -> int:
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # it has just ended: the last sample stands
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        for case in cases(Path(directory)):
            costs = [[measure(command) for command in case.commands] for _ in range(options.rounds)]
            seconds = median(sum(cost.seconds for cost in round_) for round_ in costs)
            megabytes = median(max(cost.megabytes for cost in round_) for round_ in costs)
            reached = seconds <= case.goal.seconds and megabytes <= case.goal.megabytes
            print(
                f"{case.name}: {seconds:.1f} s, {megabytes:.0f} MB "
                f"(goal {case.goal.seconds:.0f} s, {case.goal.megabytes:.0f} MB: "
                f"{'reached' if reached else 'MISSED'})"
            )


if __name__ == "__main__":
    main()
