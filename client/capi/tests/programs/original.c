/* What users of the original library write, on Windows and on Linux. Usage: original SWAP_FILE */
#include "fmalloc.h"

#include <stdio.h>
#include <string.h>

#define MIB ((size_t)1 << 20)

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, fmalloc_error());
    return 1;
}

int main(int count, char **arguments)
{
    if (count != 2 || fmalloc_init(arguments[1], 256 * MIB) != 0)
        return failed("fmalloc_init");
    if (fmalloc_init(arguments[1], 256 * MIB) == 0)
        return failed("a second fmalloc_init");

    /* Twice the RAM that the heap has. */
    size_t bytes = 100 * MIB;
    unsigned char *block = fmalloc(bytes);
    if (block == NULL)
        return failed("fmalloc");
    for (size_t at = 0; at < bytes; at++)
        block[at] = (unsigned char)(at >> 12 ^ at);
    block = frealloc(block, bytes + 28 * MIB);
    if (block == NULL)
        return failed("frealloc");
    for (size_t at = 0; at < bytes; at++)
        if (block[at] != (unsigned char)(at >> 12 ^ at))
            return failed("the content");
    block = frealloc(block, 10);
    if (block == NULL || block[9] != 9)
        return failed("frealloc to less");
    ffree(block);
    ffree(NULL);

    if (fmalloc(1000 * MIB) != NULL || strlen(fmalloc_error()) == 0)
        return failed("more than there is");
    if (fmalloc_check() != 0 || fmalloc_close() != 0)
        return failed("fmalloc_close");
    if (fmalloc_close() == 0)
        return failed("a second fmalloc_close");
    printf("all right\n");
    return 0;
}
