"""Tests of fmalloc.py with a private daemon. Run by `cargo test -p fmalloc-tests --test python`; by hand:

    FMALLOC_LIBRARY=target/debug/libfmalloc.so FMALLOC_DAEMON=target/debug/fmallocd python3 client/python/test_fmalloc.py
"""

import errno
import gc
import tempfile
import unittest

import numpy

import fmalloc

MIB = 1 << 20


class Arrays(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory(dir="/var/tmp")
        fmalloc.init("2G", "32M", path=cls.directory.name)

    @classmethod
    def tearDownClass(cls):
        gc.collect()
        fmalloc.close()
        cls.directory.cleanup()

    def tearDown(self):
        gc.collect()
        self.assertEqual(fmalloc.stats()["used_blocks"], 0)
        fmalloc.check()

    def test_arrays_of_several_times_the_budget_keep_their_content(self):
        count = 5 * MIB
        numbers = fmalloc.empty(count, numpy.int64)
        numbers[:] = numpy.arange(count)
        squares = fmalloc.empty(count, numpy.float64)
        numpy.multiply(numbers, 2.0, out=squares)
        self.assertEqual(int(numbers.sum()), count * (count - 1) // 2)
        self.assertTrue(bool((squares[:: 4096] == numpy.arange(0, count, 4096) * 2.0).all()))
        stats = fmalloc.stats()
        self.assertEqual(stats["used_blocks"], 2)
        self.assertEqual(stats["budget_bytes"], 32 * MIB)
        self.assertLessEqual(stats["peak_resident_bytes"], 32 * MIB)
        self.assertGreater(stats["pages_out"], 0)
        self.assertGreater(stats["pages_in"], 0)

    def test_sorting_agrees_with_numpy(self):
        numbers = numpy.random.default_rng(1).integers(0, 1 << 60, 5 * MIB)
        paged = fmalloc.asarray(numbers)
        fmalloc.advise(paged, "sequential")
        paged.sort()
        numbers.sort()
        self.assertTrue(numpy.array_equal(paged, numbers))

    def test_files_are_read_into_arrays_and_written_from_them(self):
        numbers = fmalloc.asarray(numpy.arange(5 * MIB, dtype=numpy.int64))
        with tempfile.TemporaryFile(dir="/var/tmp") as file:
            numbers.tofile(file)
            file.seek(0)
            again = fmalloc.empty(numbers.shape, numbers.dtype)
            self.assertEqual(file.readinto(memoryview(again).cast("B")), numbers.nbytes)
        self.assertTrue(numpy.array_equal(numbers, again))

    def test_memory_lives_as_long_as_its_last_view(self):
        array = fmalloc.zeros((1000, 1000))
        view = array[500:, ::2].T
        del array
        gc.collect()
        view += 3
        self.assertEqual(view.sum(), 3 * 500 * 500)
        self.assertEqual(fmalloc.stats()["used_blocks"], 1)

    def test_zeros_are_zero_in_memory_that_was_used_before(self):
        fmalloc.empty(2 * MIB)[:] = 1
        gc.collect()
        self.assertFalse(fmalloc.zeros((1024, 2048)).any())

    def test_shapes_and_types_are_those_of_numpy(self):
        for shape, dtype, order in [((), "i4", "C"), ((0, 3), "u1", "C"), ((2, 3, 4), "c16", "F"), (7, "m8[s]", "C")]:
            ours, theirs = fmalloc.zeros(shape, dtype, order), numpy.zeros(shape, dtype, order)
            self.assertTrue(numpy.array_equal(ours, theirs))
            self.assertEqual((ours.dtype, ours.shape), (theirs.dtype, theirs.shape))
            # Those of empty arrays mean nothing.
            self.assertTrue(ours.size == 0 or ours.strides == theirs.strides)

    def test_failures_are_exceptions_with_reasons(self):
        with self.assertRaisesRegex(MemoryError, "out of memory"):
            fmalloc.empty(1 << 40)
        with self.assertRaisesRegex(TypeError, "objects"):
            fmalloc.empty(1, object)
        with self.assertRaisesRegex(fmalloc.Error, "already") as caught:
            fmalloc.init("1G")
        self.assertEqual(caught.exception.errno, errno.EINVAL)
        with self.assertRaisesRegex(fmalloc.Error, "not in the heap"):
            fmalloc.advise(numpy.zeros(10), "cold")


if __name__ == "__main__":
    unittest.main()
