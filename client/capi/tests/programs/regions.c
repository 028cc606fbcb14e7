/* Pagers and regions from C, on Windows and on Linux. Usage: regions SWAP_FILE [FILE], which is one to be made and mapped */
#include "check.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((uint64_t)1 << 20)
#define BUDGET (16 * MIB)
#define SIZE (64 * MIB)

static fmalloc_pager_stats_t stats(const fmalloc_pager_t *pager)
{
    fmalloc_pager_stats_t stats = {0};
    CHECK(fmalloc_pager_stats(pager, &stats) == -1 && errno == EINVAL);
    stats.struct_size = sizeof stats;
    CHECK(fmalloc_pager_stats(pager, &stats) == 0);
    CHECK(stats.peak_held_bytes <= BUDGET);
    return stats;
}

static void memory(const char *swap)
{
    fmalloc_local_t local = {0};
    CHECK(fmalloc_pager_local(&local) == NULL && errno == EINVAL);
    local.struct_size = sizeof local;
    local.budget = 4096;
    local.swap_size = 2 * SIZE;
    local.swap_file = swap;
    CHECK(fmalloc_pager_local(&local) == NULL && errno == EINVAL && strstr(fmalloc_error(), "at least"));
    local.budget = BUDGET;
    fmalloc_pager_t *pager = fmalloc_pager_local(&local);
    CHECK(pager != NULL);
    CHECK(fmalloc_region_open(pager, (uint64_t)1 << 40) == NULL && strlen(fmalloc_error()) > 0);

    fmalloc_region_t *region = fmalloc_region_open(pager, SIZE);
    CHECK(region != NULL && fmalloc_region_length(region) == SIZE);
    uint64_t *words = fmalloc_region_address(region);
    CHECK(fmalloc_region_advise(region, 0, SIZE, FMALLOC_SEQUENTIAL) == 0);
    CHECK(fmalloc_region_advise(region, 0, SIZE, 99) == -1 && errno == EINVAL);
    CHECK(fmalloc_region_advise(region, SIZE, 4096, FMALLOC_NORMAL) == -1 && errno == EINVAL);
    for (size_t at = 0; at < SIZE / 8; at++)
        words[at] = at;
    for (size_t at = 0; at < SIZE / 8; at++)
        CHECK(words[at] == at);
    CHECK(stats(pager).pages_out > 0 && stats(pager).pages_in > 0);

    CHECK(fmalloc_region_advise(region, 0, SIZE, FMALLOC_COLD) == 0);
    CHECK(fmalloc_region_pin(region, 100, 10000, 1) == 0);
    CHECK(words[13] == 13);
    fmalloc_region_unpin(region, 100, 10000);
    CHECK(fmalloc_region_pin(region, SIZE - 10, 11, 0) == -1 && errno == EINVAL);
    CHECK(fmalloc_region_discard(region, MIB, MIB) == 0);
    CHECK(words[MIB / 8] == 0 && words[MIB / 8 - 1] == MIB / 8 - 1 && words[2 * MIB / 8] == 2 * MIB / 8);
    CHECK(fmalloc_region_flush(region, 0, SIZE) == 0);
    CHECK(fmalloc_pager_set_budget(pager, BUDGET - 4 * MIB) == 0);
    CHECK(stats(pager).budget_bytes == BUDGET - 4 * MIB);
    CHECK(fmalloc_pager_set_budget(pager, 1) == -1);

    fmalloc_pager_close(pager);
    CHECK(words[SIZE / 8 - 1] == SIZE / 8 - 1);
    fmalloc_region_close(region);
    fmalloc_region_close(NULL);
    fmalloc_pager_close(NULL);
    CHECK(fmalloc_region_address(NULL) == NULL && errno == EINVAL);
}

static void file(const char *path)
{
    static unsigned char bytes[3 * 4096 + 5];
    memset(bytes, 7, sizeof bytes);
    FILE *made = fopen(path, "w+b");
    CHECK(made && fwrite(bytes, 1, sizeof bytes, made) == sizeof bytes && fflush(made) == 0);

    fmalloc_pager_t *pager = fmalloc_pager_default(BUDGET);
    CHECK(pager != NULL);
    CHECK(fmalloc_region_open_file(pager, NULL, 0, 0, FMALLOC_FILE_READ) == NULL && errno == EINVAL);
    CHECK(fmalloc_region_open_file(pager, path, 0, 0, 3) == NULL && errno == EINVAL);
    CHECK(fmalloc_region_open_file(pager, "/nonexistent", 0, 0, FMALLOC_FILE_READ) == NULL && errno == ENOENT);
    CHECK(strstr(fmalloc_error(), "/nonexistent"));

    fmalloc_region_t *shared = fmalloc_region_open_file(pager, path, 4096, 0, FMALLOC_FILE_SHARED);
    fmalloc_region_t *copy = fmalloc_region_open_file(pager, path, 0, 4096, FMALLOC_FILE_COPY);
    CHECK(shared && copy);
    CHECK(fmalloc_region_length(shared) == 2 * 4096 + 5 && fmalloc_region_length(copy) == 4096);
    unsigned char *at = fmalloc_region_address(shared), *own = fmalloc_region_address(copy);
    CHECK(at[0] == 7 && at[2 * 4096 + 4] == 7 && own[4095] == 7);
    at[1] = 8;
    own[1] = 9;
    CHECK(fmalloc_region_flush(shared, 0, 4096) == 0 && fmalloc_region_flush(copy, 0, 4096) == 0);
    CHECK(fmalloc_region_flush(shared, 2 * 4096, 6) == -1 && errno == EINVAL);
    CHECK(fmalloc_region_advise(shared, 0, 4096, FMALLOC_COLD) == 0 && at[1] == 8);
    CHECK(fmalloc_region_discard(shared, 0, 4096) == -1 && errno == EINVAL);
    CHECK(fmalloc_region_pin(shared, 0, 4096, 1) == 0);
    fmalloc_region_unpin(shared, 0, 4096);
    CHECK(fseek(made, 4096, SEEK_SET) == 0 && fread(bytes, 1, 2, made) == 2 && bytes[1] == 8);
    fmalloc_region_close(shared);
    fmalloc_region_close(copy);
    fmalloc_pager_close(pager);
    CHECK(fseek(made, 0, SEEK_SET) == 0 && fread(bytes, 1, 2, made) == 2 && bytes[1] == 7);
    fclose(made);
}

int main(int count, char **arguments)
{
    CHECK(count == 2 || count == 3);
    memory(arguments[1]);
    if (count == 3)
        file(arguments[2]);
    else
        CHECK(fmalloc_pager_default(BUDGET) != NULL || errno == ENOSYS);
    printf("all right\n");
    return 0;
}
