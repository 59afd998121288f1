"""The ways that lead over a GPU, on a pretended one: the CPU's numbers, one device, few waits, steps that can be captured.
Behind them: a fault that is planted in each of these is noticed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import one_step, same, slots_of, small_model

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
if torch.cuda.is_available():
    pytest.skip("with a real GPU there is no interpreter for the kernels", allow_module_level=True)
from pretend_cuda import GPU, here, pretended_gpu

from minigpt import attention, generate
from minigpt.generate import Sampler
from minigpt.loss import nll_sum, padded, padded_rows, project
from minigpt.model import GPT
from prefix.banks import Banks, compute_kv
from prefix.decoding import Decoding
from prefix.evaluation.attention_maps import look_at, nearest_tokens
from prefix.evaluation.few_shot import Shots, few_shot
from prefix.init import first_pairs, from_text, initial_banks, random_banks, units_of
from prefix.reparam import Reparametrised, TrainableBanks
from prefix.trainer import Trainer
from prefix.translation import translate

TEXTS = ["Il pleut.", "Bonjour", "Je ne sais pas.", "Où est la gare ?"]
NEW, OLD = (9, 0), (7, 5)  # compute capabilities: with kernels, which Triton interprets slowly, and without


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch, OLD) as gpu:
        yield gpu


@pytest.fixture
def both(monkeypatch, tokenizer):
    """A function: work(model, gpu) -> its results on the GPU and, by plain attention, on the CPU; and the GPU."""

    def both(work, capability=OLD, dtype=torch.float32):
        model = small_model(tokenizer, dtype)
        there = small_model(tokenizer, dtype)
        there.load_state_dict(model.state_dict())
        with monkeypatch.context() as patch, pretended_gpu(patch, capability) as gpu:
            ours = here(work(there.to("cuda"), gpu))
        model.attention = "plain"
        return ours, work(model, GPU()), gpu

    return both


# Training

WAYS = {
    "kernels": {"capability": NEW, "batch_size": 2},
    "no kernels": {},
    "no kernels, float16": {"dtype": torch.float16},
    "checkpointed activations, micro-batches of 40 tokens": {"checkpointing": True, "micro": 40},
    "the network of --reparam": {"kind": Reparametrised, "lr": 0.003},  # its default rate
}


def some_banks(model, corpus, kind=TrainableBanks):
    return kind(random_banks(model.config, corpus.columns, 3, seed=1)).to(model.device)


@pytest.mark.parametrize("way", WAYS)
def test_training_gives_the_cpus_numbers_and_a_step_waits_once_or_twice(both, trainer, corpus, way):
    options = {"batch_size": 6} | WAYS[way]
    capability, dtype = options.pop("capability", OLD), options.pop("dtype", torch.float32)
    checkpointing, kind = options.pop("checkpointing", False), options.pop("kind", TrainableBanks)

    def work(model, gpu):
        model.checkpoint_activations = checkpointing
        t, numbers = trainer(model=model, banks=some_banks(model, corpus, kind), **options), []
        t.loader.validation = t.loader.validation[:1]
        for batch in t.loader.steps(0, 2):
            gpu.forget()  # only the second step is counted: the first sets things up
            record = t.optimizer_step(batch)
            numbers += [record["loss"], record["grad_norm"]]
        counted.append((gpu.total("wait"), gpu.total("pageable"), gpu.where()))
        return [torch.tensor([*numbers, t.validation_loss()]), *(p.detach() for pair in t.banks.key_values() for p in pair)]

    counted = []
    ours, theirs, gpu = both(work, capability, dtype)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.3}
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    assert ("forward_kernel" in gpu.launches) == (capability == NEW)
    (waits, pageable, where), _ = counted
    assert waits == (1 if dtype == torch.float32 else 2), f"waits: {where}"  # the second is GradScaler's
    assert not pageable, f"pageable copies: {where}"


def test_a_run_that_is_resumed_goes_on_with_the_same_bits(gpu, trainer, model, corpus, tmp_path):
    model = model.to("cuda")
    first, second = (trainer(model=model, banks=some_banks(model, corpus)) for _ in range(2))
    (first.out / "last").mkdir()
    first.log(one_step(first))
    first.save()
    second.resume()
    assert one_step(first) == one_step(second)
    assert same(*({name: here(p) for name, p in slots_of(t).items()} for t in (first, second)))
    first.keep_prefix(1.0)
    assert Banks.load(first.out / "prefix.safetensors", model).names == ["en", "fr"]


def test_the_thread_that_prepares_batches_works_on_the_gpu_of_its_process(gpu, trainer, model, corpus):
    torch.cuda.set_device(1)
    model = model.to("cuda")
    next(trainer(model=model, banks=some_banks(model, corpus)).loader.steps(0, 1))
    assert [*gpu.device_of.values()] == [1, 1]  # of two threads


# Decoding

DECODERS = {
    "greedy, kernels": (NEW, lambda: Decoding(3, batch_size=2)),
    "beams, kernels": (NEW, lambda: Decoding(2, batch_size=1, beams=2)),
    "greedy": (OLD, lambda: Decoding(12, batch_size=3)),
    "one row": (OLD, lambda: Decoding(12, batch_size=1)),
    "sampled": (OLD, lambda: Decoding(12, batch_size=3, sampler=Sampler(0.9, 20, 0.9, seed=3))),
    "beams": (OLD, lambda: Decoding(8, batch_size=2, beams=3)),
    "choices": (OLD, lambda: Decoding(batch_size=3, choices=["joy", "anger and fear", "fear"])),
}


@pytest.mark.parametrize("way", DECODERS)
def test_decoding_gives_the_cpus_texts_and_a_token_waits_once(both, tokenizer, way):
    capability, decoding = DECODERS[way]
    texts = TEXTS if capability == OLD else TEXTS[:2]
    slots = {name: (torch.randn(2, 2, 4, 16), torch.randn(2, 2, 4, 16)) for name in ("en", "fr")}

    def work(model, gpu):
        banks = Banks(slots).to(model.device)
        compute_kv(model, [1])  # the first use sets things up
        gpu.forget()
        asked = [(texts, ("fr", "en")), (texts[::-1], ("en", "fr"))]
        return [[r.text for r in translate(model, tokenizer, banks, *one, decoding())] for one in asked]

    ours, theirs, gpu = both(work, capability)
    assert ours == theirs
    assert not gpu.total("pageable"), gpu.where()
    assert ("decode_kernel" in gpu.launches) == (capability == NEW)
    if capability == NEW and "beams" not in way:
        assert gpu.captured <= 8 * 2 + 25  # launches of a step: seven a layer (eight with the exact GELU), and a few beside them
    if way != "choices":
        captures, replays = gpu.counts["capture"], gpu.counts["replay"]
        assert captures == 1 and replays, "no replay"  # one graph for all lengths and for other slots
        admissions, compared = 2 * len(TEXTS), 3  # the first step runs in three ways, compared twice
        assert gpu.total("wait") <= replays + admissions + compared, f"waits: {gpu.where()}"


def test_few_shot_prompting_gives_the_cpus_texts(both, tokenizer):
    pairs = [("Il pleut.", "It's raining."), ("Merci.", "Thank you.")]

    def work(model, gpu):
        asked = [(pairs, "names", None), ([], "lines", None), (pairs, "lines", ["Yes", "No way"])]
        shots = [(Shots(pairs, "fr", "en", form), Decoding(6, batch_size=2, choices=c)) for pairs, form, c in asked]
        return [[r.text for r in few_shot(model, tokenizer, one, TEXTS[:3], how)] for one, how in shots]

    ours, theirs, _ = both(work)
    assert ours == theirs


# Beside them


@pytest.mark.parametrize("init", ["text", "random", "zero-effect"])
def test_slots_start_where_they_start_on_the_cpu(both, tokenizer, corpus, init):
    def work(model, gpu):
        settings = {"init": init, "prefix_len": 3, "position_offset": 0, "settings": {"seed": 1}}
        banks = initial_banks(settings, model, tokenizer, corpus)
        assert {t.device for t in [*banks.parameters(), *banks.buffers()]} == {model.device}
        ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device=model.device)
        found = [*banks.key, *banks.value, *units_of(model, corpus), banks.logits(model, ids, open=("fr",))]
        return [x.detach() for x in found]

    for x, y in zip(*both(work)[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-3)


def test_attention_maps_are_the_cpus(both, tokenizer, corpus):
    def work(model, gpu):
        banks, text = from_text(model, {"en": [5, 6, 7], "fr": [8, 9]}, 3), first_pairs(model, tokenizer, corpus)
        nearest = nearest_tokens(model, banks, text.ids, text.packed, 3)
        return look_at(model, tokenizer, banks, "Il pleut.", ("fr", "en"), "It rains.").mass, nearest[0][1]

    (mass, nearest), (their_mass, their_nearest), _ = both(work)
    torch.testing.assert_close(mass, their_mass, rtol=1e-3, atol=1e-4)
    assert torch.equal(nearest, their_nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [-35.0, -100.0])
def test_logits_far_from_zero_are_not_rounded_to_16_bits(gpu, dtype, level):
    """GPT-2's are: all of them near -35 in one place, near -100 in another. In bfloat16 they then come in steps of 0.5."""
    hidden = torch.cat([torch.randn(40, 32), torch.ones(40, 1)], dim=1).to(dtype)
    wte = torch.cat([0.4 * torch.randn(1000, 32), torch.full((1000, 1), level)], dim=1).to(dtype)
    targets, ours = torch.randint(1000, (40,)), hidden.to("cuda").requires_grad_()
    loss = nll_sum(ours, wte.to("cuda"), targets.to("cuda"))
    loss.backward()
    exact = hidden.double().requires_grad_()
    logits = exact @ wte.double().T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    rounded = hidden @ wte.T  # what 16-bit logits would be
    assert torch.equal(here(project(ours.detach(), wte.to("cuda"))).argmax(dim=-1), logits.argmax(dim=-1))
    assert float(here(loss.detach())) == pytest.approx(float(expected.detach()), rel=1e-5)
    error = lambda grad: float((grad.double() - exact.grad).norm() / exact.grad.norm())
    assert error(here(ours.grad)) < 10 * torch.finfo(dtype).eps
    if dtype == torch.bfloat16 and level == -100:
        assert not torch.equal(rounded.float().argmax(dim=-1), logits.argmax(dim=-1))


