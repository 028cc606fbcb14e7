/*
 * fmalloc: memory larger than RAM, within a budget of RAM.
 *
 *     if (fmalloc_init(NULL, (size_t)64 << 30) != 0) {
 *         fprintf(stderr, "%s\n", fmalloc_error());
 *         return 1;
 *     }
 *     char *block = fmalloc((size_t)10 << 30);
 *     ...
 *     ffree(block);
 *     fmalloc_close();
 *
 * Link with -lfmalloc. All functions may be called from any thread, but for fmalloc_init, fmalloc_init_with and
 * fmalloc_close, during which no other call may be under way. After fork the child has none of the memory; it may call
 * fmalloc_init anew.
 *
 * What fails sets errno and a message, fmalloc_error(), both of them the calling thread's own.
 */

#ifndef FMALLOC_H
#define FMALLOC_H

/* Made from client/capi/src by cbindgen: see client/capi/tests/header.rs. Do not edit. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// For fmalloc_options_t.daemon: the running service if it answers, else a daemon for this process alone.
#define FMALLOC_ANY_DAEMON 0

// The running service.
#define FMALLOC_SERVICE 1

// A daemon for this process alone, with a swap file of its own.
#define FMALLOC_PRIVATE 2

// For fmalloc_advise: no special pattern.
#define FMALLOC_NORMAL 0

// Will be read from front to back.
#define FMALLOC_SEQUENTIAL 1

// Will be read at random: no readahead.
#define FMALLOC_RANDOM 2

// Will be needed soon: read it in.
#define FMALLOC_WILL_NEED 3

// Will not be needed soon: evict it. Its content stays.
#define FMALLOC_COLD 4

// A file for reading: what is written to its memory never gets into the file.
#define FMALLOC_FILE_READ 0

// A file for reading and writing: changes get into it by fmalloc_region_flush, on eviction and at the end.
#define FMALLOC_FILE_SHARED 1

// A file for reading and writing that stays as it is: changes go to swap, and are gone at the end.
#define FMALLOC_FILE_COPY 2

// A RAM budget, and the paging of regions within it.
typedef struct fmalloc_pager_t fmalloc_pager_t;

// Memory that a pager pages, perhaps the content of a file.
typedef struct fmalloc_region_t fmalloc_region_t;

// For fmalloc_init_with. Fill it with zeros, set struct_size to sizeof(fmalloc_options_t), then what is wanted.
typedef struct fmalloc_options_t {
    // sizeof(fmalloc_options_t).
    size_t struct_size;
    // The heap may grow to this many bytes. Addresses only: swap is claimed as it grows.
    size_t size;
    // RAM budget in bytes. 0: the service's default; for a private daemon a quarter of this machine's RAM or of `size`,
    // whichever is less, and 16 MiB at least.
    uint64_t ram;
    // Most bytes that a private daemon's swap file may grow to. 0: the daemon decides.
    uint64_t swap_size;
    // FMALLOC_ANY_DAEMON, FMALLOC_SERVICE or FMALLOC_PRIVATE.
    uint32_t daemon;
    // Accept a userfaultfd with which system calls on swapped-out memory fail with EFAULT, if there is no better one.
    bool user_mode_only;
    // Directory of a private daemon's swap file, on a real disk; or a file in it, whose name does not matter: the swap
    // file never has one. NULL: FMALLOC_SWAP_DIR, then /var/tmp. On Windows the swap file itself, in UTF-8, or a directory;
    // NULL: that for temporary files.
    const char *path;
    // The service's socket. NULL: FMALLOC_SOCKET, then the usual places.
    const char *socket;
    // Shown by fmallocctl. NULL: the name of the executable.
    const char *name;
} fmalloc_options_t;

// Figures of the heap and of its paging. Sizes in bytes; the others are numbers.
typedef struct fmalloc_stats_t {
    // sizeof(fmalloc_stats_t), to be set before the call.
    size_t struct_size;
    // The heap may grow to this.
    uint64_t reserved_bytes;
    // Claimed in the swap file.
    uint64_t committed_bytes;
    // In blocks that the program holds.
    uint64_t used_bytes;
    // Blocks that the program holds.
    uint64_t used_blocks;
    // Most that blocks and what surrounds them have taken.
    uint64_t peak_bytes;
    // The allocator's own tables, in RAM beside the budget.
    uint64_t table_bytes;
    // Bad pointers and second frees so far.
    uint64_t misuse;
    // RAM budget.
    uint64_t budget_bytes;
    // In RAM now.
    uint64_t resident_bytes;
    // The most that was in RAM.
    uint64_t peak_resident_bytes;
    // Only in the swap file.
    uint64_t swapped_bytes;
    // Page faults served.
    uint64_t faults;
    // Pages read from the swap file.
    uint64_t pages_in;
    // Pages written to the swap file.
    uint64_t pages_out;
} fmalloc_stats_t;

// For fmalloc_pager_local. Fill it with zeros, set struct_size, then what is wanted.
typedef struct fmalloc_local_t {
    // sizeof(fmalloc_local_t).
    size_t struct_size;
    // RAM budget in bytes.
    uint64_t budget;
    // Bytes that the swap file has room for.
    uint64_t swap_size;
    // The swap file, in UTF-8; NULL for one in the directory for temporary files. On Linux it has no name, and only the
    // directory counts.
    const char *swap_file;
    // Windows: bytes paged at a time, 4096 to 1048576. 0: the default.
    uint64_t unit;
    // Windows: do not delete the swap file at the end. Its content is not kept.
    uint32_t keep;
} fmalloc_local_t;

// Figures of a pager. Pages have 4096 bytes.
typedef struct fmalloc_pager_stats_t {
    // sizeof(fmalloc_pager_stats_t), to be set before the call.
    size_t struct_size;
    // Budget in bytes.
    uint64_t budget_bytes;
    // Pages in RAM now.
    uint64_t resident_pages;
    // Most pages in RAM so far.
    uint64_t peak_resident_pages;
    // Bytes of page tables and buffers; part of the budget.
    uint64_t overhead_bytes;
    // Pages whose only copy is in the swap file.
    uint64_t swapped_pages;
    // Pages of swap claimed.
    uint64_t claimed_pages;
    // Pages that cannot leave RAM at present.
    uint64_t unevictable_pages;
    // Page faults.
    uint64_t faults;
    // Pages read from the swap file.
    uint64_t pages_in;
    // Pages written to the swap file.
    uint64_t pages_out;
    // Pages evicted without a write, since the swap file had the same bytes.
    uint64_t pages_clean;
    // Failed reads and writes of the swap file.
    uint64_t io_errors;
    // Most that pages in RAM and overhead_bytes have had together, in bytes; never more than the largest budget so far.
    uint64_t peak_held_bytes;
} fmalloc_pager_stats_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Makes the heap of this process.
//
// `path`: NULL for the running service or, if none answers, a private daemon; otherwise a private daemon whose swap file,
// which never has a name, is on the disk of this directory or file. `size`: bytes that the heap may grow to.
//
// Returns 0, or -1 with errno: EINVAL (arguments, or there is a heap already), ENOENT (no daemon, no such directory), EACCES,
// EPERM (no userfaultfd), ENOSPC, ENOMEM, ENOSYS (the kernel is too old); fmalloc_error() says what to do.
//
// # Safety
// The path must be null or a C string.
int fmalloc_init(const char *path, size_t size);

// As fmalloc_init, with options.
//
// # Safety
// The options must be null or valid, their strings too.
int fmalloc_init_with(const struct fmalloc_options_t *options);

// Ends the heap. All of its blocks are gone. No other call may be under way, nor may any thread use a block any more.
// Returns 0, or -1 with errno EINVAL if there is no heap.
int fmalloc_close(void);

// A block of at least `size` bytes, aligned to 16. A size of 0 gives a block as well. NULL with errno ENOMEM if there is no
// memory or swap left, EINVAL if there is no heap.
void *fmalloc(size_t size);

// A block for `count` elements of `size` bytes, all zero. As fmalloc; also ENOMEM if the product is too large.
void *fcalloc(size_t count, size_t size);

// A block of at least `size` bytes whose address is a multiple of `alignment`, a power of two. As fmalloc; EINVAL for
// another alignment.
void *faligned_alloc(size_t alignment, size_t size);

// Changes the size of a block, which may move (then aligned to 16), and gives its address. NULL as `block` is fmalloc; a
// size of 0 frees the block and gives NULL. NULL with errno ENOMEM or EINVAL (no such block) if it fails; the block is
// unchanged then.
//
// # Safety
// If the block moves, the old address must not be used any more.
void *frealloc(void *block, size_t size);

// Frees a block; NULL does nothing. A pointer that is no block of the heap, or was freed before, changes nothing but errno
// (EINVAL), fmalloc_error() and the count in fmalloc_stats_t.
//
// # Safety
// The block must not be used any more.
void ffree(void *block);

// How many bytes of a block may be used: at least those asked for. 0 for NULL; 0 with errno EINVAL for what is no block.
size_t fmalloc_usable_size(const void *block);

// Gives the daemon a hint about `length` bytes of the heap, one of those above. Returns at once, 0, or -1 with errno.
int fmalloc_advise(const void *start, size_t length, uint32_t advice);

// Gives free memory back to RAM and swap, but for `keep` bytes at the end of the heap. Returns 0, or -1 with errno.
int fmalloc_trim(size_t keep);

// Fills in figures. Takes time in proportion to the heap. Returns 0, or -1 with errno: EINVAL (no heap, or struct_size is not
// set), EPIPE (the daemon is gone).
//
// # Safety
// `stats` must be null or valid, with its struct_size set.
int fmalloc_stats(struct fmalloc_stats_t *stats);

// Whether all records of the heap agree; for tests, while no other thread allocates or frees. Returns 0, or -1 with errno
// EINVAL and what is damaged in fmalloc_error().
int fmalloc_check(void);

// Pages for this process alone: within it on Windows, by a private daemon on Linux. NULL with errno and a message if it
// fails.
//
// # Safety
// `paging` must be null or valid, its string null or ended by a zero byte.
struct fmalloc_pager_t *fmalloc_pager_local(const struct fmalloc_local_t *paging);

// Connects to the service of a Linux machine, for a RAM budget in bytes or, with 0, its default. NULL with errno and a
// message if it fails.
struct fmalloc_pager_t *fmalloc_pager_connect(uint64_t budget);

// Ends the use of a pager; its regions keep what they need. NULL does nothing.
//
// # Safety
// `pager` must be null or one from above, and not be used any more.
void fmalloc_pager_close(struct fmalloc_pager_t *pager);

// Changes the RAM budget, in bytes, and returns when RAM is within it. Returns 0, or -1 with errno and a message.
//
// # Safety
// `pager` must be valid.
int fmalloc_pager_set_budget(const struct fmalloc_pager_t *pager, uint64_t bytes);

// Fills in figures. Returns 0, or -1 with errno and a message.
//
// # Safety
// `pager` must be valid; `stats` as well, with its struct_size set.
int fmalloc_pager_stats(const struct fmalloc_pager_t *pager, struct fmalloc_pager_stats_t *stats);

// Memory of `length` bytes, zero at first. NULL with errno and a message if it fails.
//
// # Safety
// `pager` must be valid.
struct fmalloc_region_t *fmalloc_region_open(const struct fmalloc_pager_t *pager, uint64_t length);

// Gives a region back. NULL does nothing.
//
// # Safety
// `region` must be null or one from above; neither it nor its memory may be used any more.
void fmalloc_region_close(struct fmalloc_region_t *region);

// Start of a region's memory.
//
// # Safety
// `region` must be valid.
void *fmalloc_region_address(const struct fmalloc_region_t *region);

// Bytes of a region.
//
// # Safety
// `region` must be valid.
uint64_t fmalloc_region_length(const struct fmalloc_region_t *region);

// Returns when what was changed in a part of a shared file's content is on the disk; with other regions there is nothing to do.
// Returns 0, or -1 with errno and a message: then the changes are still in memory.
//
// # Safety
// `region` must be valid.
int fmalloc_region_flush(const struct fmalloc_region_t *region, uint64_t offset, uint64_t length);

// A hint about a part of a region, one of FMALLOC_NORMAL and so on. Returns 0, or -1 with errno and a message.
//
// # Safety
// `region` must be valid.
int fmalloc_region_advise(const struct fmalloc_region_t *region, uint64_t offset, uint64_t length, uint32_t advice);

// Drops the content of a part of a region: it is zero from now on, and takes no RAM. Returns 0, or -1 with errno and a
// message.
//
// # Safety
// `region` must be valid, and nobody may use the part meanwhile.
int fmalloc_region_discard(const struct fmalloc_region_t *region, uint64_t offset, uint64_t length);

// Keeps a part of a region in RAM until fmalloc_region_unpin, readable or, unless `write` is 0, writable for system calls.
// On Linux they can be given any part at any time, and this does nothing. Returns 0, or -1 with errno and a message.
//
// # Safety
// `region` must be valid.
int fmalloc_region_pin(const struct fmalloc_region_t *region, uint64_t offset, uint64_t length, int write);

// Ends fmalloc_region_pin for the same part.
//
// # Safety
// `region` must be valid, and the part one that was pinned.
void fmalloc_region_unpin(const struct fmalloc_region_t *region, uint64_t offset, uint64_t length);

// A pager for files: with a budget of 0 the one that this process has for them, which is a connection to the service or else a
// private daemon, and its budget that of FMALLOC_RAM or the default; otherwise one of its own with this budget in bytes. NULL
// with errno and a message if it fails.
struct fmalloc_pager_t *fmalloc_pager_default(uint64_t budget);

// The content of a file in memory, from `offset` on, which must be a multiple of 4096; a length of 0 means up to its end. `path`
// is in UTF-8 on Windows. `mode`: one of FMALLOC_FILE_READ and so on. Nobody else should write to the file meanwhile. NULL with
// errno and a message if it fails; ENOSYS on Windows, where this does not exist yet.
//
// # Safety
// `pager` must be valid, the path a C string.
struct fmalloc_region_t *fmalloc_region_open_file(const struct fmalloc_pager_t *pager, const char *path, uint64_t offset, uint64_t length, uint32_t mode);

// What the last call of this thread that failed had to say, in English; empty if none has. Valid until the next failure
// in this thread.
const char *fmalloc_error(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FMALLOC_H */
