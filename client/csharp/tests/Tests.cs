// The binding under a managed runtime: real paging, several times the budget, threads, collections, disposal in use.
// Run by client/csharp/test, which starts a service and says where it, the daemon and the library are. Exit code 1 and a trace if anything fails.
using System;
using System.Buffers;
using System.Collections.Generic;
using System.IO;
using System.IO.MemoryMappedFiles;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using Fmalloc;

public static class Tests
{
    private const long Budget = 16L << 20;
    private static readonly string Swap = Path.Combine(Path.GetTempPath(), "fmalloc-csharp-" + System.Diagnostics.Process.GetCurrentProcess().Id + ".swap");

    public static int Main(string[] arguments)
    {
        var tests = new List<KeyValuePair<string, Action>>();
        Action<string, Action> add = (name, test) => tests.Add(new KeyValuePair<string, Action>(name, test));
        add("values of all kinds are read back", ValuesOfAllKinds);
        add("a pattern survives at sixteen times the budget with threads and collections", Pattern);
        add("streams and spans see the same bytes", StreamsAndSpans);
        add("sizes past 2 GiB work", PastTwoGibibytes);
        add("bounds are checked", Bounds);
        add("a file that is open is shared or refused", Sharing);
        add("memory outlives its region while a view is there", ViewsKeepMemory);
        add("disposal in use is an exception", DisposalInUse);
        add("disposal of streams in use is an exception", StreamsDisposedInUse);
        add("a null reference is still an exception", NullReference);
        add("errors have the library's messages", Errors);
        add("discard, advice, pins and budgets", Requests);
        add("a file is changed through its views, and flushed", Files);
        add("a file for reading or copying stays as it is", FilesThatStay);
        add("a service pages as well", Service);
        add("handles that nobody disposed are collected", Collected);
        int failed = 0;
        foreach (var test in tests)
        {
            if (arguments.Length > 0 && !test.Key.Contains(arguments[0])) continue;
            var clock = System.Diagnostics.Stopwatch.StartNew();
            try
            {
                test.Value();
                Console.WriteLine("ok     {0} ({1} ms)", test.Key, clock.ElapsedMilliseconds);
            }
            catch (Exception error)
            {
                failed++;
                Console.WriteLine("FAILED {0}: {1}", test.Key, error);
            }
        }
        return failed == 0 ? 0 : 1;
    }

    private static void Check(bool condition, string what)
    {
        if (!condition) throw new Exception(what);
    }

    private static T Throws<T>(Action action) where T : Exception
    {
        try
        {
            action();
        }
        catch (T expected)
        {
            return expected;
        }
        throw new Exception("no " + typeof(T).Name);
    }

    private static FmallocPager Pager(long budget, long swap)
    {
        return FmallocPager.Local(new FmallocOptions { Budget = budget, SwapSize = swap });
    }

    private struct Point
    {
        public double X;
        public int Y;
        public byte Z;
    }

    private struct Reference
    {
        public object Target;
    }

    private static void ValuesOfAllKinds()
    {
        using (FmallocFile file = FmallocFile.CreateNew(Swap, 64L << 20, Budget))
        using (FmallocViewAccessor view = file.CreateViewAccessor(0, 0))
        {
            Check(view.Capacity == 64L << 20 && file.Capacity == view.Capacity, "capacity");
            Check(view.ReadInt64(12345) == 0, "zeros at first");
            view.Write(0, true);
            view.Write(1, (byte)200);
            view.Write(2, (short)-3);
            view.Write(4, 'ä');
            view.Write(8, 1.5);
            view.Write(16, -7000000000L);
            view.Write(24, 3.25f);
            view.Write(32, 79228162514264337593543950335m);
            var point = new Point { X = 0.5, Y = 77, Z = 3 };
            view.Write(1000, ref point);
            view.Flush();
            Check(view.ReadBoolean(0) && view.ReadByte(1) == 200 && view.ReadInt16(2) == -3, "small ones");
            Check(view.ReadChar(4) == 'ä' && view.ReadDouble(8) == 1.5 && view.ReadInt64(16) == -7000000000L, "larger ones");
            Check(view.ReadSingle(24) == 3.25f && view.ReadDecimal(32) == 79228162514264337593543950335m, "others");
            Point copy;
            view.Read(1000, out copy);
            Check(copy.X == 0.5 && copy.Y == 77 && copy.Z == 3, "a structure");
            var points = new Point[1000];
            for (int i = 0; i < points.Length; i++) points[i] = new Point { X = i, Y = -i };
            view.WriteArray(5000, points, 0, points.Length);
            var copies = new Point[1000];
            Check(view.ReadArray(5000, copies, 0, copies.Length) == 1000, "how many");
            for (int i = 0; i < copies.Length; i++) Check(copies[i].X == i && copies[i].Y == -i, "an array");
            Throws<ArgumentException>(() => { Reference reference; view.Read(0, out reference); });
        }
        Check(!File.Exists(Swap), "the swap file stays behind");
    }

