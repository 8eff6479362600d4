"""`LLM`: generate text from an artifact on the simulated device."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cached_property
from numbers import Integral
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np

from .. import errors
from ..artifact.reader import Artifact, Warn, read_artifact
from .engine import Device, run_to_end
from .kv_blocks import KvBlocks
from .outputs import CompletionOutput, Metrics, RequestOutput, Step
from .placement import place
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .sequence import Sequence
from .step_inputs import Padding
from .tokenizer import Message, Tokenizer

DEFAULT_SAMPLING = SamplingParams()

OnStep = Callable[[Step], None]


class LLM:
    """A loaded artifact. Get one from `LLM.load_artifact`."""

    def __init__(
        self,
        artifact: Artifact,
        replicas: Seq[Device],
        *,
        seed: int = 0,
        on_step: OnStep = lambda _: None,
    ) -> None:
        """`replicas` are equal devices, over which prompts are divided. Raises: RUN008."""
        if not any(bucket.is_prefill for bucket in artifact.buckets):
            raise errors.no_bucket_of_kind("prefill", str(artifact.path))
        self.artifact = artifact
        self.metrics: Metrics | None = None
        """Simulated times of the last call to `generate`."""
        self._replicas = replicas
        self._seed = seed
        self._on_step = on_step

    @classmethod
    def load_artifact(
        cls,
        path: str | Path,
        *,
        devices: str | None = None,
        data_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        num_blocks_per_pp_stage: Seq[int] | None = None,
        weights_from: str | Path | None = None,
        machine: str | Path | None = None,
        kv_cache_slots: int | None = None,
        seed: int = 0,
        on_step: OnStep = lambda _: None,
        warn: Warn = warnings.warn,
    ) -> LLM:
        """Open an artifact for generation; binaries and weights are read when first needed.

        `weights_from` is a checkpoint directory, needed after `--weights skip`. `machine` is a
        machine description. `kv_cache_slots` is the number of tokens that each replica's KV cache
        holds, one of them for padding; by default what the largest bucket needs, but no more than
        the build's `paged_attention_num_blocks`. `seed` is for sampling without a seed of its own.
        `on_step` is told of every run of a binary, `warn` what is lost of weights from elsewhere.

        `devices`, replicas and pipeline stages are those of the build unless they are given;
        nothing is compiled again. The tensor-parallel size is the artifact's.

        Raises: ART001, ART005, ART006, RUN006, RUN008, CKPxxx, PAR001 to PAR006, PAR009 to PAR012,
        PAR014 to PAR016, PAR018.
        """
        from .device import SimulatedDevice

        artifact = read_artifact(Path(path))
        placement = place(
            artifact,
            devices=devices,
            dp=data_parallel_size,
            pp=pipeline_parallel_size,
            sizes=num_blocks_per_pp_stage,
        )
        source = artifact.parameters(None if weights_from is None else Path(weights_from), warn)
        slots = kv_cache_slots or _default_slots(artifact)
        replicas = [
            SimulatedDevice(
                artifact,
                source,
                slots,
                None if machine is None else Path(machine),
                placement.replica(number),
            )
            for number in range(placement.mesh.dp)
        ]
        return cls(artifact, replicas, seed=seed, on_step=on_step)

    def generate(
        self,
        prompts: str | Seq[str] | None = None,
        sampling_params: SamplingParams = DEFAULT_SAMPLING,
        prompt_token_ids: Seq[int] | Seq[Seq[int]] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one prompt, or each of several: one output for one prompt, a list for a list.

        Prompts are texts, or lists of token ids. All of them are checked before the first one runs.
        Raises: RUN001 to RUN005, RUN008, RUN010, RUN011.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise errors.bad_prompts("it takes either prompts or prompt_token_ids")
        texts: list[str | None]
        if prompts is not None:
            single = isinstance(prompts, str)
            if not single and not _is_list_of(prompts, str):
                raise errors.bad_prompts(f"prompts are texts, not {prompts!r:.60}")
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            ids = [self.tokenizer.encode(text or "") for text in texts]
        else:
            single, ids = _token_lists(prompt_token_ids or [])
            texts = [None] * len(ids)
        outputs = self._answer(texts, ids, sampling_params)
        return outputs[0] if single else outputs

    def chat(
        self, messages: Seq[Message], sampling_params: SamplingParams = DEFAULT_SAMPLING
    ) -> RequestOutput:
        """Answer a conversation, written as the model's chat template says. Raises: RUN013."""
        ids = self.tokenizer.encode_chat(messages)
        return self._answer([None], [ids], sampling_params)[0]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises: RUN005 if the model has none."""
        return Tokenizer(self.artifact)

    def _answer(
        self,
        texts: Seq[str | None],
        ids: Seq[Seq[int]],
        params: SamplingParams,
    ) -> list[RequestOutput]:
        if not ids:
            raise errors.bad_prompts("there is no prompt at all")
        sequences = [self._sequence(i, prompt, params) for i, prompt in enumerate(ids)]
        generator = self.artifact.description.generator_config
        block = generator.paged_attention_config.padding_block_idx
        padding = Padding(position_id=generator.position_id_pad, block=block)
        steps = []
        for number, device in enumerate(self._replicas):
            scheduler = Scheduler(self.artifact.buckets, KvBlocks(device.slots, block))
            own = sequences[number :: len(self._replicas)]
            steps += run_to_end(own, scheduler, device, padding, self._on_step, number)
        self.metrics = self._measure(sequences, steps)
        return [self._output(text, s) for text, s in zip(texts, sequences, strict=True)]

    def _sequence(self, index: int, prompt: Seq[int], params: SamplingParams) -> Sequence:
        """A sequence that is known to run to its end. Raises: RUN001 to RUN004, RUN008, RUN011."""
        max_tokens = self._check_lengths(index, len(prompt), params.max_tokens)
        vocabulary = self.artifact.vocabulary_size
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise errors.token_out_of_range(index, token, vocabulary)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._eos_ids
        seed = (self._seed, index) if params.seed is None else params.seed
        random = np.random.default_rng(seed)
        sequence = Sequence(index, list(prompt), params, max_tokens, frozenset(stop_ids), random)
        slots = self._replicas[0].slots
        if sequence.blocks_needed >= slots:
            raise errors.kv_cache_too_small(index, sequence.blocks_needed, slots - 1)
        return sequence

    def _check_lengths(self, index: int, tokens: int, max_tokens: int | None) -> int:
        """How many tokens the answer may have. Raises: RUN001, RUN002, RUN003, RUN008."""
        prefill, decode = (
            max(
                (b.attention_size for b in self.artifact.buckets if b.is_prefill == kind), default=0
            )
            for kind in (True, False)
        )
        if tokens == 0:
            raise errors.empty_prompt(index)
        if tokens > prefill:
            raise errors.prompt_too_long(index, tokens, prefill)
        if max_tokens is None:
            return max(1, decode - tokens)
        if max_tokens > 1 and not decode:
            raise errors.no_bucket_of_kind("decode", str(self.artifact.path))
        if max_tokens > 1 and tokens + max_tokens > decode:
            raise errors.output_too_long(index, tokens, max_tokens, decode)
        return max_tokens

    @cached_property
    def _eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, else the model config's."""
        eos = None
        if self.artifact.has_file("generation_config.json"):
            path = self.artifact.file("generation_config.json")
            try:
                eos = json.loads(path.read_bytes()).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise errors.broken_metadata(str(path), str(error)) from error
        if eos is None:
            eos = self.artifact.hf_config.get("eos_token_id")
        return frozenset([eos] if isinstance(eos, int) else eos or [])

    def _output(self, text: str | None, sequence: Sequence) -> RequestOutput:
        assert sequence.finish_reason is not None
        # A model without a tokenizer answers in token ids alone.
        has_tokenizer = self.artifact.has_file("tokenizer.json")
        answer = self.tokenizer.decode(sequence.answer) if has_tokenizer else ""
        completion = CompletionOutput(0, answer, list(sequence.answer), sequence.finish_reason)
        return RequestOutput(str(sequence.index), text, list(sequence.prompt), [completion])

    def _measure(self, sequences: Seq[Sequence], steps: list[Step]) -> Metrics:
        gaps = [
            (cycles[-1] - cycles[0]) / (len(cycles) - 1)
            for cycles in (sequence.token_cycles for sequence in sequences)
            if len(cycles) > 1
        ]
        to_us = self._replicas[0].microseconds
        busy, filled = Counter[int](), Counter[int]()
        for step in steps:
            busy[step.replica] += step.cycles
            filled[step.replica] += step.interval_cycles
        cycles = max(busy.values())
        tokens = sum(len(sequence.answer) for sequence in sequences)
        return Metrics(
            ttft_us=to_us(fmean(sequence.token_cycles[0] for sequence in sequences)),
            tpot_us=to_us(fmean(gaps)) if gaps else None,
            cycles=cycles,
            tokens_per_s=tokens / to_us(cycles) * 1e6,
            full_pipeline_tokens_per_s=tokens / to_us(max(filled.values())) * 1e6,
            steps=steps,
        )


def _default_slots(artifact: Artifact) -> int:
    """Enough for the largest bucket, and one for padding; no more than the build allows."""
    enough = 1 + max(bucket.batch_size * bucket.attention_size for bucket in artifact.buckets)
    most = artifact.runtime_config.paged_attention_num_blocks
    return enough if most is None else min(enough, most)


def _token_lists(prompts: Seq[int] | Seq[Seq[int]]) -> tuple[bool, list[list[int]]]:
    """Whether it is one prompt, and the prompts. Raises: RUN010."""
    if prompts and _is_list_of(prompts, Integral):
        return True, [list(cast(Seq[int], prompts))]
    if not isinstance(prompts, Seq) or not all(_is_list_of(prompt, Integral) for prompt in prompts):
        raise errors.bad_prompts(f"prompts are lists of token ids, not {prompts!r:.60}")
    return False, [list(prompt) for prompt in cast(Seq[Seq[int]], prompts)]


def _is_list_of(values: object, kind: type) -> bool:
    """Whether it is a sequence, though no text, of such values."""
    if not isinstance(values, Seq) or isinstance(values, str | bytes):
        return False
    return all(isinstance(value, kind) for value in values)
