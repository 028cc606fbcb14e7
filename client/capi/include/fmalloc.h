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
    // file never has one. NULL: FMALLOC_SWAP_DIR, then /var/tmp.
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

// What the last call of this thread that failed had to say, in English; empty if none has. Valid until the next failure
// in this thread.
const char *fmalloc_error(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FMALLOC_H */
