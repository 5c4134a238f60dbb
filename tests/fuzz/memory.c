/*
 * memory.c - what the core calls instead of calloc, by a macro in the Makefile: libFuzzer and the
 * sanitizers keep the real one.
 */
#include "fuzz.h"

bool fuzz_no_memory, fuzz_was_refused;

void *fuzz_calloc(size_t count, size_t size);
void *fuzz_calloc(size_t count, size_t size) {
    if (fuzz_no_memory) {
        fuzz_was_refused = true;
        return NULL;
    }
    void *block = malloc(count * size);
    return block ? memset(block, 0, count * size) : NULL;
}
