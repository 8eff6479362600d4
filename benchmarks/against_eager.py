"""How long the simulator takes for a text, against transformers' eager mode: one thread each.

    python benchmarks/against_eager.py [--tokens 24] [--rounds 5]

Both sides answer the same prompt with the same tokens (the simulator's, forced on eager), in
turns, so that a change of the machine's speed meets both. Loading, building and the first run
(which reads and decodes the weights) are not in the times; they are printed on their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

PROMPT = "The lighthouse stood on the last rock before the open sea, and every evening"
GOAL = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    # Before numpy and torch are imported.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    with TemporaryDirectory() as directory:
        compare(Path(directory) / "artifact", options.tokens, options.rounds)


def compare(artifact: Path, count: int, rounds: int) -> None:
    from furiosa_llm import LLM, ArtifactBuilder, SamplingParams
    from furiosa_llm.models.demo import demo_model_path

    build = ArtifactBuilder(
        demo_model_path(), prefill_buckets=[(1, 128)], decode_buckets=[(1, 256)]
    )
    print(f"build         {timed(lambda: build.build(artifact))[0]:8.2f} s")
    llm = LLM.load_artifact(artifact)
    prompt = llm.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)

    def simulate() -> list[int]:
        (output,) = llm.generate(prompt_token_ids=[prompt], sampling_params=params)  # type: ignore[misc]
        return list(output.outputs[0].token_ids)

    seconds, tokens = timed(simulate)
    print(f"first run     {seconds:8.2f} s")
    eager = Eager()
    eager.run(prompt, tokens)
    ratios = []
    for _ in range(rounds):
        ours = timed(simulate)[0]
        theirs = timed(lambda: eager.run(prompt, tokens))[0]
        ratios.append(ours / theirs)
        print(f"simulator {ours:6.2f} s   eager {theirs:6.2f} s   ratio {ours / theirs:5.2f}")
    found = median(ratios)
    print(f"median ratio {found:.2f} over {rounds} rounds of {len(prompt)} + {count} tokens")
    print(f"goal: at most {GOAL:.0f}: {'reached' if found <= GOAL else 'MISSED'}")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = perf_counter()
    result = work()
    return perf_counter() - began, result


class Eager:
    """The demo model in transformers: bf16, eager attention, a KV cache."""

    def __init__(self) -> None:
        import numpy as np
        import torch
        from transformers import LlamaForCausalLM

        from furiosa_llm.frontend.source import open_model
        from furiosa_llm.models.demo import demo_model_path

        torch.set_num_threads(1)
        source = open_model(demo_model_path())
        config: Any = source.config
        config._attn_implementation = "eager"
        self.model: Any = LlamaForCausalLM(config)
        tensors = source.checkpoint.tensors
        state = {n: torch.from_numpy(source.checkpoint.read(n).astype(np.float32)) for n in tensors}
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    def run(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Prefill `prompt`, then decode `tokens` one by one."""
        import torch

        past, ids = None, torch.tensor([list(prompt)])
        with torch.no_grad():
            for token in tokens:
                out = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, ids = out.past_key_values, torch.tensor([[token]])


if __name__ == "__main__":
    main()
