"""`generate`: every search gives the same with the cache as without, alone as in a batch, at once as in parts."""

import copy

import pytest
import torch
from cases import draw_tokens, same_state
from hf_cases import PRESETS, hf_model, left_padded
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from bmojo import BMojoByteTokenizer, BMojoCache, MemoryState
from bmojo.errors import BMojoError, ConfigError, StateError

GREEDY = {"max_new_tokens": 14, "do_sample": False}
BEAMS = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return hf_model(request.param)


@pytest.fixture(scope="module")
def bmojo():
    return hf_model("bmojo")


def by_hand(model, tokens, steps):
    """Greedy search, every token anew."""
    for _ in range(steps):
        tokens = torch.cat((tokens, model.model(tokens)[0][:, -1:].argmax(-1)), 1)
    return tokens


def test_greedy_with_and_without_the_cache(model):
    prompt = draw_tokens(2, 11)
    found = model.generate(prompt, **GREEDY)
    assert torch.equal(found, by_hand(model, prompt, 14))
    assert torch.equal(found, model.generate(prompt, **GREEDY, use_cache=False))


def test_beams_with_and_without_the_cache(model):
    prompt, mask = left_padded([draw_tokens(1, 11), draw_tokens(1, 6, seed=1)])
    options = {**BEAMS, "attention_mask": mask, "num_return_sequences": 2, "length_penalty": 0.0}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": 3, "pad_token_id": 0}
    cached, plain = model.generate(prompt, **options), model.generate(prompt, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores)
    one = model.generate(draw_tokens(1, 6, seed=1), **{**options, "attention_mask": None})
    length = one.sequences.shape[1]
    assert torch.equal(cached.sequences[2:, 5 : 5 + length], one.sequences)


def test_sampling(model):
    prompt = draw_tokens(2, 7)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 5, "temperature": 0.8}
    torch.manual_seed(0)
    found = model.generate(prompt, **options)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(prompt, **options, use_cache=False))
    assert not torch.equal(found, model.generate(prompt, **options))


def test_several_samples_of_one_prompt(bmojo):
    torch.manual_seed(0)
    found = bmojo.generate(draw_tokens(2, 7), max_new_tokens=12, do_sample=True, num_return_sequences=3)
    assert found.shape == (6, 19)
    assert torch.equal(found[:3, :7], draw_tokens(2, 7)[:1].expand(3, -1))
    assert len({tuple(row) for row in found[:3].tolist()}) > 1


def test_rows_of_a_padded_batch_are_as_alone(model):
    rows = [draw_tokens(1, length, seed=length) for length in (13, 4, 9)]
    prompt, mask = left_padded(rows)
    found = model.generate(prompt, attention_mask=mask, pad_token_id=0, **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(found[i : i + 1, 13 - row.shape[1] :], model.generate(row, **GREEDY))


def test_embeddings_in_place_of_tokens(model):
    prompt = draw_tokens(2, 9)
    embedded = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY), model.generate(prompt, **GREEDY)[:, 9:])
    assert torch.equal(model.generate(inputs_embeds=embedded, **BEAMS), model.generate(prompt, **BEAMS)[:, 9:])


def test_goes_on_from_a_saved_state_with_the_new_tokens_alone(model, tmp_path):
    tokens = draw_tokens(2, 19)
    _, state = model.model(tokens[:, :12])
    state.save(tmp_path / "state.safetensors")
    cache = BMojoCache(MemoryState.load(tmp_path / "state.safetensors", model.config.core))
    found = model.generate(tokens[:, 12:], past_key_values=cache, **GREEDY)
    assert torch.equal(found, model.generate(tokens, **GREEDY)[:, 12:])
    same_state(cache.state, model.model(torch.cat((tokens[:, :12], found[:, :-1]), 1))[1])
    same_state(MemoryState.load(tmp_path / "state.safetensors"), state, 0.0)  # what was given is not written to


