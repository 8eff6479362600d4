"""SmolLM2-135M in FP8 (weights, inputs, KV caches): tokens and perplexity against its library.

    python benchmarks/quantized_quality.py [--tokens 24] [--windows 48]

compressed-tensors quantises the model: scales per tensor, static inputs and caches, ranges from
running one page of this repository. The same library executes it, in f32 and in bf16: the two
references. Simulated binaries answer three prompts and give the logits of other pages.

Goals: tokens are equal, or part where the references' own rounding cannot tell (the token-equality
rule); perplexity within 0.5 % of the f32 reference. A code is the nearest of few, so that rounding
to bf16 before it flips codes: logits of bf16 and f32 are 1 apart (RMS), without FP8 0.13. The mean
over a text knows the difference of perplexities only as well as its standard error says, which is
printed beside it: 0.65 % for 8 windows, 0.20 % for 48.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from torch import Tensor

from furiosa_llm import LLM, ArtifactBuilder, SamplingParams
from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.frontend.source import open_model
from furiosa_llm.llm.device import SimulatedDevice
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.models.demo import demo_model_path

ROOT = Path(__file__).parents[1]
CALIBRATION = ROOT / "docs" / "architecture.md"
CALIBRATION_WINDOWS = 8
TEXTS = ("LICENSE", "CONTRIBUTING.md", "README.md", "docs/isa.md", "docs/cycles.md")
WINDOW = 512
"""Tokens of a text, each of which sees those before it."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "The lighthouse stood on the last rock before the open sea. Every evening the keeper",
)
LARGEST_CODE = 448.0
TIE_FACTOR = 3.0
PERPLEXITY_GOAL = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each prompt")
    parser.add_argument("--windows", type=int, default=48, help=f"texts of {WINDOW} tokens")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as directory:
        compare(Path(directory), options.tokens, options.windows)


def compare(directory: Path, count: int, windows: int) -> None:
    """Print both comparisons."""
    checkpoint, artifact = directory / "checkpoint", directory / "artifact"
    write_checkpoint(checkpoint)
    builder = ArtifactBuilder(
        checkpoint,
        prefill_buckets=[(1, WINDOW)],
        decode_buckets=[(1, WINDOW)],
        calculate_logit_only_for_last_token=False,
    )
    builder.build(artifact)
    llm = LLM.load_artifact(artifact)
    exact, rounded = (reference(checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16))
    for prompt in PROMPTS:
        print(compared_tokens(llm, exact, rounded, llm.tokenizer.encode(prompt), count))
    text = "\n".join((ROOT / name).read_text() for name in TEXTS)
    texts = windows_of(llm.tokenizer.encode(text), windows)
    compare_perplexity(simulated(artifact), exact, rounded, texts)


def windows_of(ids: Sequence[int], count: int) -> list[Sequence[int]]:
    """The first `count` windows of a text; ValueError if it is too short for them."""
    if len(ids) < count * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens, not {count} x {WINDOW}")
    return [ids[first : first + WINDOW] for first in range(0, count * WINDOW, WINDOW)]


def reference(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The library's own execution."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


# --- the checkpoint ---


def write_checkpoint(directory: Path) -> None:
    """W8A8KV8 as the library writes it, with the tokenizer beside it."""
    source = open_model(demo_model_path())
    model = demo_model(source)
    directory.mkdir()
    for name, content in source.tokenizer_files.items():
        (directory / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(CALIBRATION.read_text())["input_ids"]
    ranges = observed_ranges(model, windows_of(ids, CALIBRATION_WINDOWS))
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme("FP8", ["Linear"])},
        ignore=["lm_head"],
        kv_cache_scheme=QuantizationArgs(num_bits=8, type="float", strategy="tensor"),
    )
    apply_quantization_config(model, config, show_progress=False)
    for name, module in model.named_modules():
        fill_scales(name, module, ranges)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


