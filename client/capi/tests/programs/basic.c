/* Every function of the heap in fmalloc.h, from C; memory of several times the budget. Usage: basic SWAP_DIRECTORY */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define BLOCKS 1000
#define LENGTH 80000

static uint64_t word(size_t block, size_t n)
{
    return (block * 0x9e3779b97f4a7c15u) ^ (n * 0xd6e8feb86659fd93u);
}

static void fill(uint64_t *at, size_t block, size_t bytes)
{
    for (size_t n = 0; n < bytes / 8; n++)
        at[n] = word(block, n);
}

static void verify(const uint64_t *at, size_t block, size_t bytes)
{
    for (size_t n = 0; n < bytes / 8; n++)
        CHECK(at[n] == word(block, n));
}

static void *work(void *argument)
{
    size_t seed = (size_t)argument;
    uint64_t *blocks[64] = {0};
    for (size_t n = 0; n < 20000; n++) {
        size_t at = (n * 2654435761u + seed) % 64, bytes = 16 + (n * 7919 + seed) % 5000;
        if (blocks[at]) {
            CHECK(fmalloc_usable_size(blocks[at]) >= 8);
            CHECK(blocks[at][0] == word(at, seed));
            ffree(blocks[at]);
        }
        CHECK(blocks[at] = fmalloc(bytes));
        blocks[at][0] = word(at, seed);
    }
    for (size_t at = 0; at < 64; at++)
        ffree(blocks[at]);
    return NULL;
}

static void expect(int error, const char *text)
{
    CHECK(errno == error);
    CHECK(strstr(fmalloc_error(), text) != NULL);
    errno = 0;
}

static void misuse_is_told(void)
{
    char *block = fmalloc(100);
    CHECK(block);
    errno = 0;
    ffree(block + 16);
    expect(EINVAL, "no block");
    ffree(&block);
    expect(EINVAL, "not belong");
    ffree(block);
    CHECK(errno == 0);
    char *volatile again = block;
    ffree(again);
    expect(EINVAL, "not in use");
    CHECK(frealloc(again, 10) == NULL);
    expect(EINVAL, "not in use");
    CHECK(fmalloc_usable_size(again) == 0);
    expect(EINVAL, "not in use");
    CHECK(fmalloc(SIZE_MAX) == NULL);
    expect(ENOMEM, "out of memory");
    CHECK(fcalloc(SIZE_MAX / 2, 3) == NULL);
    expect(ENOMEM, "out of memory");
    CHECK(faligned_alloc(48, 1) == NULL);
    expect(EINVAL, "power of two");
    CHECK(fmalloc_advise(&block, 1, FMALLOC_COLD) == -1);
    expect(EINVAL, "not in the heap");
    fmalloc_stats_t stats = {0};
    CHECK(fmalloc_stats(&stats) == -1);
    expect(EINVAL, "struct_size");
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    CHECK(fmalloc(1) == NULL);
    expect(EINVAL, "fmalloc_init");
    CHECK(fmalloc_init(argv[1], 0) == -1);
    expect(EINVAL, "size");
    CHECK(fmalloc_init("/nonexistent/directory/file", MIB) == -1);
    expect(ENOENT, "/nonexistent/directory/file");
    fmalloc_options_t options = {0};
    CHECK(fmalloc_init_with(&options) == -1);
    expect(EINVAL, "struct_size");
    options.struct_size = sizeof options;
    options.size = 1024 * MIB;
    options.ram = 16 * MIB;
    options.daemon = FMALLOC_PRIVATE;
    options.path = argv[1];
    options.name = "basic";
    CHECK(fmalloc_init_with(&options) == 0);
    CHECK(fmalloc_init(NULL, MIB) == -1);
    expect(EINVAL, "fmalloc_close");

    static uint64_t *blocks[BLOCKS];
    for (size_t n = 0; n < BLOCKS; n++) {
        CHECK(blocks[n] = fmalloc(LENGTH));
        CHECK(fmalloc_usable_size(blocks[n]) >= LENGTH);
        fill(blocks[n], n, LENGTH);
    }
    CHECK(fmalloc_advise(blocks[0], LENGTH, FMALLOC_WILL_NEED) == 0);
    for (size_t n = 0; n < BLOCKS; n += 2) {
        size_t bytes = n % 4 ? 2 * LENGTH : LENGTH / 2;
        CHECK(blocks[n] = frealloc(blocks[n], bytes));
        verify(blocks[n], n, bytes < LENGTH ? bytes : LENGTH);
    }

    /* System calls work on paged memory. */
    FILE *file = tmpfile();
    CHECK(file && write(fileno(file), blocks[1], LENGTH) == LENGTH);
    uint64_t *copy = fcalloc(LENGTH, 1);
    CHECK(copy && copy[0] == 0 && copy[LENGTH / 8 - 1] == 0);
    CHECK(pread(fileno(file), copy, LENGTH, 0) == LENGTH);
    verify(copy, 1, LENGTH);
    fclose(file);
    ffree(copy);

    for (size_t alignment = 1; alignment <= 4 * MIB; alignment *= 2) {
        char *block = faligned_alloc(alignment, 100);
        CHECK(block && (uintptr_t)block % alignment == 0);
        ffree(block);
    }
    ffree(NULL);
    CHECK(frealloc(frealloc(NULL, 10), 0) == NULL);

    pthread_t threads[4];
    for (size_t n = 0; n < 4; n++)
        CHECK(pthread_create(&threads[n], NULL, work, (void *)n) == 0);
    for (size_t n = 0; n < 4; n++)
        CHECK(pthread_join(threads[n], NULL) == 0);

    misuse_is_told();
    CHECK(fmalloc_check() == 0);
    fmalloc_stats_t stats = {.struct_size = sizeof stats};
    CHECK(fmalloc_stats(&stats) == 0);
    CHECK(stats.used_blocks == BLOCKS && stats.misuse >= 4);
    CHECK(stats.budget_bytes == 16 * MIB && stats.peak_resident_bytes <= 16 * MIB);
    CHECK(stats.pages_out > 0 && stats.pages_in > 0);

    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(fmalloc(1) == NULL);
        expect(EINVAL, "parent");
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);

    for (size_t n = 1; n < BLOCKS; n += 2)
        verify(blocks[n], n, LENGTH);
    for (size_t n = 0; n < BLOCKS; n++)
        ffree(blocks[n]);
    CHECK(fmalloc_trim(0) == 0);
    CHECK(fmalloc_stats(&stats) == 0 && stats.used_blocks == 0 && stats.committed_bytes == 0);
    CHECK(fmalloc_close() == 0);
    CHECK(fmalloc_close() == -1);
    expect(EINVAL, "fmalloc_init");

    /* In the spirit of the first fmalloc: a file to swap to, and a size. */
    char path[4096];
    snprintf(path, sizeof path, "%s/swapfile", argv[1]);
    CHECK(fmalloc_init(path, 256 * MIB) == 0);
    char *text = fmalloc(100);
    CHECK(text);
    strcpy(text, "all right");
    puts(text);
    return 0;
}