    private static long Mix(long value)
    {
        unchecked
        {
            ulong word = (ulong)value * 0x9e3779b97f4a7c15UL;
            return (long)(word ^ word >> 29);
        }
    }

    private static void Pattern()
    {
        const int Threads = 4;
        const long Part = 16L << 20;
        using (FmallocPager pager = Pager(Budget, 2 * Threads * Part))
        using (FmallocRegion region = pager.CreateRegion(Threads * Part))
        {
            var errors = new List<Exception>();
            var threads = new List<Thread>();
            bool stop = false;
            var collector = new Thread(() => { while (!Volatile.Read(ref stop)) { GC.Collect(); Thread.Sleep(1); } });
            collector.Start();
            for (int number = 0; number < Threads; number++)
            {
                long start = number * Part;
                var thread = new Thread(() =>
                {
                    try
                    {
                        using (FmallocViewAccessor view = region.CreateViewAccessor(start, Part))
                        {
                            var block = new long[512];
                            for (long at = 0; at < Part; at += 4096)
                            {
                                for (int i = 0; i < block.Length; i++) block[i] = Mix(start + at + i);
                                view.WriteArray(at, block, 0, block.Length);
                            }
                            for (int round = 0; round < 2; round++)
                            {
                                for (long at = 0; at < Part; at += 4096)
                                {
                                    // New arrays, so that there is something to collect.
                                    var copy = new long[512];
                                    view.ReadArray(at, copy, 0, copy.Length);
                                    for (int i = 0; i < copy.Length; i++)
                                        Check(copy[i] == Mix(start + at + i), "wrong value at " + (start + at));
                                }
                            }
                        }
                    }
                    catch (Exception error)
                    {
                        lock (errors) errors.Add(error);
                    }
                });
                thread.Start();
                threads.Add(thread);
            }
            foreach (Thread thread in threads) thread.Join();
            Volatile.Write(ref stop, true);
            collector.Join();
            if (errors.Count > 0) throw new AggregateException(errors);
            FmallocStats stats = pager.Stats();
            Check(stats.PagesOut > 0 && stats.PagesIn > 0, "nothing was paged");
            Check(stats.PeakHeldBytes <= (ulong)Budget, "beyond the budget");
            Check(GC.CollectionCount(0) > 1, "no collection took place");
        }
    }

    private static void StreamsAndSpans()
    {
        using (FmallocPager pager = Pager(Budget, 128L << 20))
        using (FmallocRegion region = pager.CreateRegion(64L << 20))
        {
            using (FmallocViewStream stream = region.CreateViewStream())
            using (var writer = new StreamWriter(stream, new UTF8Encoding(false), 4096, true))
            {
                for (int line = 0; line < 1000000; line++) writer.Write("line {0}\n", line);
            }
            using (var reader = new StreamReader(region.CreateViewStream(0, 0)))
            {
                for (int line = 0; line < 1000000; line++) Check(reader.ReadLine() == "line " + line, "line " + line);
            }
            using (IMemoryOwner<byte> owner = region.CreateMemory<byte>(0, 1000))
            {
                Check(owner.Memory.Length == 1000 && Encoding.UTF8.GetString(owner.Memory.Span.Slice(0, 6).ToArray()) == "line 0", "a span");
            }
            IMemoryOwner<int> numbers = region.CreateMemory<int>(32L << 20, 4 << 20);
            Span<int> span = numbers.Memory.Span;
            for (int i = 0; i < span.Length; i++) span[i] = i;
            using (FmallocViewAccessor view = region.CreateViewAccessor())
            {
                Check(view.ReadInt32((32L << 20) + 4000000) == 1000000, "an accessor sees what a span wrote");
                view.Write(32L << 20, 99);
            }
            Check(span[0] == 99 && span[span.Length - 1] == span.Length - 1, "and the other way round");
            using (MemoryHandle pin = numbers.Memory.Pin()) numbers.Dispose();
            Throws<ObjectDisposedException>(() => { var again = numbers.Memory.Span; });
            Throws<ArgumentException>(() => region.CreateMemory<Reference>(0, 1));
            Throws<ArgumentOutOfRangeException>(() => region.CreateMemory<long>((64L << 20) - 8, 2));
            Check(pager.Stats().PagesOut > 0, "nothing was paged");
        }
    }

