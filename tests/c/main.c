/*
 * main.c - runs all tests, and stands between the core and calloc so that a test can make memory
 * run out.
 */
#include <stdlib.h>

#include "check.h"

int allocations_left = -1;

/* The linker's --wrap=calloc leads the core's calls here. */
void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);

void *__wrap_calloc(size_t count, size_t size) {
    if (allocations_left == 0) return NULL;
    if (allocations_left > 0) allocations_left--;
    return __real_calloc(count, size);
}

int main(void) {
    int passed = 0, failed = 0;
#define RUN(name)                                    \
    if (test_##name()) {                             \
        passed++;                                    \
    } else {                                         \
        failed++;                                    \
        fprintf(stderr, "FAILED: %s\n", #name);      \
    }
    TESTS(RUN)
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
