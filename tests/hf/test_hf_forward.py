"""One forward pass: what goes in and comes out, the loss, packed rows, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from cases import close, draw_tokens, same_state
from hf_cases import PRESETS, hf_model, left_padded
from transformers import DataCollatorWithFlattening, DynamicCache

from bmojo import BMojoCache, Trace
from bmojo.errors import BMojoError, ConfigError, StateError


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return hf_model(request.param)


def test_logits_and_state_are_those_of_BMojoLM(model):
    tokens = draw_tokens(2, 21)
    logits, state = model.model(tokens)
    out = model(tokens)
    assert torch.equal(out.logits, logits)
    same_state(out.past_key_values.state, state, 0.0)
    assert out.loss is None
    assert out.hidden_states is None


@torch.no_grad()
def test_calls_with_a_cache_equal_one_call(model):
    tokens = draw_tokens(2, 23)
    cache = BMojoCache()
    parts = [model(part, past_key_values=cache).logits for part in tokens.split([9, 1, 1, 12], 1)]
    close(torch.cat(parts, 1), model(tokens).logits)
    assert cache.get_seq_length() == 23


@torch.no_grad()
def test_embeddings_in_place_of_tokens(model):
    tokens = draw_tokens(2, 11)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)


@torch.no_grad()
def test_logits_to_keep(model):
    tokens = draw_tokens(2, 11)
    every = model(tokens).logits
    close(model(tokens, logits_to_keep=1).logits, every[:, -1:])
    close(model(tokens, logits_to_keep=4).logits, every[:, -4:])
    close(model(tokens, logits_to_keep=torch.tensor([2, 5])).logits, every[:, [2, 5]])


@torch.no_grad()
def test_hidden_states_and_tuples(model):
    tokens = draw_tokens(2, 11)
    out = model(tokens, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert all(state.shape == (2, 11, model.config.hidden_size) for state in out.hidden_states)
    assert torch.equal(model.model.logits(out.hidden_states[-1]), out.logits)
    as_tuple = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], out.logits)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[2], out.hidden_states, strict=True))
    step = model(tokens[:, :1], past_key_values=BMojoCache(model.model(tokens)[1]), output_hidden_states=True)
    assert [tuple(state.shape) for state in step.hidden_states] == [(2, 1, model.config.hidden_size)] * 3


def plain_loss(logits, labels, count=None):
    losses = [
        -torch.log_softmax(logits[row, i - 1], -1)[labels[row, i]]
        for row in range(labels.shape[0])
        for i in range(1, labels.shape[1])
        if labels[row, i] != -100
    ]
    return sum(losses) / (len(losses) if count is None else count)


def test_loss(model):
    tokens, labels = draw_tokens(2, 11), draw_tokens(2, 11, seed=1)
    labels[0, 3:6] = labels[1, 0] = -100
    out = model(tokens, labels=labels)
    close(out.loss, plain_loss(out.logits, labels))
    close(model(tokens, labels=labels, num_items_in_batch=7).loss, plain_loss(out.logits, labels, 7))
    count = torch.tensor(40)
    close(model(tokens, labels=labels, num_items_in_batch=count).loss, plain_loss(out.logits, labels, 40))
    assert model(tokens, labels=torch.full_like(labels, -100)).loss == 0
    shifted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(out.loss, shifted)


def test_the_predictor_of_the_head_innovation_is_trained_in_training_alone():
    model = hf_model("bmojo", innovation="head", head_loss_weight=0.5)
    tokens = draw_tokens(2, 11)
    trace = Trace()
    model.model(tokens, trace=trace)
    auxiliary = sum(loss.mean() for loss in trace.losses)
    assert auxiliary > 0
    plain = model(tokens, labels=tokens).loss
    close(model(tokens, labels=tokens, output_hidden_states=True).loss, plain)
    model.train()
    close(model(tokens, labels=tokens).loss, plain + auxiliary)
    # of n tokens in a batch of `num_items_in_batch`, the part of both losses
    close(model(tokens, labels=tokens, num_items_in_batch=40).loss, (plain + auxiliary) * 20 / 40)
    model(tokens, labels=tokens).loss.backward()
    assert model.model.blocks[0].mixer.innovation.predict.weight.grad.abs().sum() > 0


def rows_of(*lengths):
    return [draw_tokens(1, length, seed=i) for i, length in enumerate(lengths)]


@torch.no_grad()
def test_left_and_right_padding_is_not_seen(model):
    rows = rows_of(17, 5, 11)
    for tokens, mask in (left_padded(rows), [z.flip(1) for z in left_padded([row.flip(1) for row in rows])]):
        out = model(tokens, attention_mask=mask)
        for i, row in enumerate(rows):
            alone = model(row)
            close(out.logits[i][mask[i].bool()], alone.logits[0])
            same_state(out.past_key_values.state.select([i]), alone.past_key_values.state)
        more = draw_tokens(3, 2, seed=9)
        longer = F.pad(mask, (0, 2), value=1)
        out = model(more, attention_mask=longer, past_key_values=out.past_key_values)
        for i, row in enumerate(rows):
            close(out.logits[i], model(torch.cat((row, more[i : i + 1]), 1)).logits[0, -2:])


def test_packed_rows_equal_separate_rows(model):
    rows = rows_of(9, 1, 14, 4)
    batch = DataCollatorWithFlattening()([{"input_ids": row[0].tolist()} for row in rows])
    out = model(**batch)
    alone = [model(row, labels=row) for row in rows]
    close(out.logits[0], torch.cat([one.logits[0] for one in alone]))
    total = sum(plain_loss(one.logits, row, 1) for one, row in zip(alone, rows, strict=True))
    close(out.loss, total / sum(row.shape[1] - 1 for row in rows))
    ids = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)], 1)
    assert torch.equal(model(batch["input_ids"], document_ids=ids).logits, out.logits)
    # positions that go on, one row of them for all, or that restart in padding: no document starts
    tokens = draw_tokens(2, 9)
    close(model(tokens, position_ids=torch.arange(9)[None]).logits, model(tokens).logits, 0.0)
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, 7:] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    close(model(tokens, mask, position_ids=positions).logits, model(tokens, mask).logits, 0.0)
    # documents and padding in one row
    tokens, positions, mask = (
        F.pad(z, (3, 0)) for z in (batch["input_ids"], batch["position_ids"], torch.ones_like(ids))
    )
    close(model(tokens, mask, positions).logits[:, 3:], out.logits)


def test_a_cache_is_left_alone_unless_it_is_used():
    model = hf_model("bmojo")
    tokens = draw_tokens(2, 11)
    with torch.no_grad():
        cache = model(tokens).past_key_values
        before = cache.state
        model(tokens[:, :1], past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 11
    same_state(cache.state, before, 0.0)
    model.train()
    assert model(tokens).past_key_values is None
    assert model(tokens, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 6, 16)}, ConfigError, "give either input_ids or inputs_embeds"),
        ({"input_ids": None}, ConfigError, "give either input_ids or inputs_embeds"),
        ({"output_attentions": True}, ConfigError, "output_attentions is not available"),
        ({"past_key_values": DynamicCache()}, StateError, "must be a BMojoCache, got DynamicCache; leave it out"),
        ({"attention_mask": torch.ones(2, 5)}, StateError, r"attention_mask must be .*\(2, 6\), .*got \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, StateError, r"got \(2, 1, 6, 6\)"),
        (
            {"attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 1]])},
            StateError,
            "padding before or after them, row 1 is 110111; BMojoLM takes padding anywhere",
        ),
        ({"position_ids": torch.arange(5)[None]}, ConfigError, r"position_ids must be .*\(2, 6\), got \(1, 5\)"),
        ({"document_ids": torch.zeros(2, 5).long()}, StateError, r"document_ids must have the shape of the tokens"),
        ({"labels": torch.zeros(2, 6).long(), "logits_to_keep": 1}, ConfigError, "leave logits_to_keep at 0"),
        ({"labels": torch.zeros(2, 5).long()}, ConfigError, r"labels must be \[batch, time\], \(2, 6\), got \(2, 5\)"),
        ({"input_ids": torch.zeros(2, 6)}, ConfigError, "tokens must be whole numbers"),
        ({"input_ids": torch.zeros(2, 0).long()}, ConfigError, "both at least 1"),
    ],
)
def test_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        hf_model("bmojo")(**{"input_ids": draw_tokens(2, 6), **wrong})


def test_states_of_others_are_refused():
    model = hf_model("bmojo")
    _, state = model.model(draw_tokens(2, 6))
    with pytest.raises(StateError, match=r"the state has batch size 2, the tokens 3; use state.select or state.repeat"):
        model(draw_tokens(3, 6), past_key_values=BMojoCache(state))
    with pytest.raises(StateError, match=r"eidetic_slots is 7 here and 5 in the state"):
        hf_model("bmojo", eidetic_slots=7)(draw_tokens(2, 6), past_key_values=BMojoCache(state))
    with pytest.raises(StateError, match=r"float64.*float32"):
        hf_model("bmojo", torch.float32)(draw_tokens(2, 6), past_key_values=BMojoCache(state))
    out = model(draw_tokens(2, 6))
    with pytest.raises(ConfigError, match=r"position_ids start again behind a cache; give document_ids"):
        model(draw_tokens(2, 6), position_ids=torch.tensor([[6, 7, 0, 1, 2, 3]]), past_key_values=out.past_key_values)
    with pytest.raises(BMojoError, match="attention_mask must be"):
        model(draw_tokens(2, 6), attention_mask=torch.ones(2, 7), past_key_values=out.past_key_values)


def test_behind_a_cache_the_mask_of_the_new_tokens_is_enough():
    model, more = hf_model("bmojo"), draw_tokens(2, 6, 1)
    new = torch.tensor([[1] * 6, [0, 0] + [1] * 4])
    with torch.no_grad():
        caches = [model(draw_tokens(2, 7)).past_key_values for _ in range(2)]
        every = torch.cat((torch.ones(2, 7, dtype=torch.int64), new), 1)
        expected = model(more, attention_mask=every, past_key_values=caches[0]).logits
        assert torch.equal(model(more, attention_mask=new, past_key_values=caches[1]).logits, expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"attention_mask": torch.tensor([[0.0] * 6, [-1e9] + [0.0] * 5])}, StateError, "got an additive one"),
        ({"attention_mask": {"full": None}}, StateError, "must be a tensor .* got dict"),
        ({"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7]])}, ConfigError, "leave some positions out"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 16)}, ConfigError, "embeddings must be torch.float64"),
    ],
)
def test_what_would_be_misread_is_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        hf_model("bmojo")(**{"input_ids": draw_tokens(2, 6), **wrong})


def test_positions_that_start_again_behind_a_cache_are_refused():
    model = hf_model("bmojo")
    cache = model(draw_tokens(1, 6)).past_key_values
    with pytest.raises(ConfigError, match="position_ids start again behind a cache"):
        model(draw_tokens(1, 1), position_ids=torch.tensor([[0]]), past_key_values=cache)
    assert cache.get_seq_length() == 6