    private static void PastTwoGibibytes()
    {
        const long Size = 5L << 30;
        using (FmallocPager pager = Pager(Budget, Size + (64L << 20)))
        using (FmallocRegion region = pager.CreateRegion(Size))
        using (FmallocViewAccessor all = region.CreateViewAccessor(0, Size))
        using (FmallocViewAccessor end = region.CreateViewAccessor(Size - 100, 100))
        {
            for (long at = 0; at < Size; at += 64L << 20) all.Write(at, at);
            for (long at = 0; at < Size; at += 64L << 20) Check(all.ReadInt64(at) == at, "at " + at);
            all.Write(Size - 8, 123456789L);
            Check(end.ReadInt64(92) == 123456789L, "the last bytes");
            using (FmallocViewStream stream = region.CreateViewStream(Size - 100, 0))
            {
                stream.Position = 92;
                Check(stream.ReadByte() == 0x15 && stream.Length == 100, "the last bytes as a stream");
            }
        }
    }

    private static void Bounds()
    {
        using (FmallocPager pager = Pager(Budget, 64L << 20))
        using (FmallocRegion region = pager.CreateRegion(10000))
        {
            Throws<ArgumentOutOfRangeException>(() => region.CreateViewAccessor(-1, 1));
            Throws<ArgumentOutOfRangeException>(() => region.CreateViewAccessor(0, 10001));
            Throws<ArgumentOutOfRangeException>(() => region.CreateViewStream(10001, 0));
            Throws<ArgumentOutOfRangeException>(() => region.Discard(9999, 2));
            Throws<ArgumentOutOfRangeException>(() => pager.CreateRegion(0));
            using (FmallocViewAccessor view = region.CreateViewAccessor(9000, 1000))
            {
                Throws<ArgumentException>(() => view.ReadInt64(993));
                Throws<ArgumentException>(() => view.Write(999, 1));
                Throws<ArgumentOutOfRangeException>(() => view.ReadByte(1000));
                Throws<ArgumentOutOfRangeException>(() => view.ReadByte(-1));
                view.Write(996, 1);
            }
        }
    }

    private static void Sharing()
    {
        using (FmallocFile first = FmallocFile.CreateOrOpen(Swap, 32L << 20, Budget))
        {
            using (FmallocViewAccessor view = first.CreateViewAccessor()) view.Write(5, 55);
            Throws<IOException>(() => FmallocFile.CreateNew(Swap, 32L << 20, Budget));
            Throws<ArgumentOutOfRangeException>(() => FmallocFile.CreateOrOpen(Swap, 64L << 20, Budget));
            FmallocFile second = FmallocFile.CreateOrOpen(Swap, 1 << 20);
            using (FmallocViewAccessor view = second.CreateViewAccessor()) Check(view.ReadInt32(5) == 55, "the same memory");
            second.Dispose();
            second.Dispose();
            Throws<ObjectDisposedException>(() => second.CreateViewAccessor());
            using (FmallocViewAccessor view = first.CreateViewAccessor()) Check(view.ReadInt32(5) == 55, "still there");
        }
        using (FmallocFile again = FmallocFile.CreateNew(Swap, 32L << 20, Budget))
        using (FmallocViewAccessor view = again.CreateViewAccessor()) Check(view.ReadInt32(5) == 0, "new memory");
    }

