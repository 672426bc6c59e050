"""Which layers a pipeline's stage has, and which layer groups of a chunk: vLLM's own division, and what does not fit it."""

import types

import pytest

from pdserve.errors import ConfigError, UnsupportedError

pytest.importorskip("vllm", reason="needs an engine's environment")
from pdserve.engines.vllm import stages


def config(layers=8, stages=2, rank=0, tp=1, backend="mp"):
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(get_total_num_hidden_layers=lambda: layers),
        parallel_config=types.SimpleNamespace(
            tensor_parallel_size=tp, pipeline_parallel_size=stages, rank=rank, distributed_executor_backend=backend
        ),
    )


def names(*numbers):
    return [f"model.layers.{n}.self_attn.attn" for n in numbers]


@pytest.mark.parametrize("tp", [1, 2])
def test_all_stages_together_have_each_group_once_and_of_the_same_layers_as_without_a_pipeline(tp):
    whole = dict(stages.parts(config(stages=1), names(*range(8)), 8, 4))
    assert {group: list(mine) for group, mine in whole.items()} == {g: names(2 * g, 2 * g + 1) for g in range(4)}
    for tp_rank in range(tp):
        found = []
        for stage in (0, 1):
            c = config(rank=stage * tp + tp_rank, tp=tp)
            mine = names(*range(*stages.span(c, stage)))
            stages.check_supported(c, mine)
            found += stages.parts(c, mine, 8, 4)
        assert dict(found) == whole
        assert len(found) == len(whole)
    assert stages.workers(config(tp=tp)) == 2 * tp


def test_the_scheduler_which_knows_the_first_stage_only_counts_all_layers():
    assert stages.total_layers(config(), names(0, 1, 2, 3), 2) == 8
    assert stages.total_layers(config(stages=1), ["whatever", "it", "says"], 1) == 3


def test_vllms_uneven_division_needs_finer_groups_and_is_told_which(monkeypatch):
    stages.check_groups(config(), 8, 4, 2)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,6")
    with pytest.raises(ConfigError) as caught:
        stages.check_groups(config(), 8, 4, 2)
    assert str(caught.value).startswith("cache.layer_groups: 2 group(s) of 4 layers do not fit pipeline_parallel_size 2")
    assert "end behind 2, 8 layers" in str(caught.value)
    assert "Set it to 4 for every engine" in str(caught.value)
    stages.check_groups(config(), 8, 4, 4)
    found = stages.parts(config(rank=1), names(*range(2, 8)), 8, 4)
    assert [group for group, _ in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (1, "Set it to 2"),
        (3, "the model's 8 layers do not make 3 equal groups. Use one of 1, 2, 4, 8."),
        (0, "0 is not a positive number"),
        ("2", "'2' is not a positive number"),
    ],
)
def test_groups_that_no_stage_can_hold_whole_are_refused(groups, says):
    with pytest.raises(ConfigError, match=r"cache\.layer_groups") as caught:
        stages.check_groups(config(), 8, 4, groups)
    assert says in str(caught.value)


def test_more_shards_than_a_chunk_may_have_are_refused():
    with pytest.raises(ConfigError, match=r"8 groups of 256 KV heads are more than 1024 shards a chunk\. Use at most 4"):
        stages.check_groups(config(stages=1), 8, 256, 8)


@pytest.mark.parametrize(
    ("rank", "mine"),
    [(0, names(0, 1, 2)), (1, names(4, 5, 6, 7, 8)), (0, names(0, 1, 3, 2)), (0, ["a.0.b.0", "a.1", "a.2.c", "a.3.c"])],
)
def test_layers_whose_places_are_not_known_are_refused(rank, mine):
    with pytest.raises(UnsupportedError, match="their places in a chunk's layer groups are not known"):
        stages.check_supported(config(rank=rank), mine)
    with pytest.raises(UnsupportedError, match=r"cache\.layer_groups"):
        stages.total_layers(config(stages=1), ["model.embed", *mine], 2)


def test_executors_that_drop_a_stages_reports_are_refused():
    with pytest.raises(UnsupportedError, match="distributed_executor_backend ray"):
        stages.check_supported(config(backend="ray"), names(0, 1, 2, 3))
    stages.check_supported(config(stages=1, backend="ray"), ["whatever"])
