"""Ramp decisions, figures, intervals and sentences: pure."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from pdserve.bench import compare, results, stats
from pdserve.bench.ramp import Ramp
from pdserve.bench.record import Record
from pdserve.bench.results import Result, Run
from pdserve.bench.stats import Sample
from pdserve.bench.summary import summarise
from pdserve.errors import ConfigError


def record(
    ttft_ms: float, *, arm: str = "", repetition: int = 0, n: int = 0, ok: bool = True, **more: object
) -> Record:
    begin = more.pop("begin", float(n))
    assert isinstance(begin, float)
    facts: dict = {
        "arm": arm, "repetition": repetition, "stage": "all", "session": f"s{n}", "step": 0, "intended": begin, "sent": begin,
        "ended": begin + ttft_ms / 1000, "ttft_ms": ttft_ms if ok else None, "latency_ms": ttft_ms if ok else None,
        "status": "ok" if ok else "error", "prompt_tokens": 100, "output_tokens": 10,
    }  # fmt: skip
    return Record(**(facts | more))


def result(arms: dict[str, list[list[float]]], **more: object) -> Result:
    """Times to the first token by arm and repetition; request n of each arm is the same one."""
    found = Result(workload="test", command="", seed=1, timeout=60.0, **more)  # type: ignore[arg-type]
    for arm, repetitions in arms.items():
        for number, times in enumerate(repetitions, 1):
            found.runs.append(Run(arm=arm, repetition=number, seconds=1.0))
            found.records += [record(t, arm=arm, repetition=number, n=n) for n, t in enumerate(times)]
    return found


def times(rng: random.Random, middle: float, count: int = 40) -> list[float]:
    return [middle * rng.lognormvariate(0, 0.3) for _ in range(count)]


# ---- the ramp ----


def test_users_are_added_by_the_room_left_and_taken_away_without_any() -> None:
    ramp = Ramp(2, 100, target=1.0)
    assert ramp.next_users(0, 10, [0.1] * 10) == 14
    assert ramp.next_users(1, 10, [0.9] * 10) == 11
    assert ramp.next_users(2, 12, [0.1] * 8 + [5.0] * 2) == 9
    assert ramp.next_users(3, 2, [9.0] * 5) == 2, "not below where it began"
    assert ramp.next_users(4, 10, [0.1]) == 10, "one answer says nothing"
    assert ramp.carried == 10
    assert [p.within for p in ramp.periods] == [10, 10, 8, 0, 1]


def test_a_ramp_stops_at_its_most_users_and_may_carry_nobody() -> None:
    ramp = Ramp(1, 3, target=1.0)
    assert ramp.next_users(0, 3, [0.01] * 9) == 3
    nobody = Ramp(1, 3, target=1.0)
    nobody.next_users(0, 1, [2.0] * 9)
    assert nobody.carried == 0


# ---- figures ----


def test_percentiles_rates_and_shares() -> None:
    rows = [record(float(n), n=n, begin=0.0, cached_tokens=25, itl_ms=[5.0, 7.0]) for n in range(1, 101)]
    s = summarise(rows, 60, slo=0.05)
    assert s is not None
    assert (s.ttft_p50, s.ttft_p99, s.ttft_mean) == (51.0, 100.0, 50.5)
    assert (s.itl_p50, s.itl_p99) == (7.0, 7.0)
    assert s.seconds == pytest.approx(0.1)
    assert s.output_rate == pytest.approx(10_000)
    assert s.cached == 0.25
    assert s.within_slo == 50


def test_a_failure_counts_as_the_timeout_or_as_long_as_it_took() -> None:
    rows = [record(10.0, n=n) for n in range(9)] + [record(70_000.0, n=9, ok=False)]
    s = summarise(rows, timeout=60)
    assert s is not None
    assert s.ttft_p99 == 70_000
    assert s.failed == 1
    quick = summarise([record(1.0, ok=False)], timeout=60)
    assert quick is not None
    assert quick.ttft_p50 == 60_000


def test_nothing_measured_is_no_summary() -> None:
    assert summarise([record(1.0, phase="fill")], 60) is None


# ---- intervals ----


def sample(values: list[float]) -> Sample:
    return Sample(tuple(range(len(values))), tuple((v,) for v in values))


def test_the_interval_of_equal_arms_holds_one_about_as_often_as_it_says() -> None:
    rng, held = random.Random(1), 0
    for trial in range(60):
        a, b = ([sample(times(rng, 100, 30)) for _ in range(3)] for _ in range(2))
        ratio = stats.ratio(a, b, stats.mean, seed=trial)
        assert ratio is not None
        held += not ratio.differs
    assert held >= 50, "95 % of 60 would be 57; few repetitions make it a little short"


def test_a_difference_is_found_and_its_size_is_right() -> None:
    rng = random.Random(2)
    a = [sample(times(rng, 100)) for _ in range(3)]
    b = [Sample(s.keys, tuple((v[0] * 0.5,) for v in s.values)) for s in a]
    for statistic in (stats.mean, stats.quantile(0.5), stats.quantile(0.99)):
        ratio = stats.ratio(a, b, statistic)
        assert ratio is not None
        assert ratio.differs
        assert ratio.value == pytest.approx(0.5)
        assert ratio.low == pytest.approx(0.5), "the same requests were asked of both"


def test_a_repetition_that_went_badly_widens_the_interval() -> None:
    rng = random.Random(3)
    a = [sample(times(rng, 100)) for _ in range(3)]
    steady = [sample(times(rng, 110)) for _ in range(3)]
    moody = [sample(times(rng, m)) for m in (60, 110, 160)]
    one, other = (stats.ratio(a, b, stats.mean) for b in (steady, moody))
    assert one
    assert other
    assert one.low
    assert one.high
    assert other.low
    assert other.high
    assert other.high - other.low > 2 * (one.high - one.low)
    assert not other.differs


def test_arms_that_were_not_sent_the_same_are_compared_unpaired() -> None:
    rng = random.Random(4)
    a = [sample(times(rng, 100, 30))] * 2
    b = [Sample(tuple(range(100, 120)), tuple((v,) for v in times(rng, 100, 20)))] * 2
    ratio = stats.ratio(a, b, stats.mean)
    assert ratio is not None
    assert not ratio.differs


def test_too_little_gives_no_interval() -> None:
    once = stats.ratio([sample([1.0, 2.0, 3.0] * 9)], [sample([4.0, 5.0, 6.0] * 9)], stats.mean)
    assert once is not None
    assert once.differs is None, "what one turn of each says may be the machine's mood"
    few = stats.ratio([sample([1.0])] * 2, [sample([1.0])] * 2, stats.mean)
    assert few is not None
    assert few.differs is None
    assert stats.ratio([Sample((), ())], [sample([1.0])], stats.mean) is None
    one = stats.rate_ratio([100.0], [200.0])
    assert one is not None
    assert one.value == pytest.approx(2)
    assert one.differs is None


def test_rates_are_compared_by_repetition() -> None:
    clear = stats.rate_ratio([100, 200, 300], [150, 300, 450])
    assert clear
    assert clear.differs
    assert clear.low == pytest.approx(1.5)
    noise = stats.rate_ratio([100, 100, 100], [90, 100, 115])
    assert noise
    assert noise.differs is False


# ---- sentences ----


def test_counts_that_happen_to_be_alike_are_no_surer_than_their_requests() -> None:
    """35 to 34 and 36 to 35 have nearly one ratio, but it hangs on four requests."""
    both = {f"r{n}" for n in range(33)}
    chance = stats.count_ratio([both | {"a", "b"}, both | {"a", "b", "c"}], [both | {"d"}, both | {"d", "e"}])
    alone = stats.rate_ratio([35.0, 36.0], [34.0, 35.0])
    assert chance
    assert alone
    assert alone.differs is True
    assert chance.differs is False
    assert chance.value == alone.value
    clear = stats.count_ratio([set(range(10)), set(range(11))], [set(range(60)), set(range(64))])
    assert clear
    assert clear.differs is True
    assert clear.low is not None
    assert clear.low > 3


def test_counts_of_nothing_have_a_ratio_all_the_same() -> None:
    found = stats.count_ratio([set(), set()], [{1, 2, 3}, {1, 2, 4}])
    assert found
    assert found.value > 1
    assert stats.count_ratio([set(), set()], [set(), set()]) is None
    one = stats.count_ratio([{1}], [{1, 2}])
    assert one
    assert one.low is None


def test_one_sentence_per_metric_says_who_is_ahead_or_nobody() -> None:
    rng = random.Random(5)
    base = [times(rng, 100) for _ in range(3)]
    found = result({"no-cache": base, "cache": [[t / 4 for t in r] for r in base], "same": base}, slo=0.05)
    said = {(v.metric, v.a, v.b): v.sentence for v in compare.verdicts(found)}
    assert said["TTFT p50", "no-cache", "cache"].startswith("TTFT p50: cache is 4.00 times lower than no-cache")
    assert "no difference between no-cache and same" in said["TTFT mean", "no-cache", "same"]
    assert said["requests within the target", "no-cache", "cache"].startswith("requests within the target: cache is")
    assert len({v.metric for v in compare.verdicts(found)}) == 6, (
        "no gaps between tokens were noted, so ITL is left out"
    )
    table = compare.rows(found)
    assert [row[0] for row in table] == ["no-cache", "cache", "same"]
    assert len(table[0]) == len(compare.columns(found))


def test_failures_make_an_arm_slower_not_faster() -> None:
    rng = random.Random(6)
    base = [times(rng, 100) for _ in range(3)]
    found = result({"a": base, "b": base})
    for r in found.records:
        if r.arm == "b" and r.session in ("s1", "s2", "s3", "s4"):
            r.status, r.ttft_ms, r.latency_ms = "timeout", None, None
    verdict = next(v for v in compare.verdicts(found) if v.metric == "TTFT mean")
    assert verdict.sentence.startswith("TTFT mean: a is")


def test_streams_beside_long_prompts_are_held_against_themselves_alone() -> None:
    rng = random.Random(8)
    found = result({"plain": [[1.0]] * 3, "pd": [[1.0]] * 3})
    found.records = []
    for arm, slow in (("plain", 40.0), ("pd", 1.0)):
        for repetition in (1, 2, 3):
            for when in ("idle", "busy"):
                for n in range(6):
                    gaps = [rng.uniform(5, 6) * (slow if when == "busy" and i % 20 == 0 else 1) for i in range(200)]
                    more = {"group": f"decode, {when}", "session": f"{when}-{n}", "itl_ms": gaps}
                    found.records.append(record(50.0, arm=arm, repetition=repetition, n=n, **more))
    plain, pd = compare.disturbance(found)
    assert "1." in pd
    assert float(pd.split(" is ")[1].split(" of")[0]) == pytest.approx(1, abs=0.02)
    assert float(plain.split(" is ")[1].split(" of")[0]) > 30
    assert compare.disturbance(result({"a": [[1.0]]})) == []


# ---- files ----


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    found = result({"a": [[1.0, 2.0]]})
    found.records[0].tiers = {"dram": 256}
    files = results.write(found, tmp_path)
    assert [f.name for f in files] == ["test.json", "test.csv"]
    assert results.read(files[0]) == found
    lines = files[1].read_text().splitlines()
    assert len(lines) == 3
    assert "dram=256" in lines[1]
    (tmp_path / "other.json").write_text("{}")
    assert [f.name for f, _ in results.read_folder(tmp_path)] == ["test.json"]
    with pytest.raises(ConfigError, match="no result"):
        results.read(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="--out"):
        results.read_folder(tmp_path / "nowhere")


def test_two_files_are_compared_and_what_differs_is_said(tmp_path: Path) -> None:
    rng = random.Random(7)
    a, b = result({"": [times(rng, 100)] * 2}), result({"": [times(rng, 20)] * 2})
    b.seed = 9
    a.parameters, b.parameters = {"scale": 1.0, "rate": 2.0}, {"scale": 0.5, "rate": 2.0}
    merged = compare.merged(a, b, ("a", "b"))
    assert merged.arms == ["a", "b"]
    assert any("differ in seed" in note for note in merged.notes)
    assert [n for n in merged.notes if "parameters" in n] == ["The two differ in parameters, scale: 1.0 and 0.5."]
    assert any(v.sentence.startswith("TTFT mean: b is") for v in compare.verdicts(merged))


def test_an_arm_whose_cache_gave_nothing_is_named_where_another_one_gave_much() -> None:
    def told(shares: dict[str, int]) -> list[str]:
        whole = result({arm: [[1.0, 2.0]] for arm in shares})
        whole.records = [msgspec.structs.replace(r, cached_tokens=shares[r.arm]) for r in whole.records]
        return compare.idle_caches(whole)

    assert told({"gpu-cache": 30, "cache": 80, "lmcache": 80}) == []
    (said,) = told({"gpu-cache": 30, "cache": 80, "lmcache": 30, "pd": 30})
    assert said.startswith("lmcache found 30% of its prompt tokens cached, gpu-cache 30%")
    assert told({"gpu-cache": 0, "cache": 0, "lmcache": 0}) == [], "nothing to reuse: nobody found anything"
    assert told({"cache": 80, "lmcache": 0}) == [], "nothing to compare with"


def test_failures_are_told_with_their_reasons() -> None:
    whole = result({"a": [[1.0] * 8], "b": [[1.0] * 8]})
    assert compare.failures(whole) == []
    for n, why in enumerate(["HTTP 503", "HTTP 503", "gone", "late", "odd"]):
        whole.records[n] = msgspec.structs.replace(whole.records[n], status="error", error=why)
    assert compare.failures(whole) == ["a: 5 of 8 requests failed: 2 x HTTP 503; 1 x gone; 1 x late; 1 other reasons."]


def test_the_interval_of_a_count_is_the_same_in_every_process() -> None:
    """Text has another hash in each, and a set another order."""

    class Name(str):
        sign = 1

        def __hash__(self) -> int:
            return self.sign * int(self)

    def found(sign: int) -> stats.Ratio | None:
        Name.sign = sign
        turns = [({Name(n) for n in range(0, 30)}, {Name(n) for n in range(9, 60)}) for _ in range(3)]
        return stats.count_ratio([a for a, _ in turns], [b for _, b in turns], seed=3)

    assert found(1) == found(-1)