    private static void ViewsKeepMemory()
    {
        FmallocPager pager = Pager(Budget, 64L << 20);
        FmallocRegion region = pager.CreateRegion(32L << 20);
        FmallocViewAccessor view = region.CreateViewAccessor();
        region.Dispose();
        pager.Dispose();
        Throws<ObjectDisposedException>(() => region.CreateViewAccessor());
        Throws<ObjectDisposedException>(() => pager.CreateRegion(1));
        for (long at = 0; at < view.Capacity; at += 4096) view.Write(at, at);
        for (long at = 0; at < view.Capacity; at += 4096) Check(view.ReadInt64(at) == at, "at " + at);
        view.Dispose();
        view.Dispose();
        Throws<ObjectDisposedException>(() => view.ReadInt64(0));
        Throws<ObjectDisposedException>(() => view.Flush());
    }

    // Threads that use something again and again, until it is disposed of.
    private sealed class Users
    {
        private readonly CountdownEvent started = new CountdownEvent(4);
        private readonly List<Thread> threads = new List<Thread>();
        private readonly List<Exception> others = new List<Exception>();
        private int disposed;

        // Runs one of the four.
        public void Start(Action use)
        {
            var thread = new Thread(() =>
            {
                bool first = true;
                try
                {
                    while (true)
                    {
                        use();
                        if (first) started.Signal();
                        first = false;
                    }
                }
                catch (ObjectDisposedException)
                {
                    Interlocked.Increment(ref disposed);
                }
                catch (Exception error)
                {
                    lock (others) others.Add(error);
                }
            });
            thread.Start();
            threads.Add(thread);
        }

        public void WaitUntilAllHaveBegun()
        {
            started.Wait();
        }

        public void CheckAllHaveEnded()
        {
            foreach (Thread thread in threads) thread.Join();
            if (others.Count > 0) throw new AggregateException(others);
            Check(disposed == 4, "somebody went on");
        }
    }

    private static void DisposalInUse()
    {
        for (int round = 0; round < 10; round++)
        {
            FmallocPager pager = Pager(Budget, 64L << 20);
            FmallocRegion region = pager.CreateRegion(32L << 20);
            FmallocViewAccessor view = region.CreateViewAccessor();
            var users = new Users();
            for (int number = 0; number < 4; number++)
            {
                var random = new Random(number);
                users.Start(() =>
                {
                    long at = (long)random.Next(8192) * 4096;
                    if (random.Next(2) == 0) view.Write(at, at);
                    else Check(view.ReadInt64(at) == at || view.ReadInt64(at) == 0, "wrong value");
                });
            }
            users.WaitUntilAllHaveBegun();
            view.Dispose();
            region.Dispose();
            pager.Dispose();
            users.CheckAllHaveEnded();
        }
    }

    private static void StreamsDisposedInUse()
    {
        for (int round = 0; round < 10; round++)
        {
            FmallocPager pager = Pager(Budget, 64L << 20);
            FmallocRegion region = pager.CreateRegion(32L << 20);
            var streams = new List<FmallocViewStream>();
            var users = new Users();
            for (int number = 0; number < 4; number++)
            {
                FmallocViewStream stream = region.CreateViewStream(number * (8L << 20), 8L << 20);
                streams.Add(stream);
                var block = new byte[50000];
                bool writes = false;
                users.Start(() =>
                {
                    stream.Position = 0;
                    writes = !writes;
                    if (writes)
                        while (stream.Position + block.Length <= stream.Length) stream.Write(block, 0, block.Length);
                    else
                        while (stream.Read(block, 0, block.Length) > 0) { }
                });
            }
            users.WaitUntilAllHaveBegun();
            foreach (FmallocViewStream stream in streams) stream.Dispose();
            region.Dispose();
            pager.Dispose();
            users.CheckAllHaveEnded();
        }
    }

    private static void NullReference()
    {
        using (FmallocPager pager = Pager(Budget, 128L << 20))
        using (FmallocRegion region = pager.CreateRegion(64L << 20))
        using (FmallocViewAccessor view = region.CreateViewAccessor())
        {
            for (long at = 0; at < view.Capacity; at += 4096)
            {
                view.Write(at, 1);
                if (at % (4L << 20) != 0) continue;
                object nothing = null;
                Throws<NullReferenceException>(() => nothing.ToString());
            }
        }
    }

    private static void Errors()
    {
        var error = Throws<FmallocException>(() => Pager(4096, 64L << 20));
        Check(error.Message.Contains("budget"), error.Message);
        using (FmallocPager pager = Pager(Budget, 32L << 20))
        {
            error = Throws<FmallocException>(() => pager.CreateRegion(1L << 40));
            Check(error.Message.Contains("swap file"), error.Message);
            pager.CreateRegion(1 << 20).Dispose();
        }
        Throws<ArgumentNullException>(() => FmallocPager.Local(null));
        Throws<ArgumentNullException>(() => FmallocFile.CreateNew(null, 1));
    }

