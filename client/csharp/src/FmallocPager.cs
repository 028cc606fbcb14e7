using System;
using System.IO.MemoryMappedFiles;
using System.Runtime.InteropServices;

namespace Fmalloc
{
    /// <summary>How to page for this process alone.</summary>
    public sealed class FmallocOptions
    {
        /// <summary>RAM budget in bytes.</summary>
        public long Budget = 256L << 20;

        /// <summary>Bytes that the swap file has room for: as much as all regions together.</summary>
        public long SwapSize;

        /// <summary>The swap file; null for one in the directory for temporary files. It must not exist, unless fmalloc
        /// left it. On Linux it has no name, and only the directory counts.</summary>
        public string SwapFile;

        /// <summary>Windows only: do not delete the swap file at the end, so that the next pager has its space at once. Its
        /// content is not kept.</summary>
        public bool Keep;

        /// <summary>Windows only: bytes paged at a time, from 4096 to 1048576, or 0 for the default.</summary>
        public int Unit;
    }

    /// <summary>Figures of a pager, in the order of fmalloc.h. Pages have 4096 bytes.</summary>
    [StructLayout(LayoutKind.Sequential)]
    public struct FmallocStats
    {
        /// <summary>Budget in bytes.</summary>
        public ulong BudgetBytes;
        /// <summary>Pages in RAM now.</summary>
        public ulong ResidentPages;
        /// <summary>Most pages in RAM so far.</summary>
        public ulong PeakResidentPages;
        /// <summary>Bytes of page tables and buffers; part of the budget.</summary>
        public ulong OverheadBytes;
        /// <summary>Pages whose only copy is in the swap file.</summary>
        public ulong SwappedPages;
        /// <summary>Pages of swap claimed.</summary>
        public ulong ClaimedPages;
        /// <summary>Pages that cannot leave RAM at present.</summary>
        public ulong UnevictablePages;
        /// <summary>Page faults.</summary>
        public ulong Faults;
        /// <summary>Pages read from the swap file.</summary>
        public ulong PagesIn;
        /// <summary>Pages written to the swap file.</summary>
        public ulong PagesOut;
        /// <summary>Pages evicted without a write, since the swap file had the same bytes.</summary>
        public ulong PagesClean;
        /// <summary>Failed reads and writes of the swap file.</summary>
        public ulong IoErrors;
        /// <summary>Most that pages in RAM and OverheadBytes have had together, in bytes; never more than the largest budget so far.</summary>
        public ulong PeakHeldBytes;
    }

    /// <summary>A RAM budget, and the paging of regions within it. Any thread may use it. It lives until it and its regions
    /// are disposed.</summary>
    public sealed class FmallocPager : IDisposable
    {
        private readonly PagerHandle handle;

        private FmallocPager(PagerHandle handle)
        {
            this.handle = handle;
        }

        /// <summary>Pages for this process alone: within it on Windows, by a private daemon on Linux.</summary>
        public static FmallocPager Local(FmallocOptions options)
        {
            if (options == null) throw new ArgumentNullException("options");
            if (options.Budget < 0 || options.SwapSize < 0 || options.Unit < 0) throw new ArgumentOutOfRangeException("options");
            var native = new Native.LocalOptions();
            native.StructSize = (UIntPtr)(uint)Marshal.SizeOf(typeof(Native.LocalOptions));
            native.Budget = (ulong)options.Budget;
            native.SwapSize = (ulong)options.SwapSize;
            native.Unit = (ulong)options.Unit;
            native.Keep = options.Keep ? 1u : 0u;
            native.SwapFile = Native.ToUtf8(options.SwapFile);
            try
            {
                return new FmallocPager(Native.Check(Native.fmalloc_pager_local(ref native)));
            }
            finally
            {
                Marshal.FreeHGlobal(native.SwapFile);
            }
        }

        /// <summary>Connects to the fmallocd service of a Linux machine; a budget of 0 asks for its default.</summary>
        public static FmallocPager Connect(long budget)
        {
            if (budget < 0) throw new ArgumentOutOfRangeException("budget");
            return new FmallocPager(Native.Check(Native.fmalloc_pager_connect((ulong)budget)));
        }

        /// <summary>The pager that this process has for files, on Linux: a connection to the service or else a private daemon,
        /// with the budget of FMALLOC_RAM or the default. With a budget in bytes, a pager of its own.</summary>
        public static FmallocPager ForFiles(long budget)
        {
            if (budget < 0) throw new ArgumentOutOfRangeException("budget");
            return new FmallocPager(Native.Check(Native.fmalloc_pager_default((ulong)budget)));
        }

        /// <summary>The content of a file from an offset on, which must be a multiple of 4096; a length of 0 means up to its end.
        /// What is written gets into the file by Flush, when it leaves RAM, and when the region and its views are disposed. With
        /// CopyOnWrite it does not. Nobody may make the file shorter meanwhile: to touch what is gone then ends the program.</summary>
        public FmallocRegion OpenFile(string path, long offset, long length, MemoryMappedFileAccess access)
        {
            if (path == null) throw new ArgumentNullException("path");
            if (offset < 0) throw new ArgumentOutOfRangeException("offset");
            if (length < 0) throw new ArgumentOutOfRangeException("length");
            uint mode;
            switch (access)
            {
                case MemoryMappedFileAccess.Read: mode = 0; break;
                case MemoryMappedFileAccess.ReadWrite: mode = 1; break;
                case MemoryMappedFileAccess.CopyOnWrite: mode = 2; break;
                default: throw new ArgumentOutOfRangeException("access", "Read, ReadWrite and CopyOnWrite are there");
            }
            IntPtr text = Native.ToUtf8(path);
            try
            {
                RegionHandle region = Native.Check(Native.fmalloc_region_open_file(handle, text, (ulong)offset, (ulong)length, mode));
                return new FmallocRegion(region, (long)Native.fmalloc_region_length(region), access == MemoryMappedFileAccess.Read);
            }
            finally
            {
                Marshal.FreeHGlobal(text);
            }
        }

        /// <summary>Memory of any length, zero at first.</summary>
        public FmallocRegion CreateRegion(long length)
        {
            if (length <= 0) throw new ArgumentOutOfRangeException("length");
            return new FmallocRegion(Native.Check(Native.fmalloc_region_open(handle, (ulong)length)), length, false);
        }

        /// <summary>Changes the RAM budget, in bytes, and returns when RAM is within it.</summary>
        public void SetBudget(long bytes)
        {
            if (bytes < 0) throw new ArgumentOutOfRangeException("bytes");
            Native.Check(Native.fmalloc_pager_set_budget(handle, (ulong)bytes));
        }

        /// <summary>Figures of now.</summary>
        public FmallocStats Stats()
        {
            var native = new Native.NativeStats();
            native.StructSize = (UIntPtr)(uint)Marshal.SizeOf(typeof(Native.NativeStats));
            Native.Check(Native.fmalloc_pager_stats(handle, ref native));
            return native.Stats;
        }

        /// <summary>Ends its use here; regions keep what they need.</summary>
        public void Dispose()
        {
            handle.Dispose();
        }
    }
}