def test_several_turns_with_one_cache(model):
    first, second, third = draw_tokens(2, 9), draw_tokens(2, 5, seed=1), draw_tokens(2, 3, seed=2)
    cache = BMojoCache()
    turn = model.generate(first, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == turn.shape[1] - 1
    whole = torch.cat((turn, second), 1)
    expected = model.generate(whole, **GREEDY)
    turn = model.generate(whole, past_key_values=cache, **GREEDY)  # all tokens so far
    assert torch.equal(turn, expected)
    whole = torch.cat((turn, third), 1)
    expected = model.generate(whole, **GREEDY)
    for kind in ("new tokens and the mask of all", "a state and new tokens"):
        new = whole[:, cache.get_seq_length() :]
        if kind == "a state and new tokens":
            found = model.generate(new, past_key_values=BMojoCache(cache.state), **GREEDY)
        else:
            again = copy.deepcopy(cache)
            found = model.generate(new, past_key_values=again, attention_mask=torch.ones_like(whole), **GREEDY)
        assert torch.equal(found, expected[:, -found.shape[1] :])


@torch.no_grad()
def test_one_prompt_read_once_for_many_goings_on(bmojo):
    prompt = draw_tokens(1, 21)
    cache = bmojo(prompt, logits_to_keep=1).past_key_values
    for seed in (1, 2):
        whole = torch.cat((prompt, draw_tokens(1, 4, seed=seed)), 1)
        found = bmojo.generate(whole, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(found, bmojo.generate(whole, **GREEDY))
    cache.batch_repeat_interleave(3)
    beams = bmojo.generate(whole, past_key_values=cache, **BEAMS)
    assert torch.equal(beams, bmojo.generate(whole, **BEAMS))


def test_a_prompt_read_in_chunks(bmojo):
    prompt, mask = left_padded([draw_tokens(1, 21), draw_tokens(1, 10, seed=1)])
    for extra in ({"attention_mask": mask, "pad_token_id": 0}, {"attention_mask": torch.ones_like(mask)}):
        whole = bmojo.generate(prompt, **extra, **GREEDY)
        chunked = bmojo.generate(prompt, **extra, **GREEDY, prefill_chunk_size=6, past_key_values=BMojoCache())
        assert torch.equal(whole, chunked)


class AfterTwo(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9, device=input_ids.device)


def test_ends_at_the_stopping_criteria(bmojo):
    prompt = draw_tokens(2, 7)
    stopped = bmojo.generate(prompt, **GREEDY, stopping_criteria=StoppingCriteriaList([AfterTwo()]))
    assert torch.equal(stopped, bmojo.generate(prompt, **GREEDY)[:, :9])
    end = int(stopped[0, 8])
    ended = bmojo.generate(prompt[:1], **GREEDY, eos_token_id=end, pad_token_id=0)
    assert end in ended[0, 7:9]
    assert ended.shape[1] <= 9


def test_what_generate_gives_on_request(bmojo):
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    out = bmojo.generate(draw_tokens(2, 7), **GREEDY, **options)
    assert len(out.logits) == len(out.hidden_states) == 14
    assert type(out.past_key_values) is BMojoCache
    assert out.past_key_values.get_seq_length() == 20
    with pytest.raises(BMojoError, match="output_attentions is not available"):
        bmojo.generate(draw_tokens(2, 7), **GREEDY, return_dict_in_generate=True, output_attentions=True)


@pytest.mark.parametrize("name", ["hybrid", "mamba", "gdn", "bmojo"])
def test_half_precision(name):
    model = hf_model(name, torch.bfloat16)
    prompt, mask = left_padded([draw_tokens(1, 11), draw_tokens(1, 6, seed=1)])
    out = model.generate(
        prompt, attention_mask=mask, pad_token_id=0, **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    assert torch.cat(out.logits).isfinite().all()
    kept = {name: tensor.dtype for layer in out.past_key_values.state.layers for name, tensor in layer.items()}
    assert kept.get("ssm", torch.float32) == torch.float32
    assert kept.get("k", torch.bfloat16) == torch.bfloat16


def test_streams_text(capsys):
    model, tokenizer = hf_model("bmojo", torch.float32, vocab_size=256), BMojoByteTokenizer()
    prompt = tokenizer(["Käse"], return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, **GREEDY)[0])
    model.generate(**prompt, **GREEDY, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**prompt, **GREEDY, streamer=streamer)
    assert "Käse" + "".join(streamer) == text


@pytest.mark.parametrize("kind", [None, "dynamic"])
def test_the_usual_cache_implementation(bmojo, kind):
    prompt = draw_tokens(2, 7)
    assert torch.equal(bmojo.generate(prompt, **GREEDY, cache_implementation=kind), bmojo.generate(prompt, **GREEDY))


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_cache_implementations_are_refused(bmojo, kind):
    with pytest.raises(BMojoError, match=f"cache_implementation must be left out, got '{kind}'"):
        bmojo.generate(draw_tokens(2, 7), **GREEDY, cache_implementation=kind)


def test_what_needs_an_earlier_state_is_refused(bmojo):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        bmojo.generate(draw_tokens(1, 7), **GREEDY, assistant_model=bmojo)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        bmojo.generate(draw_tokens(1, 7), **GREEDY, prompt_lookup_num_tokens=2)


def test_foreign_caches_and_states_are_refused(bmojo):
    prompt = draw_tokens(1, 7)
    with pytest.raises(StateError, match="must be a BMojoCache, got DynamicCache"):
        bmojo.generate(prompt, **GREEDY, past_key_values=DynamicCache())
    cache = BMojoCache(bmojo.model(prompt)[1])
    with pytest.raises(StateError, match="the state has batch size 1, the tokens 3"):
        bmojo.generate(prompt, **BEAMS, past_key_values=cache)
    with pytest.raises(StateError, match=r"pattern is .* here and .* in the state"):
        hf_model("swa").generate(prompt, **GREEDY, past_key_values=cache)
    tiny = LlamaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(StateError, match="a BMojoCache is read by bmojo models alone"):
        LlamaForCausalLM(tiny).generate(prompt, **GREEDY, past_key_values=BMojoCache())


def test_a_cache_that_has_read_more_than_it_is_given_is_refused(bmojo):
    cache = BMojoCache()
    turn = bmojo.generate(draw_tokens(1, 9), past_key_values=cache, **GREEDY)
    for given in (draw_tokens(1, 4), turn[:, :-1]):
        with pytest.raises(StateError, match=r"the cache has read 22 tokens; .*BMojoCache\(cache.state\) takes new"):
            bmojo.generate(given, past_key_values=cache, **GREEDY)


def test_a_cache(bmojo):
    cache = BMojoCache()
    assert (len(cache), cache.is_initialized, cache.state, cache.batch_size) == (0, False, None, -1)
    assert repr(cache) == "BMojoCache(0 tokens read, empty)"
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        bmojo(draw_tokens(2, 7), past_key_values=cache)
    assert (len(cache), cache.is_initialized, cache.get_seq_length(), cache.get_seq_length(1)) == (2, True, 7, 7)
    assert (cache.batch_size, cache.get_max_cache_shape()) == (2, -1)
    assert (cache.is_compileable, cache.is_croppable) == (False, False)
    assert repr(cache) == f"BMojoCache(7 tokens read, 2 rows, {cache.state.nbytes:,} bytes)"
    before = cache.state
    cache.batch_select_indices([1])
    same_state(cache.state, before.select([1]), 0.0)
    cache.batch_repeat_interleave(2)
    same_state(cache.state, before.select([1, 1]), 0.0)
    for tokens in (-1, 4):
        with pytest.raises(StateError, match=r"can't be cut back to an earlier token; keep `cache.state` before"):
            cache.crop(tokens)
    with pytest.raises(StateError, match="rows must be a list of indices below the batch size 2"):
        cache.reorder_cache(torch.tensor([0, 2]))
    cache.reset()
    assert (cache.state, cache.get_seq_length()) == (None, 0)


def test_padding_on_the_right_is_refused(bmojo):
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with pytest.raises(StateError, match=r"padding behind those of row 1; pad on the left"):
        bmojo.generate(draw_tokens(2, 6), attention_mask=mask, **GREEDY)


def test_packed_prompts(bmojo):
    """Positions that start again start a document in a prompt, too; document ids are refused."""
    tokens = draw_tokens(1, 12)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    packed = bmojo.generate(tokens, position_ids=positions, **GREEDY)
    assert torch.equal(packed[:, 7:], bmojo.generate(tokens[:, 7:], **GREEDY))
    with pytest.raises(ConfigError, match=r"goes on with one document, got document_ids; give it the last one alone"):
        bmojo.generate(tokens, document_ids=torch.zeros_like(tokens), **GREEDY)


def test_a_prompt_read_in_chunks_makes_its_own_cache(bmojo):
    tokens = draw_tokens(2, 11)
    chunked = bmojo.generate(tokens, **GREEDY, prefill_chunk_size=4)
    assert torch.equal(chunked, bmojo.generate(tokens, **GREEDY))


def test_a_cache_of_inference_mode_goes_on_outside(bmojo):
    tokens = draw_tokens(1, 8)
    with torch.inference_mode():
        cache = bmojo(tokens[:, :7]).past_key_values
    with torch.no_grad():
        got = bmojo(tokens[:, 7:], past_key_values=cache).logits
        torch.testing.assert_close(got, bmojo(tokens).logits[:, -1:])
