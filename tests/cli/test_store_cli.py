import json

import numpy as np
import pytest

from bmojo.data.tokenizers import ByteTokenizer
from bmojo.memory.decay import Decay, DecayPolicy
from bmojo.memory.engines import Block, open_store
from bmojo.memory.faded import NOTES


def block(text: str, source: str, start: int = 0) -> Block:
    tokens = ByteTokenizer().encode(text).astype(np.int32)
    rng = np.random.default_rng(tokens)
    k, v = rng.standard_normal((2, len(tokens), 1, 4)).astype(np.float16)
    return Block(1, source, start, tokens, k, v, k[:2, 0], np.zeros(len(tokens), np.float32))


@pytest.fixture(params=["lmdb", "sqlite"])
def store(request, tmp_path):
    folder = tmp_path / "store"
    with open_store(folder, engine=request.param, mode="a", meta={"window": 64}) as engine:
        engine.put([block("Hello wörld", "a.txt"), block("and more", "a.txt", 12), block("a secret", "b.txt")])
        engine.note("a.txt", hash="00ff", tokens=19)
        engine.note(NOTES, **{"layer-1": Decay(DecayPolicy(half_lives=(30,), clusters=0)).to_dict()})
    return folder


def test_stats(bmojo, store):
    code, out, err = bmojo("store", "stats", "--store", store)
    assert (code, err) == (0, "")
    assert "3 blocks; 28 tokens, of 2 sources" in out
    assert "19  a.txt" in out
    assert "layer 1: half-life 30 blocks" in out
    assert NOTES not in out
    found = json.loads(bmojo("store", "stats", "--store", store, "--json")[1])
    assert found["half_life"] == {"1": pytest.approx(30)}
    assert found["by_source"].keys() == {"a.txt", "b.txt"}
    assert found["by_source"]["a.txt"] == {"blocks": 2, "tokens": 19, "hash": "00ff"}
    assert (found["blocks"], found["deleted"], found["meta"]) == (3, 0, {"window": 64})


def test_export_to_stdout_and_to_a_file(bmojo, store, tmp_path):
    code, out, err = bmojo("store", "export", "--store", store)
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["id"], row["layer"], row["source"], row["start"]) for row in rows] == [
        (0, 1, "a.txt", 0), (1, 1, "a.txt", 12), (2, 1, "b.txt", 0)
    ]  # fmt: skip
    assert rows[0]["tokens"] == list("Hello wörld".encode())
    file = tmp_path / "out.jsonl"
    code, out, _ = bmojo(
        "store", "export", "--store", store, "--source", "a.txt", "--tokenizer", "bytes", "--out", file
    )
    assert (code, out) == (0, f"{file}: 2 blocks\n")
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["Hello wörld", "and more"]


def test_forget_hides_and_compact_erases(bmojo, refused, store):
    code, out, _ = bmojo("store", "forget", "--store", store, "--source", "b.txt")
    assert code == 0
    assert any(block("a secret", "b.txt").tokens.tobytes() in path.read_bytes() for path in store.iterdir())
    assert out.startswith("b.txt: 1 block hidden; bmojo store compact")
    assert "b.txt" not in bmojo("store", "export", "--store", store)[1]
    assert "1 more forgotten" in bmojo("store", "stats", "--store", store)[1]
    assert "no source 'b.txt'" in refused("store", "forget", "--store", store, "--source", "b.txt")
    assert bmojo("store", "compact", "--store", store)[1].startswith("1 block erased")
    assert not any(block("a secret", "b.txt").tokens.tobytes() in path.read_bytes() for path in store.iterdir())
    assert bmojo("store", "compact", "--store", store)[1].startswith("0 blocks erased")
    assert bmojo("store", "forget", "--store", store, "--source", "a.txt", "--compact")[1] == "a.txt: 2 blocks erased\n"
    assert "0 blocks; 0 tokens" in bmojo("store", "stats", "--store", store)[1]


def test_verify_names_the_damage_and_repair_keeps_the_rest(bmojo, refused, store):
    assert bmojo("store", "verify", "--store", store) == (0, "3 blocks, all whole\n", "")
    (log,) = [path for path in store.glob("log-1.*") if not path.name.endswith("lock")]
    content = bytearray(log.read_bytes())
    content[content.index(block("and more", "a.txt").v.tobytes())] ^= 1
    log.write_bytes(content)
    line = refused("store", "verify", "--store", store)
    assert f"{log.name}: block 1" in line
    assert f"bmojo store verify --repair --store {store}" in line
    assert "block 1" in refused("store", "compact", "--store", store)
    code, out, err = bmojo("store", "verify", "--store", store, "--repair")
    assert (code, err) == (0, "")
    assert out == "repaired: 2 blocks kept; lost, read these sources again: 'a.txt' (1)\n2 blocks, all whole\n"
    assert bmojo("store", "verify", "--store", store, "--repair")[1] == "2 blocks, all whole\n"


def test_refusals(bmojo, refused, store, tmp_path):
    for verb in ("stats", "compact", "verify", "export"):
        assert "no store of blocks" in refused("store", verb, "--store", tmp_path / "none")
    assert "no store of blocks" in refused("store", "forget", "--store", tmp_path / "none", "--source", "x")
    assert not (tmp_path / "none").exists()
    assert "did you mean 'a.txt'" in refused("store", "export", "--store", store, "--source", "a.tx")
    assert "verify is for folders" in refused("store", "verify", "--store", "postgresql://localhost/x")
    assert "store stats" in refused("store")
    (store / "meta.json").write_text("{")
    assert "meta.json is damaged" in refused("store", "stats", "--store", store)
    with open_store(tmp_path / "busy", mode="a"):
        assert "is being written by process" in refused("store", "compact", "--store", tmp_path / "busy")
