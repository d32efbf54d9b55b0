"""In-storage memory: it equals full attention, however a stream is cut, and nothing comes from the future."""

from __future__ import annotations

import pytest
import torch
from cases import close, draw_tokens

from bmojo import BMojoLM, presets
from bmojo.errors import ConfigError, StateError
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.storage import Mark, Storage, root
from bmojo.memory.store import Store
from bmojo.nn.mixer import Trace

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 16,
         "window": 16, "chunk_size": 8, "storage_block": 8, "storage_keys": 2, "storage_stride": 4,
         "storage_queries": 2, "storage_blocks": 3}  # fmt: skip


def small(preset: str, **changes) -> BMojoLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "storage_layers": (0, 1), **({"eidetic_slots": 4} if preset == "bmojo" else {})}
    if preset == "bmojo":
        sizes |= {"ssm_head_dim": 8, "ssm_state_size": 4}
    model = BMojoLM(presets.get(preset, "tiny", **{**sizes, **changes})).double().eval()
    for parameter in model.parameters():  # attention that looks at something
        if parameter.ndim == 2:
            parameter.data *= 2
    return model


def storage_of(model: BMojoLM, rows: int = 1, **options) -> Storage:
    dtype = torch.float64 if options.get("store") is None else torch.float32  # engines hold no wider one
    return Storage(model.config, rows, dtype=dtype, **options)


@pytest.mark.parametrize("block", [4, 8, 16])
@torch.no_grad()
def test_with_every_block_found_it_is_full_attention(block):
    everything = {"positions": "true", "storage_blocks": 64, "storage_block": block}
    streaming = small("swa", **everything)
    full = BMojoLM(streaming.config.replace(window=None, storage_layers=())).double()
    full.load_state_dict(streaming.state_dict())
    tokens = draw_tokens(2, 90)
    expected = full(tokens)[0]
    assert (streaming(tokens)[0] - expected).abs().max() > 1e-3
    close(streaming(tokens, storage=storage_of(streaming, 2))[0], expected, 1e-10, "one shot")
    storage, state, found = storage_of(streaming, 2), streaming.empty_state(2), []
    for token in tokens.split(1, 1):
        logits, state = streaming(token, state, storage=storage)
        found.append(logits)
    close(torch.cat(found, 1), expected, 1e-10, "one by one")


CASES = {
    "swa": {},
    "true positions": {"positions": "true"},
    "bmojo": {},
    "stride 8": {"storage_stride": 8},
    "long blocks": {"storage_block": 16},
    "short blocks": {"storage_block": 4},
    "one layer": {"storage_layers": (1,)},
    "untied": {"tie_sources": False},
    "summary": {"fading": "summary"},
}


