"""How a GPU runs a step: the kernel, the graph, and what is left of them where they fail. The GPU is imitated on the CPU:
the kernel runs in Triton's interpreter, and a graph notes the step that is recorded and computes it on replay. Streams,
memory and launches are a GPU's own affair."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
import minigpt.cache  # noqa: E402
from minigpt import GPTConfig, decode_kernel  # noqa: E402
from minigpt.beam import beam_search  # noqa: E402
from minigpt.generate import Prompt, Sampler, generate  # noqa: E402
from prefix.init import random_banks  # noqa: E402

CONFIG = GPTConfig(vocab_size=31, n_positions=48, n_embd=16, n_layer=2, n_head=1)
STOP = 30
if torch.cuda.is_available():
    pytest.skip("here the kernel would not take the CPU's tensors", allow_module_level=True)


class FakeGraph:
    """In place of a CUDA graph."""

    recording, captures, replays = None, 0, 0

    def replay(self):
        step, arguments, logits = self.recorded
        logits.copy_(step(*arguments))
        FakeGraph.replays += 1


@contextmanager
def capture(graph):
    FakeGraph.recording = graph
    FakeGraph.captures += 1
    yield
    FakeGraph.recording = None


def product_and_gelu(bias, x, weight, use_gelu):
    """As on a GPU: on a CPU torch applies the exact GELU in place of its tanh form."""
    return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")


@pytest.fixture
def gpu(monkeypatch):
    """A function: from now on the CPU is a GPU. It returns the calls of the kernel so far, as a list."""

    def begin():
        step, attention, calls = minigpt.cache.decode_step, decode_kernel.decode_attention, []

        def recorded_step(model, cache, lengths):
            if not FakeGraph.recording:
                return step(model, cache, lengths)
            logits = torch.full((*cache.ids.shape, CONFIG.vocab_size), torch.nan)
            FakeGraph.recording.recorded = step, (model, cache, lengths), logits
            return logits

        def copied(ids):
            there = ids.clone()
            return lambda: there

        monkeypatch.setattr(FakeGraph, "captures", 0)
        monkeypatch.setattr(FakeGraph, "replays", 0)
        for name, fake in (("CUDAGraph", FakeGraph), ("graph", capture), ("device", lambda device: nullcontext())):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(minigpt.cache, "decode_step", recorded_step)
        monkeypatch.setattr(minigpt.cache, "FAILED", set())
        for module in ("cache", "generate"):
            monkeypatch.setattr(f"minigpt.{module}.uses_graphs", lambda device: True)
        monkeypatch.setattr("minigpt.generate.to_host", copied)
        monkeypatch.setattr(decode_kernel, "decode_attention", lambda *a: calls.append(a) or attention(*a))
        monkeypatch.setattr(torch, "_addmm_activation", product_and_gelu)
        return calls

    return begin


@pytest.fixture
def model():
    model = random_model(CONFIG)
    model.wte.weight[STOP] += 0.2 * model.ln_f.bias  # likely enough for some sentences to end in time
    return model


def random_prompts(n, most=7):
    prompts = []
    for i, length in enumerate(torch.randint(1, 12, (n,)).tolist()):
        ids, new = torch.randint(CONFIG.vocab_size, (length,)).tolist(), int(torch.randint(most, ())) + 1
        prompts.append(Prompt(ids, new, [1 + i % 2] * (length - 1) + [3]))
    return prompts


def decode(model, prompts, slots, way, batch_size=3):
    if way == "beams":
        return [r.ids for r in beam_search(model, prompts, [STOP], slots, beams=3, batch_size=batch_size)]
    sampler = Sampler(0.8, 20, 0.95, seed=1) if way == "sampled" else None
    return [r.ids for r in generate(model, prompts, [STOP], slots, batch_size=batch_size, sampler=sampler)]


def random_slots():
    return random_banks(CONFIG, ["en", "fr"], 5, int(torch.randint(1 << 30, ()))).slots()


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize("banks", [True, False])
def test_a_gpus_way_gives_the_tokens_of_the_plain_step(model, gpu, capsys, way, banks):
    slots, prompts = random_slots() if banks else None, random_prompts(5, most=5)
    expected = decode(model, prompts, slots, way)
    calls = gpu()
    assert decode(model, prompts, slots, way) == expected
    assert FakeGraph.captures == 1 and FakeGraph.replays
    assert len(calls) == CONFIG.n_layer * (FakeGraph.replays + 1)  # and once before it is recorded
    assert capsys.readouterr().err == ""


def test_one_line_after_another_finds_the_graph_of_the_first_whatever_its_slots_and_length(model, gpu):
    lines = [(random_prompts(1), random_slots()) for _ in range(5)]
    for number, ((prompt,), slots) in enumerate(lines):
        prompt.bank_mask = [1] * len(prompt.ids)
        slots.bank = (slots.bank + number) % 2  # the banks stand one or the other way round
    expected = [decode(model, *line, "greedy") for line in lines]
    gpu()
    assert [decode(model, *line, "greedy") for line in lines] == expected
    assert FakeGraph.captures <= 1  # none where each line ended at its first token
    assert minigpt.cache.kept_bytes(model) == 2 * 4 * CONFIG.n_layer * CONFIG.n_embd * CONFIG.n_positions


def test_after_an_error_no_cache_is_kept(model, gpu):
    gpu()
    with pytest.raises(ZeroDivisionError), minigpt.cache.borrow_cache(model, 2, 10):
        1 / 0
    assert minigpt.cache.kept_bytes(model) == 0


def kernel_that_raises(*_):
    raise RuntimeError("no such instruction\nand more")


def kernel_that_errs(qkv, cache, layer):
    return qkv[:, -CONFIG.n_embd :].clone()  # the newest value, whatever else there is


def replay_that_errs(graph):
    graph.recorded[-1].fill_(torch.nan)


KERNEL, ON = (decode_kernel, "decode_attention"), "on this GPU: "
FAULTS = {  # what it is; a way to decode, what is replaced, what takes its place, what is said
    "a kernel that raises": ("greedy", *KERNEL, kernel_that_raises, f"its kernel {ON}no such instruction"),
    "a kernel that errs": ("beams", *KERNEL, kernel_that_errs, f"its kernel {ON}its numbers are not those"),
    "a graph that raises": ("beams", torch.cuda, "graph", kernel_that_raises, f"its graph {ON}no such instruction"),
    "a graph that errs": ("greedy", FakeGraph, "replay", replay_that_errs, f"its graph {ON}its numbers are not those"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_on_a_gpu_is_said_once_and_then_left(model, gpu, monkeypatch, capsys, fault):
    way, owner, name, broken, said = FAULTS[fault]
    slots, prompts = random_slots(), [Prompt([1, 2, 3, 4], 6, [3] * 4), *random_prompts(3)]
    expected = decode(model, prompts, slots, way)
    gpu()
    monkeypatch.setattr(owner, name, broken)
    for batch_size in (3, 2):  # the second has a cache of its own
        assert decode(model, prompts, slots, way, batch_size) == expected
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


FULL = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_gpu_is_no_fault_of_the_kernels(model, gpu, monkeypatch, error):
    gpu()

    def full(*_):
        raise error

    monkeypatch.setattr(decode_kernel, "decode_attention", full)
    with pytest.raises(type(error), match="out of memory"):
        generate(model, [Prompt([1], 3)], [])
    assert not minigpt.cache.FAILED
