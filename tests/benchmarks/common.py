"""What benchmarks share: a fresh process for each thing measured, its clock and its peak memory, what machine it ran
on, and how fast that machine multiplies matrices at best."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from minigpt import GPT, checkpoint

LINUX = sys.platform == "linux"
CPU_INFO = Path("/proc/cpuinfo").read_text() if LINUX else ""
RATES = [float(f"{x}e{n}") for n in range(-5, 2) for x in (1, 3)]
KERNELS = {
    "attention kernels": r"forward_kernel|delta_kernel|gradient_kernel|decode_kernel",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|gemv|cublas",
    "softmax and norms": r"[sS]oft[mM]ax|layer_norm|LayerNorm",
    "copies": r"Memcpy|Memset|copy|CatArray",
}
SQUARE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the ceiling


def run_rows(names, home):
    """Each of these rows in a process of its own -> {name: result}. home: where what they all read lies."""
    results = {}
    for i, name in enumerate(names):
        start = time.monotonic()
        results[name] = fresh(name, home)
        print(f"[{i + 1}/{len(names)}] {name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return results


def fresh(name, home):
    """This script once more, for one row -> the dict on the last line that it printed."""
    command = [sys.executable, *sys.argv, "--row", name, "--home", str(home)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"the process ended with {done.returncode}" + " (out of memory?)" * (done.returncode == -9)}


def measure_row(measure, args):
    """What the script does that was run for one row: measure(args) -> a dict, printed as the last line."""

    if args.device == "cpu" and LINUX:
        refuse_to_swallow_the_machine()
    try:
        result = measure(args)
    except Exception as error:  # a row that does not work here is a result, too
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {first_line(error)}"}
    print(json.dumps(result))


def refuse_to_swallow_the_machine():
    """Let a row that is too large fail for itself instead of pushing other programs out of memory."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(info["MemAvailable"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def make_checkpoint(config, vocabulary, directory):
    """A model of this shape with random weights, and the tokenizer's files from `vocabulary`."""
    model = GPT(config)  # norms begin at one and zero
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    checkpoint.save(model, directory)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(Path(vocabulary) / file, directory)


def best_rate(middle, loss_of):
    """The learning rate of 1, 3, 10, 30 ... with the least loss_of(rate): three around `middle`, and the next one for as
    long as the best stands at the edge."""
    losses, at = {}, RATES.index(middle)
    while new := {at - 1, at, at + 1} & set(range(len(RATES))) - losses.keys():
        losses |= {i: loss_of(RATES[i]) for i in sorted(new)}
        at = min(losses, key=losses.get)
    return RATES[at]


# Time and memory


def clock(run, device):
    """(what run() returns, the seconds that it took)."""
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def timings(run, device, at_least=0.5):
    """Seconds that one call of run() takes, measured several times: three at least, and for half a second."""
    calls, taken = (10 if device == "cuda" else 1), []

    def several():
        for _ in range(calls):
            run()

    clock(run, device)
    while len(taken) < 3 or sum(taken) * calls < at_least:
        taken.append(clock(several, device)[1] / calls)
    return taken


class Peak:
    """The most memory that was taken at a time since reset(), above what was taken when this was made: the GPU's, or
    the resident memory of this process, weights that are mapped from a file included. (Without Linux, which can forget
    a high-water mark, the mark since the process began.)"""

    def __init__(self, device):
        self.cuda = device == "cuda"
        with contextlib.suppress(AttributeError):  # what was freed goes back to the system, where the C library can
            ctypes.CDLL(None).malloc_trim(0)
        self.reset()
        self.before = self.highest()

    def reset(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif LINUX:
            Path("/proc/self/clear_refs").write_text("5")

    def highest(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if LINUX:
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def bytes(self):
        return self.highest() - self.before


@contextlib.contextmanager
def replaced(owner, name, value):
    """Inside, an attribute is another."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def waits(work, device):
    """(work()'s result, how often the host waited in it): as torch warns of it, and for events."""
    if device != "cuda":
        return work(), None
    events, wait = [], torch.cuda.Event.synchronize
    with warnings.catch_warnings(record=True) as caught, replaced(
        torch.cuda.Event, "synchronize", lambda event: events.append(event) or wait(event)
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result, len(events) + sum("called a synchronizing" in str(warning.message) for warning in caught)


def profile(work, device):
    """Where the time of work() goes: {kind of kernel: [milliseconds, launches]}, and the share of it that is busy."""
    if device != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - began)
    ms, launches = Counter(), Counter()
    for event in (event for event in profiler.key_averages() if event.self_device_time_total):
        kind = next((kind for kind, names in KERNELS.items() if re.search(names, event.key)), "other")
        ms[kind] += event.self_device_time_total / 1e3
        launches[kind] += event.count
    return {kind: [round(t, 2), launches[kind]] for kind, t in ms.most_common()} | {"busy": round(ms.total() / wall, 3)}


# The machine


def multiplies_bf16():
    """Whether this CPU has instructions for that."""
    return "avx512_bf16" in CPU_INFO or "amx_bf16" in CPU_INFO


def ceiling(device, dtypes, mlp):
    """FLOPs per second of a plain matrix product, the best of several: {dtype: {"square": ..., "mlp": ...}}.
    mlp: (tokens, n_embd, mlp_dim), the widest product in the model's own blocks."""
    rates, n = {}, SQUARE[device]
    for dtype in dtypes:
        rates[dtype] = {}
        for name, (rows, inner, columns) in {"square": (n, n, n), "mlp": mlp}.items():
            a = torch.randn(rows, inner, device=device, dtype=getattr(torch, dtype))
            b = torch.randn(inner, columns, device=device, dtype=getattr(torch, dtype))
            rates[dtype][name] = 2 * rows * inner * columns / min(timings(lambda: a @ b, device, 2))
    return rates


def circumstances(device):
    """What a number must be read with: the machine, the versions, the day, the command."""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "peft")}
    models = [line.split(":")[1].strip() for line in CPU_INFO.splitlines() if line.startswith("model name")]
    return {
        "device": _gpu() if device == "cuda" else next(iter(models), platform.machine()),
        "cpu_threads": torch.get_num_threads(),
        "multiplies_bf16": device == "cuda" or multiplies_bf16(),
        **versions,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu():
    """Its name and, where nvidia-smi tells, the power that it may draw."""
    name = torch.cuda.get_device_name()
    if not shutil.which("nvidia-smi"):
        return name
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader", "--id=0"]
    return f"{name}, {subprocess.run(query, capture_output=True, text=True).stdout.strip()}"
