// Creates 1 GiB of memory behind a swap file, with 64 MiB of RAM, and writes and reads an int in it.
using System;
using System.IO;
using Fmalloc;

public static class OneGiB
{
    public static void Main()
    {
        string path = Path.Combine(Path.GetTempPath(), "swap.bin");
        using (FmallocFile file = FmallocFile.CreateOrOpen(path, 1L << 30, 64L << 20))
        using (FmallocViewAccessor accessor = file.CreateViewAccessor(0, 1L << 30))
        {
            accessor.Write(512L << 20, 42);
            int value;
            accessor.Read(512L << 20, out value);
            Console.WriteLine("read {0} back; {1} pages in RAM", value, file.Stats().ResidentPages);
        }
    }
}