    private static void Requests()
    {
        // A private daemon grants no more than what it began with.
        using (FmallocPager pager = Pager(2 * Budget, 128L << 20))
        using (FmallocRegion region = pager.CreateRegion(64L << 20))
        using (FmallocViewAccessor view = region.CreateViewAccessor())
        {
            for (long at = 0; at < view.Capacity; at += 4096) view.Write(at, at + 1);
            pager.SetBudget(Budget);
            Check(pager.Stats().BudgetBytes == (ulong)Budget, "a smaller budget");
            Check(pager.Stats().ResidentPages * 4096 <= (ulong)Budget, "within it");
            region.Advise(0, view.Capacity, FmallocAdvice.Sequential);
            region.Advise(0, 1 << 20, FmallocAdvice.WillNeed);
            region.Discard(1 << 20, 1 << 20);
            Check(view.ReadInt64(1 << 20) == 0 && view.ReadInt64((2 << 20) - 4096) == 0, "discarded");
            Check(view.ReadInt64(2 << 20) == (2 << 20) + 1, "its neighbour is there");
            using (region.Pin(3 << 20, 100000, true)) Check(view.ReadInt64(3 << 20) == (3 << 20) + 1, "pinned");
            pager.SetBudget(2 * Budget);
            Check(pager.Stats().BudgetBytes == 2 * (ulong)Budget, "the new budget");
            Throws<FmallocException>(() => pager.SetBudget(1));
        }
    }

    private static void Service()
    {
        using (FmallocPager pager = Connected())
        using (FmallocRegion region = pager.CreateRegion(64L << 20))
        using (FmallocViewAccessor view = region.CreateViewAccessor())
        {
            for (long at = 0; at < view.Capacity; at += 8) view.Write(at, Mix(at));
            for (long at = 0; at < view.Capacity; at += 8) Check(view.ReadInt64(at) == Mix(at), "at " + at);
            FmallocStats stats = pager.Stats();
            Check(stats.BudgetBytes == (ulong)Budget && stats.PeakHeldBytes <= (ulong)Budget, "beyond the budget");
            Check(stats.PagesOut > 0 && stats.PagesIn > 0, "nothing was paged");
            pager.SetBudget(2 * Budget);
            Check(pager.Stats().BudgetBytes == 2 * (ulong)Budget, "a service grants more");
        }
    }

    /// <summary>The service may not have opened its socket yet.</summary>
    private static FmallocPager Connected()
    {
        for (int wait = 0; ; wait++)
        {
            try
            {
                return FmallocPager.Connect(Budget);
            }
            catch (FmallocException)
            {
                if (wait == 500) throw;
                Thread.Sleep(20);
            }
        }
    }

