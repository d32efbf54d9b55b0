"""A session of storage is a value beside the state: whatever is done to it, it reads what a fresh one would."""

import threading

import pytest
import torch
from cases import close, draw_tokens
from test_storage import filled, small, storage_of

from bmojo.errors import ConfigError, StateError
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.storage import Mark, Storage
from bmojo.memory.store import Store


def found(storage: Storage) -> set[str]:
    """The sources of what its layers read now."""
    return {block.source for kept in storage.layers.values() for row in kept.found for block in row}


@torch.no_grad()
def test_what_is_deleted_is_not_read_again():
    """Within a stride too: neither what had been found, nor what the stream itself has left there, nor from a mark,
    nor from one that was saved."""
    model, tokens = small("bmojo"), draw_tokens(1, 120)
    store = filled(model)
    storage = storage_of(model, store=store, sources=["a"])
    state = model(tokens[:, :90], None, storage=storage)[1]
    assert found(storage) == {"other", "a"}
    storage.settle()
    mark = storage.mark()
    saved = mark.to_tensors()
    stored = next(b for b in store.engine.scan() if b.source == "other" and b.id in
                  {b.id for kept in storage.layers.values() for b in kept.found[0]})  # fmt: skip
    content = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in saved.values())
    assert stored.k.tobytes() not in content  # nothing of others in a file of this stream

    def on(session: Storage) -> torch.Tensor:
        logits, at = [], state
        for token in tokens[:, 90:].split(1, 1):
            out, at = model(token, at, storage=session)
            logits.append(out)
        return torch.cat(logits, 1)

    again = storage_of(model, store=store, sources=["b"], write=False)
    again.back(Mark.from_tensors(saved, store))
    with_other = on(again)
    store.delete("other")
    expected = None
    for session in (storage, again, storage_of(model, store=store, sources=["b"], write=False)):
        if session is not storage:
            session.restore(mark if session is again else Mark.from_tensors(saved, store))
        logits = on(session)
        assert found(session) == {"a"}
        expected = logits if expected is None else expected
        close(logits, expected, 1e-9)
    assert (with_other - expected).abs().max() > 1e-4
    for source in set(store.engine.sources()):
        store.delete(source)
    storage.restore(mark)
    model(tokens[:, 90:91], state, storage=storage)
    assert not found(storage)
    assert not any(own.blocks for kept in storage.layers.values() for own in kept.own)


@torch.no_grad()
def test_going_back_to_a_mark_made_before_the_writer_told_keeps_memory_bounded():
    class Slow(MemoryEngine):
        gate = threading.Event()

        def put(self, blocks):
            self.gate.wait()
            return super().put(blocks)

    model, engine = small("swa"), Slow()
    store = Store(engine, publish=0)
    storage = storage_of(model, store=store, sources=["a"])
    state = model(draw_tokens(1, 40), storage=storage)[1]
    mark = storage.mark()
    engine.gate.set()
    store.flush()
    at = state
    for part in draw_tokens(1, 80).split(20, 1):
        at = model(part, at, storage=storage)[1]
        store.flush()
    assert storage.released[0] > 40
    storage.back(mark)
    for part in draw_tokens(1, 200).split(20, 1):
        state = model(part, state, storage=storage)[1]
        store.flush()
    assert max(len(own.blocks) for kept in storage.layers.values() for own in kept.own) <= 9


def handed(storage: Storage, tokens: torch.Tensor) -> None:
    """The store has each block of the row's past once, and its tokens are those that were read."""
    assert storage.store is not None
    storage.settle()
    starts = {layer: [] for layer in storage.layers}
    for block in storage.store.engine.scan():
        if storage._owns(0, block):
            assert block.tokens.tolist() == tokens[0, block.start :][: len(block.tokens)].tolist()
            starts[block.layer].append(block.start)
    size = storage.config.storage_block
    whole = list(range(0, tokens.shape[1] - size + 1, size))
    assert {layer: sorted(mine) for layer, mine in starts.items()} == dict.fromkeys(storage.layers, whole)


