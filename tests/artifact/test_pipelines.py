"""`artifact.json` says which stage runs what, on which device, and what stages send each other."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from model_zoo import make_model

from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.artifact.schema import Pipeline, Supertask

BUCKETS: dict[str, Any] = {"prefill_buckets": [(1, 16)], "decode_buckets": [(2, 32)]}

VOCABULARY = 301
"""Which two ranks do not divide."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, ...]:
    """Of a model with three blocks in three stages; embedding and head share a table."""
    path = tmp_path_factory.mktemp("staged")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }
    model = make_model("llama", path / "model", **sizes)
    devices = "npu:0:0-1,npu:0:2-3,npu:1:0-1"
    ArtifactBuilder(
        model, **BUCKETS, tensor_parallel_size=2, pipeline_parallel_size=3, devices=devices
    ).build(path / "artifact", weights="skip")
    return read_artifact(path / "artifact").description.pipelines


def tasks(pipeline: Pipeline, kind: str) -> list[Supertask]:
    return [task for task in pipeline.supertasks.values() if task.kind == kind]


def test_every_stage_is_a_task_on_its_device(pipelines: tuple[Pipeline, ...]) -> None:
    for pipeline in pipelines:
        stages = tasks(pipeline, "edf")
        assert [task.device for task in stages] == ["0", "1", "2"] == list(pipeline.devices)
        assert {task.data_blob for task in stages} == set(pipeline.blobs)
        calls = pipeline.metadata.stages
        assert [stage.device for stage in calls] == list(pipeline.devices)
        assert calls[0].first == 0
        assert all(a.end == b.first for a, b in pairwise(calls))


def test_stages_read_their_own_weights(pipelines: tuple[Pipeline, ...]) -> None:
    for pipeline in pipelines:
        first, middle, last = tasks(pipeline, "edf")
        assert any(name.startswith("model.layers.1.") for name in middle.inputs)
        assert not any(name.startswith("model.layers.0.") for name in middle.inputs)
        assert "model.embed_tokens.weight" in first.inputs
        assert "model.embed_tokens.weight" not in middle.inputs
        assert "model.embed_tokens.weight" in last.inputs
        assert "input_ids" in first.inputs
        assert "input_ids" not in middle.inputs
        assert last.outputs == ("logits",)


def test_tensors_are_whole(pipelines: tuple[Pipeline, ...]) -> None:
    prefill, decode = (pipeline.tensors for pipeline in pipelines)
    assert prefill["logits"].shape == (1, 1, VOCABULARY)
    assert decode["logits"].shape == (2, 1, VOCABULARY)
    assert prefill["model.embed_tokens.weight"].shape[0] == VOCABULARY


def test_each_send_has_its_recv_on_the_next_device(pipelines: tuple[Pipeline, ...]) -> None:
    for pipeline in pipelines:
        groups: dict[str | None, list[Supertask]] = defaultdict(list)
        for task in (*tasks(pipeline, "send"), *tasks(pipeline, "recv")):
            groups[task.group].append(task)
        assert len(groups) == 2
        for send, recv in groups.values():
            assert (send.kind, recv.kind) == ("send", "recv")
            assert int(recv.device or "") == int(send.device or "") + 1
            (gives,), (takes,) = send.inputs, recv.outputs
            assert pipeline.tensors[gives] == pipeline.tensors[takes]


def test_every_tensor_is_made_once_before_it_is_used(pipelines: tuple[Pipeline, ...]) -> None:
    for pipeline in pipelines:
        made = [name for name, tensor in pipeline.tensors.items() if tensor.value is not None]
        for task in pipeline.supertasks.values():
            assert set(task.inputs) <= set(made), task
            made += task.outputs
        assert len(made) == len(set(made))
        assert set(made) == set(pipeline.tensors)
        used = {name for task in pipeline.supertasks.values() for name in task.inputs}
        assert used == set(made)