def test_a_padded_vocabulary_gives_the_logits_and_gradients_of_the_plain_one(gpu):
    hidden, wte, targets = torch.randn(9, 16), torch.randn(100, 16), torch.randint(100, (9,))
    memory = torch.zeros(padded_rows(100), 16)
    memory[:100] = wte
    there = memory.to("cuda")[:100]
    assert len(padded(there)) == 128 and len(padded(wte)) == 100
    assert torch.equal(here(project(hidden.to("cuda"), there))[:, :100], project(hidden, wte))
    grads = []
    for h, w, t in ((hidden.to("cuda"), there, targets.to("cuda")), (hidden, wte, targets)):
        h.requires_grad_()
        nll_sum(h, w, t).backward()
        grads.append(here(h.grad))
    torch.testing.assert_close(*grads)


# What the pretended GPU notices


def test_what_a_capture_forbids_is_an_error(gpu):
    x, mask = torch.ones(3, device="cuda"), torch.ones(3, device="cuda") > 0
    forbidden = [lambda: x.nonzero(), lambda: bool(x[0] > 0), lambda: x.sum().item(), lambda: x[torch.tensor([0])],
                 lambda: torch.ones(2).pin_memory(), lambda: torch.tensor([1], device="cuda"), lambda: x[mask],
                 lambda: x.tolist(), lambda: torch.ones(2).to("cuda")]  # fmt: skip
    for work in forbidden:
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()


