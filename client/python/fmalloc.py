"""Memory larger than RAM, for numpy arrays: a binding of the C library libfmalloc.so, by ctypes.

    import fmalloc

    fmalloc.init(size="64G", ram="2G")
    a = fmalloc.zeros((1_000_000, 1_000))      # 8 GB, of which 2 GiB at most are in RAM
    a[:] = 1
    print(a.sum(), fmalloc.stats()["pages_out"])

The library is looked for in FMALLOC_LIBRARY, beside this file, and where the system's loader looks. Arrays are ordinary
numpy arrays: views, ufuncs and file I/O work. Their memory is freed with the last array or view that uses it. A forked
child has none of it (multiprocessing: use the start method "spawn").
"""

import ctypes
import os
import weakref
from pathlib import Path

import numpy

__all__ = ["Error", "advise", "asarray", "check", "close", "empty", "init", "stats", "trim", "zeros"]

_ADVICE = {"normal": 0, "sequential": 1, "random": 2, "will_need": 3, "cold": 4}
_DAEMONS = {"any": 0, "service": 1, "private": 2}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Error(OSError):
    """What the library has to say; with errno."""


class _Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("ram", ctypes.c_uint64),
        ("swap_size", ctypes.c_uint64),
        ("daemon", ctypes.c_uint32),
        ("user_mode_only", ctypes.c_bool),
        ("path", ctypes.c_char_p),
        ("socket", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t)] + [
        (name, ctypes.c_uint64)
        for name in (
            "reserved_bytes committed_bytes used_bytes used_blocks peak_bytes table_bytes misuse budget_bytes "
            "resident_bytes peak_resident_bytes swapped_bytes faults pages_in pages_out"
        ).split()
    ]


def _load():
    beside = Path(__file__).with_name("libfmalloc.so")
    path = os.environ.get("FMALLOC_LIBRARY") or (str(beside) if beside.exists() else "libfmalloc.so")
    library = ctypes.CDLL(path, use_errno=True)
    size, pointer, status = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("fmalloc_init_with", status, [ctypes.POINTER(_Options)]),
        ("fmalloc_close", status, []),
        ("fmalloc_error", ctypes.c_char_p, []),
        ("faligned_alloc", pointer, [size, size]),
        ("fcalloc", pointer, [size, size]),
        ("ffree", None, [pointer]),
        ("fmalloc_advise", status, [pointer, size, ctypes.c_uint32]),
        ("fmalloc_trim", status, [size]),
        ("fmalloc_check", status, []),
        ("fmalloc_stats", status, [ctypes.POINTER(_Stats)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library = _load()


def _fail():
    raise Error(ctypes.get_errno(), _library.fmalloc_error().decode())


def _bytes(size):
    """A number of bytes from 4096 or "4K", "1.5G"."""
    if isinstance(size, str):
        number, unit = (size[:-1], _UNITS[size[-1]]) if size[-1:] in _UNITS else (size, 1)
        return int(float(number) * unit)
    return int(size)


def _text(value):
    return None if value is None else os.fsencode(value)


def init(size, ram=0, *, path=None, swap_size=0, daemon="any", socket=None, name="python", user_mode_only=False):
    """Makes the heap of this process, of at most `size` bytes, at most `ram` of them in RAM (0: a default). With a `path`, a
    private daemon swaps to that directory's disk; `daemon` is "any", "service" or "private"."""
    options = _Options(
        struct_size=ctypes.sizeof(_Options),
        size=_bytes(size),
        ram=_bytes(ram),
        swap_size=_bytes(swap_size),
        daemon=_DAEMONS["private" if path is not None and daemon == "any" else daemon],
        user_mode_only=user_mode_only,
        path=_text(path),
        socket=_text(socket),
        name=_text(name),
    )
    if _library.fmalloc_init_with(options) != 0:
        _fail()


def close():
    """Ends the heap. Arrays in it must not be used any more."""
    if _library.fmalloc_close() != 0:
        _fail()


def empty(shape, dtype=float, order="C"):
    """As numpy.empty, in the heap."""
    return _array(shape, dtype, order, lambda size: _library.faligned_alloc(64, size))


def zeros(shape, dtype=float, order="C"):
    """As numpy.zeros, in the heap; costs nothing for pages that are not touched."""
    return _array(shape, dtype, order, lambda size: _library.fcalloc(1, size))


def asarray(array, dtype=None, order="C"):
    """A copy of an array, in the heap."""
    source = numpy.asarray(array, dtype=dtype)
    copy = empty(source.shape, source.dtype, order)
    copy[...] = source
    return copy


def _array(shape, dtype, order, allocate):
    dtype = numpy.dtype(dtype)
    if dtype.hasobject:
        raise TypeError("objects of Python cannot live in the heap: only numbers, and structures of them")
    count = 1
    for length in shape if isinstance(shape, (tuple, list)) else (shape,):
        count *= int(length)
    if count < 0:
        raise ValueError("negative dimensions are not allowed")
    size = max(count * dtype.itemsize, 1)
    block = allocate(size)
    if not block:
        raise MemoryError(_library.fmalloc_error().decode())
    memory = (ctypes.c_char * size).from_address(block)
    # Arrays and their views keep `memory` alive; when the last one goes, so does the block.
    weakref.finalize(memory, _library.ffree, block).atexit = False
    return numpy.ndarray(shape, dtype, memory, order=order)


def advise(array, advice):
    """A hint about a contiguous array: "normal", "sequential", "random", "will_need" or "cold"."""
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError("the array is not contiguous")
    if _library.fmalloc_advise(array.ctypes.data, array.nbytes, _ADVICE[advice]) != 0:
        _fail()


def stats():
    """Figures of the heap and of its paging, as a dictionary; see fmalloc_stats_t in fmalloc.h."""
    figures = _Stats(struct_size=ctypes.sizeof(_Stats))
    if _library.fmalloc_stats(figures) != 0:
        _fail()
    return {name: getattr(figures, name) for name, _ in _Stats._fields_[1:]}


def trim(keep=0):
    """Gives free memory back to RAM and swap, but for `keep` bytes."""
    if _library.fmalloc_trim(_bytes(keep)) != 0:
        _fail()


def check():
    """Whether all records of the heap agree; raises Error if not."""
    if _library.fmalloc_check() != 0:
        _fail()