@pytest.mark.parametrize("stored", [False, True], ids=["own", "store"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_any_cutting_of_a_stream_gives_the_same(case, stored):
    model = small("swa" if case == "swa" else "bmojo", **CASES[case])
    tokens = draw_tokens(2, 100)
    engine = MemoryEngine()
    if stored:
        other = storage_of(model, store=Store(engine), sources=["other"])
        model(draw_tokens(1, 60) * 3 % 13, storage=other)
        other.store.flush()

    def session() -> Storage:
        store = Store(engine, publish=1e9) if stored else None
        return storage_of(model, 2, store=store, replay=[(0, engine.pin(), (0, 0))] if stored else None)

    expected, last = model(tokens, storage=session())
    assert (expected - model(tokens)[0]).abs().max() > 1e-3
    for sizes in ([1] * 100, [37, 1, 1, 13, 48], [3, 29, 1, 64, 3], [99, 1]):
        storage, state, found = session(), None, []
        for part in tokens.split(sizes, 1):
            logits, state = model(part, state, storage=storage)
            found.append(logits)
        tolerance = 1e-5 if stored else 1e-9
        close(torch.cat(found, 1), expected, tolerance, str(sizes[:3]))
        for name, tensor in state.layers[1].items():
            close(tensor.double(), last.layers[1][name].double(), tolerance, name)


def filled(model: BMojoLM) -> Store:
    """A store with a document of another source."""
    store = Store(MemoryEngine(), publish=0)
    with torch.no_grad():
        model(draw_tokens(1, 60, seed=1), storage=storage_of(model, store=store, sources=["other"]))
    store.flush()
    return store


@torch.no_grad()
def test_branches_of_a_stream_never_see_each_other():
    model, tokens = small("bmojo"), draw_tokens(1, 110)
    first, then, instead = tokens[:, :53], tokens[:, 53:90], draw_tokens(1, 37, seed=2)
    undisturbed = storage_of(model, store=filled(model), sources=["a"])
    state = model(first, storage=undisturbed)[1]
    expected = model(then, state, storage=undisturbed)[0]
    assert (expected - model(then, state)[0]).abs().max() > 1e-3

    store = filled(model)
    storage = storage_of(model, store=store, sources=["a"])
    for _ in range(2):
        start = storage.mark()
        model(first, storage=storage)
        storage.back(start)
    model(first, storage=storage)
    kept = storage.mark()
    aside = storage.fork(write=False)
    blocks = store.stats()["blocks"]
    close(model(then, state, storage=aside)[0], expected, 1e-5, "aside")
    assert store.stats()["blocks"] == blocks
    twin = storage.fork()
    model(instead, state, storage=twin)
    model(instead, state, storage=storage)
    storage.restore(Mark.from_tensors(kept.to_tensors(), store))
    close(model(then, state, storage=storage)[0], expected, 1e-5, "restored")
    storage.restore(storage.mark())
    assert len(set(store.engine.sources()) | set(storage.sources)) == 4  # nothing came after it: no new branch
    store.flush()
    sources = set(store.engine.sources())
    assert len(sources) == 4
    assert {root(source) for source in sources} == {"other", "a"}
    with pytest.raises(ConfigError, match="they go together"):
        model(tokens, storage=twin)


@torch.no_grad()
def test_a_session_that_found_nothing_can_begin_to_find():
    """It has handed over the same, and knows what asks."""
    model, tokens = small("bmojo", storage_layers=(1,)), draw_tokens(1, 110)
    stores, marks, states = [filled(model) for _ in range(2)], [], []
    for store, find in zip(stores, (True, False), strict=True):
        storage = storage_of(model, store=store, sources=["a"], find=find)
        states.append(model(tokens[:, :72], storage=storage)[1])
        storage.settle()
        marks.append(storage.mark())
    for name, ring in marks[0].rings.items():
        close(marks[1].rings[name], ring, 1e-12, name)
    found = []
    for store, mark, state in zip(stores, marks, states, strict=True):
        storage = storage_of(model, store=store, write=False)
        storage.back(mark)
        found.append(model(tokens[:, 72:], state, storage=storage)[0])
    close(found[1], found[0], 1e-9)


@torch.no_grad()
def test_a_mark_of_other_settings_is_refused():
    model = small("bmojo")
    storage = storage_of(model)
    model(draw_tokens(1, 40), storage=storage)
    with pytest.raises(StateError, match="2 tokens that ask, this one has 3; go on with the same storage_queries"):
        storage_of(model.with_settings(storage_queries=3)).back(storage.mark())
    storage_of(model.with_settings(storage_stride=8, storage_blocks=1)).back(storage.mark())


@torch.no_grad()
def test_a_stream_forgets_what_the_store_has():
    model, store = small("bmojo"), filled(small("bmojo"))
    storage, state, most = storage_of(model, store=store, sources=["a"]), None, 0
    for part in draw_tokens(1, 400).split(20, 1):
        for _ in range(2):  # the second time what it hands over is there already
            before = storage.mark()
            state_after = model(part, state, storage=storage)[1]
            store.flush()
            storage.back(before)
        state_after = model(part, state, storage=storage)[1]
        state = state_after
        most = max(most, *(len(kept.own[0].blocks) for kept in storage.layers.values()))
    assert most <= 8
    assert store.engine.sources()["a"]["blocks"] == 100


@torch.no_grad()
def test_a_replay_gives_identical_logits_whatever_others_write():
    model, tokens = small("bmojo"), draw_tokens(1, 120)
    store, state, found = filled(model), None, []
    pins = []
    storage = storage_of(model, store=store, sources=["a"], record=pins)
    for part in tokens.split(17, 1):
        logits, state = model(part, state, storage=storage)
        found.append(logits)
        model(draw_tokens(1, 30, seed=len(found)), storage=storage_of(model, store=store, sources=[f"{len(found)}"]))
        store.flush()
    assert len(pins) > 4
    assert storage.released[0] > 50
    for _ in range(2):
        again, state = storage_of(model, store=store, sources=["a"], replay=pins), None
        for part, expected in zip(tokens.split(17, 1), found, strict=True):
            logits, state = model(part, state, storage=again)
            assert torch.equal(logits, expected)


@torch.no_grad()
def test_retrieval_off_is_the_base_model_bit_for_bit():
    model = small("bmojo")
    base = model.with_settings(storage_layers=())
    tokens = draw_tokens(1, 50)
    assert torch.equal(model(tokens)[0], base(tokens)[0])
    with pytest.raises(ConfigError, match="no layer with storage"):
        Storage(base.config)


@torch.no_grad()
def test_nothing_comes_from_the_future():
    model = small("bmojo")
    tokens = draw_tokens(1, 100)
    expected = model(tokens, storage=storage_of(model))[0]
    for cut in (41, 64, 79):
        changed = tokens.clone()
        changed[:, cut:] = tokens[:, cut:].flip(1)
        assert torch.equal(model(changed, storage=storage_of(model))[0][:, :cut], expected[:, :cut])


def test_gradients_are_those_of_full_attention():
    streaming = small("swa", positions="true", storage_blocks=64)
    full = BMojoLM(streaming.config.replace(window=None, storage_layers=())).double()
    full.load_state_dict(streaming.state_dict())
    tokens = draw_tokens(2, 61)
    gradients = []
    for model, given in ((full, {}), (streaming, {"storage": storage_of(streaming, 2, keep=False)})):
        model(tokens, **given)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected, 1e-10, name)


def test_in_training_rows_read_their_own_past_among_blocks_of_others():
    model = small("bmojo", storage_blocks=2).train()
    tokens = draw_tokens(3, 60)
    alone = torch.cat([model(row)[0] for row in tokens.split(1)])
    together = model(tokens)[0]
    assert (alone - together).abs().max() > 1e-3  # blocks of other rows are found
    everything = small("bmojo", storage_blocks=64).train()
    changed = tokens.clone()
    changed[0, 40:] = 1
    first, second = (everything(t)[0] for t in (tokens, changed))
    assert torch.equal(first[0, :40], second[0, :40])  # never what is to come in the row itself
    off = model.eval()(tokens)[0]
    assert (off - together).abs().max() > 1e-3
    checkpointed = small("bmojo", storage_blocks=2).train()
    checkpointed.gradient_checkpointing = True
    losses = [m(tokens)[0].square().mean() for m in (model.train(), checkpointed)]
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        close(q.grad, p.grad, 1e-12, name)


def test_what_is_read_from_storage_teaches_admission():
    model = small("bmojo", eidetic_slots=1, storage_layers=(1,), storage_blocks=2).train()
    tokens, losses, noted = draw_tokens(2, 60), [], []
    admission = model.blocks[1].mixer.admission

    def note(_, __, odds):
        odds.retain_grad()
        noted.append(odds)

    hook = admission.register_forward_hook(note)
    for storage in (storage_of(model, 2, keep=False, distractors=True), storage_of(model, 2, keep=False, find=False)):
        trace = Trace()
        model(tokens, trace=trace, storage=storage)
        losses.append(trace.losses[-1])
        losses[-1].sum().backward()
    hook.remove()
    taught = [int((odds.grad != 0).sum()) for odds in noted]
    assert taught[0] > 2 * taught[1]
    assert torch.isfinite(losses[0]).all()
