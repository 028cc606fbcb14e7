/*
 * Records what a program allocates and frees, for tests/src/trace.rs. With gcc:
 *
 *     gcc -O2 -fPIC -shared -o record.so record.c -ldl
 *     LD_PRELOAD=$PWD/record.so FMALLOC_TRACE=python.trace python3 -c '...'
 *
 * Each event is a number in LEB128, its two lowest bits the kind: 0 malloc, calloc or aligned (size), 1 free (how many blocks
 * ago it was allocated), 2 realloc (as free; the new size follows as a number of its own). Blocks are counted as they are made,
 * a realloc makes one. Only the process started is recorded, not its children, at most EVENTS events.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EVENTS 60000
#define TABLE (1u << 20)

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { uintptr_t block; uint64_t number; } table[TABLE];
static unsigned char buffer[EVENTS * 12];
static size_t used, events;
static uint64_t made;
static int file = -2;

static size_t slot(uintptr_t block)
{
    size_t at = (block >> 4) * 0x9e3779b97f4a7c15u >> 44;
    while (table[at].block && table[at].block != block)
        at = (at + 1) % TABLE;
    return at;
}

static void put(uint64_t n)
{
    do
        buffer[used++] = (n & 127) | (n > 127 ? 128 : 0);
    while (n >>= 7);
}

static int begin(void)
{
    if (file == -2) {
        const char *path = getenv("FMALLOC_TRACE");
        file = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
        unsetenv("FMALLOC_TRACE");
    }
    return file >= 0 && events < EVENTS;
}

/* The number of a block that goes; 0 if it was not recorded. A slot once used stays taken. */
static uint64_t forget(void *block)
{
    size_t at = slot((uintptr_t)block);
    uint64_t number = table[at].block ? table[at].number : 0;
    table[at].number = 0;
    return number;
}

static void add(void *block)
{
    size_t at = slot((uintptr_t)block);
    table[at].block = (uintptr_t)block;
    table[at].number = ++made;
}

static void *allocated(void *block, size_t size)
{
    pthread_mutex_lock(&lock);
    if (block && begin()) {
        put((uint64_t)size << 2);
        add(block);
        events++;
    }
    pthread_mutex_unlock(&lock);
    return block;
}

void *malloc(size_t size) { return allocated(__libc_malloc(size), size); }
void *calloc(size_t count, size_t size) { return allocated(__libc_calloc(count, size), count * size); }
void *memalign(size_t align, size_t size) { return allocated(__libc_memalign(align, size), size); }
void *aligned_alloc(size_t align, size_t size) { return memalign(align, size); }
int posix_memalign(void **to, size_t align, size_t size) { return (*to = memalign(align, size)) ? 0 : ENOMEM; }

void free(void *block)
{
    pthread_mutex_lock(&lock);
    uint64_t number = block && begin() ? forget(block) : 0;
    if (number) {
        put((made - number) << 2 | 1);
        events++;
    }
    pthread_mutex_unlock(&lock);
    __libc_free(block);
}

void *realloc(void *block, size_t size)
{
    if (!block)
        return malloc(size);
    pthread_mutex_lock(&lock);
    uint64_t number = begin() ? forget(block) : 0;
    uint64_t ago = made - number;
    void *moved = __libc_realloc(block, size);
    if (number && moved) {
        put(ago << 2 | 2);
        put(size);
        add(moved);
        events++;
    }
    pthread_mutex_unlock(&lock);
    return moved;
}

__attribute__((destructor)) static void end(void)
{
    if (file >= 0 && write(file, buffer, used) != (ssize_t)used)
        _exit(99);
}
