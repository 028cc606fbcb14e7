using System;
using System.Collections.Generic;
using System.IO;

namespace Fmalloc
{
    /// <summary>One region behind one swap file: what replaces a MemoryMappedFile that a program uses for memory. The content
    /// is not kept when it is disposed.</summary>
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
                open.Remove(shared.Path);
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
