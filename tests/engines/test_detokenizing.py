"""A stream that was given the end of a prompt says what one says that was given all of it."""

import random
import types

import pytest

pytest.importorskip("tokenizers", reason="vLLM brings it along")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pdserve.engines.vllm import detokenizing
from pdserve.engines.vllm.detokenizing import KEPT, Primed

TEXT = "Die Straße führt 河川 entlang, über Brücken — und zurück; 🚢🌊 αβγ. Русский  текст\n"


def byte_level():
    """As GPT-2, Llama 3, Qwen: each token is a few bytes, of one character or of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    """As Llama 2, Mistral: words, and single bytes for what is no word; a word's space is stripped where the text begins."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *(f"▁{w}" for w in ("so", "far", "away")), "s", "o", "▁"]
    vocab = {w: i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece():
    vocab = {w: i for i, w in enumerate(["[UNK]", "far", "##ther", "away", ",", "n", "'", "t", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def said(make, tokenizer, prompt, answer):
    """What each token of the answer adds, or the trouble that it makes."""
    stream, found = make(prompt), []
    for token in answer:
        try:
            found.append(stream.step(tokenizer, token))
        except Exception as e:  # noqa: BLE001 - compared
            return [*found, str(e)]
    return found


def whole(ids):
    return decoders.DecodeStream(ids=list(ids), skip_special_tokens=True)


def primed(ids):
    return Primed(decoders.DecodeStream, list(ids), True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [byte_level, byte_fallback, word_piece])
def test_each_token_adds_what_it_adds_behind_the_whole_prompt(kind, seed):
    r, tokenizer = random.Random(seed), kind()
    if kind is word_piece:
        ids = [r.randrange(9) for _ in range(500)]
    else:
        ids = tokenizer.encode("".join(r.choice(TEXT) if r.random() < 0.7 else " so far" for _ in range(900))).ids
    for _ in range(20):
        cut = r.randrange(KEPT + 8, len(ids) - 40)  # also within a character
        assert said(primed, tokenizer, ids[:cut], ids[cut : cut + 40]) == said(whole, tokenizer, ids[:cut], ids[cut : cut + 40])


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, word_piece])
def test_any_tokens_whatever_say_the_same_too(kind):
    r, tokenizer = random.Random(5), kind()
    for _ in range(60):
        ids = [r.randrange(tokenizer.get_vocab_size()) for _ in range(300)]
        assert said(primed, tokenizer, ids[:250], ids[250:]) == said(whole, tokenizer, ids[:250], ids[250:])


def test_only_the_end_is_decoded_where_it_is_text():
    tokenizer = byte_level()
    ids = tokenizer.encode("so far " * 300).ids
    decoded = []
    kept = detokenizing.ending(ids, lambda some: decoded.append(len(some)) or tokenizer.decode(some))
    assert kept == ids[-KEPT:]
    assert decoded == [KEPT]
    kept = detokenizing.ending(tokenizer.encode("🚢" * 300).ids[:-4] + ids[:1], tokenizer.decode)
    assert KEPT < len(kept) <= KEPT + 4, "from where a character begins"
    broken = ids + tokenizer.encode("🚢").ids[:2]
    assert detokenizing.ending(broken, tokenizer.decode) == broken


def test_it_is_put_where_vllm_looks_for_it(monkeypatch):
    original = decoders.DecodeStream
    monkeypatch.setattr(decoders, "DecodeStream", original)
    detokenizing.install()
    detokenizing.install()
    tokenizer = byte_level()
    ids = tokenizer.encode("so far " * 300).ids
    stream = decoders.DecodeStream(ids=ids, skip_special_tokens=True)
    assert isinstance(stream, Primed)
    assert [stream.step(tokenizer, i) for i in ids[:6]] == list("so far")
    assert isinstance(decoders.DecodeStream(skip_special_tokens=True), original)
    assert isinstance(decoders.DecodeStream(ids=ids[:20]), original)


def test_vllm_s_own_metrics_put_it_into_the_process_that_answers_clients(monkeypatch):
    """In `vllm serve` the connector itself lives in another process than the text of tokens."""
    pytest.importorskip("vllm", reason="it is vLLM that is asked here")

    from prometheus_client import REGISTRY
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm

    monkeypatch.setattr(decoders, "DecodeStream", decoders.DecodeStream)
    transfer = KVTransferConfig(
        kv_connector="PdserveConnector", kv_connector_module_path="pdserve.engines.vllm.connector", kv_role="kv_both"
    )
    before = set(REGISTRY._collector_to_names)
    try:
        KVConnectorProm(types.SimpleNamespace(kv_transfer_config=transfer), ["engine"], {0: ["0"]})
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)
    assert isinstance(decoders.DecodeStream(ids=list(range(100)), skip_special_tokens=True), Primed)