    private static void Files()
    {
        string path = Swap + ".file";
        const long Size = 96L << 20;
        try
        {
            using (FmallocFile file = FmallocFile.CreateFromFile(path, FileMode.CreateNew, Size, MemoryMappedFileAccess.ReadWrite, Budget))
            using (FmallocViewAccessor view = file.CreateViewAccessor())
            {
                Check(file.Capacity == Size && new FileInfo(path).Length == Size, "the file is as long as was asked for");
                for (long at = 0; at < Size; at += 1024) view.Write(at, Mix(at));
                view.Flush();
                // By other means, while it is mapped.
                using (var reader = new BinaryReader(new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite)))
                {
                    for (long at = 0; at < Size; at += 1 << 20)
                    {
                        reader.BaseStream.Position = at;
                        Check(reader.ReadInt64() == Mix(at), "flushed, at " + at);
                    }
                }
                for (long at = 0; at < Size; at += 1024) Check(view.ReadInt64(at) == Mix(at), "at " + at);
                FmallocStats stats = file.Stats();
                Check(stats.PeakHeldBytes <= (ulong)Budget && stats.BudgetBytes == (ulong)Budget, "beyond the budget");
                view.Write(0, 1L);
                using (FmallocViewStream stream = file.CreateViewStream(8, 8))
                {
                    stream.WriteByte(200);
                    stream.Flush();
                }
                Throws<FmallocException>(() => file.Region.Discard(0, 4096));
                file.Region.Advise(0, Size, FmallocAdvice.Cold);
                Check(view.ReadInt64(0) == 1L && view.ReadByte(8) == 200, "content that was cold");
            }
            // What was not flushed is written at the end.
            byte[] start = new byte[16];
            using (FileStream reader = File.OpenRead(path)) Check(reader.Read(start, 0, 16) == 16, "its length");
            Check(BitConverter.ToInt64(start, 0) == 1L && start[8] == 200, "written at the end");
            using (FmallocFile file = FmallocFile.CreateFromFile(path))
            using (FmallocViewAccessor view = file.CreateViewAccessor(Size - 1024, 0))
                Check(file.Capacity == Size && view.Capacity == 1024 && view.ReadInt64(0) == Mix(Size - 1024), "opened again");
        }
        finally
        {
            File.Delete(path);
        }
        Throws<FileNotFoundException>(() => FmallocFile.CreateFromFile(path));
    }

    private static void FilesThatStay()
    {
        string path = Swap + ".stays";
        try
        {
            File.WriteAllBytes(path, new byte[0]);
            Throws<ArgumentException>(() => FmallocFile.CreateFromFile(path));
            byte[] content = new byte[100000];
            new Random(1).NextBytes(content);
            File.WriteAllBytes(path, content);
            using (FmallocFile file = FmallocFile.CreateFromFile(path, FileMode.Open, 0, MemoryMappedFileAccess.Read, Budget))
            using (FmallocViewAccessor view = file.CreateViewAccessor())
            using (FmallocViewStream stream = file.CreateViewStream())
            {
                var copy = new byte[content.Length];
                Check(view.ReadArray(0, copy, 0, copy.Length) == copy.Length && Same(copy, content), "read");
                Throws<NotSupportedException>(() => view.Write(0, 1));
                Check(!view.CanWrite && !stream.CanWrite, "for reading only");
                Throws<UnauthorizedAccessException>(() => file.Region.CreateMemory<byte>(0, 10));
                view.Flush();
            }
            Throws<ArgumentOutOfRangeException>(() => FmallocFile.CreateFromFile(path, FileMode.Open, 200000, MemoryMappedFileAccess.Read, Budget));
            Throws<ArgumentOutOfRangeException>(() => FmallocFile.CreateFromFile(path, FileMode.Open, 0, MemoryMappedFileAccess.ReadExecute, Budget));
            using (FmallocFile file = FmallocFile.CreateFromFile(path, FileMode.Open, 0, MemoryMappedFileAccess.CopyOnWrite, Budget))
            using (FmallocViewAccessor view = file.CreateViewAccessor())
            {
                for (long at = 0; at < view.Capacity; at++) view.Write(at, (byte)7);
                view.Flush();
                Check(view.ReadByte(99999) == 7, "changed here");
            }
            Check(Same(File.ReadAllBytes(path), content), "the file stays");
        }
        finally
        {
            File.Delete(path);
        }
    }

    private static bool Same(byte[] one, byte[] other)
    {
        if (one.Length != other.Length) return false;
        for (int i = 0; i < one.Length; i++) if (one[i] != other[i]) return false;
        return true;
    }

    private static void Collected()
    {
        int before = PagerThreads();
        for (int round = 0; round < 5; round++) Forget();
        for (int wait = 0; PagerThreads() > before || File.Exists(Swap); wait++)
        {
            Check(wait < 1000, "pagers that nobody has any more stay behind");
            GC.Collect();
            GC.WaitForPendingFinalizers();
            Thread.Sleep(10);
        }
    }

    /// <summary>Threads that pagers have on Linux.</summary>
    private static int PagerThreads()
    {
        int count = 0;
        if (!Directory.Exists("/proc/self/task")) return 0;
        foreach (string task in Directory.GetDirectories("/proc/self/task"))
        {
            try
            {
                if (File.ReadAllText(task + "/comm").StartsWith("fmalloc-")) count++;
            }
            catch (IOException)
            {
                // It has just ended.
            }
        }
        return count;
    }

    private static void Forget()
    {
        FmallocViewAccessor view = Pager(Budget, 64L << 20).CreateRegion(32L << 20).CreateViewAccessor();
        view.Write(0, 1);
        Check(!Directory.Exists("/proc/self/task") || PagerThreads() > 0, "a pager has threads");
    }
}
