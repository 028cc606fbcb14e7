using System;
using System.Collections.Generic;
using System.IO;
using System.IO.MemoryMappedFiles;

namespace Fmalloc
{
    /// <summary>One region, as a MemoryMappedFile is one: behind a swap file, whose content is not kept when it is disposed, or, by
    /// CreateFromFile, over a file of the program's own.</summary>
    public sealed class FmallocFile : IDisposable
    {
        /// <summary>RAM budget where none is given, in bytes.</summary>
        public const long DefaultBudget = 256L << 20;

        private static readonly Dictionary<string, Shared> open = new Dictionary<string, Shared>();

        private readonly Shared shared;
        private bool disposed;

        /// <summary>A pager and its region, with the number of files that stand for it.</summary>
        private sealed class Shared
        {
            /// <summary>Of the swap file; null if this is nobody else's.</summary>
            internal string Path;
            internal FmallocPager Pager;
            internal FmallocRegion Region;
            internal int Users;
        }

        private FmallocFile(Shared shared)
        {
            this.shared = shared;
        }

        /// <summary>Creates a swap file and memory of this capacity, in bytes. A file of this path that is open in this
        /// process already is an error.</summary>
        public static FmallocFile CreateNew(string path, long capacity)
        {
            return CreateNew(path, capacity, DefaultBudget);
        }

        /// <summary>CreateNew with a RAM budget in bytes.</summary>
        public static FmallocFile CreateNew(string path, long capacity, long budget)
        {
            return Get(path, capacity, budget, false);
        }

        /// <summary>The memory behind this path if it is open in this process; otherwise as CreateNew. The capacity of one
        /// that is open must be at least the one that is asked for.</summary>
        public static FmallocFile CreateOrOpen(string path, long capacity)
        {
            return CreateOrOpen(path, capacity, DefaultBudget);
        }

        /// <summary>CreateOrOpen with a RAM budget in bytes, which counts when it creates.</summary>
        public static FmallocFile CreateOrOpen(string path, long capacity, long budget)
        {
            return Get(path, capacity, budget, true);
        }

        /// <summary>All of a file, for reading and writing, within the budget that this process has for files.</summary>
        public static FmallocFile CreateFromFile(string path)
        {
            return CreateFromFile(path, FileMode.Open, 0, MemoryMappedFileAccess.ReadWrite, 0);
        }

        /// <summary>The first bytes of a file, for reading and writing; a capacity of 0 means all of it, and one that is larger than
        /// the file makes it as large.</summary>
        public static FmallocFile CreateFromFile(string path, FileMode mode, long capacity)
        {
            return CreateFromFile(path, mode, capacity, MemoryMappedFileAccess.ReadWrite, 0);
        }

        /// <summary>CreateFromFile for Read, ReadWrite or CopyOnWrite, with a RAM budget in bytes; 0 stands for the one that this
        /// process has for files. On Linux only.</summary>
        public static FmallocFile CreateFromFile(string path, FileMode mode, long capacity, MemoryMappedFileAccess access, long budget)
        {
            if (path == null) throw new ArgumentNullException("path");
            if (capacity < 0) throw new ArgumentOutOfRangeException("capacity");
            bool writable = access == MemoryMappedFileAccess.ReadWrite;
            using (var file = new FileStream(path, mode, writable ? FileAccess.ReadWrite : FileAccess.Read, FileShare.ReadWrite))
            {
                if (capacity == 0 && file.Length == 0) throw new ArgumentException("the file is empty: give a capacity", "capacity");
                if (capacity > file.Length)
                {
                    if (!writable) throw new ArgumentOutOfRangeException("capacity", "the file is shorter, and not to be written to");
                    file.SetLength(capacity);
                }
            }
            FmallocPager pager = FmallocPager.ForFiles(budget);
            try
            {
                var shared = new Shared();
                shared.Pager = pager;
                shared.Region = pager.OpenFile(path, 0, capacity, access);
                shared.Users = 1;
                return new FmallocFile(shared);
            }
            catch
            {
                pager.Dispose();
                throw;
            }
        }

        /// <summary>Length in bytes.</summary>
        public long Capacity { get { return shared.Region.Length; } }

        /// <summary>The memory.</summary>
        public FmallocRegion Region
        {
            get
            {
                if (disposed) throw new ObjectDisposedException("FmallocFile");
                return shared.Region;
            }
        }

        /// <summary>Figures of its pager.</summary>
        public FmallocStats Stats()
        {
            return shared.Pager.Stats();
        }

        /// <summary>Random access to all of it.</summary>
        public FmallocViewAccessor CreateViewAccessor()
        {
            return Region.CreateViewAccessor();
        }

        /// <summary>Random access to a part of it, in bytes; a size of 0 means up to the end.</summary>
        public FmallocViewAccessor CreateViewAccessor(long offset, long size)
        {
            return Region.CreateViewAccessor(offset, size);
        }

        /// <summary>All of it as a stream.</summary>
        public FmallocViewStream CreateViewStream()
        {
            return Region.CreateViewStream();
        }

        /// <summary>A part of it as a stream, in bytes; a size of 0 means up to the end.</summary>
        public FmallocViewStream CreateViewStream(long offset, long size)
        {
            return Region.CreateViewStream(offset, size);
        }

        /// <summary>Ends its use here; views keep the memory until they are disposed.</summary>
        public void Dispose()
        {
            lock (open)
            {
                if (disposed) return;
                disposed = true;
                if (--shared.Users > 0) return;
                if (shared.Path != null) open.Remove(shared.Path);
                shared.Region.Dispose();
                shared.Pager.Dispose();
            }
        }

        private static FmallocFile Get(string path, long capacity, long budget, bool share)
        {
            if (path == null) throw new ArgumentNullException("path");
            if (capacity <= 0) throw new ArgumentOutOfRangeException("capacity");
            string full = Path.GetFullPath(path);
            lock (open)
            {
                Shared shared;
                if (!open.TryGetValue(full, out shared))
                {
                    shared = Create(full, capacity, budget);
                    open.Add(full, shared);
                }
                else if (!share)
                {
                    throw new IOException(full + " is open already; use CreateOrOpen to share its memory");
                }
                else if (shared.Region.Length < capacity)
                {
                    throw new ArgumentOutOfRangeException("capacity", full + " is open with less than that");
                }
                shared.Users++;
                return new FmallocFile(shared);
            }
        }

        private static Shared Create(string path, long capacity, long budget)
        {
            var options = new FmallocOptions();
            options.SwapFile = path;
            // Room for the last page, and what a daemon keeps for itself.
            options.SwapSize = checked(capacity + (1L << 20));
            options.Budget = budget;
            FmallocPager pager = FmallocPager.Local(options);
            try
            {
                var shared = new Shared();
                shared.Path = path;
                shared.Pager = pager;
                shared.Region = pager.CreateRegion(capacity);
                return shared;
            }
            catch
            {
                pager.Dispose();
                throw;
            }
        }
    }
}
