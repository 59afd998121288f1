"""A pretended GPU: tensors that say they are on cuda:0 and hold their numbers in main memory.

    with pretended_gpu(monkeypatch) as gpu:
        ...                                  "cuda" is a device; gpu.counts says what was waited for and copied

It shows code that mixes devices (a RuntimeError, as on CUDA), each wait of the host for the device, each copy to it and
whether its memory is pinned, and whether a step may be captured: in a capture nothing runs, a wait or a pageable copy
is an error, and results are NaN until a replay, which runs the recorded calls on the same memory. Triton's kernels run in
Triton's interpreter. It does not show a GPU's own arithmetic, speed, memory, or races between streams.

How: `Pretended` is a tensor whose operations all pass through `dispatch`, which looks at the devices and then computes on
the CPU. What asks for a device by name (factories, .to) passes through `Mode` first.
"""

import contextlib
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # they move CPU indices themselves
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::repeat_interleave", "aten::masked_select", "aten::_unique2")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_LAUNCH = (*EMPTY, "detach", "alias", "_unsafe_view", "lift_fresh", "_reshape_alias", "set_")


class GPU:
    """counts: waits ("wait: ..."), copies ("pinned ...", "pageable ..."), captures, replays; places: by line of the project.
    launches: by kernel; captured: in the last graph. recording: calls of the capture under way, or None. device_of: {thread's
    name: the GPU that it has set}. coming: asynchronous copies to the host, which are -1 until the host waits."""

    def __init__(self):
        self.counts, self.places, self.launches = Counter(), Counter(), Counter()
        self.recording, self.captured, self.device_of, self.coming = None, 0, {}, []

    def note(self, what):
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        while what.startswith("wait") and self.coming:
            torch.Tensor.copy_(*self.coming.pop())
        places = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
        ours = (f"{file.rpartition('/')[2]}:{line}" for file, line in places if "/minigpt/" in file or "/prefix/" in file)
        self.counts[what] += 1
        self.places[what, next(ours, "a test")] += 1

    def total(self, what):
        return sum(n for name, n in self.counts.items() if name.startswith(what))

    def where(self):
        """Waits and pageable copies by line of the project."""
        return {key: n for key, n in self.places.items() if key[0].startswith(("wait", "pageable"))}

    def forget(self):
        self.counts.clear(), self.places.clear(), self.launches.clear()

    def current_device(self):
        return self.device_of.get(threading.current_thread().name, 0)

    def set_device(self, device):
        self.device_of[threading.current_thread().name] = device


current = GPU()


class Pretended(torch.Tensor):
    device, is_cuda, is_cpu = property(lambda self: CUDA), True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        options = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, **options)
        tensor.here = here  # the CPU's tensor
        return tensor

    def __repr__(self, **_):
        return f"Pretended({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def here(x):
    return tree_map(lambda t: t.here if isinstance(t, Pretended) else t, x)


def there(x):
    return tree_map(lambda t: Pretended(t) if type(t) is torch.Tensor else t, x)


def dispatch(func, args, kwargs):
    """One operation of torch, at least one of whose tensors is on the GPU."""
    name, schema = func._schema.name, func._schema
    on_cpu = [t for t in tree_flatten((args, kwargs))[0] if type(t) is torch.Tensor and t.dim()]
    if name in WAITING or (name in INDEXING and by_mask(args)):
        current.note(f"wait: {name}")
    elif name == "aten::copy_" and not isinstance(args[0], Pretended):
        current.note("wait: copy to the host")
    elif name == "aten::copy_" and not isinstance(args[1], Pretended):
        current.note("pageable copy" if args[1].dim() else "copy of a number")
    elif name in INDEXING and any(type(t) is torch.Tensor and t.dim() for t in args[1]):
        current.note("pageable copy of an index")
    elif on_cpu:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")
    if name != "aten::_to_copy":
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if not view and name.removeprefix("aten::") not in NO_LAUNCH:
        current.launches[name] += 1
    if current.recording is not None and writes:  # recorded, and not run
        current.recording.append((func, here(args), here(kwargs), ()))
        return args[0] if schema.arguments[0].alias_info else kwargs.get("out")
    given = {id(here(t)): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Pretended)}
    if func is torch.ops.aten.mm.dtype:  # 16-bit numbers in, float32 out: a CPU has no such product
        func = lambda a, b, dtype: a.to(dtype) @ b.to(dtype)
    out = func(*here(args), **here(kwargs))
    if current.recording is not None and not view:
        record(func, here(args), here(kwargs), out)
    return there(tree_map(lambda t: given.get(id(t), t), out))  # in-place and out= give back the tensor that they wrote


def by_mask(args):
    """Is it x[mask], whose size the host must know? (x[mask] = number is a masked_fill.)"""
    masks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return masks and not (len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], Pretended))


def record(func, args, kwargs, out):
    """A call whose result exists after a replay only: until then it is NaN, or 1."""
    results = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
    for t in results:
        t.fill_(torch.nan if t.is_floating_point() else 1)
    current.recording.append((func, args, kwargs, results))


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls = []

    def replay(self):
        assert self.calls, "nothing was captured"
        for func, args, kwargs, results in self.calls:
            for target, t in zip(results, tree_flatten(func(*args, **kwargs))[0]):
                target.copy_(t)
        current.counts["replay"] += 1


