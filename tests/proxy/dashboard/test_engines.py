from __future__ import annotations

from pdserve.proxy.dashboard.engines import Engine
from pdserve.proxy.dashboard.supervised import Process
from pdserve.proxy.instance import Instance
from pdserve.proxy.upstream import Upstream


def page(born: float, loaded: float, generated: float = 0.0) -> bytes:
    return (
        f'vllm:num_requests_running{{m="x"}} 2\nvllm:num_requests_waiting{{m="x"}} 1\nvllm:kv_cache_usage_perc{{m="x"}} 0.25\n'
        f'vllm:generation_tokens_total{{m="x"}} {generated}\nprocess_start_time_seconds {born}\n'
        f'pdserve_engine_loaded_tokens_total{{tier="dram",m="x"}} {loaded}\n'
        f'pdserve_engine_load_seconds_total{{m="x"}} {loaded / 1000}\npdserve_engine_saved_seconds_total{{m="x"}} {loaded / 10}\n'
    ).encode()


def engine() -> Engine:
    instance = Instance("decode-0", "decode", Upstream("decode-0", "http://127.0.0.1:1"), up=True)
    return Engine(instance, 0.0)


def test_rates_are_between_two_pages() -> None:
    one = engine()
    one.instance.exposed = page(1.0, 100, 10)
    one.look(2.0)
    one.look(3.0)  # the same page: nothing new is known
    one.instance.exposed = page(1.0, 300, 50)
    one.look(4.0)
    assert one.loaded == {"dram": 100.0}
    shown = one.shown(None)
    assert (shown["output_s"], shown["running"], shown["waiting"], shown["kv_used"]) == (20.0, 2.0, 1.0, 0.25)


def test_what_was_saved_before_a_restart_stays_saved() -> None:
    one = engine()
    one.instance.exposed = page(1.0, 100)
    one.look(2.0)
    one.instance.up, one.instance.exposed = False, b""
    one.look(4.0)
    assert one.totals()["loaded"] == {"dram": 100.0}
    assert one.shown(None)["running"] is None, "of an engine that is down nothing is claimed"
    one.instance.up, one.instance.exposed = True, page(9.0, 30)
    one.look(6.0)
    assert one.totals() == {"loaded": {"dram": 130.0}, "load_s": 0.13, "saved_s": 13.0}
    assert one.shown(None)["restarts"] == 1


def test_the_launcher_knows_better_how_often_it_was_restarted() -> None:
    shown = engine().shown(Process("decode-0", "restarting", "again in 4 s", 3))
    assert (shown["restarts"], shown["restarts_by"]) == (3, "launcher")
    assert shown["process"] == {"state": "restarting", "detail": "again in 4 s"}
