/* For the programs of these tests: ends one with a message where something is not as it should be. */
#ifndef FMALLOC_CHECK_H
#define FMALLOC_CHECK_H

#include "fmalloc.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "%s:%d: %s is false; errno %d, %s\n", __FILE__, __LINE__, #what, errno,          \
                    fmalloc_error());                                                                        \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

#endif