def test_a_replay_runs_what_was_captured_on_the_same_memory(gpu):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        y = 2 * x
    assert x.tolist() == [1, 1, 1] and here(y).isnan().all()
    graph.replay(), graph.replay()
    assert (x.tolist(), y.tolist()) == ([3, 3, 3], [6, 6, 6])


embed, step, one_token = GPT.embed, Trainer.forward_backward, generate.decode_one_token
FAULTS = {  # what takes whose place, in training or in decoding, and what is said then
    "a tensor of the CPU": (GPT, "embed", lambda *a: embed(*a) + torch.zeros(32), "training", "same device"),
    "a wait in a step": (Trainer, "forward_backward", lambda *a: [step(*a), step(*a).item()][0], "training", "waits"),
    "a pageable copy": (attention, "to_device", lambda x, device: x.to(device), "training", "pageable copies"),
    "a wait in a token": (generate, "decode_one_token", lambda *a: [one_token(*a), a[1].ids.tolist()][0], "decoding", "waits"),
    "a wait in a capture": (GPT, "embed", lambda *a: embed(*a) * float(a[2].max() >= 0), "decoding", "replay"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(both, trainer, tokenizer, corpus, monkeypatch, fault):
    owner, name, faulty, where, said = FAULTS[fault]
    monkeypatch.setattr(owner, name, faulty)
    with pytest.raises((AssertionError, RuntimeError), match=said):
        if where == "training":
            test_training_gives_the_cpus_numbers_and_a_step_waits_once_or_twice(both, trainer, corpus, "no kernels")
        else:
            test_decoding_gives_the_cpus_texts_and_a_token_waits_once(both, tokenizer, "greedy")
