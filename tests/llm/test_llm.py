from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
from fake_device import CYCLES, FakeDevice, greedy_answer
from small_artifact import EOS, HF_CONFIG, VOCABULARY, tokenizer_json, write_artifact

from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.llm.llm import LLM
from furiosa_llm.llm.outputs import RequestOutput, Step
from furiosa_llm.llm.sampling_params import SamplingParams
from furiosa_llm.models.config_types import Bucket

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] if m.role == 'x' else 'b' }}{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def load(
    directory: Path,
    files: dict[str, bytes] | None = None,
    *,
    slots: int = 200,
    dp: int = 1,
    seed: int = 0,
    on_step: Any = lambda _: None,
    **options: Any,
) -> LLM:
    """An LLM whose device computes `fake_device.expected_token`."""
    extra = {"tokenizer.json": tokenizer_json()} if files is None else files
    artifact = read_artifact(write_artifact(directory / "artifact", extra_files=extra, **options))
    return LLM(artifact, [FakeDevice(slots) for _ in range(dp)], seed=seed, on_step=on_step)


def answer(output: RequestOutput | list[RequestOutput]) -> list[int]:
    assert isinstance(output, RequestOutput)
    return output.outputs[0].token_ids


def text_of(ids: Seq[int]) -> str:
    letters = {token: letter for letter, token in VOCABULARY.items()}
    return "".join(letters[token] for token in ids if token != EOS)


def test_a_text_gives_one_output_a_list_a_list(tmp_path: Path) -> None:
    llm = load(tmp_path)
    expected = greedy_answer([0, 1], 4)
    single = llm.generate("ab", GREEDY)
    assert isinstance(single, RequestOutput)
    assert single.prompt == "ab"
    assert single.prompt_token_ids == [0, 1]
    assert single.finished
    completion = single.outputs[0]
    assert completion.token_ids == expected
    assert completion.text == text_of(expected)
    assert completion.finish_reason == "length"
    assert llm.generate(["ab"], GREEDY) == [single]


def test_token_ids_take_the_place_of_texts(tmp_path: Path) -> None:
    llm = load(tmp_path, files={})
    single = llm.generate(prompt_token_ids=[0, 1], sampling_params=GREEDY)
    assert isinstance(single, RequestOutput)
    assert single.prompt is None
    assert single.outputs[0].text == ""
    assert answer(single) == greedy_answer([0, 1], 4)
    several = llm.generate(prompt_token_ids=[[0, 1], [2]], sampling_params=GREEDY)
    assert isinstance(several, list)
    assert [answer(output) for output in several] == [
        greedy_answer([0, 1], 4),
        greedy_answer([2], 4),
    ]


def test_an_end_token_ends_the_answer_and_is_part_of_it(tmp_path: Path) -> None:
    llm = load(tmp_path)
    prompt = next([i, j] for i in range(8) for j in range(8) if EOS in greedy_answer([i, j], 6)[1:])
    full = greedy_answer(prompt, 6)
    params = SamplingParams(temperature=0, max_tokens=6)
    output = llm.generate(prompt_token_ids=prompt, sampling_params=params)
    assert answer(output) == full[: full.index(EOS) + 1]
    assert isinstance(output, RequestOutput)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == text_of(full[: full.index(EOS)])


def test_the_generation_config_decides_on_end_tokens(tmp_path: Path) -> None:
    first, second = greedy_answer([0, 1], 2)
    generation = json.dumps({"eos_token_id": [second]}).encode()
    llm = load(tmp_path, files={"generation_config.json": generation})
    params = SamplingParams(temperature=0, max_tokens=6)
    assert answer(llm.generate(prompt_token_ids=[0, 1], sampling_params=params))[-1] == second
    assert first != second


def test_stop_token_ids_and_min_tokens(tmp_path: Path) -> None:
    llm = load(tmp_path)
    full = greedy_answer([0, 1], 6)
    stop = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(full[2],), ignore_eos=True)
    ended = answer(llm.generate(prompt_token_ids=[0, 1], sampling_params=stop))
    assert ended == full[: full.index(full[2]) + 1]
    patient = SamplingParams(temperature=0, max_tokens=6, min_tokens=6, stop_token_ids=(full[2],))
    assert len(answer(llm.generate(prompt_token_ids=[0, 1], sampling_params=patient))) == 6


