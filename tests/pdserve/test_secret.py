import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve import secret
from pdserve.errors import ConfigError


@given(st.text(st.characters(categories=("L", "N")), min_size=1), st.sampled_from(["", "me"]))
def test_a_password_moves_out_of_the_url_and_is_found_again(password, user):
    url = f"redis://{user}:{password}@h:1/0?ttl=5"
    moved, found = secret.moved_to(url, "NAME")
    assert (moved, found) == (f"redis://{user}:${{NAME}}@h:1/0?ttl=5", {"NAME": password})
    assert secret.reveal(moved, "k", found) == url
    assert secret.written_out(moved) == ""
    assert password == secret.written_out(url)


@pytest.mark.parametrize("url", ["redis://h", "redis://:${X}@h", "redis://me@h", "file:///a@b", "s3://b/p?x=a:b@c"])
def test_urls_without_a_password_stay_as_they_are(url):
    assert secret.moved_to(url, "NAME") == (url, {})


@pytest.mark.parametrize("url", ["redis://:a@b@h/0", "redis://u:hush@h", "rediss://:hu/sh@h:1"])
def test_what_is_shown_has_no_password(url):
    assert not any(part in secret.hidden(url) for part in ("hush", "hu/", "sh@", "a@", "b@"))
    assert secret.hidden(url).startswith(url[: url.index("://") + 3])


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(ConfigError, match=r"cache\.tiers\[0\]: the environment variable NOPE is not set"):
        secret.reveal("a${NOPE}", "cache.tiers[0]", {})
