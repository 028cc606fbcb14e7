using System;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;

namespace Fmalloc
{
    /// <summary>The C interface: fmalloc.dll on Windows, libfmalloc.so on Linux. See fmalloc.h.</summary>
    internal static class Native
    {
        private const string Library = "fmalloc";

        [StructLayout(LayoutKind.Sequential)]
        internal struct LocalOptions
        {
            internal UIntPtr StructSize;
            internal ulong Budget;
            internal ulong SwapSize;
            internal IntPtr SwapFile;
            internal ulong Unit;
            internal uint Keep;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct NativeStats
        {
            internal UIntPtr StructSize;
            internal FmallocStats Stats;
        }

        [DllImport(Library)]
        internal static extern PagerHandle fmalloc_pager_local(ref LocalOptions options);

        [DllImport(Library)]
        internal static extern PagerHandle fmalloc_pager_connect(ulong budget);

        [DllImport(Library)]
        internal static extern void fmalloc_pager_close(IntPtr pager);

        [DllImport(Library)]
        internal static extern int fmalloc_pager_stats(PagerHandle pager, ref NativeStats stats);

        [DllImport(Library)]
        internal static extern int fmalloc_pager_set_budget(PagerHandle pager, ulong bytes);

        [DllImport(Library)]
        internal static extern RegionHandle fmalloc_region_open(PagerHandle pager, ulong length);

        [DllImport(Library)]
        internal static extern PagerHandle fmalloc_pager_default(ulong budget);

        [DllImport(Library)]
        internal static extern RegionHandle fmalloc_region_open_file(PagerHandle pager, IntPtr path, ulong offset, ulong length, uint mode);

        [DllImport(Library)]
        internal static extern ulong fmalloc_region_length(RegionHandle region);

        [DllImport(Library)]
        internal static extern int fmalloc_region_flush(RegionHandle region, ulong offset, ulong length);

        [DllImport(Library)]
        internal static extern void fmalloc_region_close(IntPtr region);

        [DllImport(Library)]
        internal static extern IntPtr fmalloc_region_address(RegionHandle region);

        [DllImport(Library)]
        internal static extern int fmalloc_region_advise(RegionHandle region, ulong offset, ulong length, uint advice);

        [DllImport(Library)]
        internal static extern int fmalloc_region_discard(RegionHandle region, ulong offset, ulong length);

        [DllImport(Library)]
        internal static extern int fmalloc_region_pin(RegionHandle region, ulong offset, ulong length, int write);

        [DllImport(Library)]
        internal static extern void fmalloc_region_unpin(RegionHandle region, ulong offset, ulong length);

        [DllImport(Library)]
        internal static extern IntPtr fmalloc_error();

        /// <summary>Throws with the library's message unless a call has succeeded.</summary>
        internal static void Check(int status)
        {
            if (status != 0) throw new FmallocException(Message());
        }

        /// <summary>Throws with the library's message unless a handle is one.</summary>
        internal static T Check<T>(T handle) where T : SafeHandle
        {
            if (!handle.IsInvalid) return handle;
            // The message first: it is that of the last call.
            string message = Message();
            handle.Dispose();
            throw new FmallocException(message);
        }

        private static string Message()
        {
            return FromUtf8(fmalloc_error()) ?? "unknown error";
        }

        private static unsafe string FromUtf8(IntPtr text)
        {
            byte* bytes = (byte*)text;
            if (bytes == null) return null;
            int length = 0;
            while (bytes[length] != 0) length++;
            return Encoding.UTF8.GetString(bytes, length);
        }

        /// <summary>A string that ends with a zero, to be freed with FreeHGlobal.</summary>
        internal static IntPtr ToUtf8(string text)
        {
            if (text == null) return IntPtr.Zero;
            byte[] bytes = Encoding.UTF8.GetBytes(text);
            IntPtr copy = Marshal.AllocHGlobal(bytes.Length + 1);
            Marshal.Copy(bytes, 0, copy, bytes.Length);
            Marshal.WriteByte(copy, bytes.Length, 0);
            return copy;
        }
    }

    /// <summary>Owns a pager of the library.</summary>
    internal sealed class PagerHandle : SafeHandle
    {
        private PagerHandle() : base(IntPtr.Zero, true) { }

        public override bool IsInvalid { get { return handle == IntPtr.Zero; } }

        protected override bool ReleaseHandle()
        {
            Native.fmalloc_pager_close(handle);
            return true;
        }
    }

    /// <summary>Owns a region of the library. Views hold references to it, so that it outlives them.</summary>
    internal sealed class RegionHandle : SafeHandle
    {
        private RegionHandle() : base(IntPtr.Zero, true) { }

        public override bool IsInvalid { get { return handle == IntPtr.Zero; } }

        protected override bool ReleaseHandle()
        {
            Native.fmalloc_region_close(handle);
            return true;
        }
    }

    /// <summary>Something that the library could not do; its message says why, and what to do about it.</summary>
    public sealed class FmallocException : IOException
    {
        internal FmallocException(string message) : base(message) { }
    }
}
