"""Local stores whose files are cut off or changed: never a crash, never half a block; repair serves what is left."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_engine_conformance import block, blocks, same_block

from bmojo.errors import StoreError
from bmojo.memory.engines import Block, open_store
from bmojo.memory.engines.verify import repair, verify

LOCAL = ["lmdb", "sqlite"]
SECRET = "s3cr3t"


@pytest.fixture(params=LOCAL)
def small(request, tmp_path):
    """A folder with a store of blocks that fit into pages and blocks that don't, some of them forgotten; the log's
    file, and the blocks by id."""
    folder, rng = tmp_path / "store", np.random.default_rng(0)
    stored = [
        *blocks(rng, 4), block(rng, SECRET, n=40), block(rng, SECRET, n=4), block(rng, "d", n=64),
        block(rng, "d", n=200), block(rng, "a", n=2),
    ]  # fmt: skip
    with open_store(folder, engine=request.param, mode="a") as store:
        for some in (stored[:3], stored[3:6], stored[6:8], stored[8:]):
            store.put(some)
        store.note("d", hash="1")
        store.delete(SECRET)
    (log,) = folder.glob(f"log-*.{request.param}")
    return folder, log, {i: b for i, b in enumerate(stored) if b.source != SECRET}


def served(folder) -> dict[int, Block]:
    with open_store(folder) as store:
        return {block.id: block for block in store.scan()}


def same(got, stored, ids=None):
    assert got.keys() == set(stored if ids is None else ids)
    for number, one in got.items():
        same_block(one, stored[number], number)


def cut_everywhere(folder, log, stored, cuts):
    """Descending."""
    told = []
    for cut in cuts:
        os.truncate(log, cut)
        try:
            same(served(folder), stored)
        except StoreError as error:
            told.append(str(error))
    assert told
    assert all(str(log) in one and "verify --repair" in one for one in told)


@pytest.mark.slow
def test_cut_off_at_every_byte_it_serves_all_or_is_refused(small):
    folder, log, stored = small
    cut_everywhere(folder, log, stored, range(log.stat().st_size, -1, -1))


def some_cuts(log, seed):
    size, rng = log.stat().st_size, np.random.default_rng(seed)
    edges = {edge + off for edge in range(0, size, 4096) for off in (-1, 0, 1, 100)} | {16, 28, 99, 100, 152, 4248}
    return sorted((edges | set(rng.integers(0, size, 30).tolist())) & set(range(size)), reverse=True)


def test_cut_off_at_some_bytes_it_serves_all_or_is_refused(small):
    folder, log, stored = small
    cut_everywhere(folder, log, stored, some_cuts(log, 0))


def test_repair_serves_what_survived_a_cut_and_nothing_that_was_forgotten(small, tmp_path):
    folder, log, stored = small
    whole, kept = log.read_bytes(), []
    for cut in some_cuts(log, 1)[::4]:
        copy = tmp_path / f"cut{cut}"
        shutil.copytree(folder, copy)
        os.truncate(copy / log.name, cut)
        repaired = repair(copy)
        got = served(copy)
        same(got, stored, got)
        assert repaired.blocks == len(got)
        survivors = sum(data in whole[:cut] for data in (b.v[:20].tobytes() for b in stored.values()))
        assert len(got) >= survivors - 1  # one may have been cut behind its values
        kept.append(len(got))
        with open_store(copy, mode="a", publish=0) as store:
            (number,) = store.put([stored[0]])
            assert number > max(got, default=-1)
            assert store.get([number])[0].source == stored[0].source
        shutil.rmtree(copy)
    assert kept[0] >= len(stored) - 1
    assert sorted(kept, reverse=True) == kept


@pytest.mark.parametrize("engine", LOCAL)
def test_a_log_of_no_bytes_or_none_is_no_new_store(tmp_path, engine):
    with open_store(tmp_path, engine=engine, mode="a", meta={"x": 1}) as store:
        store.put([block(np.random.default_rng(0))])
    (log,) = tmp_path.glob(f"log-*.{engine}")
    for damage in (lambda: os.truncate(log, 0), log.unlink):
        damage()
        for mode in ("r", "a"):
            with pytest.raises(StoreError, match=log.name):
                open_store(tmp_path, mode=mode)
        assert log.name in verify(tmp_path).problems[0]
    assert repair(tmp_path).blocks == 0
    with open_store(tmp_path, mode="a") as store:
        assert store.meta == {"x": 1}
        assert list(store.scan()) == []


def test_changed_bytes_are_named_and_the_rest_is_served_after_repair(small, tmp_path):
    folder, log, stored = small
    whole, rng = log.read_bytes(), np.random.default_rng(2)
    hit = whole.index(stored[7].v.tobytes()[1000:1100])
    places = [hit, *rng.integers(0, len(whole), 3).tolist()]
    for place in places:
        copy = tmp_path / f"flip{place}"
        shutil.copytree(folder, copy)
        with (copy / log.name).open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 0x10]))
        problems = verify(copy).problems
        if place == hit:
            assert any(log.name in problem and "block 7" in problem for problem in problems)
            with open_store(copy) as store:
                with pytest.raises(StoreError, match=rf"{log.name}: block 7"):
                    store.get([7])
                same_block(store.get([6])[0], stored[6], 6)
        lost = repair(copy).lost
        got = served(copy)
        same(got, stored, got)
        assert len(got) >= len(stored) - 1
        assert verify(copy).problems == []
        if place == hit:
            assert lost == {"d": 1}
            with open_store(copy) as store:
                assert store.sources()["d"] == {"blocks": 1, "tokens": 64}  # what was noted is no longer true
        shutil.rmtree(copy)


@pytest.mark.slow
def test_a_page_of_noise_never_ends_this_process(small, tmp_path):
    """What LMDB makes of a damaged page is not ours to say, so another process looks."""
    folder, log, stored = small
    size = log.stat().st_size
    for page in range(0, size, 4096):
        copy = tmp_path / f"page{page}"
        shutil.copytree(folder, copy)
        with (copy / log.name).open("r+b") as file:
            file.seek(page)
            file.write(np.random.default_rng(page).bytes(4096))
        verify(copy)
        repair(copy)
        assert verify(copy).problems == []
        got = served(copy)
        same(got, stored, got)
        shutil.rmtree(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "engine": "no"}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    open_store(tmp_path, mode="a").close()
    (tmp_path / "meta.json").write_bytes(content)
    for use in (open_store, verify, repair):
        with pytest.raises(StoreError, match=r"meta\.json"):
            use(tmp_path)


def test_of_a_newer_format(tmp_path):
    open_store(tmp_path, mode="a").close()
    path = tmp_path / "meta.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError, match=r"format 2.*update bmojo"):
        open_store(tmp_path)


def test_a_log_without_its_manifest_is_not_overwritten(small):
    folder, log, _ = small
    (folder / "meta.json").unlink()
    with pytest.raises(StoreError, match=r"no meta\.json"):
        open_store(folder, mode="a")
    with pytest.raises(StoreError, match=r"no meta\.json"):
        open_store(folder)
    assert log.stat().st_size


def test_a_write_ahead_log_is_salvaged_with_its_file(tmp_path):
    """What SQLite had not yet moved into its file when the writer died."""
    code = """if True:
        import os, sys, numpy as np
        from test_engine_conformance import blocks
        from bmojo.memory.engines import open_store
        store = open_store(sys.argv[1], engine="sqlite", mode="a")
        store.put(blocks(np.random.default_rng(0), 6))
        os._exit(0)
    """
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env)
    assert (tmp_path / "log-1.sqlite-wal").stat().st_size
    assert repair(tmp_path).blocks == 6
    same(served(tmp_path), dict(enumerate(blocks(np.random.default_rng(0), 6))))
