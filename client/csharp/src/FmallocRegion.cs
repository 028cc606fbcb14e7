using System;
using System.Buffers;
using System.IO;
using System.Runtime.InteropServices;

namespace Fmalloc
{
    /// <summary>Hints about a part of a region.</summary>
    public enum FmallocAdvice
    {
        /// <summary>No special pattern.</summary>
        Normal = 0,
        /// <summary>Will be read from front to back.</summary>
        Sequential = 1,
        /// <summary>Will be read at random.</summary>
        Random = 2,
        /// <summary>Will be needed soon.</summary>
        WillNeed = 3,
        /// <summary>Will not be needed soon: evict it; its content stays.</summary>
        Cold = 4,
    }

    /// <summary>Memory larger than RAM, shaped like a MemoryMappedFile. The memory is there until the region and all of
    /// its views are disposed; a view that was disposed throws ObjectDisposedException.</summary>
    public sealed class FmallocRegion : IDisposable
    {
        private readonly RegionHandle handle;
        private readonly bool readOnly;
        /// <summary>The handle alone does not tell: it stays open for the sake of the views.</summary>
        private volatile bool disposed;

        internal FmallocRegion(RegionHandle handle, long length, bool readOnly)
        {
            this.handle = handle;
            this.readOnly = readOnly;
            Length = length;
        }

        /// <summary>Length in bytes.</summary>
        public long Length { get; private set; }

        /// <summary>Random access to all of it.</summary>
        public FmallocViewAccessor CreateViewAccessor()
        {
            return CreateViewAccessor(0, 0);
        }

        /// <summary>Random access to a part of it, in bytes; a size of 0 means up to the end.</summary>
        public FmallocViewAccessor CreateViewAccessor(long offset, long size)
        {
            return new FmallocViewAccessor(View(offset, ref size), size, Access);
        }

        /// <summary>All of it as a stream.</summary>
        public FmallocViewStream CreateViewStream()
        {
            return CreateViewStream(0, 0);
        }

        /// <summary>A part of it as a stream, in bytes; a size of 0 means up to the end.</summary>
        public FmallocViewStream CreateViewStream(long offset, long size)
        {
            return new FmallocViewStream(View(offset, ref size), size, Access);
        }

        /// <summary>A part of it as Memory and Span: count elements from a byte offset. T must have no references. Dispose
        /// the result only when no span of it is in use any more: a span does not keep memory alive.</summary>
        public IMemoryOwner<T> CreateMemory<T>(long offset, int count) where T : struct
        {
            if (readOnly) throw new UnauthorizedAccessException("it is for reading only, and a Memory can be written to");
            if (count < 0) throw new ArgumentOutOfRangeException("count");
            long size = (long)count * FmallocMemory<T>.ElementSize();
            if (size == 0) size = Math.Min(1, Length - offset);
            return new FmallocMemory<T>(View(offset, ref size), count);
        }

        /// <summary>A hint about a part, in bytes.</summary>
        public void Advise(long offset, long size, FmallocAdvice advice)
        {
            CheckRange(offset, size);
            Native.Check(Native.fmalloc_region_advise(handle, (ulong)offset, (ulong)size, (uint)advice));
        }

        /// <summary>Drops the content of a part, in bytes: it is zero from now on, and takes no RAM. Nobody may be using
        /// it.</summary>
        public void Discard(long offset, long size)
        {
            CheckRange(offset, size);
            Native.Check(Native.fmalloc_region_discard(handle, (ulong)offset, (ulong)size));
        }

        /// <summary>Returns when what was changed in a file's content is on the disk. If it cannot be written, that is an exception,
        /// and the changes are still in memory. Memory without a file has nothing to flush.</summary>
        public void Flush()
        {
            CheckRange(0, Length);
            Native.Check(Native.fmalloc_region_flush(handle, 0, (ulong)Length));
        }

        /// <summary>Keeps a part in RAM until the result is disposed, so that system calls can be given pointers into it. On
        /// Linux they can at any time.</summary>
        public IDisposable Pin(long offset, long size, bool write)
        {
            CheckRange(offset, size);
            return new FmallocPin(handle, offset, size, write);
        }

        /// <summary>Ends its use here; views keep the memory until they are disposed.</summary>
        public void Dispose()
        {
            disposed = true;
            handle.Dispose();
        }

        private FileAccess Access { get { return readOnly ? FileAccess.Read : FileAccess.ReadWrite; } }

        private ViewBuffer View(long offset, ref long size)
        {
            if (size == 0) size = Length - offset;
            CheckRange(offset, size);
            return new ViewBuffer(handle, offset, size);
        }

        private void CheckRange(long offset, long size)
        {
            if (disposed) throw new ObjectDisposedException("FmallocRegion");
            if (offset < 0 || offset > Length) throw new ArgumentOutOfRangeException("offset");
            if (size < 0 || size > Length - offset) throw new ArgumentOutOfRangeException("size");
        }
    }