def demo_model(source: Any) -> Any:
    """The model of a GGUF file in bf16."""
    model: Any = transformers.LlamaForCausalLM(source.config)
    state = {
        name: torch.from_numpy(source.checkpoint.read(name).astype(np.float32))
        for name in source.checkpoint.tensors
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.to(torch.bfloat16).eval()


def observed_ranges(model: Any, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Module -> largest magnitude of its inputs, and with `:out` of its outputs.

    Keys are turned after their projection, which keeps the length of each pair of features, so
    that one feature grows at most by the square root of two.
    """
    ranges: dict[str, float] = defaultdict(float)

    def observe(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for key, values in ((name, inputs[0]), (f"{name}:out", output)):
                ranges[key] = max(ranges[key], float(values.abs().max()))

        return hook

    with hooked(model, observe), torch.no_grad():
        for ids in texts:
            model(torch.tensor([list(ids)]))
    return ranges


@contextmanager
def hooked(model: Any, hook_of: Callable[[str], Any]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    yield
    for handle in handles:
        handle.remove()


def fill_scales(name: str, module: Any, ranges: dict[str, float]) -> None:
    """The scales that the library has made room for."""
    if getattr(module, "quantization_scheme", None) is None:
        return
    largest: dict[str, Callable[[], float]] = {
        "input_scale": lambda: ranges[name],
        "weight_scale": lambda: float(module.weight.detach().abs().max()),
        "k_scale": lambda: ranges[f"{name}.k_proj:out"] * 2**0.5,
        "v_scale": lambda: ranges[f"{name}.v_proj:out"],
    }
    for attribute, magnitude in largest.items():
        scale = getattr(module, attribute, None)
        if scale is not None:
            scale.data.fill_(magnitude() / LARGEST_CODE)
    module.quantization_status = QuantizationStatus.FROZEN


# --- tokens ---


def compared_tokens(llm: LLM, exact: Any, rounded: Any, prompt: Sequence[int], count: int) -> str:
    """What the token-equality rule says. Raises AssertionError if the tokens are others."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=[list(prompt)], sampling_params=params)  # type: ignore[misc]
    found = list(output.outputs[0].token_ids)
    expected = greedy(rounded, prompt, count)
    part = next((i for i in range(count) if found[i] != expected[i]), None)
    if part is None:
        return f"tokens      {count} of {count} equal"
    f32, bf16 = (logits(model, [*prompt, *expected[:part]])[-1] for model in (exact, rounded))
    allowed = TIE_FACTOR * rms(bf16 - f32)
    gap = abs(float(f32[expected[part]] - f32[found[part]]))
    assert gap <= allowed, f"token {part}: f32 gap {gap:.4f}, a tie is up to {allowed:.4f}"
    return f"tokens      {part} of {count} equal, then a tie (gap {gap:.4f} of {allowed:.4f})"


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """f32 [T, V]."""
    found: Tensor = model(torch.tensor([list(ids)])).logits[0].float()
    return found


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


# --- perplexity ---


def simulated(artifact: Path) -> Callable[[Sequence[int]], Tensor]:
    """What the binary gives for a text that fills the prefill bucket: f32 [T, V]."""
    opened = read_artifact(artifact)
    device = SimulatedDevice(opened, opened.parameters(None), slots=WINDOW + 1, machine=None)

    def run(ids: Sequence[int]) -> Tensor:
        places = np.arange(WINDOW, dtype=np.int32)[None]
        inputs = {
            "input_ids": np.array([ids], np.int32),
            "position_ids": places,
            "slot_mapping": places + 1,
            "block_table": places + 1,
            "lengths": np.array([WINDOW], np.int32),
        }
        return torch.from_numpy(device.run(Bucket.prefill(1, WINDOW), inputs)[0])

    return run


def compare_perplexity(
    run: Callable[[Sequence[int]], Tensor], exact: Any, rounded: Any, texts: Sequence[Sequence[int]]
) -> None:
    """Print each side's, and how far the binary's is from the f32 reference's."""
    sides = {
        "f32": lambda ids: logits(exact, ids),
        "bf16": lambda ids: logits(rounded, ids),
        "simulated": run,
    }
    of_text = [measured({name: side(ids) for name, side in sides.items()}, ids) for ids in texts]
    error = {name: mean([text[name].error for text in of_text]) ** 0.5 for name in sides}
    ratio = error["simulated"] / error["bf16"]
    print(f"logits      RMS error {error['simulated']:.3f}, {ratio:.2f} x that of bf16")
    own = {name: torch.cat([text[name].losses for text in of_text]) for name in sides}
    for name, found in own.items():
        off, deviation = apart(found, own["f32"])
        perplexity = f"{float(found.mean().exp()):8.3f}  {off:+7.2%} +- {deviation:.2%}"
        print(f"perplexity  {perplexity}  {name} ({len(found):,} tokens)")
    off, deviation = apart(own["simulated"], own["f32"])
    if abs(off) > PERPLEXITY_GOAL:
        within = "within" if abs(off) <= 2 * deviation else "beyond"
        print(f"missed: more than {PERPLEXITY_GOAL:.1%} off, {within} two standard errors")


@dataclass(frozen=True)
class Measured:
    """One side's logits of one text."""

    losses: Tensor
    """-log p of each token after the first; perplexity is e to their mean."""
    error: float
    """Mean square, against f32."""


def measured(found: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Measured]:
    return {
        name: Measured(
            torch.nn.functional.cross_entropy(side[:-1], torch.tensor(ids[1:]), reduction="none"),
            rms(side - found["f32"]) ** 2,
        )
        for name, side in found.items()
    }


def apart(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """By how much the log of a perplexity differs, and the standard error of that."""
    difference = found - reference
    return float(difference.mean()), float(difference.std()) / len(difference) ** 0.5


if __name__ == "__main__":
    main()