def test_without_max_tokens_the_largest_decode_bucket_is_filled(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = load(tmp_path).generate(prompt_token_ids=[0] * 10, sampling_params=params)
    assert len(answer(output)) == 32 - 10


def test_samples_repeat_with_the_seed_and_not_with_the_batch(tmp_path: Path) -> None:
    params = SamplingParams(temperature=5.0, max_tokens=8, ignore_eos=True, seed=3)
    llm = load(tmp_path)
    alone = answer(llm.generate(prompt_token_ids=[1], sampling_params=params))
    together = llm.generate(prompt_token_ids=[[2], [1]], sampling_params=params)
    assert isinstance(together, list)
    assert answer(together[1]) == alone
    other = SamplingParams(temperature=5.0, max_tokens=8, ignore_eos=True, seed=4)
    assert answer(llm.generate(prompt_token_ids=[1], sampling_params=other)) != alone


def test_metrics_count_simulated_cycles(tmp_path: Path) -> None:
    steps: list[Step] = []
    llm = load(tmp_path, on_step=steps.append)
    llm.generate(prompt_token_ids=[[0], [1]], sampling_params=GREEDY)
    metrics = llm.metrics
    assert metrics is not None
    # Two prefills, then three steps of the bucket for four sequences.
    assert [step.bucket.name for step in metrics.steps] == [
        *["prefill:1,16"] * 2,
        *["decode:4,32"] * 3,
    ]
    assert metrics.steps == steps
    assert metrics.cycles == 2 * CYCLES + 3 * 4 * CYCLES
    assert metrics.ttft_us == pytest.approx(1.5 * CYCLES / 1000)
    # The first request waits for the second one's prefill, too.
    assert metrics.tpot_us == pytest.approx((13 + 12) / 2 / 3 * CYCLES / 1000)


def test_replicas_divide_the_prompts_and_have_their_own_clocks(tmp_path: Path) -> None:
    prompts = [[0], [1], [2, 3]]
    alone, divided = (load(tmp_path / str(dp), dp=dp) for dp in (1, 2))
    together = alone.generate(prompt_token_ids=prompts, sampling_params=GREEDY)
    assert divided.generate(prompt_token_ids=prompts, sampling_params=GREEDY) == together
    metrics = divided.metrics
    assert metrics is not None
    # Two prompts for the first replica, which decode together; one for the other.
    assert [(step.replica, step.bucket.name) for step in metrics.steps] == [
        *[(0, "prefill:1,16")] * 2,
        *[(0, "decode:4,32")] * 3,
        (1, "prefill:1,16"),
        *[(1, "decode:1,32")] * 3,
    ]
    assert metrics.cycles == (2 + 3 * 4) * CYCLES  # both began at once; the first took longer
    assert metrics.ttft_us == pytest.approx((1 + 2 + 1) / 3 * CYCLES / 1000)
    assert metrics.tpot_us == pytest.approx(((13 + 12) / 3 + 3 / 3) / 3 * CYCLES / 1000)
    assert metrics.tokens_per_s == pytest.approx(12 / (14 * CYCLES / 1000) * 1e6)
    # A step of the next request could begin after three quarters of one.
    assert metrics.full_pipeline_tokens_per_s == pytest.approx(metrics.tokens_per_s * 4 / 3)


def test_a_replica_without_prompts_takes_no_time(tmp_path: Path) -> None:
    llm = load(tmp_path, dp=3)
    llm.generate("ab", GREEDY)
    assert llm.metrics is not None
    assert llm.metrics.cycles == 4 * CYCLES


def test_a_single_token_has_no_time_per_further_token(tmp_path: Path) -> None:
    llm = load(tmp_path)
    llm.generate("ab", SamplingParams(temperature=0, max_tokens=1))
    assert llm.metrics is not None
    assert llm.metrics.tpot_us is None


def test_a_chat_is_written_with_the_template(tmp_path: Path) -> None:
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "<end>"}}
    files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    output = load(tmp_path, files).chat([{"role": "user", "content": "cd"}], GREEDY)
    assert output.prompt_token_ids == [1, 2, 3, EOS, 0]