    /// <summary>A part of a region that stays in RAM.</summary>
    internal sealed class FmallocPin : IDisposable
    {
        private RegionHandle region;
        private readonly long offset;
        private readonly long size;

        internal FmallocPin(RegionHandle region, long offset, long size, bool write)
        {
            bool added = false;
            region.DangerousAddRef(ref added);
            try
            {
                Native.Check(Native.fmalloc_region_pin(region, (ulong)offset, (ulong)size, write ? 1 : 0));
            }
            catch
            {
                region.DangerousRelease();
                throw;
            }
            this.region = region;
            this.offset = offset;
            this.size = size;
        }

        public void Dispose()
        {
            RegionHandle region = System.Threading.Interlocked.Exchange(ref this.region, null);
            if (region == null) return;
            Native.fmalloc_region_unpin(region, (ulong)offset, (ulong)size);
            region.DangerousRelease();
        }
    }

    /// <summary>A part of a region as a buffer: it holds a reference to the region, and those who read and write it hold
    /// references to it while they do, so that nothing is unmapped under anybody.</summary>
    internal sealed class ViewBuffer : SafeBuffer
    {
        private readonly RegionHandle region;
        private readonly long offset;

        internal ViewBuffer(RegionHandle region, long offset, long size) : base(true)
        {
            bool added = false;
            region.DangerousAddRef(ref added);
            this.region = region;
            this.offset = offset;
            SetHandle((IntPtr)(Native.fmalloc_region_address(region).ToInt64() + offset));
            Initialize((ulong)size);
        }

        /// <summary>As FmallocRegion.Flush, for this part.</summary>
        internal void Flush(string who)
        {
            bool added = false;
            try
            {
                if (IsClosed) throw new ObjectDisposedException(who);
                // So that the view stays for as long as the call takes.
                DangerousAddRef(ref added);
                Native.Check(Native.fmalloc_region_flush(region, (ulong)offset, ByteLength));
            }
            finally
            {
                if (added) DangerousRelease();
            }
        }

        protected override bool ReleaseHandle()
        {
            region.DangerousRelease();
            return true;
        }
    }

    /// <summary>Random access to a part of a region: Read, Write, ReadArray, WriteArray and the rest of
    /// UnmanagedMemoryAccessor, with positions past 2 GiB.</summary>
    public sealed class FmallocViewAccessor : UnmanagedMemoryAccessor
    {
        private readonly ViewBuffer buffer;

        internal FmallocViewAccessor(ViewBuffer buffer, long size, FileAccess access) : base(buffer, 0, size, access)
        {
            this.buffer = buffer;
        }

        /// <summary>As FmallocRegion.Flush, for this part.</summary>
        public void Flush()
        {
            buffer.Flush("FmallocViewAccessor");
        }

        /// <summary>Ends the view.</summary>
        protected override void Dispose(bool disposing)
        {
            if (disposing && buffer != null) buffer.Dispose();
            base.Dispose(disposing);
        }
    }

    /// <summary>A part of a region as a stream.</summary>
    public sealed class FmallocViewStream : UnmanagedMemoryStream
    {
        private readonly ViewBuffer buffer;

        internal FmallocViewStream(ViewBuffer buffer, long size, FileAccess access) : base(buffer, 0, size, access)
        {
            this.buffer = buffer;
        }

        /// <summary>As FmallocRegion.Flush, for this part.</summary>
        public override void Flush()
        {
            buffer.Flush("FmallocViewStream");
        }

        /// <summary>Ends the view.</summary>
        protected override void Dispose(bool disposing)
        {
            if (disposing && buffer != null) buffer.Dispose();
            base.Dispose(disposing);
        }
    }

    /// <summary>A part of a region as Memory.</summary>
    internal sealed unsafe class FmallocMemory<T> : MemoryManager<T> where T : struct
    {
        private readonly ViewBuffer buffer;
        private readonly int count;

        internal FmallocMemory(ViewBuffer buffer, int count)
        {
            this.buffer = buffer;
            this.count = count;
        }

        /// <summary>Bytes of an element. Throws ArgumentException for a type with references.</summary>
        internal static int ElementSize()
        {
            byte* nothing = stackalloc byte[1];
            return MemoryMarshal.AsBytes(new Span<T>(nothing, 1)).Length;
        }

        public override Span<T> GetSpan()
        {
            if (buffer.IsClosed) throw new ObjectDisposedException("FmallocMemory");
            return new Span<T>((void*)buffer.DangerousGetHandle(), count);
        }

        public override MemoryHandle Pin(int elementIndex)
        {
            if (elementIndex < 0 || elementIndex > count) throw new ArgumentOutOfRangeException("elementIndex");
            bool added = false;
            buffer.DangerousAddRef(ref added);
            byte* address = (byte*)buffer.DangerousGetHandle() + (long)elementIndex * ElementSize();
            return new MemoryHandle(address, default(GCHandle), this);
        }

        public override void Unpin()
        {
            buffer.DangerousRelease();
        }

        protected override void Dispose(bool disposing)
        {
            if (disposing) buffer.Dispose();
        }
    }
}
