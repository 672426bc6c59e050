"""Topologies over several hosts: where things run, and what is refused in words."""

import pytest

from pdserve import topology, topology_hosts
from pdserve.errors import ConfigError

TWO = """
name: two
model: demo
hosts:
  - {name: a, address: 10.0.0.1}
  - {name: b, address: 10.0.0.2}
engine: {device: cpu}
prefill: [{port: 8100, host: a}]
decode: [{port: 8100, host: b}]
cache: {size: 1GiB}
proxy: {port: 8000, host: b}
"""


def changed(old: str, new: str) -> str:
    assert old in TWO
    return TWO.replace(old, new)


def test_every_process_listens_on_its_host() -> None:
    top = topology.parse(TWO)
    prefill, decode = top.instances
    assert (prefill.on, prefill.url) == ("a", "http://10.0.0.1:8100")
    assert (decode.on, decode.url) == ("b", "http://10.0.0.2:8100")  # the same port, on another host
    assert top.proxy is not None
    assert (top.proxy_on, top.proxy.url) == ("b", "http://10.0.0.2:8000")


def test_the_proxy_is_on_the_first_host_unless_it_says_otherwise() -> None:
    assert topology.parse(changed(", host: b}\n", "}\n").replace("port: 8100}", "port: 8100, host: b}")).proxy_on == "a"


def test_one_hosts_part() -> None:
    top = topology.parse(TWO)
    a, b = topology_hosts.only(top, "a"), topology_hosts.only(top, "b")
    assert [i.name for i in a.instances] == ["prefill-0"]
    assert [i.name for i in b.instances] == ["decode-0"]
    assert a.proxy is None
    assert b.proxy is not None
    assert a.cache is not None


def test_without_hosts_nothing_changes() -> None:
    top = topology.parse("name: one\nmodel: demo\nengine: {device: cpu}\nboth: [{port: 8100}]\n")
    assert (top.instances[0].host, top.instances[0].on, top.proxy_on) == ("127.0.0.1", "", "")


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    top = topology.parse(changed("10.0.0.2", '"fd00::2"'))
    assert top.instances[1].url == "http://[fd00::2]:8100"
    assert topology_hosts.Peers().url(top.hosts[1]) == "tcp://[fd00::2]:7900"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed("port: 8100, host: a}", "port: 8100}"), r"prefill\[0\]\.host: missing.*Name one of: a, b"),
        (changed("host: a}", "host: x}"), r"prefill\[0\]\.host: 'x' is not one of the hosts.*Name one of: a, b"),
        (changed("8000, host: b", "8000, host: z"), r"proxy\.host: 'z' is not one of the hosts"),
        (changed("name: b,", "name: a,"), r"hosts\[1\]\.name: 'a' is that of hosts\[0\]"),
        (changed("10.0.0.2", "10.0.0.1"), r"hosts\[1\]\.address: '10\.0\.0\.1' is that of hosts\[0\]"),
        (changed("10.0.0.2", "127.0.0.1"), r"hosts\[1\]\.address: '127\.0\.0\.1' cannot be reached"),
        (changed("8100, host: b", "8080, host: b"), r"cache\.admin_port: 8080 is used by decode\[0\] on host b"),
        (TWO + "peers: {port: 8000}\n", r"(proxy\.port|peers\.port): 8000 is used by"),
        (TWO + "peers: {prot: 1}\n", r"peers\.prot: unknown key"),
        (TWO + "peers: {discover: consul://x}\n", r"peers\.discover: 'consul://x' is not a source.*dns://"),
        (TWO + "peers: {transport: udp}\n", r"peers\.transport: 'udp' is not known.*tcp"),
        (TWO[: TWO.index("hosts:")] + "both: [{port: 1}]\npeers: {}\n", "peers: there are no hosts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        topology.parse(text)
