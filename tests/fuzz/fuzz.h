/*
 * fuzz.h - what the targets share: reading choices out of the fuzzer's bytes, and buffers no larger
 * than promised.
 *
 * Every buffer is a heap block of exactly the size that the contract asks for, so that
 * AddressSanitizer sees a single byte too many.  The core's calloc is memory.c's, which runs out
 * when a target wants it to.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pyblock.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/*
 * A finding: says what does not hold and dies, which is how both libFuzzer and replay.c learn of
 * it.
 */
#define MUST(holds)                                                                \
    do {                                                                           \
        if (!(holds)) {                                                            \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #holds);    \
            abort();                                                               \
        }                                                                          \
    } while (0)

typedef struct {
    const uint8_t *at;
    size_t left;
} fuzz_input;

/* Behind the end everything is 0. */
static inline uint64_t fuzz_word(fuzz_input *in, int bytes) {
    uint64_t word = 0;
    for (int i = 0; i < bytes && in->left > 0; i++, in->at++, in->left--) word |= (uint64_t)*in->at << (8 * i);
    return word;
}

/*
 * Any 64 bits can be asked for, but small numbers and those beside a power of two, where bugs live,
 * are near.
 */
static inline int64_t fuzz_number(fuzz_input *in) {
    uint64_t how = fuzz_word(in, 1);
    switch (how % 4) {
    case 0: return (int64_t)(how / 4);
    case 1: return (int64_t)fuzz_word(in, 2);
    case 2: return (int64_t)((UINT64_C(1) << how / 4) + fuzz_word(in, 1) - 128);
    default: return (int64_t)fuzz_word(in, 8);
    }
}

static inline void *fuzz_block(size_t size) {
    void *block = malloc(size);
    MUST(block);
    return block;
}

/* A text of up to most bytes, as long as the next byte says. */
static inline char *fuzz_text(fuzz_input *in, size_t most, size_t *len) {
    *len = (size_t)fuzz_word(in, 1) % (most + 1);
    if (*len > in->left) *len = in->left;
    char *text = fuzz_block(*len);
    if (*len > 0) memcpy(text, in->at, *len);
    in->at += *len;
    in->left -= *len;
    return text;
}

/* memory.c: whether the core's calloc fails, and whether it did. */
extern bool fuzz_no_memory, fuzz_was_refused;

#endif
