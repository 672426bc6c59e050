from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.proxy.exposition import joined, read

PAGE = b"""# HELP vllm:num_requests_running Requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# HELP vllm:prompt_tokens_total Tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 1e+06
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.1"} 2.0
vllm:ttft_seconds_bucket{le="+Inf"} 3.0
vllm:ttft_seconds_count 3.0
# HELP python_gc_objects_collected_total Not of interest.
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 7.0
process_start_time_seconds 123.5
garbage
"""


def test_values_by_name_and_label() -> None:
    found = read(PAGE, frozenset(("vllm:num_requests_running", "vllm:ttft_seconds_bucket", "never")))
    assert found.total("vllm:num_requests_running") == 3.0
    assert found.total("vllm:num_requests_running", model_name="other") == 0.0
    assert found.by("vllm:ttft_seconds_bucket", "le") == {"0.1": 2.0, "+Inf": 3.0}
    assert found.total("never") is None
    assert found.total("vllm:prompt_tokens_total") is None, "it was not asked for"


def test_what_is_not_a_number_is_left_out() -> None:
    page = b'a 1\nb{x="y"} NaN\nc NotANumber\nd{x="} 1"} 2\n'
    found = read(page, frozenset("abcd"))
    assert found.total("a") == 1.0
    assert found.total("b") is None
    assert found.total("c") is None
    assert found.by("d", "x") == {"} 1": 2.0}


@given(st.text(max_size=30))
def test_labels_are_read_as_they_were_meant(value: str) -> None:
    registry = CollectorRegistry()
    Gauge("one", "help", ["label"], registry=registry).labels(value).set(5)
    assert read(generate_latest(registry), frozenset(("one",))).by("one", "label") == {value: 5.0}


@given(st.binary(max_size=300))
def test_no_bytes_break_it(page: bytes) -> None:
    read(page, frozenset(("a", "vllm:x")))
    joined([("x", page)])


def test_several_pages_become_one_that_prometheus_takes() -> None:
    text = joined([("prefill-0", PAGE), ('de"co\\de', PAGE)]).decode()
    families = list(text_string_to_metric_families(text))
    names = {family.name for family in families}
    assert text.count("# TYPE vllm:ttft_seconds ") == 1, "a family that is announced twice is refused"
    assert "python_gc_objects_collected" not in names
    running = next(f for f in families if f.name == "vllm:num_requests_running")
    assert {s.labels["instance"]: s.value for s in running.samples} == {"prefill-0": 3.0, 'de"co\\de': 3.0}
    histogram = next(f for f in families if f.name == "vllm:ttft_seconds")
    assert histogram.type == "histogram"
    assert len(histogram.samples) == 6
    assert 'process_start_time_seconds{instance="prefill-0"} 123.5' in text


def test_an_instance_of_the_engines_own_is_kept_apart() -> None:
    page = b'vllm:a{instance="its",x="1"} 1\nvllm:b{x="1",instance="its"} 1\n'
    families = text_string_to_metric_families(joined([("ours", page)]).decode())
    for family in families:
        assert family.samples[0].labels == {"instance": "ours", "exported_instance": "its", "x": "1"}


def test_what_the_client_library_writes_comes_through_whole() -> None:
    registry = CollectorRegistry()
    Counter("vllm:c", "Help with \\ and \n newline.", ["a"], registry=registry).labels("x y").inc(2)
    Histogram("vllm:h_seconds", "Help.", registry=registry).observe(0.3)
    page = generate_latest(registry)
    before = {
        (s.name, *sorted(s.labels.items())): s.value
        for f in text_string_to_metric_families(page.decode())
        for s in f.samples
    }
    after = {
        (s.name, *sorted((k, v) for k, v in s.labels.items() if k != "instance")): s.value
        for f in text_string_to_metric_families(joined([("i", page)]).decode())
        for s in f.samples
    }
    assert before == after


def test_nothing_gives_nothing() -> None:
    assert joined([]) == b""
    assert joined([("a", b"")]) == b""
