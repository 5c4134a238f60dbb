/*
 * check.h - a test runner of one page.
 *
 * A test is a function that CHECKs; the first CHECK that does not hold ends it.  main.c runs every
 * test named in TESTS and prints how many passed and failed.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "pyblock.h"

#define TESTS(X)                    \
    X(index_hands_out_the_lowest)   \
    X(index_capacity_edges)         \
    X(index_reserve_and_release)    \
    X(index_crosses_every_level)    \
    X(index_many_is_all_or_none)    \
    X(index_reserve_many_names_bad) \
    X(index_list_in_chunks)         \
    X(index_memory_stays_small)     \
    X(index_against_oracle)         \
    X(index_without_memory)         \
    X(name_examples)                \
    X(name_steps_and_inverse)       \
    X(name_limits)                  \
    X(name_malformed)               \
    X(scsi_every_index)             \
    X(scsi_malformed)               \
    X(id_fits)                      \
    X(id_shortened)                 \
    X(id_limits)                    \
    X(id_known_digests)             \
    X(plan_pairs)                   \
    X(plan_any_two)                 \
    X(threads_never_share_an_index) \
    X(threads_plan_both_ways)       \
    X(threads_write_own_text)       \
    X(fork_beside_threads)          \
    X(fork_leaves_the_parent)

#define DECLARE(name) bool test_##name(void);
TESTS(DECLARE)
#undef DECLARE

#define CHECK(holds)                                                              \
    do {                                                                          \
        if (!(holds)) {                                                           \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #holds);   \
            return false;                                                         \
        }                                                                         \
    } while (0)

/* The length of a string literal, which is how the core wants its text. */
#define TEXT(literal) "" literal, sizeof(literal) - 1

static inline bool same(const char *out, int64_t len, const char *want) {
    return len >= 0 && (size_t)len == strlen(want) && memcmp(out, want, (size_t)len) == 0;
}

/* The same row of numbers in every run, so that a failure can be looked into. */
static inline uint32_t next_random(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*state >> 33);
}

/* After this many more allocations the next ones fail; negative: none does. */
extern int allocations_left;

#endif