@pytest.mark.parametrize("other", [0, 1, 30])
@torch.no_grad()
def test_what_it_went_back_from_is_not_its_past(other):
    """After `other` tokens that are the same, it reads something else than what it went back from."""
    model = small("bmojo")
    first, wrong, right = draw_tokens(1, 43), draw_tokens(1, 70, seed=2), draw_tokens(1, 200, seed=3)
    right[:, :other] = wrong[:, :other]
    tokens = torch.cat((first, right), 1)
    logits = []
    for detour in (False, True):
        store = filled(model)
        storage = storage_of(model, store=store, sources=["a"])
        state = model(first, storage=storage)[1]
        if detour:
            mark = storage.mark()
            model(wrong, state, storage=storage)
            storage.back(mark)
        found = []
        for part in right.split(20, 1):
            out, state = model(part, state, storage=storage)
            found.append(out)
            storage.settle()
        logits.append(torch.cat(found, 1))
        assert storage.released[0] > 100
        handed(storage, tokens)
    close(logits[1], logits[0], 1e-5)


@pytest.mark.parametrize("again", [[1] * 60, [60], [7, 1, 1, 51]])
@torch.no_grad()
def test_broken_off_between_layers_and_read_again_in_other_calls(again):
    model, tokens = small("bmojo"), draw_tokens(1, 103)
    store = filled(model)
    storage = storage_of(model, store=store, sources=["a"])
    state = model(tokens[:, :43], storage=storage)[1]
    mark = storage.mark()
    model.blocks[1].forward = None
    with pytest.raises(TypeError):
        model(tokens[:, 43:], state, storage=storage)
    del model.blocks[1].forward
    storage.back(mark)
    for part in tokens[:, 43:].split(again, 1):
        state = model(part, state, storage=storage)[1]
    handed(storage, tokens)
    assert storage.sources == ["a"]


@pytest.mark.parametrize("step", [False, True])
@torch.no_grad()
def test_a_call_broken_off_is_told_and_mended(step):
    model, tokens = small("bmojo"), draw_tokens(1, 60)
    storage = storage_of(model)
    state = model(tokens[:, :43], storage=storage)[1]
    mark, part = storage.mark(), tokens[:, 43:44] if step else tokens[:, 43:]
    expected = model(part, state, storage=storage)[0]
    storage.back(mark)
    layer = model.blocks[1].mixer

    def interrupted(*args):
        raise KeyboardInterrupt

    layer.o_proj.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(part, state, storage=storage)
    del layer.o_proj.forward
    for _ in range(2):  # what is refused changes nothing
        with pytest.raises(ConfigError, match=r"storage has read \[(44|60)\] tokens, the state \[43\].*restore both"):
            model(part, state, storage=storage)
    storage.back(mark)
    assert torch.equal(model(part, state, storage=storage)[0], expected)


@torch.no_grad()
def test_what_is_refused_changes_nothing():
    model, tokens = small("bmojo"), draw_tokens(1, 60)
    storage = storage_of(model)
    state = model(tokens[:, :43], storage=storage)[1]
    expected = model(tokens[:, 43:], state, storage=storage.fork())[0]
    for given in ({"state": None}, {"state": state, "document_ids": torch.zeros(1, 17, dtype=torch.int64)}):
        with pytest.raises(ConfigError):
            model(tokens[:, 43:] + 1, given.pop("state"), storage=storage, **given)
    with pytest.raises(ConfigError, match="the storage has 1 rows, the tokens 2"):
        model(tokens.repeat(2, 1), storage=storage)
    with pytest.raises(StateError, match="marked with 2 rows"):
        storage.back(storage_of(model, 2).mark())
    assert torch.equal(model(tokens[:, 43:], state, storage=storage)[0], expected)