@contextlib.contextmanager
def capture(graph, **_):
    """In place of torch.cuda.graph."""
    current.note("capture")
    before, current.recording = current.launches.total(), graph.calls
    try:
        yield
    finally:
        current.recording, current.captured = None, current.launches.total() - before


class Kernel:
    """A Triton kernel, run by Triton's interpreter on the numbers."""

    def __init__(self, kernel):
        self.kernel, self.fn, self.arg_names = kernel, kernel.fn, kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            wrong = [name for name, a in zip(self.arg_names, args) if type(a) is torch.Tensor]
            if wrong:
                raise ValueError(f"Pointer argument {wrong[0]} cannot be accessed from Triton (cpu tensor?)")
            current.launches[self.fn.__name__] += 1
            if current.recording is not None:
                current.recording.append((self.kernel[grid], here(args), here(kwargs), ()))
            else:
                self.kernel[grid](*here(args), **here(kwargs))

        return launch


class Mode(TorchFunctionMode):
    """Functions that name a device, and those in which the host waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, first = dict(kwargs or {}), getattr(func, "__name__", ""), args[0] if args else None
        if name == "to" and isinstance(first, torch.Tensor):
            return move(func, first, *args[1:], **kwargs)
        if name == "pin_memory" and isinstance(first, torch.Tensor):
            if current.recording is not None:
                raise RuntimeError("operation not permitted when stream is capturing: pinning memory")
            pinned = first.clone()
            pinned.pinned = True
            return pinned
        if isinstance(first, Pretended):
            if name in ("tolist", "cpu"):
                current.note(f"wait: {name}")
                return getattr(first.detach().here.clone(), name)()
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name == "one_hot":  # in C++ it makes a tensor of its own
                return there(func(first.here, *args[1:], **kwargs))
            if name in ("data_ptr", "__reduce_ex__", "untyped_storage"):
                return getattr(first.here, name)(*args[1:])
        if is_cuda(kwargs.get("device")):
            del kwargs["device"]
            if name in ("tensor", "as_tensor"):
                current.note(f"pageable copy: {name}")
            current.launches[name] += name not in ("empty", "tensor", "as_tensor")
            made = func(*args, **kwargs)
            if current.recording is not None:  # the same numbers in each replay
                current.recording.append((made.clone().clone, (), {}, [made]))
            return there(made)
        return func(*args, **kwargs)


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def move(func, x, *args, device=None, dtype=None, non_blocking=False, copy=False):
    """Tensor.to, whose arguments may come in many ways."""
    for a in args:
        if isinstance(a, bool):
            non_blocking = a
        elif isinstance(a, torch.dtype):
            dtype = a
        elif a is not None:
            device = a
    if device is not None and is_cuda(device) != isinstance(x, Pretended):
        if not isinstance(x, Pretended):
            current.note("pinned copy" if non_blocking and getattr(x, "pinned", False) else "pageable copy: to")
            x = there(x.detach().clone())
        else:
            there_now, x = x.detach().here.clone(), torch.full(x.shape, -1, dtype=x.dtype)
            current.coming.append((x, there_now))
            if not non_blocking:  # else it is there after an event
                current.note("wait: to the host")
    return (x.clone() if copy else x) if dtype in (None, x.dtype) else func(x, dtype)


class Event:
    """In place of torch.cuda.Event."""

    def record(self):
        pass

    def synchronize(self):
        current.note("wait: event")


def threads(workers):
    """In place of ThreadPoolExecutor: a mode holds in the thread that entered it."""
    return ThreadPoolExecutor(workers, initializer=lambda: Mode().__enter__())


def backward(run, *args, **options):
    """The engine's own entry: backwards that are written in Python find a mode in it, too."""
    with Mode():
        return run(*args, **options)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextlib.contextmanager
def pretended_gpu(monkeypatch, capability=(9, 0)):
    """Inside, "cuda" is a GPU of this compute capability. Yields its GPU."""
    global current
    from minigpt import backends, cache, decode_kernel, kernels

    current = gpu = GPU()
    interpreted = tuple(map(Kernel, kernels.KERNELS))
    for kernel in interpreted:
        monkeypatch.setattr(kernels, kernel.fn.__name__, kernel)
    monkeypatch.setattr(kernels, "KERNELS", interpreted)
    for name in ("decode_kernel", "norm_kernel"):
        monkeypatch.setattr(decode_kernel, name, Kernel(getattr(decode_kernel, name)))
    monkeypatch.setattr(cache, "FAILED", set())
    monkeypatch.setattr(backends, "kernels_work", lambda *a, **_: capability >= backends.KERNELS_FROM)  # has tests of its own
    fakes = {
        "CUDAGraph": Graph, "graph": capture, "Event": Event, "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda: None, "stream": contextlib.nullcontext,
        "current_device": gpu.current_device, "set_device": gpu.set_device, "is_available": lambda: True,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
        "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
    } | dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), lambda device=None: 0)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", Generator)
    group = lambda lists, *_: {(lists[0][0].device, lists[0][0].dtype): (lists, list(range(len(lists[0]))))}
    for module in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):  # the original is C++, which sees the CPU
        monkeypatch.setattr(sys.modules[module], "_group_tensors_by_device_and_dtype", group, raising=False)
    # where torch is a CUDA build, this asks a driver
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None, raising=False)
    monkeypatch.setattr("prefix.batches.ThreadPoolExecutor", threads)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", partial(backward, torch.autograd._engine_run_backward))
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Mode():
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
