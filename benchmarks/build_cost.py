"""Time and memory of builds, the interpreter's start and all imports included.

    python benchmarks/build_cost.py [--rounds 3] [--case seed]

Each command runs as a process of its own; memory is the largest proportional set size (PSS) that
it and its children had together, sampled every 20 ms. Printed are medians, and the goals; time of
processors says more than seconds while other work runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
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


SEED = """
    --devices npu:0 --name mlperf-llama3-1-8b-fp8 -tp 4 -pp 1
    -pb 1,512 -pb 1,1024 -db 1,2048 -db 8,2048 -db 16,2048 -db 64,2048 -db 128,2048
    --paged-attention-num-blocks 512000
    --additional-model-config calculate_logit_only_for_last_token=True
    --num-pipeline-builder-workers 4 --num-compile-workers 4 --weights skip
"""
"""The command of the vendor's page, but for directories and weights."""

LINEARS = {
    **{f"self_attn.{name}_proj": 4096 for name in "qo"},
    **{f"self_attn.{name}_proj": 1024 for name in "kv"},
    **{f"mlp.{name}_proj": 14336 for name in ("gate", "up")},
    "mlp.down_proj": 4096,
}
"""Linear layers of a block of Llama-3.1-8B, with their features."""


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    megabytes: float
    processor_seconds: float = 0.0


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
    quantized = write_quantization(directory / "quantized", layers=32)
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
        Case(
            "the seed's command: Llama-3.1-8B in FP8, TP 4, 7 buckets",
            [
                [
                    *("build", str(directory / "seed"), "--model-id", str(llama)),
                    *("--quantization-artifact-path", str(quantized), *SEED.split()),
                ]
            ],
            Cost(180, 3000),
        ),
        Case(
            "the seed's command in bf16",
            [["build", str(directory / "bf16"), "--model-id", str(llama), *SEED.split()]],
            Cost(180, 3000),
        ),
    ]


def write_quantization(directory: Path, layers: int) -> Path:
    """A directory as Furiosa's quantiser writes it, with made-up ranges."""
    ranges = {}
    for layer in range(layers):
        for name, features in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            ranges[f"{module}._weight_quantizer"] = {"amax": np.ones(features, np.float32)}
            ranges[f"{module}._input_quantizer"] = {"amax": np.ones((), np.float32)}
        for number in (2 * layer, 2 * layer + 1):
            product = f"matmul_{number}" if number else "matmul"
            ranges[f"{product}._input_1_quantizer"] = {"amax": np.ones(1, np.float32)}
    directory.mkdir()
    types = "--weight_dtype fp8-E4M3 --act_dtype fp8-E4M3 --kv_dtype fp8-E4M3"
    (directory / "qformat.yaml").write_text(f"# {types}\n")
    np.save(directory / "qparam.npy", np.array(ranges, object), allow_pickle=True)
    return directory


def measure(arguments: Sequence[str]) -> Cost:
    """Run one `furiosa-llm` command to its end. Fails if it does."""
    command = [str(Path(sys.executable).with_name("furiosa-llm")), *arguments]
    began, before, peak = time.perf_counter(), processor_seconds(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, pss_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    output = Path(arguments[1] if "--model-id" in arguments else arguments[2])
    if arguments[0] == "build" and not (output / "manifest.json").exists():
        raise SystemExit(f"{' '.join(arguments)} wrote no artifact")
    return Cost(time.perf_counter() - began, peak / 1e6, processor_seconds() - before)


def processor_seconds() -> float:
    """Of all processes that were started here and have ended, with those that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    parser.add_argument("--case", default="", help="part of a name; by default all cases")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        for case in cases(Path(directory)):
            if options.case not in case.name:
                continue
            costs = [[measure(command) for command in case.commands] for _ in range(options.rounds)]
            seconds = median(sum(cost.seconds for cost in round_) for round_ in costs)
            megabytes = median(max(cost.megabytes for cost in round_) for round_ in costs)
            processors = median(sum(cost.processor_seconds for cost in round_) for round_ in costs)
            reached = seconds <= case.goal.seconds and megabytes <= case.goal.megabytes
            print(
                f"{case.name}: {seconds:.1f} s ({processors:.1f} s of processors), "
                f"{megabytes:.0f} MB "
                f"(goal {case.goal.seconds:.0f} s, {case.goal.megabytes:.0f} MB: "
                f"{'reached' if reached else 'MISSED'})"
            )


if __name__ == "__main__":
    main()