@torch.no_grad()
def test_rows_are_sessions_of_their_own():
    model, tokens = small("bmojo"), draw_tokens(3, 120)
    logits = []
    for rows in (["a", "b", "c"], ["a"], ["b"], ["c"]):
        storage = storage_of(model, len(rows), store=filled(model), sources=rows)
        mine = tokens[["abc".index(name) for name in rows]]
        state, found = None, []
        for part in mine.split([37, 1, 1, 30, 51], 1):
            out, state = model(part, state, storage=storage)
            found.append(out)
        logits.append(torch.cat(found, 1))
    for row in range(3):  # a row sees what the others hand over in earlier calls only where it is published
        close(logits[0][row, :37], logits[1 + row][0, :37], 1e-5)


@torch.no_grad()
def test_the_order_in_which_sources_were_stored_does_not_matter():
    model, tokens, logits = small("bmojo"), draw_tokens(1, 60), []
    for order in ((1, 2, 3), (3, 1, 2)):
        store = Store(MemoryEngine(), publish=0)
        for seed in order:
            other = storage_of(model, store=store, sources=[f"other {seed}"], find=False)
            model(
                torch.randn(1, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
                storage=other,
            )
            other.settle()
        logits.append(model(tokens, storage=storage_of(model, store=store, sources=["a"]))[0])
    close(logits[1], logits[0], 1e-9)


def test_two_threads_with_one_store():
    """Each, at a generation of its own, reads as if it were alone with what was there."""
    model = small("bmojo")
    store = filled(model)
    pin, results = [(0, store.engine.pin(), (0,))], {}

    @torch.no_grad()
    def run(name: str, storage: Storage) -> None:
        state, found = None, []
        for part in draw_tokens(1, 150, seed=ord(name[0])).split(13, 1):
            out, state = model(part, state, storage=storage)
            found.append(out)
        results[name] = torch.cat(found, 1)

    kept = Store(store.engine, publish=1e9)  # stays at the generation that is there now
    threads = [
        threading.Thread(target=run, args=(name, storage_of(model, store=kept, sources=[name]))) for name in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept.flush()
    for name in "abc":
        run(f"{name} alone", storage_of(model, store=store, sources=[f"{name} alone"], replay=pin))
        assert torch.equal(results[name], results[f"{name} alone"])
        assert store.engine.sources()[name]["blocks"] == 2 * (150 // 8)


@torch.no_grad()
def test_random_actions_on_a_session_equal_a_fresh_one():
    model, generator = small("bmojo"), torch.Generator().manual_seed(0)
    store = filled(model)
    pinned = store.engine.pin()
    reading = Store(store.engine, publish=1e9)

    def fresh(tokens: torch.Tensor, cut: int) -> torch.Tensor:
        storage = storage_of(model, store=store, sources=["fresh"], replay=[(0, pinned, (0,))])
        return model(tokens, storage=storage)[0][:, cut:]

    none = torch.zeros(1, 0, dtype=torch.int64)
    live = [(storage_of(model, store=reading, sources=["a"]), none, None)]
    marks = []
    for _ in range(60):
        which = int(torch.randint(len(live), (1,), generator=generator))
        storage, tokens, state = live[which]
        match int(torch.randint(6, (1,), generator=generator)):
            case 0:
                marks.append((which, storage.mark(), tokens, state))
            case 1 if marks:
                which, mark, tokens, state = marks[int(torch.randint(len(marks), (1,), generator=generator))]
                storage = live[which][0]
                storage.back(mark)
            case 2 if marks:
                _, mark, tokens, state = marks[int(torch.randint(len(marks), (1,), generator=generator))]
                storage.restore(mark)
            case 3 if len(live) < 4 and state is not None:
                live.append((storage.fork(write=bool(which % 2)), tokens, state))
        length = int(torch.randint(1, 20, (1,), generator=generator))
        part = torch.randint(13, (1, length), generator=generator)
        logits, state = model(part, state, storage=storage)
        whole = torch.cat((tokens, part), 1)
        close(logits, fresh(whole, tokens.shape[1]), 1e-5)
        live[which] = (storage, whole, state)
