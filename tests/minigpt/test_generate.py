"""Decoding: the cache equals the full forward pass, and a sentence's neighbours do not change it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import random_model

import minigpt.cache
from minigpt import GPTConfig, UserError, checkpoint
from minigpt.attention import PackedBatch, Slots
from minigpt.beam import BeamState, beam_search, sort_candidates
from minigpt.cache import Cache, attend_cached, bias_of, decode_one_token, prefill
from minigpt.generate import Prompt, Sampler, generate
from prefix.init import random_banks

CONFIG = GPTConfig(vocab_size=53, n_positions=64, n_embd=32, n_layer=2, n_head=4)
STOP = 52


@pytest.fixture
def model():
    model = random_model(CONFIG, std=0.25)
    model.wte.weight[STOP] += 0.25 * model.ln_f.bias  # likely enough for sentences to end in time
    return model


def random_prompts(n, longest=20, banks=True):
    """Ragged prompts in both directions: mask 1 then 3, or 2 then 3."""
    prompts = []
    for i, length in enumerate(torch.randint(1, longest + 1, (n,)).tolist()):
        bank_mask = [1 + i % 2] * (length - 1) + [3]
        ids = torch.randint(CONFIG.vocab_size, (length,)).tolist()
        most = 1 + 5 * i % 12  # rows end at different steps and move
        prompts.append(Prompt(ids, most, bank_mask if banks else None))
    return prompts


@pytest.mark.parametrize("banks", [True, False])
def test_each_sentence_gets_the_tokens_that_it_gets_alone_without_a_cache(model, banks, monkeypatch):
    slots = random_banks(CONFIG, ["en", "fr"], 5).slots() if banks else None
    prompts, expected = random_prompts(19, banks=banks), []
    for prompt in prompts:  # the whole text through the model for every new token
        ids, bank_mask, new = prompt.ids, prompt.bank_mask or [0] * len(prompt.ids), []
        while len(new) < prompt.max_new:
            hidden = model.hidden(torch.tensor(ids), PackedBatch([len(ids)], torch.tensor(bank_mask)), slots)
            token = int(model.logits(hidden[-1]).argmax())
            if token == STOP:
                break
            ids, bank_mask, new = [*ids, token], [*bank_mask, bank_mask[-1]], [*new, token]
        expected.append(new)
    for batch_size, at_once, rows in ((1, 1024, 16), (2, 1024, 16), (17, 1024, 16), (17, 45, 3)):
        monkeypatch.setattr(minigpt.cache, "AT_ONCE", (at_once,))
        monkeypatch.setattr(minigpt.cache, "ROWS", rows)
        assert [r.ids for r in generate(model, prompts, [STOP], slots, batch_size=batch_size)] == expected


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("B, Q, T, S", [(1, 1, 1, 3), (3, 1, 20, 7), (2, 4, 9, 5), (3, 2, 8, 0)])
def test_attention_to_a_cache_is_attention_with_the_slots_copied_in_front_of_each_rows_keys(dtype, bound, B, Q, T, S):
    """Every query sees at least one cached key, its own; of the slots it may see none."""
    q, key, value = (torch.randn(B, 3, n, 16).to(dtype) for n in (Q, T, T))
    slots = Slots(*torch.randn(2, 3, S, 16).to(dtype), torch.zeros(S, dtype=torch.int32))
    sees = torch.rand(B, 1, Q, S + T) < 0.5
    sees[..., -1], sees[0, ..., :S] = True, False
    ours = attend_cached(q, key, value, bias_of(sees, dtype), slots if S else None)
    copied = (torch.cat([slot.expand(B, -1, -1, -1), text], dim=2) for slot, text in ((slots.key, key), (slots.value, value)))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, *copied)), attn_mask=sees)
    assert ours.dtype == dtype and (ours.double() - exact).norm() < bound * exact.norm()


def test_a_key_that_is_not_seen_has_no_weight_however_high_its_score():
    q, key, value = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    bias = bias_of(torch.tensor([[[[True, False, True]]]]), torch.float32)
    without = attend_cached(q, key, value, bias)
    key[:, :, 1] = 1e6
    assert torch.equal(attend_cached(q, key, value, bias), without)


@pytest.mark.parametrize("banks", [True, False])
def test_cached_decoding_gives_the_logits_of_the_full_forward_pass_also_in_a_row_that_has_moved(model, banks, monkeypatch):
    monkeypatch.setattr(minigpt.cache, "ROWS", 2)
    bank = random_banks(CONFIG, ["only"], 7)
    slots = bank.slots() if banks else None
    ids, lengths = torch.randint(CONFIG.vocab_size, (3, 64)), (5, 1, 54)
    cache = Cache(model, 3, 64, slots)
    masks = [[1] * n for n in lengths] if banks else None
    prefill(model, cache, 0, [row[:n].tolist() for row, n in zip(ids, lengths)], masks)
    full = bank.logits(model, ids, open=["only"] if banks else ())
    rows = [0, 1, 2]
    for step in range(10):
        if step == 5:  # the first has ended, and the last takes its row
            cache.evict(0, 2)
            rows = [2, 1]
        at = list(cache.length)[: len(rows)]
        cache.ids[: len(rows), 0] = ids[rows, at]
        logits = decode_one_token(model, cache, len(rows))[:, 0]
        torch.testing.assert_close(logits, full[rows, at], rtol=1e-4, atol=1e-4)


def test_a_prompt_may_fill_the_context_to_the_last_token_and_one_that_leaves_no_room_is_an_error(model):
    prompt = torch.randint(CONFIG.vocab_size, (60,)).tolist()
    assert len(generate(model, [Prompt(prompt, 4)], [])[0].ids) == 4
    for wrong, offset in ((Prompt(prompt, 5), 0), (Prompt(prompt, 4), 1), (Prompt([], 1), 0)):
        with pytest.raises(UserError, match=f"prompt 2: {len(wrong.ids)} tokens"):
            generate(model, [Prompt([1], 4), wrong], [], position_offset=offset)


def test_a_sentence_that_stops_is_finished_and_one_at_its_limit_is_cut(model):
    prompt = Prompt([1, 2, 3], 6)
    first = generate(model, [prompt], [])[0]
    assert not first.finished and len(first.ids) == 6
    stopped = generate(model, [prompt], [first.ids[0]])[0]
    assert stopped.finished and stopped.ids == []


def test_sampling_follows_the_softmax_cut_by_top_k_and_top_p():
    logits = 0.5 * torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    draw = lambda **cut: [int(Sampler(0.5, seed=0, **cut)(logits, [i])) for i in range(2000)]
    shares = torch.bincount(torch.tensor(draw()), minlength=4) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=0.04, rtol=0)
    assert set(draw(top_k=2)) == {1, 3}
    assert set(draw(top_p=0.65)) == {1, 3}
    assert set(draw(top_p=0.75)) == {1, 2, 3}
    assert set(draw(top_k=2, top_p=0.5)) == {1}  # 0.4 of the 0.7 that top_k left


@pytest.mark.parametrize("beams, length_penalty", [(2, 1.0), (3, 0.5), (5, 1.0), (5, 2.0)])
def test_beam_search_equals_transformers(model, tmp_path, beams, length_penalty):
    checkpoint.save(model, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = STOP
    prompts = random_prompts(12, banks=False)
    found = beam_search(model, prompts, [STOP], beams=beams, length_penalty=length_penalty, batch_size=4)
    for prompt, ours in zip(prompts, found):
        options = dict(num_beams=beams, max_new_tokens=prompt.max_new, do_sample=False, length_penalty=length_penalty)
        ids = torch.tensor([prompt.ids])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt.ids) :].tolist()
        assert ours.ids == (expected[: expected.index(STOP)] if STOP in expected else expected)


@pytest.mark.parametrize("length_penalty, done", [(0.5, True), (2.0, False)])
def test_a_search_is_done_when_by_its_length_penalty_no_beam_is_above_the_worst_finished_one(length_penalty, done):
    score = lambda logp, length: logp / length**length_penalty
    state = BeamState(9, [[1, 1, 1], [2, 2, 2]], [-1.5, -1.8], [(score(-1.2, 2), [1], True), (score(-1.3, 2), [2], True)])
    parents = sort_candidates(state, [(-1.6, 0, STOP), (-2.0, 1, 7), (-2.1, 0, 8), (-2.2, 1, STOP)], {STOP}, length_penalty)
    assert state.finished == [(score(-1.6, 4), [1, 1, 1], True), (score(-1.2, 2), [1], True)]
    assert (parents, state.beams, state.scores) == ([1, 0], [[2, 2, 2, 7], [1, 1, 1, 8]], [-2.0, -2.1])
    assert state.done == done


def test_beams_see_their_own_sentences_banks(model):
    """Neighbours with other banks change nothing; one beam gets what greedy decoding gets."""
    slots = random_banks(CONFIG, ["en", "fr"], 5).slots()
    prompts = random_prompts(5)
    together = beam_search(model, prompts, [STOP], slots, beams=3, batch_size=5)
    alone = [beam_search(model, [p], [STOP], slots, beams=3)[0] for p in prompts]
    assert [r.ids for r in together] == [r.ids for r in alone]
    greedy = generate(model, prompts, [STOP], slots)
    assert [r.ids for r in beam_search(model, prompts, [STOP], slots, beams=1)] == [r.ids for r in greedy]


def test_a_prompt_does_not_read_what_overflowed_in_its_row(model):
    cache = Cache(model.half(), 2, 30)
    cache.kv[:] = torch.nan
    prefill(model, cache, 0, [[1, 2], [3] * 20])
    assert decode_one_token(model, cache, 2).isfinite().all()


@pytest.mark.parametrize("decode", [generate, partial(beam_search, beams=2)])
def test_a_sentence_that_overflows_float16_does_not_hurt_those_that_take_its_row(model, decode):
    model.wte.weight[51, 0] = 65000
    model.h[0].mlp.c_proj.bias[0] = 1000
    model.ln_f.weight[0] = model.ln_f.bias[0] = 0
    overflows, prompts = Prompt([51] * 30, 2), [Prompt(torch.randint(51, (n,)).tolist(), 12) for n in (25, 3, 4)]
    alone = [decode(model.half(), [prompt], [])[0].ids for prompt in prompts]
    together = decode(model, [overflows, *prompts], [], batch_size=3)
    assert [result.ids for result in together[1:]] == alone


def test_beams_share_the_cache_by_index(model, monkeypatch):
    """Nothing is copied while sentences sit where they are: keys and values of every entry are written once."""
    written = []
    monkeypatch.setattr(Cache, "write", lambda self, layer, seat, entry, kv: written.append((layer, seat, entry)))
    beam_search(model, random_prompts(1, banks=False), [], beams=4)
    places = [(layer, int(s), int(e)) for layer, seat, entry in written for s, e in zip(seat, entry)]
    assert len(set(places)) == len(places) > 0