def test_a_template_in_its_own_file_is_found(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": tokenizer_json(),
        "chat_template.jinja": b"a{{ messages[0].content }}",
    }
    output = load(tmp_path, files).chat([{"role": "user", "content": "cd"}], GREEDY)
    assert output.prompt_token_ids == [0, 2, 3]


@pytest.mark.parametrize(
    "template", [None, b"{{ raise_exception('no') }}", b"{% broken", b"{{ 1 + 'a' }}"]
)
def test_an_impossible_chat_is_a_coded_error(tmp_path: Path, template: bytes | None) -> None:
    files = {"tokenizer.json": tokenizer_json()}
    if template is not None:
        files["chat_template.jinja"] = template
    with pytest.raises(FuriosaLLMError, match="RUN013"):
        load(tmp_path, files).chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("prompts", "token_ids", "code"),
    [
        ("", None, "RUN001"),
        (None, [[1], []], "RUN001"),
        (None, [1] * 17, "RUN002"),
        (None, [1] * 16, "RUN003"),  # 16 + 20 > 32
        (None, [8], "RUN004"),
        (None, [-1], "RUN004"),
        (None, None, "RUN010"),
        (5, None, "RUN010"),
        (["a", 3], None, "RUN010"),
        (None, ["a"], "RUN010"),
        (None, [[1], 2], "RUN010"),
        ("a", [1], "RUN010"),
        ([], None, "RUN010"),
        (None, [], "RUN010"),
    ],
)
def test_prompts_that_cannot_run_are_refused(
    tmp_path: Path, prompts: Any, token_ids: Any, code: str
) -> None:
    llm = load(tmp_path)
    with pytest.raises(FuriosaLLMError, match=code):
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20), token_ids)


def test_a_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="RUN005") as caught:
        load(tmp_path, files={}).generate("ab")
    assert "--prompt-token-ids" in caught.value.next_step


def test_a_sequence_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    llm = load(tmp_path, slots=10)
    with pytest.raises(FuriosaLLMError, match="RUN011"):
        llm.generate(prompt_token_ids=[1] * 7, sampling_params=GREEDY)
    llm.generate(prompt_token_ids=[1] * 6, sampling_params=GREEDY)


def test_an_artifact_without_a_kind_of_bucket_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="RUN008"):
        load(tmp_path / "decode", buckets=(Bucket.decode(1, 32),))
    llm = load(tmp_path / "prefill", buckets=(Bucket.prefill(1, 32),))
    llm.generate("a", SamplingParams(max_tokens=1))
    with pytest.raises(FuriosaLLMError, match="RUN008"):
        llm.generate("a", SamplingParams(max_tokens=2))


def test_a_broken_tokenizer_is_a_coded_error(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="RUN012"):
        load(tmp_path, files={"tokenizer.json": b"{"}).generate("a")


def test_a_broken_generation_config_is_a_coded_error(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="ART006"):
        load(tmp_path, files={"generation_config.json": b"{"}).generate(prompt_token_ids=[1])


def test_a_model_without_an_end_token_runs_to_its_limit(tmp_path: Path) -> None:
    config = {key: value for key, value in HF_CONFIG.items() if key != "eos_token_id"}
    params = SamplingParams(temperature=0, max_tokens=20)
    output = load(tmp_path, hf_config=config).generate(prompt_token_ids=[1], sampling_params=params)
    assert len(answer(output)) == 20


@pytest.mark.parametrize(
    ("num_blocks", "slots"), [(None, 4 * 32 + 1), (100, 100), (512_000, 4 * 32 + 1)]
)
def test_the_cache_fits_the_largest_bucket_but_not_more_than_the_build_says(
    tmp_path: Path, num_blocks: int | None, slots: int
) -> None:
    path = write_artifact(tmp_path / "artifact", num_blocks=num_blocks)
    assert [replica.slots for replica in LLM.load_artifact(path)._replicas] == [slots]
