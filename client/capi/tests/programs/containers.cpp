// Containers of C++ in a heap of paged memory, from several threads. Usage: containers SWAP_DIRECTORY
#include "fmalloc.h"

#include <cstdio>
#include <map>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

template <class T> struct Paged {
    using value_type = T;
    Paged() = default;
    template <class U> Paged(const Paged<U> &) {}
    T *allocate(std::size_t count)
    {
        void *block = count <= SIZE_MAX / sizeof(T) ? faligned_alloc(alignof(T), count * sizeof(T)) : nullptr;
        if (!block)
            throw std::bad_alloc();
        return static_cast<T *>(block);
    }
    void deallocate(T *block, std::size_t) { ffree(block); }
    template <class U> bool operator==(const Paged<U> &) const { return true; }
    template <class U> bool operator!=(const Paged<U> &) const { return false; }
};

using String = std::basic_string<char, std::char_traits<char>, Paged<char>>;
using Map = std::map<int, String, std::less<int>, Paged<std::pair<const int, String>>>;

static bool work(int first)
{
    Map map;
    for (int n = 0; n < 60000; n++)
        map.emplace(first + n, String(100 + n % 300, char('a' + n % 26)));
    for (int n = 0; n < 60000; n += 2)
        map.erase(first + n);
    for (int n = 1; n < 60000; n += 2) {
        const String &text = map.at(first + n);
        if (text.size() != std::size_t(100 + n % 300) || text.find_first_not_of(char('a' + n % 26)) != String::npos)
            return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    fmalloc_options_t options = {};
    options.struct_size = sizeof options;
    options.size = std::size_t(1) << 30;
    options.ram = 16 << 20;
    options.daemon = FMALLOC_PRIVATE;
    options.path = argc > 1 ? argv[1] : nullptr;
    if (fmalloc_init_with(&options) != 0) {
        std::fprintf(stderr, "%s\n", fmalloc_error());
        return 1;
    }
    {
        std::vector<long, Paged<long>> numbers(5000000);
        std::iota(numbers.begin(), numbers.end(), 0L);
        bool good[3] = {};
        std::vector<std::thread> threads;
        for (int n = 0; n < 3; n++)
            threads.emplace_back([&good, n] { good[n] = work(n * 1000000); });
        for (auto &thread : threads)
            thread.join();
        long sum = std::accumulate(numbers.begin(), numbers.end(), 0L);
        if (!good[0] || !good[1] || !good[2] || sum != 4999999L * 5000000L / 2) {
            std::fprintf(stderr, "wrong content\n");
            return 1;
        }
    }
    fmalloc_stats_t stats = {};
    stats.struct_size = sizeof stats;
    if (fmalloc_stats(&stats) != 0 || stats.used_blocks != 0 || stats.pages_out == 0 || fmalloc_check() != 0) {
        std::fprintf(stderr, "wrong figures: %s\n", fmalloc_error());
        return 1;
    }
    if (fmalloc_close() != 0)
        return 1;
    std::puts("all right");
}
